"""SQLite, PostgreSQL and MySQL/MariaDB, and what each can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, URL, ColumnElement, Integer, String, Text, cast, event, func, literal_column, select, text
from sqlalchemy import insert as plain_insert
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from sqlalchemy.schema import Table
from sqlalchemy.sql.dml import Insert
from sqlalchemy.types import TypeEngine

from future_jobs.errors import NotSupported

from .sqlite import take_write_lock

__all__ = [
    "DRIVERS",
    "IN_USE",
    "MYSQL",
    "POSTGRESQL",
    "SQLITE",
    "Backend",
    "absolute",
    "backend_of",
    "can_listen",
    "check_version",
    "in_line",
    "insert_if_free",
    "insert_unless_there",
    "is_autocommit",
    "is_guided",
    "is_repeatable",
    "is_single_connection",
    "keep_for_own",
    "keeps_snapshot",
    "received",
]

DRIVERS = frozenset({"sqlite3", "psycopg", "psycopg_pool", "psycopg2", "pymysql", "MySQLdb", "mysql", "mariadb"})
"""The packages that speak with a database."""

# --- many rows in one parameter -------------------------------------------------------------------------------------

Kinds = Sequence[TypeEngine[Any]]
Unfolded = tuple[ColumnElement[int], list[ColumnElement[Any]]]


def _from_json_each(rows: ColumnElement[str], kinds: Kinds) -> Unfolded:
    row = func.json_each(rows).table_valued("key", "value", name="item").c
    return row.key, [func.json_extract(row.value, literal_column(f"'$[{at}]'")) for at in range(len(kinds))]


def _from_json_array(rows: ColumnElement[str], kinds: Kinds) -> Unfolded:
    item = func.json_array_elements(cast(rows, JSON)).table_valued("value", with_ordinality="key", name="item")
    row = item.render_derived().c
    texts = [row.value.op("->>", return_type=Text())(literal_column(str(at))) for at in range(len(kinds))]
    # A text is not cast: VARCHAR(n) would cut what is too long, where the column refuses it.
    return row.key, [each if _is_text(kind) else cast(each, kind) for each, kind in zip(texts, kinds, strict=True)]


def _from_json_table(rows: ColumnElement[str], kinds: Kinds) -> Unfolded:
    # A number has to be one here, or a comparison with it would use no index. Times are read from text by their column.
    declared = ", ".join(
        f"c{at} {'BIGINT' if isinstance(kind, Integer) else 'LONGTEXT CHARACTER SET utf8mb4'} PATH '$[{at}]'"
        for at, kind in enumerate(kinds)
    )
    columns: ColumnElement[str] = literal_column(f"'$[*]' COLUMNS (nth FOR ORDINALITY, {declared})")
    row = func.json_table(rows, columns).table_valued("nth", *(f"c{at}" for at in range(len(kinds))), name="item").c
    return row.nth, [row[f"c{at}"] for at in range(len(kinds))]


def _is_text(kind: TypeEngine[Any]) -> bool:
    return isinstance(getattr(kind, "impl", kind), String)


@dataclass(frozen=True, slots=True)
class Backend:
    """What one database can do."""

    name: str
    returning: bool  # UPDATE ... RETURNING
    skip_locked: bool  # SELECT ... FOR UPDATE SKIP LOCKED
    recursive_scan: bool  # a recursive CTE may step through an index; MariaDB reads the whole of it instead
    # A JSON array of arrays, bound as one text, as rows to select from: what orders them, and a column for each kind.
    unfold: Callable[[ColumnElement[str], Kinds], Unfolded]
    own_clock: bool  # it has a clock of its own, which judges what is due
    notifies: bool  # NOTIFY, which waits for the commit
    planner: tuple[str, ...]  # what its planner must be kept from, to read no more than a claim needs
    isolation_level: str | None  # for the library's own transactions
    level_by_statement: bool  # it is told for each, by one statement; by the session's setting it would be four
    oldest: tuple[int, ...]  # the oldest version that keeps the promises

    def isolated(self, connection: Connection) -> Connection:
        """Return ``connection``, at the level of the library's own transactions where telling it costs nothing."""
        if self.isolation_level is None or self.level_by_statement or _OURS in connection.info:
            return connection
        return connection.execution_options(isolation_level=self.isolation_level)

    def begin(self, connection: Connection, *, writing: bool) -> None:
        """Make the transaction that has just begun one of the library's own.

        On SQLite one that writes takes the write lock first, so that the busy timeout applies: a transaction that reads
        first and then writes fails at once when another process wrote in between, however long the timeout.
        """
        if self.level_by_statement and _OURS not in connection.info:
            connection.exec_driver_sql(f"SET TRANSACTION ISOLATION LEVEL {self.isolation_level}")
        if writing and self.name == "sqlite":
            take_write_lock(connection)


SQLITE = Backend(
    name="sqlite",
    returning=True,
    skip_locked=False,
    recursive_scan=True,
    unfold=_from_json_each,
    own_clock=False,
    notifies=False,
    planner=(),
    isolation_level=None,
    level_by_statement=False,
    oldest=(3, 35),
)
POSTGRESQL = Backend(
    name="postgresql",
    returning=True,
    skip_locked=True,
    recursive_scan=True,
    unfold=_from_json_array,
    own_clock=True,
    notifies=True,
    # With old statistics it believes in few rows that are due, and reads and sorts all of them for a hundred; and it
    # compiles the look for levels, which takes ten times as long as the look.
    planner=("enable_sort", "enable_bitmapscan", "jit"),
    isolation_level="READ COMMITTED",
    level_by_statement=False,
    oldest=(12,),
)
MYSQL = Backend(
    name="mysql",
    returning=False,
    skip_locked=True,
    recursive_scan=False,
    unfold=_from_json_table,
    own_clock=True,
    notifies=False,
    planner=(),
    isolation_level="READ COMMITTED",
    level_by_statement=True,
    oldest=(8, 0, 4),  # JSON_TABLE
)
_BACKENDS = {"sqlite": SQLITE, "postgresql": POSTGRESQL, "mysql": MYSQL, "mariadb": MYSQL}


def backend_of(bind: Engine | Connection | Dialect) -> Backend:
    """Return what the database behind ``bind`` can do; raise `NotSupported` for any other kind."""
    name = (bind if isinstance(bind, Dialect) else bind.dialect).name
    try:
        return _BACKENDS[name]
    except KeyError:
        raise NotSupported(f"{name} is not supported; use SQLite, PostgreSQL, MySQL or MariaDB") from None


def insert_unless_there(backend: Backend, table: Table) -> Insert:
    """Return an INSERT that leaves a row with the same key as it is."""
    if backend is MYSQL:
        return plain_insert(table).prefix_with("IGNORE")
    if backend is SQLITE:
        return sqlite_insert(table).on_conflict_do_nothing()
    return postgresql.insert(table).on_conflict_do_nothing()


_OURS = "future_jobs.ours"  # in a connection's info: it was set up for good


def keep_for_own(engine: Engine) -> None:
    """Set the connections of ``engine`` up for the library's own transactions, once and not for each.

    They are at its isolation level, and the planner is kept from what `Backend.planner` names.
    """
    backend = backend_of(engine)

    def connected(connection: Any, record: Any) -> None:
        if backend.isolation_level is not None:
            engine.dialect.set_isolation_level(connection, backend.isolation_level)  # type: ignore[arg-type]
        with connection.cursor() as cursor:
            for name in backend.planner:
                cursor.execute(f"SET {name} = off")
        connection.commit()
        record.info[_OURS] = True

    if backend.isolation_level is not None:
        event.listen(engine, "connect", connected)


def is_guided(connection: Connection) -> bool:
    """Tell whether the planner of ``connection`` needs not be told."""
    return not backend_of(connection).planner or _OURS in connection.info


def check_version(connection: Connection) -> None:
    """Raise `NotSupported` if the database is older than what claiming jobs needs."""
    backend = backend_of(connection)
    found = tuple(connection.dialect.server_version_info or ())
    maria = getattr(connection.dialect, "is_mariadb", False)
    oldest = (10, 6) if maria else backend.oldest
    if found and found < oldest:
        name = "mariadb" if maria else backend.name
        dotted = ".".join(map(str, found))
        raise NotSupported(f"{name} {dotted} is too old; future_jobs needs {'.'.join(map(str, oldest))} or newer")


def is_single_connection(engine: Engine) -> bool:
    """Tell whether the whole database is one connection: in-memory SQLite, or a pool of exactly one."""
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        return True
    return engine.dialect.name == "sqlite" and engine.url.database in {None, "", ":memory:"}


def absolute(url: URL) -> URL:
    """Return the URL by which a process that runs in another folder finds the same database."""
    is_file = url.get_backend_name() == "sqlite" and url.database and not url.database.startswith((":", "file:"))
    return url.set(database=str(Path(url.database).absolute())) if is_file and url.database else url


def is_autocommit(bind: Engine | Connection) -> bool:
    """Tell whether ``bind`` is in autocommit mode, as far as one can know without a transaction."""
    default = getattr(bind.dialect, "_on_connect_isolation_level", None)
    return bind.get_execution_options().get("isolation_level", default) == "AUTOCOMMIT"


def insert_if_free(backend: Backend, table: Table, column: str) -> Insert:
    """Return an INSERT of one row that is none if another row has the same ``column``, which is unique where not null.

    It waits for a transaction that has inserted such a row, and makes none unusable. It returns the key of the row, or
    nothing. InnoDB has no such INSERT but one that hides every error, and what it and one that fails leave behind is a
    shared lock, which others have as well. There the row that is in the way is written to itself instead, which locks
    it for this transaction alone, and the last inserted id is the key of that row, plus `IN_USE`.
    """
    if backend is MYSQL:
        key = next(iter(table.primary_key))
        itself = func.last_insert_id(key + literal_column(str(IN_USE))) - literal_column(str(IN_USE))
        return mysql.insert(table).on_duplicate_key_update({key.name: itself})
    make = sqlite_insert if backend is SQLITE else postgresql.insert
    free = make(table).on_conflict_do_nothing(index_elements=[column], index_where=text(f"{column} IS NOT NULL"))
    return free.returning(*table.primary_key)


IN_USE = 1 << 62  # added to the id of a row that was there already
QUEUE_SECONDS = 10


@contextmanager
def in_line(connection: Connection, key: str) -> Iterator[None]:
    """Let others who insert the same ``key`` wait for their turn, where it is no good if they all wait for its index.

    Of those which InnoDB lets wait there for a transaction that is then rolled back, each is given a lock on the gap,
    and all but one end in a deadlock. This line is not kept for ever, as InnoDB does not look at it for deadlocks.
    """
    if backend_of(connection) is not MYSQL:
        yield
        return
    # A lock's name is server-wide, and at most 64 long.
    name = "future_jobs:" + sha256(f"{connection.engine.url.database}:{key}".encode()).hexdigest()[:48]
    has_turn = connection.scalar(select(func.get_lock(name, QUEUE_SECONDS))) == 1
    try:
        yield
    finally:
        if has_turn:
            with suppress(DBAPIError):  # with the connection, the lock is gone too
                connection.execute(select(func.release_lock(name)))


def is_repeatable(connection: Connection) -> bool:
    """Tell whether a plain SELECT shows what was there earlier in the transaction, whatever others have committed."""
    return _isolation(connection) in {"REPEATABLE READ", "SERIALIZABLE"}


def keeps_snapshot(connection: Connection) -> bool:
    """Tell whether a transaction here cannot write a row that others have changed since its first statement."""
    name, version = connection.dialect.name, connection.dialect.server_version_info or ()
    level = _isolation(connection)
    if name == "postgresql":
        return level in {"REPEATABLE READ", "SERIALIZABLE"}
    # innodb_snapshot_isolation, on by default since then
    return getattr(connection.dialect, "is_mariadb", False) and version >= (11, 6, 2) and level == "REPEATABLE READ"


def _isolation(connection: Connection) -> str | None:
    default = getattr(connection.dialect, "_on_connect_isolation_level", None) or connection.default_isolation_level
    return connection.get_execution_options().get("isolation_level", default)


def can_listen(engine: Engine) -> bool:
    """Tell whether the database sends notifications; raise `NotSupported` if the driver cannot wait for them."""
    if engine.dialect.name != "postgresql":
        return False
    if engine.dialect.driver != "psycopg":
        raise NotSupported(
            f"notify=True needs the driver psycopg, and this engine's is {engine.dialect.driver}; use a URL that "
            "begins with postgresql+psycopg://, or leave out notify"
        )
    return True


def received(driver: Any) -> list[str]:
    """Return, without waiting, the payloads of the notifications that have come on a connection of the driver."""
    return [each.payload for each in driver.notifies(timeout=0)]
