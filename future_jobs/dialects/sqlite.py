"""SQLite: a file that several processes use, its one lock, and when a transaction of its driver really begins.

On any other database each of these does nothing, or says that there is nothing to do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from random import uniform
from time import monotonic, sleep
from typing import Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, Transaction
from sqlalchemy.exc import DBAPIError

from .faults import is_lock_error

__all__ = [
    "begin_before_savepoint",
    "begin_lazily",
    "cannot_roll_back",
    "change_counter",
    "configure_sqlite",
    "has_written",
    "impatient",
    "prepare_for_job",
    "take_write_lock",
    "written_files",
]

# --- a file that several processes use -----------------------------------------------------------------------------


def configure_sqlite(engine: Engine, *, timeout: timedelta = timedelta(seconds=30)) -> Engine:
    """Set an engine on an SQLite file up for several processes, and return it; any other engine is left as it is.

    Write-ahead logging, so that readers and the writer do not wait for each other; ``synchronous = NORMAL``, so that a
    commit does not wait for the disk (a power cut may take back the last commits, in order); and ``timeout`` for locks.
    To be called before the engine is first used.
    """
    if engine.dialect.name != "sqlite":
        return engine
    milliseconds = int(timeout / timedelta(milliseconds=1))

    def configure(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for setting in ("journal_mode = WAL", "synchronous = NORMAL", f"busy_timeout = {milliseconds}"):
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()

    event.listen(engine, "connect", configure)
    return engine


MOMENT = 50  # milliseconds
EAGER_SECONDS = 0.002  # between two tries to get SQLite's write lock


@contextmanager
def impatient(connection: Connection) -> Iterator[None]:
    """Wait for SQLite's one write lock no longer than a moment meanwhile."""
    if connection.dialect.name != "sqlite":
        yield
        return
    with _busy_timeout(connection, MOMENT):
        yield


@contextmanager
def _busy_timeout(connection: Connection, milliseconds: int) -> Iterator[int]:
    """Wait so long for locks meanwhile; yield how long it is usually, in milliseconds."""
    driver = _driver(connection)
    [usual] = driver.execute("PRAGMA busy_timeout").fetchone()
    driver.execute(f"PRAGMA busy_timeout = {milliseconds}")
    try:
        yield usual
    finally:
        driver.execute(f"PRAGMA busy_timeout = {usual}")


# --- when a transaction begins -------------------------------------------------------------------------------------


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def _in_transaction(connection: Connection) -> bool:
    return bool(_driver(connection).in_transaction)


def has_written(connection: Connection) -> bool:
    """Tell whether a transaction may hold anything that a rollback would lose."""
    return connection.dialect.name != "sqlite" or _in_transaction(connection)


def take_write_lock(connection: Connection) -> None:
    """Take SQLite's one write lock, waiting as long as the busy timeout says, in a transaction that has just begun.

    A deferred BEGIN that an event of the application's sent with it is replaced.
    """
    driver = _driver(connection)
    if getattr(driver, "autocommit", None) is False:  # Python 3.12: always in a transaction
        connection.exec_driver_sql("UPDATE future_jobs_scheduled_job SET id = id WHERE id IS NULL")
        return
    if driver.in_transaction:
        connection.connection.rollback()
    _begin_eagerly(connection)


def _begin_eagerly(connection: Connection) -> None:
    """Begin a transaction that writes, as soon as the lock is free.

    SQLite itself looks again at ever longer intervals, up to a tenth of a second; whoever waited longest then comes
    last, time and again, where others write without a pause. What the library writes is short, much waits for it, and
    it takes its turn.
    """
    began = monotonic()
    with _busy_timeout(connection, 0) as patience:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            except DBAPIError as error:
                if not is_lock_error(error) or monotonic() - began >= patience / 1000:
                    raise
            else:
                return
            sleep(uniform(EAGER_SECONDS / 2, EAGER_SECONDS))  # noqa: S311 (not a secret)


def begin_before_savepoint(engine: Engine) -> None:
    """Make a SAVEPOINT on SQLite nest in a real transaction.

    Python's driver begins a transaction before the first INSERT, UPDATE or DELETE, but not before a SAVEPOINT; one
    that comes first is itself the transaction, and releasing it commits. Nothing else of the engine is touched.
    """
    if engine.dialect.name == "sqlite" and not event.contains(engine, "savepoint", _begin_immediate):
        event.listen(engine, "savepoint", _begin_immediate)


def _begin_immediate(connection: Connection, name: str | None) -> None:  # noqa: ARG001
    if not _in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def prepare_for_job(connection: Connection) -> Callable[[], None] | None:
    """Let a handler read without holding SQLite's write lock, and write without failing because others wrote.

    The driver's default does both: reads run outside a transaction and the first write begins one. An engine that was
    configured otherwise is put into that mode for the time of one job; what is returned undoes that, and ends the
    queries which the handler has read in part. See `begin_lazily`.
    """
    if connection.dialect.name != "sqlite" or connection.in_transaction():  # the latter: somebody else's, around it all
        return None
    raw = _driver(connection)
    lazy = {"isolation_level": ""}
    if hasattr(raw, "autocommit"):  # Python 3.12
        lazy["autocommit"] = sqlite3.LEGACY_TRANSACTION_CONTROL  # type: ignore[attr-defined]
    before = {name: getattr(raw, name) for name in lazy}
    close_cursors = _note_cursors(connection)
    if before == lazy:
        return close_cursors

    def put(settings: dict[str, Any]) -> None:
        raw.rollback()
        for name, value in settings.items():
            setattr(raw, name, value)

    def undo() -> None:
        close_cursors()
        put(before)

    put(lazy)
    return undo


# Without write-ahead logging a query that was read in part keeps all others from committing until its cursor is closed,
# or gone; a rollback does not end it. It may be gone late: whoever keeps an exception of the handler has its cursors.

_CURSORS = "future_jobs.cursors"  # in the info of a connection: those of the job that has it


def _note_cursors(connection: Connection) -> Callable[[], None]:
    """Take note of the cursors that ``connection`` makes from now on; return what closes them."""
    # Before: for a statement that an exception from outside breaks off there is no after, and its cursor may stay open.
    if not event.contains(connection, "before_cursor_execute", _note_cursor):
        event.listen(connection, "before_cursor_execute", _note_cursor)
    if not event.contains(connection.engine.pool, "close", _close_cursors):
        event.listen(connection.engine.pool, "close", _close_cursors)
    cursors = connection.info[_CURSORS] = WeakSet[sqlite3.Cursor]()
    return partial(_close_all, cursors)


def _note_cursor(connection: Connection, cursor: Any, *_: object) -> None:
    if (cursors := connection.info.get(_CURSORS)) is not None:
        cursors.add(cursor)


def _close_cursors(_driver: object, record: Any) -> None:
    _close_all(record.info.get(_CURSORS, ()))  # while they can be: those of a closed connection cannot


def _close_all(cursors: Iterable[sqlite3.Cursor]) -> None:
    for cursor in list(cursors):
        with suppress(sqlite3.Error):
            cursor.close()


def begin_lazily(connection: Connection) -> Transaction:
    """Begin a transaction; on SQLite undo the BEGIN that an event of the application's may have sent with it.

    A deferred BEGIN takes its snapshot at the first read, and a write after that fails at once if another process
    wrote in between.
    """
    transaction = connection.begin()
    if connection.dialect.name == "sqlite" and _in_transaction(connection):
        connection.connection.rollback()
    return transaction


def cannot_roll_back(connection: Connection) -> bool:
    """Tell whether the driver commits each statement by itself, although a transaction was begun.

    Python's SQLite driver does so if it was told not to begin transactions, and nobody else does.
    """
    if connection.dialect.name != "sqlite":
        return False
    driver = _driver(connection)
    if getattr(driver, "autocommit", None) is True:  # Python 3.12
        return True
    return driver.isolation_level is None and not driver.in_transaction


# --- commits of others ---------------------------------------------------------------------------------------------


def change_counter(connection: Connection) -> Callable[[], int] | None:
    """Return what reads a number that changes with every commit of others; None where a database has no such number.

    Reading it takes no lock and no disk access.
    """
    if connection.dialect.name != "sqlite":
        return None
    driver = _driver(connection)

    def read() -> int:
        found: int = driver.execute("PRAGMA data_version").fetchone()[0]
        if driver.in_transaction:  # Python 3.12's autocommit=False; a snapshot would never change
            driver.rollback()
        return found

    return read


def written_files(connection: Connection) -> list[str]:
    """Return the files to which a commit may be written, of which some need not exist; none on a server."""
    if connection.dialect.name != "sqlite":
        return []
    main = next(name for _, schema, name in _driver(connection).execute("PRAGMA database_list") if schema == "main")
    return [main, f"{main}-wal"] if main else []
