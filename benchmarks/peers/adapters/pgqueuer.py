"""PgQueuer on asyncpg, with an entry point that is a coroutine function."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

from benchmarks.peers import protocol


async def opened(target: str) -> Queries:
    queries = Queries(AsyncpgDriver(await asyncpg.connect(target)))
    await queries.install()
    return queries


async def enqueue(target: str, count: int, _options: dict[str, Any]) -> float:
    queries = await opened(target)
    began = asyncio.get_running_loop().time()
    for _ in range(count):
        await queries.enqueue("nothing", None)
    return asyncio.get_running_loop().time() - began


async def enqueue_all(target: str, count: int, _options: dict[str, Any]) -> float:
    queries = await opened(target)
    began = asyncio.get_running_loop().time()
    await queries.enqueue(["nothing"] * count, [None] * count, [0] * count)
    return asyncio.get_running_loop().time() - began


async def work(target: str, count: int, options: dict[str, Any]) -> None:
    await enqueue_all(target, count, options)
    pgq = PgQueuer.from_asyncpg_connection(await asyncpg.connect(target))

    @pgq.entrypoint("nothing")
    async def nothing(_job: Any) -> None:
        protocol.ran()

    async def left() -> int:
        connection = await asyncpg.connect(target)
        try:
            return await connection.fetchval("SELECT count(*) FROM pgqueuer")
        finally:
            await connection.close()

    protocol.watch(lambda: asyncio.run(left()))
    await pgq.run(batch_size=options["batch"], dequeue_timeout=timedelta(seconds=30))


if __name__ == "__main__":
    protocol.main(
        "pgqueuer",
        {
            "one": lambda *values: asyncio.run(enqueue(*values)),
            "bulk": lambda *values: asyncio.run(enqueue_all(*values)),
            "drain": lambda *values: asyncio.run(work(*values)),
        },
    )
