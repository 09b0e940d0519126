"""Huey on an SQLite file: worker threads, each of which removes the row of a task before it runs it."""

from __future__ import annotations

from typing import Any

from huey import SqliteHuey
from huey.consumer import Consumer

from benchmarks.peers import protocol


def opened(target: str, options: dict[str, Any]) -> tuple:
    huey = SqliteHuey(filename=target.removeprefix("sqlite:///"), fsync=options["fsync"])
    return huey, huey.task()(nothing)


def nothing() -> None:
    protocol.ran()


def one(target: str, count: int, options: dict[str, Any]) -> float:
    _huey, task = opened(target, options)

    def work() -> None:
        for _ in range(count):
            task()

    return protocol.timed(work)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    huey, task = opened(target, options)
    for _ in range(count):
        task()
    protocol.watch(huey.pending_count)
    Consumer(huey, workers=options["workers"], worker_type="thread", periodic=False).run()


if __name__ == "__main__":
    protocol.main("huey", {"one": one, "drain": drain})
