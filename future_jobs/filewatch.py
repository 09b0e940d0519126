"""Notices that a file is written, without looking at it: by inotify, where the kernel is Linux.

It is told of writes by processes under the same kernel only, and of each as soon as it begins: what it meant to write
may not be complete, and is looked for by whoever was told.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["FileWatch", "watching"]

_IN_MODIFY = 0x2  # <sys/inotify.h>; the flags of inotify_init1 are those of open()
_MOST_BYTES = 1 << 16


class FileWatch:
    """Files, of which some need not exist, that somebody may write to."""

    def __init__(self, libc: ctypes.CDLL, inotify: int, paths: Iterable[str], bell: int) -> None:
        self._libc = libc
        self._inotify = inotify
        self._paths = [os.fsencode(path) for path in paths]
        self._poll = select.poll()
        for descriptor in (inotify, bell):
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Return whether one was written since the last call; after ``seconds``, or when the bell rings, False."""
        for path in self._paths:  # the same one again costs next to nothing; it may be another file by now
            self._libc.inotify_add_watch(self._inotify, path, _IN_MODIFY)
        told = [descriptor for descriptor, _ in self._poll.poll(1000 * seconds)]
        return self._inotify in told and bool(os.read(self._inotify, _MOST_BYTES))


@contextmanager
def watching(paths: Iterable[str], *, bell: int) -> Iterator[FileWatch | None]:
    """Yield what watches these files; None where the system cannot, or has none to spare. ``bell``: a descriptor."""
    libc = _libc()
    inotify = -1 if libc is None else libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if libc is None or inotify < 0:
        yield None
        return
    try:
        yield FileWatch(libc, inotify, paths, bell)
    finally:
        os.close(inotify)


@cache
def _libc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "inotify_init1") else None
