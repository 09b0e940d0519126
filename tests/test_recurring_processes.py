"""Several real processes declare and tick at once: one row for each name, one job for each time."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from future_jobs import RecurringJob, ScheduledJob, Scheduler
from tests.processes import start, together
from tests.shop import letters

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
NAMES = [f"job {number}" for number in range(20)]


@pytest.fixture
def session(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def times_of(session):
    found = session.execute(select(ScheduledJob.recurring_id, ScheduledJob.nominal_at))
    return Counter(tuple(row) for row in found)


def test_processes_that_declare_the_same_names_make_one_row_each(shared_url, session):
    results = together([start(shared_url, "declare", NOON.isoformat(), *NAMES) for _ in range(5)])
    rows = session.execute(select(RecurringJob.id, RecurringJob.name).order_by(RecurringJob.id)).all()
    assert sorted(name for _, name in rows) == sorted(NAMES)
    assert all(result == results[0] for result in results)
    # What else the losers wrote in the same transaction is there.
    assert len(letters(session)) == 5


def test_processes_that_tick_at_once_make_one_job_for_each_time(shared_url, session):
    scheduler = Scheduler(session, timezone=UTC, clock=lambda: NOON)
    for name in NAMES:
        scheduler.recurring(name, "0 * * * *", "tests.jobs.record", catch_up="all", overlap="allow")
    session.commit()
    later = NOON + timedelta(hours=6, minutes=5)
    results = together([start(shared_url, "tick", later.isoformat()) for _ in range(5)])
    found = times_of(session)
    assert len(found) == len(NAMES) * 6
    assert set(found.values()) == {1}
    ran = Counter(job_id for ids in results for job_id in ids)
    assert set(ran.values()) == {1}
    assert len(ran) == len(found)
    session.expire_all()
    assert {(each.fired, each.missed, each.next_run_at) for each in session.scalars(select(RecurringJob))} == {
        (6, 0, NOON + timedelta(hours=7))
    }


def test_processes_that_backfill_and_tick_at_once_make_one_job_for_each_time(shared_url, session):
    scheduler = Scheduler(session, timezone=UTC, clock=lambda: NOON)
    scheduler.recurring("r", "0 * * * *", "tests.jobs.record", catch_up="all", overlap="allow")
    session.commit()
    later = (NOON + timedelta(hours=50)).isoformat()
    processes = [start(shared_url, "tick", later) for _ in range(2)]
    processes += [start(shared_url, "backfill", "r", NOON.isoformat(), later) for _ in range(2)]
    together(processes)
    Scheduler(session, timezone=UTC).run_due(NOON + timedelta(hours=50))
    found = times_of(session)
    assert len(found) == 51
    assert set(found.values()) == {1}


def test_a_row_that_another_holds_is_not_waited_for(shared_url, session):
    scheduler = Scheduler(session, timezone=UTC, clock=lambda: NOON)
    for name in ("held", "free"):
        scheduler.recurring(name, "0 * * * *", "tests.jobs.record")
    session.commit()
    if session.get_bind().dialect.name == "sqlite":
        pytest.skip("one lock for the whole database")
    engine = create_engine(shared_url)
    with Session(engine) as other:
        Scheduler(other, timezone=UTC).pause("held")
        assert scheduler.run_due(NOON + timedelta(hours=1)).complete == 1
        other.rollback()
    assert scheduler.run_due(NOON + timedelta(hours=1)).complete == 1
    engine.dispose()
