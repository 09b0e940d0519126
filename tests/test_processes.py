"""Several processes on one database: each job is claimed by one of them."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, create_tables
from tests.processes import start, together
from tests.shop import letters

JOBS = 400


@pytest.fixture
def session(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_four_processes_run_every_job_once(shared_url, session, tmp_path):
    ledger = tmp_path / "ledger"
    ledger.touch()
    scheduler = Scheduler(session)
    calls = [{"priority": n % 3, "queue": f"q{n % 2}"} for n in range(JOBS)]
    noted = scheduler.schedule_many("0s", "tests.processes.note_in_ledger", calls)
    written = scheduler.schedule_many("0s", "tests.processes.note_in_database", calls[:100])
    session.commit()
    results = together([start(shared_url, "run_until_nothing_is_due", ledger=ledger) for _ in range(4)])
    assert Counter(job_id for ran in results for job_id in ran) == Counter([*noted, *written])
    assert Counter(map(int, ledger.read_text().split())) == Counter(noted)
    assert sorted(map(int, letters(session))) == written
    assert set(session.scalars(select(ScheduledJob.status).distinct())) == {"complete"}
    assert session.scalars(select(ScheduledJob.attempt).distinct()).all() == [1]


def test_processes_that_schedule_and_run_do_not_lock_each_other_out(shared_url, session):
    results = together([start(shared_url, "schedule_and_run", "25") for _ in range(3)])
    run = [job_id for ran in results for job_id in ran]
    assert len(run) == len(set(run))
    Scheduler(session).run_due()  # what one process scheduled while the others were already done
    assert set(session.scalars(select(ScheduledJob.status).distinct())) == {"complete"}
    assert len(letters(session)) == 75


def test_cancel_against_claim_has_one_winner(shared_url, session, tmp_path):
    ledger = tmp_path / "ledger"
    ledger.touch()
    ids = Scheduler(session).schedule_many("0s", "tests.processes.note_in_ledger", [{} for _ in range(100)])
    session.commit()
    runner = start(shared_url, "run_until_nothing_is_due", ledger=ledger)
    canceller = start(shared_url, "cancel_all", *map(str, reversed(ids)))
    together([runner, canceller])
    ran = Counter(map(int, ledger.read_text().split()))
    for job in session.scalars(select(ScheduledJob)):
        # Asked to stop while it ran, a job that finishes all the same is complete.
        assert (job.status, ran[job.id]) in {("complete", 1), ("cancelled", 0)}


def test_a_killed_process_loses_nothing(shared_url, session, tmp_path):
    ledger = tmp_path / "ledger"
    ledger.touch()
    scheduler = Scheduler(session)
    poison = scheduler.schedule("0s", "tests.processes.die", priority=1)
    others = scheduler.schedule_many("0s", "tests.processes.note_in_ledger", [{} for _ in range(20)])
    session.commit()
    process = start(shared_url, "run_one_pass", ledger=ledger)
    process.communicate("go\n", timeout=60)
    assert process.returncode == 9
    session.refresh(poison)
    assert (poison.status, poison.attempt) == ("running", 1)
    now = datetime.now(UTC)
    assert scheduler.run_due(now, limit=0).job_ids == []
    session.refresh(poison)
    assert poison.status == "running"  # its lease is not over
    session.execute(update(ScheduledJob).where(ScheduledJob.id == poison.id).values(callable_name="tests.jobs.record"))
    later = now + timedelta(minutes=3)
    import os

    from tests.processes import LEDGER

    os.environ[LEDGER] = str(ledger)
    try:
        report = scheduler.run_due(later)
    finally:
        del os.environ[LEDGER]
    assert report.complete == 21
    assert (poison.status, poison.attempt, poison.losses) == ("complete", 2, 1)
    assert Counter(map(int, ledger.read_text().split())) == Counter(others)


def test_a_poisonous_job_is_given_up_after_five_dead_processes(shared_url, session):
    poison = Scheduler(session).schedule("0s", "tests.processes.die", expires=None)
    session.commit()
    for _ in range(5):
        process = start(shared_url, "run_one_pass")
        process.communicate("go\n", timeout=60)
        assert process.returncode == 9
        # Its lease ends: moved back here, where a test would have to wait.
        session.execute(update(ScheduledJob).values(leased_until=datetime.now(UTC) - timedelta(hours=1)))
        session.commit()
    report = Scheduler(session).run_due()
    session.refresh(poison)
    assert (report.job_ids, poison.status, poison.losses, poison.attempt) == ([], "failed", 5, 5)


def test_nothing_due_takes_no_lock(tmp_path):
    """A pass that finds nothing to do does not wait for a writer."""
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", connect_args={"timeout": 0})
    create_tables(engine)
    with Session(engine) as session, engine.connect() as writer:
        Scheduler(session).schedule("1d", "tests.jobs.record")
        session.commit()
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        assert Scheduler(session).run_due().job_ids == []
        writer.rollback()
    engine.dispose()
