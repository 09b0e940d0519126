"""What ends a worker's sleep before its time, and what does not."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from time import monotonic

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from future_jobs import Scheduler, wakeups
from future_jobs.wakeups import Alarm, Watch


@pytest.fixture
def woken(engine):
    """For when jobs were committed, as a worker on an engine of its own hears it."""
    woken: list[datetime] = []
    wakeups.listen(engine, woken.append)
    yield woken
    wakeups.unlisten(engine, woken.append)


def test_a_commit_wakes(scheduler, session, woken):
    job = scheduler.enqueue("tests.jobs.record")
    session.flush()
    assert woken == []
    session.commit()
    assert woken == [job.run_at]


def test_a_rollback_does_not(scheduler, session, woken):
    scheduler.enqueue("tests.jobs.record")
    session.rollback()
    session.commit()
    assert woken == []


def test_a_savepoint_that_is_rolled_back_does_not(scheduler, session, woken):
    kept = scheduler.enqueue("tests.jobs.record")
    with session.begin_nested() as savepoint:
        scheduler.schedule("1s", "tests.jobs.record")
        savepoint.rollback()
    session.commit()
    assert woken == [kept.run_at]


def test_nor_one_inside_of_that(scheduler, session, woken):
    with session.begin_nested() as outer:
        with session.begin_nested():
            scheduler.enqueue("tests.jobs.record")
        outer.rollback()
    session.commit()
    assert woken == []


def test_a_released_savepoint_wakes_at_the_outermost_commit(scheduler, session, woken):
    with session.begin_nested():
        scheduler.enqueue("tests.jobs.record")
    assert woken == []
    session.commit()
    assert len(woken) == 1


def test_many_jobs_wake_once_for_the_earliest(scheduler, session, woken):
    scheduler.schedule("1h", "tests.jobs.record")
    first = scheduler.enqueue("tests.jobs.record")
    scheduler.schedule_many("2h", "tests.jobs.record", [{} for _ in range(10)])
    session.commit()
    assert woken == [first.run_at]


def test_the_next_transaction_begins_anew(scheduler, session, woken):
    for _ in range(2):
        scheduler.enqueue("tests.jobs.record")
        session.commit()
    session.commit()
    assert len(woken) == 2


def test_another_engine_on_the_same_database_is_the_same_database(engine, kind, woken):
    if kind == "memory":
        pytest.skip("a database of its own")
    other = create_engine(engine.url)
    with Session(other) as session:
        Scheduler(session).enqueue("tests.jobs.record")
        session.commit()
    other.dispose()
    assert len(woken) == 1


def test_another_database_is_not(scheduler, session, tmp_path):
    woken: list[datetime] = []
    other = create_engine(f"sqlite:///{tmp_path}/another.db")
    wakeups.listen(other, woken.append)
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    wakeups.unlisten(other, woken.append)
    other.dispose()
    assert woken == []


def test_nobody_who_does_not_sleep_is_noted(scheduler, session):
    scheduler.enqueue("tests.jobs.record")
    assert wakeups._PENDING not in session.info


def test_an_alarm_that_rang_before_the_sleep_ends_it_and_only_that_one():
    alarm = Alarm()
    alarm.ring()
    alarm.sleep(60)
    began = monotonic()
    alarm.sleep(0.01)
    assert monotonic() - began >= 0.01


def test_an_alarm_rings_in_another_thread():
    alarm, slept = Alarm(), threading.Event()

    def sleep():
        alarm.sleep(60)
        slept.set()

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    alarm.ring(after=0.01)
    assert slept.wait(20)
    sleeper.join()


@pytest.mark.parametrize("kind", ["file"], indirect=True)
def test_a_commit_by_anybody_is_seen_where_the_database_counts_them(engine, scheduler, session):
    seen = threading.Event()
    watch = Watch(engine, seen.set)
    watch.start()
    job = None
    while not seen.wait(0.05):  # the watch may not have begun at the first
        job = scheduler.schedule("1h", "tests.jobs.record")
        session.commit()
    watch.stop()
    assert job is not None
    assert datetime.now(UTC) < job.run_at


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"], indirect=True)
def test_where_there_is_no_count_the_watch_ends(engine):
    watch = Watch(engine, lambda: None)
    watch.start()
    watch._thread.join(20)
    assert not watch._thread.is_alive()
    watch.stop()
