"""Every write of a job's status. Each is one guarded UPDATE whose row count is checked.

A running job is written under ``id = ? AND attempt = ? AND status = 'running'``. No row means that the attempt no
longer holds the job: the caller rolls back what it did and writes nothing. Nothing here commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection, Row

from . import bulk, statements
from .dialects import Encoded
from .statements import Level, Token
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
    "overrule",
    "release_all",
    "rescue",
    "revive",
    "settle",
]

MAX_LOSSES = 5
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
    """The handler failed for good; ``error`` is what it raised."""

    failure: Failure
    error: BaseException
    keeps_writes: bool = False


@dataclass(frozen=True, slots=True)
class Retried:
    """The handler failed and will be tried again at ``run_at``."""

    failure: Failure
    run_at: datetime
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
    """The database was busy or away: the job can be run again, uncharged. ``otherwise`` is for when that is no use."""

    reason: str
    otherwise: Failed | Retried
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

    ``delete`` removes a job that completed instead of keeping it. ``again`` says that this very unit was tried before,
    so that a job which is already where it should go was put there by a commit whose reply was lost. What shares a
    transaction with a handler's writes never says so: an attempt that is run twice would write twice.
    """
    target, values, failure = _written(outcome, now)
    if failure is not None:
        values["failures"] = statements.ONE_MORE_FAILURE
        values["error"] = failure.traceback
    if target is Status.COMPLETE and delete:
        return target if statements.remove(connection, token) else None
    if not _move(connection, token, target, values):
        if target is not Status.SCHEDULED or not deliver_cancel(connection, token, now=now):
            return target if again and statements.state(connection, token.id) == (token.attempt, target) else None
        target = Status.CANCELLED
    if failure is not None:
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
    return target


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


def _move(connection: Connection, token: Token, target: Status, values: Mapping[str, Any]) -> bool:
    check(Status.RUNNING, target)
    # A job that was asked to stop does not go back to waiting.
    conditions = [statements.NOT_ASKED_TO_STOP] if target is Status.SCHEDULED else []
    return statements.move(connection, token, Status.RUNNING, {"status": target, **_FREE, **values}, *conditions)


def overrule(connection: Connection, token: Token, outcome: Outcome, *, now: datetime) -> Status:
    """Write how an attempt ended although its handler changed or deleted its own row, uncommitted.

    The caller has seen, from outside of the handler's transaction, that the attempt still holds the job. A row that the
    handler deleted stays deleted.
    """
    target, values, _ = _written(outcome, now)
    statements.force(connection, token.id, {"status": target, "attempt": token.attempt, **_FREE, **values})
    return target


def deliver_cancel(connection: Connection, token: Token, *, now: datetime) -> bool:
    """End a running job that was asked to stop; tell whether it was asked."""
    check(Status.RUNNING, Status.CANCELLED)
    values = {"status": Status.CANCELLED, "finished_at": now, **_FREE}
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


def release_all(connection: Connection, tokens: Iterable[Token]) -> None:
    """Hand back claimed jobs that were not started: they wait again as if never taken, and nothing is charged."""
    check(Status.RUNNING, Status.SCHEDULED)
    bulk.move_all(connection, [*tokens], {"status": Status.SCHEDULED, "started_at": None, **_FREE})


# --- jobs that wait -----------------------------------------------------------------------------------------------


def expire(connection: Connection, level: Level, *, now: datetime) -> list[Row[Any]]:
    """Expire a few hundred of the jobs of ``level`` that were not started in time; return those that were."""
    check(Status.SCHEDULED, Status.EXPIRED)
    values = {"status": Status.EXPIRED, "finished_at": now}
    return [
        row
        for row in statements.expired(connection, level, now=now, limit=SWEEP)
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

    Each has lost one attempt and waits again: in its old place, ahead of what became due meanwhile; one that was lost
    before from ``delay`` after ``now``. After `MAX_LOSSES` it is ``failed``. Only leases in ``watched``, if that is
    given. Returns the rows as they were and the state they are in now.
    """
    taken = []
    for row in statements.abandoned(connection, before=now - grace, limit=SWEEP):
        token = Token(row.id, row.attempt)
        if watched is not None and (token, row.leased_until) not in watched:
            continue
        lost = Failure("WorkerLost", "worker lost", f"worker lost: {row.leased_by} stopped renewing its lease")
        target = Status.FAILED if row.losses + 1 >= MAX_LOSSES else Status.SCHEDULED
        check(Status.RUNNING, target)
        # The lease is compared as well: a worker that woke up and renewed it meanwhile keeps its job.
        same = (
            statements.J.leased_until == row.leased_until if row.leased_until else statements.J.leased_until.is_(None)
        )
        values = {"status": target, "losses": statements.J.losses + 1, "error": lost.traceback, **_FREE}
        if target is Status.FAILED:
            values["finished_at"] = now
        elif delay and row.losses:
            values["run_at"] = now + delay
        if statements.move(connection, token, Status.RUNNING, values, same):
            statements.add_failure(
                connection,
                {
                    "job_id": row.id,
                    "attempt": row.attempt,
                    "failed_at": now,
                    "worker": row.leased_by,
                    "error_type": lost.error_type,
                    "traceback": lost.traceback,
                },
            )
            taken.append((row, target))
    return taken


# --- by hand ------------------------------------------------------------------------------------------------------


def cancel(connection: Connection, job_id: int, *, now: datetime) -> bool:
    """Cancel a waiting job, or ask a running one to stop; tell whether this call did."""
    check(Status.SCHEDULED, Status.CANCELLED)
    for _ in range(3):  # it may be claimed, or settled, between looking and writing
        found = statements.state(connection, job_id)
        if found is None:
            return False
        token = Token(job_id, found[0])
        if found[1] == Status.SCHEDULED:
            values = {"status": Status.CANCELLED, "finished_at": now}
            if statements.move(connection, token, Status.SCHEDULED, values):
                return True
        elif found[1] == Status.RUNNING:
            asked = {"cancel_requested_at": now}
            if statements.move(connection, token, Status.RUNNING, asked, statements.NOT_ASKED_TO_STOP):
                return True
        else:
            return False
    return False


def revive(connection: Connection, job_id: int, *, run_at: datetime, expires_at: datetime | None) -> bool:
    """Let a failed, expired or cancelled job wait again, with all its attempts; tell whether this call did.

    So does one whose status is none at all: a row edited by hand.
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
        statements.force(connection, job_id, values)
        return True
    check(source, Status.SCHEDULED)
    return statements.move(connection, Token(job_id, found[0]), source, values)
