"""Threads that notice what other processes commit, and wake a worker for it.

Where a database counts its commits, one watches the count. Where it sends notifications, one may wait for them, if
those who schedule were told to send some.
"""

from __future__ import annotations

import math
import random
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, sleep
from typing import Any

from sqlalchemy.engine import Connection, Engine

from . import events, notify_statements, statements
from .dialects import change_counter, received, written_files
from .filewatch import FileWatch, watching
from .wakeups import Wake

__all__ = ["Listener", "Watch", "watch"]

BUSY_SECONDS, IDLE_SECONDS = 0.005, 0.0125  # between two looks at the count of commits
SOON_SECONDS = 0.0005  # until the next look once the file was written, which happens before the commit
ALERT_SECONDS, CALM_SECONDS = 0.1, 0.25  # for how long one looks often after a write; until the next look without
CROWDED_SECONDS = 0.1  # from one wake to the next at most, while one commit follows the other
OWN_SECONDS = 0.025  # after a commit of the worker itself, behind which another may hide
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds until a lost connection is replaced
PROBE_SECONDS = 30.0  # a connection that nobody speaks on is one that a firewall forgets


class Watch:
    """A thread that calls ``wake([])`` when others have committed, where the database has a count of that.

    ``own`` counts the commits of those for whom it watches, as far as they do: they need not be woken for these.
    """

    def __init__(self, engine: Engine, wake: Wake, *, own: Callable[[], int] = lambda: 0) -> None:
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
            own, rest = self._own(), _Rest(monotonic())
            self._wake([])  # for what came while nobody looked
            while not self._over.is_set():
                pace.wait(is_quiet=seen == seen_before and not rest.is_due_later)
                own_before, own = own, self._own()
                seen_before, seen = seen, count()
                now = monotonic()
                if seen != seen_before:
                    rest.note(now, is_own=own != own_before)
                    pace.hurry()
                elif not rest.is_due_later:
                    pace.slow_down()
                if rest.is_over(now):
                    self._wake([])


class _Rest:
    """When to wake for what was committed: at once, and ever more seldom while one commit follows the other."""

    def __init__(self, now: float) -> None:
        self._woke_at = now
        self._seconds = BUSY_SECONDS  # from one wake to the next
        self._at = math.inf
        self._changes = 0  # looks that found one, since

    @property
    def is_due_later(self) -> bool:
        """Whether a wake is yet to come."""
        return self._at < math.inf

    def note(self, now: float, *, is_own: bool) -> None:
        """Take note of a commit, perhaps ``is_own``, behind which another may hide."""
        self._changes += 1
        self._at = min(self._at, now + OWN_SECONDS if is_own else self._woke_at + self._seconds)

    def is_over(self, now: float) -> bool:
        """Tell whether to wake now; if so, it was done."""
        if now < self._at:
            return False
        is_crowded = self._changes * 2 * BUSY_SECONDS >= self._seconds  # every other look found one
        is_crowded = is_crowded and now - self._woke_at < 2 * self._seconds
        self._seconds = min(2 * self._seconds, CROWDED_SECONDS) if is_crowded else BUSY_SECONDS
        self._woke_at, self._at, self._changes = now, math.inf, 0
        return True


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
    """A thread that calls ``wake`` with what it is notified of, where the database can do that."""

    def _follower(self, connection: Connection) -> Callable[[], None]:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        return partial(self._listen, connection, connection.connection.driver_connection)

    def _listen(self, connection: Connection, driver: Any) -> None:
        notify_statements.listen(connection)
        self._wake([])
        with selectors.DefaultSelector() as selector:
            selector.register(self._ear, selectors.EVENT_READ)
            selector.register(driver.fileno(), selectors.EVENT_READ)
            while not self._over.is_set():
                if not selector.select(PROBE_SECONDS):
                    statements.clock(connection)
                if told := [notify_statements.levels_in(text) for text in received(driver)]:
                    self._wake([level for levels in told for level in levels] if all(told) else [])


def watch(engine: Engine, wake: Wake, *, own: Callable[[], int], notify: bool) -> Watch:
    """Return what notices the commits of others: notifications if ``notify``, else the count of commits."""
    return Listener(engine, wake) if notify else Watch(engine, wake, own=own)
