"""Real worker processes that start in milliseconds, so that hundreds can be killed.

Run as ``python -m tests.crash.processes URL``: for each line of JSON on its standard input it forks a worker, and
prints its process id. The children use the library as an application does; what they were told to do wrong, or which
time it is for them, is put into them before. When the input ends all of them are killed. None is reaped before, so that
no id is used anew while somebody may still send a signal to it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from sqlalchemy import create_engine, update

from future_jobs import Worker, configure_sqlite, events, statements, times
from future_jobs.statements import JOBS, J
from tests.crash import ledger


def weaken(guard: str) -> None:
    """Let finishes be guarded by less than the token: the id alone, or the id and the status."""

    def move(connection, token, source, values, *conditions):
        kept = [J.id == token.id] if guard == "id" else [J.id == token.id, J.status == source, *conditions]
        return connection.execute(update(JOBS).where(*kept).values(**values)).rowcount == 1

    statements.move = move


def shift(seconds: float) -> None:
    """Let the clock on the wall be wrong, for this process; `times` is the one room that looks at it."""
    real_now, real_time = times.utc_now, time.time

    def utc_now():
        return real_now() + timedelta(seconds=seconds)

    for module in list(sys.modules.values()):
        if getattr(module, "utc_now", None) is real_now:
            module.utc_now = utc_now
    time.time = lambda: real_time() + seconds


def work(spec: dict) -> None:
    for name in ("started", "lost", "rescued", "released", "degraded", "recovered"):
        events.listen(name, lambda name=name, **data: ledger.note(name, data.get("job_id", 0), data.get("attempt", 0)))
    if spec["guard"]:
        weaken(spec["guard"])
    if spec["clock"] and spec["url"].startswith("sqlite"):
        # It has no clock but that of its host, which all of its workers share; what can happen is that it jumps.
        events.listen("started", lambda **_: shift(spec["clock"]))
    elif spec["clock"]:
        shift(spec["clock"])
    worker = Worker(
        configure_sqlite(create_engine(spec["url"])),
        queues={"default": spec["slots"]},
        lease=timedelta(seconds=spec["lease"]),
        poll=timedelta(seconds=spec["poll"]),
    )
    worker.run(timeout="20s")


def main() -> None:
    create_engine(sys.argv[1]).dispose()  # the driver, too, is loaded before the first is born
    children = []
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                null = os.open(os.devnull, os.O_RDWR)
                log = os.open(Path(os.environ[ledger.FOLDER], f"{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT)
                for source, target in ((null, 0), (null, 1), (log, 2)):
                    os.dup2(source, target)
                work(json.loads(line))
                status = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        children.append(child)
        print(child, flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
