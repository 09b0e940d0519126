"""How the jobs that wait in a lane come to be run, by whom, and where it is told how they ended."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from datetime import timedelta
from functools import partial
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Connection, Engine

from . import events, lifecycle, statements
from .dialects import is_single_connection
from .errors import CallableNotFound
from .lifecycle import Completed, Released, Snoozed
from .performing import Ended, Performer
from .sessions import JobSession, Kept
from .slots import Lane
from .statements import Claimed, Token
from .status import Status

__all__ = ["Here", "InThreads", "Outbox", "PatientPerformer", "Perform", "Runner", "emptied", "opener"]

T = TypeVar("T")

ACK_SECONDS = 0.01  # a completion waits at most this long, or for the next claim
UNKNOWN_DELAY = timedelta(minutes=1)  # until a job is tried again whose callable this process does not know
AWAY_SECONDS = 1.0  # a database that takes longer to answer was away
HAND_OVER_SECONDS = 0.0001  # for a job to begin, which would have to wait until the loop waits for the database
TOLD_SECONDS = 0.05  # one that shared the transaction of its handler has only to be told

Perform = Callable[[Claimed], Ended]


class PatientPerformer(Performer):
    """A Performer that tries a job again once the database answers, and hands back what this process cannot run."""

    def perform(self, row: Claimed) -> Ended:
        """Run a claimed job, unless nothing here is called what it calls.

        Another process may know it, while a new version is rolled out; or this one after its restart.
        """
        try:
            if row.content_type is None:
                self.context.function(row.callable_name)
        except CallableNotFound:
            now = self.context.time()
            later = Snoozed(now + UNKNOWN_DELAY)

            def settle(connection: Connection) -> Status | None:
                return lifecycle.settle(connection, row.token, later, now=now, worker=self.worker)

            status = self.units.write(settle)
            return Ended(row, Released("this process knows no such callable"), 0.0, status, was_run=False)
        except Exception:  # noqa: S110 (what else is wrong with it is told by running it)
            pass
        return super().perform(row)

    def _attempt(self, row: Claimed, began: float) -> Ended:
        ended = super()._attempt(row, began)
        while isinstance(ended.outcome, Released):
            asked = monotonic()
            self.units.read(statements.newest)
            if monotonic() - asked < AWAY_SECONDS:
                break  # it was a lock, which has its own number of tries
            ended = super()._attempt(row, monotonic())
        return ended


def opener(
    make: Callable[[], Any], engine: Engine, info: dict[str, Any], kept: Kept
) -> Callable[[Claimed], JobSession]:
    """Return what opens the Session of a job on ``engine``, with ``info`` for who asks for it."""
    lender = None if is_single_connection(engine) else kept

    def open_session(row: Claimed) -> JobSession:
        joined = row.options is None or '"transaction":"own"' not in row.options
        hold = partial(statements.hold, token=row.token)
        return JobSession(make, engine, hold=hold, joined=joined, info=info, lender=lender)

    return open_session


class Outbox:
    """What has ended and is to be settled by the loop of the worker; filled by any thread, without a lock.

    ``ring`` is called with the seconds that it may take: what is written already can wait for company, unless another
    job ``is_waiting`` for its end.
    """

    def __init__(self, ring: Callable[[float], None], is_waiting: Callable[[Token], bool]) -> None:
        self._ring = ring
        self._is_waiting = is_waiting
        self._ended: deque[Ended] = deque()
        self._rung_for = math.inf
        self.lost_track: deque[Token] = deque()  # attempts of which nothing could be written

    def put(self, ended: Ended) -> None:
        """Add what has ended; ring, if that was not done since it was emptied."""
        self._ended.append(ended)
        is_over = ended.is_written and isinstance(ended.outcome, Completed) and not self._is_waiting(ended.token)
        seconds = TOLD_SECONDS if is_over else ACK_SECONDS
        if seconds < self._rung_for:
            self._rung_for = seconds
            self._ring(seconds)

    def put_back(self, ended: Iterable[Ended]) -> None:
        """Add what could not be settled."""
        self._ended.extendleft(ended)

    def take(self) -> list[Ended]:
        """Return what has ended."""
        self._rung_for = math.inf  # first: what comes from now on rings again
        return emptied(self._ended)

    def take_lost(self) -> list[Token]:
        """Return the attempts that the leases will take back, since nobody holds them any more."""
        return emptied(self.lost_track)


def emptied(items: deque[T]) -> list[T]:
    """Take all of ``items``, to which other threads may add meanwhile."""
    taken = []
    while items:
        taken.append(items.popleft())
    return taken


class Runner(Protocol):
    """Runs what waits in a lane."""

    problem: BaseException | None

    def start(self, lane: Lane) -> None:
        """Put as many free slots of ``lane`` to work as what waits is worth."""

    def recall(self) -> list[Claimed]:
        """Start nothing more, and return what was taken from a lane and has not started."""

    def stop(self) -> None:
        """Accept nothing more. What runs may go on."""


class Here:
    """Runs them in the thread of the loop, where one connection is all there is."""

    problem: BaseException | None = None

    def __init__(self, perform: Perform, outbox: Outbox) -> None:
        self._perform = perform
        self._outbox = outbox

    def start(self, lane: Lane) -> None:
        """Run all that waits in ``lane``."""
        if lane.hire():
            serve(lane, self._perform, self._outbox)

    def recall(self) -> list[Claimed]:
        """Nothing is taken that does not run."""
        return []

    def stop(self) -> None:
        """Nothing is left running."""


class InThreads:
    """Runs them by an executor of this process."""

    def __init__(
        self, perform: Perform, outbox: Outbox, executor: Executor, *, is_own: bool, rest: Callable[[], None]
    ) -> None:
        self.problem: BaseException | None = None
        self._perform = perform
        self._outbox = outbox
        self._executor = executor
        self._is_own = is_own
        self._rest = rest  # what a thread does when nothing waits any more

    def start(self, lane: Lane) -> None:
        """Put free slots of ``lane`` to work."""
        hired = lane.hire()
        for _ in range(hired):
            slot = self._executor.submit(self._serve, lane)
            slot.add_done_callback(partial(self._note_problem, lane))
        if hired:
            sleep(HAND_OVER_SECONDS)

    def recall(self) -> list[Claimed]:
        """Nothing is taken that does not run."""
        return []

    def stop(self) -> None:
        """End the threads, each after the job that it runs, if they are not somebody else's."""
        if self._is_own:
            self._executor.shutdown(wait=False)

    def _serve(self, lane: Lane) -> None:
        try:
            serve(lane, self._perform, self._outbox)
        finally:
            self._rest()

    def _note_problem(self, lane: Lane, slot: Future[None]) -> None:
        if slot.cancelled() or (problem := slot.exception()) is None:
            return
        self.problem = problem
        lane.leave()


def serve(lane: Lane, perform: Perform, outbox: Outbox) -> None:
    """Run, on one slot of ``lane``, what waits for it, until nothing does."""
    while (row := lane.next()) is not None:
        try:
            ended = perform(row)
        except Exception:
            events.logger.exception("what became of job %s could not be written; it will run again", row.id)
            outbox.lost_track.append(row.token)
            continue
        outbox.put(ended)
