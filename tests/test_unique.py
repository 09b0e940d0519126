"""One job with a key at a time: what a second one gets, what becomes of the transaction, and who keeps the key."""

from datetime import timedelta

import pytest
from sqlalchemy import create_engine, func, select, update
from sqlalchemy.orm import Session

from future_jobs import JobFailure, ScheduledJob, Scheduler, Snooze, Worker, current_job, events, job
from future_jobs.errors import AlreadyScheduled, InvalidArgument, InvalidOption
from tests.jobs import record
from tests.shop import Letter, letters

HERE = "tests.test_unique"
KEY = {"unique_key": "report"}


def count(session, *conditions):
    return session.scalar(select(func.count()).select_from(ScheduledJob).where(*conditions))


@job(unique_key="a default", on_conflict="return_existing")
def only_one(): ...


def schedules_again(session: Session, **options):
    Scheduler.of(session).enqueue(record, **KEY, **options)


def schedules_again_and_fails(session: Session, **options):
    """In a transaction of its own, so that it stays."""
    with Session(session.get_bind().engine) as other:
        Scheduler(other).schedule("1h", record, **KEY, **options)
        other.commit()
    raise ValueError("fail")


def schedules_again_and_snoozes(session: Session):
    Scheduler.of(session).schedule("1h", record, **KEY)
    return Snooze("10m")


def copies_itself(session: Session):
    current_job().reschedule("1d")


def copies_itself_and_fails(session: Session):
    copies_itself(session)
    session.flush()
    raise ValueError("fail")


# --- a second job with the key ------------------------------------------------------------------------------------


def test_a_second_job_with_the_key_is_refused_with_the_first_one_named(scheduler, session):
    first = scheduler.schedule("3d", record, **KEY)
    with pytest.raises(
        AlreadyScheduled, match=rf"unique_key 'report' is that of job {first.id} \(scheduled\)"
    ) as caught:
        scheduler.schedule("5d", record, **KEY)
    assert (caught.value.job_id, caught.value.unique_key, caught.value.conflicts) == (first.id, "report", {})
    assert isinstance(caught.value, ValueError)
    assert count(session) == 1


def test_the_transaction_goes_on_after_a_conflict(scheduler, session):
    session.add(Letter(text="before"))
    scheduler.schedule("3d", record, **KEY)
    for on_conflict in ("raise", "return_existing", "replace"):
        try:
            scheduler.schedule("5d", record, **KEY, on_conflict=on_conflict)
        except AlreadyScheduled:
            assert on_conflict == "raise"
        session.add(Letter(text=f"after {on_conflict}"))
        session.flush()
    session.commit()
    assert letters(session) == ["before", "after raise", "after return_existing", "after replace"]
    assert count(session) == 1


def test_a_conflict_with_what_others_committed_leaves_the_transaction_usable(scheduler, session, other):
    holder = Scheduler(other).schedule("3d", record, **KEY)
    other.commit()
    session.add(Letter(text="before"))
    with pytest.raises(AlreadyScheduled) as caught:
        scheduler.schedule("5d", record, **KEY)
    assert caught.value.job_id == holder.id
    session.add(Letter(text="after"))
    session.commit()
    assert letters(session) == ["before", "after"]


def test_the_existing_job_is_returned_as_it_is(scheduler, session, other, now):
    first = Scheduler(other).schedule(now + timedelta(days=3), record, args=[1], **KEY)
    first_id = first.id
    other.commit()
    second = scheduler.schedule("5d", record, args=[2], **KEY, on_conflict="return_existing")
    assert isinstance(second, ScheduledJob)
    assert second in session
    assert (second.id, second.args, second.run_at) == (first_id, [1], now + timedelta(days=3))


def test_replacing_moves_the_time_the_arguments_and_the_options_of_the_waiting_job(scheduler, session, now, calls):
    first = scheduler.schedule(now, record, args=[1], queue="slow", tags=["old"], expires="1h", **KEY)
    session.commit()
    later = now + timedelta(minutes=5)
    second = scheduler.schedule(
        later, "tests.jobs.decorated", args=[2], priority=9, **KEY, on_conflict="replace", unique_until="started"
    )
    assert second is first
    session.commit()
    assert (first.callable_name, first.args, first.queue, first.priority) == ("tests.jobs.decorated", [2], "mail", 9)
    assert (first.run_at, first.nominal_at, first.expires_at) == (later, later, None)
    assert (first.tags, first.max_attempts, first.unique_until) == (["letter"], 3, "started")
    assert scheduler.run_due(now).job_ids == []
    assert scheduler.run_due(later).job_ids == [first.id]
    assert calls == [(2,)]


def test_a_replaced_job_has_all_its_attempts_again(scheduler, session, now, calls):
    first = scheduler.schedule(now, "tests.jobs.failjob", max_attempts=2, backoff="1m", **KEY)
    session.commit()
    assert scheduler.run_due(now).retried == 1
    scheduler.schedule(now, record, **KEY, on_conflict="replace")
    assert (first.failures, first.error, first.attempt, first.max_attempts) == (0, None, 1, 1)
    session.commit()
    assert scheduler.run_due(now).complete == 1


def test_rolling_back_a_replacement_leaves_the_job_as_it_was(scheduler, session, now):
    first = scheduler.schedule(now, record, args=[1], **KEY)
    session.commit()
    with session.begin_nested() as savepoint:
        scheduler.schedule("5d", record, args=[2], **KEY, on_conflict="replace")
        savepoint.rollback()
    session.expire_all()
    assert (first.args, first.run_at) == ([1], now)


def test_a_rolled_back_job_never_had_the_key(scheduler, session):
    scheduler.schedule("3d", record, **KEY)
    session.rollback()
    job = scheduler.schedule("3d", record, **KEY)
    session.commit()
    assert session.get(ScheduledJob, job.id).unique_key == "report"


def test_other_keys_and_no_key_do_not_conflict(scheduler, session):
    for key in ("report", "Report", "report!", None, None):
        scheduler.schedule("3d", record, unique_key=key)
    assert count(session) == 5


def test_a_default_of_the_callable_is_one_too_and_a_call_can_do_without(scheduler, session):
    first = scheduler.enqueue(only_one)
    assert scheduler.enqueue(only_one) is first
    assert scheduler.enqueue(only_one, unique_key=None) is not first
    assert count(session) == 2


@pytest.mark.parametrize("ends", ["complete", "failed", "cancelled", "expired"])
def test_the_key_is_free_when_the_job_has_ended(scheduler, session, now, calls, ends):
    first = scheduler.schedule(now, record if ends == "complete" else "tests.jobs.failjob", expires="1h", **KEY)
    session.commit()
    if ends == "cancelled":
        scheduler.cancel(first)
    scheduler.run_due(now + timedelta(days=1) if ends == "expired" else now, ignore_errors=True)
    assert first.status == ends
    assert scheduler.schedule("3d", record, **KEY).id != first.id


# --- while it runs ------------------------------------------------------------------------------------------------


def test_the_key_is_kept_until_the_job_is_finished(scheduler, session, now, calls):
    running = scheduler.schedule(now, f"{HERE}.schedules_again", **KEY)
    session.commit()
    with pytest.raises(AlreadyScheduled, match=rf"job {running.id} \(running\)"):
        scheduler.run_due(now)


def test_a_running_job_is_returned_and_cannot_be_replaced(scheduler, session, now, calls):
    running = scheduler.schedule(now, f"{HERE}.schedules_again", kwargs={"on_conflict": "return_existing"}, **KEY)
    session.commit()
    assert scheduler.run_due(now).complete == 1
    assert count(session) == 1
    running = scheduler.schedule(now, f"{HERE}.schedules_again", kwargs={"on_conflict": "replace"}, **KEY)
    session.commit()
    with pytest.raises(AlreadyScheduled, match="is running and cannot be replaced; with unique_until='started'"):
        scheduler.run_due(now)
    assert (running.status, count(session)) == ("failed", 2)


@pytest.mark.parametrize("on_conflict", ["raise", "return_existing", "replace"])
def test_the_key_is_given_up_at_the_start_if_so_wished(scheduler, session, now, calls, on_conflict):
    first = scheduler.schedule(
        now, f"{HERE}.schedules_again", kwargs={"on_conflict": on_conflict}, **KEY, unique_until="started"
    )
    session.commit()
    assert scheduler.run_due(now).job_ids == [first.id]
    assert [each.status for each in session.scalars(select(ScheduledJob).order_by("id"))] == ["complete", "scheduled"]


# --- going back to wait -------------------------------------------------------------------------------------------


@pytest.fixture
def ends(calls):
    """How jobs were cancelled, as the events tell."""
    told = []
    listener = events.listen("cancelled", lambda **data: told.append((data["job_id"], data["reason"])))
    yield told
    events.unlisten("cancelled", listener)


def test_a_retry_gives_way_to_the_job_that_waits_with_the_key(scheduler, session, now, ends, shared_or_not):
    first = scheduler.schedule(
        now, f"{HERE}.schedules_again_and_fails", **KEY, unique_until="started", max_attempts=3, backoff="1m"
    )
    session.commit()
    report = scheduler.run_due(now)
    second = session.scalars(select(ScheduledJob).where(ScheduledJob.id != first.id)).one()
    assert (first.status, first.failures, second.status) == ("cancelled", 1, "scheduled")
    assert first.error == f"job {second.id} has the same unique_key"
    assert first.finished_at is not None
    assert (report.cancelled, report.retried, ends) == (1, 0, [(first.id, first.error)])
    failure = session.scalars(select(JobFailure)).one()
    assert (failure.job_id, failure.error_type) == (first.id, "ValueError")
    assert scheduler.retry(first) is False
    scheduler.cancel(second)
    assert scheduler.retry(first) is True


@pytest.fixture
def shared_or_not(kind):
    """Databases with more than one connection: the other job is scheduled while the first one runs."""
    if kind == "memory":
        pytest.skip("in-memory SQLite is one connection")


def test_a_worker_lets_a_retry_give_way_too(engine, scheduler, session, ends, shared_or_not):
    options = {"unique_until": "started", "max_attempts": 3, "backoff": "1m"}
    first = scheduler.enqueue(f"{HERE}.schedules_again_and_fails", **KEY, **options)
    session.commit()
    Worker(engine, max_jobs=1).run()
    session.expire_all()
    second = session.scalars(select(ScheduledJob).where(ScheduledJob.id != first.id)).one()
    assert (first.status, second.status) == ("cancelled", "scheduled")
    assert ends == [(first.id, f"job {second.id} has the same unique_key")]


def test_a_retry_keeps_its_key_where_nobody_else_wants_it(scheduler, session, now, calls):
    options = {"max_attempts": 3, "backoff": "1m", "unique_until": "started"}
    first = scheduler.schedule(now, "tests.jobs.failjob", **KEY, **options)
    session.commit()
    assert scheduler.run_due(now).retried == 1
    assert first.status == "scheduled"
    with pytest.raises(AlreadyScheduled):
        scheduler.schedule(now, record, **KEY)


def test_a_snooze_that_keeps_its_writes_gives_way_too(scheduler, session, now, ends):
    first = scheduler.schedule(now, f"{HERE}.schedules_again_and_snoozes", **KEY, unique_until="started")
    session.commit()
    assert scheduler.run_due(now).cancelled == 1
    second = session.scalars(select(ScheduledJob).where(ScheduledJob.id != first.id)).one()
    assert (first.status, second.status) == ("cancelled", "scheduled")
    assert ends == [(first.id, f"job {second.id} has the same unique_key")]


def taken_over(scheduler, session, now, **options):
    """A job that its worker left running, and another that waits with its key."""
    first = scheduler.schedule(now, record, **KEY, unique_until="started")
    values = {"status": "running", "attempt": 1, "leased_by": "a", "leased_until": now, "started_at": now}
    session.execute(update(ScheduledJob).values(**values))
    second = scheduler.schedule("1h", record, **KEY)
    session.commit()
    return first, second


def test_a_job_of_a_dead_worker_gives_way(scheduler, session, now, ends):
    first, second = taken_over(scheduler, session, now)
    scheduler.run_due(now + timedelta(minutes=10))
    assert (first.status, first.losses, second.status) == ("cancelled", 1, "scheduled")
    assert session.scalars(select(JobFailure.error_type)).all() == ["WorkerLost"]
    assert [job_id for job_id, _ in ends] == [first.id]


def test_a_job_that_is_handed_back_gives_way(scheduler, session, engine, now):
    from future_jobs import lifecycle
    from future_jobs.statements import Token

    first, second = taken_over(scheduler, session, now)
    token = Token(first.id, 1)
    assert lifecycle.release_all(session.connection(), [token]).keys() == {token}
    session.commit()
    assert (first.status, first.finished_at, second.status) == ("cancelled", now, "scheduled")


def test_a_finished_job_is_not_retried_while_another_has_its_key(scheduler, session, now, calls):
    first = scheduler.schedule(now, "tests.jobs.failjob", **KEY)
    session.commit()
    scheduler.run_due(now, ignore_errors=True)
    session.add(Letter(text="before"))
    second = scheduler.schedule("1h", record, **KEY)
    assert scheduler.retry(first) is False
    session.commit()
    assert (first.status, letters(session)) == ("failed", ["before"])
    scheduler.cancel(second)
    assert scheduler.retry(first) is True
    assert first.status == "scheduled"


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_copy_has_the_key_too(scheduler, session, now, calls):
    first = scheduler.schedule(now, record, **KEY, unique_until="started")
    with pytest.raises(AlreadyScheduled):
        first.reschedule("1d")
    assert first.reschedule("1d", unique_key="another").unique_key == "another"
    assert first.reschedule("2d", on_conflict="replace") is first
    assert (first.run_at, first.unique_until) == (now + timedelta(days=2), "started")
    assert first.reschedule("3d", unique_key=None).unique_key is None


@pytest.mark.parametrize("until", ["started", "finished"])
def test_a_running_job_hands_its_key_to_its_own_copy(scheduler, session, now, calls, until):
    first = scheduler.schedule(now, f"{HERE}.copies_itself", **KEY, unique_until=until)
    session.commit()
    scheduler.run_due(now)
    copy = session.scalars(select(ScheduledJob).where(ScheduledJob.id != first.id)).one()
    assert (first.status, copy.status, copy.unique_until) == ("complete", "scheduled", until)
    with pytest.raises(AlreadyScheduled) as caught:
        scheduler.enqueue(record, **KEY)
    assert caught.value.job_id == copy.id


def test_a_job_that_fails_after_it_copied_itself_keeps_its_key(scheduler, session, now, calls):
    first = scheduler.schedule(now, f"{HERE}.copies_itself_and_fails", **KEY, max_attempts=2, backoff="1m")
    session.commit()
    assert scheduler.run_due(now).retried == 1
    assert (first.status, first.unique_until, count(session)) == ("scheduled", "finished", 1)


# --- many ---------------------------------------------------------------------------------------------------------


def test_conflicts_of_many_are_told_by_position_and_nothing_is_written(scheduler, session):
    first = scheduler.schedule("3d", record, **KEY)
    calls = [{}, KEY, {"unique_key": "new"}, {}, {"unique_key": "new"}]
    with pytest.raises(
        AlreadyScheduled, match=rf"calls\[1\]: unique_key 'report' .* job {first.id} .*1 more"
    ) as caught:
        scheduler.schedule_many("3d", record, calls)
    assert caught.value.conflicts == {1: first.id, 4: None}
    session.commit()
    assert count(session) == 1


def test_existing_jobs_stand_in_the_places_of_many(scheduler, session):
    first = scheduler.schedule("3d", record, **KEY)
    calls = [{}, KEY, {"unique_key": "new"}, {}, {"unique_key": "new"}]
    calls = [each | ({"on_conflict": "return_existing"} if each else {}) for each in calls]
    ids = scheduler.schedule_many("3d", record, calls)
    assert (ids[1], ids[4]) == (first.id, ids[2])
    assert len(set(ids)) == 4
    assert count(session) == 4


def test_the_last_of_many_with_a_key_replaces_the_others(scheduler, session, now):
    first = scheduler.schedule("3d", record, args=[0], **KEY)
    options = KEY | {"on_conflict": "replace"}
    ids = scheduler.schedule_many(now, record, [{"args": [1]}, {"args": [2]}], **options)
    assert ids == [first.id, first.id]
    assert (first.args, first.run_at) == ([2], now)


def test_many_keys_of_one_call_stay_in_order(scheduler, session):
    calls = [{"args": [n], "unique_key": f"{n * 7 % 50}"} for n in range(50)]
    ids = scheduler.schedule_many("3d", record, calls)
    found = {each.id: each for each in session.scalars(select(ScheduledJob))}
    assert [(found[each].args[0], found[each].unique_key) for each in ids] == [
        (call["args"][0], call["unique_key"]) for call in calls
    ]


# --- recurring jobs -----------------------------------------------------------------------------------------------


def test_a_run_whose_key_is_taken_is_skipped(scheduler, session, now, calls):
    holder = scheduler.schedule("300d", record, **KEY)
    found = scheduler.recurring("often", "15m", record, overlap="allow", **KEY)
    session.commit()
    assert scheduler.run_due(now + timedelta(minutes=20)).job_ids == []
    assert (found.skipped, found.fired, found.error) == (1, 0, None)
    scheduler.cancel(holder)
    session.commit()
    assert scheduler.run_due(now + timedelta(minutes=40)).complete == 1
    assert (found.skipped, found.fired) == (1, 1)


def test_a_triggered_run_whose_key_is_taken_is_refused(scheduler, session):
    scheduler.recurring("often", "15m", record, **KEY)
    first = scheduler.trigger("often")
    with pytest.raises(AlreadyScheduled) as caught:
        scheduler.trigger("often")
    assert caught.value.job_id == first.id


def test_runs_that_are_made_up_for_are_one_if_they_have_a_key(scheduler, session, now):
    scheduler.recurring("often", "15m", record, start=now - timedelta(hours=2), **KEY)
    ids = scheduler.backfill("often", now - timedelta(hours=1), now)
    assert len(ids) == count(session) == 1


def test_a_recurring_job_has_no_on_conflict(scheduler):
    with pytest.raises(InvalidOption, match="always skipped"):
        scheduler.recurring("often", "15m", record, **KEY, on_conflict="replace")


# --- what makes no sense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "x" * 256, " x", "x ", "a\nb", "a\x00b", "\ud800"])
def test_a_key_is_255_printable_characters_at_most(scheduler, key):
    with pytest.raises(InvalidOption, match=r"^unique_key is .*; use 1 to 255 printable characters"):
        scheduler.schedule("3d", record, unique_key=key)


@pytest.mark.parametrize("key", [1, b"x", ["x"], True])
def test_a_key_is_text(scheduler, key):
    with pytest.raises(InvalidArgument, match=r"^unique_key is .*; pass text"):
        scheduler.schedule("3d", record, unique_key=key)


def test_the_longest_key_is_stored_as_it_is(scheduler, session):
    key = "☃𝄞" * 127 + "x"
    job = scheduler.schedule("3d", record, unique_key=key)
    session.commit()
    assert session.scalar(select(ScheduledJob.unique_slot).where(ScheduledJob.id == job.id)) == key


@pytest.mark.parametrize(
    ("name", "value"),
    [("unique_until", "done"), ("unique_until", None), ("on_conflict", "ignore"), ("on_conflict", [])],
)
def test_what_is_done_about_a_key_is_one_of_a_few_words(scheduler, name, value):
    with pytest.raises(InvalidOption, match=rf"^{name} is .*; use 'raise'|'started'"):
        scheduler.schedule("3d", record, **{"unique_key": "x", name: value})


@pytest.mark.parametrize("option", [{"on_conflict": "replace"}, {"unique_until": "started"}])
def test_what_to_do_about_a_key_needs_a_key(scheduler, option):
    with pytest.raises(InvalidOption, match="there is no unique_key"):
        scheduler.schedule("3d", record, **option)
    scheduler.schedule("3d", record, unique_key=None, **option)


def schedules_and_replaces(session: Session):
    """What it does to a job that is due as well waits for the next pass, as all that handlers schedule does."""
    Scheduler.of(session).enqueue(record, args=["replaced"], **KEY, on_conflict="replace")


def test_what_a_handler_replaces_waits_for_the_next_pass(scheduler, session, now, calls):
    waiting = scheduler.schedule(now, record, args=["first"], **KEY)
    scheduler.schedule(now - timedelta(minutes=1), f"{HERE}.schedules_and_replaces", priority=1)
    session.commit()
    assert scheduler.run_due(now).complete == 1
    assert (waiting.status, calls) == ("scheduled", [])
    assert scheduler.run_due(now).complete == 1
    assert calls == [("replaced",)]


# --- telling ------------------------------------------------------------------------------------------------------


def test_a_replacement_is_told_and_a_job_that_is_returned_is_not(scheduler, session, now):
    told = []
    names = ("scheduled", "replaced")
    listeners = [events.listen(name, lambda name=name, **data: told.append((name, data))) for name in names]
    try:
        first = scheduler.schedule(now, record, **KEY)
        scheduler.schedule(now, record, **KEY, on_conflict="return_existing")
        scheduler.schedule(now + timedelta(hours=1), record, **KEY, on_conflict="replace")
    finally:
        for name, listener in zip(names, listeners, strict=True):
            events.unlisten(name, listener)
    data = {"job_id": first.id, "callable_name": "tests.jobs.record", "queue": "default"}
    assert told == [
        ("scheduled", data | {"run_at": now}),
        ("replaced", data | {"run_at": now + timedelta(hours=1)}),
    ]


# --- snapshots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_conflict", ["raise", "return_existing", "replace"])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_job_newer_than_the_snapshot_has_a_clean_answer(shared_kind, shared_url, level, on_conflict):
    if shared_kind == "file":
        pytest.skip("SQLite has one writer, and no levels")
    engine = create_engine(shared_url, isolation_level=level)
    with Session(engine) as session, Session(engine) as other:
        session.add(Letter(text="before"))
        session.flush()
        assert count(session) == 0  # the snapshot
        session.commit()
        session.execute(select(Letter.text)).all()
        holder = Scheduler(other).schedule("3d", record, args=[1], **KEY)
        holder_id = holder.id
        other.commit()
        scheduler = Scheduler(session)
        try:
            found = scheduler.schedule("5d", record, args=[2], **KEY, on_conflict=on_conflict)
            assert (found.id, found.args) == (holder_id, [2] if on_conflict == "replace" else [1])
        except AlreadyScheduled as error:
            blind = shared_kind == "postgresql" and level != "READ COMMITTED"
            assert blind or on_conflict == "raise"
            assert error.job_id == (None if blind else holder_id)
        session.add(Letter(text="after"))
        session.commit()
        assert letters(session) == ["before", "after"]
        assert count(session) == 1
    engine.dispose()


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_key_that_was_freed_since_the_snapshot_is_free(shared_kind, shared_url, level):
    if shared_kind == "file":
        pytest.skip("SQLite has one writer, and no levels")
    engine = create_engine(shared_url, isolation_level=level)
    with Session(engine) as session, Session(engine) as other:
        holder = Scheduler(other).schedule("3d", record, **KEY)
        other.commit()
        assert count(session) == 1  # the snapshot
        Scheduler(other).cancel(holder)
        other.commit()
        job = Scheduler(session).schedule("3d", record, **KEY, on_conflict="return_existing")
        assert job.id != holder.id
        session.commit()
    engine.dispose()
