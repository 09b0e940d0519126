"""A running job's Session: opened when the handler first uses it, and one transaction whatever the handler does.

The Session joins an outer transaction that belongs to the job. A handler written for a web request may commit, roll
back or close it as it likes: what it committed lands together with the job's completion, or not at all.

At first the Session works directly in the outer transaction. From its first commit on there is something to protect
from a later rollback, and it works in SAVEPOINTs. Most handlers never commit, and so never pay for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection, Engine, Transaction
from sqlalchemy.orm import Session, scoped_session

from .dialects import begin_lazily, has_written, job_transaction, keeps_snapshot
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
        lend: Callable[[Engine], AbstractContextManager[Connection]] = Engine.connect,
    ) -> None:
        self._lend = lend
        self._make = make
        self._bind = bind
        self._hold = hold
        self._joined = joined
        self._info = info or {}
        self._session: Session | None = None
        self._was_bound = False  # the Session asked for a database, of however many it has
        self._connection: Connection | None = None
        self._transaction: Transaction | None = None
        self._open: ExitStack | None = None

    @property
    def session(self) -> Session:
        """The Session; made, but not yet connected, when it is first asked for."""
        if self._session is None:
            self._open = ExitStack()
            self._session = self._make()
            self._session.info.update(self._info)
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
        try:
            self.rollback()
        finally:
            self._transaction = self._connection = None
            try:
                self._session.close()
            finally:
                self._session = None
                assert self._open is not None
                self._open.close()

    # --- how the Session joins

    def _join(self, session: Session) -> None:
        bind_of, close = session.get_bind, session.close

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
            assert self._open is not None
            if isinstance(self._bind, Engine):
                self._connection = self._open.enter_context(self._lend(self._bind))
            else:
                self._connection = self._bind
            self._open.enter_context(job_transaction(self._connection))
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


class Kept(threading.local):
    """The connection of a thread, kept from one job to the next.

    Giving it back in between costs a round trip on some databases, since the pool rolls back what nobody has begun.
    """

    _connection: Connection | None = None

    @contextmanager
    def lend(self, engine: Engine) -> Iterator[Connection]:
        """Lend a connection for one job; it is kept afterwards unless the job left something behind on it."""
        connection, self._connection = self._connection, None
        if connection is None:
            connection = engine.connect()
        options = connection.get_execution_options()
        try:
            yield connection
            is_clean = not (connection.closed or connection.invalidated or connection.in_transaction())
            if is_clean and connection.get_execution_options() is options:
                self._connection = connection
        finally:
            if self._connection is None:
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
