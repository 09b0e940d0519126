"""Whatever isolation level an application runs its Sessions at, jobs are run once and completed."""

import threading
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, configure_sqlite, lifecycle, statements
from future_jobs.units import Units
from tests.jobs import CALLS, record, write_letter
from tests.shop import Letter, letters

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.fixture(params=LEVELS)
def strict_engine(request, shared_kind, shared_url):
    if shared_kind == "file" and request.param != "SERIALIZABLE":
        pytest.skip("SQLite has one isolation level")
    engine = create_engine(shared_url, isolation_level=request.param)
    yield engine
    engine.dispose()


def test_a_lease_that_is_renewed_meanwhile_does_not_stop_a_long_job(strict_engine, now, calls):
    """A renewal changes the row after the job's snapshot was taken; the completion must not fail for that."""
    global ENGINE, NOW
    ENGINE, NOW = strict_engine, now
    with Session(strict_engine) as session:
        scheduler = Scheduler(session)
        job = scheduler.schedule(now, "tests.test_isolation.outlives_a_renewal")
        report = scheduler.run_due(now)
        assert (report.complete, job.status, job.failures) == (1, "complete", 0), job.error
        assert calls == [()]
        assert letters(session) == ["written"]


ENGINE = NOW = None


def outlives_a_renewal(session: Session):
    session.scalars(select(Letter)).all()
    units = Units(ENGINE)
    with ENGINE.connect() as other:
        worker = other.scalar(text("SELECT leased_by FROM future_jobs_scheduled_job"))
        other.rollback()
    until = NOW + timedelta(hours=1)
    thread = threading.Thread(target=units.write, args=[lambda c: statements.renew(c, worker, until)])
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "the renewal waits for the job"
    record()
    session.add(Letter(text="written"))


def test_a_job_whose_transaction_is_open_is_not_rescued(strict_engine, now, calls):
    """Where its row is locked, a renewal passes it over; so must a rescue."""
    global ENGINE, NOW
    ENGINE, NOW = strict_engine, now
    with Session(strict_engine) as session:
        scheduler = Scheduler(session)
        job = scheduler.schedule(now, "tests.test_isolation.outlives_its_lease")
        report = scheduler.run_due(now)
        if job.losses:  # it was taken away, so it has written nothing
            assert (report.lost, letters(session)) == (1, [])
        else:
            assert (report.complete, letters(session)) == (1, ["written"])


def outlives_its_lease(session: Session):
    session.scalars(select(Letter)).all()
    later = NOW + timedelta(hours=1)
    Units(ENGINE).write(lambda c: lifecycle.rescue(c, now=later, grace=timedelta(0)))
    session.add(Letter(text="written"))


def test_two_threads_share_the_work(strict_engine, now):
    CALLS.clear()
    with Session(strict_engine) as session:
        scheduler = Scheduler(session)
        ids = scheduler.schedule_many(now, write_letter, [{"args": [str(n)]} for n in range(30)])
        session.commit()
    reports, errors = [], []
    barrier = threading.Barrier(3)

    def run():
        try:
            with Session(strict_engine) as session:
                barrier.wait()
                while (report := Scheduler(session).run_due(now)).job_ids:
                    reports.append(report)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert sorted(job_id for report in reports for job_id in report.job_ids) == ids
    with Session(strict_engine) as session:
        assert sorted(map(int, letters(session))) == list(range(30))
        assert session.scalars(select(ScheduledJob.status).distinct()).all() == ["complete"]


def test_an_engine_on_sqlite_can_be_configured_well(tmp_path):
    engine = configure_sqlite(create_engine(f"sqlite:///{tmp_path}/a.db"), timeout=timedelta(seconds=7))
    with engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {each}").scalar() for each in ("journal_mode", "synchronous")]
        assert [*found, connection.exec_driver_sql("PRAGMA busy_timeout").scalar()] == ["wal", 1, 7000]
    engine.dispose()
    other = create_engine("postgresql+psycopg://nowhere.invalid/db")
    assert configure_sqlite(other) is other
