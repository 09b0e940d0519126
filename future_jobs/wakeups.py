"""How a worker sleeps, and what ends its sleep before the time it has set itself.

Looking again after a while finds every job; nothing here is needed for that. It makes a job that is due now start now:
a Session of this process that schedules something tells the workers of the same database once that is committed, and
those elsewhere, if it was told to and the database can. What was rolled back, to a SAVEPOINT too, tells nobody.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeVar

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from . import notify_statements
from .dialects import backend_of, is_single_connection
from .errors import InvalidArgument, shown
from .statements import Level
from .times import seconds_of

__all__ = ["Alarm", "Wake", "announce", "listen", "notify_workers", "unlisten"]

Wake = Callable[[Sequence[Level]], None]

MOST_LEVELS = 16  # that a commit tells of


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

    On PostgreSQL a transaction that schedules jobs which are due ``within`` this time sends a NOTIFY, which arrives
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
    is_vague: bool = False  # there is something to look for that is no level
    sent: _Note | None = None  # what others were told of it, by NOTIFY

    def put(self, place: _Place, run_at: datetime) -> None:
        """Take note of a job."""
        known = self.levels.get(place)
        if known is None or run_at < known:
            self.levels[place] = run_at

    def add(self, other: _Note) -> None:
        """Take note of what ``other`` does."""
        for place, run_at in other.levels.items():
            self.put(place, run_at)
        self.is_vague |= other.is_vague
        if other.sent is not None:
            self.sent = self.sent or _Note()
            self.sent.add(other.sent)

    def until(self, latest: datetime) -> _Note:
        """Return what is to be found no later than that."""
        return _Note({place: at for place, at in self.levels.items() if at <= latest}, self.is_vague)

    def covers(self, other: _Note) -> bool:
        """Tell whether who has heard of this need not hear of ``other``."""
        if self.is_vague:
            return True
        known = self.levels
        return bool(other.told) and all(at in known and known[at] <= other.levels[at] for at in other.levels)

    @property
    def told(self) -> list[Level]:
        """What is told when it is committed: nothing in particular, if that would be too much."""
        if self.is_vague or len(self.levels) > MOST_LEVELS:
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
    if within is None or session.twophase or not backend_of(connection).notifies:
        return
    soon = news.until(now + within)
    if (soon.levels or soon.is_vague) and not _is_sent(soon, notes, transaction, connection):
        note.add(_Note(sent=soon))
        assert note.sent is not None
        note.sent.is_vague = not note.sent.told  # who is told of too much, at once or bit by bit, is told to look
        notify_statements.notify(connection, soon.told if note.sent.told else [])


def _noted(jobs: Iterable[Mapping[str, Any]]) -> _Note:
    note = _Note()
    for row in jobs:
        note.put((row["queue"], row["priority"], row["limited"]), row["run_at"])
    note.is_vague = not note.levels
    return note


def _is_sent(soon: _Note, notes: _Notes, transaction: SessionTransaction | None, connection: Connection) -> bool:
    while transaction is not None:
        note = notes.get(transaction, {}).get(connection)
        if note is not None and note.sent is not None and note.sent.covers(soon):
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
