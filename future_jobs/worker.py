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
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from functools import partial
from itertools import groupby
from time import monotonic
from typing import Any

from sqlalchemy import URL
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker

from . import (
    claim_statements,
    events,
    execution,
    lifecycle,
    schema,
    statements,
    tick_statements,
    ticks,
    wakeups,
    watches,
)
from .callables import Allow
from .claims import Claims, Taken, Wish
from .crew import Crew, PatientPerformer, opener
from .dialects import can_listen, is_single_connection
from .errors import DatabaseBusy, InvalidArgument, InvalidOption, NotSupported, shown
from .farm import Farm, MakesExecutor
from .leases import Leases
from .lifecycle import Released, Retried, Snoozed
from .models import SCHEDULER
from .passes import worker_name
from .patience import PatientUnits
from .performing import Ended, tell, tell_released, told
from .runners import Here, InThreads, Outbox, Runner, emptied
from .scheduler import Scheduler
from .sessions import InRegistry, Kept
from .slots import STALL_SECONDS, Lane, Threads, lanes_of
from .sources import described, opened, own_engine, refuse_small_pool, seconds_of
from .statements import Claimed, Level, Token
from .stations import Site
from .status import Status
from .times import utc_now

__all__ = ["Worker"]

Source = Engine | URL | str | sessionmaker[Any] | scoped_session[Any]

AHEAD_SECONDS = 0.03  # so long before a job is due an idle worker looks, so that it need not when it is
LOOK_SECONDS = 0.1  # while busy, how long a job of a better priority may go unseen
MISSED_SECONDS = 0.02  # until the next try, when others hold what is due
PRUNE_SECONDS = 3600.0
PRUNE_LIMIT = 5_000


class Worker:
    """Runs due jobs of one database until it is told to stop.

    ``source`` says where the jobs are, and how their Sessions are made: an Engine, a URL, a sessionmaker, a
    scoped_session, or the ``"module:attr"`` of one. ``queues`` maps the queues it serves to how many of their jobs may
    run at once; ``"*"`` stands for all that are not named. ``lease`` is how long after its death a worker's jobs stay
    its own, ``poll`` how often it looks, at least. ``prefetch`` is how many jobs it may hold beyond its slots (None:
    what they finish in a tenth of a second). ``max_jobs`` ends it after that many; ``retention`` is how long complete
    jobs are kept (None: for ever). ``executor`` runs the jobs: a ThreadPoolExecutor in this process, any other wherever
    it does, each with an engine and Sessions made there; a callable that makes one is called when the worker starts.
    ``notify`` makes it listen, on PostgreSQL, for what `notify_workers` lets others send.
    """

    def __init__(
        self,
        source: Source,
        *,
        queues: Mapping[str, int] | None = None,
        lease: str | timedelta = "60s",
        poll: str | timedelta = "1s",
        executor: Executor | MakesExecutor | None = None,
        name: str | None = None,
        allow: Allow = None,
        timezone: tzinfo | str | None = None,
        prefetch: int | None = None,
        max_jobs: int | None = None,
        retention: str | timedelta | None = None,
        notify: bool = False,
    ) -> None:
        allow = allow if allow is None or isinstance(allow, str) else list(allow)
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
        self.was_hurried = False  # a second signal came
        self.engine, self._make, self._owns_engine = opened(source, connections=sum(self.queues.values()))
        scoped = self._make if isinstance(self._make, scoped_session) else None
        self.scheduler = Scheduler(scoped or self._make(), timezone=timezone, allow=allow)
        self.notify = notify and can_listen(self.engine)
        self._around = None if scoped is None else InRegistry(scoped)
        self._given_executor = executor
        self._has_lost_executor = False  # by a fork: its threads are in the parent
        self._site: Site | None = None
        self._pid = os.getpid()
        if is_single_connection(self.engine):
            if executor is not None:
                raise NotSupported(
                    "this database is one connection, so its jobs run in the calling thread; leave out executor, or "
                    "use a file or a server"
                )
            for lane in self.lanes.values():
                lane.slots = 1
        elif executor is not None and not isinstance(executor, Executor) and not callable(executor):
            raise InvalidArgument(
                f"executor is {shown(executor)}; pass a concurrent.futures.Executor, or a callable that makes one",
                argument="executor",
                value=executor,
            )
        elif executor is not None and not isinstance(executor, ThreadPoolExecutor | Threads):
            self._site = Site(
                described(source),
                connections=sum(self.queues.values()),
                timezone=self.scheduler.timezone,
                allow=allow,
            )
        else:
            refuse_small_pool(self.engine, sum(self.queues.values()))
        self._begin()

    def _begin(self) -> None:
        self.ran = 0
        self._alarm = wakeups.Alarm()
        self._held: dict[Token, Claimed] = {}
        self._is_claiming = False  # what it has committed may not be in what it holds
        self._told: deque[Level] = deque()  # levels in which this process has scheduled something that is due
        self._looks_next = False  # what it was told of is claimed first
        self._stale_after = 0.0
        self._rested_at = 0.0  # until when looks take no more than a twentieth of the time of a busy worker
        self._misses = 0
        self._deadline = math.inf
        self._crew: Crew | None = None
        self._loop: threading.Thread | None = None
        self._closed = threading.Event()
        for lane in self.lanes.values():
            lane.ring = self._alarm.ring

    def _begin_in_child(self) -> None:
        """Leave to the parent, from which this process was forked, what is its own: connections, jobs, threads."""
        self._pid = os.getpid()
        if is_single_connection(self.engine):
            return
        self.engine.dispose(close=False)
        if self._crew is not None:
            self._crew.leave()
            self._has_lost_executor = isinstance(self._given_executor, Executor)
            self.lanes = {name: Lane(lane.slots, lane.prefetch) for name, lane in self.lanes.items()}
        self._begin()

    # --- the loop

    def tick(self) -> float:
        """Settle what finished, claim what free slots can use, and submit it; return how many seconds to sleep.

        Where nothing has finished and nothing is due it only reads.
        """
        crew = self._opened()
        if crew.runner.problem is not None:
            raise crew.runner.problem
        done = crew.outbox.take()
        try:
            waits_again = any(isinstance(each.outcome, Retried | Snoozed | Released) for each in done)
            if isinstance(crew.runner, Farm) and any(each.is_written for each in done):
                waits_again = True  # what they have scheduled there woke nobody here
            is_stale = waits_again or monotonic() >= min(self._stale_after, crew.tick_at)
            put_off = self._rest() if is_stale else 0.0
            told = emptied(self._told)
            crew.claims.hear(told)
            self._looks_next = bool(told) and is_stale and not self._looks_next
            if put_off:
                self._stale_after = 0.0
            elif is_stale and not self._looks_next:
                self._look(crew)
            wishes = [] if self.is_stopping else crew.claims.wishes(self._left())
            claimed = self._settle_and_claim(crew, done, wishes) if done or wishes else 0
        except BaseException:
            crew.outbox.put_back(done)
            raise
        for lane in self.lanes.values():
            crew.runner.start(lane)
        delay = 0.0 if self._looks_next else self._delay(crew, wanted=bool(wishes), claimed=claimed)
        return min(delay, put_off) if put_off else delay

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

    def _left(self) -> float:
        """Return how many more jobs it may take, of the most that it may run."""
        return self.max_jobs - len(self._held) - self.ran

    # --- looking

    def _rest(self) -> float:
        """Return for how long a worker that is busy puts off its next look; where looks are slow, they are seldom."""
        return max(0.0, self._rested_at - monotonic()) if any(lane.busy for lane in self.lanes.values()) else 0.0

    def _look(self, crew: Crew) -> None:
        """See which levels have jobs waiting; expire what is too late. Writes nothing where nothing is."""
        if monotonic() >= crew.measure_at:
            crew.measure()
        if self.retention is not None and monotonic() >= crew.prune_at:
            self._prune(crew, self.retention)
        now = crew.now()
        crew.context.requeued.clear()  # of no use to a loop, and it would grow
        if crew.context.asked_to_stop:
            crew.context.asked_to_stop.intersection_update({token.id for token in self._tokens()})
        for token in crew.outbox.take_lost():
            self._forget(crew, token)

        def look(connection: Connection) -> tuple[list[Level], list[Level], datetime | None]:
            found = crew.claims.levels(connection)
            due = [level for level in found if level.first_at <= now] if monotonic() >= crew.expire_at else []
            late = [level for level in due if claim_statements.is_any_expired(connection, level, now=now)]
            return crew.claims.startable(connection, found), late, tick_statements.next_tick(connection)

        self._stale_after = monotonic() + LOOK_SECONDS  # what wakes it meanwhile makes it stale again
        began = monotonic()
        crew.claims.view, late, next_tick = crew.units.read(look)
        took = monotonic() - began
        self._rested_at = monotonic() + 20 * took
        if began >= crew.expire_at:  # that reads all that is due: seldom, where it takes long
            crew.expire_at = monotonic() + max(self.poll, 20 * took)
        for level in late:
            for row in crew.units.write(partial(lifecycle.expire, level=level, now=now)):
                tell("expired", row, run_at=row.run_at, expires_at=row.expires_at)
            crew.expire_at = self._stale_after = 0.0
        self._recur(crew, next_tick, now)

    def _recur(self, crew: Crew, next_at: datetime | None, now: datetime) -> None:
        """Make jobs of the recurring jobs that are due, or note when the next is."""
        if next_at is None:
            crew.tick_at = math.inf
        elif next_at > now:
            crew.tick_at = monotonic() + (next_at - now).total_seconds()
        elif monotonic() >= crew.tick_at:
            crew.tick_at = monotonic() + self.poll  # one that cannot go on is not tried at every look
            ticks.tick(crew.units, now=now)
            self._stale_after = 0.0

    def _prune(self, crew: Crew, retention: timedelta) -> None:
        before = crew.context.time() - retention

        def work(connection: Connection) -> int:
            return statements.prune(connection, before=before, statuses=[Status.COMPLETE], limit=PRUNE_LIMIT)

        more = crew.units.write(work) == PRUNE_LIMIT
        crew.prune_at = monotonic() + (0 if more else min(PRUNE_SECONDS, retention.total_seconds()))

    # --- settling and claiming

    def _settle_and_claim(self, crew: Crew, done: list[Ended], wishes: list[Wish]) -> int:
        completions = [ended for ended in done if not ended.is_written]
        if not completions and not wishes:
            self._settled(crew, done)
            return 0

        def work(connection: Connection) -> tuple[list[Ended], Taken]:
            return crew.performer.complete(connection, completions), crew.claims.take(connection, wishes)

        self._is_claiming = bool(wishes)
        try:
            ended, taken = crew.units.write(work)
            for _, rows in taken.rows:
                self._held.update((row.token, row) for row in rows)
        finally:
            self._is_claiming = False
        self._settled(crew, [*[each for each in done if each.is_written], *ended] if completions else done)
        crew.claims.took(taken)
        for lane, rows in taken.rows:
            if rows:
                lane.add(rows)
        claimed = [row for _, rows in taken.rows for row in rows]
        if events.wanted("claimed"):
            for row in claimed:
                tell("claimed", row, attempt=row.attempt, worker=crew.name)
        return len(claimed)

    def _settled(self, crew: Crew, ended: Iterable[Ended]) -> None:
        for lane, group in groupby(ended, key=lambda each: crew.claims.lane_of(each.row.queue)):
            count, seconds = 0, 0.0
            for each in group:
                self._forget(crew, each.token)
                count, seconds = count + each.was_run, seconds + each.seconds
                if isinstance(each.outcome, Released):
                    tell("released", each.row, attempt=each.row.attempt, reason=each.outcome.reason)
                else:
                    told(each)
            self.ran += count
            if count and lane is not None:
                lane.learn(seconds, count)

    def _forget(self, crew: Crew, token: Token) -> None:
        self._held.pop(token, None)
        if crew.claims.ended(token):
            self._wake()

    # --- sleeping

    def _delay(self, crew: Crew, *, wanted: bool, claimed: int) -> float:
        if self.is_stopping:
            return 0.0
        longest = STALL_SECONDS if any(lane.may_stall for lane in self.lanes.values()) else self.poll
        longest = min(longest, max(0.0, crew.tick_at - monotonic()))
        if wanted and not claimed:  # others were faster, or hold what is due
            self._misses += 1
            crew.expire_at = self._stale_after = 0.0  # or all of it is too late
            return min(longest, MISSED_SECONDS * 2.0 ** min(self._misses - 1, 16))
        self._misses = 0
        if claimed and (isinstance(crew.runner, Here) or any(any(lane.room()) for lane in self.lanes.values())):
            self._stale_after = 0.0  # all that was due is claimed, or run: look what comes next
            return 0.0
        level = crew.claims.next() if self._left() else None
        return longest if level is None else min(longest, self._until_due(crew, level))

    def _until_due(self, crew: Crew, level: Level) -> float:
        """Return for how long to sleep, so that a job of ``level`` is claimed at once when it is due."""
        seconds = max(0.0, (level.first_at - crew.now()).total_seconds())
        due_at = monotonic() + seconds
        if level.limited:
            self._stale_after = min(self._stale_after, due_at)  # which of them may start, a look then says
        elif seconds and due_at >= self._stale_after and not any(lane.busy for lane in self.lanes.values()):
            if seconds > AHEAD_SECONDS:
                return seconds - AHEAD_SECONDS
            self._stale_after = seconds = 0.0
        return seconds

    def _wake(self, *_: Any) -> None:
        if (crew := self._crew) is not None:
            crew.leases.ring()
        self._stale_after = 0.0
        self._alarm.ring()

    def _wake_for(self, levels: Sequence[Level]) -> None:
        """Hear what a commit has scheduled, of which nothing needs to be looked for; all, if it is told of nothing."""
        crew = self._crew
        if crew is None or os.getpid() != self._pid:
            return
        now = crew.now()
        soon = [level for level in levels if (level.first_at - now).total_seconds() < self.poll]
        if not levels or any(level.limited for level in soon):
            self._wake()
        elif soon:
            self._told.extend(soon)
            self._alarm.ring()

    # --- beginning

    def _opened(self) -> Crew:
        if os.getpid() != self._pid:
            self._begin_in_child()
        if self._has_lost_executor:
            raise NotSupported(
                "the executor was in use when this process was forked, and its threads are not here; make the worker "
                "after the fork, or pass a callable that makes the executor"
            )
        if self._crew is None:
            self._deadline, self._stale_after = math.inf, 0.0
            self._closed.clear()
            self._crew = self._open()
            queues = ", ".join(f"{name}={slots}" for name, slots in self.queues.items())
            events.emit("started", worker=self._crew.name, queues=queues)
        return self._crew

    def _open(self) -> Crew:
        name = worker_name() if self.name is None else f"{self.name}:{worker_name()}"
        engine = self.engine if is_single_connection(self.engine) else own_engine(self.engine)
        units = PatientUnits(engine, worker=name, patience=self._patience)
        try:
            units.read(schema.check)
            return self._gather(name, units)
        except BaseException:
            if engine is not self.engine:
                engine.dispose()
            raise

    def _gather(self, name: str, units: PatientUnits) -> Crew:
        context = execution.Context(
            check=self.scheduler.check,
            check_class=self.scheduler.check_class,
            time=utc_now,
            timezone=self.scheduler.timezone,
            around=self._around,
        )

        def now() -> datetime:
            return context.time()  # which is set anew from time to time

        make = self._make.session_factory if isinstance(self._make, scoped_session) else self._make
        kept = Kept()
        open_session = opener(make, self.engine, {SCHEDULER: self.scheduler}, kept)
        performer = PatientPerformer(units, open_session, context, worker=name)
        leases = Leases(
            units,
            name,
            self.lease,
            time=now,
            held=self._tokens,
            claiming=lambda: self._is_claiming,
            queues=self.queues,
            attend=performer.attend,
        )
        claims = Claims(self.lanes, worker=name, time=now, lease_end=leases.end)
        outbox = Outbox(self._alarm.ring, claims.is_waiting_for)
        crew = Crew(
            name=name,
            units=units,
            context=context,
            performer=performer,
            leases=leases,
            watch=watches.watch(units.engine, self._wake_for, own=lambda: units.commits, notify=self.notify),
            claims=claims,
            runner=self._runner(performer, outbox, kept),
            outbox=outbox,
        )
        crew.measure()
        wakeups.listen(self.engine, self._wake_for)
        if not units.is_alone:
            crew.leases.start()
            crew.watch.start()
        return crew

    def _runner(self, performer: PatientPerformer, outbox: Outbox, kept: Kept) -> Runner:
        executor = self._given_executor
        if performer.units.is_alone:
            return Here(performer.perform, outbox)
        if executor is None:
            threads = Threads(sum(self.queues.values()), name="future_jobs")
            return InThreads(performer.perform, outbox, threads, is_own=True, rest=kept.give_back)
        if isinstance(executor, ThreadPoolExecutor | Threads):
            return InThreads(performer.perform, outbox, executor, is_own=False, rest=kept.give_back)
        assert self._site is not None
        return Farm(
            executor,
            site=self._site,
            worker=performer.worker,
            lease=self.lease,
            units=performer.units,
            context=performer.context,
            outbox=outbox,
            held=self._held,
        )

    def _tokens(self) -> set[Token]:
        return set(self._held.copy())

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
        if os.getpid() != self._pid:
            self._begin_in_child()
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
                crew.end()
                if self._owns_engine:
                    self.engine.dispose()
                events.emit("stopped", worker=crew.name, jobs=self.ran)
        self._loop = None
        self._closed.set()

    def _drain(self, crew: Crew) -> None:
        waiting = [row for lane in self.lanes.values() for row in lane.clear()] + crew.runner.recall()
        self._release(crew, waiting, "the worker stopped before its turn")
        while True:
            busy = not isinstance(crew.runner, Here) and any(lane.busy for lane in self.lanes.values())
            if done := crew.outbox.take():
                self._settle_and_claim(crew, done, [])
            elif not busy or self._patience() <= 0:
                break
            else:
                self._alarm.sleep(self._patience())
        self._release(crew, list(self._held.values()), "the worker stopped and could not wait for it")

    def _release(self, crew: Crew, rows: list[Claimed], reason: str) -> None:
        if not rows:
            return
        tokens = [row.token for row in rows]
        gone = crew.units.write(lambda connection: lifecycle.release_all(connection, tokens))
        for token in tokens:
            self._forget(crew, token)
        tell_released(rows, reason, gone)

    @contextmanager
    def _signals(self, seconds: float) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, frame: Any) -> None:  # noqa: ARG001
            if os.getpid() != self._pid:  # forked, by a process pool: it ends as if nobody heard
                if number == signal.SIGTERM:
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                return
            is_second, crew = self._deadline < math.inf, self._crew
            self._ask_to_stop(0.0 if is_second else seconds)
            self.was_hurried = self.was_hurried or is_second
            if is_second and crew is not None and isinstance(crew.runner, Here):
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
