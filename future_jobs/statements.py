"""Every SQL statement that the library runs on its hot paths, one function each, with the index it uses.

Statements are built once and cached by SQLAlchemy; a status is spelled into the text, not bound, because a partial
index is only considered where the planner can see that the condition implies it.

Jobs are claimed level by level. A *level* is one ``(queue, priority)``: within it the index gives due jobs in order
without a sort, and without stepping over jobs of another priority that are not due yet. One ``ORDER BY priority,
run_at`` over the whole table would walk over every future job of a better priority. Limited jobs, many of which may be
due and must wait, are a level apart, which only ``limits.py`` claims from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    CursorResult,
    Select,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_dict, instance_state
from sqlalchemy.schema import Table
from sqlalchemy.sql.dml import Update

from .dialects import Backend, Encoded, UTCDateTime, backend_of, is_guided
from .models import JobFailure, ScheduledJob
from .status import Status

__all__ = ["Claimed", "Level", "Token"]

JOBS = cast("Table", ScheduledJob.__table__)
FAILURES = cast("Table", JobFailure.__table__)
J = JOBS.c


ANY_LOSSES = 1 << 30


class Token(NamedTuple):
    """What proves that an attempt still holds its job: the fence of every write after the claim."""

    id: int
    attempt: int


class Claimed(NamedTuple):
    """A job as its claim returned it: what a run needs. Times of a row edited by hand may be `Unreadable`."""

    id: int
    attempt: int
    callable_name: str
    args: str
    kwargs: str
    content_type: str | None
    content_key: str | None
    options: str | None
    tags: str | None
    queue: str
    priority: int
    run_at: datetime
    nominal_at: datetime
    expires_at: datetime | None
    created_at: datetime
    max_attempts: int
    failures: int
    losses: int
    snoozes: int
    recurring_id: int | None

    @property
    def token(self) -> Token:
        """The fencing token of the attempt."""
        return Token(self.id, self.attempt)


class Level(NamedTuple):
    """One queue and priority with jobs waiting in it, and when the first of them is due; the limited ones apart."""

    queue: str
    priority: int
    first_at: datetime
    limited: bool = False


def _is(status: Status) -> ColumnElement[bool]:
    return J.status == spelled(status)


def spelled(status: Status) -> ColumnElement[Any]:
    """Return a status as part of the text of a statement."""
    return literal_column(f"'{status}'")


WAITING = _is(Status.SCHEDULED)
RUNNING = _is(Status.RUNNING)
LIMITED, UNLIMITED = J.limited, not_(J.limited)
ASKED_TO_STOP = J.cancel_requested_at.is_not(None)
NOT_ASKED_TO_STOP = J.cancel_requested_at.is_(None)
HAS_NO_KEY = J.unique_key.is_(None)
KEEPS_ITS_KEY = or_(J.unique_key.is_(None), J.unique_until == literal_column("'finished'"))
ONE_MORE_FAILURE = J.failures + 1
ONE_MORE_ATTEMPT = J.attempt + 1
# A null expiry is "never". A job whose expiry equals now still runs.
NOT_EXPIRED = or_(J.expires_at.is_(None), J.expires_at >= bindparam("now", type_=UTCDateTime))

_AFTER_AT = bindparam("after_at", type_=UTCDateTime)
DUE = (
    WAITING,
    J.queue == bindparam("in_queue"),
    J.priority == bindparam("at_priority"),
    J.run_at <= bindparam("now", type_=UTCDateTime),
    J.run_at >= _AFTER_AT,
    or_(J.run_at > _AFTER_AT, J.id > bindparam("after_id")),
    J.id <= bindparam("newest"),
    NOT_EXPIRED,
)
"""What may start of one level, from a place in the order of ``(run_at, id)`` on; see `due_after` for its parameters."""

AS_TEXT = {"args", "kwargs", "options", "tags"}  # JSON, decoded once, by the room that needs it
CLAIMED = tuple(type_coerce(J[name], Text).label(name) if name in AS_TEXT else J[name] for name in Claimed._fields)


def due_after(level: Level, *, after: tuple[datetime, int], newest: int, now: datetime, limit: int) -> dict[str, Any]:
    """Return the parameters of `DUE`, and of a ``LIMIT``. Ids above ``newest`` are left out."""
    return {
        "in_queue": level.queue,
        "at_priority": level.priority,
        "after_at": after[0],
        "after_id": after[1],
        "newest": newest,
        "now": now,
        "limit": limit,
    }


# --- adding -------------------------------------------------------------------------------------------------------

_INSERT = insert(JOBS)
NEW: dict[str, Any] = {"status": Status.SCHEDULED, "attempt": 0, "failures": 0, "losses": 0, "snoozes": 0}

_NO_KEY: dict[str, Any] = {"unique_key": None, "unique_until": None}


def add(session: Session, connection: Connection, row: Mapping[str, Any]) -> ScheduledJob:
    """Insert one job and return it as a persistent object of ``session``, as a flush would have made it.

    An INSERT of its own takes a third of the time of a unit of work over so many columns; what a flush does to its
    objects after the INSERT is then done for this one, so that a rollback treats it like any other.
    """
    key = connection.execute(_INSERT, inserted(row)).inserted_primary_key
    assert key is not None
    return persistent(session, row, key[0])


def inserted(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is inserted for ``row``: a waiting job."""
    return {**{name: value for name, value in row.items() if value is not None}, **NEW}


def persistent(session: Session, row: Mapping[str, Any], job_id: int) -> ScheduledJob:
    """Return the job that was inserted for ``row`` as an object of ``session``."""
    job = ScheduledJob()
    held = instance_dict(job)
    held.update(_NO_KEY)
    held.update(row, id=job_id, **NEW)
    for name in ("args", "kwargs"):
        if isinstance(held[name], Encoded):
            held[name] = json.loads(held[name])
    session.add(job)
    session._register_persistent({instance_state(job)})  # noqa: SLF001 (there is no public way)
    return job


CHUNK = 5_000


def prune(connection: Connection, *, before: datetime, statuses: Sequence[Status], limit: int | None) -> int:
    """Delete finished jobs that ended before ``before``, lowest id first; return how many. Primary key, in steps."""
    found = (
        select(J.id)
        .where(
            J.status.in_(statuses),
            J.finished_at < bindparam("before", type_=UTCDateTime),
            J.id > bindparam("after"),
        )
        .order_by(J.id)
        .limit(bindparam("limit"))
    )
    count = after = 0
    while limit is None or count < limit:
        step = CHUNK if limit is None else min(CHUNK, limit - count)
        ids = list(connection.scalars(found, {"before": before, "after": after, "limit": step}))
        if not ids:
            break
        forget_failures(connection, ids)
        connection.execute(
            delete(JOBS).where(J.id.in_(bindparam("_ids", expanding=True)), J.status.in_(statuses)), {"_ids": ids}
        )
        count, after = count + len(ids), ids[-1]
    return count


# --- looking ------------------------------------------------------------------------------------------------------


def levels(connection: Connection) -> list[Level]:
    """Return the levels with jobs waiting, best priority first.

    A loose index scan over (queue, priority): one index look-up a level, however many rows there are.
    """
    backend = backend_of(connection)
    guide(connection)
    if backend.recursive_scan:
        found = [Level(*row) for row in connection.execute(_levels_at_once())]
    else:
        found = [level for limited in (False, True) for level in _levels_by_steps(connection, limited)]
    return in_order(found)


def in_order(levels: Iterable[Level]) -> list[Level]:
    """Return ``levels`` as they are claimed from: best priority first, then who has waited longest."""
    return sorted(levels, key=lambda level: (rank(level.priority), level.first_at))


def rank(priority: object) -> int:
    """Return where a priority stands in order: the higher, the earlier. SQLite lets one write anything by hand."""
    return -priority if isinstance(priority, int) else 0


@cache
def _levels_at_once() -> CompoundSelect[Any]:
    return union_all(*(_scan(limited) for limited in (False, True)))


def _scan(limited: bool) -> Select[Any]:
    # ix_future_jobs_due
    waiting = and_(WAITING, LIMITED if limited else UNLIMITED)
    queues = select(select(func.min(J.queue)).where(waiting).scalar_subquery().label("queue")).cte(
        f"queues_{limited:d}", recursive=True
    )
    queues = queues.union_all(
        select(
            select(func.min(J.queue)).where(waiting, J.queue > queues.c.queue).correlate(queues).scalar_subquery()
        ).where(queues.c.queue.is_not(None))
    )
    best = select(func.max(J.priority)).where(waiting, J.queue == queues.c.queue).correlate(queues).scalar_subquery()
    steps = (
        select(queues.c.queue, best.label("priority"))
        .where(queues.c.queue.is_not(None))
        .cte(f"levels_{limited:d}", recursive=True)
    )
    worse = (
        select(func.max(J.priority))
        .where(waiting, J.queue == steps.c.queue, J.priority < steps.c.priority)
        .correlate(steps)
        .scalar_subquery()
    )
    steps = steps.union_all(select(steps.c.queue, worse).where(steps.c.priority.is_not(None)))
    first = (
        select(func.min(J.run_at))
        .where(waiting, J.queue == steps.c.queue, J.priority == steps.c.priority)
        .correlate(steps)
        .scalar_subquery()
    )
    return select(steps.c.queue, steps.c.priority, first, literal(limited)).where(steps.c.priority.is_not(None))


def guide(connection: Connection) -> None:
    """Keep the planner, until the transaction ends, from what would read more than is needed."""
    if not is_guided(connection):
        connection.execute(_planning(backend_of(connection)))


@cache
def _planning(backend: Backend) -> Select[Any]:
    return select(*(func.set_config(name, "off", literal_column("true")) for name in backend.planner))


def _levels_by_steps(connection: Connection, limited: bool) -> Iterator[Level]:
    # ix_future_jobs_status. MariaDB reads the whole index for the recursive form, and one entry for each of these.
    at: dict[str, Any] = {"is_limited": limited, "in_queue": ""}
    while (queue := connection.scalar(_NEXT_QUEUE, at)) is not None:
        at = {**at, "in_queue": queue, "at_priority": 1 << 14}
        while (priority := connection.scalar(_NEXT_PRIORITY, at)) is not None:
            at["at_priority"] = priority
            first = connection.scalar(_FIRST_DUE, at)
            if first is not None:
                yield Level(queue, priority, first, limited)


OF_KIND = J.limited == bindparam("is_limited")
_NEXT_QUEUE = select(func.min(J.queue)).where(WAITING, OF_KIND, J.queue > bindparam("in_queue"))
_NEXT_PRIORITY = select(func.max(J.priority)).where(
    WAITING, OF_KIND, J.queue == bindparam("in_queue"), J.priority < bindparam("at_priority")
)
_FIRST_DUE = select(func.min(J.run_at)).where(
    WAITING, OF_KIND, J.queue == bindparam("in_queue"), J.priority == bindparam("at_priority")
)


def next_due(connection: Connection, *, after: datetime | None = None) -> datetime | None:
    """Return when the first waiting job is due, of those later than ``after``. Reads all that wait: for tests."""
    found: datetime | None = connection.scalar(_NEXT_DUE if after is None else _NEXT_DUE.where(J.run_at > after))
    return found


_NEXT_DUE = select(func.min(J.run_at)).where(WAITING)


def newest(connection: Connection) -> int:
    """Return the highest id given so far, 0 if none. Primary key."""
    return connection.scalar(select(func.max(J.id))) or 0


def clock(connection: Connection) -> datetime | None:
    """Return the database's own time in UTC, to the microsecond; None where it has no clock of its own."""
    backend = backend_of(connection)
    if not backend.own_clock:
        return None
    now = func.clock_timestamp() if backend.returning else func.utc_timestamp(6)
    return connection.scalar(select(type_coerce(now, UTCDateTime)))


def place_of(connection: Connection, job_id: int) -> Any:
    """Return the level of a job, ``nominal_at`` and ``expires_at``; None if it does not exist. Primary key."""
    return connection.execute(_PLACE, {"_id": job_id}).first()


_PLACE = select(J.queue, J.priority, J.limited, J.nominal_at, J.expires_at).where(J.id == bindparam("_id"))


# --- writing ------------------------------------------------------------------------------------------------------


def move(
    connection: Connection, token: Token, source: Status, values: Mapping[str, Any], *conditions: ColumnElement[bool]
) -> bool:
    """Write ``values`` to the job if ``token`` still holds it in ``source``; tell whether it did. Primary key."""
    bound, written = _parted(values)
    bound["_id"], bound["_attempt"] = token
    return _changed(connection, _guarded(source, written, conditions), bound) == 1


def _parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Part what is bound from what is in the text of a statement: expressions, and the few values that are constant."""
    bound, written = {}, []
    for name, value in values.items():
        if value is None or isinstance(value, Status):
            written.append((name, _CONSTANTS[value]))
        elif isinstance(value, ColumnElement):
            written.append((name, value))
        else:
            bound[name] = value
    return bound, tuple(written)


_CONSTANTS: dict[Status | None, ColumnElement[Any]] = {None: null(), **{each: spelled(each) for each in Status}}


@lru_cache(maxsize=128)
def _guarded(
    source: Status, written: tuple[tuple[str, Any], ...], conditions: tuple[ColumnElement[bool], ...]
) -> Update:
    # What else it sets follows from the parameters it is executed with; an expression is known by its identity.
    held = update(JOBS).where(J.id == bindparam("_id"), J.attempt == bindparam("_attempt"), _is(source), *conditions)
    return held.values(dict(written)) if written else held


def force(connection: Connection, job_id: int, values: Mapping[str, Any]) -> None:
    """Write ``values`` to a job whatever its state. Primary key. For a caller that holds its row locked."""
    connection.execute(update(JOBS).where(J.id == bindparam("_id")).values(**values), {"_id": job_id})


def remove(connection: Connection, token: Token) -> bool:
    """Delete a running job that ``token`` holds, and its failures; tell whether it held it. Primary key."""
    forget_failures(connection, [token.id])
    statement = delete(JOBS).where(J.id == bindparam("_id"), J.attempt == bindparam("_attempt"), RUNNING)
    return _changed(connection, statement, {"_id": token.id, "_attempt": token.attempt}) == 1


def remove_all(connection: Connection, ids: Sequence[int], attempt: int) -> int:
    """Delete those of ``ids`` that are running at ``attempt``, and their failures; return how many. Primary key."""
    forget_failures(connection, ids)
    statement = delete(JOBS).where(
        J.id.in_(bindparam("_ids", expanding=True)), J.attempt == bindparam("_attempt"), RUNNING
    )
    return _changed(connection, statement, {"_ids": ids, "_attempt": attempt})


def forget_failures(connection: Connection, ids: Sequence[int]) -> None:
    """Delete the failures of ``ids``. ix_future_jobs_failure_job."""
    connection.execute(
        delete(FAILURES).where(FAILURES.c.job_id.in_(bindparam("_ids", expanding=True))), {"_ids": list(ids)}
    )


def add_failure(connection: Connection, values: Mapping[str, Any]) -> None:
    """Insert one `JobFailure`."""
    connection.execute(insert(FAILURES), dict(values))


def holds(connection: Connection, tokens: Iterable[Token]) -> set[Token]:
    """Return those of ``tokens`` that still hold their running job. Primary key."""
    wanted = set(tokens)
    found = connection.execute(
        select(J.id, J.attempt).where(J.id.in_(bindparam("ids", expanding=True)), RUNNING),
        {"ids": [token.id for token in wanted]},
    )
    return {Token(*row) for row in found} & wanted


def asked_to_stop(connection: Connection, tokens: Iterable[Token]) -> set[Token]:
    """Return those of ``tokens`` whose running job was asked to stop. Primary key."""
    wanted = set(tokens)
    return {Token(*row) for row in connection.execute(_ASKED, {"ids": [token.id for token in wanted]})} & wanted


_ASKED = select(J.id, J.attempt).where(J.id.in_(bindparam("ids", expanding=True)), RUNNING, ASKED_TO_STOP)


def note_progress(connection: Connection, progress: Mapping[Token, Any], *, waits: bool = True) -> set[Token]:
    """Write how far running jobs are; return those of which it was written. Primary key.

    Unless it ``waits``, a job whose row is locked, by its own transaction as a rule, is passed over.
    """
    tokens = set(progress)
    if not waits:
        ids = [token.id for token in progress]
        tokens &= {Token(*row) for row in connection.execute(locked(connection, _NOTED), {"ids": ids})}
    news = {token: {"_id": token.id, "_attempt": token.attempt, "_progress": progress[token]} for token in tokens}
    return {token for token, values in news.items() if _changed(connection, _NOTE, values)}


_NOTED = select(J.id, J.attempt).where(J.id.in_(bindparam("ids", expanding=True)), RUNNING)
_NOTE = (
    update(JOBS)
    .where(J.id == bindparam("_id"), J.attempt == bindparam("_attempt"), RUNNING)
    .values(progress=bindparam("_progress", type_=J.progress.type))
)


def state(connection: Connection, job_id: int) -> tuple[int, str] | None:
    """Return ``(attempt, status)`` of a job; None if it does not exist. Primary key."""
    row = connection.execute(select(J.attempt, J.status).where(J.id == bindparam("_id")), {"_id": job_id}).first()
    return None if row is None else (row.attempt, row.status)


def fate(connection: Connection, job_id: int) -> Any:
    """Return where a job is and how its last attempt failed, if it did; None if it does not exist.

    Primary key; ix_future_jobs_failure_job.
    """
    return connection.execute(_FATE, {"_id": job_id}).first()


_FATE = (
    select(J.attempt, J.status, J.run_at, J.error, FAILURES.c.error_type, FAILURES.c.traceback)
    .outerjoin(FAILURES, and_(FAILURES.c.job_id == J.id, FAILURES.c.attempt == J.attempt))
    .where(J.id == bindparam("_id"))
)


def error_of(connection: Connection, job_id: int) -> str | None:
    """Return the error of a job that was not asked to stop. Primary key."""
    found: str | None = connection.scalar(
        select(J.error).where(J.id == bindparam("_id"), NOT_ASKED_TO_STOP), {"_id": job_id}
    )
    return found


def hold(connection: Connection, token: Token) -> bool:
    """Lock the row of a running job until the transaction ends; tell whether ``token`` still holds it. Primary key."""
    return connection.scalar(_HOLD, {"_id": token.id, "_attempt": token.attempt}) is not None


_HOLD = select(J.id).where(J.id == bindparam("_id"), J.attempt == bindparam("_attempt"), RUNNING).with_for_update()


def renew(connection: Connection, worker: str, until: datetime) -> set[Token]:
    """Extend the leases of what ``worker`` runs; return which. ix_future_jobs_running or ix_future_jobs_status.

    A job whose row is locked by its own transaction is passed over: a rescue would pass it over as well.
    """
    tokens = {Token(*row) for row in connection.execute(locked(connection, _LEASED), {"worker": worker})}
    if tokens:
        connection.execute(_RENEW, {"_ids": [token.id for token in tokens], "worker": worker, "until": until})
    return tokens


_LEASED = select(J.id, J.attempt).where(RUNNING, J.leased_by == bindparam("worker"))
_RENEW = (
    update(JOBS)
    .where(J.id.in_(bindparam("_ids", expanding=True)), RUNNING, J.leased_by == bindparam("worker"))
    .values(leased_until=bindparam("until", type_=UTCDateTime))
)


def _changed(connection: Connection, statement: Any, params: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> int:
    return cast("CursorResult[Any]", connection.execute(statement, params)).rowcount


def locked(connection: Connection, rows: Select[Any]) -> Select[Any]:
    """Return ``rows``, locked where that is possible; those that others hold are left out."""
    return rows.with_for_update(skip_locked=True) if backend_of(connection).skip_locked else rows
