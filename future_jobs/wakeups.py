"""How a worker sleeps, and what ends its sleep before the time it has set itself.

Looking again after a while finds every job; nothing here is needed for that. It makes a job that is due now start now:

- A Session of this process that schedules something tells the workers of the same database once it has committed. What
  was rolled back, to a SAVEPOINT too, tells nobody.
- Where a database counts its commits, a thread watches the count. This notices what other processes do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction

from .dialects import change_counter, is_single_connection

__all__ = ["Alarm", "Watch", "announce", "listen", "unlisten"]

Wake = Callable[[datetime], None]

BUSY_SECONDS, IDLE_SECONDS = 0.005, 0.02  # between two looks at the count of commits


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

_PENDING = "future_jobs.wakeups"  # where a Session's info keeps what its transaction has scheduled
_sleepers: dict[str, tuple[Wake, ...]] = {}
_changing = threading.Lock()


def listen(engine: Engine, wake: Wake) -> None:
    """Call ``wake(run_at)`` whenever a Session of this process has committed a job to the database of ``engine``."""
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


def announce(session: Session, engine: Engine, run_at: datetime) -> None:
    """Tell the workers of this process about a job for ``run_at``, once ``session`` has committed it."""
    if not _sleepers or (name := _database(engine)) not in _sleepers:
        return
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        return
    if _PENDING not in session.info:
        session.info[_PENDING] = {}
        event.listen(session, "after_commit", _committed)
        event.listen(session, "after_soft_rollback", _rolled_back)
    pending = session.info[_PENDING]
    pending[name, transaction] = min(run_at, pending.get((name, transaction), run_at))


def _committed(session: Session) -> None:
    if session.in_nested_transaction():
        return
    pending = session.info[_PENDING]
    for (name, _), run_at in pending.items():
        for wake in _sleepers.get(name, ()):
            wake(run_at)
    pending.clear()


def _rolled_back(session: Session, transaction: SessionTransaction) -> None:
    pending: dict[tuple[str, SessionTransaction], datetime] = session.info[_PENDING]
    for name, inner in list(pending):
        outer: SessionTransaction | None = inner
        while outer is not None and outer is not transaction:
            outer = outer.parent
        if outer is not None:
            del pending[name, inner]


def _database(engine: Engine) -> str:
    """Return a name that two engines share if they lead to the same database."""
    url = engine.url
    if is_single_connection(engine):
        return f"{id(engine.pool)}"
    place = url.database if url.host or not url.database else Path(url.database).absolute()
    return f"{url.get_backend_name()}:{url.host}:{url.port}:{place}"


# --- commits of others --------------------------------------------------------------------------------------------


class Watch:
    """A thread that calls ``wake`` when others have committed, where the database has a count of that."""

    def __init__(self, engine: Engine, wake: Callable[[], Any]) -> None:
        self._engine = engine
        self._wake = wake
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="future_jobs watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Return once nothing is watched any more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(SQLAlchemyError), self._engine.connect() as connection:
                count = change_counter(connection)
                if count is None:
                    return
                try:
                    self._follow(count)
                except Exception:  # the driver's; another connection will do
                    connection.invalidate()
            self._over.wait(1)

    def _follow(self, count: Callable[[], int]) -> None:
        seen, pause = count(), BUSY_SECONDS
        while not self._over.wait(pause):
            found = count()
            if found == seen:
                pause = min(pause * 1.1, IDLE_SECONDS)
                continue
            seen, pause = found, BUSY_SECONDS
            self._wake()
