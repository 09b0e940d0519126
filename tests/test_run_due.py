"""One pass: what runs, when, in which order, and what is left behind."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from future_jobs import (
    JobFailure,
    RunReport,
    ScheduledJob,
    Scheduler,
    Status,
    current_job,
    events,
    execution,
    job_as_parameter,
)
from future_jobs.errors import FutureJobsError, SchemaError
from tests import jobs
from tests.jobs import failjob, record
from tests.shop import Letter, Order, letters


def test_a_job_does_not_start_before_its_time(scheduler, now, calls):
    scheduler.schedule(now + timedelta(hours=5), record)
    assert scheduler.run_due(now + timedelta(hours=5) - timedelta(microseconds=1)).complete == 0
    assert scheduler.run_due(now + timedelta(hours=5)).complete == 1
    assert scheduler.run_due(now + timedelta(hours=6)).complete == 0
    assert calls == [()]


def test_a_job_scheduled_for_now_runs_at_once(scheduler, calls):
    scheduler.schedule(datetime.now(), record)
    assert scheduler.run_due().complete == 1


def test_however_late_a_job_runs_if_it_has_not_expired(scheduler, now, calls):
    job = scheduler.schedule(now, record, expires=None)
    scheduler.run_due(now + timedelta(days=3650))
    assert (job.status, calls) == (Status.COMPLETE, [()])


def test_an_overdue_job_expires_instead_of_running(scheduler, now, calls):
    job = scheduler.schedule("3d", record, expires="5d")
    report = scheduler.run_due(now + timedelta(days=9))
    assert (job.status, report.expired, calls) == (Status.EXPIRED, 1, [])
    assert job.finished_at is not None


def test_a_job_whose_expiry_equals_now_still_runs(scheduler, now, calls):
    job = scheduler.schedule(now, record, expires="1h")
    assert scheduler.run_due(now + timedelta(hours=1)).complete == 1
    job = scheduler.schedule(now, record, expires="1h")
    assert scheduler.run_due(now + timedelta(hours=1, microseconds=1)).expired == 1
    assert job.status == "expired"


def test_the_order_is_priority_then_time_then_id(scheduler, now, calls):
    for label, priority, minutes, queue in [
        ("late", 0, 3, "default"),
        ("early", 0, 1, "other"),
        ("high", 5, 9, "default"),
        ("low", -5, 0, "other"),
        ("same time, later id", 0, 3, "default"),
        ("between", 0, 2, "default"),
    ]:
        scheduler.schedule(now + timedelta(minutes=minutes), record, args=[label], priority=priority, queue=queue)
    scheduler.run_due(now + timedelta(hours=1))
    order = [call[0] for call in calls]
    assert order[0] == "high"
    assert order[-1] == "low"
    assert [label for label in order if label not in {"high", "low", "early"}] == [
        "between",
        "late",
        "same time, later id",
    ]


def test_the_report_has_counts_and_ids_in_the_order_run(scheduler, now, calls):
    first = scheduler.schedule(now, record)
    second = scheduler.schedule(now - timedelta(minutes=1), failjob)
    third = scheduler.schedule(now, record, priority=1)
    gone = scheduler.schedule(now - timedelta(days=30), record)
    report = scheduler.run_due(now, ignore_errors=True)
    assert report == RunReport(complete=2, failed=1, expired=1, job_ids=[third.id, second.id, first.id])
    assert gone.status == "expired"


def test_the_first_error_is_raised_after_it_is_recorded(scheduler, session, now, calls):
    job = scheduler.schedule(now, failjob)
    after = scheduler.schedule(now + timedelta(seconds=1), record)
    with pytest.raises(ValueError, match=r"^fail$"):
        scheduler.run_due(now + timedelta(minutes=1))
    assert job.status == Status.FAILED
    assert 'raise ValueError("fail")' in job.error
    assert job.error.count("  File ") == 1  # none of this library's frames
    assert (after.status, after.leased_by, after.failures, calls) == (Status.SCHEDULED, None, 0, [])
    assert scheduler.run_due(now + timedelta(minutes=1)).complete == 1


def test_expired_jobs_are_marked_even_if_another_fails_first(scheduler, now, calls):
    scheduler.schedule(now, failjob, priority=9)
    gone = scheduler.schedule(now - timedelta(days=2), record, expires="1d")
    with pytest.raises(ValueError, match="fail"):
        scheduler.run_due(now)
    assert gone.status == "expired"


def test_every_failed_attempt_leaves_a_row(scheduler, session, now):
    job = scheduler.schedule(now, failjob)
    scheduler.run_due(now, ignore_errors=True)
    [failure] = session.scalars(select(JobFailure))
    assert (failure.job_id, failure.attempt, failure.error_type) == (job.id, 1, "ValueError")
    assert failure.traceback == job.error
    assert job.failures == 1


def test_the_happy_path_leaves_no_failure(scheduler, session, calls):
    scheduler.enqueue(record)
    scheduler.run_due()
    assert session.scalars(select(JobFailure)).all() == []


def test_completed_jobs_are_kept_or_deleted_as_asked(scheduler, session, now, calls):
    kept = scheduler.schedule(now, record)
    scheduler.run_due(now)
    scheduler.schedule(now, record)
    scheduler.schedule(now, jobs.write_letter, args=["a"])
    bad = scheduler.schedule(now, failjob)
    report = scheduler.run_due(now, delete_completed=True, ignore_errors=True)
    assert (report.complete, report.failed) == (2, 1)
    assert session.scalars(select(ScheduledJob.id).order_by(ScheduledJob.id)).all() == [kept.id, bad.id]


def test_queues_and_limit_restrict_a_pass(scheduler, now, calls):
    for n in range(5):
        scheduler.schedule(now, record, args=[f"mail {n}"], queue="mail")
        scheduler.schedule(now, record, args=[f"other {n}"], queue="other")
    assert scheduler.run_due(now, queues=["mail"], limit=3).complete == 3
    assert calls == [("mail 0",), ("mail 1",), ("mail 2",)]
    assert scheduler.run_due(now, limit=0).complete == 0
    assert scheduler.run_due(now, queues=["mail", "other"]).complete == 7


def test_what_handlers_schedule_waits_for_the_next_pass(scheduler, session, now):
    scheduler.schedule(now, "tests.test_run_due.again")
    for _ in range(3):
        assert scheduler.run_due(now).complete == 1


@job_as_parameter
def again(job):
    Scheduler.of(job.session).enqueue("tests.test_run_due.again")


def test_inside_a_handler_now_is_the_now_given(scheduler, session, now):
    then = now + timedelta(days=100)
    scheduler.schedule("1d", "tests.test_run_due.again", expires=None)
    scheduler.run_due(then)
    [new] = session.scalars(select(ScheduledJob).where(ScheduledJob.status == "scheduled"))
    assert new.run_at == then
    assert scheduler.run_due(then).complete == 1


def test_a_job_that_asks_to_run_again_at_once_does_not_hold_the_pass(scheduler, now):
    scheduler.schedule(now, "tests.test_run_due.snooze_for_ever")
    for count in range(1, 4):
        assert scheduler.run_due(now).snoozed == 1
        assert scheduler.session.scalar(select(ScheduledJob.attempt)) >= count


def snooze_for_ever():
    from future_jobs import Snooze

    return Snooze("0s")


def test_pending_work_of_the_session_is_committed_first(scheduler, session, other, now):
    session.add(Letter(text="pending"))
    scheduler.run_due(now)
    assert letters(other) == ["pending"]


def test_a_naive_now_is_local_time_of_the_schedulers_zone(session, calls):
    scheduler = Scheduler(session, timezone="Asia/Tokyo")
    scheduler.schedule(datetime(2030, 1, 1, 0, tzinfo=UTC), record)
    assert scheduler.run_due(datetime(2030, 1, 1, 8, 59)).complete == 0
    assert scheduler.run_due(datetime(2030, 1, 1, 9)).complete == 1


def test_handlers_get_job_then_content_object_then_arguments(scheduler, session, now, calls):
    session.add(order := Order(customer="Ada"))
    scheduler.schedule(now, "tests.jobs.about", content_object=order, args=["x"])
    scheduler.schedule(now, "tests.test_run_due.job_and_object", content_object=order, args=["y"])
    scheduler.schedule(now, jobs.annotated, args=[1])
    assert scheduler.run_due(now).complete == 3
    assert calls[0] == ("Order", "Ada", "x")
    assert calls[1] == ("running", "Ada", "y")
    assert calls[2][0] == 1
    assert calls[2][2] is True


@job_as_parameter
def job_and_object(job, order, word):
    record(str(job.status), order.customer, word)


def test_a_method_of_a_mapped_object_runs_on_the_live_object(scheduler, session, other, now):
    session.add(order := Order(customer="Ada"))
    scheduler.schedule(now, order.send_invoice, kwargs={"copies": 2})
    scheduler.schedule(now, "send_invoice", content_object=order, args=[3])
    order.customer = "Grace"
    assert scheduler.run_due(now).complete == 2
    assert letters(other) == ["invoice for Grace x2", "invoice for Grace x3"]


def test_mapped_arguments_are_loaded_live_in_the_jobs_session(scheduler, session, now, calls):
    session.add(order := Order(customer="Ada"))
    scheduler.schedule(now, "tests.test_run_due.look_at", args=[{"orders": [order]}])
    assert scheduler.run_due(now).complete == 1
    assert calls == [("Ada", True, False)]


def look_at(arguments):
    [order] = arguments["orders"]
    here = current_job().session
    record(order.customer, order in here, order in jobs.CALLS)


def test_an_object_that_is_gone_fails_the_job_clearly(scheduler, session, now, calls):
    session.add(order := Order(customer="Ada"))
    failing = scheduler.schedule(now, record, args=[order])
    discarded = scheduler.schedule(now, record, args=[order], missing="discard")
    given_none = scheduler.schedule(now, record, args=[order], missing="none")
    session.flush()
    session.delete(order)
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.failed, report.cancelled, report.complete) == (1, 1, 1)
    assert "Order 1 no longer exists" in failing.error or "no longer exists" in failing.error
    assert discarded.status == "cancelled"
    assert "no longer exists" in discarded.error
    assert given_none.status == "complete"
    assert calls == [(None,)]


def test_current_job_is_none_outside_of_a_handler():
    assert current_job() is None


def test_results_are_kept_as_json(scheduler, session, now):
    job = scheduler.schedule(now, "tests.test_run_due.gives", args=[{"total": 3, "items": [1, 2]}])
    scheduler.run_due(now)
    assert job.return_value == {"total": 3, "items": [1, 2]}


def gives(value):
    return value


def test_a_result_comes_back_with_its_types(scheduler, session, now):
    session.add(order := Order(customer="Ada"))
    value = {"when": now, "items": (1, b"2"), "order": order}
    job = scheduler.schedule(now, "tests.test_run_due.gives", args=[value])
    plain = scheduler.schedule(now, record)
    scheduler.run_due(now)
    assert job.result == value
    assert job.result["order"] is order
    assert (plain.result, plain.return_value) == (None, None)


def test_a_result_that_cannot_be_kept_does_not_fail_the_job(scheduler, session, now):
    heard = []
    listener = events.listen("result_not_kept", lambda **data: heard.append(data))
    try:
        first = scheduler.schedule(now, "tests.test_run_due.gives_an_object")
        second = scheduler.schedule(now, "tests.test_run_due.gives_too_much")
        assert scheduler.run_due(now).complete == 2
    finally:
        events.unlisten("result_not_kept", listener)
    assert "not kept" in first.return_value
    assert "not kept" in second.return_value
    assert [data["job_id"] for data in heard] == [first.id, second.id]


def gives_an_object():
    return object()


def gives_too_much():
    return "x" * (2 << 20)


def test_a_coroutine_function_is_awaited(scheduler, session, other, now, calls):
    job = scheduler.schedule(now, jobs.a_coroutine, args=["async"])
    assert scheduler.run_due(now).complete == 1
    assert (calls, letters(other), job.status) == (["async"], ["async"], "complete")


def test_a_scoped_session_is_the_jobs_own_inside_a_handler(engine, now):
    from sqlalchemy.orm import scoped_session, sessionmaker

    global REGISTRY
    REGISTRY = scoped_session(sessionmaker(engine))
    scheduler = Scheduler(REGISTRY)
    ok = scheduler.schedule(now, "tests.test_run_due.writes_through_the_registry", args=["kept", False])
    bad = scheduler.schedule(now, "tests.test_run_due.writes_through_the_registry", args=["undone", True])
    scheduler.run_due(now, ignore_errors=True)
    assert (ok.status, bad.status) == ("complete", "failed")
    assert letters(REGISTRY()) == ["kept"]
    REGISTRY.remove()


REGISTRY = None


def writes_through_the_registry(word, fails):
    REGISTRY.add(Letter(text=word))
    REGISTRY.flush()
    assert REGISTRY() is current_job().session
    if fails:
        raise ValueError


def test_a_running_job_shows_as_running_to_others(scheduler, session, engine, now, calls):
    if engine.url.database in (None, "", ":memory:"):
        return  # there are no others
    scheduler.schedule(now, "tests.test_run_due.look_from_outside")
    global ENGINE
    ENGINE = engine
    scheduler.run_due(now)
    [(status, attempt, leased)] = calls
    assert (status, attempt, leased) == ("running", 1, True)


ENGINE = None


def look_from_outside():
    with ENGINE.connect() as connection:
        row = connection.execute(text("SELECT status, attempt, leased_until FROM future_jobs_scheduled_job")).one()
    record(row.status, row.attempt, row.leased_until is not None)


def test_a_handler_can_cancel_a_job_that_was_claimed_with_it(scheduler, session, now, calls):
    for n in range(3):  # so that the next claim takes several
        scheduler.schedule(now - timedelta(minutes=1), record, args=[n])
    first = scheduler.schedule(now, "tests.test_run_due.cancels")
    second = scheduler.schedule(now + timedelta(seconds=1), record, args=["never"])
    session.commit()
    jobs.CALLS.clear()
    global OTHER
    OTHER = second.id
    report = scheduler.run_due(now + timedelta(minutes=1))
    assert (first.status, second.status, report.cancelled) in {
        ("complete", "cancelled", 1),
        ("complete", "cancelled", 0),  # it was not claimed yet
    }
    assert ("never",) not in calls


OTHER = None


@job_as_parameter
def cancels(job):
    assert Scheduler.of(job.session).cancel(OTHER)


def test_a_job_of_a_dead_worker_is_rescued_after_its_lease(scheduler, session, now, calls):
    job = scheduler.schedule(now, record)
    session.flush()
    leased = {"status": "running", "attempt": 1, "leased_by": "dead", "leased_until": now + timedelta(seconds=60)}
    session.execute(update(ScheduledJob).where(ScheduledJob.id == job.id).values(**leased))
    session.commit()
    assert scheduler.run_due(now + timedelta(seconds=100)).complete == 0
    report = scheduler.run_due(now + timedelta(seconds=121))
    assert (report.complete, job.status, job.attempt, job.losses) == (1, "complete", 2, 1)
    [failure] = session.scalars(select(JobFailure))
    assert (failure.attempt, failure.error_type, failure.worker) == (1, "WorkerLost", "dead")


def how_many_run(session: Session):
    calls_of_how_many_run.append(session.scalar(select(func.count()).where(ScheduledJob.status == "running")))


calls_of_how_many_run: list[int] = []


def test_jobs_that_were_lost_before_are_taken_last_and_one_at_a_time(scheduler, session, now):
    calls_of_how_many_run.clear()
    ids = scheduler.schedule_many(now, "tests.test_run_due.how_many_run", [{} for _ in range(6)])
    session.execute(update(ScheduledJob).where(ScheduledJob.id.in_(ids[:3])).values(losses=1))
    session.commit()
    report = scheduler.run_due(now)
    assert report.job_ids == ids[3:] + ids[:3]
    assert calls_of_how_many_run[3:] == [1, 1, 1]
    assert max(calls_of_how_many_run[:3]) > 1


def test_a_job_that_lost_five_workers_fails(scheduler, session, now, calls):
    job = scheduler.schedule(now, record)
    session.flush()
    leased = {"status": "running", "attempt": 5, "losses": 4, "leased_by": "dead", "leased_until": now}
    session.execute(update(ScheduledJob).where(ScheduledJob.id == job.id).values(**leased))
    scheduler.run_due(now + timedelta(seconds=61))
    assert (job.status, job.losses, calls) == ("failed", 5, [])
    assert "worker lost" in job.error
    assert scheduler.retry(job)
    assert scheduler.run_due(now + timedelta(days=1)).complete == 1


def test_a_pass_in_the_past_keeps_its_jobs(scheduler, session, engine, now, calls):
    """Its leases are counted from the real time, or everybody else would take its jobs away."""
    if engine.url.database in (None, "", ":memory:"):
        return  # nobody else is there
    global ENGINE
    ENGINE = engine
    past = now - timedelta(days=1)
    job = scheduler.schedule(past, "tests.test_run_due.others_run_too")
    report = scheduler.run_due(past)
    assert (report.complete, report.lost, job.attempt, job.losses) == (1, 0, 1, 0)


def others_run_too():
    from sqlalchemy.orm import Session

    token = execution.running.set(None)  # as in another process
    try:
        with Session(ENGINE) as session:
            assert Scheduler(session).run_due().job_ids == []
    finally:
        execution.running.reset(token)


def test_a_job_revived_by_a_handler_waits_for_the_next_pass(scheduler, now, calls):
    failed = scheduler.schedule(now, record)
    scheduler.cancel(failed)
    global OTHER
    OTHER = failed.id
    scheduler.schedule(now - timedelta(minutes=1), "tests.test_run_due.revives")
    assert scheduler.run_due(now).complete == 1
    assert scheduler.run_due(now).job_ids == [failed.id]


@job_as_parameter
def revives(job):
    assert Scheduler.of(job.session).retry(OTHER)


def test_inside_a_handler_now_is_that_of_the_schedulers_clock(session, now, calls):
    from sqlalchemy.orm import Session

    then = now + timedelta(days=400)
    scheduler = Scheduler(session, clock=lambda: then, expires=None)
    scheduler.schedule(now, "tests.test_run_due.schedules_with_a_new_scheduler")
    scheduler.run_due()
    assert session.scalars(select(ScheduledJob.run_at).where(ScheduledJob.status == "scheduled")).all() == [
        then + timedelta(hours=1)
    ]
    assert issubclass(type(session), Session)


@job_as_parameter
def schedules_with_a_new_scheduler(job):
    Scheduler(job.session).schedule("1h", record)


def test_a_coroutine_runs_even_inside_a_running_loop(engine, now, calls):
    import asyncio

    from sqlalchemy.orm import Session

    async def endpoint():
        with Session(engine) as session:
            scheduler = Scheduler(session)
            scheduler.schedule(now, "tests.test_run_due.sleepless")
            return scheduler.run_due(now)

    assert asyncio.run(endpoint()).complete == 1
    assert calls == [("awake", True)]


async def sleepless():
    record("awake", current_job() is not None)


def test_events_tell_the_story(scheduler, session, now, calls):
    heard = []
    listeners = [
        (name, events.listen(name, lambda name=name, **data: heard.append((name, data["job_id"]))))
        for name in events.EVENTS
    ]
    try:
        done = scheduler.schedule(now, record, priority=1)
        bad = scheduler.schedule(now, failjob)
        gone = scheduler.schedule(now - timedelta(days=9), record)
        scheduler.run_due(now, ignore_errors=True)
    finally:
        for name, listener in listeners:
            events.unlisten(name, listener)
    story = [(name, job_id) for name, job_id in heard if name != "claimed"]
    assert story[:4] == [("scheduled", done.id), ("scheduled", bad.id), ("scheduled", gone.id), ("expired", gone.id)]
    assert sorted(story[4:]) == [("completed", done.id), ("failed", bad.id)]


def test_what_is_handed_back_is_told(scheduler, now, calls):
    heard = []
    listener = events.listen("released", lambda **data: heard.append((data["job_id"], data["reason"])))
    try:
        first = scheduler.schedule(now, record)
        scheduler.schedule(now, "tests.test_run_due.sees_then_fails", kwargs={"count": 1})
        later = scheduler.schedule_many(now, record, [{} for _ in range(300)])
        with pytest.raises(ValueError, match="fail"):
            scheduler.run_due(now)
    finally:
        events.unlisten("released", listener)
    assert first.status == "complete"
    claimed = scheduler.session.scalars(select(ScheduledJob.id).where(ScheduledJob.attempt > 0)).all()
    assert {job_id for job_id, _ in heard} == set(claimed) & set(later)
    assert scheduler.session.scalars(
        select(ScheduledJob.status).where(ScheduledJob.id.in_(later)).distinct()
    ).all() == ["scheduled"]


def sees_then_fails(count):
    raise ValueError("fail")


def test_a_listener_that_raises_breaks_nothing(scheduler, now, calls):
    def broken(**data):
        raise RuntimeError

    events.listen("completed", broken)
    try:
        scheduler.schedule(now, record)
        assert scheduler.run_due(now).complete == 1
    finally:
        events.unlisten("completed", broken)


def test_the_log_never_shows_arguments(scheduler, now, caplog):
    scheduler.schedule(now, "tests.test_run_due.fails_quietly", args=["a secret"])
    with caplog.at_level("DEBUG", logger="future_jobs"):
        scheduler.run_due(now, ignore_errors=True)
    assert "failed" in caplog.text
    assert "a secret" not in caplog.text


def fails_quietly(secret):
    raise ValueError("no")


def test_missing_tables_are_one_error_with_the_command(empty_engine):
    from sqlalchemy.orm import Session

    with Session(empty_engine) as session:
        with pytest.raises(SchemaError, match="future-jobs db upgrade"):
            Scheduler(session).run_due()


def test_nothing_due_writes_nothing(scheduler, session, engine, now):
    scheduler.schedule("1d", record)
    session.commit()
    assert scheduler.run_due(now) == RunReport()


def test_system_exit_in_a_handler_is_a_failed_attempt(scheduler, session, now, calls):
    exits = scheduler.schedule(now, "tests.test_run_due.leave", args=["SystemExit"])
    stops = scheduler.schedule(now, "tests.test_run_due.leave", args=["KeyboardInterrupt"])
    closes = scheduler.schedule(now, "tests.test_run_due.leave", args=["GeneratorExit"])
    done = scheduler.schedule(now, record)
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.failed, report.complete) == (3, 1)
    assert [job.status for job in (exits, stops, closes, done)] == ["failed"] * 3 + ["complete"]
    scheduler.schedule(now, "tests.test_run_due.leave", args=["SystemExit"])
    with pytest.raises(FutureJobsError, match="SystemExit"):
        scheduler.run_due(now)


def leave(name):
    import builtins

    raise getattr(builtins, name)


def test_a_real_interrupt_stops_the_pass_cleanly(scheduler, session, now, calls):
    first = scheduler.schedule(now, "tests.test_run_due.press_control_c", priority=1)
    second = scheduler.schedule(now, record)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run_due(now)
    assert [(job.status, job.failures, job.leased_by) for job in (first, second)] == [("scheduled", 0, None)] * 2
    assert calls == []


def press_control_c():
    import signal

    signal.raise_signal(signal.SIGINT)
