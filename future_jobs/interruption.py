"""How a handler is stopped from outside: when its timeout is over, or when its job was cancelled.

A coroutine is cancelled, as asyncio does it. A function runs in a thread, and Python can raise an exception in another
thread, before its next bytecode. That must hit the handler, and nothing that the thread does afterwards. So there is
one right to raise it, which is taken by whoever comes first: the watch, when the time is over; or the thread, when the
handler has returned. If the watch was first, the thread waits until the exception is on its way, and takes it back if
it has not been raised by then.

Nor should it hit what is delicate: an import, a lock, SQLAlchemy or a driver in the middle of a statement. The watch
looks at what the thread does, and waits a moment for it to be in the handler's own code. That is not exact, and need
not be.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from asyncio import AbstractEventLoop, CancelledError, Task
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from traceback import clear_frames
from typing import Any, TypeVar

from .dialects import DRIVERS
from .errors import JobTimeout

__all__ = ["Deadlines", "Interrupted", "InterruptedAlone", "Interruption"]

T = TypeVar("T")

DELICATE = DRIVERS | {"sqlalchemy", "logging", "threading", "queue"}
DELICATE |= {"importlib", "_frozen_importlib", "_frozen_importlib_external"}
PATIENCE = 0.2  # seconds that something delicate may take
AGAIN_SECONDS = 0.001
LONGEST_LOOK = 5.0  # seconds from one look to the next, and for which a watch with nothing to do stays


class Interrupted(BaseException):
    """Raised in the thread of a handler whose timeout is over; its attempt fails with `JobTimeout`.

    Not an `Exception`, so that ``except Exception`` does not swallow it, and that SQLAlchemy gives up a connection on
    which a statement was broken off.
    """


class InterruptedAlone(Exception):
    """The same where the database is one connection, which must not be given up: an in-memory database is lost with it.

    Neither is it a TimeoutError: SQLAlchemy gives up connections for those as well.
    """


class Interruption:
    """One run of a handler, as those see it who may have to stop it.

    ``kind`` is what is raised in its thread.
    """

    def __init__(self, kind: type[BaseException] = Interrupted) -> None:
        self.is_late = False  # its time is over, and it was told so
        self._kind = kind
        self._right: deque[int] = deque()  # to raise it in this thread; `deque.pop` gives it to one alone
        self._is_armed = False  # as the thread itself knows
        self._is_raised = False
        self._is_async = False
        self._task: tuple[AbstractEventLoop, Task[Any]] | None = None

    def limit(self, call: Callable[[], T], seconds: float, deadlines: Deadlines) -> T:
        """Return what ``call`` returns; raise `JobTimeout` if it has not returned after so many ``seconds``."""
        deadlines.add(self, seconds)
        try:
            self._is_armed = True
            self._right.append(threading.get_ident())
            try:
                result = call()
            finally:
                self._disarm()
        except (Interrupted, InterruptedAlone, CancelledError) as error:
            if not self.is_late:
                raise
            _let_go(error)
            raise JobTimeout(seconds).with_traceback(error.__traceback__) from None
        finally:
            deadlines.remove(self)
        if self.is_late:  # it swallowed the exception, which may have hit it anywhere
            raise JobTimeout(seconds)
        return result

    def hand_over(self) -> None:
        """Say that from now on it is a task that is to be stopped; `follow` will say which."""
        self._is_async = True
        if not self._disarm():
            raise self._kind

    def follow(self, loop: AbstractEventLoop, task: Task[Any], *, is_asked: bool) -> None:
        """Let ``task`` be what is stopped; at once if it ``is_asked`` to stop already, or is late."""
        self._task = loop, task
        if is_asked or self.is_late:
            task.cancel()

    def cancel(self) -> None:
        """Cancel the task, if it is one."""
        if self._task is not None:
            loop, task = self._task
            with suppress(RuntimeError):  # the loop is closed: it has ended
                loop.call_soon_threadsafe(task.cancel)

    def is_delicate(self) -> bool:
        """Tell whether it is in the middle of something that had better not be broken off."""
        return any(map(_is_delicate, self._right.copy()))

    def expire(self) -> None:
        """Stop it, since its time is over; nothing happens if it has just returned."""
        try:
            thread = self._right.pop()
        except IndexError:
            if self._is_async:
                self.is_late = True
                self.cancel()
            return
        self.is_late = True
        _raise_in(thread, self._kind)
        self._is_raised = True

    def _disarm(self) -> bool:
        """Make sure that nothing is raised in this thread from now on; tell whether nothing was.

        What is raised in here is swallowed: it is the only one.
        """
        was_first = True
        while self._is_armed:
            try:
                try:
                    self._right.pop()
                except IndexError:
                    was_first = False
                    while not self._is_raised:
                        sleep(0.0001)
                    _raise_in(threading.get_ident(), None)
                self._is_armed = False
            except self._kind:
                was_first = False
        return was_first


def _is_delicate(thread: int) -> bool:
    frame = sys._current_frames().get(thread)  # noqa: SLF001 (documented, "for specialized purposes")
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == __name__:
            return False
        if name.partition(".")[0] in DELICATE:
            return True
        frame = frame.f_back
    return False


def _let_go(error: BaseException | None) -> None:
    """Forget what the frames held that were broken off: a cursor among it would keep the lock of an SQLite file."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Let ``kind`` be raised in ``thread`` before its next bytecode; None takes back what was not raised yet."""
    what = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


class Deadlines:
    """Ends what runs for too long, from a thread that is there only while there is something to watch."""

    def __init__(self) -> None:
        self._ends: dict[Interruption, float] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._looks_at = math.inf  # when the thread looks next

    def add(self, run: Interruption, seconds: float) -> None:
        """End ``run`` in so many ``seconds``."""
        end = monotonic() + seconds
        with self._changed:
            self._ends[run] = end
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="future_jobs timeouts", daemon=True)
                self._thread.start()
            elif end < self._looks_at:
                self._changed.notify()

    def remove(self, run: Interruption) -> None:
        """Forget ``run``, which has ended."""
        with self._changed:
            self._ends.pop(run, None)

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = monotonic()
                late = {run: end for run, end in self._ends.items() if end <= now}
                waits = {run for run, end in late.items() if now - end < PATIENCE and run.is_delicate()}
                for run in late.keys() - waits:
                    del self._ends[run]
                    run.expire()
                ends = [end for run, end in self._ends.items() if run not in waits]
                self._looks_at = min([now + (AGAIN_SECONDS if waits else LONGEST_LOOK), *ends])
                was_called = self._changed.wait(self._looks_at - now)
                if not (was_called or self._ends):
                    self._thread = None
                    return
