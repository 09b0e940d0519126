"""Real workers that are stopped, killed and paused: nothing is lost, and nothing is done twice in the database."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from time import monotonic

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler
from tests import workers
from tests.shop import letters

LEASE = 2.0


@pytest.fixture
def session(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def start(shared_url):
    with ExitStack() as stack:

        def start(lease=LEASE, **settings):
            process = workers.Process(shared_url, lease, **settings)
            stack.callback(process.close)
            return process

        yield start


def scheduled(session, count):
    ids = Scheduler(session).schedule_many("0s", "tests.workers.write_once", [{} for _ in range(count)])
    session.commit()
    return ids


def written(session):
    """How many attempts of each job committed what they wrote."""
    session.rollback()
    return Counter(int(letter.partition(":")[0]) for letter in letters(session))


def statuses(session):
    session.rollback()
    return dict(Counter(str(status) for status in session.scalars(select(ScheduledJob.status))))


def until(true):
    """Wait for what other processes do, which a test is not told of."""
    deadline, pause = monotonic() + 60, threading.Event()
    while not true():
        assert monotonic() < deadline
        pause.wait(0.05)


def put_to_sleep(process, session):
    """Stop a process at a moment at which it holds no lock: one that holds the database's lock stops everybody."""
    for _ in range(100):
        process.signal(signal.SIGSTOP)
        os.waitpid(process.process.pid, os.WUNTRACED)
        if is_free(session):
            return
        process.signal(signal.SIGCONT)
        os.waitpid(process.process.pid, os.WCONTINUED)
    raise AssertionError("it always holds a lock")


def is_free(session):
    try:
        if session.get_bind().dialect.name == "sqlite":
            session.execute(text("PRAGMA busy_timeout = 100"))
            session.execute(text("BEGIN EXCLUSIVE"))  # nobody reads, either: a reader keeps others from committing
            return True
        return session.scalar(select(ScheduledJob.id).with_for_update(skip_locked=True)) is not None
    except OperationalError:
        return False
    finally:
        session.rollback()


def test_sigterm_lets_what_runs_finish_and_hands_back_the_rest(session, start):
    ids = scheduled(session, 5)
    process = start(slots=2, held=True)
    process.wait_for("began", number=2)
    process.signal(signal.SIGTERM)
    process.let_go()
    assert process.wait() == 0
    assert statuses(session) == {"complete": 2, "scheduled": 3}
    assert set(written(session)) <= set(ids)
    assert set(session.scalars(select(ScheduledJob.losses))) == {0}


def test_what_a_killed_worker_held_is_run_by_another_soon(session, start):
    [job_id] = scheduled(session, 1)
    victim = start(held=True)
    victim.wait_for("began")
    other = start()
    victim.signal(signal.SIGKILL)
    killed_at = monotonic()
    assert victim.wait() == -signal.SIGKILL
    assert other.wait_for("rescued")["job_id"] == job_id
    other.wait_for("completed")
    assert monotonic() - killed_at < 2.5 * LEASE
    assert written(session) == {job_id: 1}
    job = session.get(ScheduledJob, job_id)
    assert (job.status, job.attempt, job.losses) == ("complete", 2, 1)


def test_a_worker_that_slept_over_its_lease_commits_nothing(session, start):
    [job_id] = scheduled(session, 1)
    sleeper = start(lease=1.0, held=True)
    sleeper.wait_for("began")
    put_to_sleep(sleeper, session)
    other = start(lease=1.0)
    other.wait_for("completed")
    sleeper.signal(signal.SIGCONT)
    sleeper.let_go()
    assert sleeper.wait_for("lost")["job_id"] == job_id
    sleeper.signal(signal.SIGTERM)
    assert sleeper.wait() == 0
    assert letters(session) == [f"{job_id}:2"]


def test_workers_that_are_killed_at_any_moment_lose_and_double_nothing(session, start):
    ids = []
    for turn in range(4):
        ids += scheduled(session, 60)
        fleet = [start(lease=1.0) for _ in range(2)]
        until(lambda turn=turn: len(written(session)) > 60 * turn)
        for process in fleet if turn < 3 else ():
            process.signal(signal.SIGKILL)
    until(lambda: statuses(session) == {"complete": len(ids)})
    assert written(session) == dict.fromkeys(ids, 1)


def test_many_workers_never_do_a_job_twice(session, start):
    ids = scheduled(session, 300)
    fleet = [start() for _ in range(3)]
    until(lambda: statuses(session) == {"complete": 300})
    for process in fleet:
        process.signal(signal.SIGTERM)
    assert [process.wait() for process in fleet] == [0, 0, 0]
    assert written(session) == dict.fromkeys(ids, 1)
    assert session.scalars(select(ScheduledJob.attempt).distinct()).all() == [1]
