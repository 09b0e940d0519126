"""Procrastinate on psycopg: a coroutine function, several at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

from benchmarks.peers import protocol


async def nothing() -> None:
    protocol.ran()


def opened(target: str) -> App:
    app = App(connector=SyncPsycopgConnector(conninfo=target))
    app.open()
    app.schema_manager.apply_schema()
    return app


def one(target: str, count: int, _options: dict[str, Any]) -> float:
    task = opened(target).task(name="nothing")(nothing)

    def work() -> None:
        for _ in range(count):
            task.defer()

    return protocol.timed(work)


def bulk(target: str, count: int, _options: dict[str, Any]) -> float:
    task = opened(target).task(name="nothing")(nothing)
    return protocol.timed(lambda: task.batch_defer(*[{} for _ in range(count)]))


async def run(target: str, concurrency: int) -> None:
    app = App(connector=PsycopgConnector(conninfo=target))
    app.task(name="nothing")(nothing)
    async with app.open_async():
        await app.run_worker_async(concurrency=concurrency)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    bulk(target, count, options)
    connection = psycopg.connect(target, autocommit=True)
    sql = "SELECT count(*) FROM procrastinate_jobs WHERE status <> 'succeeded'"
    protocol.watch(lambda: connection.execute(sql).fetchone()[0])
    asyncio.run(run(target, options["concurrency"]))


if __name__ == "__main__":
    protocol.main("procrastinate", {"one": one, "bulk": bulk, "drain": drain})
