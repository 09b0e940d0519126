"""What a database can do. The only module that spells a dialect's name.

SQLite, PostgreSQL and MySQL/MariaDB differ in six things that matter here: how a timestamp keeps its
microseconds, which indexes may be partial, how rows are claimed without waiting, how one parameter
holds many rows, when a transaction really begins, and how an error says that trying again may help.
`Backend` answers all six.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import uniform
from time import monotonic, sleep
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    DateTime,
    Index,
    Integer,
    String,
    Text,
    cast,
    event,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy import insert as plain_insert
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection, Dialect, Engine, Transaction
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from sqlalchemy.schema import Column, Table
from sqlalchemy.sql.dml import Insert
from sqlalchemy.types import TypeDecorator, TypeEngine

from .errors import NotSupported

__all__ = [
    "DRIVERS",
    "TABLE_OPTIONS",
    "Backend",
    "BigKey",
    "Encoded",
    "JSONText",
    "LongText",
    "UTCDateTime",
    "Unreadable",
    "backend_of",
    "begin_before_savepoint",
    "claim_indexes",
    "concurrency_index",
    "configure_sqlite",
    "insert_unless_there",
    "is_guided",
    "keep_for_own",
    "partial_index",
    "prepare_for_job",
]

DRIVERS = frozenset({"sqlite3", "psycopg", "psycopg_pool", "psycopg2", "pymysql", "MySQLdb", "mysql", "mariadb"})
"""The packages that speak with a database."""

BigKey = BigInteger().with_variant(Integer(), "sqlite")  # only an INTEGER key is a rowid alias, and so autoincrements
# TEXT holds 64 KB there, less than a payload may have.
LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

TABLE_OPTIONS: dict[str, Any] = {
    "sqlite_autoincrement": True,  # a deleted job's id is never given to another
    # Keys and names are compared byte by byte, as on the other databases.
    **{
        f"{name}_{option}": value
        for name in ("mysql", "mariadb")
        for option, value in {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}.items()
    },
}


class UTCDateTime(TypeDecorator[datetime]):
    """An instant: aware datetimes in, UTC with microseconds stored, aware UTC datetimes out. Refuses naive ones."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type that keeps microseconds on ``dialect``."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TIMESTAMP(timezone=True))
        if dialect.name in {"mysql", "mariadb"}:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; without its zone where the column has none."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; instants are stored as aware datetimes only")
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return an aware UTC datetime."""
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Return what converts a parameter: in one step for SQLite, which has text, at a third of the time."""
        return _utc_as_text if _keeps_text(dialect) else super().bind_processor(dialect)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """Return what converts a column's value, in one step."""
        if _keeps_text(dialect):
            return _utc_from_text
        if dialect.name == "sqlite":
            return super().result_processor(dialect, coltype)
        return _utc_from_aware if dialect.name == "postgresql" else _utc_from_naive


def _keeps_text(dialect: Dialect) -> bool:
    return dialect.name == "sqlite" and not getattr(dialect, "native_datetime", False)


def _utc_as_text(value: datetime | Unreadable | None) -> object:
    if value is None:
        return None
    if isinstance(value, Unreadable):
        return value.value
    if value.tzinfo is None:
        raise ValueError(f"{value!r} has no time zone; instants are stored as aware datetimes only")
    return value.astimezone(UTC).isoformat(" ", "microseconds").removesuffix("+00:00")


def _utc_from_aware(value: datetime | None) -> datetime | None:
    return None if value is None else value.astimezone(UTC)


def _utc_from_naive(value: datetime | None) -> datetime | None:
    return None if value is None else value.replace(tzinfo=UTC)


def _utc_from_text(value: str | None) -> datetime | Unreadable | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value + "+00:00")
    except (ValueError, TypeError):
        return _utc_from_odd_text(value)


def _utc_from_odd_text(value: object) -> datetime | Unreadable:
    """Read what was written by hand: with an offset, without a time, or nonsense, which must stop nobody."""
    try:
        instant = datetime.fromisoformat(str(value))
        return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return Unreadable(value)


class Encoded(str):
    """JSON text that is stored as it is, where any other `str` would be encoded first."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What a column holds that should hold JSON, or a time, and does not: a row edited by hand.

    It is kept, and written back, as it is. Among times it comes first, so that the job is soon looked at, and fails.
    """

    value: object

    @property
    def text(self) -> str:
        """What the column holds, as text."""
        return str(self.value)

    def __lt__(self, other: object) -> bool:
        return not isinstance(other, Unreadable)

    def __le__(self, other: object) -> bool:
        return True

    def __gt__(self, other: object) -> bool:
        return False

    def __ge__(self, other: object) -> bool:
        return isinstance(other, Unreadable)


class JSONText(TypeDecorator[Any]):
    """JSON kept as the exact text that was written.

    Native JSON columns change what they store (MySQL turns large integers into floats and reorders keys) and raise
    on reading a damaged value; this type does neither.
    """

    impl = LongText
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Encode, unless ``value`` is `Encoded` or None."""
        if value is None or isinstance(value, Encoded):
            return value
        if isinstance(value, Unreadable):
            return value.text
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Decode; a damaged text comes back as `Unreadable`."""
        if value is None:
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return Unreadable(value)


def partial_index(name: str, *columns: str | Column[Any], where: str, unique: bool = False) -> Index:
    """Return an index on the rows that satisfy ``where``; on all rows where a database has no partial indexes."""
    return Index(name, *columns, unique=unique, postgresql_where=text(where), sqlite_where=text(where))


_HAVE_PARTIAL: dict[str, Any] = {"dialect": ("postgresql", "sqlite")}
_HAVE_NONE: dict[str, Any] = {"dialect": ("mysql", "mariadb")}


def claim_indexes() -> tuple[Index, ...]:
    """Return the index that claims use, and the one that finds running jobs.

    Without partial indexes, one index led by ``status`` serves both. Limited jobs are apart: however many of them must
    wait, a claim of others does not step over one.
    """
    due = ("limited", "queue", "priority", "run_at", "id", "limited_by")
    return (
        partial_index("ix_future_jobs_due", *due, where="status = 'scheduled'").ddl_if(**_HAVE_PARTIAL),
        partial_index("ix_future_jobs_running", "leased_by", where="status = 'running'").ddl_if(**_HAVE_PARTIAL),
        Index("ix_future_jobs_status", "status", *due).ddl_if(**_HAVE_NONE),
    )


def concurrency_index() -> Index:
    """Return the index that counts the running jobs of a key; what has no key is not in it.

    Without partial indexes there is none, since every status change of every job would pay for it: of the index led by
    ``status``, what runs and is limited is a small part.
    """
    where = "status = 'running' AND concurrency_key IS NOT NULL"
    return partial_index("ix_future_jobs_concurrency", "concurrency_key", where=where).ddl_if(**_HAVE_PARTIAL)


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


def received(driver: Any) -> bool:
    """Tell, without waiting, whether a notification has come on a connection of the driver."""
    return bool(list(driver.notifies(timeout=0)))


# --- SQLite: a file that several processes use ---------------------------------------------------------------------


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


# --- SQLite: when a transaction begins ----------------------------------------------------------------------------


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
    configured otherwise is put into that mode for the time of one job; what is returned undoes that. See
    `begin_lazily`.
    """
    if connection.dialect.name != "sqlite" or connection.in_transaction():  # the latter: somebody else's, around it all
        return None
    raw = _driver(connection)
    lazy = {"isolation_level": ""}
    if hasattr(raw, "autocommit"):  # Python 3.12
        lazy["autocommit"] = sqlite3.LEGACY_TRANSACTION_CONTROL  # type: ignore[attr-defined]
    before = {name: getattr(raw, name) for name in lazy}
    if before == lazy:
        return None

    def put(settings: dict[str, Any]) -> None:
        raw.rollback()
        for name, value in settings.items():
            setattr(raw, name, value)

    put(lazy)
    return partial(put, before)


def begin_lazily(connection: Connection) -> Transaction:
    """Begin a transaction; on SQLite undo the BEGIN that an event of the application's may have sent with it.

    A deferred BEGIN takes its snapshot at the first read, and a write after that fails at once if another process
    wrote in between.
    """
    transaction = connection.begin()
    if connection.dialect.name == "sqlite" and _in_transaction(connection):
        connection.connection.rollback()
    return transaction


# --- what an error means ------------------------------------------------------------------------------------------

_RETRY_SQLSTATES = {"40001", "40P01", "55P03", "25006", "57P01", "57P02", "57P03"}
_RETRY_MYSQL = {1205, 1213, 1020}
_RETRY_SQLITE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_lock_error(error: BaseException) -> bool:
    """Tell whether ``error`` is a deadlock, a serialization failure or a lock that was not given in time."""
    original = getattr(error, "orig", None)
    if not isinstance(error, DBAPIError) or original is None:
        return False
    if isinstance(original, sqlite3.OperationalError):
        return (getattr(original, "sqlite_errorcode", 0) & 0xFF) in _RETRY_SQLITE
    if getattr(original, "sqlstate", None) in _RETRY_SQLSTATES:
        return True
    return bool(original.args) and original.args[0] in _RETRY_MYSQL


def is_disconnect(error: BaseException) -> bool:
    """Tell whether the connection was lost; what it was doing may or may not have happened."""
    return isinstance(error, DBAPIError) and bool(error.connection_invalidated)


def is_away(error: BaseException) -> bool:
    """Tell whether the connection was lost, or none could be had."""
    if is_disconnect(error):
        return True
    # No statement and no deadlock: the server refuses the connection, or is starting, or gave up on a commit.
    return isinstance(error, OperationalError) and error.statement is None and not is_lock_error(error)


def is_missing_table(error: BaseException) -> bool:
    """Tell whether ``error`` says that a table does not exist."""
    original = getattr(error, "orig", None)
    if getattr(original, "sqlstate", None) == "42P01":
        return True
    args = getattr(original, "args", ()) or ("",)
    return args[0] == 1146 or (isinstance(error, OperationalError) and "no such table" in str(args[0]))  # noqa: PLR2004
