"""Recording a failure cannot fail, on any database."""

import threading
from contextlib import nullcontext

import pytest
from sqlalchemy import create_engine, delete, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from future_jobs import JobFailure, ScheduledJob, Scheduler, Worker, create_tables
from tests import jobs
from tests.jobs import record
from tests.test_bad_input import HARD


@pytest.mark.parametrize("name", HARD)
def test_whatever_is_raised_is_recorded_in_bounds(scheduler, session, now, calls, name):
    bad = scheduler.schedule(now, f"tests.test_bad_input.{name}", priority=1)
    scheduler.schedule(now, record)
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.failed, report.complete) == (1, 1)
    assert bad.status == "failed"
    assert 0 < len(bad.error.encode()) <= 64 * 1024
    assert "\x00" not in bad.error
    [failure] = session.scalars(select(JobFailure))
    assert failure.traceback == bad.error
    expected = {
        "raise_nul": "\\x00b",
        "raise_group": "two",
        "raise_megabytes": "bytes cut",
        "recurse": "RecursionError",
    }
    assert expected.get(name, "") in bad.error


@pytest.mark.parametrize("is_raised", [True, False])
def test_a_query_that_was_read_in_part_keeps_nobody_from_recording_the_failure(
    scheduler, session, now, kept, is_raised
):
    job = scheduler.schedule(now, "tests.jobs.fail_having_read_in_part")
    with pytest.raises(ValueError, match="in part") if is_raised else nullcontext():
        scheduler.run_due(now, ignore_errors=not is_raised)
    assert (job.status, job.error.splitlines()[-1]) == ("failed", "ValueError: in part")


def test_nor_does_it_in_a_worker(engine, scheduler, session, kept):
    job = scheduler.enqueue("tests.jobs.fail_having_read_in_part")
    session.commit()
    Worker(engine, max_jobs=1).run()
    session.refresh(job)
    assert (job.status, job.error.splitlines()[-1]) == ("failed", "ValueError: in part")


def test_the_functions_of_a_failure_keep_their_locals(scheduler, session, now, kept):
    """For whoever catches it, and trackers of errors."""
    scheduler.schedule(now, "tests.jobs.fail_having_read_in_part")
    with pytest.raises(ValueError, match="in part") as caught:
        scheduler.run_due(now)
    assert caught.traceback[-1].locals["session"] is not session


@pytest.fixture
def kept():
    yield jobs.KEPT
    jobs.KEPT.clear()


@pytest.fixture
def strict(tmp_path):
    """An engine on an SQLite file without write-ahead logging, where who reads keeps others from writing."""
    engine = create_engine(
        f"sqlite:///{tmp_path}/jobs.db", poolclass=NullPool, connect_args={"timeout": 0.2, "check_same_thread": False}
    )
    create_tables(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = DELETE")
    yield engine
    engine.dispose()


READ_IN_PART = pytest.mark.parametrize(
    ("handler", "status"),
    [
        ("read_in_part", "complete"),
        ("fail_having_read_in_part", "failed"),
        ("lose_its_connection_having_read_in_part", "failed"),
        ("give_back_its_connection_having_read_in_part", "failed"),
    ],
)


@READ_IN_PART
def test_a_query_that_was_read_in_part_keeps_nobody_from_writing(strict, kept, handler, status):
    """Whoever still has its result, an exception's traceback for one: its cursor would hold a lock."""
    with Session(strict) as session:
        job = Scheduler(session).enqueue(f"tests.jobs.{handler}")
        session.commit()
        Scheduler(session).run_due(ignore_errors=True)
        assert job.status == status
    assert len(kept) == 1
    with strict.begin() as connection:
        connection.execute(delete(ScheduledJob))


@READ_IN_PART
def test_nor_a_worker_from_recording_what_became_of_it(strict, kept, handler, status):
    with Session(strict) as session:
        job = Scheduler(session).enqueue(f"tests.jobs.{handler}")
        session.commit()
        work = threading.Thread(target=Worker(strict, max_jobs=1).run, daemon=True)
        work.start()
        work.join(20)
        session.refresh(job)
        assert job.status == status
    assert len(kept) == 1
