"""Every write of a job's status. Each is one guarded UPDATE whose row count is checked.

A running job is written under ``id = ? AND attempt = ? AND status = 'running'``. No row means that the attempt no
longer holds the job: the caller rolls back what it did and writes nothing. Nothing here commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError

from . import bulk, claim_statements, statements, unique_statements
from .dialects import Encoded
from .statements import Claimed, Level, Token
from .status import Status, check

__all__ = [
    "Cancelled",
    "Completed",
    "Failed",
    "Failure",
    "Outcome",
    "Released",
    "Retried",
    "Snoozed",
    "cancel",
    "complete_all",
    "deliver_cancel",
    "expire",
    "lose",
    "overrule",
    "release_all",
    "rescue",
    "restart",
    "revive",
    "settle",
    "why_cancelled",
]

MAX_LOSSES = 5
FRAGILE = 3  # a job that was lost this often may be what kills its workers
ASKED, TAKEN = "asked to stop", "another job has the same unique_key"  # why a job was cancelled
SWEEP = 500  # rows looked at in one statement


# --- how a run ended ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in one attempt, as text that every database can store."""

    error_type: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The handler returned. ``result`` is its encoded value, ``problem`` why that was not kept."""

    result: str | None = None
    problem: str | None = None
    keeps_writes: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler failed for good; ``error`` is what it raised, if that was in this process."""

    failure: Failure
    error: BaseException | None = None
    keeps_writes: bool = False


@dataclass(frozen=True, slots=True)
class Retried:
    """The handler failed and will be tried again at ``run_at``."""

    failure: Failure
    run_at: datetime
    problem: str | None = None  # why its own backoff was of no use
    keeps_writes: bool = False


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The handler asked to run again at ``run_at``; nothing is charged."""

    run_at: datetime
    keeps_writes: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The handler, or the policy for its error, ended the job."""

    reason: str
    failure: Failure | None = None
    keeps_writes: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """The job can be run again, uncharged: the database was busy or away, or it was not run at all.

    ``otherwise`` is for when that is no use.
    """

    reason: str
    otherwise: Failed | Retried | None = None
    keeps_writes: bool = False


Outcome = Completed | Failed | Retried | Snoozed | Cancelled | Released

_FREE: Mapping[str, Any] = {"leased_by": None, "leased_until": None}


def settle(
    connection: Connection,
    token: Token,
    outcome: Outcome,
    *,
    now: datetime,
    worker: str,
    delete: bool = False,
    again: bool = False,
) -> Status | None:
    """Write how the attempt ended; return the state the job is in now, or None if the attempt no longer held it.

    ``delete`` removes a job that completed instead of keeping it. A job that would wait again is ``cancelled`` instead
    if it was asked to stop, or if another waits with the key that it gave up when it started.

    ``again`` says that this very unit was tried before, so that a job which is already where it should go was put there
    by a commit whose reply was lost. What shares a transaction with a handler's writes never says so: an attempt that
    is run twice would write twice.
    """
    target, values, failure = _written(outcome, now)
    if failure is not None:
        values["failures"] = statements.ONE_MORE_FAILURE
        values["error"] = failure.traceback
    if target is Status.COMPLETE and delete:
        return target if statements.remove(connection, token) else None
    ended = _move(connection, token, target, values, now=now)
    if ended is None:
        return target if again and statements.state(connection, token.id) == (token.attempt, target) else None
    target = ended
    if failure is not None:
        _note(connection, token, failure, now=now, worker=worker)
    return target


def _note(connection: Connection, token: Token, failure: Failure, *, now: datetime, worker: str | None) -> None:
    statements.add_failure(
        connection,
        {
            "job_id": token.id,
            "attempt": token.attempt,
            "failed_at": now,
            "worker": worker,
            "error_type": failure.error_type,
            "traceback": failure.traceback,
        },
    )


def _written(outcome: Outcome, now: datetime) -> tuple[Status, dict[str, Any], Failure | None]:
    match outcome:
        case Completed(result=result):
            return Status.COMPLETE, {"finished_at": now, "return_value": _encoded(result)}, None
        case Failed(failure=failure):
            return Status.FAILED, {"finished_at": now}, failure
        case Retried(failure=failure, run_at=run_at):
            return Status.SCHEDULED, {"run_at": run_at}, failure
        case Snoozed(run_at=run_at):
            return Status.SCHEDULED, {"run_at": run_at, "snoozes": statements.J.snoozes + 1}, None
        case Cancelled(reason=reason, failure=failure):
            return Status.CANCELLED, {"finished_at": now, "error": reason}, failure
        case Released():
            return Status.SCHEDULED, {}, None


def _encoded(text: str | None) -> Encoded | None:
    return None if text is None else Encoded(text)


def _move(
    connection: Connection, token: Token, target: Status, values: Mapping[str, Any], *, now: datetime
) -> Status | None:
    check(Status.RUNNING, target)
    # A job that was asked to stop does not go back to waiting, and has not failed by doing so.
    if target is Status.SCHEDULED:
        held = _wait_again(connection, token, values, statements.NOT_ASKED_TO_STOP, finished_at=now)
    else:
        conditions = [statements.NOT_ASKED_TO_STOP] if target is Status.FAILED else []
        written = {"status": target, **_FREE, **values}
        held = target if statements.move(connection, token, Status.RUNNING, written, *conditions) else None
    may_be_asked = held is None and target in {Status.SCHEDULED, Status.FAILED}
    if may_be_asked and deliver_cancel(connection, token, now=now, error=values.get("error")):
        return Status.CANCELLED
    return held


def _wait_again(
    connection: Connection,
    token: Token,
    values: Mapping[str, Any],
    *conditions: ColumnElement[bool],
    finished_at: datetime | ColumnElement[Any],
) -> Status | None:
    """Let a running job wait again; return the state it is in now, None if the attempt does not hold it.

    One that gave up its unique key when it started, and finds that another waits with that, ends ``cancelled``: the
    other was scheduled later, and does the same. The index decides, so that it may be scheduled at this very moment.
    """
    check(Status.RUNNING, Status.SCHEDULED)
    waiting = {"status": Status.SCHEDULED, **_FREE, **values}
    if statements.move(connection, token, Status.RUNNING, waiting, *conditions, statements.KEEPS_ITS_KEY):
        return Status.SCHEDULED
    key = unique_statements.key_given_up(connection, token)
    if key is None:
        return None
    with suppress(IntegrityError), connection.begin_nested():
        held = statements.move(connection, token, Status.RUNNING, waiting, *conditions)
        return Status.SCHEDULED if held else None
    check(Status.RUNNING, Status.CANCELLED)
    other = unique_statements.holder(connection, key)
    ended = {
        **{name: values[name] for name in _CHARGES if name in values},
        "status": Status.CANCELLED,
        "finished_at": finished_at,
        **_FREE,
        "error": f"job {other.id} has the same unique_key" if other else TAKEN,
    }
    return Status.CANCELLED if statements.move(connection, token, Status.RUNNING, ended) else None


_CHARGES = ("failures", "losses")


def why_cancelled(connection: Connection, job_id: int, outcome: Outcome) -> str:
    """Return why a job was cancelled that would otherwise have ended by ``outcome``."""
    reason, failure = statements.error_of(connection, job_id), getattr(outcome, "failure", None)
    return ASKED if reason is None or (failure and reason == failure.traceback) else reason


def overrule(connection: Connection, token: Token, outcome: Outcome, *, now: datetime, worker: str) -> Status:
    """Write how an attempt ended although its handler changed or deleted its own row, uncommitted.

    The caller has seen, from outside of the handler's transaction, that the attempt still holds the job. A row that the
    handler deleted stays deleted.
    """
    target, values, failure = _written(outcome, now)
    values |= {"status": target, "attempt": token.attempt, **_FREE}
    if failure is not None:
        values |= {"failures": statements.ONE_MORE_FAILURE, "error": failure.traceback}
    if not _force(connection, token.id, values):
        target = Status.CANCELLED
        values = {"finished_at": now, **values, "status": target, "error": TAKEN}
        statements.force(connection, token.id, values)
    if failure is not None and statements.state(connection, token.id) is not None:
        _note(connection, token, failure, now=now, worker=worker)
    return target


def _force(connection: Connection, job_id: int, values: Mapping[str, Any]) -> bool:
    """Write ``values`` to a job whatever its state; False, and nothing is written, if another has its unique key."""
    with suppress(IntegrityError), connection.begin_nested():
        statements.force(connection, job_id, values)
        return True
    return False


def deliver_cancel(
    connection: Connection, token: Token, *, now: datetime | ColumnElement[Any], error: str | None = None
) -> bool:
    """End a running job that was asked to stop; tell whether it was asked. ``error`` is what it raised thereupon."""
    check(Status.RUNNING, Status.CANCELLED)
    values = {"status": Status.CANCELLED, "finished_at": now, "error": error, **_FREE}
    return statements.move(connection, token, Status.RUNNING, values, statements.ASKED_TO_STOP)


def complete_all(
    connection: Connection, done: Sequence[tuple[Token, str | None]], *, now: datetime, delete: bool = False
) -> set[Token]:
    """Complete jobs that never touched their Session, in few statements; return the tokens that had lost their job."""
    check(Status.RUNNING, Status.COMPLETE)
    results = dict(done)
    if delete:
        return _remove_all(connection, results.keys())
    values = {"status": Status.COMPLETE, "finished_at": now, **_FREE}
    if bulk.complete_all(connection, results, values) == len(results):
        return set()
    return {each for each in results if statements.state(connection, each.id) != (each.attempt, Status.COMPLETE)}


def _remove_all(connection: Connection, tokens: AbstractSet[Token]) -> set[Token]:
    held = statements.holds(connection, tokens)
    for attempt in {token.attempt for token in tokens}:
        statements.remove_all(connection, [token.id for token in tokens if token.attempt == attempt], attempt)
    return set(tokens) - held


def release_all(connection: Connection, tokens: Iterable[Token]) -> dict[Token, str]:
    """Hand back claimed jobs that were not started: they wait again as if never taken, and nothing is charged.

    Returns those that were cancelled instead, and why: they were asked to stop, or gave up a key that another has now.
    """
    check(Status.RUNNING, Status.SCHEDULED)
    values = {"status": Status.SCHEDULED, "started_at": None, **_FREE}
    wanted, free = [*tokens], (statements.KEEPS_ITS_KEY, statements.NOT_ASKED_TO_STOP)
    if bulk.move_all(connection, wanted, values, *free) == len(wanted):
        return {}
    gone = {}
    for token in sorted(statements.holds(connection, wanted)):
        if deliver_cancel(connection, token, now=statements.J.cancel_requested_at):
            gone[token] = ASKED
            continue
        ended = _wait_again(connection, token, {"started_at": None}, finished_at=statements.J.started_at)
        if ended is Status.CANCELLED:
            gone[token] = TAKEN
    return gone


# --- jobs that wait -----------------------------------------------------------------------------------------------


def expire(connection: Connection, level: Level, *, now: datetime) -> list[Row[Any]]:
    """Expire a few hundred of the jobs of ``level`` that were not started in time; return those that were."""
    check(Status.SCHEDULED, Status.EXPIRED)
    values = {"status": Status.EXPIRED, "finished_at": now}
    return [
        row
        for row in claim_statements.expired(connection, level, now=now, limit=SWEEP)
        if statements.move(connection, Token(row.id, row.attempt), Status.SCHEDULED, values)
    ]


def rescue(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    watched: Collection[tuple[Token, datetime | None]] | None = None,
    delay: timedelta = timedelta(0),
) -> list[tuple[Row[Any], Status]]:
    """Take back jobs whose worker has not renewed its lease for ``grace`` after it ended.

    Each has lost one attempt and waits again: in its old place, ahead of what became due meanwhile; a `FRAGILE` one
    from ``delay`` after ``now``. After `MAX_LOSSES` it is ``failed``. It is ``cancelled`` if it was asked to stop, or
    if another waits with the key that it gave up. Only leases in ``watched``, if that is given. Returns the rows as
    they were and the state they are in now.
    """
    taken = []
    for row in claim_statements.abandoned(connection, before=now - grace, limit=SWEEP):
        token = Token(row.id, row.attempt)
        if watched is not None and (token, row.leased_until) not in watched:
            continue
        # The lease is compared as well: a worker that woke up and renewed it meanwhile keeps its job.
        same = (
            statements.J.leased_until == row.leased_until if row.leased_until else statements.J.leased_until.is_(None)
        )
        why = f"worker lost: {row.leased_by} stopped renewing its lease"
        is_asked = row.cancel_requested_at is not None
        ended = lose(connection, row, same, worker=row.leased_by, why=why, now=now, delay=delay, is_asked=is_asked)
        if ended is not None:
            taken.append((row, ended))
    return taken


def lose(
    connection: Connection,
    row: Row[Any] | Claimed,
    *conditions: ColumnElement[bool],
    worker: str | None,
    why: str,
    now: datetime,
    delay: timedelta = timedelta(0),
    is_asked: bool = False,
) -> Status | None:
    """Charge a running job with the loss of an attempt, as `rescue` does; return the state that it is in now.

    None if the attempt no longer held it. ``is_asked``: it was asked to stop.
    """
    token, lost = Token(row.id, row.attempt), Failure("WorkerLost", "worker lost", why)
    target = Status.FAILED if row.losses + 1 >= MAX_LOSSES else Status.SCHEDULED
    if is_asked:
        target = Status.CANCELLED
    check(Status.RUNNING, target)
    values = {"losses": statements.J.losses + 1, "error": lost.traceback}
    if target is Status.SCHEDULED:
        later = {"run_at": now + delay} if delay and row.losses + 1 >= FRAGILE else {}
        ended = _wait_again(connection, token, {**values, **later}, *conditions, finished_at=now)
    else:
        values |= {"status": target, "finished_at": now, **_FREE}
        ended = target if statements.move(connection, token, Status.RUNNING, values, *conditions) else None
    if ended is not None:
        _note(connection, token, lost, now=now, worker=worker)
    return ended


def restart(connection: Connection, token: Token, *, now: datetime) -> Token | None:
    """Give a running job another attempt where it is; return that, None if ``token`` held the job no more.

    Whoever still runs the attempt before can write nothing any more. Nothing is charged. A job that was asked to stop
    is cancelled instead.
    """
    another = {"attempt": statements.ONE_MORE_ATTEMPT}
    if statements.move(connection, token, Status.RUNNING, another, statements.NOT_ASKED_TO_STOP):
        return Token(token.id, token.attempt + 1)
    deliver_cancel(connection, token, now=now)
    return None


# --- by hand ------------------------------------------------------------------------------------------------------


def cancel(connection: Connection, job_id: int, *, now: datetime) -> Status | None:
    """Cancel a waiting job, or ask a running one to stop; return the state it was in, None if this call did neither."""
    check(Status.SCHEDULED, Status.CANCELLED)
    for _ in range(3):  # it may be claimed, or settled, between looking and writing
        found = statements.state(connection, job_id)
        if found is None:
            return None
        token = Token(job_id, found[0])
        if found[1] == Status.SCHEDULED:
            values = {"status": Status.CANCELLED, "finished_at": now}
            if statements.move(connection, token, Status.SCHEDULED, values):
                return Status.SCHEDULED
        elif found[1] == Status.RUNNING:
            asked = {"cancel_requested_at": now}
            if statements.move(connection, token, Status.RUNNING, asked, statements.NOT_ASKED_TO_STOP):
                return Status.RUNNING
        else:
            return None
    return None


def revive(connection: Connection, job_id: int, *, run_at: datetime, expires_at: datetime | None) -> bool:
    """Let a failed, expired or cancelled job wait again, with all its attempts; tell whether this call did.

    So does one whose status is none at all: a row edited by hand. Not one whose unique key another job has.
    """
    found = statements.state(connection, job_id)
    if found is None or found[1] in {Status.SCHEDULED, Status.RUNNING, Status.COMPLETE}:
        return False
    values = {
        "status": Status.SCHEDULED,
        "run_at": run_at,
        "expires_at": expires_at,
        "failures": 0,
        "losses": 0,
        "cancel_requested_at": None,
        "finished_at": None,
    }
    source = found[1]
    if not isinstance(source, Status):
        return _force(connection, job_id, values)
    check(source, Status.SCHEDULED)
    token = Token(job_id, found[0])
    if statements.move(connection, token, source, values, statements.HAS_NO_KEY):
        return True
    with suppress(IntegrityError), connection.begin_nested():
        return statements.move(connection, token, source, values)
    return False
