"""A running job that is cancelled learns of it, and is not run again."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from future_jobs import ScheduledJob, Scheduler, Worker, events
from tests import stopjobs
from tests.processes import start, together
from tests.shop import letters


@pytest.fixture(autouse=True)
def stage(monkeypatch):
    monkeypatch.setattr(stopjobs, "SEEN", [])
    monkeypatch.setattr(stopjobs, "BEGAN", threading.Event())
    monkeypatch.setattr(stopjobs, "MAY_END", threading.Event())
    yield
    stopjobs.MAY_END.set()


@pytest.fixture
def heard():
    heard: list = []
    listeners = [(name, events.listen(name, lambda name=name, **data: heard.append(name))) for name in events.EVENTS]
    yield heard
    for name, listener in listeners:
        events.unlisten(name, listener)


@pytest.fixture
def parallel(engine):
    if isinstance(engine.pool, StaticPool):
        pytest.skip("one connection, one thread")
    return engine


@contextmanager
def by_worker(engine):
    with Worker(engine).background():
        yield


@contextmanager
def by_pass(engine):
    """A pass in another thread, as in another process: it is told of nothing, and looks by itself."""

    def work():
        with Session(engine) as session:
            Scheduler(session).run_due(ignore_errors=True)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


BOTH = pytest.mark.parametrize("run", [by_worker, by_pass])


def cancelled_while_it_runs(engine, scheduler, run, name, *args, **options):
    job = scheduler.enqueue(f"tests.stopjobs.{name}", args=args, **options)
    scheduler.session.commit()
    with run(engine):
        assert stopjobs.BEGAN.wait(20)
        assert scheduler.cancel(job)
        assert not scheduler.cancel(job)
        scheduler.session.commit()
        assert scheduler.wait(job, timeout="20s") is job
    return job


@BOTH
def test_a_function_can_see_it_and_finish(parallel, scheduler, session, run):
    job = cancelled_while_it_runs(parallel, scheduler, run, "write_until_asked", "kept", "return")
    assert (job.status, letters(session)) == ("complete", ["kept"])
    assert job.cancel_requested


@BOTH
def test_one_that_raises_is_cancelled_and_writes_nothing(parallel, scheduler, session, run):
    job = cancelled_while_it_runs(
        parallel, scheduler, run, "write_until_asked", "gone", "write and raise", max_attempts=5
    )
    assert (job.status, job.failures, letters(session)) == ("cancelled", 0, [])
    assert job.error.rstrip().endswith("Told")


@BOTH
def test_one_that_would_have_failed_for_good_is_cancelled_too(parallel, scheduler, run):
    assert cancelled_while_it_runs(parallel, scheduler, run, "until_asked", "raise").status == "cancelled"


@BOTH
def test_a_coroutine_is_cancelled(parallel, scheduler, run):
    job = cancelled_while_it_runs(parallel, scheduler, run, "sleep_until_asked", max_attempts=5)
    assert (job.status, job.error) == ("cancelled", "asked to stop")
    assert stopjobs.SEEN == ["began", "cancelled"]


def test_a_timeout_does_not_hide_it(parallel, scheduler):
    job = cancelled_while_it_runs(parallel, scheduler, by_worker, "sleep_until_asked", timeout="1h")
    assert job.status == "cancelled"


def test_what_is_told(parallel, scheduler, heard):
    cancelled_while_it_runs(parallel, scheduler, by_worker, "sleep_until_asked")
    told = [name for name in heard if name not in {"started", "stopped"}]
    assert told == ["scheduled", "claimed", "cancel_requested", "cancelled"]


def test_a_rolled_back_cancel_tells_nobody(parallel, scheduler, session):
    job = scheduler.enqueue(stopjobs.until_asked, args=["return"])
    session.commit()
    with Worker(parallel).background():
        assert stopjobs.BEGAN.wait(20)
        scheduler.cancel(job)
        session.rollback()
        stopjobs.MAY_END.set()
        scheduler.wait(job, timeout="20s")
    assert (job.status, job.result) == ("complete", "was not asked")


def test_a_pass_does_not_raise_what_a_cancelled_job_raised(parallel, scheduler):
    raised = []

    def work():
        with Session(parallel) as session:
            try:
                raised.append(Scheduler(session).run_due())
            except stopjobs.Told as error:
                raised.append(error)

    job = scheduler.enqueue(stopjobs.until_asked, args=["raise"])
    scheduler.session.commit()
    thread = threading.Thread(target=work)
    thread.start()
    assert stopjobs.BEGAN.wait(20)
    scheduler.cancel(job)
    scheduler.session.commit()
    thread.join()
    assert raised[0].cancelled == 1


def test_a_handler_may_cancel_its_own_job_and_complete(scheduler):
    job = scheduler.enqueue(stopjobs.cancel_itself)
    assert scheduler.run_due().complete == 1
    assert stopjobs.SEEN == [True]
    assert job.status == "complete"


def test_it_can_be_run_again_by_hand(parallel, scheduler, session):
    job = cancelled_while_it_runs(parallel, scheduler, by_worker, "until_asked", "raise")
    assert scheduler.retry(job)
    stopjobs.MAY_END.set()
    scheduler.run_due()
    assert (job.status, job.result, job.cancel_requested) == ("complete", "was not asked", False)


def left_by_a_dead_worker(scheduler, session, now):
    job = scheduler.schedule(now, stopjobs.spin)
    session.flush()
    session.execute(
        update(ScheduledJob).values(
            status="running", attempt=1, started_at=now, leased_by="the dead", leased_until=now - timedelta(hours=1)
        )
    )
    session.commit()
    assert scheduler.cancel(job)
    return job


def test_one_whose_worker_died_is_not_run_again(scheduler, session, now, heard):
    job = left_by_a_dead_worker(scheduler, session, now)
    assert scheduler.run_due(now).job_ids == []
    assert (job.status, job.losses) == ("cancelled", 1)
    assert heard[-2:] == ["rescued", "cancelled"]


def test_one_whose_worker_stopped_is_not_run_again(parallel, scheduler, session, heard):
    job = scheduler.enqueue(stopjobs.ignore_everything)
    session.commit()
    with Worker(parallel).background(timeout="0s"):
        assert stopjobs.BEGAN.wait(20)
        assert scheduler.cancel(job)
        session.commit()
    stopjobs.MAY_END.set()
    assert scheduler.wait(job).status == "cancelled"
    assert [name for name in heard if name in {"cancelled", "released"}] == ["cancelled"]


def test_current_job_is_known_in_coroutines(scheduler):
    job = scheduler.enqueue("tests.stopjobs.who")
    scheduler.run_due()
    assert stopjobs.SEEN == [job.id]


# --- at the same instant ---------------------------------------------------------------------------------------------


@pytest.fixture
def shared(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def raced(shared_url, shared, name, count=60):
    """Run jobs in one process while another cancels them one by one; return the jobs and the ids that it cancelled."""
    ids = Scheduler(shared).schedule_many("0s", f"tests.processes.{name}", [{} for _ in range(count)])
    shared.commit()
    runner = start(shared_url, "run_until_nothing_runs")
    canceller = start(shared_url, "cancel_all", *map(str, ids))
    _, won = together([runner, canceller])
    shared.rollback()
    return {job.id: job for job in shared.scalars(select(ScheduledJob))}, set(won)


def test_cancel_against_fail_has_one_winner(shared_url, shared):
    jobs, won = raced(shared_url, shared, "fail")
    assert {job_id for job_id, job in jobs.items() if job.status == "cancelled"} == won
    assert {job.status for job_id, job in jobs.items() if job_id not in won} <= {"failed"}


def test_cancel_against_complete_has_one_winner(shared_url, shared):
    jobs, won = raced(shared_url, shared, "note_in_database")
    done = {job_id for job_id, job in jobs.items() if job.status == "complete"}
    assert set(map(int, letters(shared))) == done
    assert jobs.keys() - done <= won
    asked = {job_id for job_id in done if jobs[job_id].cancel_requested_at is not None}
    assert won == asked | (jobs.keys() - done)


def test_a_job_of_another_process_sees_it(shared_url, shared):
    job = Scheduler(shared).enqueue("tests.processes.poll_until_asked")
    shared.commit()
    runner = start(shared_url, "run_one_pass")
    runner.stdin.write("go\n")
    runner.stdin.flush()
    while job.status == "scheduled":
        shared.rollback()
    assert Scheduler(shared).cancel(job)
    shared.commit()
    out, err = runner.communicate(timeout=60)
    assert (runner.returncode, out.strip()) == (0, f"[{job.id}]"), err
    assert (Scheduler(shared).wait(job).status, job.error) == ("cancelled", "it was asked")
