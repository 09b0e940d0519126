"""Recording a failure cannot fail, on any database."""

from contextlib import nullcontext

import pytest
from sqlalchemy import select

from future_jobs import JobFailure, Worker
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
def test_a_query_that_was_read_in_part_keeps_nobody_from_recording_the_failure(scheduler, session, now, is_raised):
    """The traceback holds what the handler held: on an SQLite file without write-ahead logging, a lock."""
    job = scheduler.schedule(now, "tests.jobs.read_in_part")
    with pytest.raises(ValueError, match="in part") if is_raised else nullcontext():
        scheduler.run_due(now, ignore_errors=not is_raised)
    assert (job.status, job.error.splitlines()[-1]) == ("failed", "ValueError: in part")


def test_nor_does_it_in_a_worker(engine, scheduler, session):
    job = scheduler.enqueue("tests.jobs.read_in_part")
    session.commit()
    Worker(engine, max_jobs=1).run()
    session.refresh(job)
    assert (job.status, job.error.splitlines()[-1]) == ("failed", "ValueError: in part")


def test_what_was_being_handled_already_keeps_its_locals(scheduler, now):
    def fail():
        mine = "kept"
        raise KeyError(mine)

    try:
        fail()
    except KeyError as error:
        scheduler.schedule(now, "tests.jobs.read_in_part")
        scheduler.run_due(now, ignore_errors=True)
        assert error.__traceback__.tb_next.tb_frame.f_locals == {"mine": "kept"}
