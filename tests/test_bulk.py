"""Many jobs in one statement hold what the same jobs hold one by one, whichever way the statement goes."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, func, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, bulk
from future_jobs.errors import UsageError
from future_jobs.statements import JOBS, Token
from future_jobs.status import Status
from tests.jobs import record
from tests.processes import start, together
from tests.shop import Order

ODD = ["", "%s %(x)s :x ?", "'\"\\", "],\n[", "},\n{", "é 😀", "\x00", "[1]", "null", "x" * 1000]
OPTIONS = [
    {},
    {"queue": "köö", "priority": -7, "max_attempts": 3, "tags": ["a", "ö"]},
    {"expires": None, "transaction": "own", "backoff": "5s"},
    {"expires": "1d", "queue": "null"},
]


@pytest.fixture
def by_sevens(monkeypatch):
    """Few rows in a statement, so that a few jobs take several."""
    monkeypatch.setattr(bulk, "MOST_ROWS", 7)


@pytest.fixture(params=["told", "asked for"])
def ids_are(request, engine, monkeypatch):
    """Whether a database tells which ids it gave, or they are asked for one by one."""
    if request.param == "asked for":
        monkeypatch.setattr(engine.dialect, "insert_returning", False)


def stored(session, ids):
    """Return what the database holds of each job, but for its id and when it was made."""
    columns = [column for column in JOBS.c if column.name not in {"id", "created_at"}]
    found = {row.id: tuple(row)[1:] for row in session.execute(select(JOBS.c.id, *columns))}
    return [found[job_id] for job_id in ids]


@pytest.mark.usefixtures("ids_are")
def test_they_hold_what_the_same_jobs_hold_one_by_one(session, now, by_sevens):
    session.add(order := Order(customer="Ada"))
    scheduler = Scheduler(session, clock=lambda: now)
    calls = [
        {"args": [n, ODD[n % len(ODD)]], "kwargs": {ODD[(n + 1) % 7] or "k": n} if n % 3 else {}, **OPTIONS[n % 4]}
        for n in range(40)
    ]
    calls[11]["content_object"] = order
    one_by_one = [scheduler.schedule("3d", record, **call).id for call in calls]
    assert stored(session, scheduler.schedule_many("3d", record, calls)) == stored(session, one_by_one)


@pytest.mark.parametrize("count", [1, 7, 8, 30])
@pytest.mark.parametrize("call", [{}, {"args": [1]}, {"kwargs": {"k": 1}}])
def test_jobs_that_are_all_the_same_are_as_many(session, now, by_sevens, count, call):
    scheduler = Scheduler(session, clock=lambda: now)
    ids = scheduler.schedule_many("3d", record, [call] * count)
    assert len(set(ids)) == count
    one = scheduler.schedule("3d", record, **call).id
    assert stored(session, ids) == stored(session, [one] * count)


@pytest.mark.parametrize(
    "wrong", [{"args": [object()]}, {"kwargs": {"k": object()}}, {"args": "a"}, {"kwargs": {1: 2}}, {"priority": 0.5}]
)
def test_the_one_call_that_cannot_be_is_named(scheduler, session, wrong):
    calls = [{"args": [n], "kwargs": {"k": n}} for n in range(450)]
    calls[431] = wrong
    with pytest.raises(UsageError) as caught:
        scheduler.schedule_many("3d", record, calls)
    assert caught.value.__notes__ == ["in calls[431]"]
    assert session.scalar(select(func.count()).select_from(ScheduledJob)) == 0


def test_large_arguments_are_spread_over_statements(session, scheduler, monkeypatch):
    monkeypatch.setattr(bulk, "MOST_TEXT", 300_000)
    calls = [{"args": [n, '"' * (100_000 if n % 3 else 1)]} for n in range(20)]
    ids = scheduler.schedule_many("3d", record, calls)
    assert [session.get(ScheduledJob, job_id).args for job_id in ids] == [call["args"] for call in calls]


def test_what_a_column_cannot_hold_is_refused_and_not_cut(session, scheduler, kind):
    row = {"callable_name": "tests.jobs.record", "args": [], "kwargs": {}, "priority": 0, "max_attempts": 1}
    row |= dict.fromkeys(("run_at", "nominal_at", "created_at"), datetime.now(UTC))
    rows = [{**row, "queue": queue} for queue in ("short", "x" * 101)]
    if kind in {"memory", "file"}:  # whose columns hold anything
        ids = bulk.add_many(session.connection(), rows)
        assert [session.get(ScheduledJob, job_id).queue for job_id in ids] == [each["queue"] for each in rows]
        return
    with pytest.raises(DBAPIError):
        bulk.add_many(session.connection(), rows)


def test_a_savepoint_takes_all_of_them_back(session, scheduler, by_sevens):
    kept = scheduler.schedule_many("3d", record, [{"args": [n]} for n in range(9)])
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        scheduler.schedule_many("3d", record, [{"args": [n]} for n in range(9)])
        raise ZeroDivisionError
    session.commit()
    assert list(session.scalars(select(ScheduledJob.id).order_by(ScheduledJob.id))) == kept


def test_a_row_that_breaks_a_unique_index_leaves_none(session, scheduler, now, by_sevens):
    row = {"callable_name": "tests.jobs.record", "args": [], "kwargs": {}, "queue": "default", "priority": 0}
    row |= {"max_attempts": 1, "run_at": now, "created_at": now, "recurring_id": 1}
    rows = [{**row, "nominal_at": now + timedelta(seconds=n % 10)} for n in range(11)]
    with pytest.raises(IntegrityError), session.begin_nested():
        bulk.add_many(session.connection(), rows)
    assert session.scalar(select(func.count()).select_from(ScheduledJob)) == 0
    assert len(bulk.add_many(session.connection(), rows[:10])) == 10


def test_two_processes_at_once_get_their_own_ids(shared_url):
    results = together([start(shared_url, "schedule_many", name, "6000") for name in ("a", "b")])
    engine = create_engine(shared_url)
    with Session(engine) as session:
        args = dict(session.execute(select(ScheduledJob.id, ScheduledJob.args)).all())
    engine.dispose()
    for name, ids in zip("ab", results, strict=True):
        assert [args[job_id] for job_id in ids] == [[name, n] for n in range(6000)]


@pytest.mark.parametrize("finish", ["complete", "hand back"])
def test_a_batch_writes_only_what_its_tokens_hold(session, scheduler, now, by_sevens, finish):
    ids = scheduler.schedule_many(now, record, [{} for _ in range(20)])
    session.execute(update(ScheduledJob).values(status="running", attempt=1 + ScheduledJob.id % 2, leased_by="me"))
    session.execute(update(ScheduledJob).where(ScheduledJob.id == ids[3]).values(attempt=9))
    session.execute(update(ScheduledJob).where(ScheduledJob.id == ids[9]).values(status="scheduled"))
    tokens = [Token(job_id, 1 + job_id % 2) for job_id in ids[:15]]
    results = [None if n % 4 == 0 else f'["é", {n}, null]' for n in range(15)]
    connection = session.connection()
    if finish == "complete":
        values = {"status": Status.COMPLETE, "finished_at": now, "leased_by": None}
        assert bulk.complete_all(connection, dict(zip(tokens, results, strict=True)), values) == 13
        assert bulk.complete_all(connection, {}, values) == 0
    else:
        values = {"status": Status.SCHEDULED, "leased_by": None}
        assert bulk.move_all(connection, tokens, values) == 13
        assert bulk.move_all(connection, [], values) == 0
    jobs = [session.get(ScheduledJob, job_id, populate_existing=True) for job_id in ids]
    changed = [n for n, job in enumerate(jobs) if job.leased_by is None]
    assert changed == [n for n in range(15) if n not in {3, 9}]
    kept = {n: job.return_value for n, job in enumerate(jobs) if job.return_value is not None}
    assert kept == ({n: ["é", n, None] for n in changed if n % 4} if finish == "complete" else {})
