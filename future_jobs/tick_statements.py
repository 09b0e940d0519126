"""Every SQL statement about recurring jobs, one function each, with the index it uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Text, bindparam, func, insert, select, type_coerce, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.schema import Table

from . import unique_statements
from .dialects import UTCDateTime, backend_of
from .models import RecurringJob
from .statements import J
from .status import Status

__all__ = ["Span"]

RECURRING = cast("Table", RecurringJob.__table__)
R = RECURRING.c

_DUE = R.next_run_at <= bindparam("now", type_=UTCDateTime)
_ACTIVE = R.paused_at.is_(None)
_AS_TEXT = {"args", "kwargs"}  # passed on to the jobs as they are


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when a run was waiting or running; until None: it still is."""

    since: datetime
    until: datetime | None


# --- looking ------------------------------------------------------------------------------------------------------


def due(connection: Connection, *, now: datetime, after: int, limit: int) -> list[Row[Any]]:
    """Return ``(id, name)`` of recurring jobs whose next time has come, by id. ix_future_jobs_next_run."""
    return list(connection.execute(_FIND_DUE, {"now": now, "after": after, "limit": limit}))


_FIND_DUE = (
    select(R.id, R.name).where(_ACTIVE, _DUE, R.id > bindparam("after")).order_by(R.id).limit(bindparam("limit"))
)


def next_tick(connection: Connection, *, after: datetime | None = None) -> datetime | None:
    """Return the next time of any recurring job, of those later than ``after``. ix_future_jobs_next_run."""
    found: datetime | None = connection.scalar(_NEXT_TICK if after is None else _NEXT_TICK.where(R.next_run_at > after))
    return found


_NEXT_TICK = select(func.min(R.next_run_at)).where(_ACTIVE)


def row(connection: Connection, recurring_id: int) -> Row[Any] | None:
    """Return a recurring job as it is stored. Primary key."""
    return connection.execute(_ROW, {"_id": recurring_id}).first()


_ROW = select(
    *(type_coerce(column, Text).label(column.name) if column.name in _AS_TEXT else column for column in RECURRING.c)
).where(R.id == bindparam("_id"))


def runs(connection: Connection, recurring_id: int, *, limit: int) -> list[Span]:
    """Return when the latest runs of a recurring job waited and ran. uq_future_jobs_recurring."""
    return [
        Span(created_at, None if status in _OPEN else finished_at or created_at)
        for status, created_at, finished_at in connection.execute(_RUNS, {"_id": recurring_id, "limit": limit})
    ]


_OPEN = {Status.SCHEDULED, Status.RUNNING}
_RUNS = (
    select(J.status, J.created_at, J.finished_at)
    .where(J.recurring_id == bindparam("_id"))
    .order_by(J.nominal_at.desc())
    .limit(bindparam("limit"))
)


def taken(
    connection: Connection, recurring_id: int, instants: Iterable[datetime], *, locked: bool = False
) -> set[datetime]:
    """Return those of ``instants`` that have a job already. uq_future_jobs_recurring.

    ``locked`` reads what others have committed since a transaction began that sees a snapshot.
    """
    wanted = list(instants)
    found: set[datetime] = set()
    statement = _TAKEN.with_for_update(read=True) if locked else _TAKEN
    for start in range(0, len(wanted), 500):
        found.update(connection.scalars(statement, {"_id": recurring_id, "instants": wanted[start : start + 500]}))
    return found


_TAKEN = select(J.nominal_at).where(
    J.recurring_id == bindparam("_id"), J.nominal_at.in_(bindparam("instants", expanding=True, type_=UTCDateTime))
)


# --- writing ------------------------------------------------------------------------------------------------------


def hold(connection: Connection, seen: Row[Any]) -> bool:
    """Lock a recurring job if it still is as it was ``seen``; tell whether it is, and whether nobody else holds it.

    Primary key. A row that somebody else is changing is skipped, never waited for. SQLite locks it all anyway.
    """
    found = _HOLD if backend_of(connection).skip_locked else _LOOK_AGAIN
    held = connection.execute(found, {"_id": seen.id}).first()
    return held is not None and tuple(held) == (seen.next_run_at, seen.updated_at, seen.paused_at)


_LOOK_AGAIN = select(R.next_run_at, R.updated_at, R.paused_at).where(R.id == bindparam("_id"))
_HOLD = _LOOK_AGAIN.with_for_update(skip_locked=True)


def add_jobs(
    connection: Connection, recurring_id: int, rows: Mapping[datetime, Mapping[str, Any]]
) -> dict[int, Mapping[str, Any]]:
    """Insert the jobs of those times that have none, which no tick does meanwhile; return them by id.

    Those whose unique key another job has are left out.

    The row is locked first. A transaction that sees a snapshot finds out by the unique index what others have added
    since it began, and reads again, locking what it reads: doing so at once would lock what lies between as well.
    """
    connection.execute(_TOUCH, {"_id": recurring_id})
    for locked in (False, True):
        held = taken(connection, recurring_id, rows, locked=locked)
        new = [row for at, row in rows.items() if at not in held]
        try:
            with connection.begin_nested():
                return unique_statements.add_free(connection, new)
        except IntegrityError:
            if locked:
                raise
    raise AssertionError("unreachable")


_TOUCH = update(RECURRING).where(R.id == bindparam("_id")).values(updated_at=R.updated_at)  # a lock on any database


def error_of(connection: Connection, recurring_id: int) -> str | None:
    """Return why a recurring job could not go on when it was last looked at. Primary key."""
    found: str | None = connection.scalar(select(R.error).where(R.id == recurring_id))
    return found


def change(connection: Connection, recurring_id: int, values: Mapping[str, Any]) -> None:
    """Write ``values`` to a recurring job that the caller holds. Primary key."""
    connection.execute(_CHANGE, {**values, "_id": recurring_id})


_CHANGE = update(RECURRING).where(R.id == bindparam("_id"))


def add(connection: Connection, values: Mapping[str, Any]) -> bool:
    """Insert a recurring job in a SAVEPOINT; False if another process has declared that name meanwhile.

    uq_future_jobs_recurring_job_name decides between processes that declare the same name at the same time.
    """
    try:
        with connection.begin_nested():
            connection.execute(insert(RECURRING), dict(values))
    except IntegrityError:
        return False
    return True


def named(session: Session | scoped_session[Any], name: str, *, locked: bool = False) -> RecurringJob | None:
    """Return a recurring job by name, as it is now, as an object of ``session``. uq_future_jobs_recurring_job_name.

    ``locked`` reads what others have committed since a transaction began that sees a snapshot. The lock is a shared
    one: those who lost the same race hold one too, and would wait for each other with any other.
    """
    found = select(RecurringJob).where(RecurringJob.name == name).execution_options(populate_existing=True)
    return session.scalar(found.with_for_update(read=True) if locked else found)
