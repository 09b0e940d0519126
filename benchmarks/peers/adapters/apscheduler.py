"""APScheduler 3: a thread pool and the SQLAlchemy job store; on SQLite, with the pragmas that ours is given."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy import create_engine, event, text

from benchmarks.peers import protocol


def nothing() -> None:
    protocol.ran()


def opened(target: str, options: dict[str, Any]) -> tuple:
    engine = create_engine(target.replace("postgresql:", "postgresql+psycopg:"))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: object, _record: object) -> None:
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "busy_timeout = 30000"):
                connection.execute(f"PRAGMA {pragma}")

    scheduler = BackgroundScheduler(
        jobstores={"default": SQLAlchemyJobStore(engine=engine)},
        executors={"default": ThreadPoolExecutor(options["threads"])},
        job_defaults={"misfire_grace_time": None},
        timezone=UTC,
    )
    scheduler.start(paused=True)
    return engine, scheduler


def enqueue(scheduler: BackgroundScheduler, count: int) -> float:
    due = datetime.now(UTC)

    def work() -> None:
        for _ in range(count):
            scheduler.add_job("benchmarks.peers.adapters.apscheduler:nothing", "date", run_date=due)

    return protocol.timed(work)


def one(target: str, count: int, options: dict[str, Any]) -> float:
    return enqueue(opened(target, options)[1], count)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    engine, scheduler = opened(target, options)
    enqueue(scheduler, count)

    def left() -> int:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT count(*) FROM apscheduler_jobs"))

    protocol.watch(left)
    scheduler.resume()
    threading.Event().wait()


if __name__ == "__main__":
    protocol.main("apscheduler", {"one": one, "drain": drain})
