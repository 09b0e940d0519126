"""A store of its own for each measurement, made new and dropped after."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.databases import answers, made

REDIS = ("127.0.0.1", 6379)


def is_there(store: str) -> bool:
    """Tell whether this store can be had here."""
    if store != "redis":
        return answers(store)
    try:
        return _redis(0, "PING") == "+PONG"
    except OSError:
        return False


@contextmanager
def fresh(store: str) -> Iterator[str]:
    """Yield the URL of an empty store, in the form that all drivers read."""
    if store != "redis":
        with made(store) as url:
            yield url.set(drivername=store).render_as_string(hide_password=False)
        return
    number = next(each for each in range(15, 0, -1) if _redis(each, "DBSIZE") == ":0")
    try:
        yield f"redis://{REDIS[0]}:{REDIS[1]}/{number}"
    finally:
        _redis(number, "FLUSHDB")


def _redis(number: int, command: str) -> str:
    with socket.create_connection(REDIS, timeout=5) as connection:
        connection.sendall(f"SELECT {number}\r\n{command}\r\nQUIT\r\n".encode())
        return connection.makefile().read().splitlines()[1]
