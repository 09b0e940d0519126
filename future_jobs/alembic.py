"""Let an application's own Alembic make the tables.

One line in its ``env.py`` does it::

    import future_jobs.alembic

From then on ``alembic revision --autogenerate`` writes, when the database it looks at lacks the tables or a revision
of them, ::

    op.future_jobs("0002", since=None)

into the migration, and the way back into its ``downgrade()``; it never proposes to create, alter or drop a table of
this library by itself; and ``alembic check`` finds nothing once the migration has run. The operation runs this
library's own revisions and notes them in ``future_jobs_version``, exactly as ``future-jobs db upgrade`` does, so a
database that came to its tables another way is left as it is.

With several databases in one Alembic environment, ``context.configure(..., future_jobs=False)`` leaves one out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alembic import util
from alembic.autogenerate import comparators, renderers
from alembic.operations import MigrateOperation, Operations

from . import schema
from .models import metadata

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps

__all__ = ["FutureJobsOp"]

PREFIX = "future_jobs_"  # of every table, those of newer versions included


@Operations.register_operation("future_jobs")
class FutureJobsOp(MigrateOperation):
    """``op.future_jobs(revision, since=...)``: take this library's tables from one of its revisions to another."""

    def __init__(self, revision: str | None, since: str | None) -> None:
        self.revision = revision
        self.since = since

    @classmethod
    def future_jobs(cls, operations: Operations, revision: str | None, *, since: str | None) -> None:
        """Take the tables of future_jobs from revision ``since`` to ``revision``; None stands for no tables.

        Online, a database that is already there is left as it is. Offline (``--sql``), its SQL is written.
        """
        operations.invoke(cls(revision, since))

    def reverse(self) -> FutureJobsOp:
        """Return the way back."""
        return FutureJobsOp(self.since, self.revision)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return ("future_jobs", self.revision, self.since)


@Operations.implementation_for(FutureJobsOp)
def _run(operations: Operations, operation: FutureJobsOp) -> None:
    schema.within(operations, operation.since, operation.revision)


@renderers.dispatch_for(FutureJobsOp)
def _render(context: AutogenContext, operation: FutureJobsOp) -> str:
    prefix = context.opts.get("alembic_module_prefix") or ""
    return f"{prefix}future_jobs({_quoted(operation.revision)}, since={_quoted(operation.since)})"


def _quoted(revision: str | None) -> str:
    return "None" if revision is None else f'"{revision}"'


def _compare(context: AutogenContext, upgrade_ops: UpgradeOps, _schemas: object) -> None:
    """Hide our tables from the comparison that follows, and propose our own operation if they are not up to date.

    It comes first in the migration, and so last in its ``downgrade()``.
    """
    connection = context.connection
    if connection is None or context.migration_context.version_table == schema.VERSION_TABLE:
        return  # it is this library's own comparison
    _hide_our_tables(context)
    if context.opts.get("future_jobs") is False:
        return
    found = schema.current(connection)
    if found is None or found < schema.HEAD:
        upgrade_ops.ops.insert(0, FutureJobsOp(schema.HEAD, since=found))


def _hide_our_tables(context: AutogenContext) -> None:
    theirs = {table.name for table in context.sorted_tables} - {*metadata.tables}
    name_filters, object_filters = context.run_name_filters, context.run_object_filters

    def is_ours(name: str | None, kind: str) -> bool:
        return kind == "table" and name is not None and name.startswith(PREFIX) and name not in theirs

    def run_name_filters(name: str | None, type_: Any, parent_names: Any) -> bool:
        return not is_ours(name, type_) and name_filters(name, type_, parent_names)

    def run_object_filters(object_: Any, name: Any, type_: Any, reflected: Any, compare_to: Any) -> bool:
        return not is_ours(name, type_) and object_filters(object_, name, type_, reflected, compare_to)

    context.run_name_filters = run_name_filters  # type: ignore[method-assign]
    context.run_object_filters = run_object_filters  # type: ignore[method-assign]


if hasattr(util, "DispatchPriority"):
    comparators.dispatch_for("schema", priority=util.DispatchPriority.FIRST)(_compare)
else:  # before Alembic 1.18 all run in the order in which they were registered
    comparators.dispatch_for("schema")(_compare)
    registered: list[Any] = comparators._registry["schema", "default"]  # noqa: SLF001
    registered.insert(0, registered.pop())
