"""Celery on Redis: one process, that of a pool or its own; results ignored, acknowledged early, as by default."""

from __future__ import annotations

from typing import Any

import redis
from celery import Celery

from benchmarks.peers import protocol


def opened(target: str, options: dict[str, Any]) -> tuple:
    app = Celery("benchmarks", broker=target, set_as_current=True)
    app.conf.update(
        task_ignore_result=True, worker_prefetch_multiplier=options["prefetch"], worker_redirect_stdouts=False
    )
    return app, app.task(name="nothing")(nothing)


def nothing() -> None:
    protocol.ran()


def one(target: str, count: int, options: dict[str, Any]) -> float:
    _app, task = opened(target, options)

    def work() -> None:
        for _ in range(count):
            task.delay()

    return protocol.timed(work)


def drain(target: str, count: int, options: dict[str, Any]) -> None:
    app, task = opened(target, options)
    for _ in range(count):
        task.delay()
    client = redis.Redis.from_url(target)
    protocol.watch(lambda: client.llen("celery") + client.hlen("unacked"))
    switches = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel=WARNING"]
    app.worker_main(["worker", f"--pool={options['pool']}", "--concurrency=1", *switches])


if __name__ == "__main__":
    protocol.main("celery", {"one": one, "drain": drain})
