"""Jobs that run in other processes, by any `concurrent.futures.Executor`: a process pool, loky, Dask, MPI.

What waits is handed out in chunks of about a fiftieth of a second; `stations.run` is what is called there. A job that
takes longer is a chunk by itself.

When a process dies, its pool ends what all the others did, and nothing says which job it was that killed it. Jobs that
were running then are suspects. Each is given a new attempt, so that what it did before can commit nothing any more, and
is run again with nothing else beside it. The one that kills its process then is charged with a loss, as if a whole
worker had died; the others are charged nothing.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import count
from multiprocessing import get_context
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection

from . import events, lifecycle, statements, stations
from .callables import registered_in
from .errors import InvalidOption, JobTimeout, NotSupported, shown
from .execution import Context, failed, time_limit
from .lifecycle import FRAGILE, Released
from .performing import Ended, recalled, tell
from .runners import Outbox
from .slots import Lane
from .statements import Claimed, Token
from .stations import Place, Site, Work
from .status import Status
from .units import Units

__all__ = ["Farm", "MakesExecutor"]

MakesExecutor = Callable[[], Executor]

CHUNK_SECONDS = 0.02
WATCH_SECONDS = 0.25  # between two looks at how long jobs with a timeout have been running
GRACE_SECONDS = 2.0  # for a job whose timeout is over, to be interrupted in its own process
MOST_MISFIRES = 3  # pools in a row that broke before any job was begun


@dataclass(eq=False, slots=True)
class Chunk:
    """Some jobs that an executor was given to run one after the other."""

    number: int
    lane: Lane
    rows: list[Claimed]
    executor: Executor
    is_alone: bool
    future: Future[bytes] | None = None
    error: BaseException | None = None  # why it did not come back

    @property
    def is_broken(self) -> bool:
        """Whether its executor can be used no more."""
        return isinstance(self.error, BrokenExecutor)


@dataclass(slots=True)
class Fates:
    """What is to become of jobs that did not come back, by where each had come to."""

    suspects: list[tuple[Lane, Claimed]] = field(default_factory=list)
    culprits: list[Claimed] = field(default_factory=list)
    others: list[Claimed] = field(default_factory=list)


class Farm:
    """Runs what waits in the lanes by an executor whose processes are not this one."""

    def __init__(
        self,
        executor: Executor | MakesExecutor,
        *,
        site: Site,
        worker: str,
        lease: timedelta,
        units: Units,
        context: Context,
        outbox: Outbox,
        held: MutableMapping[Token, Claimed],
    ) -> None:
        self.problem: BaseException | None = None
        self._site = _pickled(replace(site, modules=registered_in()))
        self._worker = worker
        self._lease = lease
        self._units = units
        self._context = context
        self._outbox = outbox
        self._held = held
        self._executor = executor if isinstance(executor, Executor) else executor()
        self._another = _another(executor)
        self._owned = [] if self._executor is executor else [self._executor]
        self._keywords = {"pure": False, "retries": 0} if _is_dask(self._executor) else {}
        self._board = tempfile.mkdtemp(prefix="future_jobs.") if _is_local(self._executor) else None
        self._numbers = count(1)
        self._out: set[Chunk] = set()
        self._failed: deque[Chunk] = deque()
        self._suspects: deque[tuple[Lane, Claimed]] = deque()
        self._suspected: set[int] = set()  # jobs that have killed a process
        self._condemned: set[Token] = set()
        self._ward: Executor | None = None  # where suspects are run
        self._misfires = 0
        self._is_over = False
        self._watched_at = 0.0
        self._running_since: dict[Token, float] = {}  # of jobs that have a timeout
        if self._board is not None:
            with suppress(Exception):  # that it is broken is found out in time
                self._executor.submit(os.getpid)  # a pool that forks does so now, before the worker has threads

    # --- handing out

    def start(self, lane: Lane) -> None:
        """Hand out what the free slots of ``lane`` can use, once what became of the dead is settled."""
        if self._failed:
            self._settle()
        if self._board is not None and monotonic() - self._watched_at > WATCH_SECONDS:
            self._end_overdue(self._board)
            self._watched_at = monotonic()
        self._examine()
        self._hand_out(lane)

    def _hand_out(self, lane: Lane) -> None:
        while not (self._is_over or self._failed or (self._suspects and self._another is None)):
            rows = lane.take(CHUNK_SECONDS)
            if not rows:
                return
            alone = [row for row in rows if row.id in self._suspected or row.losses >= FRAGILE]
            if alone:
                self._suspects.extend((lane, row) for row in alone)
                rows = [row for row in rows if row not in alone]
            if rows:
                self._send(Chunk(next(self._numbers), lane, rows, self._executor, is_alone=False))
            else:
                lane.leave()

    def _examine(self) -> None:
        """Run the next suspect, if nothing else runs where it will."""
        if any(chunk.is_alone or self._another is None for chunk in list(self._out)):
            return
        if not self._suspects:
            if self._ward is not None:
                self._discard(self._ward)
                self._ward = None
            return
        if self._ward is None and self._another is not None:
            self._ward = self._own(self._another(1))
        lane, row = self._suspects.popleft()
        lane.enter()
        self._send(Chunk(next(self._numbers), lane, [row], self._ward or self._executor, is_alone=True))

    def _send(self, chunk: Chunk) -> None:
        asked = {row.id for row in chunk.rows} & self._context.asked_to_stop
        work = Work(self._site, self._worker, chunk.number, chunk.rows, asked, self._board)
        self._out.add(chunk)
        try:
            chunk.future = chunk.executor.submit(stations.run, pickle.dumps(work), **self._keywords)
        except Exception as error:
            self._gone(chunk, error)
            return
        # Where it is run by the very call of `submit`, it is up to the loop of the caller to go on.
        chunk.future.add_done_callback(partial(self._came_back, chunk, goes_on=not chunk.future.done()))

    # --- what comes back, in a thread of the executor

    def _came_back(self, chunk: Chunk, future: Future[bytes], *, goes_on: bool) -> None:
        try:
            told, asked_to_stop = pickle.loads(future.result())  # noqa: S301 (made by `stations.run`)
        except CancelledError:
            self._gone(chunk, None)
        except BaseException as error:
            self._gone(chunk, error)
        else:
            self._tell(chunk, told, asked_to_stop)
            if goes_on:
                self._hand_out(chunk.lane)

    def _tell(self, chunk: Chunk, told: list[stations.Told], asked_to_stop: set[int]) -> None:
        self._out.discard(chunk)
        self._misfires = 0
        self._context.asked_to_stop.update(asked_to_stop)
        for row, each in zip(chunk.rows, told, strict=True):
            if isinstance(each, str):
                events.logger.error(
                    "what became of job %s could not be written; it will run again\n%s", row.id, each.rstrip()
                )
                self._outbox.lost_track.append(row.token)
            else:
                self._outbox.put(Ended(row, *each))
        chunk.lane.leave()

    def _gone(self, chunk: Chunk, error: BaseException | None) -> None:
        """Take note of a chunk that was not run to its end: a process died, or somebody cancelled it."""
        chunk.error = error
        if error is None or chunk.is_broken or type(error).__name__ == "KilledWorker":
            self._failed.append(chunk)
        else:
            self.problem = error
        self._out.discard(chunk)
        chunk.lane.leave()

    # --- what became of those that did not come back

    def _settle(self) -> None:
        """Write what became of the jobs of processes that died, once all that went with them are known."""
        broken = {chunk.executor for chunk in self._failed if chunk.is_broken}
        if any(chunk.executor in broken for chunk in list(self._out)):
            return
        chunks = [self._failed.popleft() for _ in range(len(self._failed))]
        fates = self._judge(chunks)
        self._replace(broken)
        ended, suspects, culprits = self._units.write(partial(self._write, fates=fates))
        for each in ended:
            self._outbox.put(each)
        for lane, row, token in suspects:
            again = row._replace(attempt=token.attempt)
            self._held[token] = again
            self._outbox.lost_track.append(row.token)
            self._suspects.append((lane, again))
        for row, status in culprits:
            self._suspected.add(row.id)
            self._outbox.lost_track.append(row.token)
            tell("rescued", row, attempt=row.attempt, worker=self._worker, losses=row.losses + 1)
            if status is Status.CANCELLED:
                tell("cancelled", row, attempt=row.attempt, reason=lifecycle.TAKEN)
            if status is Status.FAILED:
                tell("failed", row, attempt=row.attempt, seconds=0.0, error_type="WorkerLost", error="worker lost")

    def _judge(self, chunks: list[Chunk]) -> Fates:
        places = {} if self._board is None else stations.places_on(self._board)
        is_known = any(row.token in self._condemned for chunk in chunks for row in chunk.rows)
        fates, has_begun = Fates(), is_known
        for chunk in chunks:
            running = [] if chunk.error is None else self._running(chunk, places)
            has_begun = has_begun or bool(running)
            for row in chunk.rows:
                if row.token in self._condemned:
                    self._condemned.discard(row.token)
                elif row not in running or is_known:
                    fates.others.append(row)
                elif chunk.is_alone:
                    fates.culprits.append(row)
                else:
                    fates.suspects.append((chunk.lane, row))
        self._misfires = 0 if has_begun else self._misfires + 1
        if self._misfires == MOST_MISFIRES:
            self.problem = chunks[-1].error or NotSupported("the executor cancels what it is given")
        return fates

    def _running(self, chunk: Chunk, places: Mapping[int, Place]) -> list[Claimed]:
        """Return the jobs of ``chunk`` that may be running: one, where that can be seen."""
        if self._board is None:
            return chunk.rows
        place = places.get(chunk.number)
        return [] if place is None else chunk.rows[place.position : place.position + 1]

    def _replace(self, broken: set[Executor]) -> None:
        for executor in broken:
            self._discard(executor)
            if executor is self._ward:
                self._ward = None
            elif executor is self._executor and self._another is not None:
                self._executor = self._own(self._another(None))
            elif executor is self._executor:
                self.problem = NotSupported(
                    "the executor broke, and another like it cannot be made; pass a callable that makes one, such as "
                    "executor=lambda: ProcessPoolExecutor(4)"
                )

    def _write(
        self, connection: Connection, fates: Fates
    ) -> tuple[list[Ended], list[tuple[Lane, Claimed, Token]], list[tuple[Claimed, Status]]]:
        # What holds its job no more has written how it ended before its process died.
        others = statements.holds(connection, [row.token for row in fates.others])
        others -= set(lifecycle.release_all(connection, others))
        now = self._context.time()
        suspects = [(lane, row, lifecycle.restart(connection, row.token, now=now)) for lane, row in fates.suspects]
        culprits = [(row, self._charge(connection, row)) for row in fates.culprits]
        released = Released("the process that should run it is gone")
        gone = [
            *(row for row in fates.others if row.token not in others),
            *(row for _, row, token in suspects if token is None),
            *(row for row, status in culprits if status is None),
        ]
        return (
            [
                *(Ended(r, released, 0.0, Status.SCHEDULED, was_run=False) for r in fates.others if r.token in others),
                *filter(None, (recalled(connection, row) for row in gone)),
            ],
            [(lane, row, token) for lane, row, token in suspects if token is not None],
            [(row, status) for row, status in culprits if status is not None],
        )

    def _charge(self, connection: Connection, row: Claimed) -> Status | None:
        now = self._context.time()
        if lifecycle.deliver_cancel(connection, row.token, now=now):
            return None
        return lifecycle.lose(
            connection,
            row,
            worker=self._worker,
            why=f"worker lost: a process in which {self._worker} ran nothing else died",
            now=now,
            delay=self._lease * random.uniform(0, 1 / 8),  # noqa: S311 (as after a rescue)
        )

    # --- jobs that take too long

    def _end_overdue(self, board: str) -> None:
        """Kill the processes of jobs that have outlived their timeout: in a C function nothing else interrupts them."""
        limited = [chunk for chunk in list(self._out) if any(time_limit(row) for row in chunk.rows)]
        places = stations.places_on(board) if limited else {}
        running = {row.token: row for chunk in limited for row in self._running(chunk, places)}
        now = monotonic()
        self._running_since = {token: self._running_since.get(token, now) for token in running}
        for token, since in self._running_since.items():
            seconds = time_limit(running[token])
            if seconds is not None and now - since > seconds + GRACE_SECONDS and self.kill(token):
                self._outbox.put(self._units.write(partial(self._time_out, row=running[token], seconds=seconds)))

    def _time_out(self, connection: Connection, row: Claimed, seconds: float) -> Ended:
        now, outcome = self._context.time(), failed(row, JobTimeout(seconds), self._context)
        status = lifecycle.settle(connection, row.token, outcome, now=now, worker=self._worker)
        return (status is None and recalled(connection, row)) or Ended(row, outcome, seconds, status)

    # --- ending

    def kill(self, token: Token) -> bool:
        """End the process that runs an attempt, if it is on this host; tell whether there was one.

        What becomes of the job is for the caller to write. All else that its pool was running is handed back.
        """
        places = {} if self._board is None else stations.places_on(self._board)
        for chunk in list(self._out):
            place = places.get(chunk.number)
            if place is not None and [row.token for row in self._running(chunk, places)] == [token]:
                self._condemned.add(token)
                _kill(place.pid)
                return True
        return False

    def recall(self) -> list[Claimed]:
        """Start nothing more, and return what no process has begun."""
        self._is_over = True
        rows = [row for _, row in self._suspects]
        self._suspects.clear()
        if not self._keywords:  # Dask says of what runs that it could be cancelled
            rows += [row for chunk in list(self._out) if _is_cancelled(chunk) for row in chunk.rows]
        return rows

    def stop(self) -> None:
        """End the executors that were made here, and what still runs in them; leave that of the user alone."""
        self._is_over = True
        places = {} if self._board is None else stations.places_on(self._board)
        for chunk in list(self._out):
            if not _is_cancelled(chunk) and chunk.executor in self._owned and chunk.number in places:
                _kill(places[chunk.number].pid)
        for executor in self._owned:
            executor.shutdown(wait=self._board is not None)
        if self._board is not None:
            shutil.rmtree(self._board, ignore_errors=True)

    def _own(self, executor: Executor) -> Executor:
        self._owned.append(executor)
        return executor

    def _discard(self, executor: Executor) -> None:
        if executor in self._owned:
            self._owned.remove(executor)
            executor.shutdown(wait=False)


def _is_cancelled(chunk: Chunk) -> bool:
    return chunk.future is not None and chunk.future.cancel()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has but one way


# --- what executors are -------------------------------------------------------------------------------------------


def _is_local(executor: Executor) -> bool:
    """Whether its processes are on this host and may be killed: those of the standard library's pool, and of loky's."""
    return _pool_class(executor) is not None


def _pool_class(executor: Executor) -> type | None:
    return next((cls for cls in type(executor).__mro__ if cls.__name__ == "ProcessPoolExecutor"), None)


def _is_dask(executor: Executor) -> bool:
    return type(executor).__module__.partition(".")[0] == "distributed"


def _another(executor: Executor | MakesExecutor) -> Callable[[int | None], Executor] | None:
    """Return what makes another executor like one that broke, of so many processes at most; None if that is unknown."""
    if not isinstance(executor, Executor):
        return lambda _: executor()
    was: Any = executor
    if type(executor) is ProcessPoolExecutor:
        context = was._mp_context  # noqa: SLF001 (only the constructor knows it else)
        if context.get_start_method() == "fork":
            # Beside threads, which there are by now, a fork may hang: on a lock of SQLite's that one of them held.
            context = get_context("spawn")
        return lambda most: ProcessPoolExecutor(
            most or was._max_workers,  # noqa: SLF001
            context,
            was._initializer,  # noqa: SLF001
            was._initargs,  # noqa: SLF001
            max_tasks_per_child=was._max_tasks_per_child,  # noqa: SLF001
        )
    kind: Any = _pool_class(was)
    if kind is None or not kind.__module__.startswith("loky."):
        return None
    return lambda most: kind(
        max_workers=most or was._max_workers,  # noqa: SLF001
        context=was._context,  # noqa: SLF001
        timeout=was._timeout,  # noqa: SLF001
        initializer=was._initializer,  # noqa: SLF001
        initargs=was._initargs,  # noqa: SLF001
        env=was._env,  # noqa: SLF001
    )


def _pickled(site: Site) -> bytes:
    try:
        return pickle.dumps(site)
    except Exception as error:
        raise InvalidOption(
            f"timezone is {shown(site.timezone)}, which another process cannot be told ({error}); pass an IANA name",
            argument="timezone",
            value=site.timezone,
        ) from error
