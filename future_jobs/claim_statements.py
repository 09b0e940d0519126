"""Every SQL statement by which jobs are claimed, expired and taken back, one function each, with the index it uses."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import ColumnElement, Select, bindparam, exists, or_, select, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.sql.dml import Update

from .dialects import Backend, UTCDateTime, backend_of
from .models import Queue
from .statements import (
    ANY_LOSSES,
    CLAIMED,
    DUE,
    JOBS,
    NOT_EXPIRED,
    OF_KIND,
    RUNNING,
    UNLIMITED,
    WAITING,
    Claimed,
    J,
    Level,
    due_after,
    guide,
    locked,
    spelled,
)
from .status import Status

__all__ = [
    "abandoned",
    "claim",
    "expired",
    "is_any_abandoned",
    "is_any_expired",
    "leases",
    "lock_waiting",
    "take",
]


def claim(
    connection: Connection,
    level: Level,
    *,
    after: tuple[datetime, int],
    newest: int,
    limit: int,
    now: datetime,
    worker: str,
    leased_until: datetime,
    started_at: datetime | None = None,
    losses: tuple[int, int] = (0, ANY_LOSSES),
) -> list[Claimed]:
    """Take up to ``limit`` due jobs of ``level`` that come after ``after``, in order of ``(run_at, id)``.

    Rows that another claimer holds are skipped, never waited for; so are jobs that were lost less or more often than
    ``losses`` says. From a paused queue nothing is taken.
    """
    backend = backend_of(connection)
    guide(connection)
    found = {
        **due_after(level, after=after, newest=newest, now=now, limit=limit),
        "least_losses": losses[0],
        "most_losses": losses[1],
    }
    taken = {"worker": worker, "until": leased_until, "started": started_at or now}
    if backend.returning:
        rows = [*map(Claimed._make, connection.execute(_claim_at_once(backend), {**found, **taken}).all())]
        return sorted(rows, key=attrgetter("run_at", "id"))  # RETURNING promises no order
    rows = [*map(Claimed._make, connection.execute(_due_rows(backend), found).all())]
    if rows:
        connection.execute(_claim_by_id(), {"ids": [row.id for row in rows], **taken})
    return rows


def lock_waiting(connection: Connection, ids: Sequence[int], *, now: datetime) -> list[Claimed]:
    """Return those of ``ids`` that may be claimed, as `take` will leave them, locked where that is possible.

    Primary key. Rows that others hold are left out.
    """
    rows = connection.execute(locked(connection, _STILL_WAITING), {"ids": ids, "now": now})
    return [*map(Claimed._make, rows)]


def take(
    connection: Connection, ids: Sequence[int], *, worker: str, leased_until: datetime, started_at: datetime
) -> None:
    """Claim jobs that `lock_waiting` returned. Primary key."""
    taken = {"worker": worker, "until": leased_until, "started": started_at}
    connection.execute(_claim_by_id(), {"ids": ids, **taken})


def _not_paused(queue: ColumnElement[str]) -> ColumnElement[bool]:
    return ~exists().where(Queue.name == queue)


@cache
def _due(backend: Backend) -> Select[Any]:
    # ix_future_jobs_due, or ix_future_jobs_status: equality on queue and priority, a range on run_at, no sort.
    due = (
        select(J.id)
        .where(
            *DUE,
            UNLIMITED,
            J.losses.between(bindparam("least_losses"), bindparam("most_losses")),
            _not_paused(bindparam("in_queue")),
        )
        .order_by(J.run_at, J.id)
        .limit(bindparam("limit"))
    )
    return due.with_for_update(skip_locked=True) if backend.skip_locked else due


@cache
def _due_rows(backend: Backend) -> Select[Any]:
    return _due(backend).with_only_columns(*_AS_CLAIMED)


# What the rows will hold once `_claim_by_id` has taken them.
_AS_CLAIMED = tuple((J.attempt + 1).label("attempt") if column is J.attempt else column for column in CLAIMED)
_STILL_WAITING = select(*_AS_CLAIMED).where(
    J.id.in_(bindparam("ids", expanding=True)), WAITING, NOT_EXPIRED, _not_paused(J.queue)
)


def _taken() -> dict[str, Any]:
    return {
        "status": spelled(Status.RUNNING),
        "attempt": J.attempt + 1,
        "started_at": bindparam("started", type_=UTCDateTime),
        "leased_by": bindparam("worker"),
        "leased_until": bindparam("until", type_=UTCDateTime),
        "cancel_requested_at": None,
    }


@cache
def _claim_at_once(backend: Backend) -> Update:
    statement = update(JOBS).values(_taken()).returning(*CLAIMED)
    if not backend.skip_locked:
        return statement.where(J.id.in_(_due(backend).correlate(None)))
    # The rows are chosen in a CTE that is materialized: joined, or as an IN-subselect, it may be run again for each
    # row, and then takes more than its LIMIT.
    chosen = _due(backend).cte("chosen").prefix_with("MATERIALIZED", dialect=backend.name)
    return statement.where(J.id == chosen.c.id)


@cache
def _claim_by_id() -> Update:
    return update(JOBS).where(J.id.in_(bindparam("ids", expanding=True)), WAITING).values(_taken())


def expired(connection: Connection, level: Level, *, now: datetime, limit: int) -> list[Row[Any]]:
    """Return up to ``limit`` waiting jobs of ``level`` whose expiry has passed, locked where that is possible.

    The index of the claim. Only due jobs are looked at: none expires before it is due.
    """
    return list(connection.execute(locked(connection, _EXPIRED), {**_place(level), "now": now, "limit": limit}))


def is_any_expired(connection: Connection, level: Level, *, now: datetime) -> bool:
    """Tell whether `expired` would return any; nothing is locked."""
    return connection.execute(_EXPIRED, {**_place(level), "now": now, "limit": 1}).first() is not None


def _place(level: Level) -> dict[str, Any]:
    return {"is_limited": level.limited, "in_queue": level.queue, "at_priority": level.priority}


_EXPIRED = (
    select(J.id, J.attempt, J.callable_name, J.queue, J.run_at, J.expires_at)
    .where(
        WAITING,
        OF_KIND,
        J.queue == bindparam("in_queue"),
        J.priority == bindparam("at_priority"),
        J.run_at <= bindparam("now", type_=UTCDateTime),
        J.expires_at < bindparam("now", type_=UTCDateTime),
    )
    .order_by(J.run_at, J.id)
    .limit(bindparam("limit"))
)


def abandoned(connection: Connection, *, before: datetime, limit: int) -> list[Row[Any]]:
    """Return running jobs whose lease ended before ``before``, locked where that is possible.

    ix_future_jobs_running, or ix_future_jobs_status. A job without any lease is a row edited by hand, and nobody's.
    """
    return list(connection.execute(locked(connection, _ABANDONED), {"before": before, "limit": limit}))


def is_any_abandoned(connection: Connection, *, before: datetime) -> bool:
    """Tell whether `abandoned` would return any; nothing is locked."""
    return connection.execute(_ABANDONED, {"before": before, "limit": 1}).first() is not None


def leases(connection: Connection, *, before: datetime, limit: int) -> list[Row[Any]]:
    """Return running jobs whose lease ends before ``before``, with who holds them; nothing is locked.

    The index of `abandoned`.
    """
    return list(connection.execute(_ABANDONED, {"before": before, "limit": limit}))


_ABANDONED = (
    select(*(J.id, J.attempt, J.callable_name, J.queue, J.losses, J.leased_by, J.leased_until, J.cancel_requested_at))
    .where(RUNNING, or_(J.leased_until.is_(None), J.leased_until < bindparam("before", type_=UTCDateTime)))
    .limit(bindparam("limit"))
)
