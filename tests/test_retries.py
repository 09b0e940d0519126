"""Failed attempts that are tried again, and what handlers may ask for."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from future_jobs import (
    Backoff,
    Cancel,
    JobFailure,
    Retry,
    ScheduledJob,
    Scheduler,
    Snooze,
    Worker,
    current_job,
    events,
    job,
)
from future_jobs.errors import CallableRefused, InvalidArgument, InvalidCallable
from future_jobs.retries import delay
from tests.jobs import CALLS


def fails(times=10**9, error="ValueError"):
    import builtins

    CALLS.append("run")
    if len(CALLS) <= times:
        raise getattr(builtins, error)("fail")


def asks(what, *args, raises=True):
    CALLS.append("run")
    signal = {"snooze": Snooze, "retry": Retry, "cancel": Cancel}[what](*args)
    if raises:
        raise signal
    return signal


def minutes(failures, error):
    CALLS.append((failures, type(error).__name__, str(error), current_job().id))
    return f"{failures}m"


def exactly(failures, error):
    return timedelta(hours=failures)


def of_no_use(failures, error):
    """What a function may do instead of returning a duration: the handler's error says what."""
    answers = {"nothing": None, "negative": timedelta(-1), "a month": "1mo", "endless": timedelta.max, "number": 5}
    if str(error) == "raises":
        raise LookupError("no such partner")
    if str(error) == "exits":
        raise SystemExit(3)
    return answers[str(error)]


def fails_with(text):
    raise ValueError(text)


@job(max_attempts=5, backoff=exactly)
def fails_by_default():
    raise ValueError("fail")


def edits_its_own_row_and_asks():
    this = current_job()
    this.session.execute(update(ScheduledJob).where(ScheduledJob.id == this.id).values(status="failed"))
    return Retry("5m")


FAILS = "tests.test_retries.fails"
ASKS = "tests.test_retries.asks"


def test_a_failed_attempt_is_tried_again_after_its_backoff(scheduler, session, now, calls):
    job = scheduler.schedule(now, FAILS, args=[2], max_attempts=3, backoff="1h")
    assert scheduler.run_due(now).retried == 1
    assert (job.status, job.run_at, job.failures) == ("scheduled", now + timedelta(hours=1), 1)
    assert scheduler.run_due(now + timedelta(minutes=59)).retried == 0
    assert scheduler.run_due(now + timedelta(hours=1)).retried == 1
    assert scheduler.run_due(now + timedelta(hours=2)).complete == 1
    assert (job.status, job.failures, job.attempt) == ("complete", 2, 3)
    assert job.nominal_at == now
    assert session.scalar(select(func.count()).select_from(JobFailure)) == 2


def test_the_last_attempt_fails_the_job(scheduler, now, calls):
    job = scheduler.schedule(now, FAILS, max_attempts=2, backoff="0s")
    scheduler.run_due(now)
    with pytest.raises(ValueError, match="fail"):
        scheduler.run_due(now)
    assert (job.status, job.failures) == ("failed", 2)


def test_one_attempt_is_the_default(scheduler, now, calls):
    job = scheduler.schedule(now, FAILS)
    scheduler.run_due(now, ignore_errors=True)
    assert (job.status, calls) == ("failed", ["run"])


def test_a_list_of_delays_is_used_in_order_and_its_last_again(scheduler, now, calls):
    job = scheduler.schedule(now, FAILS, max_attempts=4, backoff=["1m", "1h"], expires=None)
    for expected in (timedelta(minutes=1), timedelta(hours=1), timedelta(hours=1)):
        before = job.run_at
        scheduler.run_due(before)
        assert job.run_at - before == expected


def test_a_retry_never_starts_after_the_expiry(scheduler, now, calls):
    job = scheduler.schedule(now, FAILS, max_attempts=5, backoff="1h", expires="90m")
    assert scheduler.run_due(now).retried == 1
    report = scheduler.run_due(now + timedelta(hours=1), ignore_errors=True)
    assert (report.failed, job.status) == (1, "failed")


def test_retry_on_and_discard_on_choose_by_class(scheduler, now, calls):
    options = {"max_attempts": 3, "backoff": "1m"}
    other = scheduler.schedule(now, FAILS, retry_on=[OSError], **options)
    same = scheduler.schedule(now, FAILS, kwargs={"error": "ConnectionError"}, retry_on=OSError, **options)
    dropped = scheduler.schedule(now, FAILS, kwargs={"error": "KeyError"}, discard_on="LookupError", **options)
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.failed, report.retried, report.cancelled) == (1, 1, 1)
    assert (other.status, same.status, dropped.status) == ("failed", "scheduled", "cancelled")
    assert "KeyError" in dropped.error


# --- a function as backoff ----------------------------------------------------------------------------------------


def test_a_function_decides_by_the_failures_and_the_exception(scheduler, session, now, calls):
    job = scheduler.schedule(now, FAILS, kwargs={"error": "OSError"}, max_attempts=3, backoff=minutes)
    assert job.options == {"backoff": {"call": "tests.test_retries.minutes"}}
    scheduler.run_due(now)
    assert job.run_at == now + timedelta(minutes=1)
    scheduler.run_due(job.run_at)
    assert job.run_at == now + timedelta(minutes=3)
    assert calls == ["run", (1, "OSError", "fail", job.id), "run", (2, "OSError", "fail", job.id)]


def test_a_function_is_a_default_of_a_callable_as_well(scheduler, now, calls):
    job = scheduler.schedule(now, fails_by_default)
    scheduler.run_due(now)
    assert job.run_at == now + timedelta(hours=1)


def test_a_retry_that_a_function_puts_behind_the_expiry_fails_at_once(scheduler, now, calls):
    job = scheduler.schedule(now, fails_by_default, expires="59m")
    assert scheduler.run_due(now, ignore_errors=True).failed == 1
    assert job.status == "failed"


@pytest.fixture
def problems():
    """What was said to be wrong with backoffs."""
    told = []
    listener = events.listen("backoff_failed", lambda **data: told.append(data))
    yield told
    events.unlisten("backoff_failed", listener)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("raises", "LookupError: no such partner"),
        ("exits", "SystemExit: 3"),
        ("nothing", "InvalidOption: backoff is None"),
        ("negative", "InvalidOption: backoff is datetime.timedelta(days=-1)"),
        ("a month", "InvalidOption: backoff is '1mo'"),
        ("endless", "OverflowError: "),
        ("number", "InvalidOption: backoff is 5"),
    ],
)
def test_a_function_of_no_use_gives_way_to_the_default_and_it_is_said(scheduler, now, problems, answer, reason):
    job = scheduler.schedule(now, fails_with, args=[answer], max_attempts=3, backoff=of_no_use)
    assert scheduler.run_due(now).retried == 1
    assert job.run_at == now + Backoff().delay(1, f"{job.id}:1")
    [told] = problems
    assert told["reason"].startswith(reason)
    assert {name: told[name] for name in ("job_id", "attempt", "callable_name", "queue")} == {
        "job_id": job.id,
        "attempt": 1,
        "callable_name": "tests.test_retries.fails_with",
        "queue": "default",
    }


@pytest.mark.parametrize(
    "stored",
    [{"call": "tests.test_retries.gone"}, {"call": 5}, {"call": []}, {"factor": "x"}, {"what": 1}, 5, ["soon"], "soon"],
)
def test_a_backoff_that_was_damaged_gives_way_too(scheduler, session, now, problems, stored):
    job = scheduler.schedule(now, FAILS, max_attempts=3)
    session.execute(update(ScheduledJob).values(options={"backoff": stored}))
    assert scheduler.run_due(now).retried == 1
    assert job.run_at == now + Backoff().delay(1, f"{job.id}:1")
    assert len(problems) == 1


def test_a_function_is_allowed_or_not_as_any_other(session, now, problems, calls):
    strict = Scheduler(session, allow=["tests.test_retries.fails"])
    with pytest.raises(CallableRefused, match=r"tests\.test_retries\.minutes"):
        strict.schedule(now, FAILS, max_attempts=3, backoff=minutes)
    with pytest.raises(CallableRefused, match=r"tests\.test_retries\.minutes"):
        strict.schedule(now, FAILS, max_attempts=3).reschedule("1h", backoff=minutes)
    session.rollback()
    Scheduler(session).schedule(now, FAILS, max_attempts=3, backoff=minutes)
    assert strict.run_due(now).retried == 1
    assert calls == ["run"]
    assert "CallableRefused" in problems[0]["reason"]


@pytest.mark.parametrize(
    ("function", "error"), [(lambda *_: "1m", InvalidCallable), (timedelta, InvalidArgument), (5, InvalidArgument)]
)
def test_a_function_that_cannot_be_found_again_is_refused(scheduler, now, function, error):
    with pytest.raises(error, match="backoff is"):
        scheduler.schedule(now, FAILS, backoff=function)


# --- what handlers ask for ----------------------------------------------------------------------------------------


def test_a_worker_does_what_handlers_ask_for(engine, scheduler, session, calls):
    asked = [[], ["snooze", "1d"], ["retry", "1d"], ["cancel", "not needed"]]
    jobs = [
        scheduler.enqueue(ASKS, args=args, kwargs={"raises": raises}, max_attempts=2) if args
        else scheduler.enqueue(FAILS, max_attempts=2, backoff=exactly)
        for args in asked
        for raises in (True, False)
    ]  # fmt: skip
    session.commit()
    Worker(engine, max_jobs=len(jobs)).run()
    session.expire_all()
    assert [str(job.status) for job in jobs] == ["scheduled"] * 6 + ["cancelled"] * 2
    assert [(job.failures, job.snoozes) for job in jobs] == [(1, 0)] * 2 + [(0, 1)] * 2 + [(1, 0)] * 2 + [(0, 0)] * 2
    hours = [round((job.run_at - job.started_at) / timedelta(hours=1)) for job in jobs[:6]]
    assert hours == [1, 1, 24, 24, 24, 24]
    assert jobs[6].error == jobs[7].error == "not needed"


def test_every_failed_attempt_is_kept_whatever_becomes_of_it(scheduler, session, now, calls):
    retried = scheduler.schedule(now, FAILS, max_attempts=2, backoff="1m")
    failed = scheduler.schedule(now, FAILS)
    discarded = scheduler.schedule(now, FAILS, discard_on=ValueError)
    asked = scheduler.schedule(now, ASKS, args=["retry", "1h"], kwargs={"raises": False})
    edited = scheduler.schedule(now, edits_its_own_row_and_asks)
    scheduler.run_due(now, ignore_errors=True)
    scheduler.run_due(now + timedelta(minutes=1), ignore_errors=True)
    found = session.execute(select(JobFailure.job_id, JobFailure.attempt).order_by(JobFailure.id)).all()
    others = [(each.id, 1) for each in (failed, discarded, asked, edited)]
    assert sorted(found) == sorted([(retried.id, 1), (retried.id, 2), *others])
    assert [each.failures for each in (retried, failed, discarded, asked, edited)] == [2, 1, 1, 1, 1]
    assert edited.status == "scheduled"


@pytest.mark.parametrize("raises", [True, False])
def test_snoozing_costs_no_attempt(scheduler, session, now, calls, raises):
    job = scheduler.schedule(now, ASKS, args=["snooze", "10m"], kwargs={"raises": raises})
    for round_ in range(1, 4):
        assert scheduler.run_due(job.run_at).snoozed == 1
        assert job.run_at == now + round_ * timedelta(minutes=10)
    assert (job.failures, job.snoozes, job.status) == (0, 3, "scheduled")
    assert session.scalar(select(func.count()).select_from(JobFailure)) == 0


@pytest.mark.parametrize("raises", [True, False])
def test_retry_asks_for_another_try_while_attempts_are_left(scheduler, now, calls, raises):
    job = scheduler.schedule(now, ASKS, args=["retry", "5m"], kwargs={"raises": raises}, max_attempts=2)
    assert scheduler.run_due(now).retried == 1
    assert (job.run_at, job.failures) == (now + timedelta(minutes=5), 1)
    assert scheduler.run_due(job.run_at, ignore_errors=True).failed == 1


def test_retry_needs_no_max_attempts_and_ends_with_the_expiry(scheduler, now, calls):
    job = scheduler.schedule(now, ASKS, args=["retry", "5m"], expires="12m")
    assert [scheduler.run_due(now + minutes * timedelta(minutes=1)).retried for minutes in (0, 5)] == [1, 1]
    assert (job.failures, job.status) == (2, "scheduled")
    assert scheduler.run_due(now + timedelta(minutes=10), ignore_errors=True).failed == 1


@pytest.mark.parametrize("raises", [True, False])
def test_cancel_ends_the_job_with_its_reason(scheduler, now, calls, raises):
    job = scheduler.schedule(now, ASKS, args=["cancel", "not needed"], kwargs={"raises": raises}, max_attempts=5)
    assert scheduler.run_due(now).cancelled == 1
    assert (job.status, job.error) == ("cancelled", "not needed")


def test_a_wish_that_makes_no_sense_is_a_failure(scheduler, now, calls):
    job = scheduler.schedule(now, ASKS, args=["snooze", "whenever"])
    scheduler.run_due(now, ignore_errors=True)
    assert job.status == "failed"
    assert "whenever" in job.error


def test_a_running_job_that_was_asked_to_stop_is_not_retried(scheduler, session, now, calls):
    job = scheduler.schedule(now, "tests.test_retries.cancels_itself_and_fails", max_attempts=5)
    report = scheduler.run_due(now)
    assert (job.status, report.cancelled) == ("cancelled", 1)


def cancels_itself_and_fails():
    from sqlalchemy import update

    from future_jobs import ScheduledJob, current_job

    job = current_job()
    with type(job.session)(job.session.get_bind().engine) as other:  # somebody else asks
        other.execute(update(ScheduledJob).values(cancel_requested_at=job.created_at))
        other.commit()
    raise ValueError("fail")


@given(
    st.builds(
        Backoff,
        base=st.sampled_from(["0s", "1s", "30s", "2h"]),
        factor=st.floats(1, 100),
        cap=st.sampled_from(["0s", "1m", "1d"]),
        jitter=st.floats(0, 1),
    ),
    st.integers(1, 10**6),
    st.text(max_size=5),
)
def test_a_backoff_is_bounded_and_repeatable(backoff, failures, seed):
    first = backoff.delay(failures, seed)
    cap = timedelta(days=1)
    assert timedelta(0) <= first <= 1.5 * cap
    assert first == backoff.delay(failures, seed)


def test_the_default_backoff_grows():
    delays = [delay(None, failures, "same") for failures in (1, 3, 6, 9, 50)]
    assert delays == sorted(delays)
    assert delays[-1] <= timedelta(hours=1, minutes=10)
