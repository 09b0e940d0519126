"""A running job's Session: opened when the handler first uses it, and one transaction whatever the handler does.

The Session joins an outer transaction that belongs to the job. A handler written for a web request may commit, roll
back or close it as it likes: what it committed lands together with the job's completion, or not at all.

At first the Session works directly in the outer transaction. From its first commit on there is something to protect
from a later rollback, and it works in SAVEPOINTs. Most handlers never commit, and so never pay for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from sqlalchemy.engine import Connection, Engine, Transaction
from sqlalchemy.orm import Session, scoped_session

from .dialects import begin_lazily, has_written, keeps_snapshot, prepare_for_job
from .errors import InvalidArgument, NotSupported, shown

__all__ = ["AnySession", "InRegistry", "JobSession", "Kept", "checked_session", "session_maker"]

AnySession = Session | scoped_session[Any]


def checked_session(session: Any) -> AnySession:
    """Return ``session``; raise `InvalidArgument` naming the right class for what is no Session."""
    if isinstance(session, Session | scoped_session):
        return session
    name = type(session).__name__
    advice = {
        "AsyncSession": "use AsyncScheduler(async_session)",
        "async_scoped_session": "use AsyncScheduler(async_session)",
        "sessionmaker": "call it: Scheduler(Session())",
        "Engine": "make a Session: Scheduler(Session(engine))",
        "Connection": "make a Session: Scheduler(Session(connection))",
    }.get(name, "pass a Session or a scoped_session")
    raise InvalidArgument(f"session is {shown(session)}, a {name}; {advice}", argument="session", value=session)


def session_maker(session: Session | scoped_session[Any]) -> Callable[[], Session]:
    """Return a function that makes Sessions like ``session``: same class, same binds, same settings."""
    if isinstance(session, scoped_session):
        return session.session_factory
    cls = type(session)
    settings: dict[str, Any] = {
        "bind": session.bind,
        "autoflush": session.autoflush,
        "expire_on_commit": session.expire_on_commit,
    }
    if binds := getattr(session, "binds", None) or getattr(session, "_Session__binds", None):  # public since 2.1
        settings["binds"] = dict(binds)
    try:
        cls(**settings).close()
    except TypeError as error:
        raise NotSupported(
            f"a {cls.__name__} cannot be made from {', '.join(settings)} ({error}); pass the scoped_session or a "
            f"Session made by a plain sessionmaker"
        ) from error
    return partial(cls, **settings)


class JobSession:
    """The Session of one job, and the transaction that it works in.

    ``hold`` locks the job's row, where others must not change it while the transaction is open.
    """

    def __init__(
        self,
        make: Callable[[], Session],
        bind: Engine | Connection,
        *,
        hold: Callable[[Connection], object],
        joined: bool = True,
        info: Mapping[str, Any] | None = None,
        lender: Lender | None = None,
    ) -> None:
        self._lender = lender or _POOLS
        self._make = make
        self._bind = bind
        self._hold = hold
        self._joined = joined
        self._info = info or {}
        self._session: Session | None = None
        self._was_bound = False  # the Session asked for a database, of however many it has
        self._connection: Connection | None = None
        self._transaction: Transaction | None = None
        self._undo: Callable[[], None] | None = None  # what was changed about the connection
        self._close: Callable[[], None]  # the Session, as its class does

    @property
    def session(self) -> Session:
        """The Session; made, but not yet connected, when it is first asked for."""
        if self._session is None:
            self._session = self._make()
            self._session.info.update(self._info)
            self._close = self._session.close
            if self._joined:
                self._join(self._session)
        return self._session

    @property
    def was_used(self) -> bool:
        """Whether the handler did anything that belongs into one transaction with its outcome."""
        session = self._session
        if session is None or not self._joined:
            return False
        return self._was_bound or bool(session.new or session.dirty or session.deleted)

    def flush(self) -> None:
        """Send what is pending; a Session of its own (``transaction="own"``) is committed."""
        if self._session is not None and not self._joined:
            self._session.commit()
        elif self.was_used:
            self.session.flush()

    def finish(self, last: Callable[[Connection], bool]) -> bool:
        """Commit what the handler wrote together with what ``last`` writes, as one; tell whether ``last`` agreed.

        If it returns False everything is rolled back.
        """
        self.session.commit()
        connection = self._connected()
        if not last(connection):
            self.rollback()
            return False
        assert self._transaction is not None
        self._transaction.commit()
        return True

    def rollback(self) -> None:
        """Undo everything, even for a Session that the handler broke or closed."""
        if self._session is not None:
            with suppress(Exception):
                self._session.rollback()
        if self._transaction is not None and self._transaction.is_active:
            self._transaction.rollback()

    def close(self) -> None:
        """Undo what was not finished and give everything back."""
        if self._session is None:  # most handlers never ask for it
            return
        connection, undo = self._connection, self._undo
        try:
            self.rollback()
        finally:
            self._transaction = self._connection = self._undo = self._session = None
            try:
                self._close()
            finally:
                try:
                    if undo is not None:
                        undo()
                finally:
                    if connection is not None and connection is not self._bind:
                        self._lender.take_back(connection)

    # --- how the Session joins

    def _join(self, session: Session) -> None:
        bind_of, close = session.get_bind, self._close

        def get_bind(*args: Any, **kwargs: Any) -> Engine | Connection:
            self._was_bound = True
            bind = bind_of(*args, **kwargs)
            return self._connected() if _engine(bind) is _engine(self._bind) else bind

        def close_after_rollback() -> None:
            # Working directly in the outer transaction, a close alone would leave what was flushed.
            session.rollback()
            close()

        session.get_bind = get_bind  # type: ignore[method-assign]
        session.close = close_after_rollback  # type: ignore[method-assign]

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._lender.lend(self._bind) if isinstance(self._bind, Engine) else self._bind
            self._undo = prepare_for_job(self._connection)
        assert self._session is not None
        begun = self._transaction is not None and self._transaction.is_active
        if not begun:
            inside = self._connection.in_transaction()
            self._transaction = self._connection.begin_nested() if inside else begin_lazily(self._connection)
            if not inside and keeps_snapshot(self._connection):
                # A renewal of the lease would make the completion fail; with its row locked the job needs none.
                self._hold(self._connection)
        # The mode is read when the Session joins, that is at its first statement and after each of its commits.
        protect = begun and has_written(self._connection)
        self._session.join_transaction_mode = "create_savepoint" if protect else "rollback_only"
        return self._connection


def _engine(bind: Engine | Connection) -> Engine:
    return bind if isinstance(bind, Engine) else bind.engine


class Lender(Protocol):
    """Has connections for the time of one job."""

    def lend(self, engine: Engine) -> Connection:
        """Return a connection of ``engine``."""

    def take_back(self, connection: Connection) -> None:
        """Take back what was lent."""


class _Pools:
    """Lends those that the pools of the engines have."""

    def lend(self, engine: Engine) -> Connection:
        return engine.connect()

    def take_back(self, connection: Connection) -> None:
        connection.close()


_POOLS = _Pools()


class Kept(threading.local):
    """The connection of a thread, kept from one job to the next.

    Giving it back in between costs a round trip on some databases, since the pool rolls back what nobody has begun.
    """

    _connection: Connection | None = None
    _options: object = None  # of the connection, when it was lent

    def lend(self, engine: Engine) -> Connection:
        """Lend a connection for one job."""
        connection, self._connection = self._connection, None
        if connection is None:
            connection = engine.connect()
        self._options = connection.get_execution_options()
        return connection

    def take_back(self, connection: Connection) -> None:
        """Keep the connection, unless the job left something behind on it."""
        is_clean = not (connection.closed or connection.invalidated or connection.in_transaction())
        if is_clean and connection.get_execution_options() is self._options:
            self._connection = connection
        else:
            connection.close()

    def give_back(self) -> None:
        """Give it back to its pool."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class InRegistry:
    """Makes the job's Session the current one of a scoped_session while its handler runs."""

    def __init__(self, scoped: scoped_session[Any]) -> None:
        self._registry = scoped.registry

    def __call__(self, work: JobSession, call: Callable[[], Any]) -> Any:
        """Call ``call`` meanwhile; return what it returns."""
        before = self._registry() if self._registry.has() else None
        self._registry.set(work.session)
        try:
            return call()
        finally:
            if before is None:
                self._registry.clear()
            else:
                self._registry.set(before)
