"""Several processes that want the same key at the same time: the database gives it to one of them."""

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler
from tests.processes import start, together
from tests.shop import Letter, letters

KEYS = [f"key {n}" for n in range(25)]
WAITING = select(ScheduledJob).where(ScheduledJob.status == "scheduled").order_by(ScheduledJob.id)


@pytest.fixture
def session(shared_url):
    engine = create_engine(shared_url)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.mark.parametrize("on_conflict", ["raise", "return_existing", "replace"])
def test_one_of_many_processes_schedules_a_key_and_all_know_which(shared_url, session, on_conflict):
    results = together([start(shared_url, "put", on_conflict, *KEYS) for _ in range(3)])
    jobs = {job.unique_key: job.id for job in session.scalars(WAITING)}
    assert results == [jobs] * 3
    assert len(letters(session)) == 2 * 3 * len(KEYS)  # every transaction was committed whole


def test_processes_that_schedule_many_keys_in_other_orders_do_not_deadlock(shared_url, session):
    shuffled = [KEYS, KEYS[::-1], KEYS[1::2] + KEYS[::2]]
    results = together([start(shared_url, "put_all", "replace", *keys) for keys in shuffled])
    jobs = {job.unique_key: job.id for job in session.scalars(WAITING)}
    assert len(jobs) == len(KEYS)
    assert results == [[jobs[key] for key in keys] for keys in shuffled]
    assert len({job.args[0] for job in session.scalars(WAITING)}) == 1  # all of one process, the last


@pytest.mark.parametrize("on_conflict", ["raise", "replace"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_those_who_wait_for_an_open_transaction_go_by_how_it_ends(shared_url, session, end, on_conflict):
    session.connection()
    Scheduler(session).schedule("1d", "tests.jobs.record", args=["first"], unique_key="key")
    processes = [start(shared_url, "put", on_conflict, "key") for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stderr.readline() == "asks\n"
    getattr(session, end)()
    results = together(processes)
    [job] = session.scalars(WAITING)
    assert results == [{"key": job.id}] * 3
    is_first = end == "commit" and on_conflict != "replace"
    assert (job.args == ["first"]) == is_first
    assert session.scalar(select(func.count()).select_from(Letter)) == 6


@pytest.mark.parametrize("until", ["started", "finished"])
def test_a_job_is_claimed_as_it_was_or_as_it_was_replaced(shared_url, session, until):
    replacer = start(shared_url, "replace_until", "100", until)
    runners = [start(shared_url, "run_for_a_while", "40") for _ in range(2)]
    put, *_ = together([replacer, *runners])
    Scheduler(session).run_due()
    ran = [int(number) for number in letters(session)]
    assert len(set(ran)) == len(ran) == session.scalar(select(func.count()).select_from(ScheduledJob))
    assert set(ran) <= set(put)
    assert max(ran) == max(put)  # what was put last is never lost
    assert not session.scalars(WAITING).all()


def test_a_retry_and_a_new_job_are_never_both_waiting(shared_url, session):
    scheduling = [start(shared_url, "schedule_for_a_while", "40") for _ in range(2)]
    failing = [start(shared_url, "fail_for_a_while", "30") for _ in range(2)]
    *scheduled, first, second = together([*scheduling, *failing])
    statuses = session.scalars(select(ScheduledJob.status)).all()
    assert len(statuses) == sum(scheduled)
    assert statuses.count("scheduled") == 1  # each had attempts left, and gave way or waits
    assert statuses.count("cancelled") == len(statuses) - 1 == first["cancelled"] + second["cancelled"]
    assert first["lost"] == second["lost"] == first["failed"] == second["failed"] == 0
