"""The library's own short transactions, apart from any Session of the application.

What a handler does to its Session can therefore never prevent its outcome from being recorded. A unit is small and
may be run again: deadlocks, serialization failures, locks not given in time and lost connections are retried with
jitter, a bounded number of times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .dialects import (
    backend_of,
    impatient,
    is_away,
    is_disconnect,
    is_lock_error,
    is_missing_table,
    is_single_connection,
)
from .errors import DatabaseBusy, SchemaError

__all__ = ["Units", "pause", "schema_errors"]

T = TypeVar("T")

PATIENCE = 60.0  # seconds for which a unit is tried again
LONGEST_PAUSE = 2.0  # seconds


def pause(tries: int) -> None:
    """Sleep before another try, longer each time and never the same, so that those who collided do not again."""
    time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.01 * 2**tries)))  # noqa: S311 (not a secret)


@contextmanager
def schema_errors() -> Iterator[None]:
    """Raise `SchemaError`, with the command to run, where a statement of the library misses its table."""
    try:
        yield
    except DBAPIError as error:
        if not is_missing_table(error):
            raise
        raise SchemaError(
            "the future_jobs tables do not exist in this database; run 'future-jobs db upgrade' or call "
            "future_jobs.create_tables(engine)"
        ) from error


class Units:
    """Runs units of work against the bind of a Session: an Engine, or a Connection with a transaction around it all."""

    def __init__(self, bind: Engine | Connection) -> None:
        self.bind = bind
        self.backend = backend_of(bind)
        self.commits = 0  # a number that grows with them; threads that commit at once may count as one
        self.engine = bind if isinstance(bind, Engine) else bind.engine

    @property
    def is_alone(self) -> bool:
        """Whether this thread's connection is the only way to the database, so that no other thread can help."""
        return isinstance(self.bind, Connection) or is_single_connection(self.engine)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction that may write, and commit it; again if the database says so."""
        return self._run(work, writing=True)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, which only reads: on SQLite the write lock is not taken."""
        return self._run(work, writing=False)

    def try_write(self, work: Callable[[Connection], T]) -> T | None:
        """Run ``work`` as `write` does, once, for what matters little; None if a lock or the database is not to be had.

        No lock is waited for longer than a moment.
        """
        if isinstance(self.bind, Connection):
            return self.write(work)
        try:
            with self.bind.connect() as plain, impatient(plain), self._begun(plain, writing=True) as connection:
                return work(connection)
        except DBAPIError as error:
            if is_lock_error(error) or is_away(error):
                return None
            raise

    def _run(self, work: Callable[[Connection], T], *, writing: bool) -> T:
        began = time.monotonic()
        for tries in count(1):
            try:
                with schema_errors(), self._transaction(writing=writing) as connection:
                    return work(connection)
            except DBAPIError as error:
                is_busy = is_lock_error(error)
                if not (is_busy or is_disconnect(error)) or isinstance(self.bind, Connection):
                    raise
                if time.monotonic() - began > PATIENCE:
                    if not is_busy:
                        raise
                    raise DatabaseBusy(f"the database has been locked by others for {PATIENCE} seconds") from error
            pause(tries)
        raise AssertionError("unreachable")

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[Connection]:
        if isinstance(self.bind, Connection):
            with self.bind.begin_nested() if self.bind.in_transaction() else self.bind.begin():
                yield self.bind
            return
        with self.bind.connect() as connection, self._begun(connection, writing=writing) as begun:
            yield begun

    @contextmanager
    def _begun(self, plain: Connection, *, writing: bool) -> Iterator[Connection]:
        connection = self.backend.isolated(plain)
        with connection.begin() as transaction:
            self.backend.begin(connection, writing=writing)
            yield connection
            if not writing:
                transaction.rollback()
        self.commits += writing
