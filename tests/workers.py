"""Real worker processes for tests.

Run as ``python -m tests.workers URL LEASE_SECONDS SLOTS``: a worker that tells what happens, a line of JSON each, until
it is told to stop.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

from sqlalchemy.orm import Session

from future_jobs import Worker, current_job, events
from tests.processes import LEDGER
from tests.shop import Letter

ROOT = Path(__file__).parent.parent
HELD = "FUTURE_JOBS_TEST_HELD"
READING = threading.Lock()  # a text stream is for one thread at a time


class Process:
    """A worker in a process of its own."""

    def __init__(
        self, url: str, lease: float, *, slots: int = 4, held: bool = False, ledger: Path | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers", url, str(lease), str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), HELD: "yes" if held else "", LEDGER: str(ledger or "")},
            cwd=ROOT,
        )
        self._watchdog = threading.Timer(120, self.process.kill)  # so that a test fails instead of waiting for ever
        self._watchdog.daemon = True
        self._watchdog.start()
        self.wait_for("started")

    def wait_for(self, event: str, *, number: int = 1) -> dict:
        """Read what it tells until it tells ``event``."""
        for line in self.process.stdout:
            told = json.loads(line)
            if told["event"] == event:
                number -= 1
                if not number:
                    return told
        raise AssertionError(f"it ended with {self.process.wait()} before it told {event}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def let_go(self) -> None:
        """Let the handlers that are held go on."""
        self.process.stdin.write("go\n" * 20)
        self.process.stdin.flush()

    def wait(self) -> int:
        for _ in self.process.stdout:
            pass
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self._watchdog.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def tell(event: str, **data: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **data}, default=str) + "\n")
    sys.stdout.flush()


# --- handlers -----------------------------------------------------------------------------------------------------


def write_once(session: Session) -> None:
    """Write a letter for this attempt; two of one job would be two attempts that both committed."""
    job = current_job()
    tell("began", job_id=job.id, attempt=job.attempt)
    if os.environ.get(HELD):
        with READING:
            sys.stdin.readline()
    session.add(Letter(text=f"{job.id}:{job.attempt}"))


def main() -> None:
    url, lease, slots = sys.argv[1:]
    for name in ("started", "completed", "lost", "released", "rescued", "stopped"):
        events.listen(name, lambda name=name, **data: tell(name, job_id=data.get("job_id")))
    seconds = timedelta(seconds=float(lease))
    Worker(url, queues={"default": int(slots)}, lease=seconds, poll=timedelta(seconds=0.2)).run(timeout="20s")


if __name__ == "__main__":
    main()
