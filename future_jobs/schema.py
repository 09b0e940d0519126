"""Make the tables, and keep them at the revision this library needs.

Three roads lead to the same schema and may be mixed freely: `create_tables`, `upgrade` (the command
``future-jobs db upgrade``), and, in an application that has its own Alembic, ``op.future_jobs(...)``. Each leaves
the revision it reached in the table ``future_jobs_version``, where the others find it.

`create_tables` does not need Alembic and does not import it. Everything that runs a file of ``migrations/`` does.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, String, Table, func, inspect, literal_column, select
from sqlalchemy.engine import URL, Connection, Dialect, Engine, create_mock_engine, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable

from .dialects import MYSQL, POSTGRESQL, SQLITE, backend_of, check_version, is_missing_table, take_write_lock
from .errors import InvalidArgument, SchemaError, shown
from .models import metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alembic.operations import Operations
    from alembic.script import Script

__all__ = ["HEAD", "VERSION_TABLE", "check", "create_tables", "current", "downgrade", "drift", "sql", "upgrade"]

HEAD = "0002"  # the newest file in migrations/versions; a test compares them
VERSION_TABLE = "future_jobs_version"
LOCK_KEY = 0x_66757475_72655F6A  # "future_j"
LOCK_SECONDS = 600

version = Table(  # exactly as Alembic makes it, so that both may
    VERSION_TABLE,
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
)


def create_tables(bind: Engine | Connection) -> None:
    """Create the tables that are missing, and note the revision.

    Any number of processes may call this at once. Given an Engine, the tables are there when it returns. A Connection
    takes part in its caller's transaction, which is not committed (MySQL and MariaDB commit DDL by themselves).

    Raises `SchemaError` if there are tables of another revision: they are never altered here, see `upgrade`.
    """
    if isinstance(bind, Engine) and _is_ready(bind):
        return
    with exclusive(bind) as connection:
        found = current(connection)
        if found not in {None, HEAD}:
            raise _mismatch(connection, found)
        _build(connection, found)


def upgrade(bind: Engine | Connection, revision: str = "head", *, output: TextIO | None = None) -> None:
    """Bring the tables up to ``revision``; do nothing if they are there or beyond.

    Holds the upgrade lock, so that any number of processes may call it at once. On SQLite and PostgreSQL all steps
    are one transaction; a Connection's is left to its caller. With ``output``, the SQL of the steps is written there
    instead and the database is only read.
    """
    if output is not None:
        output.write(sql(bind.dialect, revision, since=current(bind)))
        return
    with exclusive(bind) as connection:
        found = _repaired(connection)
        with _operations(connection) as operations:
            migrate(operations, found, _resolve(revision), down=False)
        _commit_with_ddl(connection)


def downgrade(bind: Engine | Connection, revision: str) -> None:
    """Take the tables back to ``revision``, with what they lose on the way; ``"base"`` drops them all."""
    with exclusive(bind) as connection:
        found = _repaired(connection)
        with _operations(connection) as operations:
            migrate(operations, found, _resolve(revision), down=True)
        _commit_with_ddl(connection)


def current(bind: Engine | Connection) -> str | None:
    """Return the revision that the database is at; None if it has none. Writes nothing."""
    with _reading(bind) as connection:
        if not inspect(connection).has_table(VERSION_TABLE):
            return None
        found = connection.scalars(select(version.c.version_num)).all()
    if len(found) > 1:
        raise SchemaError(f"{VERSION_TABLE} has {len(found)} rows ({', '.join(sorted(found))}); it must have one")
    return found[0] if found else None


def check(bind: Engine | Connection) -> None:
    """Raise `SchemaError`, which names the command to run, unless the tables are those that this library needs."""
    with _reading(bind) as connection:
        check_version(connection)
        found, missing = current(connection), _missing(connection)
        if found != HEAD or missing:
            raise _mismatch(connection, found, missing)


def sql(database: str | URL | Dialect, revision: str = "head", *, since: str | None = None) -> str:
    """Return the SQL that leads from ``since`` (None: no tables) to ``revision``, for somebody else to run.

    ``database`` is a URL or the name of a dialect. Nothing is connected to, and no driver is needed.
    """
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415 (see the module's docstring)

    dialect = database if isinstance(database, Dialect) else _dialect(database)
    transactional = backend_of(dialect) is not MYSQL
    buffer = StringIO()
    context = MigrationContext.configure(
        dialect=dialect,
        opts={"as_sql": True, "literal_binds": True, "output_buffer": buffer, "transactional_ddl": transactional},
    )
    with _proxied(context) as operations, context.begin_transaction():
        migrate(operations, since, _resolve(revision), down=False)
    return buffer.getvalue().rstrip() + "\n"


def drift(bind: Engine | Connection) -> list[str]:
    """Return, in words, every difference between the tables and the models; an empty list if there is none.

    Tables, columns, types, defaults, constraints and indexes are compared. The predicate of a partial index and the
    expression of a generated column are not: no database gives them back as they were written.
    """
    from alembic.autogenerate import compare_metadata  # noqa: PLC0415 (see the module's docstring)
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415

    with _reading(bind) as connection:
        context = MigrationContext.configure(connection, opts=autogenerate_options(connection.engine.url))
        return [_in_words(difference) for difference in _flat(compare_metadata(context, metadata))]


# --- what the three roads share -----------------------------------------------------------------------------------


def migrations_path() -> Path:
    """Return the folder of the revisions: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "migrations", here.parent / "migrations"):
        if any(path.glob(f"versions/{HEAD}_*.py")):
            return path
    raise SchemaError(f"no migrations in {here}: future-jobs is not installed completely; install it again")


def migrate(operations: Operations, since: str | None, revision: str | None, *, down: bool) -> None:
    """Run the revisions from ``since`` to ``revision`` through ``operations``, noting each; never the other way.

    The revisions use ``alembic.op``, which must stand for ``operations``.
    """
    revisions = revisions_in_order()
    order = [None, *revisions]
    if since not in order:
        raise _newer(since)
    start, stop = order.index(since), order.index(revision)
    if down:
        for position in range(start, stop, -1):
            revisions[str(order[position])].module.downgrade()
            _note(operations, order[position], order[position - 1])
        return
    for position in range(start, stop):
        revisions[str(order[position + 1])].module.upgrade()
        _note(operations, order[position], order[position + 1])


def revisions_in_order() -> dict[str, Script]:
    """Return every revision by its id, the oldest first."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415 (see the module's docstring)

    directory = ScriptDirectory(str(migrations_path()))
    return {script.revision: script for script in reversed(list(directory.walk_revisions()))}


def within(operations: Operations, since: str | None, revision: str | None) -> None:
    """Do in another application's migration what `upgrade` and `downgrade` do by themselves.

    Offline (``--sql``) the steps are those from ``since`` to ``revision``. Online the database is asked where it
    is, so that tables which came another way are left alone.
    """
    since, revision = _resolve(since), _resolve(revision)
    order = [None, *revisions_in_order()]
    down = order.index(revision) < order.index(since)
    connection = operations.get_context().connection
    if operations.get_context().as_sql or connection is None:
        migrate(operations, since, revision, down=down)
        return
    check_version(connection)
    # SQLite's lock is its write transaction, which belongs to the application's migration.
    with nullcontext() if backend_of(connection) is SQLITE else _locked(connection):
        migrate(operations, _repaired(connection), revision, down=down)
        _commit_with_ddl(connection)


def autogenerate_options(url: URL) -> dict[str, Any]:
    """Return the options with which Alembic compares a database with `metadata`, and with nothing else."""
    made: set[str | None] = set()  # the indexes that this kind of database gets, which Alembic does not ask

    def note(statement: Any, *_: Any, **__: Any) -> None:
        if isinstance(statement, CreateIndex):
            made.add(statement.element.name)

    metadata.create_all(create_mock_engine(url, note), checkfirst=False)

    def include_name(name: str | None, kind: str, _parents: Any) -> bool:
        return kind != "table" or name in metadata.tables

    def include_object(item: Any, name: str | None, kind: str, reflected: bool, compared: Any) -> bool:
        if kind == "index":
            return reflected or name in made
        return kind != "column" or compared is None or item.computed is None

    return {
        "target_metadata": metadata,
        "version_table": VERSION_TABLE,
        "include_name": include_name,
        "include_object": include_object,
        "compare_type": True,
        "compare_server_default": True,
    }


@contextmanager
def exclusive(bind: Engine | Connection) -> Iterator[Connection]:
    """Yield a Connection that holds the upgrade lock; commit at the end if it was made here."""
    if isinstance(bind, Connection):
        check_version(bind)
        with _locked(bind):
            yield bind
        return
    with _connected(bind) as connection:
        check_version(connection)
        with _locked(connection):
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()


@contextmanager
def _connected(engine: Engine) -> Iterator[Connection]:
    if not isinstance(engine, Engine):
        raise InvalidArgument(
            f"bind must be an Engine or a Connection, not {shown(engine)}; from an AsyncEngine, "
            "`async with engine.begin() as connection: await connection.run_sync(create_tables)`",
            argument="bind",
            value=engine,
        )
    with engine.connect() as connection:
        level = backend_of(engine).isolation_level or ("SERIALIZABLE" if _is_autocommit(connection) else None)
        yield connection.execution_options(isolation_level=level) if level else connection


def _reading(bind: Engine | Connection) -> AbstractContextManager[Connection]:
    return nullcontext(bind) if isinstance(bind, Connection) else _connected(bind)


def _is_autocommit(connection: Connection) -> bool:
    chosen = connection.get_execution_options().get("isolation_level")
    return (chosen or getattr(connection.dialect, "_on_connect_isolation_level", None)) == "AUTOCOMMIT"


# --- the upgrade lock ---------------------------------------------------------------------------------------------


def _locked(connection: Connection) -> AbstractContextManager[None]:
    return _LOCKS[backend_of(connection).name](connection)


@contextmanager
def _sqlite_lock(connection: Connection) -> Iterator[None]:
    _take_write_lock(connection)
    if not _is_autocommit(connection):
        yield
        return
    try:
        yield
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def _take_write_lock(connection: Connection) -> None:
    """Take SQLite's write lock before anything is read; `dialects.take_write_lock` needs the tables for it."""
    begun: Any = connection.connection.driver_connection
    if not connection.in_transaction() and not begun.in_transaction:
        connection.begin()
        if begun.in_transaction:  # the engine begins explicitly, and deferred transactions can deadlock
            connection.exec_driver_sql("ROLLBACK")
    if not begun.in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    try:
        take_write_lock(connection)
    except OperationalError as error:
        if not is_missing_table(error):
            raise
        connection.execute(CreateTable(version, if_not_exists=True))  # a write that needs no table


@contextmanager
def _postgresql_lock(connection: Connection) -> Iterator[None]:
    if not _is_autocommit(connection):
        connection.execute(select(func.pg_advisory_xact_lock(LOCK_KEY)))  # ends with the transaction, as it must
        yield
        return
    connection.execute(select(func.pg_advisory_lock(LOCK_KEY)))
    try:
        yield
    finally:
        connection.execute(select(func.pg_advisory_unlock(LOCK_KEY)))


@contextmanager
def _mysql_lock(connection: Connection) -> Iterator[None]:
    name = func.concat("future_jobs:", func.md5(func.database()))  # a lock's name is server-wide, and at most 64 long
    if connection.scalar(select(func.get_lock(name, LOCK_SECONDS))) != 1:
        raise SchemaError(f"another process has held the upgrade lock for {LOCK_SECONDS} seconds")
    try:
        yield
    finally:
        with suppress(DBAPIError):  # with the connection, the lock is gone too
            connection.execute(select(func.release_lock(name)))


_LOCKS: dict[str, Callable[[Connection], AbstractContextManager[None]]] = {
    SQLITE.name: _sqlite_lock,
    POSTGRESQL.name: _postgresql_lock,
    MYSQL.name: _mysql_lock,
}


def _commit_with_ddl(connection: Connection) -> None:
    """Where DDL commits by itself, commit the revision with it: the lock is about to go."""
    if backend_of(connection) is MYSQL:
        connection.exec_driver_sql("COMMIT")


# --- making and noting --------------------------------------------------------------------------------------------


def _is_ready(engine: Engine) -> bool:
    with _connected(engine) as connection:
        return current(connection) == HEAD and not _missing(connection)


def _missing(connection: Connection) -> list[str]:
    inspector = inspect(connection)
    return [table.name for table in metadata.sorted_tables if not inspector.has_table(table.name)]


def _repaired(connection: Connection) -> str | None:
    """Return the database's revision, after finishing what was begun.

    Tables without a revision were made by ``metadata.create_all``, or by a process that was killed half-way on a
    database whose DDL commits by itself. A table may also have been dropped by hand.
    """
    found = current(connection)
    missing = _missing(connection)
    untouched = found is None and len(missing) == len(metadata.tables)
    if untouched or found not in {None, HEAD} or (found == HEAD and not missing):
        return found
    _build(connection, found)
    return HEAD


def _build(connection: Connection, found: str | None) -> None:
    """Create what is missing, and note the revision if there is none."""
    missing = _missing(connection)
    old = [table for table in metadata.sorted_tables if table.name not in missing]
    if found is None:
        for table in old:
            _refuse_other_columns(connection, table)
    for table in metadata.sorted_tables:
        table.create(connection, checkfirst=True)
    if found is None:
        for table in old:
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                index.create(connection, checkfirst=True)
        version.create(connection, checkfirst=True)
        connection.execute(version.insert().inline().values(version_num=HEAD))
    if found is None or missing:
        _commit_with_ddl(connection)


def _refuse_other_columns(connection: Connection, table: Table) -> None:
    have = {column["name"] for column in inspect(connection).get_columns(table.name)}
    want = {column.name for column in table.columns}
    if have != want:
        raise SchemaError(
            f"{table.name} exists without a revision in {VERSION_TABLE}, and its columns are not those of {HEAD} "
            f"({', '.join(sorted(have ^ want))}); rename or drop it, then run `future-jobs db upgrade`"
        )


def _note(operations: Operations, before: str | None, after: str | None) -> None:
    """Write ``after`` into the version table, which exists between the first revision and the last."""
    if after is None:
        operations.execute(DropTable(version))
        return
    value: dict[Any, Any] = {version.c.version_num: literal_column(f"'{after}'")}
    if before is None:
        operations.execute(CreateTable(version, if_not_exists=True))
        operations.execute(version.insert().inline().values(value))
        return
    operations.execute(version.update().values(value))


def _resolve(revision: str | None) -> str | None:
    if revision in {None, "base"}:
        return None
    known = list(revisions_in_order())
    if revision == "head":
        return known[-1]
    if revision not in known:
        raise SchemaError(f"there is no revision {shown(revision)}; there are {', '.join(known)}, 'head' and 'base'")
    return revision


_proxy = threading.Lock()  # alembic.op is one per process


@contextmanager
def _proxied(context: Any) -> Iterator[Operations]:
    from alembic.operations import Operations  # noqa: PLC0415 (see the module's docstring)

    with _proxy, Operations.context(context) as operations:
        yield operations


@contextmanager
def _operations(connection: Connection) -> Iterator[Operations]:
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415 (see the module's docstring)

    with _proxied(MigrationContext.configure(connection)) as operations:
        yield operations


def _dialect(database: str | URL) -> Dialect:
    try:
        url = make_url(database if isinstance(database, URL) or ":" in database else f"{database}://")
        return url.get_dialect()()
    except Exception as error:
        raise InvalidArgument(
            f"{shown(database)} is neither a database URL nor the name of a dialect, such as 'sqlite' "
            "or 'postgresql+psycopg'",
            argument="database",
            value=database,
        ) from error


# --- words --------------------------------------------------------------------------------------------------------


def _mismatch(connection: Connection, found: str | None, missing: list[str] | None = None) -> SchemaError:
    where = connection.engine.url.render_as_string(hide_password=True)
    if found is not None and not found < HEAD:
        if found != HEAD:
            return _newer(found)
        return SchemaError(f"tables are missing in {where}: {', '.join(missing or ())}; run `future-jobs db upgrade`")
    if found is not None:
        return SchemaError(
            f"the tables in {where} are at revision {found}, older than {HEAD}, which this version of future_jobs "
            "needs; run `future-jobs db upgrade`"
        )
    if missing is not None and len(missing) < len(metadata.tables):
        return SchemaError(f"the tables in {where} carry no revision; run `future-jobs db upgrade`")
    return SchemaError(f"there are no future_jobs tables in {where}; run `future-jobs db upgrade`")


def _newer(found: str | None) -> SchemaError:
    return SchemaError(
        f"the tables are at revision {found}, newer than {HEAD}, the last that this version of future_jobs knows; "
        "upgrade the package: `future-jobs db upgrade` of this version cannot go back"
    )


def _flat(differences: Any) -> Iterator[tuple[Any, ...]]:
    for difference in differences:
        if isinstance(difference, list):
            yield from difference
        else:
            yield difference


def _in_words(difference: tuple[Any, ...]) -> str:
    kind, *details = difference
    if kind.startswith("modify_"):
        _schema, table, column, _existing, old, new = details
        return f"{table}.{column}: {kind.removeprefix('modify_')} is {old}, should be {new}"
    verb, _, noun = kind.partition("_")
    subject = details[-1]
    table = getattr(getattr(subject, "table", None), "name", None) or (details[1] if len(details) > 1 else None)
    name = f"{table}.{subject.name}" if table else subject.name
    return f"{noun} {name} {'is missing' if verb == 'add' else 'should not be there'}"
