"""How a worker sleeps, and what ends its sleep before the time it has set itself.

Looking again after a while finds every job; nothing here is needed for that. It makes a job that is due now start now:

- A Session of this process that schedules something tells the workers of the same database once that is committed. What
  was rolled back, to a SAVEPOINT too, tells nobody.
- Where a database counts its commits, a thread watches the count. This notices what other processes do.
- Where a database sends notifications, a thread may wait for them, if those who schedule were told to send some.
"""

from __future__ import annotations

import math
import random
import selectors
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from . import events, statements
from .dialects import backend_of, change_counter, is_single_connection, received, written_files
from .errors import InvalidArgument, shown
from .filewatch import FileWatch, watching
from .statements import Level
from .times import seconds_of

__all__ = ["Alarm", "Listener", "Watch", "announce", "listen", "notify_workers", "unlisten", "watch"]

Wake = Callable[[Sequence[Level]], None]

BUSY_SECONDS, IDLE_SECONDS = 0.005, 0.0125  # between two looks at the count of commits
SOON_SECONDS = 0.0005  # until the next look once the file was written, which happens before the commit
ALERT_SECONDS, CALM_SECONDS = 0.1, 0.25  # for how long one looks often after a write; until the next look without
CROWDED_SECONDS = 0.1  # from one wake to the next at most, while one commit follows the other
OWN_SECONDS = 0.025  # after a commit of the worker itself, behind which another may hide
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds until a lost connection is replaced
MOST_LEVELS = 16  # that a commit tells of
PROBE_SECONDS = 30.0  # a connection that nobody speaks on is one that a firewall forgets


class Alarm:
    """Ends the sleep of one thread; may be rung from any other, and from a signal's handler."""

    def __init__(self) -> None:
        self._condition = threading.Condition()  # on a lock that a handler may take again
        self._at = math.inf

    def ring(self, after: float = 0.0) -> None:
        """End the sleep, present or next, ``after`` so many seconds."""
        with self._condition:
            self._at = min(self._at, monotonic() + after)
            self._condition.notify_all()

    def sleep(self, seconds: float) -> None:
        """Return after ``seconds``, or when it rings."""
        until = monotonic() + seconds
        with self._condition:
            while (left := min(until, self._at) - monotonic()) > 0:
                self._condition.wait(left)
            self._at = math.inf


# --- commits in this process --------------------------------------------------------------------------------------

_NOTIFY = "future_jobs_notify"  # an engine's execution option
_NOTES = "future_jobs.wakeups"  # in the info of a Session: what it has scheduled and not committed
_JOINED, _LEFT = "future_jobs.joined", "future_jobs.left"  # the same in that of a connection, before and after COMMIT
_sleepers: dict[str, tuple[Wake, ...]] = {}
_changing = threading.Lock()


class _HasOptions(Protocol):
    def update_execution_options(self, **opt: Any) -> None: ...


E = TypeVar("E", bound=_HasOptions)


def notify_workers(engine: E, *, within: str | timedelta = "1s") -> E:
    """Let what schedules through ``engine`` wake workers in other processes, and on other hosts; return ``engine``.

    On PostgreSQL a transaction that schedules a job which is due ``within`` this time sends one NOTIFY, which arrives
    when it commits at the workers that have ``notify=True``. What is due later they find by their ``poll``, which
    should be no longer. On other databases this does nothing. ``engine`` may be an AsyncEngine.
    """
    if not hasattr(engine, "update_execution_options"):
        raise InvalidArgument(f"engine is {shown(engine)}; pass an Engine", argument="engine", value=engine)
    engine.update_execution_options(**{_NOTIFY: timedelta(seconds=seconds_of(within, "within"))})
    return engine


def listen(engine: Engine, wake: Wake) -> None:
    """Call ``wake(levels)`` whenever a Session of this process has committed jobs to the database of ``engine``.

    ``levels`` are those that the jobs are in, with the earliest time of each; without any, something else is to be
    looked for.
    """
    name = _database(engine)
    with _changing:
        _sleepers[name] = (*_sleepers.get(name, ()), wake)


def unlisten(engine: Engine, wake: Wake) -> None:
    """Stop calling ``wake``."""
    name = _database(engine)
    with _changing:
        rest = tuple(each for each in _sleepers.pop(name, ()) if each != wake)
        if rest:
            _sleepers[name] = rest


@dataclass(slots=True)
class _Note:
    """What a transaction has scheduled through one connection: its levels, with the earliest time of each."""

    levels: dict[_Place, datetime] = field(default_factory=dict)
    is_vague: bool = False  # there is something to look for that is no level, or are too many levels
    is_sent: bool = False  # by NOTIFY

    def put(self, place: _Place, run_at: datetime) -> None:
        """Take note of a job."""
        known = self.levels.get(place)
        if known is None or run_at < known:
            self.levels[place] = run_at

    def add(self, other: _Note) -> None:
        """Take note of what ``other`` does."""
        for place, run_at in other.levels.items():
            self.put(place, run_at)
        self.is_vague |= other.is_vague or len(self.levels) > MOST_LEVELS
        self.is_sent |= other.is_sent

    @property
    def told(self) -> list[Level]:
        """What is told when it is committed."""
        if self.is_vague:
            return []
        return [Level(queue, priority, at, limited) for (queue, priority, limited), at in self.levels.items()]


_Place = tuple[str, int, bool]  # a level without its time

_Notes = dict[SessionTransaction, dict[Connection, _Note]]


def announce(session: Session, connection: Connection, jobs: Iterable[Mapping[str, Any]], *, now: datetime) -> None:
    """Tell workers about ``jobs``, rows which ``session`` has written, once that is committed.

    Without any, something else is to be looked for at once.
    """
    within: timedelta | None = connection.get_execution_options().get(_NOTIFY)
    if within is None and (not _sleepers or _database(connection.engine) not in _sleepers):
        return
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    _hear_sessions()
    news = _noted(jobs)
    notes: _Notes = session.info.setdefault(_NOTES, {})
    note = notes.setdefault(transaction, {}).setdefault(connection, _Note())
    note.add(news)
    # A transaction that has sent one cannot be prepared for a two-phase commit.
    first_at = min(news.levels.values(), default=now)
    is_wanted = within is not None and first_at - now <= within and not session.twophase
    if is_wanted and backend_of(connection).notifies and not _is_sent(notes, transaction, connection):
        statements.notify(connection)
        note.is_sent = True


def _noted(jobs: Iterable[Mapping[str, Any]]) -> _Note:
    note = _Note()
    for row in jobs:
        note.put((row["queue"], row["priority"], row["limited"]), row["run_at"])
    note.is_vague = not note.levels
    return note


def _is_sent(notes: _Notes, transaction: SessionTransaction | None, connection: Connection) -> bool:
    while transaction is not None:
        note = notes.get(transaction, {}).get(connection)
        if note is not None and note.is_sent:
            return True
        transaction = transaction.parent
    return False


@cache
def _hear_sessions() -> None:
    # Once for all Sessions: a listener for each would take longer than the rest of `announce`.
    event.listen(Session, "after_commit", _committed)
    event.listen(Session, "after_transaction_end", _ended)


def _committed(session: Session) -> None:
    notes: _Notes | None = session.info.get(_NOTES)
    transaction = session.get_nested_transaction() or session.get_transaction()
    if not notes or transaction is None or (mine := notes.pop(transaction, None)) is None:
        return
    outer = transaction.parent
    for connection, note in mine.items():
        if outer is not None:  # a SAVEPOINT is released: from now on it is the matter of what is around it
            notes.setdefault(outer, {}).setdefault(connection, _Note()).add(note)
        elif connection.in_transaction():
            _wait_for(connection, note)
        else:
            _wake(_database(connection.engine), note)


def _ended(session: Session, transaction: SessionTransaction) -> None:
    if notes := session.info.get(_NOTES):
        notes.pop(transaction, None)  # it was not committed


def _wake(name: str, note: _Note) -> None:
    for wake in _sleepers.get(name, ()):
        wake(note.told)


# A Session may work in a transaction that somebody else began on its Connection: that of a job, or of a test. Only the
# commit of that one counts. A Connection tells before it commits, and not after: the next that is heard of it is that
# it begins again, or goes back to its pool.


def _wait_for(connection: Connection, note: _Note) -> None:
    joined = connection.info.setdefault(_JOINED, (_database(connection.engine), _Note()))
    joined[1].add(note)
    event.listen(connection, "commit", _commits)
    event.listen(connection, "rollback", _rolls_back)
    event.listen(connection, "begin", _begins)
    event.listen(connection.engine.pool, "checkin", _returned)


def _commits(connection: Connection) -> None:
    if (note := connection.info.pop(_JOINED, None)) is not None:
        connection.info[_LEFT] = note


def _rolls_back(connection: Connection) -> None:
    connection.info.pop(_JOINED, None)
    connection.info.pop(_LEFT, None)


def _begins(connection: Connection) -> None:
    if (note := connection.info.pop(_LEFT, None)) is not None:
        _wake(*note)


def _returned(_: object, record: Any) -> None:
    record.info.pop(_JOINED, None)
    if (note := record.info.pop(_LEFT, None)) is not None:
        _wake(*note)


def _database(engine: Engine) -> str:
    """Return a name that two engines share if they lead to the same database."""
    url = engine.url
    if is_single_connection(engine):
        return f"{id(engine.pool)}"
    place = url.database if url.host or not url.database else Path(url.database).absolute()
    return f"{url.get_backend_name()}:{url.host}:{url.port}:{place}"


# --- commits of others --------------------------------------------------------------------------------------------


class Watch:
    """A thread that calls ``wake`` when others have committed, where the database has a count of that.

    ``own`` counts the commits of those for whom it watches, as far as they do: they need not be woken for these.
    """

    def __init__(self, engine: Engine, wake: Callable[[], Any], *, own: Callable[[], int] = lambda: 0) -> None:
        self._engine = engine
        self._wake = wake
        self._own = own
        self._over = threading.Event()
        self._sockets: tuple[socket.socket, ...] = ()
        self._thread = threading.Thread(target=self._run, name=f"future_jobs {type(self).__name__}", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._sockets = self._bell, self._ear = socket.socketpair()  # what waits for the kernel hears no Event
        self._thread.start()

    def stop(self) -> None:
        """Return once nothing is watched any more."""
        self._over.set()
        if self._thread.is_alive():
            self._bell.close()
            self._thread.join(timeout=5)  # it may be waiting for a database that is away
        self.leave()

    def leave(self) -> None:
        """Give back its sockets, and no more: a forked process is not the one to stop the watch of its parent."""
        for each in self._sockets:
            each.close()

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._over.is_set():
            began = monotonic()
            try:
                with self._engine.connect() as connection:
                    follow = self._follower(connection)
                    if follow is None:
                        return
                    self._keep(connection, follow)
            except Exception as error:  # the driver's own, too; another connection will do
                if not self._over.is_set():
                    events.logger.debug("%s lost its connection: %s", self._thread.name, error)
            if monotonic() - began > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            self._over.wait(random.uniform(pause / 2, pause))  # noqa: S311 (not a secret)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _keep(self, connection: Connection, follow: Callable[[], None]) -> None:
        try:
            connection.detach()  # it is kept for good, and not one of those that the pool has to give
            follow()
        except Exception:
            connection.invalidate()
            raise

    def _follower(self, connection: Connection) -> Callable[[], None] | None:
        """Return what follows the commits of others until it is over; None if there is no way to."""
        count = change_counter(connection)
        return count and partial(self._follow, count, written_files(connection))

    def _follow(self, count: Callable[[], int], files: Sequence[str]) -> None:
        with watching(files, bell=self._ear.fileno()) as written:
            pace = _Pace(written)
            seen = seen_before = count()
            own, rest, woke_at, wake_at = self._own(), BUSY_SECONDS, monotonic(), math.inf
            self._wake()  # for what came while nobody looked
            while not self._over.is_set():
                pace.wait(is_quiet=seen == seen_before and wake_at == math.inf)
                own_before, own = own, self._own()
                seen_before, seen = seen, count()
                now = monotonic()
                if seen != seen_before:
                    wake_at = min(wake_at, woke_at + rest if own == own_before else now + OWN_SECONDS)
                    pace.hurry()
                elif wake_at == math.inf:
                    pace.slow_down()
                if now >= wake_at:
                    rest = min(2 * rest, CROWDED_SECONDS) if now - woke_at < 2 * rest else BUSY_SECONDS
                    woke_at, wake_at = now, math.inf
                    self._wake()


class _Pace:
    """How long to wait between two looks at a count of commits; less, where it is told that something was written."""

    def __init__(self, written: FileWatch | None) -> None:
        self._written = written
        self._pause = BUSY_SECONDS
        self._calm_at = 0.0

    def wait(self, *, is_quiet: bool) -> None:
        if self._written is None or not is_quiet:
            sleep(self._pause)  # half the cost of waiting for an Event
            return
        is_calm = self._pause >= IDLE_SECONDS and monotonic() >= self._calm_at
        if self._written.wait(CALM_SECONDS if is_calm else self._pause):
            self._pause, self._calm_at = SOON_SECONDS, monotonic() + ALERT_SECONDS

    def hurry(self) -> None:
        self._pause = BUSY_SECONDS

    def slow_down(self) -> None:
        self._pause = min(self._pause * 1.3, IDLE_SECONDS)


class Listener(Watch):
    """A thread that calls ``wake`` when it is notified, where the database can do that."""

    def _follower(self, connection: Connection) -> Callable[[], None]:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        return partial(self._listen, connection, connection.connection.driver_connection)

    def _listen(self, connection: Connection, driver: Any) -> None:
        statements.listen(connection)
        self._wake()
        with selectors.DefaultSelector() as selector:
            selector.register(self._ear, selectors.EVENT_READ)
            selector.register(driver.fileno(), selectors.EVENT_READ)
            while not self._over.is_set():
                if not selector.select(PROBE_SECONDS):
                    statements.clock(connection)
                if received(driver):
                    self._wake()


def watch(engine: Engine, wake: Callable[[], Any], *, own: Callable[[], int], notify: bool) -> Watch:
    """Return what notices the commits of others: notifications if ``notify``, else the count of commits."""
    return Listener(engine, wake) if notify else Watch(engine, wake, own=own)
