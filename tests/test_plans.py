"""The statements of the loop read what they need and no more, however many rows there are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session

from future_jobs import Scheduler, create_tables, limit_statements
from future_jobs import statements as st
from future_jobs.dialects import backend_of
from future_jobs.statements import Level

ROWS = 20_000
NOW = datetime.now(UTC)
PAGES = 200  # of the thousands that the table and its indexes have here
TABLE = "future_jobs_scheduled_job"


@pytest.fixture
def loaded(empty_engine):
    """Many future jobs of better priorities, many finished ones, many that are due and wait for one of their key, and a
    few that are due, run, or were abandoned.

    In a database of its own: one that is used again has dead rows, which an index scan steps over, and statistics.
    """
    engine = empty_engine
    create_tables(engine)
    shared = {"callable_name": "tests.jobs.record", "args": [], "kwargs": {}, "queue": "default", "created_at": NOW}
    future = NOW + timedelta(days=1)
    rows = [
        {**shared, "status": "scheduled", "priority": 1 + n % 10, "run_at": future, "nominal_at": future}
        for n in range(ROWS)
    ]
    rows += [{**shared, "status": "complete", "priority": 0, "run_at": NOW, "nominal_at": NOW} for _ in range(ROWS)]
    rows += [{**row, **HELD, "status": "scheduled"} for row in rows[-ROWS // 2 :]]
    with engine.begin() as connection:
        for start in range(0, len(rows), 5_000):
            connection.execute(insert(st.JOBS), rows[start : start + 5_000])
    with Session(engine) as session:
        Scheduler(session).schedule_many(NOW - timedelta(minutes=1), "tests.jobs.record", [{} for _ in range(300)])
        session.commit()
    with engine.begin() as connection:
        level = Level("default", 0, NOW - timedelta(minutes=1))
        for worker in ("the living", "the dead"):
            claimed(connection, level, worker=worker, limit=50)
    return engine


def claimed(connection, level, *, worker="me", limit=100, most_losses=9):
    return st.claim(
        connection,
        level,
        after=(level.first_at, 0),
        newest=1 << 62,
        limit=limit,
        now=NOW,
        worker=worker,
        leased_until=NOW - timedelta(minutes=1) if worker == "the dead" else NOW + timedelta(minutes=1),
        most_losses=most_losses,
    )


def due_and_limited(connection, after):
    level = Level("default", 0, HELD["run_at"], limited=True)
    found = limit_statements.due(connection, level, after=after, newest=1 << 62, without=["x"], now=NOW, limit=100)
    assert len(found) in {0, 100}
    return found


HELD = {
    "run_at": NOW - timedelta(minutes=2),
    "limited": True,
    "limited_by": "1 - key:k",
    "concurrency_key": "k",
    "concurrency_limit": 1,
}
DUE, FUTURE = Level("default", 0, NOW - timedelta(minutes=1)), Level("default", 5, NOW + timedelta(days=1))
LOOP = {
    "levels": st.levels,
    "claim": lambda connection: claimed(connection, DUE),
    "claim ahead": lambda connection: claimed(connection, DUE, most_losses=0),
    "claim where nothing is due": lambda connection: claimed(connection, FUTURE._replace(first_at=NOW)),
    "look for expired": lambda connection: st.is_any_expired(connection, FUTURE, now=NOW),
    "renew": lambda connection: st.renew(connection, "the living", NOW + timedelta(minutes=2)),
    "held by": lambda connection: st.held_by(connection, "the living"),
    "look at limited": lambda connection: due_and_limited(connection, after=(HELD["run_at"], 0)),
    "go on looking at limited": lambda connection: due_and_limited(connection, after=(NOW - timedelta(minutes=1), 0)),
    "count what runs of a key": lambda connection: limit_statements.running(connection, ["k", "l"]),
    "leases": lambda connection: st.leases(connection, before=NOW, limit=100),
}


def said_by(connection, work):
    """What ``work`` sends, with its parameters; it is undone."""
    said = []

    def hear(_, __, statement, parameters, *___):
        if not statement.startswith("SET "):
            said.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", hear)
    work(connection)
    event.remove(connection, "before_cursor_execute", hear)
    connection.rollback()
    return said


def complaints_of_sqlite(connection, statement, parameters):
    for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters):
        step = row[3]
        if "TEMP B-TREE" in step or (step.startswith(f"SCAN {TABLE}") and "INDEX" not in step):
            yield step


def complaints_of_postgresql(connection, statement, parameters):
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
    if read > PAGES + 20 * written:
        yield f"{read} pages"


def complaints_of_mysql(connection, statement, parameters):
    for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).mappings():
        if row["table"] is None:
            continue
        if row["type"] in {"ALL", "index"} or row["key"] is None or "filesort" in (row["Extra"] or ""):
            yield dict(row)


COMPLAINTS = {
    "sqlite": complaints_of_sqlite,
    "postgresql": complaints_of_postgresql,
    "mysql": complaints_of_mysql,
}


@pytest.mark.parametrize("kind", ["file", "postgresql", "mariadb"], indirect=True)
def test_the_loop_finds_its_rows_by_an_index(loaded, kind):
    complaints = COMPLAINTS[backend_of(loaded).name]
    for statistics in ("none", "fresh"):
        if statistics == "fresh":
            with loaded.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text(f"ANALYZE {'TABLE ' if kind == 'mariadb' else ''}{TABLE}"))
        for name, work in LOOP.items():
            with Session(loaded) as session:
                connection = session.connection()
                said = said_by(connection, work)
            assert said
            for statement, parameters in said:
                with loaded.connect() as connection:
                    found = list(complaints(connection, statement, parameters))
                    connection.rollback()
                assert found == [], f"{name}, with {statistics} statistics: {statement}"


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_a_look_is_never_compiled_and_the_connection_stays_as_it_was(engine):
    with engine.connect() as connection:
        setting = connection.scalar(text("SHOW jit"))
        connection.rollback()
        st.levels(connection)
        assert connection.scalar(text("SHOW jit")) == "off"
        connection.rollback()
        assert connection.scalar(text("SHOW jit")) == setting
