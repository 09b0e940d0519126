"""What is entered around each job, and what is told and logged of it."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar

import pytest
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from future_jobs import JobTimeout, ScheduledJob, Scheduler, Snooze, Worker, current_job, events
from tests import shop, stopjobs
from tests.jobs import CALLS

APP: ContextVar[str | None] = ContextVar("app", default=None)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, calls):
    monkeypatch.setattr(events, "_wrappers", ())
    monkeypatch.setattr(events, "_listeners", dict(events._listeners))


def note_app():
    CALLS.append(("handler", APP.get()))


async def note_app_in_coroutine():
    note_app()


def snooze():
    raise Snooze("1h")


def around(name, **wrong):
    @contextmanager
    def wrapper(job_id, attempt, callable_name, queue, **more):
        CALLS.append(f"{name} enters")
        if "enter" in wrong:
            raise wrong["enter"]
        token = APP.set(name)
        try:
            yield
        except BaseException as error:
            CALLS.append(f"{name} sees {type(error).__name__}")
            raise
        finally:
            APP.reset(token)
            CALLS.append(f"{name} leaves")
            if "leave" in wrong:
                raise wrong["leave"]

    return events.around_job(wrapper)


def run_by_pass(engine, scheduler):
    scheduler.run_due(ignore_errors=True)


def run_by_worker(engine, scheduler):
    scheduler.session.commit()
    Worker(engine, max_jobs=1).run()
    scheduler.session.expire_all()


BOTH = pytest.mark.parametrize("run", [run_by_pass, run_by_worker])


@BOTH
@pytest.mark.parametrize("name", ["note_app", "note_app_in_coroutine"])
def test_a_handler_runs_inside_of_it(engine, scheduler, run, name):
    around("app")
    job = scheduler.enqueue(f"tests.test_around.{name}")
    run(engine, scheduler)
    assert [*CALLS] == ["app enters", ("handler", "app"), "app leaves"]
    assert job.status == "complete"


def test_the_first_is_the_outermost(scheduler):
    around("outer")
    around("inner")
    scheduler.enqueue("tests.test_around.note_app")
    scheduler.run_due()
    assert [*CALLS] == ["outer enters", "inner enters", ("handler", "inner"), "inner leaves", "outer leaves"]


def test_it_is_told_what_runs_and_no_arguments(scheduler):
    told = []
    events.around_job(lambda **facts: told.append((facts, current_job().id)) or nullcontext())
    job = scheduler.enqueue("tests.jobs.record", args=["secret"])
    scheduler.run_due()
    facts = {"job_id": job.id, "attempt": 1, "callable_name": "tests.jobs.record", "queue": "default"}
    assert told == [(facts, job.id)]


def test_it_is_told_the_arguments_if_it_asks(scheduler):
    told = []
    events.around_job(lambda args, kwargs, **more: told.append((args, kwargs)) or nullcontext(), arguments=True)
    scheduler.enqueue("tests.jobs.record", args=["a"], kwargs={"b": 1})
    scheduler.run_due()
    assert [tuple(map(json.loads, each)) for each in told] == [(["a"], {"b": 1})]


@BOTH
@pytest.mark.parametrize("when", ["enter", "leave"])
def test_what_it_raises_fails_the_attempt(engine, scheduler, session, run, when):
    around("outer")
    around("broken", **{when: LookupError("no application")})
    job = scheduler.enqueue("tests.jobs.write_letter", args=["gone"])
    run(engine, scheduler)
    assert (job.status, job.error.rstrip().splitlines()[-1]) == ("failed", "LookupError: no application")
    assert shop.letters(session) == []
    assert CALLS[-2:] == ["outer sees LookupError", "outer leaves"]


@pytest.mark.parametrize("where", ["handler", "wrapper"])
def test_it_cannot_make_a_failure_a_success(scheduler, where):
    events.around_job(lambda **facts: suppress(ValueError))
    if where == "wrapper":
        around("broken", enter=ValueError("fail"))
    job = scheduler.enqueue("tests.jobs.failjob")
    assert scheduler.run_due(ignore_errors=True).failed == 1
    assert job.error.rstrip().endswith("ValueError: fail")


def test_it_sees_how_a_job_ends(scheduler):
    around("app")
    scheduler.enqueue(stopjobs.spin, timeout="20ms")
    scheduler.enqueue("tests.test_around.snooze")
    report = scheduler.run_due(ignore_errors=True)
    assert (report.failed, report.snoozed) == (1, 1)
    assert [call for call in CALLS if "sees" in call] == [f"app sees {JobTimeout.__name__}", "app sees Snooze"]


def test_it_sees_the_session_of_the_job(engine):
    registry = scoped_session(sessionmaker(engine))
    seen = []
    events.around_job(lambda **facts: seen.append(registry() is current_job().session) or nullcontext())
    scheduler = Scheduler(registry)
    scheduler.enqueue("tests.jobs.record")
    scheduler.run_due()
    registry.remove()
    assert seen == [True]


def test_it_can_be_taken_away(scheduler):
    wrapper = around("app")
    events.not_around_job(wrapper)
    events.not_around_job(wrapper)
    scheduler.enqueue("tests.test_around.note_app")
    scheduler.run_due()
    assert [*CALLS] == [("handler", None)]


# --- events ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        ("tests.jobs.record", {}, "completed"),
        ("tests.jobs.write_letter", {"args": ["a"]}, "completed"),
        ("tests.jobs.failjob", {}, "failed"),
        ("tests.jobs.failjob", {"max_attempts": 2}, "retried"),
        ("tests.jobs.failjob", {"discard_on": ValueError}, "cancelled"),
        ("tests.test_around.snooze", {}, "snoozed"),
    ],
)
def test_each_thing_is_told_once_and_when_others_can_see_it(engine, scheduler, session, run, name, options, end):
    told = []
    after = {"completed": "complete", "snoozed": "scheduled", "retried": "scheduled"}

    def hear(event, **data):
        with Session(engine) as other:
            told.append((event, str(other.get(ScheduledJob, data["job_id"]).status)))

    for event in ("claimed", "completed", "failed", "retried", "snoozed", "cancelled", "lost", "released"):
        events.listen(event, lambda event=event, **data: hear(event, **data))
    scheduler.enqueue(name, **options)
    run(engine, scheduler)
    assert told == [("claimed", "running"), (end, after.get(end, end))]


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def everything_is_logged(caplog):
    caplog.set_level(logging.DEBUG, logger="future_jobs")
    return caplog


def run_with_secret(scheduler):
    for name in ("tests.jobs.record", "tests.test_around.fail_with"):
        scheduler.enqueue(name, args=["open sesame"], kwargs={"password": "xyzzy"}, max_attempts=2)
    scheduler.run_due(ignore_errors=True)


def fail_with(word, password):
    raise ValueError("fail")


def told_by(log):
    return "\n".join(f"{record.getMessage()} {vars(record)}" for record in log.records)


def test_arguments_are_not_logged(scheduler, everything_is_logged):
    events.log_every_job()
    run_with_secret(scheduler)
    told = told_by(everything_is_logged)
    assert "tests.jobs.record" in told
    assert "sesame" not in told
    assert "xyzzy" not in told


def test_arguments_are_logged_if_one_asks(scheduler, everything_is_logged):
    events.log_every_job(arguments=True)
    run_with_secret(scheduler)
    told = told_by(everything_is_logged)
    assert 'tests.jobs.record with args=["open sesame"], kwargs={"password":"xyzzy"}' in told
