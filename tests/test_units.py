"""Units of work whose connection the server ends, or that wait for a lock."""

import threading
from datetime import timedelta
from secrets import token_hex
from time import monotonic

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from future_jobs import configure_sqlite, statements
from future_jobs.dialects import take_write_lock
from future_jobs.sources import own_engine
from future_jobs.units import Units


@pytest.fixture
def units(shared_kind, shared_url):
    if shared_kind == "file":
        pytest.skip("nobody can end the connection to a file")
    engine = create_engine(shared_url, pool_size=1)
    yield Units(engine)
    engine.dispose()


@pytest.fixture
def other(shared_url, units):
    engine = create_engine(shared_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def end(other, session_id):
    is_postgresql = other.dialect.name == "postgresql"
    other.execute(text("SELECT pg_terminate_backend(:id)" if is_postgresql else "KILL :id"), {"id": session_id})


def session_id(connection):
    is_postgresql = connection.dialect.name == "postgresql"
    return connection.scalar(text("SELECT pg_backend_pid()" if is_postgresql else "SELECT connection_id()"))


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_unit_is_tried_again_when_its_connection_had_been_ended_before(units, other, kind):
    end(other, units.read(session_id))
    assert getattr(units, kind)(statements.newest) == 0


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_unit_is_tried_again_when_its_connection_is_ended_meanwhile(units, other, kind):
    seen = []

    def work(connection):
        seen.append(session_id(connection))
        if len(seen) == 1:
            end(other, seen[0])
        return statements.newest(connection)

    assert getattr(units, kind)(work) == 0
    assert len(set(seen)) == 2


@pytest.mark.parametrize("way", [lambda engine: engine, own_engine], ids=["the-engine", "an-own-engine"])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_unit_sees_what_others_commit_meanwhile_whatever_the_engine_is_set_to(units, other, shared_url, kind, way):
    engine = create_engine(shared_url, isolation_level="REPEATABLE READ").execution_options(
        isolation_level="REPEATABLE READ"
    )
    used = way(engine)

    def look(connection):
        found = [connection.scalar(text("SELECT count(*) FROM shop_letter"))]
        other.execute(text("INSERT INTO shop_letter (text) VALUES (:text)"), {"text": token_hex(8)})
        return [*found, connection.scalar(text("SELECT count(*) FROM shop_letter"))]

    assert getattr(Units(used), kind)(look) == [0, 1]
    with engine.connect() as connection:
        assert look(connection) == [1, 1]
    used.dispose()
    engine.dispose()


@pytest.fixture
def locked(tmp_path):
    """A connection that waits for locks no longer than it was told to, and one that has SQLite's only one."""
    engine = configure_sqlite(create_engine(f"sqlite:///{tmp_path}/shop.db"), timeout=timedelta(seconds=0.2))
    with engine.connect() as connection, engine.connect() as holder:
        holder.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection, holder
    engine.dispose()


def test_the_write_lock_is_waited_for_no_longer_than_the_engine_says(locked):
    connection, _ = locked
    began = monotonic()
    with connection.begin(), pytest.raises(OperationalError, match="locked"):
        take_write_lock(connection)
    assert monotonic() - began >= 0.2
    assert connection.scalar(text("PRAGMA busy_timeout")) == 200


def test_the_write_lock_is_taken_once_it_is_free(locked):
    connection, holder = locked
    connection.exec_driver_sql("PRAGMA busy_timeout = 20000")
    taken = threading.Event()

    def take():
        with connection.begin():
            take_write_lock(connection)
            taken.set()

    connection.rollback()
    thread = threading.Thread(target=take)
    thread.start()
    assert not taken.is_set()
    holder.rollback()
    assert taken.wait(20)
    thread.join()
    assert connection.scalar(text("PRAGMA busy_timeout")) == 20_000
