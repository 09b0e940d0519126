"""Paused queues, and why a job is not running, in words."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import insert, update

from future_jobs import ScheduledJob, Scheduler, Status, Worker, claim_statements, limit_statements
from future_jobs.errors import InvalidArgument
from future_jobs.explaining import Reason
from future_jobs.statements import Level

RECORD = "tests.jobs.record"


def test_nothing_of_a_paused_queue_is_run_until_it_is_resumed(scheduler, session, now):
    mail = scheduler.schedule(now, RECORD, queue="mail")
    limited = scheduler.schedule(now, RECORD, queue="mail", concurrency_key="k")
    other = scheduler.schedule(now, RECORD)
    assert scheduler.pause_queue("mail")
    assert not scheduler.pause_queue("mail")
    session.commit()
    assert scheduler.run_due(now).job_ids == [other.id]
    assert scheduler.resume_queue("mail")
    assert not scheduler.resume_queue("mail")
    session.commit()
    assert sorted(scheduler.run_due(now).job_ids) == [mail.id, limited.id]


def test_a_pause_that_is_rolled_back_never_was(scheduler, session, now):
    job = scheduler.schedule(now, RECORD, queue="mail")
    session.commit()
    scheduler.pause_queue("mail")
    session.rollback()
    assert scheduler.run_due(now).job_ids == [job.id]


def test_jobs_of_a_paused_queue_expire_and_can_be_cancelled(scheduler, session, now):
    late = scheduler.schedule(now, RECORD, queue="mail", expires="1m")
    unwanted = scheduler.schedule(now, RECORD, queue="mail")
    scheduler.pause_queue("mail")
    assert scheduler.cancel(unwanted)
    scheduler.run_due(now + timedelta(minutes=2))
    session.expire_all()
    assert (late.status, unwanted.status) == (Status.EXPIRED, Status.CANCELLED)


def test_a_worker_leaves_a_paused_queue_alone(engine, scheduler, session):
    paused, other = scheduler.enqueue(RECORD, queue="mail"), scheduler.enqueue(RECORD)
    scheduler.pause_queue("mail")
    session.commit()
    worker = Worker(engine, queues={"*": 4}, max_jobs=1)
    worker.run()
    session.expire_all()
    assert (paused.status, other.status) == (Status.SCHEDULED, Status.COMPLETE)
    scheduler.resume_queue("mail")
    session.commit()
    Worker(engine, queues={"*": 4}, max_jobs=1).run()
    session.expire_all()
    assert paused.status is Status.COMPLETE


def test_a_worker_takes_nothing_from_a_queue_that_was_paused_since_it_looked(engine, scheduler, session):
    scheduler.enqueue(RECORD, queue="mail")
    session.commit()
    worker = Worker(engine, queues={"mail": 1}, prefetch=0)
    worker.tick()  # it has seen the queue
    scheduler.pause_queue("mail")
    session.commit()
    job = scheduler.enqueue(RECORD, queue="mail")
    session.commit()  # which tells the worker
    worker.tick()
    worker.tick()
    session.expire_all()
    assert job.status is Status.SCHEDULED
    scheduler.resume_queue("mail")
    session.commit()
    while worker.ran < 2:
        worker.tick()
    worker.stop()
    session.expire_all()
    assert job.status is Status.COMPLETE


@pytest.mark.parametrize("options", [{}, {"concurrency_key": "k"}])
def test_nothing_of_a_paused_queue_can_be_claimed_by_one_that_knows_of_it(scheduler, session, now, options):
    job = scheduler.schedule(now, RECORD, queue="mail", **options)
    session.flush()
    connection = session.connection()

    def claimed():
        if options:
            return claim_statements.lock_waiting(connection, [job.id], now=now)
        return claim_statements.claim(
            connection,
            Level("mail", 0, now),
            after=(now, 0),
            newest=job.id,
            limit=1,
            now=now,
            worker="w",
            leased_until=now,
        )

    scheduler.pause_queue("mail")
    assert claimed() == []
    scheduler.resume_queue("mail")
    assert [row.id for row in claimed()] == [job.id]


@pytest.mark.parametrize("queue", [None, 3, b"mail"])
def test_what_is_no_name_of_a_queue_is_refused(scheduler, queue):
    with pytest.raises(InvalidArgument, match="queue"):
        scheduler.pause_queue(queue)


# --- why --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at(session, now):
    """A Scheduler whose clock shows ``now``."""
    return Scheduler(session, clock=lambda: now)


def test_what_has_no_row_or_has_ended_is_said_to(at, session, now):
    assert at.why(77).reason is Reason.MISSING
    done, failed, gone = at.schedule(now, RECORD), at.schedule(now, "tests.jobs.failjob"), at.schedule("1h", RECORD)
    at.cancel(gone)
    at.run_due(now, ignore_errors=True)
    reasons = [at.why(each).reason for each in (done, failed, gone)]
    assert reasons == [Reason.COMPLETE, Reason.FAILED, Reason.CANCELLED]
    assert "ValueError: fail. retry() lets it run again" in str(at.why(failed))


def test_what_is_not_due_is_said_to_wait_for_its_time(at, now):
    job = at.schedule("1h", RECORD)
    why = at.why(job)
    assert (why.reason, why.until) == (Reason.NOT_DUE, job.run_at)
    assert f"{job.run_at:%H:%M:%S} UTC" in str(why)


def test_what_waits_for_another_try_is_said_to(at, now):
    job = at.schedule(now, "tests.jobs.failjob", max_attempts=3, backoff="1h")
    at.run_due(now)
    why = at.why(job)
    assert why.reason is Reason.RETRY
    assert "attempt 1 of 3 failed with ValueError: fail" in why.text


def test_what_is_too_late_is_said_to_expire(at, now):
    assert at.why(at.schedule(now - timedelta(days=9), RECORD, expires="8d")).reason is Reason.TOO_LATE


def test_who_runs_it_is_said(at, session, now):
    job = run_elsewhere(session, at.schedule(now, RECORD))
    assert at.why(job).reason is Reason.RUNNING
    assert "by somebody" in str(at.why(job))


def test_a_paused_queue_is_named(at, now):
    job = at.schedule(now, RECORD, queue="mail")
    at.pause_queue("mail")
    assert at.why(job).reason is Reason.QUEUE_PAUSED
    assert "queue 'mail' is paused" in str(at.why(job))


def test_the_job_that_holds_the_key_is_named(at, session, now):
    holder = run_elsewhere(session, at.schedule(now, RECORD, concurrency_key="k"))
    why = at.why(at.schedule(now, RECORD, concurrency_key="k"))
    assert why.reason is Reason.KEY_HELD
    assert f"the key 'k' is held by job {holder.id}; 1 at a time" in str(why)


def test_when_the_rate_allows_the_next_is_said(at, now):
    jobs = [at.schedule(now, RECORD, rate_limit="1/min") for _ in range(2)]
    at.run_due(now)
    why = at.why(jobs[1])
    assert (why.reason, why.until) == (Reason.RATE_LIMITED, now + timedelta(minutes=1))


def test_that_nobody_serves_its_queue_is_said(at, session, now):
    job = at.schedule(now, RECORD, queue="mail")
    assert at.why(job).reason is Reason.NO_WORKER
    assert "no worker is registered" in str(at.why(job))
    register(session, now, queues={"default": 4})
    assert "no worker serves queue 'mail': the workers there are serve default" in str(at.why(job))
    register(session, now, queues={"*": 1})
    assert at.why(job).reason is Reason.DUE
    run_elsewhere(session, at.schedule(now, RECORD, queue="mail"))
    assert at.why(job).reason is Reason.WORKERS_BUSY
    session.execute(update(limit_statements.WORKERS).values(seen_at=now - timedelta(minutes=4)))
    assert "no worker is registered" in str(at.why(job))


def test_a_state_made_by_hand_is_named(at, session, now):
    job = at.schedule(now, RECORD)
    session.execute(update(ScheduledJob).values(status="odd"))
    assert at.why(job.id).reason is Reason.UNKNOWN


def run_elsewhere(session, job):
    values = {"status": Status.RUNNING, "leased_by": "somebody", "started_at": job.run_at}
    session.execute(update(ScheduledJob).where(ScheduledJob.id == job.id).values(**values))
    return job


def register(session, now, *, queues):
    row = {"host": "here", "pid": 1, "started_at": now, "seen_at": now, "lease_seconds": 60.0}
    session.execute(insert(limit_statements.WORKERS), {"name": str(queues), "queues": queues, **row})


def test_a_worker_has_a_row_while_it_lives_and_removes_those_of_the_dead(engine, kind, session, now):
    if kind == "memory":
        pytest.skip("one connection, and nobody to tell")
    register(session, now - timedelta(hours=1), queues={"*": 1})
    session.commit()
    with Worker(engine, queues={"mail": 3}).background() as worker:
        worker._loop.leases.appear()
        session.rollback()
        rows = limit_statements.workers(session.connection())
        assert [row.name for row in rows] == [worker._loop.name]
        assert rows[0].queues == {"mail": 3}
        session.rollback()
    assert limit_statements.workers(session.connection()) == []
