"""Jobs that wait for each other: one at a time by a key, and so many in a time; in `run_due`, on every database."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from future_jobs import ScheduledJob, Status

RECORD = "tests.jobs.record"


def statuses(session):
    session.expire_all()
    return [job.status for job in session.scalars(select(ScheduledJob).order_by(ScheduledJob.id))]


def test_jobs_of_one_key_all_run_in_one_pass_one_after_the_other(scheduler, session, now, calls):
    for number in range(5):
        scheduler.schedule(now + timedelta(seconds=number), RECORD, args=[number], concurrency_key="shop")
    report = scheduler.run_due(now + timedelta(minutes=1))
    assert report.complete == 5
    assert calls == [(0,), (1,), (2,), (3,), (4,)]


def test_no_more_start_than_the_rate_allows(scheduler, session, now, calls):
    scheduler.schedule_many(now, RECORD, [{"args": [n]} for n in range(12)], rate_limit="5/10s")
    session.commit()
    assert scheduler.run_due(now).complete == 5
    assert scheduler.run_due(now + timedelta(seconds=9)).complete == 0
    assert scheduler.run_due(now + timedelta(seconds=10)).complete == 5
    assert scheduler.run_due(now + timedelta(seconds=15)).complete == 0
    assert scheduler.run_due(now + timedelta(seconds=25)).complete == 2
    assert statuses(session) == [Status.COMPLETE] * 12
