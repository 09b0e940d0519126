"""How an adapter measures, and what it says: the standard library alone, for it runs in the environment of each peer.

``python -m benchmarks.peers.adapters.NAME WORK COUNT TARGET OPTIONS`` does one of `WORKS` and prints a `Report`, as one
line of JSON, the last of its output. ``OPTIONS`` is a JSON object.

A drain lasts from the first run of the job to the moment at which the last has run and the store shows nothing
unfinished. What a worker does before, from importing to connecting, is not counted, for anyone.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from typing import Any

WORKS = ("one", "bulk", "drain")  # enqueue one a transaction; many at once; run what is enqueued
POLL_SECONDS = 0.002

_distribution = ""
_expected = 0
_numbers = count(1)
_times = mmap.mmap(-1, 16)  # of the first run and of the last; shared with forked children


@dataclass(frozen=True, slots=True)
class Report:
    """How long a work took."""

    seconds: float
    count: int
    version: str

    @property
    def rate(self) -> float:
        """How many a second."""
        return self.count / self.seconds


def parse(output: str) -> Report:
    """Return the report that ends an adapter's output; raise `ValueError` if none does."""
    lines = output.strip().splitlines()
    try:
        report = Report(**json.loads(lines[-1]))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"no report, but {lines[-1:]}") from error
    if not (report.count > 0 and report.seconds > 0):
        raise ValueError(f"a report of nothing: {report}")
    return report


def main(distribution: str, works: Mapping[str, Callable[..., float | None]]) -> None:
    """Do what the command line says.

    A work takes the target, the count and the options. It returns its seconds, or has called `watch` and never returns.
    """
    global _distribution, _expected
    work, number, target, options = sys.argv[1:]
    _distribution, _expected = distribution, int(number)
    seconds = works[work](target, int(number), json.loads(options))
    if seconds is None:
        sys.exit(f"the worker of {distribution} ended by itself")
    _tell(seconds)


def timed(work: Callable[[], Any]) -> float:
    """Return how long it takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def ran() -> None:
    """Note that a job ran: the whole of what each job does."""
    number = next(_numbers)
    if number == 1:
        _times[:8] = struct.pack("d", time.monotonic())
    if number == _expected:
        _times[8:] = struct.pack("d", time.monotonic())


def watch(unfinished: Callable[[], int]) -> None:
    """Report, from a thread, and end the process, as soon as all have run and ``unfinished()`` is 0."""

    def work() -> None:
        while not any(_times[8:]):
            time.sleep(POLL_SECONDS)
        while unfinished():
            time.sleep(POLL_SECONDS)
        _tell(time.monotonic() - struct.unpack("d", _times[:8])[0])

    threading.Thread(target=work, daemon=True).start()


def _tell(seconds: float) -> None:
    print(json.dumps(asdict(Report(seconds, _expected, version(_distribution)))), flush=True)
    os._exit(0)  # a worker that is still at work is not asked to stop
