"""Jobs that wait for each other: one at a time by a key, and so many in a time; in `run_due`, on every database."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic

import pytest
from sqlalchemy import select, update

from future_jobs import ScheduledJob, Status, Worker, claim_statements, statements
from future_jobs.errors import InvalidArgument, InvalidOption
from future_jobs.limits import Limits
from future_jobs.models import Limit
from future_jobs.times import utc_now
from future_jobs.units import Units

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


def test_a_rate_counts_for_each_key_apart_or_for_the_queue(scheduler, session, now):
    for key in ("a", "b"):
        scheduler.schedule_many(now, RECORD, [{}, {}], rate_limit="1/min", concurrency_key=key)
    scheduler.schedule_many(now, RECORD, [{}, {}], rate_limit="1/min", queue="mail")
    session.commit()
    scheduler.run_due(now)
    done, waits = Status.COMPLETE, Status.SCHEDULED
    assert statuses(session) == [done, waits, done, waits, done, waits]


def test_the_limit_of_a_key_is_the_jobs_own(engine, scheduler, session, now):
    running = scheduler.schedule(now, RECORD, concurrency_key="k")
    narrow = scheduler.schedule(now, RECORD, concurrency_key="k")
    wide = scheduler.schedule(now, RECORD, concurrency_key="k", concurrency_limit=2)
    session.commit()
    hold(session, running)
    scheduler.run_due(now)
    session.expire_all()
    assert (narrow.status, wide.status) == (Status.SCHEDULED, Status.COMPLETE)


def test_a_job_that_is_not_due_blocks_none_that_is(scheduler, session, now):
    scheduler.schedule(now + timedelta(days=1), RECORD, concurrency_key="k", priority=50)
    scheduler.schedule(now, RECORD, concurrency_key="k")
    session.commit()
    scheduler.run_due(now)
    assert statuses(session) == [Status.SCHEDULED, Status.COMPLETE]


def test_a_job_that_must_wait_blocks_none_behind_it(scheduler, session, now):
    running = scheduler.schedule(now, RECORD, concurrency_key="k")
    scheduler.schedule_many(now, RECORD, [{} for _ in range(250)], concurrency_key="k")
    other = scheduler.schedule(now + timedelta(seconds=1), RECORD, concurrency_key="other")
    plain = scheduler.schedule(now + timedelta(seconds=1), RECORD)
    session.commit()
    hold(session, running)
    report = scheduler.run_due(now + timedelta(minutes=1))
    assert sorted(report.job_ids) == [other.id, plain.id]


def test_a_key_is_free_again_when_its_holder_was_lost(scheduler, session, now):
    running = scheduler.schedule(now, RECORD, concurrency_key="k", expires=None)
    waiting = scheduler.schedule(now, RECORD, concurrency_key="k", expires=None)
    session.commit()
    hold(session, running)
    scheduler.run_due(now)
    session.expire_all()
    assert waiting.status is Status.SCHEDULED
    scheduler.run_due(now + timedelta(hours=1))
    assert statuses(session) == [Status.COMPLETE, Status.COMPLETE]


def test_a_failed_try_counts_as_a_start(scheduler, session, now):
    job = scheduler.schedule(now, "tests.jobs.failjob", max_attempts=3, backoff="0s", rate_limit="1/min")
    session.commit()
    for seconds in (0, 1, 59):
        scheduler.run_due(now + timedelta(seconds=seconds), ignore_errors=True)
    session.expire_all()
    assert job.failures == 1
    scheduler.run_due(now + timedelta(seconds=60), ignore_errors=True)
    session.expire_all()
    assert job.failures == 2


def test_a_limited_job_expires_while_it_waits(scheduler, session, now):
    running = scheduler.schedule(now, RECORD, concurrency_key="k", expires=None)
    late = scheduler.schedule(now, RECORD, concurrency_key="k", expires="1s")
    session.commit()
    hold(session, running)
    scheduler.run_due(now + timedelta(seconds=2))
    session.expire_all()
    assert late.status is Status.EXPIRED


def test_a_row_whose_rate_was_damaged_by_hand_runs_and_stops_nobody(scheduler, session, now):
    scheduler.schedule_many(now, RECORD, [{}, {}], rate_limit="5/s")
    session.commit()
    session.execute(update(ScheduledJob).where(ScheduledJob.id == 1).values(rate_limit="often"))
    session.add(Limit(name="queue:default", starts="nonsense"))
    session.commit()
    assert scheduler.run_due(now).complete == 2


def test_travelling_back_in_time_is_not_held_up_by_starts_of_the_future(scheduler, session, now):
    scheduler.schedule_many(now, RECORD, [{}, {}], rate_limit="1/min")
    session.commit()
    assert scheduler.run_due(now + timedelta(days=1)).complete == 1
    assert scheduler.run_due(now).complete == 1


def test_many_jobs_at_once_may_have_limits_of_their_own(scheduler, session, now):
    calls = [{"concurrency_key": "k"}, {}, {"rate_limit": "5/s"}, {"concurrency_key": "l", "concurrency_limit": 2}]
    scheduler.schedule_many(now, RECORD, calls)
    session.commit()
    jobs = session.scalars(select(ScheduledJob).order_by(ScheduledJob.id)).all()
    assert [job.limited for job in jobs] == [True, False, True, True]
    assert [job.concurrency_limit for job in jobs] == [1, None, None, 2]
    assert scheduler.run_due(now).complete == 4


def test_what_waits_for_its_key_costs_the_others_nothing(engine, scheduler, session, now, monkeypatch):
    monkeypatch.setattr("future_jobs.limits.LOOK_SECONDS", 60.0)  # it looks until it has seen all of them
    running = scheduler.schedule(now, RECORD, concurrency_key="k")
    scheduler.schedule_many(now, RECORD, [{} for _ in range(3000)], concurrency_key="k")
    plain = scheduler.schedule(now + timedelta(seconds=1), RECORD)
    session.commit()
    hold(session, running)
    limits, read = Limits(), Units(engine).read
    (ours, theirs) = sorted(read(statements.levels), key=lambda level: level.limited)
    due = read(lambda connection: limits.look(connection, theirs, now=now + timedelta(minutes=1)))
    assert due == (None, True)
    assert len(limits._places[theirs[:2]].seen) <= 100  # it has read one window, and left out the rest
    assert ours.first_at == plain.run_at


def test_a_copy_of_a_job_has_its_limits(scheduler, session, now):
    job = scheduler.schedule(now, RECORD, concurrency_key="k", concurrency_limit=3, rate_limit="5/min")
    copy = job.reschedule("1h")
    other = job.reschedule("1h", concurrency_key="other", rate_limit=None)
    assert (copy.concurrency_key, copy.concurrency_limit, copy.rate_limit) == ("k", 3, "5/60s")
    assert (other.concurrency_key, other.concurrency_limit, other.rate_limit) == ("other", 3, None)
    assert copy.limited_by == job.limited_by != other.limited_by


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"concurrency_key": ""}, InvalidOption, "1 to 255 printable"),
        ({"concurrency_key": "k" * 256}, InvalidOption, "1 to 255 printable"),
        ({"concurrency_key": 3}, InvalidArgument, "pass text"),
        ({"concurrency_limit": 2}, InvalidOption, "give that as well"),
        ({"concurrency_key": "k", "concurrency_limit": 0}, InvalidOption, "use 1 to"),
        ({"concurrency_key": "k", "concurrency_limit": "2"}, InvalidArgument, "whole number"),
        ({"rate_limit": "often"}, InvalidOption, "'100/min'"),
        ({"rate_limit": 3}, InvalidArgument, "'100/min'"),
        ({"rate_limit": "0/s"}, InvalidOption, "1 to 1000000 starts"),
        ({"rate_limit": "1/mo"}, InvalidOption, "'100/min'"),
    ],
)
def test_what_is_no_limit_is_refused(scheduler, options, error, match):
    with pytest.raises(error, match=match):
        scheduler.schedule("1h", RECORD, **options)


def hold(session, job):
    """Let another worker run ``job``, for as long as a lease."""
    now = utc_now()
    connection = session.connection()
    found = claim_statements.lock_waiting(connection, [job.id], now=now)
    claim_statements.take(
        connection, [row.id for row in found], worker="other", leased_until=now + timedelta(minutes=1), started_at=now
    )
    session.commit()


# --- in a worker: nothing here waits for the next look ----------------------------------------------------------------


def test_the_next_of_a_key_starts_when_the_one_before_ends(engine, scheduler, session, calls):
    scheduler.schedule_many("0s", RECORD, [{"args": [n]} for n in range(6)], concurrency_key="k")
    session.commit()
    began = monotonic()
    Worker(engine, poll="60s", max_jobs=6).run()
    assert calls == [(n,) for n in range(6)]
    assert monotonic() - began < 30


def test_a_worker_sleeps_until_the_rate_allows_the_next(engine, scheduler, session, calls):
    scheduler.schedule_many("0s", RECORD, [{"args": [n]} for n in range(6)], rate_limit="2/300ms")
    session.commit()
    began = monotonic()
    worker, ticks = Worker(engine, poll="60s"), 0
    while worker.ran < 6:
        seconds = worker.tick()
        worker._loop.alarm.sleep(seconds)
        ticks += 1
    worker.stop()
    assert len(calls) == 6
    assert 0.59 < monotonic() - began < 30
    assert ticks < 60  # it slept


def test_a_limited_job_is_never_claimed_ahead_of_a_slot(engine, kind, scheduler, session):
    if kind == "memory":
        pytest.skip("one slot")
    scheduler.schedule_many("0s", RECORD, [{} for _ in range(20)], concurrency_key="k", concurrency_limit=20)
    session.commit()
    worker = Worker(engine, queues={"default": 2}, prefetch=50, max_jobs=20)
    most = 0
    while not worker.is_stopping:
        worker.tick()
        most = max(most, len(worker._loop.held))
    worker.stop()
    assert 1 <= most <= 4  # two that run, and two that have just ended
    assert statuses(session) == [Status.COMPLETE] * 20
