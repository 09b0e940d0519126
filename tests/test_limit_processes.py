"""Limits that hold between processes: many claim jobs of one key, or of one rate, at the same instant."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from itertools import accumulate

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler
from tests import processes, workers


@pytest.fixture
def session(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "ledger"
    path.touch()
    return path


@pytest.fixture
def start(shared_url, ledger):
    with ExitStack() as stack:

        def start(**settings):
            process = workers.Process(shared_url, 2.0, ledger=ledger, **settings)
            stack.callback(process.close)
            return process

        yield start


def statuses(session):
    session.rollback()
    return dict(Counter(str(status) for status in session.scalars(select(ScheduledJob.status))))


def most_at_once(ledger):
    steps = [1 if line == "+" else -1 for line in ledger.read_text("ascii").splitlines()]
    assert sum(steps) == 0
    return max(accumulate(steps))


def wait_for_completed(running, count):
    """Wait until the workers ``running`` have told of ``count`` jobs in all."""
    told = threading.Semaphore(0)

    def read(process):
        for line in process.process.stdout:
            if json.loads(line)["event"] == "completed":
                told.release()

    for process in running:
        threading.Thread(target=read, args=[process], daemon=True).start()
    for number in range(count):
        assert told.acquire(timeout=60), f"{number} of {count} were completed"


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_its_limit_of_a_key_run_at_once_in_many_passes(shared_url, session, ledger, limit):
    Scheduler(session).schedule_many(
        "0s", "tests.processes.enter_and_leave", [{} for _ in range(40)], concurrency_key="k", concurrency_limit=limit
    )
    session.commit()
    racers = [processes.start(shared_url, "run_until_nothing_is_due", ledger=ledger) for _ in range(3)]
    ran = processes.together(racers)
    assert statuses(session) == {"complete": 40}
    assert sum(map(len, ran)) == 40
    assert most_at_once(ledger) <= limit


def test_no_more_than_its_limit_of_a_key_run_at_once_in_many_workers(session, start, ledger):
    scheduler = Scheduler(session)
    for key in ("a", "b"):
        handler = "tests.processes.enter_and_leave" if key == "a" else "tests.workers.write_once"
        scheduler.schedule_many("0s", handler, [{} for _ in range(30)], concurrency_key=key, concurrency_limit=2)
    session.commit()
    running = [start(slots=4) for _ in range(3)]
    wait_for_completed(running, 60)
    assert most_at_once(ledger) <= 2
    for process in running:
        process.signal(signal.SIGTERM)
        process.process.wait(timeout=60)
    assert statuses(session) == {"complete": 60}


def test_no_more_than_the_rate_start_in_many_passes(shared_url, session, ledger):
    Scheduler(session).schedule_many(
        "0s",
        "tests.processes.note_the_time",
        [{} for _ in range(30)],
        rate_limit="10/h",
        concurrency_key="k",
        concurrency_limit=100,
    )
    session.commit()
    processes.together([processes.start(shared_url, "run_until_nothing_is_due", ledger=ledger) for _ in range(3)])
    assert statuses(session) == {"complete": 10, "scheduled": 20}


def test_a_rate_is_used_up_and_never_exceeded_by_many_workers(session, start, ledger):
    Scheduler(session).schedule_many(
        "0s", "tests.processes.note_the_time", [{} for _ in range(20)], rate_limit="5/500ms"
    )
    session.commit()
    wait_for_completed([start(slots=4) for _ in range(2)], 20)
    times = sorted(map(float, ledger.read_text("ascii").split()))
    assert all(times[n + 5] - times[n] >= 0.499 for n in range(15))  # the clocks of two processes differ a little
    assert times[-1] - times[0] < 15


def test_the_key_of_a_killed_worker_is_free_once_its_lease_is_over(session, start):
    Scheduler(session).schedule_many("0s", "tests.workers.write_once", [{}, {}], concurrency_key="k")
    session.commit()
    first = start(held=True)
    assert first.wait_for("began")["job_id"]
    first.signal(signal.SIGKILL)
    first.wait()
    second = start()
    events = []
    while events.count("completed") < 2:
        events.append(json.loads(second.process.stdout.readline())["event"])
    assert events.index("rescued") < events.index("began")
    assert statuses(session) == {"complete": 2}
