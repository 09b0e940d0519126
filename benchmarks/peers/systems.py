"""Who takes part, each in the best configuration that its own documentation knows, and how much each is given to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STORES = ("postgresql", "sqlite", "redis")


@dataclass(frozen=True, slots=True)
class System:
    """One line of the table."""

    name: str
    adapter: str  # a module in `adapters`, and the name of its environment
    store: str
    configuration: str
    counts: Mapping[str, int]  # work -> how often; enough for about a second
    options: Mapping[str, Any] = field(default_factory=dict)
    rival: str = ""  # which of our lines it is compared with; none: it is one of them
    floors: Mapping[str, float] = field(default_factory=dict)  # work -> how many times as fast ours has to be


REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "pgqueuer": ("pgqueuer>=1.6,<2", "asyncpg>=0.30,<1"),
    "procrastinate": ("procrastinate>=3.10,<4", "psycopg[binary]>=3.2,<4"),
    "apscheduler": ("apscheduler>=3.11,<4", "sqlalchemy>=2.0,<2.2", "psycopg[binary]>=3.2,<4"),
    "huey": ("huey>=3.5,<4",),
    "dramatiq": ("dramatiq[redis]>=2.2,<3",),
    "celery": ("celery[redis]>=5.7,<6",),
}

PG, NORMAL, FULL = "future_jobs, PostgreSQL", "future_jobs, SQLite", "future_jobs, SQLite, synced"

SYSTEMS: tuple[System, ...] = (
    System(PG, "future_jobs", "postgresql", "psycopg, defaults", {"one": 1_000, "bulk": 20_000, "drain": 20_000}),
    System(
        "PgQueuer",
        "pgqueuer",
        "postgresql",
        "asyncpg, batch of 100, coroutine",
        {"one": 1_000, "bulk": 20_000, "drain": 20_000},
        {"batch": 100},
        PG,
        {"drain": 1.3},
    ),
    System(
        "Procrastinate",
        "procrastinate",
        "postgresql",
        "psycopg, concurrency 30, coroutine",
        {"one": 1_000, "bulk": 20_000, "drain": 1_000},
        {"concurrency": 30},
        PG,
    ),
    System(
        "APScheduler",
        "apscheduler",
        "postgresql",
        "psycopg, SQLAlchemy store, 10 threads",
        {"one": 1_000, "drain": 1_000},
        {"threads": 10},
        PG,
    ),
    System(
        NORMAL,
        "future_jobs",
        "sqlite",
        "`configure_sqlite`, defaults",
        {"one": 2_000, "bulk": 20_000, "drain": 20_000},
    ),
    System(
        "Huey, `fsync=False`",
        "huey",
        "sqlite",
        "SqliteHuey, 1 thread; a power cut can damage the file",
        {"one": 2_000, "drain": 20_000},
        {"fsync": False, "workers": 1},
        NORMAL,
    ),
    System(
        "APScheduler",
        "apscheduler",
        "sqlite",
        "WAL, `synchronous = NORMAL`, 10 threads",
        {"one": 2_000, "drain": 2_000},
        {"threads": 10},
        NORMAL,
    ),
    System(
        FULL,
        "future_jobs",
        "sqlite",
        "the same with `synchronous = FULL`",
        {"one": 2_000, "bulk": 20_000, "drain": 20_000},
        {"synchronous": "FULL"},
    ),
    System(
        "Huey",
        "huey",
        "sqlite",
        "SqliteHuey, defaults (synced), 2 threads",
        {"one": 2_000, "drain": 5_000},
        {"fsync": None, "workers": 2},
        FULL,
        {"drain": 8.0},
    ),
    System(
        "Dramatiq",
        "dramatiq",
        "redis",
        "8 threads; not durable",
        {"one": 2_000, "drain": 5_000},
        {"threads": 8},
        PG,
    ),
    System(
        "Celery, prefork",
        "celery",
        "redis",
        "1 process of a pool, prefetch 100, early acknowledgement; not durable",
        {"one": 2_000, "drain": 3_000},
        {"pool": "prefork", "prefetch": 100},
        PG,
    ),
    System(
        "Celery, solo",
        "celery",
        "redis",
        "in the worker's own process, prefetch 100, early acknowledgement; not durable",
        {"one": 2_000, "drain": 3_000},
        {"pool": "solo", "prefetch": 100},
        PG,
    ),
)
