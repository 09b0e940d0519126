"""future_jobs: a Worker with its defaults; on SQLite, an engine set up by `configure_sqlite`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select
from sqlalchemy.orm import Session

from benchmarks.peers import protocol
from future_jobs import ScheduledJob, Scheduler, Worker, configure_sqlite, create_tables


def nothing() -> None:
    protocol.ran()


JOB = "benchmarks.peers.adapters.future_jobs.nothing"


def opened(target: str, options: dict[str, Any]) -> Engine:
    engine = configure_sqlite(create_engine(target.replace("postgresql:", "postgresql+psycopg:")))
    if synchronous := options.get("synchronous"):
        event.listen(engine, "connect", lambda each, _: each.execute(f"PRAGMA synchronous = {synchronous}"))
    create_tables(engine)
    return engine


def one(target: str, count: int, options: dict[str, Any]) -> float:
    with Session(opened(target, options)) as session:
        scheduler = Scheduler(session)

        def work() -> None:
            for _ in range(count):
                scheduler.enqueue(JOB)
                session.commit()

        return protocol.timed(work)


def bulk(target: str, count: int, options: dict[str, Any]) -> float:
    with Session(opened(target, options)) as session:
        scheduler = Scheduler(session)

        def work() -> None:
            scheduler.schedule_many("0s", JOB, [{"args": []} for _ in range(count)])
            session.commit()

        return protocol.timed(work)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    bulk(target, count, options)
    engine = opened(target, options)
    unfinished = select(func.count()).where(ScheduledJob.status != "complete")

    def left() -> int:
        with engine.connect() as connection:
            return connection.scalar(unfinished) or 0

    protocol.watch(left)
    Worker(engine).run()


if __name__ == "__main__":
    protocol.main("future-jobs", {"one": one, "bulk": bulk, "drain": drain})
