"""One worker process: ``python -m benchmarks.worker_process URL [SLOTS]``, told when to begin by lines of its input.

For each drain it is told twice: to connect, which it answers with "ready", and to run. SIGTERM ends the drain, and it
answers "stopped".
"""

from __future__ import annotations

import sys

from sqlalchemy import make_url

from benchmarks.databases import engine_on
from future_jobs import Worker


def main(url: str, slots: str | None = None) -> None:
    """Serve until the input ends."""
    engine = engine_on(make_url(url))
    queues = None if slots is None else {"default": int(slots)}
    while sys.stdin.readline():
        worker = Worker(engine, queues=queues)
        worker.tick()  # nothing is due yet: it connects, and looks
        print("ready", flush=True)
        sys.stdin.readline()
        worker.run()
        print("stopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
