"""What bad input gets: one error, before anything is written, that names the argument and says what would work."""

import functools
import sys
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import create_engine, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from future_jobs import FutureJobsError, ScheduledJob, Scheduler, create_tables, job
from future_jobs.errors import CallableRefused, SchemaError
from tests import jobs
from tests.jobs import record
from tests.shop import Base, Order


@pytest.fixture
def engine(tmp_path):
    engine = create_engine("sqlite://", poolclass=StaticPool)
    create_tables(engine)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def refused(scheduler, kind, words, *args, **kwargs):
    with pytest.raises(kind) as caught:
        scheduler.schedule(*args, **kwargs)
    assert isinstance(caught.value, FutureJobsError)
    message = str(caught.value)
    assert len(message) < 1000
    for word in words:
        assert word in message, message
    assert scheduler.session.scalar(select(func.count()).select_from(ScheduledJob)) == 0
    return caught.value


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("3", ["when", "'3'", "3d"]),
        ("sat", ["when", "'sat'"]),
        ("10/11/12", ["10/11/12"]),
        ("", ["when"]),
        ("9" * 400, ["when"]),
        ("٣d", ["when"]),
        ("5 parsecs", ["parsecs"]),
        ("2026-02-30", ["2026-02-30"]),
        ("2026-02-30T10:00", ["2026-02-30"]),
        ("24:00", ["24:00"]),
        ("3x", ["3x"]),
        ("d3", ["d3"]),
        ("3d3d", ["3d3d"]),
        ("1.5.2h", ["1.5.2h"]),
        ("-3d", ["pass a past datetime"]),
        (timedelta(days=-1), ["pass a past datetime"]),
        ("9000y", ["when"]),
        (datetime.max.replace(tzinfo=UTC) - timedelta(days=1), ["expires"]),
    ],
)
def test_a_when_that_means_nothing_is_a_value_error(scheduler, when, words):
    refused(scheduler, ValueError, words, when, record)


@pytest.mark.parametrize("when", [3, 3.5, True, None, date(2026, 1, 1), b"3d", ["3d"]])
def test_a_when_of_another_type_is_a_type_error(scheduler, when):
    words = ["when", "pass a datetime"] if isinstance(when, date) else ["when"]
    refused(scheduler, TypeError, words, when, record)


def test_expires_before_when_shows_both(scheduler):
    words = ["expires", "2030-01-01", "2029-12-31"]
    refused(
        scheduler,
        ValueError,
        words,
        datetime(2030, 1, 1, tzinfo=UTC),
        record,
        expires=datetime(2029, 12, 31, tzinfo=UTC),
    )


def test_a_job_that_is_scheduled_too_late_expires_and_never_runs(scheduler, calls, now):
    job = scheduler.schedule(now - timedelta(days=30), record)
    scheduler.run_due(now)
    assert (job.status, calls) == ("expired", [])


def test_an_unknown_zone_is_named(session):
    with pytest.raises(ValueError, match="Europe/Stokholm") as caught:
        Scheduler(session, timezone="Europe/Stokholm")
    assert "Europe/Stockholm" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (lambda: None, ValueError, ["lambda", "module-level function"]),
        (jobs.generator, ValueError, ["generator"]),
        (jobs.AN_INSTANCE, ValueError, ["callable instance", "Callable"]),
        (jobs.Callable, ValueError, ["class"]),
        (jobs.Plain().method, ValueError, ["Plain", "mapped"]),
        (functools.partial(lambda: None), ValueError, ["lambda"]),
        (7, TypeError, ["7"]),
        (None, TypeError, ["None"]),
        ("pkg", ValueError, ["'pkg'", "shop.mail.welcome"]),
        ("", ValueError, ["callable"]),
        (".a.b", ValueError, [".a.b"]),
        ("a..b", ValueError, ["a..b"]),
        ("a b.c", ValueError, ["a b.c"]),
        ("os.path", ValueError, ["module"]),
        ("tests.jobs.CALLS", ValueError, ["list"]),
        ("no_such_module.function", ImportError, ["no_such_module"]),
        ("tests.jobs.recrod", ImportError, ["tests.jobs", "'recrod'", "'record'"]),
        ("tests.jobs.Plain.methd", ImportError, ["Plain", "'method'"]),
        ("tests.no_such.function", ImportError, ["tests"]),
        ("x" * 300 + "." + "y" * 300, ValueError, ["callable"]),
    ],
)
def test_what_cannot_be_found_again_is_refused(scheduler, given, kind, words):
    refused(scheduler, kind, words, "1d", given)


def test_a_local_function_is_refused(scheduler):
    def local():
        pass

    refused(scheduler, ValueError, ["inside a function", "module-level"], "1d", local)


def test_a_missing_method_is_named(scheduler, session):
    session.add(order := Order(customer="Ada"))
    session.flush()
    refused(
        scheduler,
        ImportError,
        ["Order", "'send_invoyce'", "'send_invoice'"],
        "1d",
        "send_invoyce",
        content_object=order,
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ([1], {}, ["job_with_args(n, k)", "'k'"]),
        ([1, 2, 3], {}, ["too many"]),
        ([1], {"k": 1, "z": 2}, ["'z'"]),
        ([1], {"n": 2, "k": 1}, ["'n'"]),
    ],
)
def test_arguments_that_do_not_fit_are_a_type_error(scheduler, args, kwargs, words):
    refused(scheduler, TypeError, words, "1d", jobs.job_with_args, args=args, kwargs=kwargs)


def test_supplied_parameters_need_not_be_given(scheduler):
    assert scheduler.schedule("1d", jobs.annotated, args=[1]).id
    assert scheduler.schedule("1d", jobs.job_job).id


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "words"),
    [
        ("abc", None, TypeError, ["args"]),
        (5, None, TypeError, ["args"]),
        ([], [1], TypeError, ["kwargs"]),
        ([], {1: 2}, TypeError, ["kwargs", "1"]),
        ([0, 1, {"user": object()}], None, TypeError, ["args[2]", "user"]),
        ([(n for n in [1])], None, TypeError, ["args[0]", "generator"]),
        ([], {"file": open}, TypeError, ["kwargs"]),
        (["x" * 300_000], None, ValueError, ["args"]),
    ],
)
def test_arguments_that_cannot_be_stored_are_refused_with_their_path(scheduler, args, kwargs, kind, words):
    refused(scheduler, kind, words, "1d", record, args=args, kwargs=kwargs)


def test_a_session_as_an_argument_is_refused(scheduler, session):
    refused(scheduler, TypeError, ["args[0]", "Session"], "1d", record, args=[session])


def test_cycles_and_depth_are_value_errors(scheduler):
    cycle = []
    cycle.append(cycle)
    refused(scheduler, ValueError, ["args"], "1d", record, args=[cycle])
    deep = []
    for _ in range(5000):
        deep = [deep]
    refused(scheduler, ValueError, ["args"], "1d", record, args=[deep])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"max_attempts": -1}, ValueError, ["max_attempts", "-1", "1 to"]),
        ({"max_attempts": 0}, ValueError, ["max_attempts"]),
        ({"max_attempts": "3"}, TypeError, ["max_attempts", "'3'"]),
        ({"max_attempts": True}, TypeError, ["max_attempts"]),
        ({"priority": 10**9}, ValueError, ["priority", "-100 to 100"]),
        ({"priority": 1.5}, TypeError, ["priority"]),
        ({"queue": ""}, ValueError, ["queue", "1 to 100"]),
        ({"queue": "q" * 300}, ValueError, ["queue"]),
        ({"queue": "a\nb"}, ValueError, ["queue"]),
        ({"queue": "a\x00"}, ValueError, ["queue"]),
        ({"queue": None}, TypeError, ["queue"]),
        ({"tags": "abc"}, TypeError, ["tags"]),
        ({"tags": [1]}, TypeError, ["tags[0]"]),
        ({"expire": "5d"}, TypeError, ["'expire'", "'expires'"]),
        ({"retries": 5}, TypeError, ["'retries'"]),
        ({"backoff": "soon"}, ValueError, ["soon"]),
        ({"backoff": []}, TypeError, ["backoff"]),
        ({"backoff": "1mo"}, ValueError, ["backoff"]),
        ({"retry_on": 5}, TypeError, ["retry_on"]),
        ({"discard_on": [int]}, TypeError, ["discard_on"]),
        ({"transaction": "none"}, ValueError, ["transaction", "'job' or 'own'"]),
        ({"missing": "ignore"}, ValueError, ["missing"]),
    ],
)
def test_options_outside_their_range_are_refused(scheduler, options, kind, words):
    refused(scheduler, kind, words, "1d", record, **options)


def test_the_decorators_options_are_checked_where_they_are_written():
    with pytest.raises(TypeError, match="'queue'"):
        job(quue="x")
    with pytest.raises(ValueError, match="priority"):
        job(priority=1000)


def test_a_session_of_another_kind_is_refused(engine):
    for wrong, word in [
        (engine, "Session(engine)"),
        (sessionmaker(engine), "call it"),
        (AsyncSession(), "AsyncScheduler"),
        (None, "scoped_session"),
    ]:
        with pytest.raises(TypeError, match="session is") as caught:
            Scheduler(wrong)
        assert word in str(caught.value)


def test_an_autocommit_engine_is_refused(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", isolation_level="AUTOCOMMIT")
    with Session(engine) as session, pytest.raises(ValueError, match="AUTOCOMMIT"):
        Scheduler(session).schedule("1d", record)
    with Session(create_engine("sqlite://").execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(ValueError, match="AUTOCOMMIT"):
            Scheduler(session).schedule("1d", record)
    with engine.connect() as connection, Session(connection) as session, pytest.raises(ValueError, match="AUTOCOMMIT"):
        Scheduler(session).schedule("1d", record)
    engine.dispose()


@pytest.mark.parametrize("arguments", [{"isolation_level": None}, {"autocommit": True}])
def test_a_driver_that_commits_by_itself_is_refused(tmp_path, arguments):
    if "autocommit" in arguments and sys.version_info < (3, 12):
        pytest.skip("Python's SQLite driver has no such argument before 3.12")
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", connect_args=arguments)
    create_tables(engine)
    with Session(engine) as session:
        for call in (lambda: Scheduler(session).schedule("1d", record), Scheduler(session).run_due):
            with pytest.raises(ValueError, match="AUTOCOMMIT"):
                call()
    engine.dispose()


def test_a_session_bound_to_nothing_is_refused():
    with pytest.raises(ValueError, match="bound to no database"):
        Scheduler(Session()).schedule("1d", record)


def test_missing_tables_are_one_error_whatever_is_called(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/empty.db")
    with Session(engine) as session:
        scheduler = Scheduler(session)
        for call in (
            lambda: scheduler.schedule("1d", record),
            lambda: scheduler.schedule_many("1d", record, [{}]),
            lambda: scheduler.cancel(1),
            lambda: scheduler.retry(1),
            scheduler.prune,
            scheduler.run_due,
        ):
            with pytest.raises(SchemaError, match="future-jobs db upgrade"):
                call()
            session.rollback()
    engine.dispose()


def test_a_session_closed_for_good_is_refused(engine):
    session = Session(engine, close_resets_only=False)
    scheduler = Scheduler(session)
    session.close()
    with pytest.raises(ValueError, match="closed"):
        scheduler.schedule("1d", record)


def test_run_due_checks_its_arguments(scheduler):
    for arguments, kind in [
        ({"now": "3d"}, TypeError),
        ({"now": 5}, TypeError),
        ({"limit": -1}, ValueError),
        ({"queues": "mail"}, TypeError),
        ({"queues": 5}, TypeError),
        ({"queues": [5]}, TypeError),
    ]:
        with pytest.raises(kind) as caught:
            scheduler.run_due(**arguments)
        assert isinstance(caught.value, FutureJobsError)


def test_cancel_and_retry_check_what_they_get(scheduler):
    for call in (scheduler.cancel, scheduler.retry):
        with pytest.raises(TypeError, match="job is"):
            call("1")
        assert call(10**30) is False
        assert call(-1) is False


def test_prune_checks_its_arguments(scheduler):
    with pytest.raises(ValueError, match="running"):
        scheduler.prune("1d", statuses=["running"])
    for wrong in ("soon", "9999y", timedelta.max):
        with pytest.raises(ValueError, match="older_than") as caught:
            scheduler.prune(wrong)
        assert isinstance(caught.value, FutureJobsError)
    with pytest.raises(TypeError, match="older_than"):
        scheduler.prune(30)


# --- allow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["logging.os.system", "logging.sys.exit", "os.system", "loggingx.f"])
def test_the_allow_list_judges_where_a_function_is_defined(session, path):
    scheduler = Scheduler(session, allow=["logging."])
    with pytest.raises(FutureJobsError):
        scheduler.schedule("1d", path)


def test_the_allow_list_is_asked_before_anything_is_imported(session, tmp_path, monkeypatch):
    (tmp_path / "has_effects.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CallableRefused, match="has_effects"):
        Scheduler(session, allow=["tests."]).schedule("1d", "has_effects.f")


def test_the_allow_list_is_asked_again_when_a_job_runs(session, calls, now):
    job = Scheduler(session).schedule(now, record)
    Scheduler(session, allow=["shop"]).run_due(now, ignore_errors=True)
    assert (job.status, calls) == ("failed", [])
    assert "not allowed" in job.error


def test_allowed_functions_and_objects_run(session, calls, now):
    scheduler = Scheduler(session, allow=["tests"])
    session.add(order := Order(customer="Ada"))
    scheduler.schedule(now, record, args=[order])
    scheduler.schedule(now, order.send_invoice)
    scheduler.schedule(now, "tests.jobs.about", content_object=order)
    assert scheduler.run_due(now).complete == 3


def test_registered_allows_only_what_is_decorated(session, calls, now):
    scheduler = Scheduler(session, allow="registered")
    scheduler.schedule(now, jobs.decorated)
    scheduler.schedule(now, "its.former.name")
    with pytest.raises(CallableRefused, match="@job"):
        scheduler.schedule(now, record)
    assert scheduler.run_due(now).complete == 2


def test_registered_allows_classes_that_are_imported_and_imports_none(session, calls, now, tmp_path, monkeypatch):
    scheduler = Scheduler(session, allow="registered")
    session.add(order := Order(customer="Ada"))
    scheduler.schedule(now, jobs.decorated, args=[order, timedelta(1)])
    bad = scheduler.schedule(now, jobs.decorated, max_attempts=1)
    (tmp_path / "has_side_effects.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    damage = {"args": text("""'[{"!enum": ["has_side_effects:E", "A"]}]'""")}
    session.execute(update(ScheduledJob.__table__).where(ScheduledJob.id == bad.id).values(**damage))
    report = scheduler.run_due(now, ignore_errors=True)
    assert (report.complete, report.failed) == (1, 1)
    assert "has_side_effects" in bad.error
    assert "import its module first" in bad.error
    assert calls == [(order, timedelta(1))] or calls[0][1] == timedelta(1)


# --- rows edited by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"args": text("'[1'")}, ["JSON"]),
        ({"args": text("'{}'")}, ["list"]),
        ({"kwargs": text("'[]'")}, ["dict"]),
        ({"args": text("""'[{"!from-the-future": 1}]'""")}, ["later version"]),
        ({"options": text("'nonsense'")}, ["options"]),
        ({"tags": text("'nonsense'")}, None),
        ({"callable_name": "gone.away"}, ["gone"]),
        ({"callable_name": ""}, ["callable"]),
        ({"content_type": "tests.shop:Order", "content_key": "["}, ["JSON"]),
        ({"content_type": "nonsense", "content_key": "[1]"}, ["nonsense"]),
        ({"content_type": "os:system", "content_key": "[1]"}, ["os"]),
    ],
)
def test_a_damaged_row_fails_with_the_reason_and_stops_nobody(scheduler, session, now, calls, damage, words):
    bad = scheduler.schedule(now, record, priority=5)
    good = scheduler.schedule(now, record, args=["good"])
    session.execute(update(ScheduledJob.__table__).where(ScheduledJob.id == bad.id).values(**damage))
    session.commit()
    report = scheduler.run_due(now, ignore_errors=True)
    assert good.status == "complete"
    if words is None:
        assert report.complete == 2
        return
    assert (report.failed, bad.status) == (1, "failed")
    for word in words:
        assert word in bad.error
    assert scheduler.retry(bad)


@pytest.mark.parametrize(
    "damage",
    [
        {"created_at": "zz"},
        {"nominal_at": ""},
        {"expires_at": "garbage"},
        {"expires_at": ""},
        {"priority": "abc"},
        {"run_at": 5},
        {"run_at": ""},
        {"run_at": "2020-99-99 00:00:00"},
        {"run_at": "garbage"},
        {"attempt": "x"},
    ],
)
def test_a_value_of_no_type_in_a_row_stops_nobody(scheduler, session, now, calls, damage):
    [(name, value)] = damage.items()
    bad = scheduler.schedule(now, record, args=["bad"]).id
    good = [scheduler.schedule(now + n * timedelta(seconds=1), record, args=["good"]).id for n in range(3)]
    edit = text(f"UPDATE future_jobs_scheduled_job SET {name} = :value WHERE id = :id")
    session.execute(edit, {"value": value, "id": bad})
    session.commit()
    scheduler.run_due(now + timedelta(minutes=1), ignore_errors=True)
    statuses = dict(session.execute(select(ScheduledJob.id, ScheduledJob.status)).all())
    assert [statuses[each] for each in good] == ["complete"] * 3
    # What was run was readable enough; what was not says why; what can never be due waits and can be seen.
    expected = {
        "priority": "complete",
        "attempt": statuses[bad],
        "run_at": "scheduled" if value == "garbage" else "failed",
    }
    assert statuses[bad] == expected.get(name, "expired" if damage == {"expires_at": ""} else "failed")
    if statuses[bad] == "failed":
        assert "no time" in session.scalar(select(ScheduledJob.error).where(ScheduledJob.id == bad))
        assert scheduler.retry(bad, when="1d")


def test_a_row_with_an_unknown_status_is_left_alone(scheduler, session, now, calls):
    odd = scheduler.schedule(now, record)
    session.execute(text("UPDATE future_jobs_scheduled_job SET status = 'odd'"))
    scheduler.schedule(now, record, args=["good"])
    assert scheduler.run_due(now).complete == 1
    assert odd.status == "odd"
    assert repr(odd) == "<ScheduledJob (odd) callable='tests.jobs.record'>"
    assert scheduler.cancel(odd) is False
    assert scheduler.retry(odd) is True
    assert scheduler.run_due().complete == 1


# --- what handlers raise ------------------------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


def raise_unspeakable():
    raise Unspeakable


def raise_megabytes():
    raise ValueError("x" * 1_000_000)


def raise_nul():
    raise ValueError("a\x00b \ud800 \U0001f600")


def raise_group():
    raise ExceptionGroup("several", [ValueError("one"), ExceptionGroup("more", [TypeError("two")])])


def raise_chain():
    error = None
    for number in range(500):
        try:
            raise ValueError(number) from error
        except ValueError as caught:
            error = caught
    raise error


def recurse():
    recurse()


HARD = ["raise_unspeakable", "raise_megabytes", "raise_nul", "raise_group", "raise_chain", "recurse"]
