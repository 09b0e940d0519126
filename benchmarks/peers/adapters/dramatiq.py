"""Dramatiq on Redis: worker threads in one process."""

from __future__ import annotations

import threading
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.worker import Worker

from benchmarks.peers import protocol


def opened(target: str) -> tuple:
    broker = RedisBroker(url=target)
    dramatiq.set_broker(broker)
    return broker, dramatiq.actor(nothing)


def nothing() -> None:
    protocol.ran()


def one(target: str, count: int, _options: dict[str, Any]) -> float:
    _broker, actor = opened(target)

    def work() -> None:
        for _ in range(count):
            actor.send()

    return protocol.timed(work)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    broker, actor = opened(target)
    for _ in range(count):
        actor.send()
    protocol.watch(lambda: broker.client.hlen("dramatiq:default.msgs"))  # emptied by what acknowledges
    Worker(broker, worker_threads=options["threads"]).start()
    threading.Event().wait()


if __name__ == "__main__":
    protocol.main("dramatiq", {"one": one, "drain": drain})
