"""How soon a worker that has nothing to do starts a job, and what it costs to have nothing to do.

A try is an INSERT, its commit, and the start of the handler; the clock is one that all processes share. Beside it, in
turn, the least that it can take: an INSERT by the bare driver, and a thread that waits for its commit and claims.

Run as ``python -m benchmarks.pickup URL NOTIFY``, this is the worker in another process. It writes a line for each job,
and one for each line that it reads: the CPU time that it took so far.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from queue import SimpleQueue
from random import uniform
from statistics import median, quantiles
from time import perf_counter, process_time, sleep, time

from sqlalchemy import make_url
from sqlalchemy.orm import Session

from benchmarks import raw
from benchmarks.databases import Place, engine_on, fresh
from benchmarks.measure import Result
from benchmarks.sizes import Sizes
from future_jobs import Scheduler, Worker, notify_workers

Tries = Callable[[], list[float]]  # milliseconds, of some tries

QUEUES = {"ours": 2}  # the bare driver's jobs are in another
PATIENCE = 30  # seconds
STARTED: SimpleQueue[float] = SimpleQueue()
SAME_PROCESS, OTHER_PROCESS, AT_AN_INSTANT, ONE_POLL = (5, 15), (10, 25), (10, 10), (1_000, 1_100)  # p50 and p95, ms
PAUSE = 0.005  # between two looks of the bare driver at SQLite's count of commits


def started() -> None:
    """Note the instant."""
    STARTED.put(perf_counter())


def started_on_the_clock() -> None:
    """Note the time on the wall, by which jobs are due."""
    STARTED.put(time())


def told() -> None:
    """Tell the instant to the process that waits for it."""
    print(perf_counter(), flush=True)


def pickup(kind: str, sizes: Sizes) -> Iterator[Result]:
    """Jobs for now, by the same and by another process, and jobs for an instant."""
    binding = kind == "sqlite"
    with fresh(kind) as place, Session(notify_workers(place.engine)) as session:
        with Worker(place.engine, queues=QUEUES).background(), _bare(place, "signal") as floor:
            ours = partial(_tries, session, sizes.tries, "started", partial(STARTED.get, timeout=PATIENCE))
            rounds = _in_turn(sizes.rounds, partial(floor, sizes.tries), ours)
            yield from _results("pickup, same process", kind, rounds, SAME_PROCESS, binding=binding)
            late = partial(_at_instants, session, sizes.tries)
            yield from _results("lateness of a job for an instant", kind, ([], _rounds(late)), AT_AN_INSTANT)
        with _other_process(place, notify=True) as worker, _bare(place, "wait") as floor:
            is_polled = kind == "mariadb"
            tries = sizes.tries // 5 if is_polled else sizes.tries
            ours = partial(_tries, session, tries, "told", lambda: float(_line(worker)))
            rounds = ([], _rounds(ours)) if is_polled else _in_turn(sizes.rounds, partial(floor, tries), ours)
            bounds = ONE_POLL if is_polled else OTHER_PROCESS
            yield from _results("pickup, other process", kind, rounds, bounds, binding=binding)


def idle(kind: str, sizes: Sizes) -> Iterator[Result]:
    """The CPU time of a worker that has nothing to do, in percent of one core."""
    with fresh(kind) as place, _other_process(place, notify=True) as worker:
        sleep(1)  # for what it does once
        taken = []
        for _ in range(3):
            began, before = perf_counter(), _cpu_time(worker)
            sleep(sizes.idle)
            taken.append(100 * (_cpu_time(worker) - before) / (perf_counter() - began))
        yield Result(
            name="idle worker",
            database=kind,
            what="% of a core",
            ratio=median(taken),
            lowest=min(taken),
            highest=max(taken),
            ceiling=1.0,
            binding=kind == "sqlite",
        )


# --- ours -----------------------------------------------------------------------------------------------------------


def _tries(session: Session, count: int, handler: str, start: Callable[[], float]) -> list[float]:
    scheduler, taken = Scheduler(session), []
    for _ in range(count):
        sleep(uniform(0.03, 0.09))
        began = perf_counter()
        scheduler.enqueue(f"benchmarks.pickup.{handler}", queue="ours")
        session.commit()
        taken.append(1000 * (start() - began))
    return taken


def _at_instants(session: Session, count: int) -> list[float]:
    scheduler, taken = Scheduler(session), []
    for _ in range(count):
        at = datetime.now(UTC) + timedelta(seconds=uniform(0.05, 0.15))
        scheduler.schedule(at, started_on_the_clock, queue="ours")
        session.commit()
        taken.append(1000 * (STARTED.get(timeout=PATIENCE) - at.timestamp()))
        assert taken[-1] >= 0, "it was early"
    return taken


@contextmanager
def _other_process(place: Place, *, notify: bool) -> Iterator[subprocess.Popen[str]]:
    url = place.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "benchmarks.pickup", url, "notify" if notify else ""]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _cpu_time(worker)
        yield worker
    finally:
        worker.terminate()
        worker.communicate()


def _cpu_time(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(_line(worker))


def _line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline()


# --- the bare driver ------------------------------------------------------------------------------------------------


@contextmanager
def _bare(place: Place, how: str) -> Iterator[Callable[[int], list[float]]]:
    """Yield what tries so often, by a thread that claims when it is told (``signal``) or hears of it (``wait``)."""
    place.raw.clear()
    found: SimpleQueue[float] = SimpleQueue()
    bell, is_ready, over = threading.Semaphore(0), threading.Event(), threading.Event()

    def serve() -> None:
        driver = place.connect()
        wait = bell.acquire if how == "signal" else _waiting(place.kind, driver)
        is_ready.set()
        while wait() and not over.is_set():
            driver.run(driver.begin)
            rows = driver.claim()
            driver.run("COMMIT")
            if rows:
                found.put(perf_counter())
                driver.complete([row[0] for row in rows])
        driver.close()

    def insert() -> None:
        record = place.raw.record("nothing", 1, datetime.now(UTC))
        place.raw.run(place.raw.begin)
        place.raw.run(place.raw.insert, record)
        if place.kind == "postgresql":
            place.raw.run("SELECT pg_notify('bare', '')")
        place.raw.run("COMMIT")

    def tries(count: int) -> list[float]:
        taken = []
        for _ in range(count):
            sleep(uniform(0.03, 0.09))
            began = perf_counter()
            insert()
            bell.release()
            taken.append(1000 * (found.get(timeout=PATIENCE) - began))
        return taken

    thread = threading.Thread(target=serve)
    thread.start()
    is_ready.wait()
    try:
        yield tries
    finally:
        over.set()
        insert()
        bell.release()
        thread.join()


def _waiting(kind: str, driver: raw.Raw) -> Callable[[], bool]:
    if kind == "postgresql":
        driver.run("LISTEN bare")
        return lambda: bool(list(driver.connection.notifies(stop_after=1)))
    if kind == "mariadb":
        return lambda: False  # it has nothing to wait for
    seen = [0]

    def wait() -> bool:
        while (count := driver.run("PRAGMA data_version").fetchone()[0]) == seen[0]:
            sleep(PAUSE)
        seen[0] = count
        return True

    return wait


# --- rounds and results ---------------------------------------------------------------------------------------------


def _rounds(ours: Tries) -> list[list[float]]:
    return [ours() for _ in range(3)]


def _in_turn(rounds: int, other: Tries, ours: Tries) -> tuple[list[list[float]], list[list[float]]]:
    both = [(other(), ours()) for _ in range(rounds)]
    return [each[0] for each in both], [each[1] for each in both]


def _results(
    name: str,
    kind: str,
    rounds: tuple[Sequence[list[float]], Sequence[list[float]]],
    bounds: tuple[float, float],
    *,
    binding: bool = False,
) -> Iterator[Result]:
    """Yield one line for the median and one for the 95th of a hundred; the spread is that of the rounds."""
    for which, percent, ceiling in zip((9, 18), (50, 95), bounds, strict=True):
        other, ours = ([quantiles(tries, n=20)[which] for tries in side] for side in rounds)
        yield Result(
            name=name,
            database=kind,
            what=f"ms, p{percent}",
            ratio=quantiles([each for tries in rounds[1] for each in tries], n=20)[which],
            lowest=min(ours),
            highest=max(ours),
            ceiling=ceiling,
            ours=f"{median(ours):.1f} ms",
            other=f"{median(other):.1f} ms" if other else "",
            binding=binding,
        )


# --- the worker in another process ----------------------------------------------------------------------------------


def _serve(url: str, notify: str) -> None:
    engine = engine_on(make_url(url))

    def answer() -> None:
        for _ in sys.stdin:
            print(process_time(), flush=True)
        os._exit(0)  # whoever asked is gone

    threading.Thread(target=answer, daemon=True).start()
    Worker(engine, queues=QUEUES, notify=bool(notify)).run()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
