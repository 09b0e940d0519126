"""Run one claimed job and see to it that its outcome is written, whatever the handler did.

What a handler wrote through its Session is committed together with its outcome. A completion without such writes is
left to the caller, who writes many of them at once; every other outcome is written here, in a transaction apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from . import events, execution, lifecycle, statements
from .dialects import is_disconnect, is_lock_error
from .errors import DatabaseBusy
from .execution import Running
from .lifecycle import Cancelled, Completed, Failed, Failure, Outcome, Released, Retried, Snoozed
from .sessions import JobSession
from .statements import Claimed, Token
from .status import Status
from .units import Units, pause

__all__ = ["ATTEND_SECONDS", "Ended", "Performer", "recalled", "tell", "tell_released", "tell_rescued", "told"]

ATTEND_SECONDS = 1.0  # from one `Performer.attend` to the next, if nothing calls for it
TRIES_WHEN_LOCKED = 10
SECONDS_WHEN_LOCKED = 15.0  # no other try begins after


class Ended(NamedTuple):
    """How the run of a claimed job ended, and the state it is in: None if it had gone to another meanwhile."""

    row: Claimed
    outcome: Outcome
    seconds: float
    status: Status | None = None
    is_written: bool = True  # or it is a completion, to be written by `Performer.complete`
    was_run: bool = True

    @property
    def token(self) -> Token:
        """The fencing token of the attempt."""
        return self.row.token


class Performer:
    """Runs claimed jobs for one worker."""

    def __init__(
        self,
        units: Units,
        open_session: Callable[[Claimed], JobSession],
        context: execution.Context,
        *,
        worker: str,
        delete_completed: bool = False,
    ) -> None:
        self.units = units
        self.open_session = open_session
        self.context = context
        self.worker = worker
        self.delete_completed = delete_completed
        context.is_alone = units.is_alone

    def perform(self, row: Claimed) -> Ended:
        """Run a claimed job; again, uncharged, a few times if only a lock was in its way."""
        began = monotonic()
        if row.id in self.context.asked_to_stop and self._was_cancelled(row):
            outcome: Outcome = Cancelled("cancelled before it started")
            return Ended(row, outcome, 0.0, Status.CANCELLED, was_run=False)
        ended = self._attempt(row, began)
        tries = 1
        while isinstance(ended.outcome, Released):
            if tries == TRIES_WHEN_LOCKED or monotonic() - began > SECONDS_WHEN_LOCKED:
                assert ended.outcome.otherwise is not None
                ended = ended._replace(outcome=ended.outcome.otherwise)
                break
            pause(tries)
            tries += 1
            ended = self._attempt(row, began)
        if ended.is_written or isinstance(ended.outcome, Completed):
            return ended
        status, outcome = self._write(row, ended.outcome)
        return ended._replace(status=status, outcome=outcome, is_written=True)

    def complete(self, connection: Connection, done: Sequence[Ended]) -> list[Ended]:
        """Write completions together; return them with the states that their jobs are in. Nothing is committed."""
        if not done:
            return []
        results = [(each.token, each.outcome.result) for each in done if isinstance(each.outcome, Completed)]
        lost = lifecycle.complete_all(connection, results, now=self.context.time(), delete=self.delete_completed)
        return [
            each._replace(status=None if lost and each.token in lost else Status.COMPLETE, is_written=True)
            for each in done
        ]

    def attend(self) -> None:
        """Tell jobs that run here if they were asked to stop, and write down how far they say they are.

        To be called now and then, from a thread that no job can keep busy.
        """
        at_work = {run.row.token: run for run in self.context.at_work.copy()}
        tokens = [token for token, run in at_work.items() if not run.is_asked_to_stop]
        if tokens:
            for token in self.units.read(lambda connection: statements.asked_to_stop(connection, tokens)):
                at_work[token].ask_to_stop()
        if told := [run for run in at_work.values() if run.news is not None]:
            self._note_progress(told, waits=False)

    def _note_progress(self, runs: Sequence[Running], *, waits: bool) -> None:
        """Write down what handlers have said of their progress."""
        news = {run.row.token: run.news for run in runs}
        write = self.units.write if waits else self.units.try_write
        written = write(lambda connection: statements.note_progress(connection, news, waits=waits)) or ()
        for run in runs:
            if run.row.token in written and run.news is news[run.row.token]:
                run.news = None

    # --- one attempt

    def _attempt(self, row: Claimed, began: float) -> Ended:
        this = Running(row, self.open_session, self.context)
        try:
            outcome = execution.run(this)
            work = this.opened
            if work is None or not (outcome.keeps_writes and work.was_used):
                return Ended(row, outcome, monotonic() - began, is_written=False)
            try:
                status, outcome = self._finish(this, work, outcome)
                return Ended(row, outcome, monotonic() - began, status)
            except Exception as error:
                work.close()
                if is_disconnect(error) and (status := self._settled(row)):
                    return Ended(row, outcome, monotonic() - began, status)
                outcome = execution.failed(row, error, self.context)
                return Ended(row, outcome, monotonic() - began, is_written=False)
        finally:
            if this.opened is not None:
                this.opened.close()
            if this.news is not None:
                with suppress(SQLAlchemyError, DatabaseBusy):  # it is not worth failing for
                    self._note_progress([this], waits=True)

    def _finish(self, this: Running, work: JobSession, outcome: Outcome) -> tuple[Status | None, Outcome]:
        """Commit what the handler wrote together with its outcome; None if the job had gone to another meanwhile."""
        token = this.row.token
        status: Status | None = None
        ended = outcome

        def settle(connection: Connection) -> bool:
            nonlocal status, ended
            if this.news is not None:
                statements.note_progress(connection, {token: this.news})
                this.news = None
            status, ended = self._settle(connection, token, outcome)
            if status is None and self._is_still_ours(token):
                now = self.context.time()
                status = lifecycle.overrule(connection, token, outcome, now=now, worker=self.worker)
            return status is not None

        is_kept = work.finish(settle)
        self.units.commits += 1
        return (status if is_kept else None), ended

    def _settle(
        self, connection: Connection, token: Token, outcome: Outcome, *, again: bool = False
    ) -> tuple[Status | None, Outcome]:
        """Write how an attempt ended; return the state the job is in now, and how it ended then."""
        now = self.context.time()
        settle = partial(lifecycle.settle, now=now, worker=self.worker, delete=self.delete_completed, again=again)
        status = settle(connection, token, outcome)
        if status is Status.CANCELLED and not isinstance(outcome, Cancelled):
            outcome = Cancelled(lifecycle.why_cancelled(connection, token.id, outcome))
        return status, outcome

    def _is_still_ours(self, token: Token) -> bool:
        """Whether the attempt holds the job as others see it, so that it was the handler that changed its row."""
        if self.units.is_alone:
            return True
        return bool(self.units.read(lambda connection: statements.holds(connection, [token])))

    def _settled(self, row: Claimed) -> Status | None:
        """Return the state that a commit of unknown outcome has left, None if it did not happen."""
        found = self.units.read(lambda connection: statements.state(connection, row.id))
        if found is None or found[0] != row.attempt or found[1] is Status.RUNNING:
            return None
        return Status(found[1])

    def _was_cancelled(self, row: Claimed) -> bool:
        """End a claimed job that another handler of this process cancelled, before it starts."""
        token, now = row.token, self.context.time()
        return self.units.write(lambda connection: lifecycle.deliver_cancel(connection, token, now=now))

    def _write(self, row: Claimed, outcome: Outcome) -> tuple[Status | None, Outcome]:
        """Write an outcome by itself; with fewer words, if the database refuses those of the failure."""
        for words in _fewer_words(outcome):
            tries = count()

            def settle(
                connection: Connection, words: Outcome = words, tries: Iterator[int] = tries
            ) -> tuple[Status | None, Outcome]:
                return self._settle(connection, row.token, words, again=next(tries) > 0)

            try:
                return self.units.write(settle)
            except DBAPIError as error:
                if is_lock_error(error) or is_disconnect(error):
                    raise
                events.emit("not_recorded", job_id=row.id, attempt=row.attempt, error=type(error).__name__)
        return None, outcome


def _fewer_words(outcome: Outcome) -> Iterator[Outcome]:
    yield outcome
    failure = getattr(outcome, "failure", None)
    if failure is not None and not isinstance(outcome, Completed | Snoozed | Released):
        plain = failure.error_type.encode("ascii", "replace").decode()
        yield replace(outcome, failure=Failure(plain, plain, f"{plain} (the traceback could not be stored)"))
        yield replace(outcome, failure=Failure("Error", "Error", "the traceback could not be stored"))


def recalled(connection: Connection, row: Claimed) -> Ended | None:
    """Return how an attempt ended that could not say so itself, by what it has written; None if it holds its job."""
    found = statements.fate(connection, row.id)
    if found is None or found.attempt != row.attempt:
        return Ended(row, Completed(), 0.0)
    if found.status is Status.RUNNING:
        return None
    outcome: Outcome = Completed()
    failure = None
    if found.error_type is not None:
        message = found.traceback.strip().rpartition("\n")[2].removeprefix(f"{found.error_type}: ")
        failure = Failure(found.error_type, message, found.traceback)
    match found.status, failure:
        case Status.SCHEDULED, None:
            outcome = Snoozed(found.run_at)
        case Status.SCHEDULED, Failure():
            outcome = Retried(failure, found.run_at)
        case Status.FAILED, Failure():
            outcome = Failed(failure)
        case Status.CANCELLED, _:
            outcome = Cancelled(found.error or "asked to stop", failure)
    return Ended(row, outcome, 0.0, found.status)


# --- telling ------------------------------------------------------------------------------------------------------


def tell(event: str, row: Any, **data: Any) -> None:
    """Emit ``event`` about the job of ``row``."""
    events.emit(event, job_id=row.id, callable_name=row.callable_name, queue=row.queue, **data)


def tell_released(rows: Iterable[Claimed], reason: str, gone: Mapping[Token, str]) -> None:
    """Tell that ``rows`` were handed back for ``reason``, those ``gone`` that they were cancelled instead."""
    for row in rows:
        if row.token in gone:
            tell("cancelled", row, attempt=row.attempt, reason=gone[row.token])
        else:
            tell("released", row, attempt=row.attempt, reason=reason)


def tell_rescued(row: Any, status: Status) -> None:
    """Tell that a job was taken back from a dead worker, and what it is now."""
    tell("rescued", row, attempt=row.attempt, worker=row.leased_by, losses=row.losses + 1)
    if status is Status.CANCELLED:
        reason = lifecycle.TAKEN if row.cancel_requested_at is None else lifecycle.ASKED
        tell("cancelled", row, attempt=row.attempt, reason=reason)
    if status is Status.FAILED:
        tell("failed", row, attempt=row.attempt, seconds=0.0, error_type="WorkerLost", error="worker lost")


def told(ended: Ended) -> str:
    """Say what became of a job, and return the event's name."""
    row, outcome = ended.row, ended.outcome
    if isinstance(outcome, Completed) and ended.status and outcome.problem is None and not events.wanted("completed"):
        return "completed"  # nobody asks: what a busy loop says most
    data: dict[str, Any] = {"attempt": row.attempt, "seconds": ended.seconds}
    problem = outcome.problem if isinstance(outcome, Completed | Retried) else None
    match outcome, ended.status:
        case _, None:
            event = "lost"
        case Completed(), _:
            event = "completed"
        case _, Status.CANCELLED:
            event = "cancelled"
            data["reason"] = outcome.reason if isinstance(outcome, Cancelled) else "asked to stop"
        case Failed(failure=failure), _:
            event = "failed"
            data |= {"error_type": failure.error_type, "error": failure.message}
        case Retried(failure=failure, run_at=run_at), _:
            event = "retried"
            data |= {"error_type": failure.error_type, "error": failure.message, "run_at": run_at}
        case Snoozed(run_at=run_at), _:
            event = "snoozed"
            data["run_at"] = run_at
        case _:
            raise AssertionError(f"{outcome!r} cannot end as {ended.status}")
    if problem is not None and ended.status is not None:
        name = "result_not_kept" if isinstance(outcome, Completed) else "backoff_failed"
        tell(name, row, attempt=row.attempt, reason=problem)
    if events.wanted(event):
        tell(event, row, **data)
    return event
