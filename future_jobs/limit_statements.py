"""The statements of what is limited: groups of jobs that wait for each other, paused queues, and who is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, cast

from sqlalchemy import Select, Text, and_, bindparam, delete, func, or_, select, type_coerce, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.schema import Table
from sqlalchemy.sql.dml import Insert

from .dialects import Backend, Encoded, UTCDateTime, backend_of, insert_unless_there
from .models import Limit, Queue, RunningWorker
from .statements import DUE, LIMITED, RUNNING, J, Level, due_after

__all__ = ["Waiting"]

LIMITS = cast("Table", Limit.__table__)
QUEUES = cast("Table", Queue.__table__)
WORKERS = cast("Table", RunningWorker.__table__)


class Waiting(NamedTuple):
    """A limited job that is due: what decides whether it may start."""

    id: int
    run_at: datetime
    queue: str
    concurrency_key: str | None
    concurrency_limit: int | None
    rate_limit: str | None
    limited_by: str | None

    @property
    def limit_name(self) -> str:
        """The name of the `Limit` that its claimer locks, and where its starts are counted."""
        return f"queue:{self.queue}" if self.concurrency_key is None else f"key:{self.concurrency_key}"


# --- jobs ---------------------------------------------------------------------------------------------------------


def due(
    connection: Connection,
    level: Level,
    *,
    after: tuple[datetime, int],
    newest: int,
    without: Collection[str],
    now: datetime,
    limit: int,
) -> list[Waiting]:
    """Return the first limited jobs of ``level`` that are due, come after ``after``, and are of no group ``without``.

    ix_future_jobs_due or ix_future_jobs_status, which has the group: what is left out is not read from the table.
    """
    params = {**due_after(level, after=after, newest=newest, now=now, limit=limit), "without": list(without)}
    return [*map(Waiting._make, connection.execute(_due(bool(without)), params))]


@cache
def _due(without_some: bool) -> Select[Any]:
    conditions = [J.limited_by.not_in(bindparam("without", expanding=True))] if without_some else []
    return (
        select(*(J[name] for name in Waiting._fields))
        .where(*DUE, LIMITED, *conditions)
        .order_by(J.run_at, J.id)
        .limit(bindparam("limit"))
    )


def running(connection: Connection, keys: Iterable[str]) -> Counter[str]:
    """Return how many jobs of each of ``keys`` run. ix_future_jobs_concurrency or ix_future_jobs_status."""
    wanted = list(keys)
    return Counter(connection.scalars(_RUNNING, {"keys": wanted}) if wanted else ())


_OF_KEYS = and_(RUNNING, LIMITED, J.concurrency_key.in_(bindparam("keys", expanding=True)))
_RUNNING = select(J.concurrency_key).where(_OF_KEYS)  # few rows: counting them there would sort them


def holders(connection: Connection, key: str) -> list[int]:
    """Return the ids of the running jobs of ``key``. The index of `running`."""
    return list(connection.scalars(select(J.id).where(_OF_KEYS).order_by(J.id), {"keys": [key]}))


# --- limits: primary key ------------------------------------------------------------------------------------------


def starts(connection: Connection, names: Iterable[str]) -> dict[str, str | None]:
    """Return the starts that are counted under each of ``names``, as the text that is stored."""
    wanted = list(names)
    return _pairs(connection.execute(_STARTS, {"names": wanted})) if wanted else {}


def lock(connection: Connection, names: Sequence[str]) -> dict[str, str | None]:
    """Lock the limits ``names`` until the transaction ends; return the starts of those that nobody else holds.

    What is missing is made, in order of the names: two claimers may wait for each other's, which is not committed yet.
    """
    backend = backend_of(connection)
    if missing := sorted(set(names) - starts(connection, names).keys()):
        connection.execute(_insert_limit(backend), [{"name": name} for name in missing])
    statement = _STARTS.with_for_update(skip_locked=True) if backend.skip_locked else _STARTS
    return _pairs(connection.execute(statement, {"names": names}))


_STARTS = select(LIMITS.c.name, type_coerce(LIMITS.c.starts, Text)).where(
    LIMITS.c.name.in_(bindparam("names", expanding=True))
)


@cache
def _insert_limit(backend: Backend) -> Insert:
    return insert_unless_there(backend, LIMITS)


def keep_starts(connection: Connection, name: str, text: str, kept_until: datetime | None) -> None:
    """Write the starts of a limit that is locked."""
    connection.execute(_KEEP, {"_name": name, "starts": Encoded(text), "kept_until": kept_until})


_KEEP = update(LIMITS).where(LIMITS.c.name == bindparam("_name"))


def forget_limits(connection: Connection, *, before: datetime) -> int:
    """Delete the limits that have said nothing since ``before``; whoever needs one makes it again."""
    idle = or_(LIMITS.c.kept_until.is_(None), LIMITS.c.kept_until < bindparam("before", type_=UTCDateTime))
    return connection.execute(delete(LIMITS).where(idle), {"before": before}).rowcount


# --- queues: primary key ------------------------------------------------------------------------------------------


def paused(connection: Connection) -> dict[str, datetime]:
    """Return the queues that are paused, and since when."""
    return _pairs(connection.execute(select(QUEUES.c.name, QUEUES.c.paused_at)))


def pause(connection: Connection, queue: str, *, now: datetime) -> bool:
    """Note that ``queue`` is paused; tell whether it was not."""
    statement = insert_unless_there(backend_of(connection), QUEUES).execution_options(preserve_rowcount=True)
    return connection.execute(statement, {"name": queue, "paused_at": now}).rowcount == 1


def resume(connection: Connection, queue: str) -> bool:
    """Note that ``queue`` is paused no more; tell whether it was."""
    return connection.execute(delete(QUEUES).where(QUEUES.c.name == queue)).rowcount == 1


# --- workers: primary key -----------------------------------------------------------------------------------------


def register(connection: Connection, values: Mapping[str, Any]) -> None:
    """Insert the row of a worker that starts, unless it is there: the first try may have been committed."""
    connection.execute(insert_unless_there(backend_of(connection), WORKERS), dict(values))


def seen(connection: Connection, name: str, *, now: datetime) -> bool:
    """Note that a worker is alive; tell whether it has a row."""
    return connection.execute(_SEEN, {"_name": name, "seen_at": now}).rowcount == 1


_SEEN = update(WORKERS).where(WORKERS.c.name == bindparam("_name"))


def unregister(connection: Connection, names: Iterable[str]) -> None:
    """Delete the rows of workers that ended."""
    connection.execute(delete(WORKERS).where(WORKERS.c.name.in_(list(names))))


def workers(connection: Connection) -> list[Row[Any]]:
    """Return the rows of all workers, the oldest first. Reads the whole table, which has one row a worker."""
    return list(connection.execute(select(WORKERS).order_by(WORKERS.c.started_at, WORKERS.c.name)))


def is_gone(worker: Row[Any], now: datetime) -> bool:
    """Tell whether a row of `workers` was left behind: the living say so each quarter of a lease."""
    return bool(worker.seen_at < now - GONE_AFTER * timedelta(seconds=worker.lease_seconds))


GONE_AFTER = 3  # leases


def at_work(connection: Connection, queue: str) -> int:
    """Return how many jobs of ``queue`` run. ix_future_jobs_running, or ix_future_jobs_status."""
    return connection.scalar(select(func.count()).where(RUNNING, J.queue == queue)) or 0


def _pairs(rows: Iterable[Any]) -> dict[Any, Any]:
    return {row[0]: row[1] for row in rows}
