"""What runs jobs in another process, of this host or of another, for a worker that has claimed them.

The process is told where the jobs are and what may run, and is given a few of them at a time. It makes its own engine
and Sessions, once, and keeps the promises of a worker: what a handler writes is one transaction with its completion,
under the same fence. What failed is written here too; a completion without writes is left to the worker, which
writes many at once. No lease is renewed here: that of the worker covers all that it has handed out.

Everything goes to and fro as bytes of our own making: no executor looks into them, and exceptions stay where they are.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from functools import partial
from importlib import import_module
from multiprocessing import parent_process
from pathlib import Path
from time import monotonic
from typing import IO, Any, NamedTuple

from sqlalchemy.orm import scoped_session

from . import events, statements
from .callables import Allow
from .execution import MEASURE_SECONDS, Context, ticking
from .lifecycle import Failed
from .models import SCHEDULER
from .passes import worker_name
from .patience import PatientUnits
from .performing import ATTEND_SECONDS, Ended, recalled
from .runners import PatientPerformer, opener
from .scheduler import Scheduler
from .sessions import InRegistry, Kept
from .sources import opened, own_engine
from .statements import Claimed
from .times import utc_now

__all__ = ["Place", "Site", "Work", "places_on", "run"]

PATIENCE = 300.0  # seconds for which a database may be away before a job is given up; the worker will know by then
MOST_STATIONS = 8  # a process may serve several workers, and the same pool one worker after the other

_BORN = os.getpid()


@dataclass(frozen=True, slots=True)
class Site:
    """Where the jobs are and what may run there, as another process can be told."""

    source: str = field(repr=False)  # "module:attr" or a URL, with its password
    connections: int
    timezone: tzinfo | None
    allow: Allow
    modules: tuple[str, ...] = ()  # of callables that have a name of their own


class Work(NamedTuple):
    """A few jobs to run, one after the other."""

    site: bytes
    worker: str
    number: int
    rows: list[Claimed]
    asked_to_stop: set[int]
    board: str | None


Told = tuple[Any, ...] | str  # an `Ended` without its row, or why nothing could be written


def run(work: bytes) -> bytes:
    """Run a pickled `Work`; return, pickled, what was `Told` of each job, and the ids of those asked to stop."""
    order: Work = pickle.loads(work)  # noqa: S301 (made by the worker that runs this)
    station = _station(order.site)
    return pickle.dumps(station.run(order))


# --- where a process stands ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The process that runs some work, and at which of its jobs it is."""

    pid: int
    position: int


_NOTE = struct.Struct("<qqq")


def places_on(board: str) -> dict[int, Place]:
    """Return, by its number, where the last work of each process has come to. What the dead wrote stays."""
    found = {}
    for each in Path(board).iterdir():
        note = each.read_bytes()
        if len(note) == _NOTE.size:
            pid, number, position = _NOTE.unpack(note)
            found[number] = Place(pid, position)
    return found


def _note(file: IO[bytes] | None, number: int, position: int) -> None:
    if file is not None:
        file.seek(0)
        file.write(_NOTE.pack(os.getpid(), number, position))


# --- what a process has -------------------------------------------------------------------------------------------

_stations: dict[tuple[int, bytes], Station] = {}
_making = threading.Lock()


def _station(site: bytes) -> Station:
    """Return what this process has for ``site``; what a parent had before a fork is not used."""
    pid = os.getpid()
    with _making:
        if not any(owner == pid for owner, _ in _stations):
            _stations.clear()
            _obey_the_worker()
        if (pid, site) not in _stations:
            while len(_stations) >= MOST_STATIONS:
                _stations.pop(next(iter(_stations))).close()
            _stations[pid, site] = Station(pickle.loads(site))  # noqa: S301 (part of the work)
        return _stations[pid, site]


def _obey_the_worker() -> None:
    # Ctrl-C reaches every process of a terminal. What runs is to finish; the worker decides for how long.
    if parent_process() is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Station:
    """The engine, the Sessions and the clock by which one process runs the jobs of one site."""

    def __init__(self, site: Site) -> None:
        for module in site.modules:
            with suppress(ImportError):  # a host that knows less hands back what it does not know
                import_module(module)
        self.engine, make, self._owns_engine = opened(site.source, connections=site.connections)
        if os.getpid() != _BORN and not self._owns_engine:  # forked: the parent's connections are not ours
            self.engine.dispose(close=False)
        scoped = make if isinstance(make, scoped_session) else None
        scheduler = Scheduler(scoped or make(), timezone=site.timezone, allow=site.allow)
        self.units = PatientUnits(own_engine(self.engine), worker=worker_name(), patience=self._patience)
        self.context = Context(
            check=scheduler.check,
            check_class=scheduler.check_class,
            time=self.now,
            timezone=scheduler.timezone,
            around=None if scoped is None else InRegistry(scoped),
        )
        self._kept = Kept()
        self._open = opener(scoped.session_factory if scoped else make, self.engine, {SCHEDULER: scheduler}, self._kept)
        self._clock: Callable[[], datetime] = utc_now
        self._measure_at = 0.0

    def now(self) -> datetime:
        """Return the database's time, as far as it was measured."""
        return self._clock()

    def run(self, work: Work) -> tuple[list[Told], set[int]]:
        """Run the jobs that still belong to the worker, and tell how each ended."""
        if monotonic() >= self._measure_at:
            self._clock = ticking(self.units.read(statements.clock) or utc_now())
            self._measure_at = monotonic() + MEASURE_SECONDS
        context = replace(self.context, asked_to_stop=work.asked_to_stop, requeued=set())
        performer = PatientPerformer(self.units, self._open, context, worker=work.worker)
        # It may have waited in a queue, or be run a second time because the host that ran it is gone.
        tokens = [row.token for row in work.rows]
        held = self.units.read(lambda connection: statements.holds(connection, tokens))
        over = threading.Event()
        attending = threading.Thread(
            target=self._attend, args=(performer, over), name="future_jobs attend", daemon=True
        )
        attending.start()
        file = None if work.board is None else (Path(work.board) / str(os.getpid())).open("wb", buffering=0)
        try:
            told = []
            for position, row in enumerate(work.rows):
                _note(file, work.number, position)
                told.append(self._told(performer, row, is_held=row.token in held))
            _note(file, work.number, len(work.rows))
        finally:
            over.set()
            self._kept.give_back()
            if file is not None:
                file.close()
        return told, context.asked_to_stop

    def _attend(self, performer: PatientPerformer, over: threading.Event) -> None:
        while not over.wait(ATTEND_SECONDS):
            try:
                performer.attend()
            except Exception:
                events.logger.exception("what runs in process %s could not be attended to", os.getpid())

    def close(self) -> None:
        """Give back the connections that are idle."""
        self.units.engine.dispose()
        if self._owns_engine:
            self.engine.dispose()

    def _told(self, performer: PatientPerformer, row: Claimed, *, is_held: bool) -> Told:
        try:
            ended = None if is_held else self.units.read(partial(recalled, row=row))
            return _light(ended or performer.perform(row))
        except Exception:
            return traceback.format_exc()

    def _patience(self) -> float:
        return PATIENCE - self.units.away_seconds


def _light(ended: Ended) -> tuple[Any, ...]:
    """Leave out the job, which the worker has, and the exception, which may not survive a journey."""
    if isinstance(ended.outcome, Failed):
        ended = ended._replace(outcome=replace(ended.outcome, error=None))
    return ended[1:]
