"""Time travel: everything that comes due, in order, each thing at its own time."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from future_jobs import FutureJobsError, ScheduledJob, Scheduler, Snooze, current_job
from future_jobs.testing import travel
from tests import jobs

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SEEN = []


def note(text, session: Session):
    """Remember what ran, and what time it was."""
    SEEN.append((text, Scheduler.of(session)._now()))


def chain(left, session: Session):
    """Schedule itself for the next day."""
    note(f"{left} left", session)
    if left:
        Scheduler.of(session).schedule("1d", chain, args=[left - 1])


def again(session: Session):
    Scheduler.of(session).enqueue(again)


def snooze_once():
    return Snooze("3h") if current_job().attempt == 1 else None


@pytest.fixture(autouse=True)
def seen():
    SEEN.clear()
    yield SEEN
    SEEN.clear()


@pytest.fixture
def scheduler(session):
    return Scheduler(session, timezone=UTC, clock=lambda: NOON)


def test_everything_runs_at_its_own_time_in_order(scheduler, session, seen):
    scheduler.schedule("3d", note, args=["third"])
    scheduler.schedule("1d", note, args=["first"])
    scheduler.schedule("2d", note, args=["second"])
    scheduler.schedule("4d", note, args=["too late"])
    journey = travel(scheduler, "3d")
    assert seen == [("first", NOON + DAY), ("second", NOON + 2 * DAY), ("third", NOON + 3 * DAY)]
    assert (journey.complete, journey.stops) == (3, [NOON + DAY, NOON + 2 * DAY, NOON + 3 * DAY])
    assert (journey.start, journey.end) == (NOON, NOON + 3 * DAY)


def test_jobs_that_schedule_jobs_are_on_the_way(scheduler, seen):
    scheduler.schedule("1d", chain, args=[3])
    journey = travel(scheduler, "30d")
    assert seen == [(f"{left} left", NOON + (4 - left) * DAY) for left in (3, 2, 1, 0)]
    assert journey.complete == 4


def test_recurring_jobs_fire_at_each_of_their_times(scheduler, session, seen):
    scheduler.recurring("daily", "0 9 * * *", note, args=["daily"])
    scheduler.recurring("weekly", "0 10 * * mon", note, args=["weekly"])
    journey = travel(scheduler, "30d")
    daily = [("daily", datetime(2026, 6, 2, 9, tzinfo=UTC) + n * DAY) for n in range(30)]
    weekly = [("weekly", datetime(2026, 6, day, 10, tzinfo=UTC)) for day in (8, 15, 22, 29)]
    assert seen == sorted(daily + weekly, key=lambda each: each[1])
    assert len(journey.stops) == 34


def test_what_waits_is_run_first_and_nothing_is_written_by_a_quiet_month(scheduler, seen):
    scheduler.enqueue(note, args=["now"])
    assert travel(scheduler, "30d").stops == [NOON]
    assert travel(scheduler, "30d").stops == []


def test_retries_snoozes_and_expiries_take_their_time(scheduler, session):
    failing = scheduler.enqueue(jobs.failjob, max_attempts=3, backoff="1h")
    snoozing = scheduler.enqueue(snooze_once)
    journey = travel(scheduler, "2d", ignore_errors=True)
    assert (journey.retried, journey.failed, journey.snoozed, journey.complete) == (2, 1, 1, 1)
    assert (failing.status, failing.finished_at) == ("failed", NOON + timedelta(hours=2))
    assert snoozing.finished_at == NOON + timedelta(hours=3)


def test_an_error_ends_the_journey(scheduler, session):
    scheduler.schedule("1d", jobs.failjob)
    later = scheduler.schedule("2d", jobs.sample_job)
    with pytest.raises(ValueError, match="fail"):
        travel(scheduler, "3d")
    assert later.status == "scheduled"


def test_the_same_way_every_time(scheduler, session, seen):
    def once():
        seen.clear()
        for number in range(3):
            scheduler.recurring(
                f"r{number}", f"{number * 7} */3 * * *", note, args=[number], jitter="1h", overlap="allow"
            )
        scheduler.schedule("5h", chain, args=[2])
        journey = travel(scheduler, "1d")
        for number in range(3):
            scheduler.remove(f"r{number}")
        session.query(ScheduledJob).delete()
        session.commit()
        return list(seen), journey.stops

    assert once() == once()


def test_a_second_journey_goes_on_where_the_first_ended(scheduler, seen):
    scheduler.recurring("daily", "0 9 * * *", note, args=["daily"])
    first = travel(scheduler, "10d")
    second = travel(scheduler, "10d", start=first.end)
    assert len(seen) == 20
    assert first.stops[-1] < second.stops[0]


def test_a_damaged_recurring_job_does_not_hold_time_up(scheduler, session, seen):
    found = scheduler.recurring("broken", "@hourly", note, args=["broken"])
    scheduler.recurring("daily", "0 9 * * *", note, args=["daily"])
    found.rule = "nonsense"
    assert travel(scheduler, "3d").complete == 3
    assert found.error.startswith("InvalidTime")


def test_a_job_that_enqueues_itself_for_ever_is_told(scheduler, session, monkeypatch):
    monkeypatch.setattr("future_jobs.testing.MOST_PASSES", 20)
    scheduler.enqueue(again)
    with pytest.raises(FutureJobsError, match="does a job enqueue itself"):
        travel(scheduler, "1d")


def test_time_does_not_go_back(scheduler):
    with pytest.raises(ValueError, match="before the start"):
        travel(scheduler, NOON - DAY)


def test_what_was_pending_is_committed(scheduler, session, other):
    scheduler.schedule("9d", jobs.sample_job)
    travel(scheduler, "1d")
    assert other.scalar(select(ScheduledJob.status)) == "scheduled"
