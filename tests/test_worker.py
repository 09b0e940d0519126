"""A worker runs what is due for as long as it lives: the same on every database."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool, StaticPool

from future_jobs import (
    InvalidArgument,
    InvalidOption,
    NotSupported,
    RecurringJob,
    ScheduledJob,
    SchemaError,
    Worker,
    events,
)
from future_jobs.loops import AHEAD_SECONDS
from tests import workjobs
from tests.shop import letters
from tests.workjobs import Stage


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(workjobs, "STAGE", stage)
    yield stage
    stage.gate.set()


@pytest.fixture
def heard():
    """The events, in order."""
    heard: list = []
    listeners = [
        (name, events.listen(name, lambda name=name, **data: heard.append((name, data)))) for name in events.EVENTS
    ]
    yield heard
    for name, listener in listeners:
        events.unlisten(name, listener)


@pytest.fixture
def parallel(engine):
    if isinstance(engine.pool, StaticPool):
        pytest.skip("one connection, one thread")
    return engine


def statuses(session):
    session.rollback()
    return dict(Counter(str(status) for status in session.scalars(select(ScheduledJob.status))))


def drained(engine, jobs, **settings):
    """Run a worker until it has run so many jobs."""
    worker = Worker(engine, max_jobs=jobs, **settings)
    worker.run()
    return worker


# --- what it runs -------------------------------------------------------------------------------------------------


def test_it_runs_what_is_due(engine, scheduler, session, stage):
    ids = scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(250)])
    later = scheduler.schedule("1h", "tests.workjobs.note", args=["later"])
    session.commit()
    worker = drained(engine, len(ids))
    assert sorted(stage.began) == list(range(250))
    assert worker.ran == 250
    assert statuses(session) == {"complete": 250, "scheduled": 1}
    assert later.attempt == 0


def test_max_jobs_is_exact(engine, scheduler, session, stage):
    scheduler.schedule_many("0s", "tests.workjobs.note", [{} for _ in range(50)])
    session.commit()
    drained(engine, 7)
    assert len(stage.began) == 7
    assert statuses(session) == {"complete": 7, "scheduled": 43}


def test_a_better_priority_runs_first_and_then_the_earlier_time(engine, scheduler, session, stage):
    for name, when, priority in (("c", "-2h", 0), ("a", "-1h", 5), ("d", "-1h", 0), ("b", "-30m", 5), ("e", "-3h", -1)):
        run_at = datetime.now(UTC) - timedelta(minutes={"-3h": 180, "-2h": 120, "-1h": 60, "-30m": 30}[when])
        scheduler.schedule(run_at, "tests.workjobs.note", args=[name], priority=priority)
    session.commit()
    drained(engine, 5, queues={"default": 1})
    assert stage.began == list("abcde")


def test_only_its_queues_are_served(engine, scheduler, session, stage):
    for queue in ("mail", "default", "other"):
        scheduler.enqueue("tests.workjobs.note", args=[queue], queue=queue)
    session.commit()
    drained(engine, 2, queues={"mail": 1, "other": 2})
    assert sorted(stage.began) == ["mail", "other"]


def test_a_star_serves_the_queues_that_are_not_named(engine, scheduler, session, stage):
    for queue in ("mail", "default", "other"):
        scheduler.enqueue("tests.workjobs.note", args=[queue], queue=queue)
    session.commit()
    drained(engine, 3, queues={"mail": 1, "*": 2})
    assert sorted(stage.began) == ["default", "mail", "other"]


def test_no_more_jobs_of_a_queue_run_at_once_than_it_has_slots(parallel, scheduler, session, stage):
    scheduler.schedule_many("0s", "tests.workjobs.held", [{"args": ["a"]} for _ in range(5)], queue="a")
    scheduler.schedule_many("0s", "tests.workjobs.held", [{"args": ["b"]} for _ in range(5)], queue="b")
    session.commit()
    with Worker(parallel, queues={"a": 2, "b": 1}).background():
        stage.wait_for(lambda: stage.now == 3)
        assert Counter(stage.began) == {"a": 2, "b": 1}
        stage.gate.set()
        stage.wait_for(lambda: len(stage.ended) == 10)
    assert statuses(session) == {"complete": 10}


def test_a_slow_job_holds_up_nobody_else(parallel, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.held", args=["slow"], priority=1)
    scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(60)])
    session.commit()
    with Worker(parallel, queues={"default": 2}).background():
        stage.wait_for(lambda: len(stage.ended) == 60)
        stage.gate.set()
    assert statuses(session) == {"complete": 61}


def test_jobs_that_were_lost_again_and_again_run_one_at_a_time(parallel, scheduler, session, stage):
    ids = scheduler.schedule_many("0s", "tests.workjobs.held", [{"args": ["lost"]} for _ in range(4)])
    session.execute(update(ScheduledJob).where(ScheduledJob.id.in_(ids)).values(losses=3))
    scheduler.schedule_many("0s", "tests.workjobs.held", [{"args": ["fine"]} for _ in range(2)])
    session.commit()
    with Worker(parallel, queues={"default": 6}, poll=timedelta(seconds=0.02)).background():
        stage.wait_for(lambda: stage.now == 3)
        assert Counter(stage.began) == {"fine": 2, "lost": 1}
        stage.gate.set()
        stage.wait_for(lambda: len(stage.ended) == 6)
    assert stage.most == 3
    assert statuses(session) == {"complete": 6}


def test_a_job_that_was_lost_once_need_not_wait_for_a_free_slot(engine, scheduler, session):
    ids = scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(4)])
    session.execute(update(ScheduledJob).where(ScheduledJob.id == ids[2]).values(losses=1))
    session.execute(update(ScheduledJob).where(ScheduledJob.id == ids[3]).values(losses=2))
    session.commit()
    claimed = []
    listener = events.listen("claimed", lambda job_id, **_: claimed.append(job_id))
    worker = Worker(engine, queues={"default": 1}, prefetch=10)
    worker.tick()
    events.unlisten("claimed", listener)
    worker.stop()
    assert claimed == ids[:3]


def test_what_this_process_has_scheduled_is_claimed_before_anything_else_is_looked_for(engine, scheduler, session):
    worker = Worker(engine)
    worker.tick()
    said = []
    event.listen(Engine, "before_cursor_execute", hear := lambda *args: said.append(args[2]))
    scheduler.enqueue("tests.workjobs.note", args=[1])
    session.commit()
    said.clear()
    worker.tick()
    event.remove(Engine, "before_cursor_execute", hear)
    worker.stop()
    about_jobs = [each for each in said if "future_jobs_scheduled_job" in each]
    assert "leased_until" in about_jobs[0] or "FOR UPDATE" in about_jobs[0]


def test_an_idle_worker_wakes_a_little_before_a_job_is_due_to_have_looked_by_then(engine, scheduler, session):
    worker = Worker(engine, poll="1h")
    worker.tick()
    scheduler.schedule("1m", "tests.workjobs.note", args=[1])
    session.commit()
    while not (delay := worker.tick()):
        pass
    worker.stop()
    assert 30 < delay < 60 - AHEAD_SECONDS


def test_one_that_stalls_is_overtaken_by_the_others(parallel, scheduler, session, stage):
    with Worker(parallel, queues={"default": 4}).background():
        scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(2000)])
        session.commit()  # it learns that jobs take no time
        stage.wait_for(lambda: len(stage.ended) == 2000)
        scheduler.enqueue("tests.workjobs.held", args=["slow"])
        session.commit()
        stage.wait_for(lambda: stage.now == 1)
        scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(50)])
        session.commit()
        stage.wait_for(lambda: len(stage.ended) == 2050)
        stage.gate.set()
    assert statuses(session) == {"complete": 2051}


def test_what_expired_is_marked_and_not_run(engine, scheduler, session, stage, heard):
    past = datetime.now(UTC) - timedelta(hours=2)
    scheduler.schedule_many(past, "tests.workjobs.note", [{} for _ in range(3)], expires="1h")
    scheduler.enqueue("tests.workjobs.note", args=["due"])
    session.commit()
    drained(engine, 1)
    assert stage.began == ["due"]
    assert statuses(session) == {"complete": 1, "expired": 3}
    assert [name for name, _ in heard if name == "expired"] == ["expired"] * 3


def test_what_fails_is_recorded_and_the_worker_goes_on(engine, scheduler, session, stage):
    failing = scheduler.enqueue("tests.workjobs.fail", priority=1)
    scheduler.enqueue("tests.workjobs.note")
    session.commit()
    drained(engine, 2)
    assert statuses(session) == {"failed": 1, "complete": 1}
    assert "ValueError: fail" in failing.error


def test_retries_and_snoozes_come_back(engine, scheduler, session, stage):
    retried = scheduler.enqueue("tests.workjobs.fail_once", max_attempts=2, backoff="0s")
    snoozed = scheduler.enqueue("tests.workjobs.snooze_once")
    session.commit()
    drained(engine, 4)
    assert statuses(session) == {"complete": 2}
    assert (retried.failures, snoozed.snoozes) == (1, 1)


def test_what_a_job_writes_commits_with_it_or_not_at_all(engine, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.write", args=["kept"])
    scheduler.enqueue("tests.jobs.write_then_fail", args=["gone"])
    session.commit()
    drained(engine, 2)
    assert statuses(session) == {"complete": 1, "failed": 1}
    assert letters(session) == ["kept"]


def test_jobs_that_schedule_jobs(engine, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.chain", args=[5])
    session.commit()
    drained(engine, 6, poll="20s")
    assert stage.began == [5, 4, 3, 2, 1, 0]


def test_handlers_find_the_settings_of_the_worker(engine, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.settings")
    session.commit()
    drained(engine, 1, timezone="Europe/Stockholm", allow=["tests."])
    assert stage.began == [("Europe/Stockholm", ["tests."], True)]


def test_what_is_not_allowed_fails_and_is_not_imported(engine, scheduler, session):
    job = scheduler.enqueue("os.getcwd")
    session.commit()
    drained(engine, 1, allow=["tests."])
    assert job.status == "failed"
    assert "CallableRefused" in job.error


def test_a_callable_that_this_process_does_not_know_waits_uncharged(engine, scheduler, session, stage, heard):
    job = scheduler.enqueue("tests.workjobs.note", priority=1)
    scheduler.enqueue("tests.workjobs.note")
    session.execute(
        update(ScheduledJob).where(ScheduledJob.id == job.id).values(callable_name="tests.workjobs.of_next_week")
    )
    session.commit()
    drained(engine, 1)
    session.refresh(job)
    assert (job.status, job.failures, job.error) == ("scheduled", 0, None)
    assert timedelta(seconds=30) < job.run_at - datetime.now(UTC) < timedelta(seconds=90)
    assert [data["job_id"] for name, data in heard if name == "released"] == [job.id]


def test_a_module_that_another_job_is_still_importing_is_waited_for(
    parallel, scheduler, session, stage, tmp_path, monkeypatch
):
    (tmp_path / "slow_module.py").write_text(
        "from tests import workjobs\n"
        "workjobs.STAGE.enter('importing')\n"
        "workjobs.STAGE.gate.wait(20)\n"
        "def work(): workjobs.note('work')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(4):
        job = scheduler.enqueue("tests.workjobs.note", args=[])
        session.execute(update(ScheduledJob).where(ScheduledJob.id == job.id).values(callable_name="slow_module.work"))
    session.commit()
    with Worker(parallel).background():
        stage.wait_for(lambda: stage.began == ["importing"])
        threading.Event().wait(0.1)  # for the others to come to it: without the wait they would find half of it
        stage.gate.set()
        stage.wait_for(lambda: stage.ended == ["work"] * 4)
    sys.modules.pop("slow_module")
    assert statuses(session) == {"complete": 4}


def test_recurring_jobs_are_run_when_their_time_comes(engine, scheduler, session, stage):
    scheduler.recurring("hourly", "1h", "tests.workjobs.note", args=["hourly"])
    session.execute(update(RecurringJob).values(next_run_at=datetime.now(UTC) - timedelta(seconds=1)))
    session.commit()
    drained(engine, 1)
    assert stage.began == ["hourly"]


def test_it_sleeps_until_a_recurring_job_is_due(engine, scheduler, session):
    scheduler.recurring("hourly", "1h", "tests.workjobs.note")
    session.execute(update(RecurringJob).values(next_run_at=datetime.now(UTC) + timedelta(minutes=5)))
    session.commit()
    worker = Worker(engine, poll="1h")
    worker.tick()
    delay = worker.tick()
    worker.stop()
    assert 200 < delay <= 300


def test_retention_prunes_what_is_complete(engine, scheduler, session, stage):
    scheduler.schedule_many("0s", "tests.workjobs.note", [{} for _ in range(3)])
    scheduler.enqueue("tests.workjobs.fail")
    session.commit()
    drained(engine, 4)
    session.execute(update(ScheduledJob).values(finished_at=datetime.now(UTC) - timedelta(days=2)))
    scheduler.enqueue("tests.workjobs.note")
    session.commit()
    drained(engine, 1, retention="1d")
    assert statuses(session) == {"complete": 1, "failed": 1}


# --- when ---------------------------------------------------------------------------------------------------------


def test_idle_it_only_reads(engine, scheduler, session):
    scheduler.schedule("1h", "tests.jobs.record")
    session.commit()
    said: list[str] = []
    thread = threading.get_ident()  # the thread of the leases also says that the worker is alive

    def hear(*args):
        if threading.get_ident() == thread:
            said.append(args[2])

    worker = Worker(engine)
    worker.tick()
    event.listen(engine, "before_cursor_execute", hear)
    loop = worker._loop
    if loop.units.engine is not engine:
        event.listen(loop.units.engine, "before_cursor_execute", hear)
    delays = []
    for _ in range(3):
        loop._stale_after = 0.0
        delays.append(worker.tick())
    words = {statement.split()[0] for statement in said}
    worker.stop()
    assert words
    assert words <= {"SELECT", "WITH", "SET"}
    assert delays == [1.0, 1.0, 1.0]


def test_it_sleeps_until_the_next_is_due(engine, scheduler, session):
    scheduler.schedule("5m", "tests.jobs.record")
    session.commit()
    worker = Worker(engine, poll="1h")
    worker.tick()
    delay = worker.tick()
    worker.stop()
    assert 200 < delay <= 300


def test_a_job_due_at_an_instant_starts_then_and_not_before(parallel, scheduler, session, stage):
    with Worker(parallel, poll="20s").background():
        scheduler.schedule(timedelta(seconds=0.3), "tests.workjobs.when")
        session.commit()
        stage.wait_for(lambda: stage.ended)
    assert 0 <= stage.ended[0] < 0.5


def test_a_commit_in_this_process_wakes_the_worker(parallel, scheduler, session, stage):
    with Worker(parallel, poll="1h").background():
        for turn in range(3):
            scheduler.enqueue("tests.workjobs.note", args=[turn])
            session.commit()
            stage.wait_for(lambda turn=turn: len(stage.ended) == turn + 1)
    assert stage.ended == [0, 1, 2]


def test_a_retry_and_many_wake_it_too(parallel, scheduler, session, stage):
    job = scheduler.schedule("1h", "tests.workjobs.note", args=["retried"])
    session.commit()
    scheduler.cancel(job)
    session.commit()
    with Worker(parallel, poll="1h").background():
        scheduler.retry(job)
        session.commit()
        stage.wait_for(lambda: stage.ended == ["retried"])
        scheduler.schedule_many("0s", "tests.workjobs.note", [{"args": [n]} for n in range(3)])
        session.commit()
        stage.wait_for(lambda: len(stage.ended) == 4)


# --- ending -------------------------------------------------------------------------------------------------------


def test_stopping_waits_for_what_runs_and_hands_back_what_waits(parallel, scheduler, session, stage, heard):
    scheduler.schedule_many("0s", "tests.workjobs.held", [{"args": [n]} for n in range(6)])
    session.commit()
    with Worker(parallel, queues={"default": 2}, prefetch=4).background() as worker:
        stage.wait_for(lambda: stage.now == 2)
        handed_back = threading.Semaphore(0)
        listener = events.listen("released", lambda **_: handed_back.release())
        ending = threading.Thread(target=worker.stop)
        ending.start()
        for _ in range(4):
            assert handed_back.acquire(timeout=20)
        events.unlisten("released", listener)
        stage.gate.set()
        ending.join(20)
    assert len(stage.ended) == 2
    assert statuses(session) == {"complete": 2, "scheduled": 4}
    waiting = session.scalars(select(ScheduledJob).where(ScheduledJob.status == "scheduled")).all()
    assert {(job.leased_by, job.started_at, job.failures, job.losses) for job in waiting} == {(None, None, 0, 0)}
    assert [data["jobs"] for name, data in heard if name == "stopped"] == [2]


def test_what_does_not_finish_in_time_is_handed_back_and_its_writes_are_gone(parallel, scheduler, session, stage):
    job = scheduler.enqueue("tests.workjobs.held", args=["stuck"])
    session.commit()
    with Worker(parallel).background(timeout="0s"):
        stage.wait_for(lambda: stage.now == 1)
    session.refresh(job)
    assert (job.status, job.failures, job.losses, job.attempt) == ("scheduled", 0, 0, 1)
    session.commit()
    stage.gate.set()
    with Worker(parallel).background():
        stage.wait_for(lambda: len(stage.began) == 2)
    session.refresh(job)
    assert (job.status, job.attempt) == ("complete", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(parallel, scheduler, session, stage, number):
    scheduler.enqueue("tests.workjobs.held", args=["a"])
    session.commit()
    before = signal.getsignal(number)

    def end():
        stage.wait_for(lambda: stage.now == 1)
        os.kill(os.getpid(), number)
        stage.gate.set()

    helper = threading.Thread(target=end)
    helper.start()
    Worker(parallel).run()
    helper.join()
    assert statuses(session) == {"complete": 1}
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_it_at_once(parallel, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.held", args=["a"])
    session.commit()
    worker = Worker(parallel)

    def end():
        stage.wait_for(lambda: stage.now == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not worker.is_stopping:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=end)
    helper.start()
    worker.run(timeout="1h")
    helper.join()
    assert (stage.now, statuses(session)) == (1, {"scheduled": 1})


def test_a_job_may_stop_the_worker(parallel, scheduler, session, stage, monkeypatch):
    worker = Worker(parallel)
    monkeypatch.setattr(workjobs, "WORKER", worker)
    scheduler.enqueue("tests.workjobs.stop")
    session.commit()
    worker.run()
    assert statuses(session) == {"complete": 1}


def test_it_can_be_used_again(engine, scheduler, session, stage):
    worker = Worker(engine)
    for turn in range(2):
        scheduler.enqueue("tests.workjobs.note", args=[turn])
        session.commit()
        while len(stage.ended) <= turn:
            worker.tick()
        worker.stop()
    assert statuses(session) == {"complete": 2}


def test_lifespan_is_background_for_an_event_loop(parallel, scheduler, session, stage):
    scheduler.enqueue("tests.workjobs.note", args=["async"])
    session.commit()

    async def application():
        async with Worker(parallel).lifespan():
            await asyncio.to_thread(stage.wait_for, lambda: stage.ended)

    asyncio.run(application())
    assert statuses(session) == {"complete": 1}


# --- leases -------------------------------------------------------------------------------------------------------


def test_leases_are_renewed_while_a_job_runs(parallel, scheduler, session, stage):
    job = scheduler.enqueue("tests.workjobs.held")
    session.commit()
    with Worker(parallel).background() as worker:
        stage.wait_for(lambda: stage.now == 1)
        session.refresh(job)
        first = job.leased_until
        session.commit()
        worker._loop.leases.renew()
        session.refresh(job)
        assert job.leased_until > first
        assert job.leased_by == worker._loop.name
        session.commit()
        stage.gate.set()


def test_a_job_whose_lease_was_lost_commits_nothing(parallel, scheduler, session, stage, heard):
    job = scheduler.enqueue("tests.workjobs.write_held", args=["stale"])
    if parallel.dialect.name == "sqlite":
        pytest.skip("its handler holds the one write lock, so nobody can take its job")
    session.commit()
    with Worker(parallel).background():
        stage.wait_for(lambda: stage.now == 1)
        session.execute(update(ScheduledJob).values(attempt=ScheduledJob.attempt + 1, leased_by="another"))
        session.commit()
        stage.gate.set()
        stage.wait_for(lambda: stage.ended)
    session.refresh(job)
    assert (job.status, job.leased_by, letters(session)) == ("running", "another", [])
    assert [name for name, _ in heard if name == "lost"] == ["lost"]


@pytest.fixture
def deserted(parallel, scheduler, session):
    """A job whose worker has died."""
    job = scheduler.enqueue("tests.workjobs.note")
    session.flush()
    session.execute(
        update(ScheduledJob).values(
            status="running", attempt=1, leased_by="the dead", leased_until=datetime.now(UTC) - timedelta(seconds=1)
        )
    )
    session.commit()
    return job


def test_a_job_of_the_dead_is_taken_back_once_its_lease_stayed_unchanged(parallel, session, stage, deserted, heard):
    with Worker(parallel, lease=timedelta(seconds=0.2), poll=timedelta(seconds=0.1)).background():
        stage.wait_for(lambda: stage.ended)
    session.refresh(deserted)
    assert (deserted.status, deserted.attempt, deserted.losses) == ("complete", 2, 1)
    assert deserted.run_at == deserted.nominal_at  # it kept its place
    assert [data["worker"] for name, data in heard if name == "rescued"] == ["the dead"]


def test_a_job_that_was_lost_again_and_again_is_tried_a_little_later(parallel, session, stage, deserted):
    session.execute(update(ScheduledJob).values(losses=2))
    session.commit()
    with Worker(parallel, lease=timedelta(seconds=0.2), poll=timedelta(seconds=0.1)).background():
        stage.wait_for(lambda: stage.ended)
    session.refresh(deserted)
    assert deserted.losses == 3
    assert deserted.run_at > deserted.nominal_at


def test_a_lease_that_moves_is_left_alone(parallel, session, deserted):
    worker = Worker(parallel, lease=timedelta(0))
    worker.tick()
    leases = worker._loop.leases
    leases.stop()
    leases._watched = {}
    leases.watch()
    session.execute(update(ScheduledJob).values(leased_until=datetime.now(UTC) - timedelta(milliseconds=1)))
    session.commit()
    leases.watch()  # another lease than the one it saw: it begins to watch anew
    session.refresh(deserted)
    assert deserted.status in {"running", "scheduled"}
    worker.stop()


def test_jobs_that_were_claimed_by_a_commit_whose_reply_was_lost_go_back(parallel, scheduler, session, stage):
    """Even while the worker's other job has its row locked, which is then not among those that are renewed."""
    held = scheduler.enqueue("tests.workjobs.held").id
    session.commit()
    with Worker(parallel, queues={"default": 1}).background() as worker:
        stage.wait_for(lambda: stage.now == 1)
        worker._loop.leases.stop()  # from here on they are renewed when the test says so
        stray = scheduler.schedule("1h", "tests.workjobs.note")
        session.flush()
        session.execute(
            update(ScheduledJob)
            .where(ScheduledJob.id == stray.id)
            .values(
                status="running",
                attempt=1,
                leased_by=worker._loop.name,
                leased_until=datetime.now(UTC) + timedelta(hours=1),
            )
        )
        session.commit()
        with parallel.connect() as other:
            if parallel.dialect.name == "postgresql":  # MariaDB scans so small a table, and waits for the row
                other.execute(select(ScheduledJob.id).where(ScheduledJob.id == held).with_for_update())
            for _ in range(2):
                worker._loop.leases.renew()
        session.refresh(stray)
        assert (stray.status, stray.losses) == ("scheduled", 0)
        session.commit()
        stage.gate.set()


def test_what_is_being_claimed_is_not_handed_back(parallel, scheduler, session, stage):
    """A claim may be committed some time before the worker, which is starved of the processor, knows what it has."""
    scheduler.enqueue("tests.workjobs.held")
    session.commit()
    with Worker(parallel, queues={"default": 2}).background() as worker:
        stage.wait_for(lambda: stage.now == 1)
        loop = worker._loop
        loop.leases.stop()  # from here on they are renewed when the test says so
        job = scheduler.enqueue("tests.workjobs.note")
        session.flush()
        job_id, seen = job.id, threading.Event()

        def committed(*_):
            if threading.current_thread() is not worker._thread or seen.is_set():
                return
            with Session(parallel) as other:
                if other.get_one(ScheduledJob, job_id).attempt == 0:
                    return
            for _ in range(2):
                renewal = threading.Thread(target=loop.leases.renew)
                renewal.start()
                renewal.join()
            seen.set()

        event.listen(loop.units.engine, "checkin", committed)
        session.commit()
        assert seen.wait(20)
        stage.gate.set()
        stage.wait_for(lambda: len(stage.ended) == 2)
    session.refresh(job)
    assert (job.status, job.attempt) == ("complete", 1)


def test_two_workers_share_and_never_double(parallel, scheduler, session, stage):
    calls = [{"priority": n % 3} for n in range(300)]
    ids = scheduler.schedule_many("0s", "tests.workjobs.count_in_database", calls)
    session.commit()
    done = threading.Semaphore(0)
    listener = events.listen("completed", lambda **_: done.release())
    with Worker(parallel, queues={"default": 3}).background(), Worker(parallel, queues={"default": 3}).background():
        for _ in ids:
            assert done.acquire(timeout=60)
    events.unlisten("completed", listener)
    assert statuses(session) == {"complete": 300}
    assert sorted(map(int, letters(session))) == ids
    assert session.scalars(select(ScheduledJob.attempt).distinct()).all() == [1]


# --- the database away --------------------------------------------------------------------------------------------


def test_a_database_that_does_not_answer_degrades_the_worker_and_it_recovers(
    parallel, scheduler, session, stage, heard, monkeypatch
):
    worker = Worker(parallel)
    worker.tick()
    loop = worker._loop
    loop.leases.stop()
    loop.watch.stop()
    connect, is_away, degraded = loop.units.engine.pool._creator, threading.Event(), threading.Event()

    def creator(*args):
        if is_away.is_set():
            raise parallel.dialect.dbapi.OperationalError("could not connect")
        return connect(*args)

    loop.units.engine.dispose()
    monkeypatch.setattr(loop.units.engine.pool, "_creator", creator)
    listener = events.listen("degraded", lambda **_: degraded.set())
    is_away.set()
    loop.hear([])
    ticking = threading.Thread(target=worker.tick)
    ticking.start()
    assert degraded.wait(20)
    events.unlisten("degraded", listener)
    scheduler.enqueue("tests.workjobs.note")
    session.commit()
    is_away.clear()
    ticking.join(20)
    while not stage.ended:
        worker.tick()
    worker.stop()
    names = [name for name, _ in heard]
    assert (names.count("degraded"), names.count("recovered")) == (1, 1)
    assert statuses(session) == {"complete": 1}


def test_a_database_that_stays_away_does_not_keep_the_worker_from_stopping(parallel, heard, monkeypatch):
    worker = Worker(parallel)
    worker.tick()
    loop = worker._loop
    loop.leases.stop()
    loop.watch.stop()
    loop.units.engine.dispose()

    def creator(*_):
        raise parallel.dialect.dbapi.OperationalError("could not connect")

    monkeypatch.setattr(loop.units.engine.pool, "_creator", creator)
    listener = events.listen("degraded", lambda **_: worker._ask_to_stop(0.0))
    loop.hear([])
    with pytest.raises(SQLAlchemyError):
        worker.tick()
    events.unlisten("degraded", listener)
    worker.stop()


# --- what it is made from -----------------------------------------------------------------------------------------


def test_any_executor_of_threads_will_do(parallel, scheduler, session, stage):
    scheduler.schedule_many("0s", "tests.workjobs.note", [{} for _ in range(20)])
    session.commit()
    with ThreadPoolExecutor(2) as pool:
        drained(parallel, 20, executor=pool, queues={"default": 2})
    assert statuses(session) == {"complete": 20}


@pytest.mark.parametrize("form", ["url", "text", "sessionmaker", "scoped_session", "place"])
def test_it_is_made_from_what_an_application_has(form, parallel, scheduler, session, stage, monkeypatch):
    maker = sessionmaker(parallel)
    scoped = scoped_session(maker)
    monkeypatch.setattr(workjobs, "Maker", maker, raising=False)
    source = {
        "url": parallel.url,
        "text": parallel.url.render_as_string(hide_password=False),
        "sessionmaker": maker,
        "scoped_session": scoped,
        "place": "tests.workjobs:Maker",
    }[form]
    scheduler.enqueue("tests.workjobs.write", args=["hello"])
    session.commit()
    drained(source, 1)
    assert letters(session) == ["hello"]
    scoped.remove()


def test_one_connection_cannot_be_shared_by_threads():
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with pytest.raises(NotSupported, match="one connection"):
        Worker(engine, executor=ThreadPoolExecutor())
    with pytest.raises(NotSupported, match="one connection"), Worker(engine).background():
        pass
    engine.dispose()


def test_settings_that_cannot_work_are_refused(tmp_path):
    url = make_url(f"sqlite:///{tmp_path}/some.db")
    engine = create_engine(url, poolclass=QueuePool, pool_size=2, max_overflow=0)
    with pytest.raises(InvalidOption, match="pool gives 2 connections"):
        Worker(engine)
    with pytest.raises(InvalidArgument, match="pass an Engine"):
        Worker(Session(engine))
    for wrong in ({"queues": {"a": 0}}, {"prefetch": -1}, {"queues": {"a": "many"}}, {"max_jobs": 0}):
        with pytest.raises(InvalidOption):
            Worker(url, **wrong)
    for wrong in ({"lease": "1mo"}, {"poll": timedelta(seconds=-1)}, {"lease": "soon"}):
        with pytest.raises(ValueError):
            Worker(url, **wrong)
    engine.dispose()


def test_missing_tables_are_named_with_the_remedy(empty_engine):
    with pytest.raises(SchemaError, match="future-jobs db upgrade"):
        Worker(empty_engine).run()
