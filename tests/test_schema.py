"""Three roads to one schema: every test on every database at hand."""

import importlib.util
import os
import re
import subprocess
import sys
import uuid
from io import StringIO
from pathlib import Path

import pytest
from sqlalchemy import MetaData, Table, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool, StaticPool

from future_jobs import schema
from future_jobs.errors import InvalidArgument, NotSupported, SchemaError
from future_jobs.models import metadata

ROOT = Path(__file__).resolve().parent.parent
SERVERS = {
    "postgresql": ("PostgreSQL", "postgresql+psycopg://root@127.0.0.1/postgres"),
    "mariadb": ("MariaDB", "mysql+pymysql://root@127.0.0.1/test"),
    "mariadb-name": ("MariaDB", "mariadb+pymysql://root@127.0.0.1/test"),
}
TABLES = {
    *("future_jobs_scheduled_job", "future_jobs_job_failure", "future_jobs_recurring_job"),
    *("future_jobs_queue", "future_jobs_limit", "future_jobs_worker"),
}


@pytest.fixture(scope="session")
def servers():
    """The servers that answer; the reason for each that does not."""
    found = {}
    for key, (name, url) in SERVERS.items():
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        try:
            engine.connect().close()
        except OperationalError as error:
            found[key] = f"{name} does not answer on 127.0.0.1: {str(error.orig)[:80]}"
        else:
            found[key] = engine
    return found


@pytest.fixture(params=["sqlite-file", *SERVERS])
def url(request, tmp_path, servers):
    """The URL of an empty database that other connections and processes can reach."""
    if request.param == "sqlite-file":
        yield f"sqlite:///{tmp_path}/jobs.db"
        return
    server = servers[request.param]
    if isinstance(server, str):
        pytest.skip(server)
    name = f"fj_schema_{uuid.uuid4().hex[:12]}"
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield server.url.set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")


@pytest.fixture
def empty_engine(url):
    engine = create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def memory():
    engine = create_engine("sqlite://")
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path}/jobs.db"


CATALOGUE = {
    "sqlite": ["SELECT type, name, tbl_name, sql FROM sqlite_master WHERE tbl_name != 'alembic_version'"],
    "postgresql": [
        "SELECT indexdef FROM pg_indexes WHERE tablename ~ '^future_jobs_'",
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conname ~ 'future_jobs_'",
        "SELECT sequencename, data_type FROM pg_sequences",
        "SELECT column_name, generation_expression FROM information_schema.columns WHERE table_name ~ '^future_jobs_'",
    ],
}


def tables_of(engine):
    return {name for name in inspect(engine).get_table_names() if not name.startswith("sqlite_")}


def described(engine):
    """Everything that a database says about its tables, as lines; equal texts are equal schemas."""
    inspector, lines = inspect(engine), []
    for table in sorted(tables_of(engine) - {"alembic_version"}):
        lines += [f"{table}.{column['name']}: {column}" for column in inspector.get_columns(table)]
        lines.append(f"{table} pk: {inspector.get_pk_constraint(table)}")
        lines += [f"{table} fk: {key}" for key in inspector.get_foreign_keys(table)]
        lines += sorted(f"{table} unique: {key}" for key in inspector.get_unique_constraints(table))
        lines += sorted(f"{table} index: {index}" for index in inspector.get_indexes(table))
    with engine.connect() as connection:
        tables = sorted(tables_of(engine) - {"alembic_version"})
        queries = CATALOGUE.get(engine.dialect.name) or [f"SHOW CREATE TABLE {table}" for table in tables]
        for query in queries:
            lines += sorted(normal(" ".join(map(str, row))) for row in connection.exec_driver_sql(query))
    return [re.sub(r"<.*? at 0x\w+>|0x\w+", "", line) for line in lines]


def normal(text):
    """One line without the differences that mean nothing: white space, and the order in which keys were made.

    A column that was added to an SQLite table stands in its text after the keys.
    """
    if text.startswith("table "):
        head, _, body = " ".join(text.split()).partition("(")
        return f"{head}({','.join(sorted(part.strip() for part in body.removesuffix(')').split(',')))})"
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    columns = [line for line in lines if "KEY `" not in line]
    return " ".join(" ".join([*columns, *sorted(set(lines) - set(columns))]).split())


def statements_of(script):
    lines = (line for line in script.splitlines() if not line.startswith("--"))
    statements = (part.strip() for part in re.split(r";\s*(?:\n|$)", "\n".join(lines)))
    return [part for part in statements if part and part not in {"BEGIN", "COMMIT"}]


def execute(engine, script):
    with engine.begin() as connection:
        for statement in statements_of(script):
            connection.exec_driver_sql(statement.replace("%", "%%"))


def by_migrations(engine):
    schema.upgrade(engine)


def by_sql(engine):
    execute(engine, schema.sql(engine.url))


def by_upgrade_output(engine):
    output = StringIO()
    schema.upgrade(engine, output=output)
    execute(engine, output.getvalue())


def by_create_all(engine):
    metadata.create_all(engine)
    schema.upgrade(engine)


ROADS = [by_migrations, by_sql, by_upgrade_output, by_create_all]


# --- one schema, whichever road ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
def test_every_road_gives_the_same_schema(empty_engine, road):
    schema.create_tables(empty_engine)
    expected = described(empty_engine)
    schema.downgrade(empty_engine, "base")
    assert tables_of(empty_engine) == set()

    road(empty_engine)

    found = described(empty_engine)
    assert [f"only by {road.__name__}: {line}" for line in found if line not in expected] == []
    assert [f"only by create_tables: {line}" for line in expected if line not in found] == []
    assert found == expected
    schema.check(empty_engine)
    assert schema.drift(empty_engine) == []


def test_the_description_sees_collation_predicates_and_generated_columns(empty_engine):
    schema.create_tables(empty_engine)
    found = "\n".join(described(empty_engine))
    assert "unique_until" in found
    assert "ON DELETE CASCADE" in found
    expected = {"sqlite": "AUTOINCREMENT", "postgresql": "WHERE ((status)::text = 'scheduled'::text)"}
    assert expected.get(empty_engine.dialect.name, "COLLATE=utf8mb4_bin") in found


def test_create_tables_makes_the_tables_and_notes_the_revision(empty_engine):
    schema.create_tables(empty_engine)
    assert tables_of(empty_engine) == {*TABLES, schema.VERSION_TABLE} == {*metadata.tables, schema.VERSION_TABLE}
    assert schema.current(empty_engine) == schema.HEAD
    schema.check(empty_engine)


@pytest.mark.parametrize("first", [schema.create_tables, schema.upgrade])
@pytest.mark.parametrize("second", [schema.create_tables, schema.upgrade])
def test_the_roads_mix_in_any_order_and_keep_the_rows(empty_engine, first, second):
    first(empty_engine)
    insert_rule(empty_engine)
    second(empty_engine)
    assert schema.current(empty_engine) == schema.HEAD
    assert count(empty_engine, "future_jobs_recurring_job") == 1


def test_base_leaves_a_clean_database(empty_engine):
    schema.upgrade(empty_engine)
    schema.downgrade(empty_engine, "base")
    assert tables_of(empty_engine) == set()
    assert schema.current(empty_engine) is None
    schema.downgrade(empty_engine, "base")
    schema.upgrade(empty_engine)
    schema.check(empty_engine)


def test_upgrade_never_goes_down_and_downgrade_never_up(empty_engine):
    schema.downgrade(empty_engine, "head")
    assert tables_of(empty_engine) == set()
    schema.create_tables(empty_engine)
    schema.upgrade(empty_engine, "base")
    assert schema.current(empty_engine) == schema.HEAD


def test_upgrade_with_output_only_reads(empty_engine):
    output = StringIO()
    schema.upgrade(empty_engine, output=output)
    assert "CREATE TABLE future_jobs_scheduled_job" in output.getvalue()
    assert tables_of(empty_engine) == set()

    schema.create_tables(empty_engine)
    output = StringIO()
    schema.upgrade(empty_engine, output=output)
    assert statements_of(output.getvalue()) == []


def test_each_revision_keeps_the_rows_on_the_way_up_and_down(empty_engine):
    schema.upgrade(empty_engine, "0001")
    insert_job(empty_engine)
    at_first = described(empty_engine)
    schema.upgrade(empty_engine)
    expected = described(empty_engine)
    with empty_engine.begin() as connection:
        job = connection.exec_driver_sql("SELECT callable_name, rate_limit, limited FROM future_jobs_scheduled_job")
        assert [tuple(row) for row in job] == [("a.b", None, False)]
        connection.exec_driver_sql("UPDATE future_jobs_scheduled_job SET limited = '1', rate_limit = '1/s'")
    schema.downgrade(empty_engine, "0001")
    assert described(empty_engine) == at_first
    assert count(empty_engine, "future_jobs_scheduled_job") == 1
    schema.upgrade(empty_engine)
    assert described(empty_engine) == expected
    assert count(empty_engine, "future_jobs_scheduled_job") == 1
    schema.check(empty_engine)


def test_a_process_of_the_version_before_may_go_on_writing_jobs(empty_engine):
    schema.create_tables(empty_engine)
    insert_job(empty_engine)
    with empty_engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT limited FROM future_jobs_scheduled_job").scalars().all() == [False]


# --- whose transaction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
def test_a_connection_keeps_its_transaction(empty_engine, road):
    with empty_engine.connect() as connection:
        transaction = connection.begin()
        road(connection)
        assert connection.in_transaction()
        schema.check(connection)
        transaction.rollback()
    commits_ddl_by_itself = empty_engine.dialect.name in {"mysql", "mariadb"}
    assert tables_of(empty_engine) == ({*TABLES, schema.VERSION_TABLE} if commits_ddl_by_itself else set())

    with empty_engine.begin() as connection:
        road(connection)
    schema.check(empty_engine)
    assert schema.drift(empty_engine) == []


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
def test_an_engine_in_autocommit_will_do(url, road):
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    road(engine)
    schema.check(engine)
    with engine.connect() as connection:
        road(connection)
        schema.downgrade(connection, "base")
    assert tables_of(engine) == set()
    with engine.connect() as connection:
        road(connection)
    schema.check(engine)
    with create_engine(url, poolclass=NullPool).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        schema.downgrade(connection, "base")
    assert tables_of(engine) == set()
    engine.dispose()


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
def test_an_engine_that_begins_explicitly_will_do(sqlite_url, road, begin):
    engine = begin_explicitly(create_engine(sqlite_url), begin)
    road(engine)
    schema.check(engine)
    with engine.begin() as connection:
        schema.downgrade(connection, "base")
        road(connection)
    schema.check(engine)
    engine.dispose()


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
@pytest.mark.parametrize("options", [{}, {"poolclass": StaticPool}, {"isolation_level": "AUTOCOMMIT"}])
def test_a_database_in_memory_will_do(road, options):
    engine = create_engine("sqlite://", **options)
    road(engine)
    schema.check(engine)
    with engine.connect() as connection:
        schema.downgrade(connection, "base")
        road(connection)
        connection.commit()
    schema.check(engine)
    engine.dispose()


def test_the_levels_of_an_engine_are_as_before(empty_engine):
    with empty_engine.connect() as connection:
        before = connection.get_isolation_level()
    schema.create_tables(empty_engine)
    schema.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert connection.get_isolation_level() == before


def test_an_async_connection_runs_it(sqlite_url):
    pytest.importorskip("aiosqlite")
    pytest.importorskip("greenlet")
    import asyncio

    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(make_url(sqlite_url).set(drivername="sqlite+aiosqlite"))

    async def main():
        with pytest.raises(InvalidArgument, match="run_sync"):
            schema.create_tables(engine)
        async with engine.begin() as connection:
            await connection.run_sync(schema.create_tables)
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)
            await connection.run_sync(schema.check)
        await engine.dispose()

    asyncio.run(main())


# --- many at once -----------------------------------------------------------------------------------------------------

RACER = """
import sys
from sqlalchemy import create_engine, event
from future_jobs import schema
kind, url, begin = sys.argv[1:]
engine = create_engine(url)
if begin:
    @event.listens_for(engine, "connect")
    def plain(connection, record):
        connection.isolation_level = None
    @event.listens_for(engine, "begin")
    def explicit(connection):
        connection.exec_driver_sql(begin)
if kind == "upgrade":
    import alembic.autogenerate
print("ready", flush=True)
for line in sys.stdin:
    if kind == "connection":
        with engine.begin() as connection:
            schema.create_tables(connection)
    else:
        getattr(schema, kind)(engine)
    schema.check(engine)
    print("done", flush=True)
"""


def test_many_processes_may_do_it_at_once(url):
    race(url)


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
def test_many_processes_that_begin_explicitly_may_do_it_at_once(sqlite_url, begin):
    race(sqlite_url, begin)


def race(url, begin=""):
    kinds = ["create_tables", "upgrade", "connection"]
    engine = create_engine(url, poolclass=NullPool)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, kinds[number % len(kinds)], url, begin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in range(6)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n", racer.stderr.read()
        for _ in range(4):
            for racer in racers:
                racer.stdin.write("go\n")
                racer.stdin.flush()
            for racer in racers:
                assert racer.stdout.readline() == "done\n", racer.stderr.read()
            assert count(engine, schema.VERSION_TABLE) == 1
            assert schema.drift(engine) == []
            schema.downgrade(engine, "base")
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_the_lock_goes_when_the_work_fails(empty_engine):
    with pytest.raises(ZeroDivisionError), schema.exclusive(empty_engine):
        1 / 0
    other = create_engine(empty_engine.url, poolclass=NullPool)
    schema.create_tables(other)
    schema.check(empty_engine)


# --- what is there already --------------------------------------------------------------------------------------------


def test_tables_of_create_all_are_taken_over_with_their_rows(empty_engine):
    metadata.create_all(empty_engine)
    insert_rule(empty_engine)
    with pytest.raises(SchemaError, match=r"carry no revision; run `future-jobs db upgrade`"):
        schema.check(empty_engine)
    schema.upgrade(empty_engine)
    schema.check(empty_engine)
    assert count(empty_engine, "future_jobs_recurring_job") == 1


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
def test_what_was_begun_and_not_finished_is_finished(empty_engine, road):
    schema.create_tables(empty_engine)
    expected = described(empty_engine)
    reflected = MetaData()
    jobs = Table("future_jobs_recurring_job", reflected, autoload_with=empty_engine)
    next(index for index in jobs.indexes if index.name == "ix_future_jobs_next_run").drop(empty_engine)
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE future_jobs_job_failure")
        connection.exec_driver_sql(f"DROP TABLE {schema.VERSION_TABLE}")

    road(empty_engine)

    assert sorted(described(empty_engine)) == sorted(expected)
    schema.check(empty_engine)


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
def test_a_table_that_was_dropped_is_made_again(empty_engine, road):
    schema.create_tables(empty_engine)
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE future_jobs_job_failure")
    with pytest.raises(SchemaError, match="future_jobs_job_failure; run `future-jobs db upgrade`"):
        schema.check(empty_engine)
    road(empty_engine)
    schema.check(empty_engine)


@pytest.mark.parametrize("road", [schema.create_tables, schema.upgrade])
def test_foreign_tables_of_the_same_name_are_refused_untouched(empty_engine, road):
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE future_jobs_job_failure (id INTEGER PRIMARY KEY, note INTEGER)")
    with pytest.raises(SchemaError, match=r"its columns are not those of .*attempt.*rename or drop it"):
        road(empty_engine)
    assert TABLES & tables_of(empty_engine) == {"future_jobs_job_failure"}


def test_check_names_the_command_when_there_is_nothing(empty_engine):
    with pytest.raises(SchemaError, match=r"no future_jobs tables in .*run `future-jobs db upgrade`"):
        schema.check(empty_engine)
    assert schema.current(empty_engine) is None
    assert tables_of(empty_engine) == set()


def test_check_names_the_command_when_the_tables_are_older(empty_engine):
    schema.create_tables(empty_engine)
    set_version(empty_engine, "0000")
    for attempt in (schema.check, schema.create_tables):
        with pytest.raises(SchemaError, match=r"revision 0000, older than .*run `future-jobs db upgrade`"):
            attempt(empty_engine)


def test_tables_of_a_newer_library_are_left_alone(empty_engine):
    schema.create_tables(empty_engine)
    set_version(empty_engine, "9999")
    for attempt in (schema.check, schema.create_tables, schema.upgrade, lambda bind: schema.downgrade(bind, "base")):
        with pytest.raises(SchemaError, match=r"revision 9999, newer than .*upgrade the package"):
            attempt(empty_engine)
    assert TABLES < tables_of(empty_engine)


def test_two_revisions_at_once_are_an_error(empty_engine):
    schema.create_tables(empty_engine)
    with empty_engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO {schema.VERSION_TABLE} VALUES ('0000')")
    with pytest.raises(SchemaError, match="2 rows"):
        schema.current(empty_engine)


def test_no_message_shows_a_password(url):
    if "postgresql" not in url:
        pytest.skip("only a server that trusts its host takes any password")
    engine = create_engine(make_url(url).set(password="hunter2"))
    with pytest.raises(SchemaError) as caught:
        schema.check(engine)
    engine.dispose()
    assert "hunter2" not in str(caught.value)
    assert ":***@" in str(caught.value)


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_names_each_difference(empty_engine):
    schema.create_tables(empty_engine)
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE future_jobs_job_failure ADD COLUMN note INTEGER")
        connection.exec_driver_sql("CREATE INDEX ix_extra ON future_jobs_recurring_job (timezone)")
        connection.exec_driver_sql("CREATE TABLE something_else (id INTEGER PRIMARY KEY)")
        on = " ON future_jobs_scheduled_job" if empty_engine.dialect.name in {"mysql", "mariadb"} else ""
        connection.exec_driver_sql(f"DROP INDEX ix_future_jobs_content{on}")
    assert sorted(schema.drift(empty_engine)) == [
        "column future_jobs_job_failure.note should not be there",
        "index future_jobs_recurring_job.ix_extra should not be there",
        "index future_jobs_scheduled_job.ix_future_jobs_content is missing",
    ]


def test_drift_sees_a_type_and_a_null(empty_engine):
    if empty_engine.dialect.name == "sqlite":
        pytest.skip("SQLite cannot alter a column")
    schema.create_tables(empty_engine)
    with empty_engine.begin() as connection:
        if empty_engine.dialect.name == "postgresql":
            connection.exec_driver_sql("ALTER TABLE future_jobs_job_failure ALTER worker TYPE varchar(20)")
            connection.exec_driver_sql("ALTER TABLE future_jobs_job_failure ALTER worker SET NOT NULL")
        else:
            connection.exec_driver_sql("ALTER TABLE future_jobs_job_failure MODIFY worker varchar(20) NOT NULL")
    found = schema.drift(empty_engine)
    assert any(line.startswith("future_jobs_job_failure.worker: type is VARCHAR") for line in found), found
    assert "future_jobs_job_failure.worker: nullable is False, should be True" in found


def test_drift_names_missing_tables(memory):
    assert "table future_jobs_scheduled_job is missing" in schema.drift(memory)


# --- SQL for somebody else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "database",
    [
        "sqlite",
        "postgresql",
        "mysql",
        "mariadb",
        "postgresql+psycopg2://host/db",
        "mysql+mysqldb",
        make_url("sqlite://"),
    ],
)
def test_sql_needs_neither_database_nor_driver(database):
    script = schema.sql(database)
    for table in (*TABLES, schema.VERSION_TABLE):
        assert f"{table} (" in script
    assert script.count(f"INSERT INTO {schema.VERSION_TABLE} (version_num) VALUES ('0001')") == 1
    assert f"UPDATE {schema.VERSION_TABLE} SET version_num='{schema.HEAD}'" in script


def test_sql_is_one_transaction_where_that_is_possible():
    assert schema.sql("postgresql").startswith("BEGIN;")
    assert schema.sql("sqlite").rstrip().endswith("COMMIT;")
    assert "BEGIN;" not in schema.sql("mysql")


def test_sql_from_where_one_is_already_is_empty():
    assert statements_of(schema.sql("sqlite", since=schema.HEAD)) == []


@pytest.mark.parametrize("database", ["nonsense", "", "nonsense://x/y", "what is this"])
def test_sql_refuses_what_is_no_database(database):
    with pytest.raises(InvalidArgument, match="neither a database URL nor the name of a dialect"):
        schema.sql(database)


def test_sql_refuses_other_databases():
    with pytest.raises(NotSupported, match="oracle is not supported"):
        schema.sql("oracle")


@pytest.mark.parametrize("call", [schema.upgrade, schema.downgrade])
def test_an_unknown_revision_is_named_with_those_that_exist(memory, call):
    with pytest.raises(SchemaError, match="no revision 'nope'; there are 0001, 0002"):
        call(memory, "nope")


@pytest.mark.parametrize("bind", [None, "sqlite://", 3])
def test_what_is_no_engine_is_refused(bind):
    with pytest.raises(InvalidArgument, match="must be an Engine or a Connection"):
        schema.create_tables(bind)


# --- the folder of revisions ------------------------------------------------------------------------------------------


def test_head_is_the_last_of_one_line_of_revisions():
    revisions = schema.revisions_in_order()
    assert list(revisions) == sorted(revisions)
    assert list(revisions)[-1] == schema.HEAD
    assert [script.down_revision for script in revisions.values()] == [None, *list(revisions)[:-1]]


def test_the_folder_is_found_from_anywhere(memory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    schema.upgrade(memory)
    schema.check(memory)


def test_the_version_table_is_the_one_that_alembic_makes(empty_engine, memory):
    from alembic.runtime.migration import MigrationContext

    with empty_engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        context._ensure_version_table()
    expected = described(empty_engine)
    schema.version.drop(empty_engine)
    schema.create_tables(empty_engine)
    found = described(empty_engine)
    assert [line for line in expected if line not in found] == []


def test_creating_tables_does_not_import_alembic():
    script = (
        "import sys; from future_jobs import create_tables; from sqlalchemy import create_engine;"
        "create_tables(create_engine('sqlite://')); assert not [name for name in sys.modules if 'alembic' in name]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_migrations_do_not_depend_on_todays_models():
    source = "".join(path.read_text() for path in (ROOT / "migrations" / "versions").glob("*.py"))
    assert "future_jobs.models" not in source
    assert importlib.util.find_spec("future_jobs.models") is not None


# --- arranging --------------------------------------------------------------------------------------------------------


def begin_explicitly(engine, begin):
    @event.listens_for(engine, "connect")
    def plain(connection, _record):
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def explicit(connection):
        connection.exec_driver_sql(begin)

    return engine


def insert_rule(engine):
    columns = "name, rule, anchor_at, callable_name, args, kwargs, options, catch_up, overlap, fired, missed, skipped"
    values = "'n', '@daily', '2026-01-01', 'a.b', '[]', '{}', '{}', 'latest', 'skip', 0, 0, 0"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO future_jobs_recurring_job ({columns}, created_at, updated_at) "
                f"VALUES ({values}, '2026-01-01', '2026-01-01')"
            )
        )


def insert_job(engine):
    """Insert a job with the columns of the first revision."""
    columns = "callable_name, args, kwargs, queue, priority, status, attempt, failures, max_attempts, losses, snoozes"
    values = "'a.b', '[]', '{}', 'default', 0, 'scheduled', 0, 0, 1, 0, 0"
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO future_jobs_scheduled_job ({columns}, run_at, nominal_at, created_at) "
                f"VALUES ({values}, '2026-01-01', '2026-01-01', '2026-01-01')"
            )
        )


def set_version(engine, revision):
    with engine.begin() as connection:
        connection.execute(schema.version.update().values(version_num=revision))


def count(engine, table):
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
