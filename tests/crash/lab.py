"""The crash lab: workers that die, sleep and lose their database in the middle of work, and what is left of it.

A `Lab` has a database, a fleet of worker processes and a ledger. Whatever is done to them, `Lab.verdict` then says what
became of each job:

lost      it is not complete, or it is and has had no effect
doubled   more than one attempt committed its effect
stale     an attempt that no longer held the job wrote an effect, or its completion
stuck     from the death of the worker that held it to its next start, in leases

SQLite has one write lock for everybody. A process that is stopped while it has it stops all others for as long, and no
lease helps, since these are renewed by writing. So nobody is put to sleep there: `Lab.pause` looks whether the lock can
be had while the process is stopped, and lets it go on at once, to try again, where it cannot. A process that is killed
gives its locks back.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import monotonic, sleep

from sqlalchemy import create_engine, func, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from future_jobs import JobFailure, ScheduledJob, Scheduler, Status, configure_sqlite
from tests.crash import ledger
from tests.crash.ledger import Effect

ROOT = Path(__file__).parent.parent.parent
SLOTS = 3
PATIENCE = 90.0  # seconds that anything may take
STUCK = 2.5  # leases
GRACE = 20.0  # seconds by which a start may be late in a short run, where anybody else may use the processors


@dataclass
class Process:
    """A worker's process."""

    pid: int
    spec: dict
    started_at: float = field(default_factory=monotonic)
    ended_at: float | None = None  # when it was killed, or was first seen to be dead
    popen: subprocess.Popen | None = None
    wake_at: float | None = None  # it sleeps until then

    @property
    def state(self) -> str:
        """One letter: R, S and D for a living process, T for a stopped one, Z and X for a dead one."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "X"

    @property
    def is_dead(self) -> bool:
        return self.state in "ZX"


@dataclass(frozen=True)
class Note:
    """A line of a process's notes."""

    pid: int
    what: str
    job_id: int
    attempt: int
    at: float


@dataclass
class Verdict:
    strikes: int
    jobs: int
    lost: list[int]
    doubled: list[int]
    stale: int
    waits: list[float]  # from the death of a worker to the next start of what it held, in leases
    losses: int
    refused: int  # finishes of attempts that no longer held their job
    seconds: float
    stall: (
        float  # for how long, at most, the machine let a thread of the lab wait that had nothing to do but to wake up
    )

    @property
    def stuck(self) -> float:
        return max(self.waits, default=0.0)

    def check(self, *, lease: float, is_long: bool) -> None:
        assert (self.lost, self.doubled, self.stale) == ([], [], 0), self
        assert self.stuck <= STUCK + (self.stall if is_long else GRACE) / lease, self

    def __str__(self) -> str:
        found = (
            f"{self.strikes} strikes, {self.jobs} jobs",
            f"{len(self.lost)} lost, {len(self.doubled)} doubled, {self.stale} stale finishes ({self.refused} refused)",
            f"{self.losses} attempts lost their worker",
            f"{len(self.waits)} waits, half of them under {median(self.waits or [0]):.2f} leases",
            f"{sum(wait > STUCK for wait in self.waits)} over {STUCK}, the longest {self.stuck:.2f}",
            f"{self.seconds:.0f} s, and the machine stood still for up to {self.stall:.2f} s",
        )
        return "; ".join(found)


class Lab:
    """Workers on one database, and what is done to them."""

    def __init__(self, url: str, folder: Path, *, seed: int, lease: float = 1.0, worker_url: str | None = None) -> None:
        self.url = url
        self.folder = folder
        self.lease = lease
        self.chance = random.Random(seed)
        self.began = monotonic()
        self.workers: list[Process] = []
        self.dead: list[Process] = []
        self.told: Callable[[str], None] = lambda line: None
        self._worker_url = worker_url or url
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), ledger.FOLDER: str(folder)}
        self.strikes = 0
        self._stall = 0.0
        self._over = threading.Event()
        threading.Thread(target=self._feel, name="canary", daemon=True).start()
        self._engine = configure_sqlite(create_engine(url, pool_pre_ping=True), timeout=timedelta(seconds=PATIENCE))
        ledger.Base.metadata.create_all(self._engine)
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.processes", self._worker_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd=ROOT,
        )

    def _feel(self) -> None:
        began = monotonic()
        while not self._over.wait(0.01):
            now = monotonic()
            self._stall, began = max(self._stall, now - began - 0.01), now

    def close(self) -> None:
        """End every process; leave no trace in the database."""
        self._over.set()
        for worker in [*self.workers, *self.dead]:
            if worker.popen is not None:
                worker.popen.kill()
                worker.popen.wait()
        self._nursery.communicate()
        ledger.Base.metadata.drop_all(self._engine)
        self._engine.dispose()

    # --- the fleet

    def start(self, *, guard: str | None = None, clock: float = 0.0, slots: int = SLOTS) -> Process:
        """Start a worker; with a weaker ``guard`` of its finishes, or with a ``clock`` that many seconds ahead."""
        spec = {
            "url": self._worker_url,
            "lease": self.lease,
            "poll": min(0.1, self.lease / 10),
            "slots": slots,
            "guard": guard,
            "clock": clock,
        }
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(spec) + "\n")
        self._nursery.stdin.flush()
        return self._hired(Process(int(self._nursery.stdout.readline()), spec))

    def start_command(self) -> Process:
        """Start a worker as an operator does."""
        settings = ["--lease", f"{self.lease}s", "--poll", "0.1s", "--queue", f"default={SLOTS}", "--quiet"]
        with (self.folder / "command.log").open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", "future_jobs", "--url", self._worker_url, "worker", *settings],
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=ROOT,
            )
        return self._hired(Process(popen.pid, {}, popen=popen))

    def _hired(self, process: Process) -> Process:
        self.workers.append(process)
        return process

    def tend(self) -> None:
        """Start a worker anew for each that has died; wake those whose time has come."""
        for worker in list(self.workers):
            if worker.is_dead:
                self._bury(worker)
                self._start_another(worker)
            elif worker.wake_at is not None and monotonic() >= worker.wake_at:
                self.wake(worker)

    def kill(self, worker: Process) -> None:
        os.kill(worker.pid, signal.SIGKILL)
        self._bury(worker)

    def replace(self, worker: Process) -> None:
        """Kill a worker, and start another at once."""
        self.kill(worker)
        self._start_another(worker)

    def _bury(self, worker: Process) -> None:
        worker.ended_at = worker.ended_at or monotonic()
        self.workers.remove(worker)
        self.dead.append(worker)

    def _start_another(self, worker: Process) -> None:
        if worker.popen is None:
            spec = worker.spec
            self.start(guard=spec["guard"], clock=spec["clock"], slots=spec["slots"])
        else:
            self.start_command()

    def victim(self) -> Process:
        """Choose a worker at random, so that always one is left that has lived long enough to see who died.

        A worker sees the death of another by watching its jobs for a lease; if all that watch die it begins anew.
        """
        by_age = sorted(self.workers, key=lambda each: each.started_at)
        is_safe = monotonic() - by_age[1].started_at > 3 * self.lease
        return self.chance.choice(by_age if is_safe else by_age[1:])

    @property
    def asleep(self) -> list[Process]:
        return [worker for worker in self.workers if worker.wake_at is not None]

    def pause(self, *among: Process, leases: float = math.inf) -> Process:
        """Put one of these workers to sleep, for so many leases, at a moment when that does not stop everybody else."""
        slept: Process | None = None

        def is_asleep() -> bool:
            nonlocal slept
            slept = self.chance.choice(among)
            os.kill(slept.pid, signal.SIGSTOP)
            self.until(lambda: slept.state == "T", tend=False)
            if self._is_file_free() and (leases < math.inf or self._is_no_row_locked()):
                return True
            os.kill(slept.pid, signal.SIGCONT)
            return False

        self.until(is_asleep)
        assert slept is not None
        slept.wake_at = monotonic() + leases * self.lease
        return slept

    def wake(self, worker: Process) -> None:
        worker.wake_at = None
        os.kill(worker.pid, signal.SIGCONT)

    def _is_file_free(self) -> bool:
        if self._engine.dialect.name != "sqlite":
            return True
        with self._engine.connect() as connection:
            connection.execute(text(f"PRAGMA busy_timeout = {int(100 * self.lease)}"))
            try:
                connection.execute(text("BEGIN EXCLUSIVE"))
            except OperationalError:
                return False
            else:
                return True
            finally:
                connection.rollback()
                connection.execute(text(f"PRAGMA busy_timeout = {int(1000 * PATIENCE)}"))

    def _is_no_row_locked(self) -> bool:
        """Tell whether nobody is in a transaction that holds a job: until it ends no other can take that."""
        if self._engine.dialect.name == "sqlite":
            return True
        with Session(self._engine) as session:
            found = select(ScheduledJob.id)
            locked = found.with_for_update(skip_locked=True)
            return len(session.scalars(locked).all()) == len(session.scalars(found).all())

    # --- the jobs

    def schedule(self, function: str, count: int = 1, *, when: str = "0s", **kwargs: object) -> list[int]:
        with Session(self._engine) as session:
            calls = [{"kwargs": kwargs} for _ in range(count)]
            ids = Scheduler(session).schedule_many(when, f"tests.crash.ledger.{function}", calls, expires=None)
            session.commit()
        return ids

    def schedule_mixed(self, count: int, *, longest: float = 0.01) -> None:
        """Schedule jobs of each plain kind, which take no more than ``longest`` seconds."""
        for kind, function in enumerate(ledger.PLAIN):
            share = len(range(kind, count, len(ledger.PLAIN)))
            self.schedule(function, share, seconds=self.chance.uniform(0, longest))

    def open_gate(self, job_id: int, attempt: int) -> None:
        (self.folder / f"gate-{job_id}-{attempt}").touch()

    # --- what is to be seen

    def notes(self) -> Iterator[Note]:
        for path in self.folder.glob("*.notes"):
            for line in path.read_text(encoding="utf-8").splitlines():
                what, job_id, attempt, at = line.split()
                yield Note(int(path.stem), what, int(job_id), int(attempt), float(at))

    def noted(self, what: str, job_id: int, attempt: int = 0) -> bool:
        return any((each.what, each.job_id, each.attempt) == (what, job_id, attempt) for each in self.notes())

    def runner(self, job_id: int, attempt: int) -> Process:
        """Return the worker that runs an attempt."""
        [pid] = {note.pid for note in self.notes() if (note.job_id, note.attempt) == (job_id, attempt)}
        [found] = [worker for worker in self.workers if worker.pid == pid]
        return found

    def check_all_lived(self) -> None:
        assert not self.dead, self._scene()

    def left(self) -> int:
        """How many jobs have not ended."""
        with Session(self._engine) as session:
            waiting = ScheduledJob.status.in_([Status.SCHEDULED, Status.RUNNING])
            return session.scalar(select(func.count()).select_from(ScheduledJob).where(waiting)) or 0

    def status(self, job_id: int) -> tuple[str, int]:
        with Session(self._engine) as session:
            found = select(ScheduledJob.status, ScheduledJob.attempt).where(ScheduledJob.id == job_id)
            return tuple(session.execute(found).one())

    def losses(self, job_id: int) -> int:
        with Session(self._engine) as session:
            return session.get_one(ScheduledJob, job_id).losses

    def until(self, true: Callable[[], bool], *, seconds: float = PATIENCE, tend: bool = True) -> None:
        """Wait for what other processes do."""
        give_up_at = monotonic() + seconds
        while not true():
            assert monotonic() < give_up_at, self._scene()
            if tend:
                self.tend()
            sleep(0.01)

    def _scene(self) -> str:
        logs = "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in self.folder.glob("*.log"))
        states = {worker.pid: worker.state for worker in self.workers}
        with Session(self._engine) as session:
            left = session.execute(
                select(ScheduledJob.id, ScheduledJob.status, ScheduledJob.attempt, ScheduledJob.leased_by).where(
                    ScheduledJob.status.in_([Status.SCHEDULED, Status.RUNNING])
                )
            ).all()
        return f"{len(left)} jobs are left: {left[:20]}; workers: {states}; they said:\n{logs}"

    # --- what is left of it

    def storm(self, strikes: int, jobs: int, strike: Callable[[int], None], *, longest: float = 0.01) -> None:
        """Strike that often, at random moments, while as many jobs are scheduled and run; wait until all have ended."""
        share = -(-jobs // strikes)
        for number in range(1, strikes + 1):
            self.schedule_mixed(min(share, jobs), longest=longest)
            jobs -= min(share, jobs)
            strike_at = monotonic() + self.chance.uniform(0, 0.4)
            self.until(lambda at=strike_at: monotonic() >= at)
            strike(number)
            self.strikes += 1
            self.until(lambda: self.left() < 2 * share)
            self.told(f"{number} of {strikes} strikes, {jobs} jobs to come, {monotonic() - self.began:.0f} s")
        self.until(lambda: self.left() == 0)

    def verdict(self, *, excepted: Collection[int] = ()) -> Verdict:
        with Session(self._engine) as session:
            jobs = {
                row.id: row
                for row in session.execute(
                    select(
                        ScheduledJob.id,
                        ScheduledJob.status,
                        ScheduledJob.attempt,
                        ScheduledJob.callable_name,
                        ScheduledJob.return_value,
                    )
                )
            }
            effects = session.execute(select(Effect.job_id, Effect.attempt)).all()
            losses = session.execute(
                select(JobFailure.job_id, JobFailure.attempt, JobFailure.worker).where(
                    JobFailure.error_type == "WorkerLost"
                )
            ).all()
        count = Counter(effect.job_id for effect in effects)
        lost = [
            row.id
            for row in jobs.values()
            if row.id not in excepted
            and (row.status != Status.COMPLETE or (_has_effect(row.callable_name) and not count[row.id]))
        ]
        stale = sum(effect.attempt != jobs[effect.job_id].attempt for effect in effects)
        stale += sum(row.return_value != row.attempt for row in jobs.values() if row.status == Status.COMPLETE)
        notes = list(self.notes())
        return Verdict(
            strikes=self.strikes,
            stall=self._stall,
            jobs=len(jobs),
            lost=lost,
            doubled=[job_id for job_id, times in count.items() if times > 1],
            stale=stale,
            waits=list(self._waits(losses, notes)),
            losses=len(losses),
            refused=sum(each.what == "lost" for each in notes),
            seconds=monotonic() - self.began,
        )

    def _waits(self, losses: list, notes: list[Note]) -> Iterator[float]:
        """Return, for each attempt that was lost by a death, how long its job waited for the next to begin.

        If the worker of that one died, too, before it could begin, its death counts as the beginning, which is late.
        """
        died_at = {process.pid: process.ended_at for process in self.dead}
        began: dict[int, dict[int, float]] = defaultdict(dict)
        lost: dict[int, dict[int, float]] = defaultdict(dict)
        for each in notes:
            if each.what == "began":
                began[each.job_id].setdefault(each.attempt, each.at)
        for job_id, attempt, worker in losses:
            at = died_at.get(int(worker.split(":")[-2]))
            if at is not None:
                lost[job_id][attempt] = at
                began[job_id].setdefault(attempt, at)
        for job_id, attempts in lost.items():
            for attempt, at in attempts.items():
                later = [began_at for number, began_at in began[job_id].items() if number > attempt]
                if later and min(later) > at:
                    yield (min(later) - at) / self.lease


def _has_effect(callable_name: str) -> bool:
    return callable_name.rpartition(".")[2] not in ledger.WITHOUT_EFFECT


def kill_sessions(url: str) -> None:
    """End all connections to the database but this one, as an operator may."""
    engine = create_engine(make_url(url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        else:
            found = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
            for session_id in connection.scalars(text(found)).all():
                try:
                    connection.execute(text(f"KILL {session_id}"))
                except OperationalError as error:
                    if error.orig.args[0] != 1094:  # it has ended by itself
                        raise
    engine.dispose()
