"""What a commit tells workers elsewhere: LISTEN and NOTIFY, and the words of a notification."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

from sqlalchemy import bindparam, func, select, text
from sqlalchemy.engine import Connection

from .options import checked_word
from .statements import Level

__all__ = ["levels_in", "listen", "notify"]

CHANNEL = "future_jobs"
MOST_BYTES = 7_999  # of a payload: https://www.postgresql.org/docs/current/sql-notify.html
MOST_PRIORITY = 1 << 15  # of a SMALLINT

_NOTIFY = select(func.pg_notify(CHANNEL, bindparam("payload")))


def notify(connection: Connection, levels: Sequence[Level]) -> None:
    """Tell the workers that listen of ``levels``, or to look, when the transaction commits; no table."""
    told = [[level.queue, level.priority, level.first_at.isoformat(), level.limited] for level in levels]
    payload = json.dumps(told, separators=(",", ":")) if told else ""
    connection.execute(_NOTIFY, {"payload": payload if len(payload) <= MOST_BYTES else ""})


def levels_in(payload: str) -> list[Level]:
    """Return the levels that a notification tells of; none, if one is to look, or anybody else has sent it."""
    with suppress(ValueError, TypeError, RecursionError):  # what others write may be anything
        return [_level(*each) for each in json.loads(payload)]
    return []


def _level(queue: str, priority: int, first_at: str, limited: bool) -> Level:
    at = datetime.fromisoformat(first_at)
    if type(priority) is not int or not -MOST_PRIORITY <= priority < MOST_PRIORITY or at.utcoffset() is None:
        raise ValueError("this is not of the library")
    return Level(checked_word("queue", queue), priority, at, bool(limited))


def listen(connection: Connection) -> None:
    """Let ``connection`` hear of `notify`; no table."""
    connection.execute(text(f"LISTEN {CHANNEL}"))
