"""The statements of the loop read what they need and no more, however many rows there are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.orm import Session

from future_jobs import (
    ScheduledJob,
    Scheduler,
    bulk,
    claim_statements,
    create_tables,
    limit_statements,
    unique_statements,
)
from future_jobs import statements as st
from future_jobs.dialects import backend_of
from future_jobs.sources import own_engine
from future_jobs.statements import Level, Token

NOW = datetime.now(UTC)
TABLE = "future_jobs_scheduled_job"
QUEUES, PRIORITIES = 20, 10
SEED = 10_000  # rows that are sent; from there on the database doubles them


@pytest.fixture
def loaded(empty_engine, request):
    """Many future jobs of better priorities, many finished ones, and a few that are due, run, or were abandoned.

    In a database of its own: one that is used again has dead rows, which an index scan steps over, and statistics.
    These are those of a small table.
    """
    engine, wanted = empty_engine, request.config.getoption("--plan-rows")
    create_tables(engine)
    shared = {"callable_name": "tests.jobs.record", "args": [], "kwargs": {}, "created_at": NOW}
    future, finished = (
        [
            {
                **shared,
                "queue": f"queue {n % QUEUES}" if n % QUEUES else "default",
                "priority": n // QUEUES % PRIORITIES + better,
                "status": status,
                "run_at": at,
                "nominal_at": at,
            }
            for n in range(SEED)
        ]
        for status, at, better in (("scheduled", NOW + timedelta(days=1), 1), ("complete", NOW, 0))
    )
    with engine.begin() as connection:
        connection.execute(insert(st.JOBS), future[:50] + finished[:50])
    analyze(engine)
    with engine.begin() as connection:
        for rows in (future, finished):
            connection.execute(insert(st.JOBS), rows[50:])
        names = [*shared, "queue", "priority", "status", "run_at", "nominal_at", "attempt", "failures", "losses"]
        columns = [st.J[name] for name in [*names, "max_attempts", "snoozes"]]
        have = SEED
        while have < wanted:
            connection.execute(insert(st.JOBS).from_select(columns, select(*columns), include_defaults=False))
            have *= 2
    with Session(engine) as session:
        Scheduler(session).schedule_many(NOW - timedelta(minutes=1), "tests.jobs.record", [{} for _ in range(300)])
        session.commit()
    with engine.begin() as connection:
        level = Level("default", 0, NOW - timedelta(minutes=1))
        for worker in ("the living", "the dead"):
            claimed(connection, level, worker=worker, limit=50)
    return engine


def analyze(engine):
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"ANALYZE {'TABLE ' if engine.dialect.name == 'mysql' else ''}{TABLE}"))


def claimed(connection, level, *, worker="me", limit=100, losses=(0, 9)):
    return claim_statements.claim(
        connection,
        level,
        after=(level.first_at, 0),
        newest=1 << 62,
        limit=limit,
        now=NOW,
        worker=worker,
        leased_until=NOW - timedelta(minutes=1) if worker == "the dead" else NOW + timedelta(minutes=1),
        losses=losses,
    )


def due_and_limited(connection):
    after = (DUE.first_at, 0)
    return limit_statements.due(connection, DUE, after=after, newest=1 << 62, without=["x"], now=NOW, limit=100)


DUE, FUTURE = Level("default", 0, NOW - timedelta(minutes=1)), Level("default", 5, NOW + timedelta(days=1))
LEVELS = QUEUES * PRIORITIES + 1


def of_the_living(connection):
    found = connection.execute(
        select(ScheduledJob.id, ScheduledJob.attempt).where(st.RUNNING, ScheduledJob.leased_by == "the living")
    )
    return {Token(*row) for row in found}


# What is asked, and how many pages of the thousands that there are, or rows of an index, it may read for that.
LOOP = {
    "levels": (st.levels, 20 * LEVELS),
    "claim": (lambda connection: claimed(connection, DUE), 60),
    "claim ahead": (lambda connection: claimed(connection, DUE, losses=(0, 0)), 60),
    "claim where nothing is due": (lambda connection: claimed(connection, FUTURE._replace(first_at=NOW)), 20),
    "look for expired": (lambda connection: claim_statements.is_any_expired(connection, FUTURE, now=NOW), 20),
    "renew": (lambda connection: st.renew(connection, "the living", NOW + timedelta(minutes=2)), 60),
    "asked to stop": (lambda connection: st.asked_to_stop(connection, sorted(of_the_living(connection))[:5]), 60),
    "progress": (
        lambda connection: st.note_progress(connection, dict.fromkeys(sorted(of_the_living(connection))[:5])),
        120,
    ),
    "who has a key": (lambda connection: unique_statements.holder(connection, "a key"), 20),
    "look at limited": (lambda connection: due_and_limited(connection), 60),
    "count what runs of a key": (lambda connection: limit_statements.running(connection, ["k", "l"]), 20),
    "leases": (lambda connection: claim_statements.leases(connection, before=NOW, limit=100), 150),
}


RUN = {"status": "complete", "finished_at": NOW, "leased_by": None}
LOOP |= {
    "complete": (
        lambda connection: bulk.complete_all(connection, dict.fromkeys(of_the_living(connection), "1"), RUN),
        200,
    ),
    "hand back": (lambda connection: bulk.move_all(connection, of_the_living(connection), RUN), 200),
}


def said_by(connection, work):
    """What ``work`` sends, with its parameters; it is undone."""
    said = []

    def hear(_, __, statement, parameters, *___):
        if "set_config" not in statement:
            said.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", hear)
    work(connection)
    event.remove(connection, "before_cursor_execute", hear)
    connection.rollback()
    return said


def complaints_of_sqlite(connection, statement, parameters, most):
    for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters):
        step = row[3]
        if "TEMP B-TREE" in step or (step.startswith(f"SCAN {TABLE}") and "INDEX" not in step):
            yield step


def complaints_of_postgresql(connection, statement, parameters, most):
    st.guide(connection)
    found = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters).scalar()
    plan = (found if isinstance(found, list) else json.loads(found))[0]["Plan"]
    nodes = [plan]
    for node in nodes:
        nodes += node.get("Plans", [])
        if node["Node Type"] in {"Seq Scan", "Sort"} and node.get("Relation Name", TABLE) == TABLE:
            yield node["Node Type"]
    # What it writes costs pages as well: some for each index, for each row.
    written = sum(node["Plans"][0]["Actual Rows"] for node in nodes if node["Node Type"] == "ModifyTable")
    read = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    if read > most + 25 * written:
        yield f"{read} pages"


def complaints_of_mysql(connection, statement, parameters, most):
    for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).mappings():
        if row["table"] in {None, "item"}:  # the latter is a parameter, unfolded
            continue
        if row["type"] in {"ALL", "index"} or row["key"] is None or "filesort" in (row["Extra"] or ""):
            yield dict(row)
    connection.exec_driver_sql("FLUSH STATUS")
    result = connection.exec_driver_sql(statement, parameters)
    written = 0 if result.returns_rows else result.rowcount
    found = len(result.all()) if result.returns_rows else 0
    read = sum(int(row[1]) for row in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'"))
    if read > most + 3 * (written + found):
        yield f"{read} rows"


COMPLAINTS = {
    "sqlite": complaints_of_sqlite,
    "postgresql": complaints_of_postgresql,
    "mysql": complaints_of_mysql,
}


@pytest.mark.parametrize("kind", ["file", "postgresql", "mariadb"], indirect=True)
def test_the_loop_finds_its_rows_by_an_index(loaded, kind):
    complaints = COMPLAINTS[backend_of(loaded).name]
    for statistics in ("stale", "fresh"):
        if statistics == "fresh":
            analyze(loaded)
        for name, (work, most) in LOOP.items():
            with Session(loaded) as session:
                said = said_by(session.connection(), work)
            assert said
            for statement, parameters in said:
                with loaded.connect() as connection:
                    found = list(complaints(connection, statement, parameters, most))
                    connection.rollback()
                assert found == [], f"{name}, with {statistics} statistics: {statement}"


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_the_planner_is_guided_and_the_connection_stays_as_it_was(engine):
    with engine.connect() as connection:
        before = [connection.scalar(text(f"SHOW {name}")) for name in backend_of(engine).planner]
        connection.rollback()
        for work in (st.levels, lambda connection: claimed(connection, DUE)):
            work(connection)
            assert [connection.scalar(text(f"SHOW {name}")) for name in backend_of(engine).planner] == ["off"] * 3
            connection.rollback()
        assert [connection.scalar(text(f"SHOW {name}")) for name in backend_of(engine).planner] == before


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_a_worker_guides_it_once_for_each_of_its_own_connections(engine):
    own = own_engine(engine)
    said = []
    event.listen(own, "before_cursor_execute", lambda *args: said.append(args[2]))
    with own.connect() as connection:
        st.levels(connection)
    assert not any("set_config" in statement for statement in said)
    with own.connect() as connection:
        assert connection.scalar(text("SHOW enable_sort")) == "off"
    own.dispose()
