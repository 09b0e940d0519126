"""`Worker`: runs what is due, for as long as its process lives, beside any number of others.

How it begins and ends, in a thread, a process, or an application that has a loop of its own. What it does meanwhile is
in ``loops.py``.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta, tzinfo
from functools import partial
from typing import Any

from sqlalchemy import URL
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import scoped_session, sessionmaker

from . import events, execution, schema
from .callables import Allow
from .dialects import can_listen, is_single_connection
from .errors import DatabaseBusy, InvalidArgument, InvalidOption, NotSupported, shown
from .farm import Farm, MakesExecutor
from .loops import Loop
from .models import SCHEDULER
from .passes import worker_name
from .patience import Deadline, PatientUnits
from .runners import Here, InThreads, Runner, opener
from .scheduler import Scheduler
from .sessions import InRegistry, Kept
from .slots import Threads, lanes_of
from .sources import described, opened, own_engine, refuse_small_pool, seconds_of
from .stations import Site
from .times import utc_now

__all__ = ["Worker"]

Source = Engine | URL | str | sessionmaker[Any] | scoped_session[Any]


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
        lanes_of(self.queues, prefetch)  # raises for what none can be made of
        self.prefetch = prefetch
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
        self._ran_before = 0
        self._deadline = Deadline()
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.RLock()
        self._closed = threading.Event()

    def _begin_in_child(self) -> None:
        """Leave to the parent, from which this process was forked, what is its own: connections, jobs, threads."""
        self._pid = os.getpid()
        if is_single_connection(self.engine):
            return
        self.engine.dispose(close=False)
        if self._loop is not None:
            self._loop.leave()
            self._has_lost_executor = isinstance(self._given_executor, Executor)
        self._begin()

    # --- working

    def tick(self) -> float:
        """Settle what finished, claim what free slots can use, and submit it; return how many seconds to sleep.

        Where nothing has finished and nothing is due it only reads.
        """
        return self._opened().tick()

    def run(self, *, timeout: str | timedelta = "30s") -> None:
        """Work until SIGTERM or SIGINT, `stop`, or ``max_jobs``.

        Then nothing more is claimed, and what runs has ``timeout`` to finish; what has not, and what was not started,
        is handed back uncharged. A second signal hands it back at once. Signals are only heard in the main thread.
        """
        with self._signals(seconds_of(timeout, "timeout")), suppress(_Interrupted):
            self._work(timeout)

    def _work(self, timeout: str | timedelta) -> None:
        self._thread = threading.current_thread()
        try:
            while not self.is_stopping:
                loop = self._opened()
                loop.alarm.sleep(loop.tick())
        finally:
            self._ask_to_stop(seconds_of(timeout, "timeout"))
            self._close()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop, or has run all that it may."""
        return self._deadline.is_set or self.ran >= self.max_jobs

    @property
    def ran(self) -> int:
        """How many jobs it has run."""
        return self._ran_before + (0 if self._loop is None else self._loop.ran)

    # --- beginning

    def _opened(self) -> Loop:
        if os.getpid() != self._pid:
            self._begin_in_child()
        if self._has_lost_executor:
            raise NotSupported(
                "the executor was in use when this process was forked, and its threads are not here; make the worker "
                "after the fork, or pass a callable that makes the executor"
            )
        if self._loop is None:
            self._deadline = Deadline()
            self._closed.clear()
            self._loop = self._open()
            queues = ", ".join(f"{name}={slots}" for name, slots in self.queues.items())
            events.emit("started", worker=self._loop.name, queues=queues)
        return self._loop

    def _open(self) -> Loop:
        name = worker_name() if self.name is None else f"{self.name}:{worker_name()}"
        engine = self.engine if is_single_connection(self.engine) else own_engine(self.engine)
        units = PatientUnits(engine, worker=name, patience=self._deadline.left)
        try:
            units.read(schema.check)
            loop = self._make_loop(name, units)
            loop.start()
        except BaseException:
            if engine is not self.engine:
                engine.dispose()
            raise
        return loop

    def _make_loop(self, name: str, units: PatientUnits) -> Loop:
        context = execution.Context(
            check=self.scheduler.check,
            check_class=self.scheduler.check_class,
            time=utc_now,
            timezone=self.scheduler.timezone,
            around=self._around,
        )
        make = self._make.session_factory if isinstance(self._make, scoped_session) else self._make
        kept = Kept()
        return Loop(
            name,
            units,
            context,
            application=self.engine,
            open_session=opener(make, self.engine, {SCHEDULER: self.scheduler}, kept),
            make_runner=partial(self._runner, kept=kept),
            deadline=self._deadline,
            queues=self.queues,
            prefetch=self.prefetch,
            lease=self.lease,
            poll=self.poll,
            retention=self.retention,
            most=self.max_jobs - self._ran_before,
            notify=self.notify,
        )

    def _runner(self, loop: Loop, kept: Kept) -> Runner:
        executor, perform = self._given_executor, loop.performer.perform
        if loop.units.is_alone:
            return Here(perform, loop.outbox)
        if executor is None:
            threads = Threads(sum(self.queues.values()), name="future_jobs")
            return InThreads(perform, loop.outbox, threads, is_own=True, rest=kept.give_back)
        if isinstance(executor, ThreadPoolExecutor | Threads):
            return InThreads(perform, loop.outbox, executor, is_own=False, rest=kept.give_back)
        assert self._site is not None
        return Farm(
            executor,
            site=self._site,
            worker=loop.name,
            lease=self.lease,
            units=loop.units,
            context=loop.context,
            outbox=loop.outbox,
            held=loop.held,
        )

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
        self._thread = thread
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
        if execution.running.get() is not None or self._thread is threading.current_thread():
            return
        if self._thread is None:
            self._close()
        else:
            self._closed.wait()

    def _ask_to_stop(self, seconds: float) -> None:
        self._deadline.within(seconds)
        if (loop := self._loop) is not None:
            loop.alarm.ring()

    def _close(self) -> None:
        with self._closing:
            if (loop := self._loop) is not None:
                try:
                    loop.drain()
                except (SQLAlchemyError, DatabaseBusy):
                    events.logger.exception("%s could not hand back its jobs; their leases will end", loop.name)
                finally:
                    self._ran_before, self._loop = self.ran, None
                    loop.end()
                    if self._owns_engine:
                        self.engine.dispose()
                    events.emit("stopped", worker=loop.name, jobs=self.ran)
            self._thread = None
            self._closed.set()

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
            is_second, loop = self._deadline.is_set, self._loop
            self._ask_to_stop(0.0 if is_second else seconds)
            self.was_hurried = self.was_hurried or is_second
            if is_second and loop is not None and isinstance(loop.runner, Here):
                loop.context.is_interrupted = True  # the job runs in this very thread
                raise _Interrupted

        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Interrupted(KeyboardInterrupt):
    """A second signal came while a job ran in the thread of the loop."""
