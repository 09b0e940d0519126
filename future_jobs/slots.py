"""What a worker's slots are: lanes of jobs that wait for one, and the threads behind them.

Jobs that take no time get one thread for many of them: ten would only fight for the interpreter. If what it runs turns
out to take longer than it used to, the others start as well.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from time import monotonic
from typing import ParamSpec, TypeVar

from .errors import InvalidOption, shown
from .statements import Claimed, rank

__all__ = ["STALL_SECONDS", "Lane", "Threads", "lanes_of"]

P = ParamSpec("P")
T = TypeVar("T")

BATCH_SECONDS = 0.1  # claim what the slots can finish in about this time
LOW_SECONDS = 0.03  # and more of them once what is left lasts no longer than this, or is no more than half of it
BATCH_MOST = 2_000
TINY_SECONDS = 0.0002  # jobs this short are run one after the other
STALL_SECONDS = 0.01  # one of them that takes longer is overtaken by the others
CLOSED_SECONDS = 0.25  # so long may a lane be too busy to take a job that was lost before
LEARNING = 0.05  # the weight of one job in the moving average


class Lane:
    """One entry of a worker's ``queues``: how many of its jobs may run at once, and those that wait for a slot.

    Slots take from it without a lock: each `deque.popleft` gives a job to one of them. ``ring`` is called when it runs
    low, and when a slot is free again.
    """

    def __init__(self, slots: int, prefetch: int | None) -> None:
        self.slots = slots
        self.prefetch = prefetch
        self.busy = 0
        self.ring: Callable[[], None] = lambda: None
        self._waiting: deque[Claimed] = deque()
        self._lock = threading.Lock()
        self._average = BATCH_SECONDS
        self._is_new = True
        self._is_low = False  # and was said to be
        self._low = 0
        self._open_at = self._moved_at = monotonic()

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
        return (free, most - max(held, self.slots)) if held - self.busy <= self._lowest(most) else (free, 0)

    def add(self, rows: Iterable[Claimed]) -> None:
        """Let claimed jobs wait for a slot, the better priority first, then the earlier time."""
        with self._lock:
            if not self._waiting:
                self._moved_at = monotonic()
            merged = [*self._drained(), *rows]
            merged.sort(key=_order)
            self._low = self._lowest(self._most())
            self._waiting.extend(merged)
            self._is_low = False

    def hire(self) -> int:
        """Take as many free slots as what waits is worth; return how many."""
        with self._lock:
            wanted = len(self._waiting)
            if self._average < TINY_SECONDS and monotonic() - self._moved_at < STALL_SECONDS:
                wanted = min(wanted, 1 - self.busy)
            taken = max(0, min(self.slots - self.busy, wanted))
            self.busy += taken
            return taken

    def next(self) -> Claimed | None:
        """Return the next job for a slot; None, and the slot is free, if there is none."""
        while True:
            try:
                row = self._waiting.popleft()
            except IndexError:
                with self._lock:  # what waits may just be put in order
                    if self._waiting:
                        continue
                    self.busy -= 1
                self.ring()
                return None
            if len(self._waiting) <= self._low and not self._is_low:
                self._is_low = True
                self.ring()
            return row

    def take(self, seconds: float) -> list[Claimed]:
        """Take a free slot, and for it the next jobs: what takes so long together. Empty: no slot, or no job.

        What waits is shared by all free slots, however little each of its jobs takes.
        """
        with self._lock:
            free, waits = self.slots - self.busy, len(self._waiting)
            if free <= 0 or not waits:
                return []
            most = max(1, int(seconds / max(self._average, 1e-5)))
            rows = [self._waiting.popleft() for _ in range(min(most, math.ceil(waits / free)))]
            self.busy += 1
            is_low = len(self._waiting) <= self._low and not self._is_low
            self._is_low |= is_low
        if is_low:
            self.ring()
        return rows

    def enter(self) -> None:
        """Take a slot, even if none is free."""
        with self._lock:
            self.busy += 1

    def leave(self) -> None:
        """Free a slot."""
        with self._lock:
            self.busy -= 1
        self.ring()

    @property
    def may_stall(self) -> bool:
        """Whether jobs wait although slots are free: those of one that takes no time, as far as one knows."""
        return bool(self._waiting) and self.busy < self.slots

    def learn(self, seconds: float, count: int) -> None:
        """Take note of how long ``count`` jobs took together."""
        weight = 1 if self._is_new else 1 - (1 - LEARNING) ** count
        self._average += (seconds / count - self._average) * weight
        self._is_new = False
        self._moved_at = monotonic()

    def clear(self) -> list[Claimed]:
        """Return what waits, which does so no more."""
        with self._lock:
            return self._drained()

    def _drained(self) -> list[Claimed]:
        rows = []
        while True:
            try:
                rows.append(self._waiting.popleft())
            except IndexError:
                return rows

    def _most(self) -> int:
        if self.prefetch is not None:
            return self.slots + self.prefetch
        return max(self.slots, min(BATCH_MOST, self._count(BATCH_SECONDS)))

    def _lowest(self, most: int) -> int:
        return min(most // 2, self._count(LOW_SECONDS))

    def _count(self, seconds: float) -> int:
        """Return how many jobs the slots can finish in that time."""
        return int(self.slots * seconds / max(self._average, 1e-5))


def _order(row: Claimed) -> tuple[object, ...]:
    return rank(row.priority), row.run_at, row.id


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
