"""How far a job is, said by its handler; and waiting until it is done."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from future_jobs import (
    InvalidArgument,
    InvalidTime,
    ObjectMissing,
    ScheduledJob,
    Scheduler,
    UsageError,
    WaitTimeout,
    Worker,
    current_job,
    statements,
)
from future_jobs.cli.words import as_dict, note
from tests import stopjobs
from tests.shop import letters


@pytest.fixture(autouse=True)
def stage(monkeypatch):
    monkeypatch.setattr(stopjobs, "BEGAN", threading.Event())
    monkeypatch.setattr(stopjobs, "MAY_END", threading.Event())
    yield
    stopjobs.MAY_END.set()


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
    def work():
        with Session(engine) as session:
            Scheduler(session).run_due(ignore_errors=True)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def seen(session, job):
    session.rollback()
    session.refresh(job)
    return job.latest_progress


@pytest.mark.parametrize("run", [by_worker, by_pass])
def test_it_is_seen_while_the_job_runs(parallel, scheduler, session, run):
    job = scheduler.enqueue(stopjobs.tell_and_wait, args=[None])
    session.commit()
    with run(parallel):
        assert stopjobs.BEGAN.wait(20)
        while seen(session, job) is None:
            pass
        progress, status = job.latest_progress, job.status
        stopjobs.MAY_END.set()
        scheduler.wait(job, timeout="20s")
    assert (progress.fraction, progress.message, status) == (0.4, "page 12", "running")
    assert progress.at >= job.started_at - timedelta(seconds=1)
    assert (job.latest_progress.fraction, job.latest_progress.message) == (0.8, "page 24")


def test_a_lock_that_the_job_itself_holds_is_not_waited_for(parallel, scheduler, session):
    job = scheduler.enqueue(stopjobs.tell_and_wait, args=["the database is locked"])
    session.commit()
    with Worker(parallel, lease="2s").background():  # attends twice a second
        assert stopjobs.BEGAN.wait(20)
        if parallel.dialect.name != "sqlite":
            while seen(session, job) is None:
                pass
        session.rollback()
        stopjobs.MAY_END.set()
        scheduler.wait(job, timeout="20s")
    assert (job.status, job.latest_progress.fraction) == ("complete", 0.8)
    assert letters(session) == ["the database is locked"]


@pytest.mark.parametrize("run", ["pass", "worker"])
def test_the_last_word_is_kept(engine, scheduler, session, run):
    job = scheduler.enqueue(stopjobs.tell, args=[[0.1, "a"], [0.2, None], [0.3, "c"]])
    failing = scheduler.enqueue(stopjobs.tell_and_fail)
    session.commit()
    if run == "pass":
        scheduler.run_due(ignore_errors=True)
    else:
        Worker(engine, max_jobs=2).run()
        session.expire_all()
    assert (job.latest_progress.fraction, job.latest_progress.message) == (0.3, "c")
    assert (failing.status, failing.latest_progress.message) == ("failed", "half")


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"], indirect=True)
def test_the_last_word_waits_for_whoever_has_the_row(engine, scheduler, session):
    """A claim of others may hold it for a moment; what is said while the job runs passes it over."""
    job = scheduler.enqueue("tests.jobs.record")
    session.commit()
    session.execute(update(ScheduledJob).values(status="running"))
    session.commit()
    token, locked_out = statements.Token(job.id, 0), r"lock timeout|Lock wait timeout"
    soon = {"postgresql": "SET lock_timeout = 100", "mysql": "SET innodb_lock_wait_timeout = 1"}
    with engine.connect() as other, engine.connect() as worker:
        worker.detach()
        worker.exec_driver_sql(soon[engine.dialect.name])
        worker.commit()
        other.execute(select(ScheduledJob.id).with_for_update())
        assert statements.note_progress(worker, {token: {"fraction": 0.1}}, waits=False) == set()
        worker.rollback()
        with pytest.raises(OperationalError, match=locked_out):
            statements.note_progress(worker, {token: {"fraction": 0.5}})
        worker.rollback()
        other.rollback()
        assert statements.note_progress(worker, {token: {"fraction": 0.5}}) == {token}


@pytest.mark.parametrize(("fraction", "kept"), [(-1, 0.0), (7, 1.0), (1, 1.0), (float("inf"), 1.0)])
def test_a_fraction_outside_is_the_nearest_inside(scheduler, fraction, kept):
    job = scheduler.enqueue("tests.test_progress.tell_a_number", args=[fraction])
    scheduler.run_due()
    assert job.latest_progress.fraction == kept


def tell_a_number(fraction):
    current_job().progress(fraction)


def tell_a_long_story():
    current_job().progress(0.5, "\0é" * 5000)


def test_any_message_can_be_stored(scheduler):
    job = scheduler.enqueue("tests.test_progress.tell_a_long_story")
    scheduler.run_due()
    assert job.latest_progress.message.startswith(r"\x00é")
    assert len(job.latest_progress.message.encode()) <= 500


@pytest.mark.parametrize(("fraction", "message"), [("half", None), (float("nan"), None), (None, None), (0.5, 12)])
def test_what_is_no_progress_is_refused(scheduler, fraction, message):
    scheduler.enqueue(stopjobs.tell, args=[[fraction, message]])
    with pytest.raises(InvalidArgument, match=r"fraction is|message is"):
        scheduler.run_due()


def test_only_its_handler_can_tell(scheduler):
    job = scheduler.enqueue(stopjobs.tell)
    with pytest.raises(UsageError, match="current_job"):
        job.progress(0.5)


def keep_a_copy():
    job = current_job()
    for other in (pickle.loads(pickle.dumps(job)), copy.copy(job)):
        assert other.id == job.id
        with pytest.raises(UsageError):
            other.progress(0.5)
    job.progress(0.5)


def test_a_running_job_can_be_pickled(scheduler):
    job = scheduler.enqueue("tests.test_progress.keep_a_copy")
    scheduler.run_due()
    assert job.latest_progress.fraction == 0.5


def test_an_edited_progress_is_shown_as_it_is(scheduler, session, now):
    job = scheduler.enqueue(stopjobs.tell)
    session.commit()
    session.execute(text("UPDATE future_jobs_scheduled_job SET progress = '{\"percent\": 3}', status = 'running'"))
    session.refresh(job)
    assert job.latest_progress == {"percent": 3}
    assert "{'percent': 3}" in note(job, now)
    assert as_dict(job)["progress"] == {"percent": 3}


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_returns_the_finished_job(parallel, scheduler, session):
    job = scheduler.enqueue("tests.stopjobs.count_to", args=[10])  # not committed: `wait` does that
    with Worker(parallel).background():
        assert scheduler.wait(job, timeout="20s").result == 10
        assert scheduler.wait(job.id) is job


def test_waiting_has_an_end(parallel, scheduler):
    job = scheduler.schedule("1h", stopjobs.tell)
    with pytest.raises(WaitTimeout, match=f"job {job.id} is scheduled after 20ms") as caught:
        scheduler.wait(job, timeout="20ms")
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.job_id, caught.value.status) == (job.id, "scheduled")


def test_no_transaction_is_open_while_it_waits(parallel, scheduler, session):
    job = scheduler.schedule("1h", stopjobs.tell)
    open_ = []
    threading.Timer(0.2, lambda: open_.append(session.in_transaction())).start()
    with pytest.raises(WaitTimeout):
        scheduler.wait(job, timeout="500ms")
    assert open_ == [False]


def test_a_job_that_does_not_exist_is_not_waited_for(scheduler):
    with pytest.raises(ObjectMissing):
        scheduler.wait(12345, timeout="1h")


def test_what_nobody_else_can_run_is_not_waited_for(engine, scheduler, session):
    if not isinstance(engine.pool, StaticPool):
        pytest.skip("others can")
    job = scheduler.enqueue(stopjobs.tell)
    with pytest.raises(UsageError, match="call run_due"):
        scheduler.wait(job, timeout="1h")
    scheduler.run_due()
    assert scheduler.wait(job).status == "complete"


def wait_for_another(session: Session):
    scheduler = Scheduler.of(session)
    scheduler.wait(scheduler.enqueue(stopjobs.tell), timeout="1h")


def test_a_handler_does_not_wait_for_what_it_has_just_scheduled(scheduler):
    scheduler.enqueue("tests.test_progress.wait_for_another")
    with pytest.raises(UsageError, match="call run_due"):
        scheduler.run_due()


@pytest.mark.parametrize(("value", "error"), [("soon", InvalidTime), (5, InvalidTime), ("-1s", InvalidTime)])
def test_what_is_no_time_to_wait_is_refused(scheduler, value, error):
    with pytest.raises(error, match="timeout"):
        scheduler.wait(1, timeout=value)


def test_a_list_of_jobs_is_no_job(scheduler):
    with pytest.raises(InvalidArgument, match="pass a ScheduledJob or its id"):
        scheduler.wait([ScheduledJob()])
