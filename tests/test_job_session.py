"""What a handler may do to its Session, and what is then in the database."""

from datetime import timedelta

import pytest
from sqlalchemy import create_engine, event, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, Status, create_tables, current_job, events, job_as_parameter, lifecycle
from future_jobs.sessions import JobSession
from future_jobs.statements import Token
from tests import jobs
from tests.jobs import record, write_letter
from tests.shop import Base, Letter, letters


@pytest.fixture
def run(scheduler, session, other, now, calls):
    """Run one of the handlers below, then one that writes; return the first's status and the letters that are left."""

    def run(name, *args, **options):
        job = scheduler.schedule(now, f"tests.test_job_session.{name}", args=args, priority=1, **options)
        after = scheduler.schedule(now, write_letter, args=["after"])
        report = scheduler.run_due(now, ignore_errors=True)
        assert after.status == "complete", after.error
        assert report.lost == 0
        found = letters(other)
        assert found.pop() == "after"
        return job.status, found

    return run


def test_what_a_handler_writes_is_committed_with_its_completion(run):
    assert run("plain") == ("complete", ["plain"])


def plain(session: Session):
    session.add(Letter(text="plain"))


def test_what_a_failing_handler_wrote_is_rolled_back(run):
    assert run("fails_after_flush") == ("failed", [])


def fails_after_flush(session: Session):
    session.add(Letter(text="no"))
    session.flush()
    raise ValueError("fail")


def test_a_handler_that_commits_and_then_fails_has_written_nothing(run):
    assert run("commits_then_fails") == ("failed", [])


def commits_then_fails(session: Session):
    session.add(Letter(text="no"))
    session.commit()
    raise ValueError("fail")


def test_a_handler_may_commit_and_go_on(run):
    assert run("commits_often") == ("complete", ["first", "second", "third"])


def commits_often(session: Session):
    session.add(Letter(text="first"))
    session.commit()
    session.add(Letter(text="second"))
    session.commit()
    session.add(Letter(text="third"))


def test_a_rollback_after_a_commit_undoes_only_what_came_after_it(run):
    assert run("rolls_back_after_commit") == ("complete", ["first", "third"])


def rolls_back_after_commit(session: Session):
    session.add(Letter(text="first"))
    session.commit()
    session.add(Letter(text="second"))
    session.flush()
    session.rollback()
    session.add(Letter(text="third"))


def test_a_rollback_before_any_commit_undoes_everything(run):
    assert run("rolls_back_first") == ("complete", ["second"])


def rolls_back_first(session: Session):
    session.add(Letter(text="first"))
    session.flush()
    session.rollback()
    session.add(Letter(text="second"))


def test_a_handler_may_roll_back_everything_and_return(run):
    assert run("only_rolls_back") == ("complete", [])


def only_rolls_back(session: Session):
    session.add(Letter(text="first"))
    session.flush()
    session.rollback()


def test_closing_without_a_commit_discards(run):
    assert run("closes") == ("complete", [])


def closes(session: Session):
    session.add(Letter(text="first"))
    session.flush()
    session.close()


def test_closing_after_a_commit_keeps_what_was_committed(run):
    assert run("commits_and_closes") == ("complete", ["first", "third"])


def commits_and_closes(session: Session):
    with session:
        session.add(Letter(text="first"))
        session.commit()
        session.add(Letter(text="second"))
        session.flush()
    session.add(Letter(text="third"))


def test_savepoints_of_the_handler_nest(run):
    assert run("uses_savepoints") == ("complete", ["kept", "kept too"])


def uses_savepoints(session: Session):
    with session.begin_nested():
        session.add(Letter(text="kept"))
    savepoint = session.begin_nested()
    session.add(Letter(text="undone"))
    session.flush()
    savepoint.rollback()
    session.add(Letter(text="kept too"))


def test_a_savepoint_as_the_first_statement_of_a_failing_handler_is_undone(run):
    assert run("savepoint_then_fails") == ("failed", [])


def savepoint_then_fails(session: Session):
    with session.begin_nested():
        session.add(Letter(text="no"))
    raise ValueError("fail")


def test_a_session_broken_by_an_integrity_error_fails_the_job_alone(run):
    assert run("breaks") == ("failed", [])


def breaks(session: Session):
    session.add(Letter(text="same"))
    session.flush()
    session.add(Letter(text="same"))
    session.flush()


def test_a_swallowed_integrity_error_fails_the_job_unless_it_was_rolled_back(run):
    assert run("swallows") == ("failed", [])


def swallows(session: Session):
    session.add_all([Letter(text="same"), Letter(text="same")])
    with pytest.raises(IntegrityError):
        session.flush()


def test_an_integrity_error_in_a_savepoint_is_the_handlers_to_handle(run):
    assert run("handles") == ("complete", ["same", "other"])


def handles(session: Session):
    session.add(Letter(text="same"))
    session.flush()
    with pytest.raises(IntegrityError), session.begin_nested():
        session.execute(text("INSERT INTO shop_letter (text) VALUES ('same')"))
    session.add(Letter(text="other"))


def test_an_error_that_only_the_final_flush_finds_fails_the_job(run):
    assert run("leaves_a_bad_object") == ("failed", [])


def leaves_a_bad_object(session: Session):
    session.add_all([Letter(text="same"), Letter(text="same")])


def test_deleting_its_own_row_is_the_handlers_right(scheduler, session, other, now, calls):
    job_id = scheduler.schedule(now, "tests.test_job_session.deletes_itself", priority=1).id
    after = scheduler.schedule(now, write_letter, args=["after"])
    report = scheduler.run_due(now)
    assert (report.complete, report.lost, after.status) == (2, 0, "complete")
    assert other.get(ScheduledJob, job_id) is None
    assert letters(other) == ["deleted", "after"]


@job_as_parameter
def deletes_itself(job):
    job.session.add(Letter(text="deleted"))
    job.session.execute(text("DELETE FROM future_jobs_scheduled_job WHERE id = :id"), {"id": job.id})


def test_editing_its_own_row_does_not_stop_the_completion(run):
    assert run("edits_itself") == ("complete", ["edited"])


@job_as_parameter
def edits_itself(job):
    job.session.add(Letter(text="edited"))
    job.status = Status.CANCELLED
    job.attempt = 99
    job.session.flush()


def test_changing_the_job_object_is_written(scheduler, now, calls):
    job = scheduler.schedule(now, "tests.test_job_session.tags_itself")
    scheduler.run_due(now)
    assert (job.tags, job.status) == (["seen"], "complete")


@job_as_parameter
def tags_itself(job):
    job.tags = ["seen"]


def test_scheduling_inside_a_handler_is_part_of_its_transaction(scheduler, session, now, calls):
    scheduler.schedule(now, "tests.test_job_session.schedules", args=[True])
    scheduler.run_due(now, ignore_errors=True)
    assert session.scalars(select(ScheduledJob.callable_name)).all() == ["tests.test_job_session.schedules"]
    scheduler.schedule(now, "tests.test_job_session.schedules", args=[False])
    scheduler.run_due(now)
    assert "tests.jobs.record" in session.scalars(select(ScheduledJob.callable_name)).all()


def schedules(fails, session: Session):
    Scheduler(session).schedule("1d", record)
    if fails:
        raise ValueError


def test_a_transaction_of_its_own_keeps_what_was_written_before_a_failure(run):
    assert run("commits_then_fails", transaction="own") == ("failed", ["no"])


def test_a_transaction_of_its_own_is_committed_at_the_end(run):
    assert run("plain", transaction="own") == ("complete", ["plain"])


def test_snooze_returned_keeps_what_was_written_and_raised_undoes_it(scheduler, session, other, now, calls):
    kept = scheduler.schedule(now, "tests.test_job_session.snoozes", args=["kept", False])
    undone = scheduler.schedule(now, "tests.test_job_session.snoozes", args=["undone", True])
    assert scheduler.run_due(now).snoozed == 2
    assert letters(other) == ["kept"]
    for job in (kept, undone):
        assert (job.status, job.run_at, job.failures) == ("scheduled", now + timedelta(minutes=10), 0)


def snoozes(word, raises, session: Session):
    from future_jobs import Snooze

    session.add(Letter(text=word))
    session.flush()
    if raises:
        raise Snooze("10m")
    return Snooze("10m")


# --- the fence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loses_by", ["rescue", "rescue and claim", "cancel"])
def test_an_attempt_that_lost_its_job_commits_nothing(scheduler, session, engine, now, calls, loses_by):
    heard = []
    listener = events.listen("lost", lambda **data: heard.append(data["job_id"]))
    global ENGINE, LOSES_BY
    ENGINE, LOSES_BY = engine, loses_by
    job = scheduler.schedule(now, "tests.test_job_session.loses_its_job")
    try:
        report = scheduler.run_due(now)
    finally:
        events.unlisten("lost", listener)
    single = engine.url.database in (None, "", ":memory:")
    if single:  # one connection: what others would do is done by the handler itself, in its own transaction
        assert report.complete == 1
    else:
        assert (report.lost, report.complete, heard) == (1, 0, [job.id])
        assert letters(session) == []
        assert job.status == {"rescue": "scheduled", "rescue and claim": "running", "cancel": "cancelled"}[loses_by]


ENGINE = LOSES_BY = None


def loses_its_job(session: Session):
    session.execute(text("SELECT 1"))
    steal = {
        "rescue": {"status": "scheduled"},
        "rescue and claim": {"status": "running", "attempt": ScheduledJob.attempt + 1},
        "cancel": {"status": "cancelled"},
    }[LOSES_BY]
    with Session(ENGINE) as thief:
        thief.execute(update(ScheduledJob).where(ScheduledJob.status == "running").values(**steal))
        thief.commit()
    session.add(Letter(text="stale"))


def test_the_fence_holds_for_a_session_on_a_plain_connection(engine, now, calls):
    if engine.url.database in (None, "", ":memory:"):
        return  # nobody else can take the job
    global ENGINE, LOSES_BY
    ENGINE, LOSES_BY = engine, "rescue and claim"
    with engine.connect() as connection, Session(connection) as session:
        scheduler = Scheduler(session)
        job = scheduler.schedule(now, "tests.test_job_session.loses_its_job")
        report = scheduler.run_due(now)
        assert (report.lost, report.complete) == (1, 0)
        assert (letters(session), job.attempt, job.status) == ([], 2, "running")


@pytest.mark.parametrize("delete", [False, True])
def test_a_batch_that_lost_one_job_completes_the_others(scheduler, session, now, delete):
    ids = scheduler.schedule_many(now, record, [{} for _ in range(5)])
    stolen = {"status": "running", "attempt": 2}
    session.execute(update(ScheduledJob).values(status="running", attempt=1))
    session.execute(update(ScheduledJob).where(ScheduledJob.id == ids[2]).values(**stolen))
    done = [(Token(job_id, 1), None if job_id % 2 else "[1]") for job_id in ids]
    lost = lifecycle.complete_all(session.connection(), done, now=now, delete=delete)
    assert lost == {Token(ids[2], 1)}
    assert session.scalars(select(ScheduledJob.id).where(ScheduledJob.status == "running")).all() == [ids[2]]
    kept = session.scalars(select(ScheduledJob.id).where(ScheduledJob.status == "complete")).all()
    assert len(kept) == (0 if delete else 4)


# --- the Session itself -------------------------------------------------------------------------------------------


def test_an_untouched_session_is_never_made(scheduler, now, calls, monkeypatch):
    made = []
    monkeypatch.setattr(JobSession, "_join", lambda self, session: made.append(session))
    scheduler.schedule(now, record)
    scheduler.run_due(now)
    assert made == []


def test_asking_for_the_job_opens_no_connection(scheduler, engine, now, calls):
    job = scheduler.schedule(now, "tests.test_job_session.asks_for_the_job")
    scheduler.run_due(now)
    assert calls == [(job.id, "default", False)]


@job_as_parameter
def asks_for_the_job(job):
    assert current_job() is job
    record(job.id, job.queue, job.session.is_modified(job))


@pytest.mark.parametrize("explicit", ["", "BEGIN", "BEGIN IMMEDIATE"])
def test_on_sqlite_reading_holds_no_lock_and_then_writing_never_fails(tmp_path, explicit, now):
    """Whichever way the application begins its transactions."""
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", connect_args={"timeout": 0.2})
    if explicit:

        @event.listens_for(engine, "connect")
        def no_implicit_begin(connection, record):
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection):
            connection.exec_driver_sql(explicit)

    plain_engine = create_engine(f"sqlite:///{tmp_path}/a.db", connect_args={"timeout": 0.2})
    create_tables(plain_engine)
    Base.metadata.create_all(plain_engine)
    global ENGINE
    ENGINE = plain_engine
    with Session(engine) as session:
        scheduler = Scheduler(session)
        job = scheduler.schedule(now, "tests.test_job_session.reads_while_others_write")
        bad = scheduler.schedule(now, jobs.write_then_fail, args=["no"])
        scheduler.run_due(now, ignore_errors=True)
        assert (job.status, bad.status) == ("complete", "failed"), job.error
        assert sorted(letters(session)) == ["by another", "mine"]
    engine.dispose()
    plain_engine.dispose()


@pytest.mark.parametrize("explicit", ["", "BEGIN", "BEGIN IMMEDIATE"])
def test_a_transaction_around_it_all_survives_the_jobs(tmp_path, explicit, now, calls):
    """The recipe for tests that are rolled back: a Session on a Connection that is in a transaction."""
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    if explicit:

        @event.listens_for(engine, "connect")
        def no_implicit_begin(connection, record):
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection):
            connection.exec_driver_sql(explicit)

    create_tables(engine)
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Letter(text="mine"))
            scheduler = Scheduler(session)
            jobs_ = [scheduler.schedule(now, write_letter, args=[str(n)]) for n in range(3)]
            bad = scheduler.schedule(now, jobs.write_then_fail, args=["no"])
            report = scheduler.run_due(now, ignore_errors=True)
            assert (report.complete, report.failed) == (3, 1)
            assert letters(session) == ["mine", "0", "1", "2"]
            assert [job.status for job in (*jobs_, bad)] == ["complete"] * 3 + ["failed"]
        outer.rollback()
    with Session(engine) as session:
        assert letters(session) == []
    engine.dispose()


def reads_while_others_write(session: Session):
    assert session.scalars(select(Letter)).all() == []
    with Session(ENGINE) as other:
        other.add(Letter(text="by another"))
        other.commit()
    session.add(Letter(text="mine"))


def test_a_lock_error_that_escapes_is_tried_again_uncharged(scheduler, session, now, calls):
    global LEFT
    LEFT = 2
    job = scheduler.schedule(now, "tests.test_job_session.is_locked_out")
    report = scheduler.run_due(now)
    assert (report.complete, job.status, job.failures, job.attempt) == (1, "complete", 0, 1)


LEFT = 0


def is_locked_out():
    import sqlite3

    from sqlalchemy.exc import OperationalError

    global LEFT
    if LEFT:
        LEFT -= 1
        busy = sqlite3.OperationalError("database is locked")
        busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise OperationalError("UPDATE", {}, busy)
