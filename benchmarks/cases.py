"""What is measured. Each case yields results; ours and raw work on the same tables, in turn."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from benchmarks import jobs, workers
from benchmarks.databases import DEFAULT, Place, fresh
from benchmarks.measure import Result, compared, interleaved, rate
from benchmarks.pickup import idle, pickup
from benchmarks.sizes import Sizes
from future_jobs import Scheduler

# The bounds of run_due hold on a SQLite file; on the servers they are goals, shown and not enforced.
FLOORS: Mapping[str, Mapping[str, float]] = {
    "schedule": {"sqlite": 0.10, "postgresql": 0.3},
    "schedule_many": {"sqlite": 0.4, "postgresql": 0.5, "mariadb": 1.0},
    "run_due": {"sqlite": 0.2, "postgresql": 0.5, "mariadb": 0.5},
    "exact": {"sqlite": 0.1, "postgresql": 0.45, "mariadb": 0.45},
    "backlog": {"sqlite": 0.8, "postgresql": 0.8, "mariadb": 0.8},
}


def _bound(case: str, kind: str) -> dict[str, Any]:
    return {"floor": FLOORS[case].get(kind), "binding": kind == "sqlite"}


# --- scheduling ---------------------------------------------------------------------------------------------------


def schedule(kind: str, sizes: Sizes) -> Iterator[Result]:
    """One ``schedule`` and one commit, again and again, against one INSERT and one commit."""
    with fresh(kind) as place:
        yield _one_by_one(place, "schedule + commit", sizes, **_bound("schedule", kind))
    if kind == "sqlite":
        with fresh(kind, pragmas=DEFAULT) as place:
            slow = replace(sizes, single=sizes.single // 4, rounds=3)
            yield _one_by_one(place, "schedule + commit, default journal", slow)


def _one_by_one(place: Place, name: str, sizes: Sizes, **bound: Any) -> Result:
    records = place.raw.due("nothing", sizes.single)

    def ours() -> float:
        place.raw.clear()
        with Session(place.engine) as session:
            scheduler = Scheduler(session)

            def work() -> None:
                for n in range(sizes.single):
                    scheduler.schedule("3d", jobs.nothing, args=[n])
                    session.commit()

            return rate(sizes.single, work)

    def other() -> float:
        place.raw.clear()
        return rate(sizes.single, lambda: place.raw.insert_each(records))

    return compared(name, place.kind, interleaved(sizes.rounds, other, ours), **bound)


def schedule_many(kind: str, sizes: Sizes) -> Iterator[Result]:
    """``schedule_many`` and a commit, against the driver's fastest bulk insert."""
    with fresh(kind) as place:
        records = place.raw.due("nothing", sizes.bulk)
        calls = [{"args": [n]} for n in range(sizes.bulk)]

        def ours() -> float:
            place.raw.clear()
            with Session(place.engine) as session:
                scheduler = Scheduler(session)

                def work() -> None:
                    assert len(scheduler.schedule_many("3d", jobs.nothing, calls)) == sizes.bulk
                    session.commit()

                return rate(sizes.bulk, work)

        def other() -> float:
            place.raw.clear()
            return rate(sizes.bulk, lambda: place.raw.insert_all(records))

        rates = interleaved(sizes.rounds, other, ours)
        yield compared(f"schedule_many({sizes.bulk:,})", kind, rates, **_bound("schedule_many", kind))


# --- running ------------------------------------------------------------------------------------------------------


def run_due(kind: str, sizes: Sizes) -> Iterator[Result]:
    """``run_due`` over jobs that do nothing, against claiming and completing them by the hundred."""
    count = sizes.drain
    with fresh(kind) as place:
        other = _raw_drain(place, count)
        rates = interleaved(sizes.rounds, other, lambda: _drain(place, "nothing", count))
        yield compared(f"run_due, {count:,} no-op jobs", kind, rates, **_bound("run_due", kind))
        rates = interleaved(sizes.rounds, other, lambda: _drain(place, "answer", count))
        yield compared(f"run_due, {count:,} jobs with a result", kind, rates, what="ours, kept / raw, none")
    if kind == "sqlite":
        count //= 4
        with fresh(kind, pragmas=DEFAULT) as place:
            rates = interleaved(3, _raw_drain(place, count), lambda: _drain(place, "nothing", count))
            yield compared(f"run_due, {count:,} no-op jobs, default journal", kind, rates)


def _raw_drain(place: Place, count: int) -> Callable[[], float]:
    def work() -> float:
        place.raw.clear()
        place.raw.insert_all(place.raw.due("nothing", count))

        def drain() -> None:
            assert place.raw.drain(jobs.nothing) == count

        return rate(count, drain)

    return work


def _drain(place: Place, handler: str, count: int) -> float:
    place.raw.clear()
    place.raw.insert_all(place.raw.due(handler, count))
    with Session(place.engine) as session:
        scheduler = Scheduler(session)

        def work() -> None:
            assert scheduler.run_due().complete == count

        return rate(count, work)


def exact(kind: str, sizes: Sizes) -> Iterator[Result]:
    """Jobs that write one row through their Session, against an INSERT and a guarded UPDATE in one transaction."""
    count = sizes.exact
    with fresh(kind) as place:

        def other() -> float:
            place.raw.clear()
            place.raw.insert_all(place.raw.due("write_row", count))

            def work() -> None:
                assert place.raw.drain_with_effect() == count

            return rate(count, work)

        rates = interleaved(sizes.rounds, other, lambda: _drain(place, "write_row", count))
        yield compared(f"run_due, {count:,} jobs that INSERT a row", kind, rates, **_bound("exact", kind))
        rates = interleaved(sizes.rounds, other, lambda: _drain(place, "write_object", count))
        yield compared(f"run_due, {count:,} jobs that add an object", kind, rates)


def backlog(kind: str, sizes: Sizes) -> Iterator[Result]:
    """Due jobs drained among many that are not, future ones of better priorities included, against an empty table."""
    count = sizes.backlog
    with fresh(kind) as empty, fresh(kind) as full:
        full.raw.load(sizes.rows, sizes.rows)

        def loaded() -> float:
            full.raw.insert_all(full.raw.due("nothing", count))
            with Session(full.engine) as session:
                scheduler = Scheduler(session)

                def work() -> None:
                    assert scheduler.run_due().complete == count

                return rate(count, work)

        rates = interleaved(sizes.rounds, lambda: _drain(empty, "nothing", count), loaded)
        name = f"run_due, {count:,} due among {sizes.rows:,} future + {sizes.rows:,} finished"
        yield compared(name, kind, rates, what="full / empty table", **_bound("backlog", kind))
        yield from workers.backlog(kind, sizes, full=full, empty=empty)


# --- memory and import --------------------------------------------------------------------------------------------


def memory(kind: str, sizes: Sizes) -> Iterator[Result]:
    """What ``run_due`` holds at the most, for each further job: its id in the report, and nothing else."""
    count = sizes.drain
    with fresh(kind) as place:
        _peak(place, count // 20)  # what is made once
        more = [(_peak(place, count * 5) - _peak(place, count)) / (count * 4) for _ in range(3)]
    ids = list(range(10**6, 10**6 + count))
    one_id = (sys.getsizeof(ids) + 32 * count) / count  # 32 bytes is what is taken for an int of this size
    yield compared(
        f"memory of run_due, {count:,} to {count * 5:,} jobs",
        kind,
        ([one_id] * len(more), more),
        what="bytes a job / an id in a list",
        unit=" B",
        ceiling=1.5,
    )


def _peak(place: Place, count: int) -> float:
    place.raw.clear()
    place.raw.insert_all(place.raw.due("nothing", count))
    with Session(place.engine) as session:
        scheduler = Scheduler(session)
        tracemalloc.start()
        try:
            assert scheduler.run_due().complete == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


ABSENT = ("alembic", "click")
IMPORTS = {
    "sqlalchemy.orm": "import sqlalchemy.orm",
    "future_jobs": "import future_jobs",
    "Scheduler": "from future_jobs import Scheduler",
}


def importing(_kind: str, sizes: Sizes) -> Iterator[Result]:
    """The CPU time to import, in fresh interpreters, against that of ``sqlalchemy.orm``, which every user has paid."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(sizes.rounds * 2 + 1):
        for name, line in IMPORTS.items():
            taken, loaded = _import(line)
            if loaded and name != "sqlalchemy.orm":
                raise AssertionError(f"{line!r} imports {', '.join(loaded)}")
            if turn:
                seconds[name].append(taken * 1000)
    for name, ceiling in (("future_jobs", 0.1), ("Scheduler", 2.0)):
        both = seconds["sqlalchemy.orm"], seconds[name]
        yield compared(IMPORTS[name], "", both, what="time / import sqlalchemy.orm", unit=" ms", ceiling=ceiling)


def _import(line: str) -> tuple[float, list[str]]:
    script = (
        f"import sys, time; began = time.process_time(); {line}; took = time.process_time() - began; "
        f"print(took, *[name for name in {ABSENT!r} if name in sys.modules])"
    )
    taken, *loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    return float(taken), loaded


CASES: Mapping[str, Callable[[str, Sizes], Iterator[Result]]] = {
    "schedule": schedule,
    "schedule_many": schedule_many,
    "run_due": run_due,
    "exact": exact,
    "worker": workers.drain,
    "worker_exact": workers.exact,
    "backlog": backlog,
    "worker_memory": workers.growth,
    "unused": workers.unused,
    "pickup": pickup,
    "idle": idle,
    "memory": memory,
    "import": importing,
}
ONCE = {"import": "sqlite", "memory": "sqlite", "worker_memory": "sqlite"}  # what does not depend on the database
