"""What scheduling writes, and into whose transaction."""

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from dateutil.relativedelta import relativedelta
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from future_jobs import ScheduledJob, Scheduler, Status, create_tables
from tests import jobs
from tests.jobs import decorated, record, renamed
from tests.shop import Letter, Order


def count(session):
    return session.scalar(select(func.count()).select_from(ScheduledJob))


def test_a_scheduled_job_has_an_id_and_is_not_committed(scheduler, session, new_session):
    job = scheduler.schedule("3d", record)
    assert isinstance(job.id, int)
    assert (job.status, repr(job)) == (Status.SCHEDULED, "<ScheduledJob (scheduled) callable='tests.jobs.record'>")
    session.rollback()
    with new_session() as other:
        assert count(other) == 0


def test_a_committed_job_is_visible_to_others(scheduler, session, new_session):
    job = scheduler.schedule("3d", record, args=[1], kwargs={"k": 2}, queue="mail", priority=-3, tags=["a", "b"])
    session.commit()
    with new_session() as other:
        seen = other.get(ScheduledJob, job.id)
        assert (seen.callable_name, seen.args, seen.kwargs) == ("tests.jobs.record", [1], {"k": 2})
        assert (seen.queue, seen.priority, seen.tags) == ("mail", -3, ["a", "b"])
        assert (seen.status, seen.attempt, seen.failures, seen.losses) == ("scheduled", 0, 0, 0)
        assert seen.run_at.tzinfo is not None
        assert seen.expires_at - seen.run_at == timedelta(days=7)


def test_a_rolled_back_job_is_like_any_rolled_back_object(scheduler, session):
    job = scheduler.schedule("3d", record)
    first_id = job.id
    session.rollback()
    assert job not in session
    again = scheduler.schedule("3d", record)  # SQLite gives the same id again
    assert again in session
    assert session.get(ScheduledJob, again.id) is again
    assert session.get(ScheduledJob, first_id) in (None, again)


def test_rolling_back_to_a_savepoint_unschedules_what_came_after_it(scheduler, session, new_session):
    with session.begin_nested():
        kept = scheduler.schedule("1d", record)
    savepoint = session.begin_nested()
    dropped = scheduler.schedule("1d", record)
    savepoint.rollback()
    assert (kept in session, dropped in session) == (True, False)
    session.commit()
    with new_session() as other:
        assert other.scalars(select(ScheduledJob.id)).all() == [kept.id]


def test_a_savepoint_that_comes_first_is_undone_by_the_outer_rollback(scheduler, session, new_session):
    with session.begin_nested():
        scheduler.schedule("1d", record)
    session.rollback()
    with new_session() as other:
        assert count(other) == 0


def test_the_applications_own_savepoint_nests_too(scheduler, session, new_session):
    with session.begin_nested():
        session.add(Letter(text="inside"))
    session.rollback()
    with new_session() as other:
        assert other.scalar(select(func.count()).select_from(Letter)) == 0


@pytest.mark.parametrize(
    "when",
    [
        "3d",
        "72h",
        "P3D",
        "3 days",
        timedelta(days=3),
        relativedelta(days=3),
    ],
)
def test_durations_count_from_now(engine, session, when):
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    job = Scheduler(session, clock=lambda: now).schedule(when, record)
    assert job.run_at == datetime(2026, 3, 4, 12, tzinfo=UTC)


def test_naive_times_are_local_times_of_the_schedulers_zone(session):
    scheduler = Scheduler(session, timezone="Europe/Stockholm")
    assert scheduler.schedule(datetime(2026, 7, 1, 9), record).run_at == datetime(2026, 7, 1, 7, tzinfo=UTC)
    assert scheduler.schedule("2026-12-01T09:00", record).run_at == datetime(2026, 12, 1, 8, tzinfo=UTC)


def test_instants_come_back_with_their_microseconds(scheduler, session, new_session):
    instant = datetime(2026, 7, 1, 9, 30, 15, 123456, tzinfo=UTC)
    job_id = scheduler.schedule(instant, record).id
    session.commit()
    with new_session() as other:
        assert other.get(ScheduledJob, job_id).run_at == instant


def test_expiry_counts_from_the_time_of_the_job(scheduler, now):
    job = scheduler.schedule(now + timedelta(days=3), record, expires="5d")
    assert job.expires_at == now + timedelta(days=8)
    assert scheduler.schedule("3d", record, expires=None).expires_at is None


def test_the_default_expiry_is_the_schedulers(session, now):
    scheduler = Scheduler(session, expires="1h")
    assert scheduler.schedule(now, record).expires_at == now + timedelta(hours=1)
    assert Scheduler(session, expires=None).schedule(now, record).expires_at is None


def test_every_form_of_callable(scheduler, session):
    order = Order(customer="Ada")
    session.add(order)
    names = [
        scheduler.schedule("1d", record).callable_name,
        scheduler.schedule("1d", "tests.jobs.record").callable_name,
        scheduler.schedule("1d", partial(record, 1, k=2)).callable_name,
        scheduler.schedule("1d", order.send_invoice).callable_name,
        scheduler.schedule("1d", "send_invoice", content_object=order).callable_name,
        scheduler.schedule("1d", Order.send_invoice, content_object=order).callable_name,
    ]
    assert names[:3] == ["tests.jobs.record"] * 3
    assert names[3:] == ["tests.shop.Order.send_invoice", "send_invoice", "tests.shop.Order.send_invoice"]


def test_a_partial_gives_the_first_arguments(scheduler):
    job = scheduler.schedule("1d", partial(partial(record, 1, a=1), 2, b=2), args=[3], kwargs={"b": 3})
    assert (job.args, job.kwargs) == ([1, 2, 3], {"a": 1, "b": 3})


def test_the_options_of_the_decorator_are_defaults(scheduler):
    job = scheduler.schedule("1d", decorated)
    assert (job.queue, job.priority, job.max_attempts, job.expires_at, job.tags) == ("mail", 7, 3, None, ["letter"])
    job = scheduler.schedule("1d", decorated, queue="fast", expires="1d")
    assert (job.queue, job.priority) == ("fast", 7)
    assert job.expires_at == job.run_at + timedelta(days=1)


def test_a_lasting_name_is_stored_instead_of_the_path(scheduler):
    assert scheduler.schedule("1d", renamed).callable_name == "a.lasting.name"
    assert scheduler.schedule("1d", "its.former.name").callable_name == "its.former.name"


def test_a_pending_object_is_flushed_to_get_its_key(scheduler, session):
    order = Order(customer="Ada")
    session.add(order)
    job = scheduler.schedule("1d", "tests.jobs.record", args=[order])
    assert order.id is not None
    assert str(order.id) in str(job.args)


def test_jobs_for_an_object_can_be_queried(scheduler, session):
    ada, bob = Order(customer="Ada"), Order(customer="Bob")
    session.add_all([ada, bob])
    first = scheduler.schedule("1d", ada.send_invoice)
    second = scheduler.schedule("2d", "send_invoice", content_object=ada)
    scheduler.schedule("1d", bob.send_invoice)
    query = scheduler.jobs_for(ada).order_by(ScheduledJob.run_at)
    assert session.scalars(query).all() == [first, second]
    assert first.content_object is ada


def test_enqueue_schedules_for_now(scheduler, session, calls):
    scheduler.enqueue(record, args=[1])
    assert scheduler.run_due().complete == 1
    assert calls == [(1,)]


def test_schedule_many_returns_ids_in_order(scheduler, session, new_session):
    calls = [{"args": [n], "kwargs": {"k": str(n)}, "priority": n % 3} for n in range(250)]
    ids = scheduler.schedule_many("1d", record, calls, queue="bulk")
    assert ids == sorted(set(ids))
    session.commit()
    with new_session() as other:
        rows = other.execute(
            select(
                ScheduledJob.id, ScheduledJob.args, ScheduledJob.kwargs, ScheduledJob.priority, ScheduledJob.queue
            ).order_by(ScheduledJob.id)
        ).all()
    assert [row.id for row in rows] == ids
    assert [row.args for row in rows] == [[n] for n in range(250)]
    assert [row.kwargs for row in rows] == [{"k": str(n)} for n in range(250)]
    assert [row.priority for row in rows] == [n % 3 for n in range(250)]
    assert {row.queue for row in rows} == {"bulk"}


def test_schedule_many_is_in_the_transaction_too(scheduler, session, new_session):
    assert scheduler.schedule_many("1d", record, []) == []
    scheduler.schedule_many("1d", record, [{"args": [1]}, {}])
    session.rollback()
    with new_session() as other:
        assert count(other) == 0


def test_schedule_many_takes_a_generator_and_every_type_that_one_job_takes(scheduler, session, calls):
    values = [datetime(2026, 1, 1, tzinfo=UTC), b"\x00\xff", "\ud800", "\x00", 10**400, (1, 2), {"!": 1}, float("inf")]
    session.add(order := Order(customer="Ada"))
    ids = scheduler.schedule_many("0s", record, ({"args": [value]} for value in [*values, order]))
    assert scheduler.run_due().complete == len(ids) == 9
    assert [call[0] for call in calls[:-1]] == values


def test_schedule_many_writes_nothing_if_one_cannot_be(scheduler, session):
    with pytest.raises(TypeError) as caught:
        scheduler.schedule_many("1d", record, [{"args": [1]}, {"args": [object()]}])
    assert any("calls[1]" in note for note in caught.value.__notes__)
    assert count(session) == 0


def test_reschedule_counts_from_the_scheduled_time_and_copies_the_rest(scheduler, session, now):
    job = scheduler.schedule(
        now, record, args=[1], kwargs={"k": 2}, queue="mail", priority=5, expires="2d", tags=["t"], max_attempts=4
    )
    copy = job.reschedule("3d")
    assert copy.id != job.id
    assert (copy.run_at, copy.expires_at) == (now + timedelta(days=3), now + timedelta(days=5))
    for name in ("callable_name", "args", "kwargs", "queue", "priority", "tags", "max_attempts"):
        assert getattr(copy, name) == getattr(job, name)


def test_reschedule_takes_new_options(scheduler, now):
    job = scheduler.schedule(now, record, priority=5)
    copy = scheduler.reschedule(job, "1h", priority=1, queue="other", expires=None)
    assert (copy.priority, copy.queue, copy.expires_at) == (1, "other", None)
    assert (job.priority, job.queue) == (5, "default")


def test_reschedule_takes_new_arguments(scheduler, now):
    job = scheduler.schedule(now, record, args=[1], kwargs={"k": 2})
    copy = job.reschedule("1h", args=[7])
    assert (copy.args, copy.kwargs) == ([7], {"k": 2})
    assert job.reschedule("1h", kwargs={}).kwargs == {}
    with pytest.raises(TypeError, match="args is 'ab'"):
        job.reschedule("1h", args="ab")


def test_a_job_that_ran_can_be_rescheduled_from_its_own_session(scheduler, session, now, calls):
    job = scheduler.schedule(now, record, args=[1])
    scheduler.run_due()
    copy = job.reschedule("3d")
    assert copy.run_at == now + timedelta(days=3)
    assert (copy.status, copy.attempt) == (Status.SCHEDULED, 0)


def test_a_job_loaded_by_a_plain_session_can_be_rescheduled(scheduler, session, new_session, now):
    job_id = scheduler.schedule(now, record).id
    session.commit()
    with new_session() as other:
        assert other.get(ScheduledJob, job_id).reschedule("1d").run_at == now + timedelta(days=1)


def test_cancel_and_retry_say_who_won(scheduler, session, calls):
    job = scheduler.schedule("0s", record)
    assert scheduler.cancel(job) is True
    assert (job.status, scheduler.cancel(job)) == ("cancelled", False)
    assert scheduler.run_due().complete == 0
    assert scheduler.retry(job) is True
    assert (job.status, scheduler.retry(job)) == ("scheduled", False)
    assert scheduler.run_due().complete == 1
    assert (scheduler.cancel(job), scheduler.retry(job), scheduler.cancel(10**6), scheduler.retry(10**6)) == (
        False,
    ) * 4


def test_cancel_takes_an_id_and_is_in_the_transaction(scheduler, session, new_session):
    job = scheduler.schedule("1d", record)
    session.commit()
    assert scheduler.cancel(job.id)
    session.rollback()
    assert job.status == Status.SCHEDULED


def test_retrying_an_expired_job_gives_it_the_same_grace_again(scheduler, session, now, calls):
    job = scheduler.schedule(now, record, expires="1h")
    scheduler.run_due(now + timedelta(hours=2))
    assert job.status == "expired"
    scheduler.retry(job, when=now + timedelta(hours=3))
    assert job.expires_at == now + timedelta(hours=4)
    assert scheduler.run_due(now + timedelta(hours=4)).complete == 1


def test_prune_deletes_what_ended_long_ago(scheduler, session, now, calls):
    scheduler.schedule(now, record)
    bad = scheduler.schedule(now, jobs.failjob)
    waiting = scheduler.schedule("3d", record)
    scheduler.run_due(now, ignore_errors=True)
    assert scheduler.prune("1h") == 0
    later = Scheduler(session, clock=lambda: now + timedelta(days=2))
    assert later.prune("1d") == 1
    assert set(session.scalars(select(ScheduledJob.id))) == {bad.id, waiting.id}
    assert later.prune(timedelta(days=1), statuses=["failed", "expired"]) == 1
    assert session.scalar(text("SELECT count(*) FROM future_jobs_job_failure")) == 0


def test_a_scoped_session_works(engine, calls):
    registry = scoped_session(sessionmaker(engine))
    scheduler = Scheduler(registry)
    scheduler.schedule("0s", record, args=[1])
    assert scheduler.run_due().complete == 1
    registry.remove()


def test_a_session_on_a_connection_in_an_outer_transaction_works(engine, calls):
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            scheduler = Scheduler(session)
            scheduler.schedule("0s", record, args=[1])
            scheduler.schedule("0s", jobs.write_letter, args=["hello"])
            failing = scheduler.schedule("0s", jobs.write_then_fail, args=["never"])
            report = scheduler.run_due(ignore_errors=True)
            assert (report.complete, report.failed, failing.status) == (2, 1, "failed")
            assert session.scalars(select(Letter.text)).all() == ["hello"]
        outer.rollback()
    with Session(engine) as other:
        assert count(other) == 0


def test_a_session_with_binds_works(tmp_path, calls):
    ours, theirs = create_engine(f"sqlite:///{tmp_path}/ours.db"), create_engine(f"sqlite:///{tmp_path}/theirs.db")
    create_tables(ours)
    Letter.metadata.create_all(theirs)
    with Session(binds={ScheduledJob: ours, Letter: theirs}) as session:
        scheduler = Scheduler(session)
        job = scheduler.schedule("0s", jobs.write_letter, args=["hello"])
        assert scheduler.run_due().complete == 1
        assert job.status == "complete"
    with Session(theirs) as session:
        assert session.scalars(select(Letter.text)).all() == ["hello"]
    ours.dispose()
    theirs.dispose()
