"""One pass over what is due: claim, run, settle, until nothing is left that was due when it began.

The pass runs in the calling thread. It claims as many jobs as it can run in about a tenth of a second, so that fast
jobs come in large batches and slow ones leave the rest to others. What never touched its Session is completed together
with the next claim; what did is completed in its own transaction.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection

from . import claim_statements, events, execution, lifecycle, limit_statements, statements, ticks
from .errors import JobAborted
from .lifecycle import Failed
from .limits import Limits
from .performing import ATTEND_SECONDS, Ended, Performer, tell, tell_released, tell_rescued, told
from .sessions import JobSession
from .statements import Claimed, Level
from .times import utc_now
from .units import Units

__all__ = ["Pass", "RunReport", "worker_name"]

LEASE = timedelta(seconds=60)
BATCH_SECONDS = 0.1  # claim what can be run in about this time
BATCH_MOST = 200
ACK_SECONDS = 0.01  # a completion waits at most this long, or for the next claim


@dataclass(slots=True)
class RunReport:
    """What a pass did: how many jobs ended in each way, and which were run, in order."""

    complete: int = 0
    failed: int = 0
    retried: int = 0
    snoozed: int = 0
    expired: int = 0
    cancelled: int = 0
    lost: int = 0
    job_ids: list[int] = field(default_factory=list)


def worker_name() -> str:
    """Return a name for a claimer that no other has, on any host, at any time."""
    return f"{socket.gethostname()[:100]}:{os.getpid()}:{secrets.token_hex(6)}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the claims of one level have come to: of jobs that were never lost, and then of those that were."""

    level: Level
    after: tuple[datetime, int]
    is_of_lost: bool = False

    def beyond(self, taken: list[Claimed], asked: int) -> list[_Place]:
        """Return where to go on, if anywhere, after ``taken`` was claimed where so many were ``asked`` for."""
        if len(taken) == asked:
            return [replace(self, after=(taken[-1].run_at, taken[-1].id))] if taken else [self]
        return [] if self.is_of_lost else [_Place(self.level, (self.level.first_at, 0), is_of_lost=True)]


class Pass:
    """One call of `Scheduler.run_due`."""

    def __init__(
        self,
        units: Units,
        open_session: Callable[[Claimed], JobSession],
        context: execution.Context,
        *,
        now: datetime,
        delete_completed: bool = False,
        ignore_errors: bool = False,
        queues: frozenset[str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.units = units
        self.context = context
        self.now = now
        self.ignore_errors = ignore_errors
        self.queues = queues
        self.left = math.inf if limit is None else limit
        self.worker = worker_name()
        self.performer = Performer(units, open_session, context, worker=self.worker, delete_completed=delete_completed)
        self.report = RunReport()
        self._began = monotonic()
        self._newest = 0
        self._limits = Limits(patience=math.inf)
        self._groups: list[list[_Place]] = []  # by priority; within one, a place for each queue
        self._unstarted: deque[Claimed] = deque()
        self._done: list[Ended] = []
        self._done_since = 0.0
        self._seconds: dict[str, float] = {}  # how long the last run of a callable took
        self._average = BATCH_SECONDS

    def run(self) -> RunReport:
        """Run what is due; raise the first error that a handler raised unless errors are ignored."""
        with ExitStack() as stack:
            stack.enter_context(_interrupts(self.context))
            stack.callback(self._hand_back)
            self._rescue()
            ticks.tick(self.units, now=self.now)
            self._look()
            stack.enter_context(self._renewal())
            while self._claim():
                while self._unstarted:
                    self._perform(self._unstarted[0])  # interrupted, it is handed back with the others
        return self.report

    # --- before the first claim

    def _look(self) -> None:
        """Find the levels with jobs due, and on the way take back what the dead hold and expire what is too late.

        Looking only reads: where there is nothing to do, nothing is written and no lock is taken.
        """

        def look(connection: Connection) -> list[Level]:
            due = [level for level in statements.levels(connection) if self._serves(level)]
            self._newest = statements.newest(connection) if due else 0
            late.extend(level for level in due if claim_statements.is_any_expired(connection, level, now=self.now))
            paused.update(limit_statements.paused(connection) if due else ())
            return due

        late: list[Level] = []
        paused: set[str] = set()
        for level in self.units.read(look):
            if level in late:
                self._expire(level)
            if level.queue in paused:
                continue
            place = _Place(level, (level.first_at, 0))
            if self._groups and self._groups[-1][0].level.priority == level.priority:
                self._groups[-1].append(place)
            else:
                self._groups.append([place])

    def _serves(self, level: Level) -> bool:
        return level.first_at <= self.now and (self.queues is None or level.queue in self.queues)

    def _rescue(self) -> None:
        # A single pass cannot watch whether a lease moves; a whole lease after its end it is over for certain.
        before = self._time() - LEASE
        while self.units.read(lambda connection: claim_statements.is_any_abandoned(connection, before=before)):
            rescued = self.units.write(lambda connection: lifecycle.rescue(connection, now=self._time(), grace=LEASE))
            for row, status in rescued:
                tell_rescued(row, status)
            if not rescued:
                return  # somebody else is at it

    def _expire(self, level: Level) -> None:
        while gone := self.units.write(lambda connection: lifecycle.expire(connection, level, now=self.now)):
            self.report.expired += len(gone)
            for row in gone:
                tell("expired", row, run_at=row.run_at, expires_at=row.expires_at)

    # --- claiming

    def _claim(self) -> bool:
        self._leave_out_full()
        wanted = int(min(BATCH_MOST, max(1, BATCH_SECONDS / self._average), self.left))
        if not self._done and not (self._groups and wanted):
            return False  # nothing to write: no lock is taken
        done, self._done = self._done, []

        def work(connection: Connection) -> tuple[list[Ended], list[Claimed], list[list[_Place]]]:
            ended = self.performer.complete(connection, done)
            return ended, *self._take(connection, wanted)

        try:
            ended, rows, self._groups = self.units.write(work)
        except BaseException:
            self._done = done
            raise
        for each in ended:
            self._count(each)
        self._limits.took(rows)
        self.left -= len(rows)
        if events.wanted("claimed"):
            for row in rows:
                tell("claimed", row, attempt=row.attempt, worker=self.worker)
        requeued = self.context.requeued
        again = [row for row in rows if row.id in requeued] if requeued else []
        if again:
            self._release(again, "it waits for the next pass")
        self._unstarted = deque(row for row in rows if row.id not in requeued) if again else deque(rows)
        return bool(rows)

    def _leave_out_full(self) -> None:
        """Drop the limited levels of which nothing may start: what waits there is for another pass."""
        if not any(place.level.limited for group in self._groups for place in group):
            return
        if self._done:
            self._settle_done()  # whose places are free then
        groups = ([each for each in group if self._may_start(each.level)] for group in self._groups)
        self._groups = [group for group in groups if group]

    def _may_start(self, level: Level) -> bool:
        def look(connection: Connection) -> tuple[datetime | None, bool]:
            return self._limits.look(connection, level, now=self.now, at=self._time(), newest=self._newest)

        is_all = not level.limited
        while not is_all:
            opens_at, is_all = self.units.read(look)
            if is_all and (opens_at is None or opens_at > self._time()):
                return False
        return True

    def _take(self, connection: Connection, wanted: int) -> tuple[list[Claimed], list[list[_Place]]]:
        rows: list[Claimed] = []
        groups = [list(group) for group in self._groups]
        limited_left = 1
        while groups and len(rows) < wanted:
            share = math.ceil((wanted - len(rows)) / len(groups[0]))  # queues of one priority take turns
            left: list[_Place] = []
            for place in groups[0]:
                # A job that was lost before may be one that kills its process: it is taken alone. A limited one counts
                # as started: one in each batch.
                asked = int(not rows) if place.is_of_lost else min(share, wanted - len(rows))
                if place.level.limited:
                    asked = min(asked, limited_left)
                taken = self._take_from(connection, place, asked) if asked else []
                rows += taken
                limited_left -= len(taken) if place.level.limited else 0
                left += place.beyond(taken, asked)
            if left == groups[0]:
                break
            groups[:1] = [left] if left else []
        if any(len(group) > 1 for group in self._groups):  # a level alone comes in order
            rows.sort(key=lambda row: (statements.rank(row.priority), row.run_at, row.id))
        return rows, groups

    def _take_from(self, connection: Connection, place: _Place, limit: int) -> list[Claimed]:
        if place.level.limited:
            return self._limits.claim(
                connection,
                place.level,
                limit=limit,
                now=self.now,
                worker=self.worker,
                leased_until=self._lease_end(),
                started_at=self._time(),
                most_losses=statements.ANY_LOSSES if place.is_of_lost else 0,
            )
        return claim_statements.claim(
            connection,
            place.level,
            after=place.after,
            newest=self._newest,
            limit=limit,
            now=self.now,
            worker=self.worker,
            leased_until=self._lease_end(),
            started_at=self._time(),
            losses=(1, statements.ANY_LOSSES) if place.is_of_lost else (0, 0),
        )

    # --- running

    def _perform(self, row: Claimed) -> None:
        if self._done and (
            monotonic() - self._done_since > ACK_SECONDS
            or self._seconds.get(row.callable_name, ACK_SECONDS) >= ACK_SECONDS
        ):
            self._settle_done()
        ended = self.performer.perform(row)
        self._limits.freed([row.id])
        self._unstarted.popleft()
        self._seconds[row.callable_name] = ended.seconds
        self._average += (ended.seconds - self._average) * (0.1 if self.report.job_ids else 1)
        if ended.was_run:
            self.report.job_ids.append(row.id)
        if ended.is_written:
            self._count(ended)
        else:
            self._done.append(ended)
            self._done_since = monotonic() if len(self._done) == 1 else self._done_since
        if isinstance(ended.outcome, Failed) and not self.ignore_errors:
            error = ended.outcome.error
            if isinstance(error, Exception):
                raise error
            assert error is not None  # it was raised in this thread
            raise JobAborted(row.id, error) from error

    def _count(self, ended: Ended) -> None:
        match told(ended):
            case "completed":
                self.report.complete += 1
            case "failed":
                self.report.failed += 1
            case "cancelled":
                self.report.cancelled += 1
            case "lost":
                self.report.lost += 1
                self.context.requeued.add(ended.row.id)  # it may wait again already
            case "retried":
                self.report.retried += 1
                self.context.requeued.add(ended.row.id)
            case "snoozed":
                self.report.snoozed += 1
                self.context.requeued.add(ended.row.id)

    # --- settling

    def _settle_done(self) -> None:
        done, self._done = self._done, []
        try:
            ended = self.units.write(lambda connection: self.performer.complete(connection, done))
        except BaseException:
            self._done = done
            raise
        for each in ended:
            self._count(each)

    def _hand_back(self) -> None:
        """Write what is done and give back what was claimed and not started, however the pass ends."""
        if self._done:
            self._settle_done()
        if self._unstarted:
            self._release(self._unstarted, "the pass ended before its turn")
            self._unstarted.clear()

    def _release(self, rows: Iterable[Claimed], reason: str) -> None:
        tokens = [row.token for row in rows]
        gone = self.units.write(lambda connection: lifecycle.release_all(connection, tokens))
        tell_released(rows, reason, gone)

    # --- time

    def _time(self) -> datetime:
        return self.context.time()

    def _lease_end(self) -> datetime:
        # Never in the past, whatever time it is said to be: others would take the jobs away at once.
        return max(self.now + timedelta(seconds=monotonic() - self._began), utc_now()) + LEASE

    @contextmanager
    def _renewal(self) -> Iterator[None]:
        """Keep the lease of what this pass holds, and attend to it, from a thread that no busy handler can starve."""
        if self.units.is_alone or not self._groups:
            yield
            return
        stop = threading.Event()

        def renew() -> None:
            renew_at = monotonic() + LEASE.total_seconds() / 4
            while not stop.wait(ATTEND_SECONDS):
                try:
                    if monotonic() >= renew_at:
                        self.units.write(
                            lambda connection: statements.renew(connection, self.worker, self._lease_end())
                        )
                        renew_at = monotonic() + LEASE.total_seconds() / 4
                    self.performer.attend()
                except Exception:
                    events.logger.exception("the leases of %s could not be renewed", self.worker)

        thread = threading.Thread(target=renew, name="future_jobs lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _interrupts(context: execution.Context) -> Iterator[None]:
    """Tell a Ctrl-C from a KeyboardInterrupt that a handler raised, while Python's own handler is in charge."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        context.is_interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
