"""What a worker's slots are: lanes of jobs that wait for one, and the threads behind them."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from datetime import datetime
from queue import SimpleQueue
from time import monotonic
from typing import ParamSpec, TypeVar

from .errors import InvalidOption, shown
from .statements import Claimed

__all__ = ["Lane", "Threads", "lanes_of"]

P = ParamSpec("P")
T = TypeVar("T")

BATCH_SECONDS = 0.1  # claim what the slots can finish in about this time
BATCH_MOST = 500
CLOSED_SECONDS = 1.0  # so long may a lane be too busy to take a job that was lost before


class Lane:
    """One entry of a worker's ``queues``: how many of its jobs may run at once, and those that wait for a slot.

    Not safe by itself: its worker holds a lock.
    """

    def __init__(self, slots: int, prefetch: int | None) -> None:
        self.slots = slots
        self.prefetch = prefetch
        self.busy = 0
        self._waiting: list[tuple[int, datetime, int, Claimed]] = []  # a heap: priority, then time
        self._average = BATCH_SECONDS
        self._is_new = True
        self._open_at = monotonic()

    def room(self) -> tuple[int, int]:
        """Return how many jobs the free slots can take, and how many it is worth to hold ahead of these.

        Nothing is held ahead once for a while no slot was free: a job that was lost before is only claimed for one that
        is, and would never be.
        """
        held = self.busy + len(self._waiting)
        free = max(0, self.slots - held)
        now = monotonic()
        if free:
            self._open_at = now
        elif now - self._open_at > CLOSED_SECONDS:
            return 0, 0
        most = self._most()
        return (free, most - max(held, self.slots)) if held <= most // 2 else (free, 0)

    def add(self, rows: Iterable[Claimed]) -> None:
        """Let claimed jobs wait for a slot."""
        for row in rows:
            heapq.heappush(self._waiting, (-row.priority, row.run_at, row.id, row))

    def take_slots(self) -> int:
        """Take the free slots for which there is something to do; return how many."""
        taken = max(0, min(self.slots - self.busy, len(self._waiting)))
        self.busy += taken
        return taken

    def next(self) -> Claimed | None:
        """Return the next job for a slot; None, and the slot is free, if there is none."""
        if self._waiting:
            return heapq.heappop(self._waiting)[-1]
        self.busy -= 1
        return None

    def is_low(self) -> bool:
        """Tell, once, that it is time to claim more."""
        return self.busy + len(self._waiting) == self._most() // 2

    def learn(self, seconds: float) -> None:
        """Take note of how long a job took."""
        self._average += (seconds - self._average) * (1 if self._is_new else 0.05)
        self._is_new = False

    def clear(self) -> list[Claimed]:
        """Return what waits, which does so no more."""
        waiting, self._waiting = [entry[-1] for entry in self._waiting], []
        return waiting

    def _most(self) -> int:
        if self.prefetch is not None:
            return self.slots + self.prefetch
        return max(self.slots, min(BATCH_MOST, int(self.slots * BATCH_SECONDS / max(self._average, 1e-5))))


def lanes_of(queues: Mapping[str, int], prefetch: int | None) -> dict[str, Lane]:
    """Return a lane for each queue; raise `InvalidOption` for a number of slots that is none."""
    if prefetch is not None and (isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0):
        raise InvalidOption(
            f"prefetch is {shown(prefetch)}; pass a whole number, or None", argument="prefetch", value=prefetch
        )
    for name, slots in queues.items():
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1 or not isinstance(name, str):
            raise InvalidOption(
                f"queues has {shown(name)}: {shown(slots)}; pass names and numbers such as {{'mail': 4, '*': 10}}",
                argument="queues",
                value=queues,
            )
    return {name: Lane(slots, prefetch) for name, slots in queues.items()}


class Threads(Executor):
    """Threads that do not keep the process from ending.

    Those of a ThreadPoolExecutor are joined when Python exits: a job that hangs would keep a worker, which was told to
    stop and has handed the job back, from ever doing so.
    """

    def __init__(self, most: int, *, name: str) -> None:
        self._most = most
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call ``fn`` in one of the threads."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._work.put(work)
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, name=f"{self._name} {len(self._threads) + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """End the threads, each after what it does now."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            self._idle.release()
