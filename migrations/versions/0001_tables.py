"""Make the tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from future_jobs.dialects import BigKey, LongText, UTCDateTime

revision = "0001"
down_revision = None
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

UNIQUE_SLOT = "CASE WHEN status = 'scheduled' OR (status = 'running' AND unique_until = 'finished') THEN unique_key END"


def upgrade() -> None:
    op.create_table(
        "future_jobs_scheduled_job",
        sa.Column("id", BigKey, nullable=False),
        sa.Column("callable_name", sa.String(500), nullable=False),
        sa.Column("args", LongText, nullable=False),
        sa.Column("kwargs", LongText, nullable=False),
        sa.Column("content_type", sa.String(255)),
        sa.Column("content_key", sa.String(255)),
        sa.Column("options", LongText),
        sa.Column("tags", LongText),
        sa.Column("queue", sa.String(100), nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("run_at", UTCDateTime, nullable=False),
        sa.Column("nominal_at", UTCDateTime, nullable=False),
        sa.Column("expires_at", UTCDateTime),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("losses", sa.Integer, nullable=False),
        sa.Column("snoozes", sa.Integer, nullable=False),
        sa.Column("leased_by", sa.String(200)),
        sa.Column("leased_until", UTCDateTime),
        sa.Column("cancel_requested_at", UTCDateTime),
        sa.Column("created_at", UTCDateTime, nullable=False),
        sa.Column("started_at", UTCDateTime),
        sa.Column("finished_at", UTCDateTime),
        sa.Column("return_value", LongText),
        sa.Column("error", LongText),
        sa.Column("progress", LongText),
        sa.Column("unique_key", sa.String(255)),
        sa.Column("unique_until", sa.String(8)),
        sa.Column("unique_slot", sa.String(255), sa.Computed(UNIQUE_SLOT, persisted=True)),
        sa.Column("concurrency_key", sa.String(255)),
        sa.Column("concurrency_limit", sa.Integer),
        sa.Column("recurring_id", BigKey),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_future_jobs_scheduled_job")),
        **OPTIONS,
    )
    jobs = "future_jobs_scheduled_job"
    if op.get_context().dialect.name in {"mysql", "mariadb"}:
        op.create_index("ix_future_jobs_status", jobs, ["status", "queue", "priority", "run_at", "id"])
    else:
        partial_index("ix_future_jobs_due", jobs, ["queue", "priority", "run_at", "id"], "status = 'scheduled'")
        partial_index("ix_future_jobs_running", jobs, ["leased_by"], "status = 'running'")
    partial_index("uq_future_jobs_unique_slot", jobs, ["unique_slot"], "unique_slot IS NOT NULL", unique=True)
    partial_index("ix_future_jobs_content", jobs, ["content_type", "content_key"], "content_type IS NOT NULL")
    partial_index("ix_future_jobs_concurrency", jobs, ["concurrency_key", "status"], "concurrency_key IS NOT NULL")
    partial_index(
        "uq_future_jobs_recurring", jobs, ["recurring_id", "nominal_at"], "recurring_id IS NOT NULL", unique=True
    )

    op.create_table(
        "future_jobs_job_failure",
        sa.Column("id", BigKey, nullable=False),
        sa.Column("job_id", BigKey, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("failed_at", UTCDateTime, nullable=False),
        sa.Column("worker", sa.String(200)),
        sa.Column("error_type", sa.String(255), nullable=False),
        sa.Column("traceback", LongText, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_future_jobs_job_failure")),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["future_jobs_scheduled_job.id"],
            name=op.f("fk_future_jobs_job_failure_job_id"),
            ondelete="CASCADE",
        ),
        **OPTIONS,
    )
    op.create_index("ix_future_jobs_failure_job", "future_jobs_job_failure", ["job_id"])

    op.create_table(
        "future_jobs_recurring_job",
        sa.Column("id", BigKey, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("rule", LongText, nullable=False),
        sa.Column("timezone", sa.String(64)),
        sa.Column("anchor_at", UTCDateTime, nullable=False),
        sa.Column("callable_name", sa.String(500), nullable=False),
        sa.Column("args", LongText, nullable=False),
        sa.Column("kwargs", LongText, nullable=False),
        sa.Column("content_type", sa.String(255)),
        sa.Column("content_key", sa.String(255)),
        sa.Column("options", LongText, nullable=False),
        sa.Column("catch_up", sa.String(10), nullable=False),
        sa.Column("catch_up_window", sa.String(64)),
        sa.Column("overlap", sa.String(10), nullable=False),
        sa.Column("jitter", sa.String(64)),
        sa.Column("start_at", UTCDateTime),
        sa.Column("end_at", UTCDateTime),
        sa.Column("run_limit", sa.Integer),
        sa.Column("next_run_at", UTCDateTime),
        sa.Column("last_run_at", UTCDateTime),
        sa.Column("paused_at", UTCDateTime),
        sa.Column("fired", BigKey, nullable=False),
        sa.Column("missed", BigKey, nullable=False),
        sa.Column("skipped", BigKey, nullable=False),
        sa.Column("error", LongText),
        sa.Column("created_at", UTCDateTime, nullable=False),
        sa.Column("updated_at", UTCDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_future_jobs_recurring_job")),
        sa.UniqueConstraint("name", name=op.f("uq_future_jobs_recurring_job_name")),
        **OPTIONS,
    )
    partial_index("ix_future_jobs_next_run", "future_jobs_recurring_job", ["next_run_at"], "paused_at IS NULL")


def downgrade() -> None:
    op.drop_table("future_jobs_recurring_job")
    op.drop_table("future_jobs_job_failure")
    op.drop_table("future_jobs_scheduled_job")


def partial_index(name: str, table: str, columns: list[str], where: str, *, unique: bool = False) -> None:
    """Make an index on some rows; on all, where a database has no partial indexes."""
    op.create_index(name, table, columns, unique=unique, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
