"""How a handler is stopped from outside: when its timeout is over, or when its job was cancelled.

A coroutine is cancelled, as asyncio does it. A function runs in a thread, and Python can raise an exception in another
thread, before its next bytecode. That must hit the handler, and nothing that the thread does afterwards. So the watch
raises it behind a gate, which the thread closes for good when the handler has returned, and takes back what is on its
way.

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
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from .dialects import DRIVERS
from .errors import JobTimeout

__all__ = ["Deadlines", "Interrupted", "InterruptedAlone", "Interruption"]

T = TypeVar("T")

DELICATE = DRIVERS | {"sqlalchemy", "logging", "threading", "queue"}
DELICATE |= {"importlib", "_frozen_importlib", "_frozen_importlib_external"}
PATIENCE = 0.2  # seconds that something delicate may take
AGAIN_SECONDS = 0.001
REPEAT_SECONDS = 1.0  # after which it is raised once more, if the handler goes on
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
        self._gate = threading.Lock()  # held by whoever raises it, or makes sure that nobody does any more
        self._thread = 0
        self._is_armed = False
        self._is_async = False
        self._task: tuple[AbstractEventLoop, Task[Any]] | None = None

    def limit(self, call: Callable[[], T], seconds: float, deadlines: Deadlines) -> T:
        """Return what ``call`` returns; raise `JobTimeout` if it has not returned after so many ``seconds``."""
        deadlines.add(self, seconds)
        try:
            self._thread = threading.get_ident()
            self._is_armed = True
            try:
                result = call()
            finally:
                self._disarm()
        except (Exception, Interrupted, CancelledError) as error:
            self._disarm()  # it may have been this that was interrupted
            raised = getattr(error, "orig", None) or error  # SQLAlchemy wraps what comes in the middle of a statement
            if not (self.is_late and isinstance(raised, Interrupted | InterruptedAlone | CancelledError)):
                raise
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
        return self._is_armed and _is_delicate(self._thread)

    def expire(self) -> bool:
        """Stop it, since its time is over; tell whether that may have to be done again.

        What is raised may be swallowed: in a finalizer, or by the handler. Nothing happens if it has just returned.
        """
        with self._gate:
            if self._is_armed:
                self.is_late = True
                _raise_in(self._thread, self._kind)
                return True
        if self._is_async:
            self.is_late = True
            self.cancel()
        return False

    def _disarm(self) -> bool:
        """Make sure that nothing is raised in this thread from now on; tell whether nothing was.

        What is raised in here is swallowed.
        """
        while self._is_armed:
            with suppress(self._kind), self._gate:
                self._is_armed = False
                _raise_in(threading.get_ident(), None)
        return not self.is_late


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
                    if run.expire():
                        self._ends[run] = monotonic() + REPEAT_SECONDS
                    else:
                        del self._ends[run]
                ends = [end for run, end in self._ends.items() if run not in waits]
                self._looks_at = min([now + (AGAIN_SECONDS if waits else LONGEST_LOOK), *ends])
                was_called = self._changed.wait(self._looks_at - now)
                if not (was_called or self._ends):
                    self._thread = None
                    return
