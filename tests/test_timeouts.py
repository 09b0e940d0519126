"""A run that takes too long is stopped, and nothing else is."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import select

from future_jobs import InvalidArgument, InvalidOption, InvalidTime, JobFailure, JobTimeout, ScheduledJob, Worker
from future_jobs.interruption import Deadlines, Interruption
from tests import stopjobs
from tests.shop import letters

SOON = "50ms"


@pytest.fixture(autouse=True)
def seen():
    stopjobs.SEEN.clear()
    return stopjobs.SEEN


def run_by_pass(engine, scheduler, jobs=1):
    scheduler.run_due(ignore_errors=True)


def run_by_worker(engine, scheduler, jobs=1):
    scheduler.session.commit()
    Worker(engine, queues={"default": 2}, max_jobs=jobs).run()
    scheduler.session.rollback()
    scheduler.session.expire_all()


# An exception that comes while Python calls a finalizer is swallowed there, and said so; it is then raised once more.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BOTH = pytest.mark.parametrize("run", [run_by_pass, run_by_worker])


@BOTH
@pytest.mark.parametrize("name", ["spin", "sleep_for_ever"])
def test_a_run_that_takes_too_long_is_a_failed_attempt(engine, scheduler, session, run, name):
    job = scheduler.enqueue(f"tests.stopjobs.{name}", timeout=SOON)
    run(engine, scheduler)
    assert (job.status, job.failures, job.leased_by) == ("failed", 1, None)
    assert "JobTimeout: it ran longer than 0.05 s" in job.error
    assert f"in {name}" in job.error  # where it was
    [failure] = session.scalars(select(JobFailure))
    assert failure.error_type == "future_jobs.errors.JobTimeout"


@BOTH
@pytest.mark.parametrize("name", ["write_and_spin", "write_and_sleep"])
def test_what_it_wrote_is_rolled_back(engine, scheduler, session, run, name):
    job = scheduler.enqueue(f"tests.stopjobs.{name}", args=["gone"], timeout=SOON)
    run(engine, scheduler)
    assert (job.status, letters(session)) == ("failed", [])


def test_the_pass_raises_it(scheduler):
    scheduler.enqueue(stopjobs.spin, timeout=timedelta(milliseconds=50))
    with pytest.raises(JobTimeout, match=r"0\.05 s") as caught:
        scheduler.run_due()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.seconds == 0.05


def test_it_is_tried_again_if_attempts_are_left(scheduler, now):
    job = scheduler.schedule(now, stopjobs.spin, timeout=SOON, max_attempts=2, backoff="1h", retry_on=TimeoutError)
    assert scheduler.run_due(now).retried == 1
    assert job.run_at == now + timedelta(hours=1)
    assert scheduler.run_due(job.run_at, ignore_errors=True).failed == 1


def test_a_callable_has_a_default_and_a_call_may_take_it_away(scheduler):
    job = scheduler.enqueue(stopjobs.spin_by_default)
    assert job.options == {"timeout": "50ms"}
    assert scheduler.run_due(ignore_errors=True).failed == 1
    assert scheduler.enqueue(stopjobs.spin_by_default, timeout=None).options is None


@pytest.mark.parametrize("name", ["count_to", "who"])
def test_one_that_is_fast_enough_notices_nothing(scheduler, name):
    job = scheduler.enqueue(f"tests.stopjobs.{name}", args=[1000] if name == "count_to" else [], timeout="1h")
    assert scheduler.run_due().complete == 1
    assert job.error is None


def test_a_handler_can_clean_up(scheduler, seen):
    scheduler.enqueue(stopjobs.clean_up, timeout=SOON)
    scheduler.enqueue("tests.stopjobs.sleep_for_ever", timeout=SOON)
    scheduler.run_due(ignore_errors=True)
    assert seen == ["cleaned up", "began", "cancelled"]


@pytest.mark.parametrize("name", ["swallow", "ignore_cancellation"])
def test_one_that_goes_on_is_late_all_the_same(scheduler, name):
    job = scheduler.enqueue(f"tests.stopjobs.{name}", timeout=SOON)
    scheduler.run_due(ignore_errors=True)
    assert (job.status, job.return_value) == ("failed", None)
    assert "JobTimeout" in job.error


def test_what_it_raises_in_the_end_is_what_is_recorded(scheduler):
    job = scheduler.enqueue(stopjobs.protest, timeout=SOON)
    scheduler.run_due(ignore_errors=True)
    assert job.error.rstrip().endswith("Told")


def test_inside_a_running_loop_too(scheduler, seen):
    scheduler.enqueue("tests.stopjobs.sleep_for_ever", timeout=SOON)

    async def endpoint():
        return scheduler.run_due(ignore_errors=True)

    assert asyncio.run(endpoint()).failed == 1
    assert seen == ["began", "cancelled"]


@BOTH
def test_one_in_the_middle_of_a_query_leaves_a_database_that_can_be_used(engine, scheduler, session, run):
    for n in range(10):
        scheduler.enqueue(stopjobs.query_for_ever, timeout=timedelta(milliseconds=10 + n))
        scheduler.enqueue("tests.jobs.write_letter", args=[f"after {n}"])
    run(engine, scheduler, jobs=20)
    assert len(letters(session)) == 10
    assert Counter(session.scalars(select(ScheduledJob.status))) == {"failed": 10, "complete": 10}
    assert {each.error_type for each in session.scalars(select(JobFailure))} == {"future_jobs.errors.JobTimeout"}


def test_an_edited_timeout_fails_that_job_only(scheduler, session):
    job = scheduler.enqueue(stopjobs.spin, timeout=SOON)
    other = scheduler.enqueue("tests.jobs.write_letter", args=["fine"])
    job.options = {"timeout": "1mo"}
    assert scheduler.run_due(ignore_errors=True).complete == 1
    assert (job.status, other.status) == ("failed", "complete")
    assert "exact duration" in job.error


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("0s", InvalidOption),
        (timedelta(0), InvalidOption),
        (timedelta(seconds=-1), InvalidOption),
        ("1mo", InvalidOption),
        ("", InvalidTime),
        ("soon", InvalidTime),
        (30, InvalidArgument),
        (True, InvalidArgument),
    ],
)
def test_what_is_no_timeout_is_refused(scheduler, session, value, error):
    with pytest.raises(error, match="timeout"):
        scheduler.enqueue(stopjobs.spin, timeout=value)
    assert session.scalars(select(ScheduledJob)).all() == []


# --- the thread, and nothing but the handler -------------------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads take turns often; but not so often that a slow machine does nothing else."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    yield
    sys.setswitchinterval(before)


def test_what_comes_after_the_handler_is_never_hit(hasty):
    """Calls that end at the very moment at which they are late: late or not, whatever follows goes on in peace."""
    deadlines, ends, strays = Deadlines(), [], []

    def work():
        try:
            for n in range(400):
                call = partial(stopjobs.count_to, 100 * n + 1) if n < 399 else stopjobs.spin
                try:
                    Interruption().limit(call, 0.0003, deadlines)
                    ends.append("in time")
                except JobTimeout:
                    ends.append("late")
                stopjobs.count_to(200)
        except BaseException as error:
            strays.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strays == []
    assert len(ends) == 1200
    assert set(ends) == {"in time", "late"}


def test_the_watch_ends_when_there_is_nothing_to_watch(monkeypatch):
    monkeypatch.setattr("future_jobs.interruption.LONGEST_LOOK", 0.01)
    deadlines = Deadlines()
    for _ in range(2):
        assert Interruption().limit(lambda: "done", 10.0, deadlines) == "done"
        watch = deadlines._thread
        if watch is not None:
            watch.join(10)
            assert not watch.is_alive()
