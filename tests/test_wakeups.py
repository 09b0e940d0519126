"""What ends a worker's sleep before its time, and what does not."""

from __future__ import annotations

import threading
from datetime import timedelta
from time import monotonic

import pytest
from sqlalchemy import create_engine, event, func, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from future_jobs import (
    InvalidArgument,
    InvalidTime,
    ScheduledJob,
    Scheduler,
    Worker,
    notify_statements,
    notify_workers,
    wakeups,
)
from future_jobs.statements import Level
from future_jobs.wakeups import Alarm


@pytest.fixture
def woken(engine):
    """The levels of jobs that were committed, as a worker on an engine of its own hears it."""
    woken: list[list[Level]] = []
    wakeups.listen(engine, woken.append)
    yield woken
    wakeups.unlisten(engine, woken.append)


def test_a_commit_wakes(scheduler, session, woken):
    job = scheduler.enqueue("tests.jobs.record")
    session.flush()
    assert woken == []
    session.commit()
    assert woken == [[Level("default", 0, job.run_at)]]


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
    assert woken == [[Level("default", 0, kept.run_at)]]


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


def test_many_jobs_wake_once_for_the_earliest_of_each_level(scheduler, session, woken):
    scheduler.schedule("1h", "tests.jobs.record")
    first = scheduler.enqueue("tests.jobs.record")
    calls = [{}, {"queue": "mail"}, {"queue": "mail", "priority": 1}, {"queue": "mail", "concurrency_key": "k"}]
    scheduler.schedule_many("2h", "tests.jobs.record", calls * 3)
    session.commit()
    [levels] = woken
    later = levels[1].first_at
    assert levels == [
        Level("default", 0, first.run_at),
        Level("mail", 0, later),
        Level("mail", 1, later),
        Level("mail", 0, later, limited=True),
    ]


def test_more_levels_than_are_worth_telling_are_to_be_looked_for(scheduler, session, woken):
    scheduler.schedule_many("1h", "tests.jobs.record", [{"queue": f"q{n}"} for n in range(100)])
    session.commit()
    assert woken == [[]]


def test_a_job_that_is_retried_wakes_for_its_level(scheduler, session, woken):
    job = scheduler.schedule("1h", "tests.jobs.record", queue="mail", priority=3)
    scheduler.cancel(job)
    session.commit()
    assert scheduler.retry(job)
    session.commit()
    assert woken[1:] == [[Level("mail", 3, job.run_at)]]


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
    woken: list[list[Level]] = []
    other = create_engine(f"sqlite:///{tmp_path}/another.db")
    wakeups.listen(other, woken.append)
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    wakeups.unlisten(other, woken.append)
    other.dispose()
    assert woken == []


def test_nobody_who_does_not_sleep_is_noted(scheduler, session):
    scheduler.enqueue("tests.jobs.record")
    assert wakeups._NOTES not in session.info


def test_a_session_that_is_closed_instead_of_committed_wakes_nobody_and_keeps_nothing(scheduler, session, woken):
    for _ in range(3):
        scheduler.enqueue("tests.jobs.record")
        session.begin_nested()
        scheduler.enqueue("tests.jobs.record")
        session.close()
    session.commit()
    assert woken == []
    assert session.info[wakeups._NOTES] == {}


def test_a_savepoint_that_is_closed_is_rolled_back(scheduler, session, woken):
    savepoint = session.begin_nested()
    scheduler.enqueue("tests.jobs.record")
    savepoint.close()
    session.commit()
    assert woken == []


def test_a_scoped_session_wakes_too(engine, woken):
    scoped = scoped_session(sessionmaker(engine))
    for _ in range(2):
        Scheduler(scoped).enqueue("tests.jobs.record")
        scoped.commit()
        scoped.remove()
    assert len(woken) == 2


def test_what_is_made_up_for_wakes(scheduler, session, woken, now):
    scheduler.recurring("often", "15m", "tests.jobs.record")
    session.commit()
    assert woken == []
    scheduler.backfill("often", now - timedelta(hours=1), now)
    session.commit()
    assert len(woken) == 1


@pytest.mark.parametrize("kind", ["mariadb"], indirect=True)
def test_a_two_phase_commit_wakes(engine, woken):
    with Session(engine, twophase=True) as session:
        Scheduler(session).enqueue("tests.jobs.record")
        session.commit()
    assert len(woken) == 1


# --- a Session in a transaction that is not its own -----------------------------------------------------------------


@pytest.fixture
def connection(engine):
    with engine.connect() as connection:
        yield connection


def scheduled_inside(connection):
    with Session(connection) as session:
        Scheduler(session).enqueue("tests.jobs.record")
        session.commit()


def test_a_commit_inside_of_anothers_transaction_wakes_when_that_is_committed(connection, woken):
    with connection.begin():
        scheduled_inside(connection)
        scheduled_inside(connection)
    connection.close()
    assert len(woken) == 1


def test_and_nobody_if_that_is_rolled_back(connection, woken):
    with connection.begin() as transaction:
        scheduled_inside(connection)
        transaction.rollback()
    connection.close()
    assert woken == []


def test_a_connection_that_goes_on_has_committed(connection, woken):
    with connection.begin():
        scheduled_inside(connection)
    with connection.begin():
        assert len(woken) == 1
        scheduled_inside(connection)
    connection.close()
    assert len(woken) == 2


@pytest.mark.parametrize("kind", ["file", "postgresql", "mariadb"], indirect=True)
def test_what_a_handler_schedules_is_there_when_it_wakes(engine, scheduler, session, other):
    seen = []
    scheduler.enqueue("tests.jobs.schedule_another")
    session.commit()

    def look(_):
        seen.append(len(other.scalars(select(ScheduledJob).where(ScheduledJob.status == "scheduled")).all()))
        other.rollback()

    wakeups.listen(engine, look)
    scheduler.run_due()
    wakeups.unlisten(engine, look)
    assert seen == [1]


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


# --- notifications ------------------------------------------------------------------------------------------------


@pytest.fixture
def said(engine):
    """The times that a NOTIFY was sent."""
    said = []

    def hear(_, __, statement, *___):
        if "pg_notify" in statement:
            said.append(statement)

    event.listen(notify_workers(engine), "before_cursor_execute", hear)
    return said


@pytest.fixture
def inbox(engine):
    """What a connection that listens has received when it is asked: where jobs are, of each notification."""
    with create_engine(engine.url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("LISTEN future_jobs"))
        driver = connection.connection.driver_connection
        yield lambda: [notify_statements.levels_in(each.payload) for each in driver.notifies(timeout=0.1)]
        connection.detach()


postgresql = pytest.mark.parametrize("kind", ["postgresql"], indirect=True)


@postgresql
def test_a_transaction_notifies_once(scheduler, session, said, inbox):
    scheduler.schedule_many("0s", "tests.jobs.record", [{} for _ in range(10)])
    scheduler.enqueue("tests.jobs.record")
    with session.begin_nested():
        scheduler.enqueue("tests.jobs.record")
    assert inbox() == []
    session.commit()
    first_at = session.scalar(select(func.min(ScheduledJob.run_at)))
    assert inbox() == [[Level("default", 0, first_at)]]
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert len(said) == 2


@postgresql
def test_another_time_of_what_is_notified_of_only_if_it_is_elsewhere_or_earlier(scheduler, session, said, inbox):
    second = scheduler.schedule("0.9s", "tests.jobs.record")
    scheduler.schedule("0.9s", "tests.jobs.record")
    first = scheduler.enqueue("tests.jobs.record")
    scheduler.schedule("0.5s", "tests.jobs.record")
    urgent = scheduler.schedule("0.5s", "tests.jobs.record", priority=1)
    session.commit()
    assert inbox() == [
        [Level("default", 0, second.run_at)],
        [Level("default", 0, first.run_at)],
        [Level("default", 1, urgent.run_at)],
    ]
    assert len(said) == 3


@postgresql
def test_who_is_told_to_look_for_everything_is_told_nothing_more(scheduler, session, said, inbox):
    scheduler.schedule_many("0s", "tests.jobs.record", [{"queue": f"q{n}"} for n in range(100)])
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert inbox() == [[]]
    assert len(said) == 1


@postgresql
def test_who_has_been_told_of_many_places_one_by_one_is_told_to_look_in_the_end(scheduler, session, said, inbox):
    for n in range(wakeups.MOST_LEVELS + 4):
        scheduler.enqueue("tests.jobs.record", queue=f"q{n}")
    session.commit()
    told = inbox()
    assert [[level.queue for level in levels] for levels in told] == [
        *([f"q{n}"] for n in range(wakeups.MOST_LEVELS)),
        [],
    ]
    assert len(said) == len(told)


@postgresql
def test_of_what_is_scheduled_together_only_what_is_for_now_is_notified_of(session, engine, inbox, now):
    notify_workers(engine)
    rows = [
        {"queue": queue, "priority": 0, "limited": False, "run_at": now + later}
        for queue, later in [("later", timedelta(hours=1)), ("soon", timedelta(0))]
    ]
    wakeups.announce(session, session.connection(), rows, now=now)
    session.commit()
    assert inbox() == [[Level("soon", 0, now)]]


@postgresql
def test_what_is_rolled_back_notifies_nobody(scheduler, session, said, inbox):
    scheduler.enqueue("tests.jobs.record")
    session.rollback()
    with session.begin_nested() as savepoint:
        scheduler.enqueue("tests.jobs.record")
        savepoint.rollback()
    session.commit()
    assert inbox() == []
    assert len(said) == 2


@postgresql
def test_what_follows_a_savepoint_that_is_rolled_back_notifies(scheduler, session, said, inbox):
    with session.begin_nested() as savepoint:
        scheduler.enqueue("tests.jobs.record")
        savepoint.rollback()
    job = scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert inbox() == [[Level("default", 0, job.run_at)]]


@postgresql
def test_a_savepoint_that_is_released_has_notified(scheduler, session, said):
    with session.begin_nested():
        scheduler.enqueue("tests.jobs.record")
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert len(said) == 1


def test_a_job_for_later_notifies_nobody(scheduler, session, said):
    scheduler.schedule("2s", "tests.jobs.record")
    session.commit()
    assert said == []


@postgresql
def test_how_much_later_can_be_said(engine, scheduler, session, said):
    notify_workers(engine, within="1m")
    scheduler.schedule("30s", "tests.jobs.record")
    session.commit()
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["memory", "file", "mariadb"], indirect=True)
def test_where_there_are_no_notifications_nothing_is_sent(scheduler, session, said, engine):
    scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert said == []
    Worker(engine, notify=True).stop()


@postgresql
def test_a_transaction_of_two_phases_cannot_notify(engine, said):
    with Session(engine, twophase=True) as session:
        Scheduler(session).enqueue("tests.jobs.record")
        session.rollback()
    assert said == []


@pytest.mark.parametrize(("given", "within", "error"), [(None, "1s", InvalidArgument), ("engine", "1mo", InvalidTime)])
def test_notify_workers_says_what_it_takes(given, within, error):
    with pytest.raises(error):
        notify_workers(given and create_engine("sqlite://"), within=within)
