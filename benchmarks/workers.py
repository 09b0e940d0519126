"""What the Worker is measured at, as a process of its own; `benchmarks.cases` names the cases.

A drain lasts from the moment at which connected workers are told to begin until the database shows nothing unfinished;
starting the process, importing and connecting are not counted, and neither is stopping.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Self, Unpack

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from benchmarks import jobs
from benchmarks.databases import Place, fresh
from benchmarks.measure import Result, compared, interleaved, rate
from benchmarks.raw import Raw
from benchmarks.sizes import Sizes
from future_jobs import ScheduledJob, Scheduler
from future_jobs.options import JobOptions

POLL_SECONDS = 0.005
LOOK_SECONDS = 0.2  # after this a worker looks again at once; before, what others have added waits for its next poll
PATIENCE_SECONDS = 300.0
MEGABYTES = 80.0  # what a worker may take


class Process:
    """A worker process on the database of a place, with default options or with so many slots."""

    def __init__(self, place: Place, slots: int | None = None) -> None:
        url = place.engine.url.render_as_string(hide_password=False)
        command = [sys.executable, "-m", "benchmarks.worker_process", url, *([] if slots is None else [str(slots)])]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def connect(self) -> None:
        """Let it connect; the database must hold nothing due."""
        self._say()
        self._hear("ready")

    def begin(self) -> None:
        """Let it run."""
        self._say()

    def end(self) -> None:
        """Let it stop, and wait until it has."""
        self._process.send_signal(signal.SIGTERM)
        self._hear("stopped")

    def is_alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def peak(self) -> float | None:
        """Return the most memory that it ever took, in MB; None where the system does not tell."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

    def _say(self) -> None:
        _pipe(self._process.stdin).write("\n")

    def _hear(self, word: str) -> None:
        said = _pipe(self._process.stdout).readline().strip()
        if said != word:
            raise RuntimeError(f"a worker process said {said!r} in place of {word!r}")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _drain(place: Place, processes: Sequence[Process], count: int, load: Callable[[], object]) -> float:
    """Return how many of the ``count`` jobs that ``load`` adds the processes finish in a second."""
    for each in processes:
        each.connect()
    before = place.raw.newest()
    load()
    sleep(LOOK_SECONDS)

    def work() -> None:
        for each in processes:
            each.begin()
        until = monotonic() + PATIENCE_SECONDS
        while place.raw.unfinished(before):
            if monotonic() > until or not all(each.is_alive() for each in processes):
                raise RuntimeError("the workers did not finish their jobs")
            sleep(POLL_SECONDS)

    result = rate(count, work)
    for each in processes:
        each.end()
    return result


def _drained(place: Place, processes: Sequence[Process], handler: str, count: int) -> Callable[[], float]:
    """Return a drain of a table that holds nothing else."""

    def work() -> float:
        place.raw.clear()
        records = place.raw.due(handler, count)
        return _drain(place, processes, count, lambda: place.raw.insert_all(records))

    return work


# --- the cases ----------------------------------------------------------------------------------------------------


def drain(kind: str, sizes: Sizes) -> Iterator[Result]:
    """A worker with jobs that do nothing, against claiming and completing them by the hundred; and two of them."""
    count = sizes.worker
    with fresh(kind) as place, Process(place) as first, Process(place) as second:

        def other(*, merged: bool) -> float:
            place.raw.clear()
            place.raw.insert_all(place.raw.due("nothing", count))
            return rate(count, lambda: place.raw.drain(jobs.nothing, merged=merged))

        apart, merged, one, two = interleaved(
            sizes.worker_rounds,
            lambda: other(merged=False),
            lambda: other(merged=True),
            _drained(place, [first], "nothing", count),
            _drained(place, [first, second], "nothing", count),
        )
        name = f"worker, {count:,} no-op jobs"
        floor = {"sqlite": 0.2, "postgresql": 0.5, "mariadb": 0.5}[kind]
        yield compared(name, kind, (apart, one), what="ours / raw, two transactions", floor=floor)
        yield compared(name, kind, (merged, one), what="ours / raw, merged")
        floor_of_two = 1.4 if kind == "postgresql" else None
        yield compared(f"two workers, {count:,} no-op jobs", kind, (one, two), what="two / one", floor=floor_of_two)
        if (peak := first.peak()) is not None:
            name, what = f"memory of a worker, {count:,} jobs", f"MB / {MEGABYTES:.0f} MB"
            yield compared(name, kind, ([MEGABYTES], [peak]), what=what, unit=" MB", ceiling=1.0)


def exact(kind: str, sizes: Sizes) -> Iterator[Result]:
    """Jobs that write one row through their Session, on 1 slot and on 4, against as many threads with the driver."""
    floor = None if kind == "sqlite" else 0.45
    for slots in (1, 4):
        count = sizes.exact * (1 if kind == "sqlite" else slots)
        with fresh(kind) as place, Process(place, slots) as process, ExitStack() as stack:
            drivers = [place.connect() for _ in range(slots)]
            for each in drivers:
                stack.callback(each.close)

            def other(drivers: Sequence[Raw] = drivers, place: Place = place, count: int = count) -> float:
                place.raw.clear()
                place.raw.insert_all(place.raw.due("write_row", count))
                return rate(count, lambda: _drain_at_once(drivers, count))

            rates = interleaved(sizes.worker_rounds, other, _drained(place, [process], "write_row", count))
            name = f"worker of {slots} slot{'s' if slots > 1 else ''}, {count:,} jobs that INSERT a row"
            yield compared(name, kind, rates, floor=floor)


def _drain_at_once(drivers: Sequence[Raw], count: int) -> None:
    with ThreadPoolExecutor(len(drivers)) as threads:
        assert sum(threads.map(Raw.drain_with_effect, drivers)) == count


def backlog(kind: str, sizes: Sizes, *, full: Place, empty: Place) -> Iterator[Result]:
    """Due jobs among many that are not, future ones of better priorities included, against an empty table."""
    count = sizes.backlog
    with Process(empty) as in_empty, Process(full) as in_full:

        def loaded() -> float:
            records = full.raw.due("nothing", count)
            return _drain(full, [in_full], count, lambda: full.raw.insert_all(records))

        rates = interleaved(sizes.worker_rounds, _drained(empty, [in_empty], "nothing", count), loaded)
        name = f"worker, {count:,} due among {sizes.rows:,} future + {sizes.rows:,} finished"
        yield compared(name, kind, rates, what="full / empty table", floor=0.8)


def unused(kind: str, sizes: Sizes) -> Iterator[Result]:
    """Jobs without options, alone and among jobs with options that wait; and jobs whose options come to nothing."""
    count = sizes.worker
    with (
        fresh(kind) as plain,
        fresh(kind) as crowded,
        fresh(kind) as optional,
        Process(plain) as alone,
        Process(crowded) as among,
        Process(optional) as with_options,
    ):
        waiting = _options_that_wait(crowded, sizes.single * 10)

        def beside() -> float:
            records = crowded.raw.due("nothing", count)
            return _drain(crowded, [among], count, lambda: crowded.raw.insert_all(records))

        def used() -> float:
            optional.raw.clear()
            return _drain(optional, [with_options], count, lambda: _schedule(optional, count, **IDLE_OPTIONS))

        base, crowd, options = interleaved(
            sizes.worker_rounds, _drained(plain, [alone], "nothing", count), beside, used
        )
        name = f"worker, {count:,} jobs without options among {waiting:,} with"
        yield compared(name, kind, (base, crowd), what="among them / alone", floor=0.9)
        name = f"worker, {count:,} jobs with options that come to nothing"
        yield compared(name, kind, (base, options), what="with / without")


IDLE_OPTIONS: JobOptions = {
    "max_attempts": 3,
    "backoff": "1m",
    "retry_on": ConnectionError,
    "timeout": "1h",
    "tags": ["nightly"],
}


def _options_that_wait(place: Place, count: int) -> int:
    """Add ``count`` jobs that are due and wait for the key of one that runs, and as many of a queue that is paused."""
    _schedule(place, count + 1, concurrency_key="taken", priority=1)
    _schedule(place, count, queue="paused", priority=1)
    with Session(place.engine) as session:
        scheduler = Scheduler(session)
        scheduler.pause_queue("paused")
        first = session.scalar(select(func.min(ScheduledJob.id)))
        until = datetime.now(UTC) + timedelta(days=1)
        values = {"status": "running", "attempt": 1, "leased_by": "somebody else", "leased_until": until}
        session.execute(update(ScheduledJob).where(ScheduledJob.id == first).values(**values))
        session.commit()
    return 2 * count


def _schedule(place: Place, count: int, **options: Unpack[JobOptions]) -> None:
    with Session(place.engine) as session:
        calls = [{"args": [n]} for n in range(count)]
        Scheduler(session).schedule_many("0s", jobs.nothing, calls, **options)
        session.commit()


def growth(kind: str, sizes: Sizes) -> Iterator[Result]:
    """The most memory that a worker took after many jobs, against that after some."""
    with fresh(kind) as place, Process(place) as process:
        before, after = (_peak(place, process, count) for count in (sizes.worker, sizes.many))
    if before is not None and after is not None:
        name = f"memory of a worker, {sizes.many:,} jobs after {sizes.worker:,}"
        yield compared(name, kind, ([before], [after]), what="peak / peak before", unit=" MB", ceiling=1.1)


def _peak(place: Place, process: Process, count: int) -> float | None:
    place.raw.clear()
    due = datetime.now(UTC) - timedelta(hours=1)
    _drain(place, [process], count, lambda: place.raw.generate(count, "0", due))
    return process.peak()
