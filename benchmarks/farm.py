"""What a job costs in another process, and what that gains: ``python -m benchmarks.farm``.

The same jobs by threads, by a process pool, by loky, and by Dask's scheduler with as many workers, all on this host.
Starting processes and importing is not counted; claiming and completing is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from statistics import median
from time import perf_counter, process_time

from sqlalchemy.orm import Session

from benchmarks.databases import KINDS, Place, answers, fresh
from benchmarks.jobs import compute, nothing
from future_jobs import Scheduler, Worker

PROCESSES = 2
ROUNDS = 3


@contextmanager
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield pool


@contextmanager
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextmanager
def loky() -> Iterator[Executor]:
    pool = import_module("loky").get_reusable_executor(PROCESSES)
    yield pool
    pool.shutdown()


@contextmanager
def dask() -> Iterator[Executor]:
    distributed = import_module("distributed")
    with (
        distributed.LocalCluster(n_workers=PROCESSES, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


EXECUTORS = {"threads": threads, "processes": processes, "loky": loky, "dask": dask}


def drained(place: Place, executor: Executor, function: Callable[[int], None], count: int) -> tuple[float, float]:
    """Return how many seconds ``count`` jobs take, and how many of this process's CPU."""
    with Session(place.engine) as session:
        Scheduler(session).schedule_many("0s", function, [{"args": [n]} for n in range(count)])
        session.commit()
    worker = Worker(place.engine, executor=executor, queues={"default": 2 * PROCESSES}, max_jobs=count)
    began, used = perf_counter(), process_time()
    worker.run()
    return perf_counter() - began, process_time() - used


def main() -> int:
    """Print a table: jobs a second by each executor, and the microseconds of CPU that the worker takes for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.farm", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=EXECUTORS)
    parser.add_argument("--database", choices=KINDS, default="sqlite")
    parser.add_argument("--jobs", type=int, default=2_000, metavar="NUMBER")
    options = parser.parse_args()
    if not answers(options.database):
        print(f"{options.database} does not answer", file=sys.stderr)
        return 1
    began = process_time()
    for n in range(100):
        compute(n)
    print(f"compute() takes {(process_time() - began) * 10:.2f} ms of this CPU\n")
    print("| executor  | nothing  | CPU of the worker | compute  | CPU of the worker |")
    print("|-----------|----------|-------------------|----------|-------------------|")
    for name in options.only or EXECUTORS:
        with EXECUTORS[name]() as executor, fresh(options.database) as place:
            for function in (nothing, compute):  # it is imported there, and every process is started
                drained(place, executor, function, 100)
            cells = []
            for function in (nothing, compute):
                rounds = [drained(place, executor, function, options.jobs) for _ in range(ROUNDS)]
                seconds, used = (median(column) for column in zip(*rounds, strict=True))
                cells += [f"{options.jobs / seconds:6,.0f}/s", f"{1e6 * used / options.jobs:14,.0f} µs"]
        print(f"| {name:9} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
