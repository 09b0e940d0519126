"""Keep limited jobs apart, and make the tables of limits, paused queues and workers."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from future_jobs.dialects import LongText, UTCDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OPTIONS: dict[str, Any] = {
    "sqlite_autoincrement": True,
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_bin",
}

JOBS = "future_jobs_scheduled_job"
DUE = ["limited", "queue", "priority", "run_at", "id", "limited_by"]


def upgrade() -> None:
    op.create_table(
        "future_jobs_queue",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("paused_at", UTCDateTime, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_future_jobs_queue")),
        **OPTIONS,
    )
    op.create_table(
        "future_jobs_limit",
        sa.Column("name", sa.String(261), nullable=False),
        sa.Column("starts", LongText),
        sa.Column("kept_until", UTCDateTime),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_future_jobs_limit")),
        **OPTIONS,
    )
    op.create_table(
        "future_jobs_worker",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("queues", LongText, nullable=False),
        sa.Column("started_at", UTCDateTime, nullable=False),
        sa.Column("seen_at", UTCDateTime, nullable=False),
        sa.Column("lease_seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_future_jobs_worker")),
        **OPTIONS,
    )

    op.add_column(JOBS, sa.Column("rate_limit", sa.String(32)))
    op.add_column(JOBS, sa.Column("limited_by", sa.String(320)))
    op.add_column(JOBS, sa.Column("limited", sa.Boolean, server_default="0", nullable=False))
    op.drop_index("ix_future_jobs_concurrency", JOBS)
    if has_partial_indexes():
        op.drop_index("ix_future_jobs_due", JOBS)
        partial_index("ix_future_jobs_due", DUE, "status = 'scheduled'")
        partial_index(
            "ix_future_jobs_concurrency", ["concurrency_key"], "status = 'running' AND concurrency_key IS NOT NULL"
        )
    else:
        op.drop_index("ix_future_jobs_status", JOBS)
        op.create_index("ix_future_jobs_status", JOBS, ["status", *DUE])


def downgrade() -> None:
    due = ["queue", "priority", "run_at", "id"]
    if has_partial_indexes():
        op.drop_index("ix_future_jobs_concurrency", JOBS)
        op.drop_index("ix_future_jobs_due", JOBS)
        partial_index("ix_future_jobs_due", due, "status = 'scheduled'")
    else:
        op.drop_index("ix_future_jobs_status", JOBS)
        op.create_index("ix_future_jobs_status", JOBS, ["status", *due])
    partial_index("ix_future_jobs_concurrency", ["concurrency_key", "status"], "concurrency_key IS NOT NULL")
    for column in ("limited", "limited_by", "rate_limit"):
        op.drop_column(JOBS, column)
    for table in ("future_jobs_worker", "future_jobs_limit", "future_jobs_queue"):
        op.drop_table(table)


def has_partial_indexes() -> bool:
    """Tell whether an index may hold some rows only."""
    return op.get_context().dialect.name not in {"mysql", "mariadb"}


def partial_index(name: str, columns: list[str], where: str) -> None:
    """Make an index on some rows; on all, where a database has no partial indexes."""
    op.create_index(name, JOBS, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
