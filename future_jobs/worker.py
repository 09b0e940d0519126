"""`Worker`: runs what is due, for as long as its process lives, beside any number of others.

The loop is `Worker.tick`: settle what has finished, claim what free slots can use, hand it to them, and say how long
nothing more will be due. Everything else here starts it, ends it, or is called by it.

Completions ride in the transaction of the next claim. What is claimed beyond the free slots is what these can finish in
about a tenth of a second, so that fast jobs come in large batches and slow ones leave the rest to others.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from functools import partial
from itertools import groupby
from time import monotonic
from typing import Any

from sqlalchemy import URL
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker

from . import events, execution, lifecycle, schema, statements, ticks, wakeups
from .callables import Allow
from .dialects import is_single_connection
from .errors import CallableNotFound, DatabaseBusy, InvalidOption, NotSupported, shown
from .leases import Leases
from .lifecycle import Released, Snoozed
from .limits import Limits
from .models import SCHEDULER
from .passes import worker_name
from .patience import PatientUnits
from .performing import Ended, Performer, tell, told
from .scheduler import Scheduler
from .sessions import InRegistry, JobSession
from .slots import Lane, Threads, lanes_of
from .sources import opened, own_engine, refuse_small_pool, seconds_of
from .statements import Claimed, Level, Token
from .status import Status
from .times import utc_now

__all__ = ["Worker"]

Source = Engine | URL | str | sessionmaker[Any] | scoped_session[Any]

ACK_SECONDS = 0.01  # a completion waits at most this long, or for the next claim
LOOK_SECONDS = 0.1  # while busy, how long a job of a better priority may go unseen
MISSED_SECONDS = 0.02  # until the next try, when others hold what is due
MEASURE_SECONDS = 60.0  # between two looks at the database's clock
UNKNOWN_DELAY = timedelta(minutes=1)  # until a job is tried again whose callable this process does not know
AWAY_SECONDS = 1.0  # a database that takes longer to answer was away
PRUNE_SECONDS = 3600.0
PRUNE_LIMIT = 5_000
NO_LIMIT = (1 << 63) - 1


class Worker:
    """Runs due jobs of one database until it is told to stop.

    ``source`` says where the jobs are, and how their Sessions are made: an Engine, a URL, a sessionmaker, a
    scoped_session, or the ``"module:attr"`` of one. ``queues`` maps the queues it serves to how many of their jobs may
    run at once; ``"*"`` stands for all that are not named. ``lease`` is how long after its death a worker's jobs stay
    its own, ``poll`` how often it looks, at least. ``prefetch`` is how many jobs it may hold beyond its slots (None:
    what they finish in a tenth of a second). ``max_jobs`` ends it after that many; ``retention`` is how long complete
    jobs are kept (None: for ever). ``executor`` runs the jobs, in this process.
    """

    def __init__(
        self,
        source: Source,
        *,
        queues: Mapping[str, int] | None = None,
        lease: str | timedelta = "60s",
        poll: str | timedelta = "1s",
        executor: Executor | None = None,
        name: str | None = None,
        allow: Allow = None,
        timezone: tzinfo | str | None = None,
        prefetch: int | None = None,
        max_jobs: int | None = None,
        retention: str | timedelta | None = None,
    ) -> None:
        self.queues = dict(queues or {"default": 10})
        self.lanes = lanes_of(self.queues, prefetch)
        self.lease = timedelta(seconds=seconds_of(lease, "lease"))
        self.poll = seconds_of(poll, "poll")
        self.retention = None if retention is None else timedelta(seconds=seconds_of(retention, "retention"))
        if max_jobs is not None and (isinstance(max_jobs, bool) or not isinstance(max_jobs, int) or max_jobs < 1):
            raise InvalidOption(
                f"max_jobs is {shown(max_jobs)}; pass a whole number, or None", argument="max_jobs", value=max_jobs
            )
        self.max_jobs = math.inf if max_jobs is None else max_jobs
        self.name = name
        self.ran = 0
        self.was_hurried = False  # a second signal came
        self.engine, self._make, self._owns_engine = opened(source, connections=sum(self.queues.values()))
        scoped = self._make if isinstance(self._make, scoped_session) else None
        self.scheduler = Scheduler(scoped or self._make(), timezone=timezone, allow=allow)
        self._around = None if scoped is None else InRegistry(scoped)
        self._given_executor = executor
        self._pid = os.getpid()
        if is_single_connection(self.engine):
            if executor is not None:
                raise NotSupported(
                    "this database is one connection, so its jobs run in the calling thread; leave out executor, or "
                    "use a file or a server"
                )
            for lane in self.lanes.values():
                lane.slots = 1
        elif executor is not None and any(cls.__name__ == "ProcessPoolExecutor" for cls in type(executor).__mro__):
            raise NotSupported(
                "executor is a ProcessPoolExecutor, and jobs run in this process; start several workers to use several "
                "processes"
            )
        else:
            refuse_small_pool(self.engine, sum(self.queues.values()))
        self._alarm = wakeups.Alarm()
        self._lock = threading.Lock()  # of the lanes, and of what is held, started and done
        self._held: dict[Token, Claimed] = {}
        self._done: list[Ended] = []
        self._view: list[Level] = []
        self._stale_after = 0.0
        self._misses = 0
        self._deadline = math.inf
        self._problem: BaseException | None = None
        self._crew: _Crew | None = None
        self._loop: threading.Thread | None = None
        self._closed = threading.Event()

    # --- the loop

    def tick(self) -> float:
        """Settle what finished, claim what free slots can use, and submit it; return how many seconds to sleep.

        Where nothing has finished and nothing is due it only reads.
        """
        crew = self._opened()
        if self._problem is not None:
            raise self._problem
        if monotonic() >= self._stale_after:
            self._look(crew)
        done = self._collect()
        wishes = [] if self.is_stopping else self._wishes()
        claimed = self._settle_and_claim(crew, done, wishes) if done or wishes else 0
        self._submit(crew)
        return self._delay(crew, wanted=bool(wishes), claimed=claimed)

    def run(self, *, timeout: str | timedelta = "30s") -> None:
        """Work until SIGTERM or SIGINT, `stop`, or ``max_jobs``.

        Then nothing more is claimed, and what runs has ``timeout`` to finish; what has not, and what was not started,
        is handed back uncharged. A second signal hands it back at once. Signals are only heard in the main thread.
        """
        with self._signals(seconds_of(timeout, "timeout")), suppress(_Interrupted):
            self._work(timeout)

    def _work(self, timeout: str | timedelta) -> None:
        self._loop = threading.current_thread()
        try:
            while not self.is_stopping:
                self._alarm.sleep(self.tick())
        finally:
            self._ask_to_stop(seconds_of(timeout, "timeout"))
            self._close()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop, or has run all that it may."""
        return self._deadline < math.inf or self.ran >= self.max_jobs

    # --- looking

    def _look(self, crew: _Crew) -> None:
        """See which levels have jobs waiting; expire what is too late. Writes nothing where nothing is."""
        if monotonic() >= crew.measure_at:
            crew.measure()
        if self.retention is not None and monotonic() >= crew.prune_at:
            self._prune(crew, self.retention)
        now = crew.context.time()
        crew.context.requeued.clear()  # of no use to a loop, and it would grow
        if crew.context.asked_to_stop:
            crew.context.asked_to_stop.intersection_update({token.id for token in self._tokens()})

        if monotonic() >= crew.tick_at:
            ticks.tick(crew.units, now=now)
            crew.tick_at = monotonic() + self.poll

        def look(connection: Connection) -> tuple[list[Level], list[Level]]:
            found = [level for level in statements.levels(connection) if self._lane_of(level.queue)]
            due = [level for level in found if level.first_at <= now] if monotonic() >= crew.expire_at else []
            startable = crew.limits.startable(connection, found, now=now)
            return startable, [level for level in due if statements.is_any_expired(connection, level, now=now)]

        self._stale_after = monotonic() + LOOK_SECONDS  # what wakes it meanwhile makes it stale again
        began = monotonic()
        self._view, late = crew.units.read(look)
        if began >= crew.expire_at:  # that reads all that is due: seldom, where it takes long
            crew.expire_at = monotonic() + max(self.poll, 20 * (monotonic() - began))
        for level in late:
            for row in crew.units.write(partial(lifecycle.expire, level=level, now=now)):
                tell("expired", row, run_at=row.run_at, expires_at=row.expires_at)
            crew.expire_at = self._stale_after = 0.0

    def _prune(self, crew: _Crew, retention: timedelta) -> None:
        before = crew.context.time() - retention

        def work(connection: Connection) -> int:
            return statements.prune(connection, before=before, statuses=[Status.COMPLETE], limit=PRUNE_LIMIT)

        more = crew.units.write(work) == PRUNE_LIMIT
        crew.prune_at = monotonic() + (0 if more else min(PRUNE_SECONDS, retention.total_seconds()))

    def _lane_of(self, queue: str) -> Lane | None:
        return self.lanes.get(queue) or self.lanes.get("*")

    # --- settling and claiming

    def _collect(self) -> list[Ended]:
        with self._lock:
            done, self._done = self._done, []
        return done

    def _wishes(self) -> list[tuple[Lane, int, int]]:
        """Return the lanes that can use more of what is due: how many for free slots, and how many ahead of those."""
        now, left = self._crew.context.time(), self.max_jobs - len(self._held) - self.ran  # type: ignore[union-attr]
        due = {id(self._lane_of(level.queue)) for level in self._view if level.first_at <= now}
        wishes = []
        with self._lock:
            for lane in self.lanes.values():
                free, ahead = lane.room() if id(lane) in due else (0, 0)
                free = int(min(free, left))
                ahead = int(min(ahead, left - free))
                left -= free + ahead
                if free or ahead:
                    wishes.append((lane, free, ahead))
        return wishes

    def _settle_and_claim(self, crew: _Crew, done: list[Ended], wishes: list[tuple[Lane, int, int]]) -> int:
        completions = [ended for ended in done if not ended.is_written]

        def work(connection: Connection) -> tuple[list[Ended], list[tuple[Lane, list[Claimed]]], list[Level]]:
            ended = crew.performer.complete(connection, completions)
            return ended, *self._take(crew, connection, wishes)

        try:
            ended, taken, self._view = crew.units.write(work)
        except BaseException:
            with self._lock:
                self._done += done
            raise
        self._settled([each for each in done if each.is_written] + ended)
        if crew.limits.freed(each.row.id for each in done):
            self._wake()
        with self._lock:
            for lane, rows in taken:
                lane.add(rows)
                self._held.update((row.token, row) for row in rows)
        claimed = [row for _, rows in taken for row in rows]
        crew.limits.took(claimed)
        if events.wanted("claimed"):
            for row in claimed:
                tell("claimed", row, attempt=row.attempt, worker=crew.name)
        return len(claimed)

    def _settled(self, ended: Iterable[Ended]) -> None:
        for each in ended:
            with self._lock:
                self._held.pop(each.token, None)
            self.ran += each.was_run
            if isinstance(each.outcome, Released | Snoozed) and not each.was_run:
                tell("released", each.row, attempt=each.row.attempt, reason="this process knows no such callable")
            else:
                told(each)

    def _take(
        self, crew: _Crew, connection: Connection, wishes: list[tuple[Lane, int, int]]
    ) -> tuple[list[tuple[Lane, list[Claimed]]], list[Level]]:
        """Claim what is wished for; return it, and the levels as they are now known to be."""
        view, taken = list(self._view), []
        for lane, free, ahead in wishes:
            rows = self._take_for(crew, connection, lane, view, free, lost_too=True)
            if len(rows) == free:
                rows += self._take_for(crew, connection, lane, view, ahead, lost_too=False)
            taken.append((lane, rows))
        return taken, view

    def _take_for(
        self, crew: _Crew, connection: Connection, lane: Lane, view: list[Level], wanted: int, *, lost_too: bool
    ) -> list[Claimed]:
        now = crew.context.time()
        rows: list[Claimed] = []
        due = [level for level in view if level.first_at <= now and self._lane_of(level.queue) is lane]
        if not lost_too:  # ahead of a free slot
            due = [level for level in due if not level.limited]
        for _, group in groupby(due, key=lambda level: level.priority):
            levels = list(group)
            while levels and len(rows) < wanted:
                share = math.ceil((wanted - len(rows)) / len(levels))  # queues of one priority take turns
                for level in list(levels):
                    asked = min(share, wanted - len(rows))
                    found = self._claim(crew, connection, level, asked, lost_too=lost_too) if asked else []
                    rows += found
                    if len(found) < asked:  # nothing is left there, until the next look
                        levels.remove(level)
                        if lost_too:
                            view.remove(level)
                    elif found:
                        levels[levels.index(level)] = view[view.index(level)] = level._replace(
                            first_at=found[-1].run_at
                        )
        return rows

    def _claim(self, crew: _Crew, connection: Connection, level: Level, limit: int, *, lost_too: bool) -> list[Claimed]:
        if level.limited:
            return crew.limits.claim(
                connection,
                level,
                limit=limit,
                now=crew.context.time(),
                worker=crew.name,
                leased_until=crew.leases.end(),
            )
        return statements.claim(
            connection,
            level,
            after=(level.first_at, 0),
            newest=NO_LIMIT,
            limit=limit,
            now=crew.context.time(),
            worker=crew.name,
            leased_until=crew.leases.end(),
            lost_too=lost_too,
        )

    # --- running

    def _submit(self, crew: _Crew) -> None:
        """Start as many slots as have something to do; where there is but one connection, do it here and now."""
        for lane in self.lanes.values():
            with self._lock:
                slots = lane.take_slots()
            for _ in range(slots):
                if crew.executor is None:
                    self._serve(crew, lane)
                else:
                    crew.executor.submit(self._serve, crew, lane).add_done_callback(partial(self._note_problem, lane))

    def _serve(self, crew: _Crew, lane: Lane) -> None:
        """Run, on one slot of ``lane``, what waits for it, until nothing does."""
        while (row := self._next(lane)) is not None:
            try:
                ended = self._perform(crew, row)
            except Exception:
                events.logger.exception("what became of job %s could not be written; it will run again", row.id)
                with self._lock:
                    self._held.pop(row.token, None)  # the leases take back what nobody holds
                continue
            with self._lock:
                lane.learn(ended.seconds)
                self._done.append(ended)
                is_first = len(self._done) == 1
            if ended.is_written:
                self._stale_after = 0.0  # what it committed may have scheduled something
            if is_first:
                self._alarm.ring(after=ACK_SECONDS)

    def _next(self, lane: Lane) -> Claimed | None:
        with self._lock:
            row = lane.next()
            is_low = lane.is_low()
        if row is None or is_low:
            self._alarm.ring()
        return row

    def _perform(self, crew: _Crew, row: Claimed) -> Ended:
        try:
            if row.content_type is None:
                crew.context.function(row.callable_name)
        except CallableNotFound:
            # Another process may know it, while a new version is rolled out; or this one after its restart.
            later = Snoozed(crew.context.time() + UNKNOWN_DELAY)
            token = row.token
            status = crew.units.write(
                lambda connection: lifecycle.settle(connection, token, later, now=crew.context.time(), worker=crew.name)
            )
            return Ended(row, later, 0.0, status, was_run=False)
        except Exception:  # noqa: S110 (what else is wrong with it is told by running it)
            pass
        return crew.performer.perform(row)

    def _note_problem(self, lane: Lane, slot: Future[None]) -> None:
        if not slot.cancelled() and (problem := slot.exception()) is not None:
            with self._lock:
                lane.busy -= 1
            self._problem = problem
            self._alarm.ring()

    # --- sleeping

    def _delay(self, crew: _Crew, *, wanted: bool, claimed: int) -> float:
        if self.is_stopping:
            return 0.0
        if wanted and not claimed:  # others were faster, or hold what is due
            self._misses += 1
            crew.expire_at = self._stale_after = 0.0  # or all of it is too late
            return min(self.poll, MISSED_SECONDS * 2.0 ** min(self._misses - 1, 16))
        self._misses = 0
        with self._lock:
            open_lanes = {id(lane) for lane in self.lanes.values() if any(lane.room())}
        if claimed and (open_lanes or crew.executor is None):
            self._stale_after = 0.0  # all that was due is claimed, or run: look what comes next
            return 0.0
        waiting = [level.first_at for level in self._view if id(self._lane_of(level.queue)) in open_lanes]
        if not waiting:
            return self.poll
        return min(self.poll, max(0.0, (min(waiting) - crew.context.time()).total_seconds()))

    def _wake(self, *_: Any) -> None:
        self._stale_after = 0.0
        self._alarm.ring()

    def _wake_for(self, run_at: datetime) -> None:
        crew = self._crew
        if crew is not None and (run_at - crew.context.time()).total_seconds() < self.poll:
            self._wake()

    # --- beginning

    def _opened(self) -> _Crew:
        if self._crew is None:
            self._deadline, self._stale_after, self._problem = math.inf, 0.0, None
            self._closed.clear()
            self._crew = self._open()
            queues = ", ".join(f"{name}={slots}" for name, slots in self.queues.items())
            events.emit("started", worker=self._crew.name, queues=queues)
        return self._crew

    def _open(self) -> _Crew:
        name = worker_name() if self.name is None else f"{self.name}:{worker_name()}"
        alone = is_single_connection(self.engine)
        if not alone and os.getpid() != self._pid:  # forked: the parent's connections are not ours
            self.engine.dispose(close=False)
        engine = self.engine if alone else own_engine(self.engine)
        units = PatientUnits(engine, worker=name, patience=self._patience)
        try:
            units.read(schema.check)
        except BaseException:
            if not alone:
                engine.dispose()
            raise
        context = execution.Context(
            check=self.scheduler.check,
            check_class=self.scheduler.check_class,
            time=utc_now,
            timezone=self.scheduler.timezone,
            around=self._around,
        )

        def crew_time() -> datetime:
            return context.time()  # which is set anew from time to time

        executor = None if alone else self._given_executor or Threads(sum(self.queues.values()), name="future_jobs")
        crew = _Crew(
            name=name,
            units=units,
            context=context,
            performer=_Waiting(units, self._open_session, context, worker=name),
            leases=Leases(units, name, self.lease, time=crew_time, held=self._tokens),
            watch=wakeups.Watch(engine, self._wake),
            executor=executor,
        )
        crew.measure()
        wakeups.listen(self.engine, self._wake_for)
        if not alone:
            crew.leases.start()
            crew.watch.start()
        return crew

    def _open_session(self, row: Claimed) -> JobSession:
        joined = row.options is None or '"transaction":"own"' not in row.options
        make = self._make.session_factory if isinstance(self._make, scoped_session) else self._make
        hold = partial(statements.hold, token=row.token)
        return JobSession(make, self.engine, hold=hold, joined=joined, info={SCHEDULER: self.scheduler})

    def _tokens(self) -> set[Token]:
        with self._lock:
            return set(self._held)

    @contextmanager
    def background(self, *, timeout: str | timedelta = "30s") -> Iterator[Worker]:
        """Work in a thread of this process meanwhile; on leaving, end as after a SIGTERM."""
        if is_single_connection(self.engine):
            raise NotSupported(
                "this database is one connection, which the application uses itself; call worker.run(), or "
                "scheduler.run_due(), in the thread that owns it, or use a file"
            )
        seconds_of(timeout, "timeout")
        self._opened()
        thread = threading.Thread(target=self._work, args=(timeout,), name="future_jobs worker", daemon=True)
        self._loop = thread
        thread.start()
        try:
            yield self
        finally:
            self.stop(timeout)
            thread.join()

    @asynccontextmanager
    async def lifespan(self, *, timeout: str | timedelta = "30s") -> AsyncIterator[Worker]:  # noqa: ASYNC109 (that of `stop`)
        """Work in a thread meanwhile, without holding up the event loop of an ASGI application."""
        around = self.background(timeout=timeout)
        await asyncio.to_thread(around.__enter__)
        try:
            yield self
        finally:
            await asyncio.to_thread(around.__exit__, None, None, None)

    # --- ending

    def stop(self, timeout: str | timedelta = "30s") -> None:
        """Claim nothing more; let what runs finish for ``timeout``, and hand the rest back, uncharged.

        Returns when the worker has ended; at once if it is called by a job, or by the thread that runs the loop.
        """
        self._ask_to_stop(seconds_of(timeout, "timeout"))
        if execution.running.get() is not None or self._loop is threading.current_thread():
            return
        if self._loop is None:
            self._close()
        else:
            self._closed.wait()

    def _ask_to_stop(self, seconds: float) -> None:
        self._deadline = min(self._deadline, monotonic() + seconds)
        self._alarm.ring()

    def _patience(self) -> float:
        return self._deadline - monotonic()

    def _close(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            try:
                self._drain(crew)
            except (SQLAlchemyError, DatabaseBusy):
                events.logger.exception("%s could not hand back its jobs; their leases will end", crew.name)
            finally:
                wakeups.unlisten(self.engine, self._wake_for)
                crew.end(own_executor=self._given_executor is None)
                if self._owns_engine:
                    self.engine.dispose()
                events.emit("stopped", worker=crew.name, jobs=self.ran)
        self._loop = None
        self._closed.set()

    def _drain(self, crew: _Crew) -> None:
        with self._lock:
            waiting = [row for lane in self.lanes.values() for row in lane.clear()]
        self._release(crew, waiting, "the worker stopped before its turn")
        while True:
            if done := self._collect():
                self._settle_and_claim(crew, done, [])
            with self._lock:
                busy = crew.executor is not None and any(lane.busy for lane in self.lanes.values())
                if not busy and not self._done:
                    break
            if (left := self._patience()) <= 0:
                break
            self._alarm.sleep(left)
        with self._lock:
            unfinished = list(self._held.values())
        self._release(crew, unfinished, "the worker stopped and could not wait for it")

    def _release(self, crew: _Crew, rows: list[Claimed], reason: str) -> None:
        if not rows:
            return
        tokens = [row.token for row in rows]
        crew.units.write(lambda connection: lifecycle.release_all(connection, tokens))
        with self._lock:
            for token in tokens:
                self._held.pop(token, None)
        for row in rows:
            tell("released", row, attempt=row.attempt, reason=reason)

    @contextmanager
    def _signals(self, seconds: float) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, frame: Any) -> None:  # noqa: ARG001
            is_second, crew = self._deadline < math.inf, self._crew
            self._ask_to_stop(0.0 if is_second else seconds)
            self.was_hurried = self.was_hurried or is_second
            if is_second and crew is not None and crew.executor is None:
                crew.context.is_interrupted = True  # the job runs in this very thread
                raise _Interrupted

        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Interrupted(KeyboardInterrupt):
    """A second signal came while a job ran in the thread of the loop."""


class _Waiting(Performer):
    """A Performer that tries a job again once the database answers, however long that takes."""

    def _attempt(self, row: Claimed, began: float) -> Ended:
        ended = super()._attempt(row, began)
        while isinstance(ended.outcome, Released):
            asked = monotonic()
            self.units.read(statements.newest)
            if monotonic() - asked < AWAY_SECONDS:
                break  # it was a lock, which has its own number of tries
            ended = super()._attempt(row, monotonic())
        return ended


@dataclass(slots=True)
class _Crew:
    """What a worker has while it works."""

    name: str
    units: PatientUnits
    context: execution.Context
    performer: Performer
    leases: Leases
    watch: wakeups.Watch
    executor: Executor | None
    limits: Limits = field(default_factory=Limits)
    measure_at: float = 0.0
    prune_at: float = 0.0
    expire_at: float = 0.0
    tick_at: float = 0.0

    def measure(self) -> None:
        """Set the clock by the database's; between two looks at that it goes by the monotonic one."""
        self.context.time = execution.ticking(self.units.read(statements.clock) or utc_now())
        self.measure_at = monotonic() + MEASURE_SECONDS

    def end(self, *, own_executor: bool) -> None:
        """Give back everything."""
        self.watch.stop()
        self.leases.stop()
        if self.executor is not None:
            if own_executor:
                self.executor.shutdown(wait=False)
            self.units.engine.dispose()
