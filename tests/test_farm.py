"""Jobs that run in other processes, by whatever executor: the promises are those of any worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from future_jobs import (
    InvalidArgument,
    InvalidOption,
    JobFailure,
    NotSupported,
    ScheduledJob,
    Worker,
    configure_sqlite,
    events,
    lifecycle,
)
from future_jobs.lifecycle import Completed
from future_jobs.statements import Token
from future_jobs.units import Units
from tests import farmjobs
from tests.shop import letters

ROOT = Path(__file__).parent.parent

pytestmark = [
    # A pool that forks is what Python 3.12 and newer warn of; it is what some people have, and so is tested.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


# --- executors ----------------------------------------------------------------------------------------------------


def pool(method, processes=2, **settings):
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context(method), **settings)


def loky_pool():
    loky = pytest.importorskip("loky", reason="loky is not installed")
    return loky.ProcessPoolExecutor(2, timeout=600)  # one that has long had nothing to do ends, and warns of it


@contextmanager
def dask_executor(folder):
    """The executor of a client of a scheduler and two workers, each a process of its own."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed (the extra dask)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    contact = folder / "scheduler.json"

    def start(role, *options):
        command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(contact), "--no-dashboard", *options]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(process.wait, timeout=30)
        stack.callback(process.terminate)

    with ExitStack() as stack:
        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        for _ in range(2):
            start("worker", "--host", "127.0.0.1", "--nthreads", "1")
        client = stack.enter_context(distributed.Client(scheduler_file=str(contact), timeout=60, set_as_default=False))
        client.wait_for_workers(2, timeout=60)
        yield client.get_executor()


KINDS = ("fork", "spawn", "loky", "dask")


@pytest.fixture(scope="module")
def executors(tmp_path_factory):
    """Each executor, made when it is first asked for, and used by all tests that break nothing."""
    made: dict[str, Executor] = {}
    with ExitStack() as stack:

        def executor(kind):
            if kind not in made:
                if kind == "dask":
                    made[kind] = stack.enter_context(dask_executor(tmp_path_factory.mktemp("dask")))
                else:
                    made[kind] = stack.enter_context(loky_pool() if kind == "loky" else pool(kind))
            return made[kind]

        yield executor


@pytest.fixture(params=KINDS)
def executor(request, executors):
    return executors(request.param)


@pytest.fixture
def spawned(executors):
    """One of them, where it makes no difference."""
    return executors("spawn")


# --- the database, and what happens -------------------------------------------------------------------------------


@pytest.fixture
def engine(shared_url):
    engine = configure_sqlite(create_engine(shared_url))
    yield engine
    engine.dispose()


class Witness:
    """The events, in order, and whoever waits for some."""

    def __init__(self) -> None:
        self.told: list = []
        self._changed = threading.Condition()

    def note(self, name, data):
        with self._changed:
            self.told.append((name, data))
            self._changed.notify_all()

    def count(self, name):
        return sum(1 for told, _ in self.told if told == name)

    def wait_for(self, **counts):
        self.wait_until(lambda: all(self.count(name) >= number for name, number in counts.items()))

    def wait_until(self, true):
        with self._changed:
            assert self._changed.wait_for(true, 90), self.told


@pytest.fixture
def witness():
    witness = Witness()
    heard = [(name, events.listen(name, lambda name=name, **data: witness.note(name, data))) for name in events.EVENTS]
    yield witness
    for name, listener in heard:
        events.unlisten(name, listener)


def statuses(session):
    session.rollback()
    return dict(Counter(str(status) for status in session.scalars(select(ScheduledJob.status))))


def many(scheduler, name, count, **options):
    ids = scheduler.schedule_many("0s", f"tests.farmjobs.{name}", [{} for _ in range(count)], **options)
    scheduler.session.commit()
    return ids


def drained(source, executor, jobs, **settings):
    """Run a worker until it has run so many jobs."""
    worker = Worker(source, executor=executor, max_jobs=jobs, **{"queues": {"default": 4}, **settings})
    worker.run()
    return worker


def began(folder, count):
    """Wait until so many jobs say that they run; return what they say: a name, a process, an attempt."""
    deadline, pause = monotonic() + 60, threading.Event()
    while len(found := [each.name for each in folder.iterdir() if each.name.count(".") == 2]) < count:
        assert monotonic() < deadline, found
        pause.wait(0.01)
    return sorted(found)


# --- the promises -------------------------------------------------------------------------------------------------


def test_jobs_run_in_other_processes_and_their_results_are_kept(executor, engine, scheduler, session):
    many(scheduler, "whereabouts", 60)
    worker = drained(engine, executor, 60)
    session.rollback()
    pids = {job.result for job in session.scalars(select(ScheduledJob))}
    assert worker.ran == 60
    assert statuses(session) == {"complete": 60}
    assert pids
    assert os.getpid() not in pids


def test_what_they_write_commits_with_them_and_once(executor, engine, scheduler, session):
    ids = many(scheduler, "write", 30)
    drained(engine, executor, 30)
    assert statuses(session) == {"complete": 30}
    assert sorted(map(int, letters(session))) == ids


def test_what_fails_is_recorded_with_its_traceback(executor, engine, scheduler, session, witness):
    job = scheduler.enqueue("tests.farmjobs.write_then_fail")
    session.commit()
    drained(engine, executor, 1)
    assert (job.status, letters(session)) == ("failed", [])
    assert "session.flush()\n    raise Stubborn" in job.error or 'raise Stubborn(needed="what went wrong")' in job.error
    [failure] = session.scalars(select(JobFailure))
    assert (failure.error_type, failure.job_id) == ("tests.farmjobs.Stubborn", job.id)
    [data] = [data for name, data in witness.told if name == "failed"]
    assert data["error"] == "what went wrong"


def test_retries_snoozes_and_what_they_schedule_come_back(executor, engine, scheduler, session):
    retried = scheduler.enqueue("tests.farmjobs.fail_once", max_attempts=2, backoff="0s")
    snoozed = scheduler.enqueue("tests.farmjobs.snooze_once")
    scheduler.enqueue("tests.farmjobs.schedule_another")
    session.commit()
    drained(engine, executor, 6, poll="20s")
    assert statuses(session) == {"complete": 4}
    assert (retried.failures, snoozed.snoozes, len(letters(session))) == (1, 1, 1)


def test_they_find_the_settings_of_the_worker_and_names_that_are_registered(executor, engine, scheduler, session):
    settings = scheduler.enqueue("tests.farmjobs.zone")
    named = scheduler.enqueue("a.name.of.its.own")
    refused = scheduler.enqueue("os.getcwd")
    session.commit()
    drained(engine, executor, 3, timezone="Europe/Stockholm", allow=["tests.", "a.name"])
    assert settings.result == ["Europe/Stockholm", ["tests.", "a.name"]]
    assert named.result == "found"
    assert "CallableRefused" in refused.error


def test_a_timeout_ends_them_there(spawned, engine, scheduler, session, tmp_path):
    job = scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), "slow"], timeout="1s")
    session.commit()
    drained(engine, spawned, 1)
    assert (job.status, letters(session)) == ("failed", [])


@pytest.mark.parametrize("kind_of_pool", ["spawn", "loky"])
def test_a_job_that_outlives_its_timeout_in_c_ends_with_its_process(kind_of_pool, engine, scheduler, session, witness):
    stuck = scheduler.enqueue("tests.farmjobs.wait_in_c", timeout="100ms", max_attempts=2, backoff="0s")
    session.commit()
    with loky_pool() if kind_of_pool == "loky" else pool("spawn") as executor:
        drained(engine, executor, 2)
    session.refresh(stuck)
    assert (stuck.status, stuck.failures, stuck.losses) == ("failed", 2, 0)
    assert "JobTimeout" in stuck.error
    assert letters(session) == []


def test_a_better_priority_runs_first_and_other_queues_do_not_run(executor, engine, scheduler, session):
    past = datetime.now(UTC) - timedelta(hours=1)
    for name, priority in (("b", 0), ("a", 5), ("c", -5)):
        scheduler.schedule(past, "tests.jobs.write_letter", args=[name], priority=priority)
    scheduler.enqueue("tests.jobs.write_letter", args=["other"], queue="other")
    session.commit()
    drained(engine, executor, 3, queues={"default": 1})
    assert letters(session) == ["a", "b", "c"]


def test_no_more_run_at_once_than_there_are_slots(spawned, engine, scheduler, session, tmp_path):
    for name in "abc":
        scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), name])
    session.commit()
    with Worker(engine, executor=spawned, queues={"default": 1}).background():
        assert [each[0] for each in began(tmp_path, 1)] == ["a"]
        (tmp_path / "go").touch()
        began(tmp_path, 3)
    assert statuses(session) == {"complete": 3}


def test_tiny_jobs_travel_together(spawned, engine, scheduler, session):
    sent = []

    class Counting(Executor):
        def submit(self, fn, /, *args, **kwargs):
            sent.append(len(args[0]))
            return spawned.submit(fn, *args, **kwargs)

    many(scheduler, "nothing", 500)
    drained(engine, Counting(), 500)
    assert statuses(session) == {"complete": 500}
    assert len(sent) < 250


# --- those that die -----------------------------------------------------------------------------------------------


# Each takes new processes, and those take seconds.
DEATHS = {
    "fork": ("leave", "shoot_itself", "fault", "write_and_die"),
    "spawn": ("fault",),
    "loky": ("shoot_itself",),
    "dask": ("write_and_die",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_dies_is_blamed_on_the_job_that_kills_one_alone(
    kind, executors, engine, scheduler, session, witness
):
    killers = [many(scheduler, name, 1)[0] for name in DEATHS[kind]]
    innocent = many(scheduler, "write", 20)
    with ExitStack() as stack:
        if kind == "dask":
            executor = executors("dask")
        else:
            executor = stack.enter_context(loky_pool() if kind == "loky" else pool(kind))
        with Worker(engine, executor=executor, queues={"default": 2}).background():
            witness.wait_until(
                lambda: (
                    witness.count("completed") == 20
                    and {data["job_id"] for name, data in witness.told if name == "rescued"} == {*killers}
                )
            )
    session.rollback()
    jobs = {job.id: job for job in session.scalars(select(ScheduledJob))}
    assert {job_id: jobs[job_id].losses > 0 for job_id in killers} == dict.fromkeys(killers, True)
    assert {jobs[job_id].losses for job_id in innocent} == {0}
    assert sorted(map(int, letters(session))) == innocent
    failures = session.execute(select(JobFailure.job_id, JobFailure.error_type)).all()
    assert {tuple(failure) for failure in failures} == {(job_id, "WorkerLost") for job_id in killers}


def test_after_too_many_losses_a_killer_has_failed(engine, scheduler, session, witness):
    job = scheduler.enqueue("tests.farmjobs.leave")
    session.commit()
    with pool("fork", 1) as executor, Worker(engine, executor=executor, lease="1s").background():
        witness.wait_for(failed=1)
    assert (job.status, job.losses) == ("failed", lifecycle.MAX_LOSSES)


def test_another_attempt_leaves_the_one_before_nothing_to_write(engine, scheduler, session, now):
    job = scheduler.enqueue("tests.farmjobs.nothing")
    session.commit()
    job.status, job.attempt = "running", 1
    session.commit()
    units, first = Units(engine), Token(job.id, 1)

    def settle(token):
        return units.write(lambda each: lifecycle.settle(each, token, Completed(), now=now, worker="a"))

    second = units.write(lambda each: lifecycle.restart(each, first, now=now))
    assert second == Token(job.id, 2)
    assert settle(first) is None
    assert units.write(lambda each: lifecycle.restart(each, first, now=now)) is None
    assert settle(second) == "complete"
    assert units.write(lambda each: lifecycle.restart(each, second, now=now)) is None


def test_what_ended_before_its_process_died_is_told_as_it_ended(engine, scheduler, session, witness):
    """All in one chunk, before the one that kills: what they wrote is written, and is not done again."""
    ids = many(scheduler, "write", 3, priority=9)
    failing = many(scheduler, "write_then_fail", 1, priority=8)
    [killer] = many(scheduler, "leave", 1)

    with pool("fork", 1) as executor:
        worker = Worker(engine, executor=executor, queues={"default": 1}, prefetch=10)
        worker._opened().lanes["default"].learn(0.0001, 100)  # so that they travel together
        with worker.background():
            witness.wait_for(rescued=1, completed=3, failed=1)
    assert sorted(map(int, letters(session))) == ids
    attempts = {job.id: job.attempt for job in session.scalars(select(ScheduledJob))}
    assert attempts == {**dict.fromkeys([*ids, *failing], 1), killer: 2}
    [data] = [data for name, data in witness.told if name == "failed"]
    assert (data["error_type"], data["error"]) == ("tests.farmjobs.Stubborn", "what went wrong")


def test_a_pool_that_is_broken_already_is_replaced(engine, scheduler, session):
    many(scheduler, "write", 3)
    with pool("fork") as executor:
        broken = executor.submit(os._exit, 1)
        assert broken.exception() is not None
        drained(engine, executor, 3)
    assert statuses(session) == {"complete": 3}
    assert set(session.scalars(select(ScheduledJob.losses))) == {0}


class OfAnotherKind(ProcessPoolExecutor):
    """Its settings are not known to us."""


def test_a_pool_that_cannot_be_made_anew_ends_the_worker_and_charges_nobody(engine, scheduler, session):
    [killer] = many(scheduler, "leave", 1)
    with OfAnotherKind(2) as executor, pytest.raises(NotSupported, match="pass a callable"):
        Worker(engine, executor=executor).run()
    job = session.get(ScheduledJob, killer)
    assert (job.status, job.losses) == ("scheduled", 0)


def test_a_callable_makes_as_many_pools_as_it_takes(engine, scheduler, session, witness):
    made = []

    def make():
        made.append(OfAnotherKind(2, mp_context=multiprocessing.get_context("spawn")))
        return made[-1]

    many(scheduler, "leave", 1)
    many(scheduler, "write", 5)
    with Worker(engine, executor=make).background():
        witness.wait_for(rescued=1, completed=5)
    assert len(made) >= 3
    for each in made:  # and ends them
        with pytest.raises(RuntimeError):
            each.submit(os.getpid)


def test_a_pool_that_does_not_start_is_blamed_on_no_job(engine, scheduler, session):
    many(scheduler, "write", 5)
    with pool("fork", initializer=farmjobs.refuse_to_start) as executor, pytest.raises(RuntimeError):
        Worker(engine, executor=executor).run()
    assert statuses(session) == {"scheduled": 5}
    assert set(session.scalars(select(ScheduledJob.losses))) == {0}


def test_a_job_can_be_killed_and_its_neighbour_runs_again_uncharged(engine, scheduler, session, tmp_path, witness):
    first, second = (scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), name]) for name in "ab")
    session.commit()
    with pool("fork") as executor:
        worker = Worker(engine, executor=executor, queues={"default": 2})
        with worker.background():
            began(tmp_path, 2)
            assert not worker._loop.runner.kill(Token(first.id, 7))
            assert worker._loop.runner.kill(Token(first.id, 1))
            assert [each[0] for each in began(tmp_path, 3)] == ["a", "b", "b"]
            (tmp_path / "go").touch()
            witness.wait_for(completed=1)
    session.rollback()
    assert (second.status, second.losses, letters(session)) == ("complete", 0, [f"{second.id}"])
    assert (first.status, first.attempt, first.losses) == ("scheduled", 1, 0)  # handed back when the worker stopped


# --- stopping -----------------------------------------------------------------------------------------------------


def test_what_runs_may_finish_and_the_rest_is_handed_back(executor, engine, scheduler, session, tmp_path):
    for name in "abcdefgh":
        scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), name])
    session.commit()
    worker = Worker(engine, executor=executor, queues={"default": 2})
    with worker.background(timeout="60s"):
        began(tmp_path, 2)
        stopping = threading.Thread(target=worker.stop, args=("60s",))
        stopping.start()
        (tmp_path / "go").touch()
        stopping.join()
    assert statuses(session) == {"complete": 2, "scheduled": 6}
    assert set(session.scalars(select(ScheduledJob.losses))) == {0}
    assert executor.submit(os.getpid).result(timeout=60) != os.getpid()  # it belongs to the user


def test_ctrl_c_is_for_the_worker_and_not_for_its_children(engine, scheduler, session, tmp_path):
    job = scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), "a"])
    session.commit()
    with pool("spawn", 1) as executor, Worker(engine, executor=executor).background():
        [said] = began(tmp_path, 1)
        os.kill(int(said.split(".")[1]), signal.SIGINT)
        (tmp_path / "go").touch()
    assert (job.status, letters(session)) == ("complete", [f"{job.id}"])


def test_what_has_not_begun_in_the_executor_is_handed_back_at_once(engine, scheduler, session, tmp_path, witness):
    for name in "abcdefgh":
        scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), name])
    session.commit()
    with pool("fork", 1) as executor:
        worker = Worker(engine, executor=executor, queues={"default": 8})
        with worker.background(timeout="60s"):
            began(tmp_path, 1)
            stopping = threading.Thread(target=worker.stop, args=("60s",))
            stopping.start()
            witness.wait_for(released=5)  # the pool may hold two more where it lets go of nothing
            (tmp_path / "go").touch()
            stopping.join()
    assert statuses(session)["scheduled"] >= 5
    assert "running" not in statuses(session)


def test_what_does_not_finish_in_time_commits_nothing(spawned, engine, scheduler, session, tmp_path):
    job = scheduler.enqueue("tests.farmjobs.meet", args=[str(tmp_path), "slow"])
    session.commit()
    worker = Worker(engine, executor=spawned, queues={"default": 1})
    with worker.background(timeout="0s"):
        began(tmp_path, 1)
    session.rollback()
    assert (job.status, job.losses) == ("scheduled", 0)
    (tmp_path / "go").touch()
    many(scheduler, "write", 4)
    drained(engine, spawned, 5)  # the pool has come to an end of the first by then
    assert sorted(map(int, letters(session))) == sorted(session.scalars(select(ScheduledJob.id)))
    assert statuses(session) == {"complete": 5}


# --- what is refused, and where the jobs are ----------------------------------------------------------------------


def test_a_sessionmaker_has_to_be_named(spawned, engine):
    with pytest.raises(InvalidOption, match="module:attr"):
        Worker(sessionmaker(engine), executor=spawned)


def test_a_database_of_one_connection_is_refused(spawned):
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with pytest.raises(NotSupported, match="one connection"):
        Worker(engine, executor=spawned)


def test_what_is_no_executor_is_refused(engine):
    with pytest.raises(InvalidArgument, match="executor is 4"):
        Worker(engine, executor=4)


def test_a_time_zone_that_cannot_travel_is_refused_when_it_starts(spawned, engine):
    class Local(tzinfo):
        """Of a function, so that no other process finds it."""

    with pytest.raises(InvalidOption, match="timezone"):
        Worker(engine, executor=spawned, timezone=Local()).tick()


def test_a_named_scoped_session_is_the_current_one_there(engine, shared_url, scheduler, session, tmp_path, monkeypatch):
    (tmp_path / "farm_shop.py").write_text(
        "from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import scoped_session, sessionmaker\n"
        "from tests.shop import Letter\n"
        f"Current = scoped_session(sessionmaker(create_engine({shared_url!r})))\n"
        "def write():\n"
        "    Current.add(Letter(text='by the current one'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scheduler.enqueue("farm_shop.write")
    session.commit()
    with pool("spawn", 1) as executor:
        drained("farm_shop:Current", executor, 1)
    sys.modules.pop("farm_shop").Current.get_bind().dispose()
    assert (statuses(session), letters(session)) == ({"complete": 1}, ["by the current one"])


def test_an_executor_that_runs_everything_at_once_here_will_do(engine, scheduler, session):
    class Immediate(Executor):
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            future.set_result(fn(*args, **kwargs))
            return future

    many(scheduler, "whereabouts", 300)
    drained(engine, Immediate(), 300)
    assert {job.result for job in session.scalars(select(ScheduledJob))} == {os.getpid()}
