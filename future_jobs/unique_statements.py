"""Every SQL statement about jobs with a unique key, one function each. uq_future_jobs_unique_slot decides.

A waiting job occupies the slot of its key, and so does a running one that keeps the key until it is finished. The index
allows one job in a slot, in whatever order transactions come. A statement that meets the job of a transaction which has
not ended waits for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

from sqlalchemy import CursorResult, Select, bindparam, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.sql.dml import Insert

from . import bulk, statements
from .dialects import (
    IN_USE,
    MYSQL,
    POSTGRESQL,
    Backend,
    backend_of,
    in_line,
    insert_if_free,
    is_lock_error,
    is_repeatable,
    keeps_snapshot,
)
from .models import ScheduledJob
from .statements import JOBS, KEEPS_ITS_KEY, RUNNING, WAITING, J, Token
from .status import Status

__all__ = ["Put"]

TRIES = 10  # who has the key may end, and another take it, between two statements


class Put(NamedTuple):
    """What became of a row: a new job, the waiting job it was written over, or nothing, as a job has its key.

    ``job_id`` is that job; None if this transaction does not see it.
    """

    job_id: int | None
    status: str = Status.SCHEDULED
    is_new: bool = False
    is_replaced: bool = False

    @property
    def known_id(self) -> int:
        """The job, where there is one that this transaction sees."""
        assert self.job_id is not None
        return self.job_id


class Holder(NamedTuple):
    """The job that has a key."""

    id: int
    status: str


# --- adding -------------------------------------------------------------------------------------------------------


def put(connection: Connection, row: Mapping[str, Any], *, replacing: bool = False) -> Put:
    """Insert the job of ``row`` if its key is free; if a job waits that has it, ``replacing`` writes the row over that.

    The transaction stays usable, whichever it is.
    """
    if not (backend_of(connection) is POSTGRESQL and keeps_snapshot(connection)):
        return _put(connection, row, replacing=replacing)
    try:
        with connection.begin_nested():
            return _put(connection, row, replacing=replacing)
    except DBAPIError as error:
        if not is_lock_error(error):
            raise
        return Put(None)  # a job that is newer than the snapshot of this transaction


def _put(connection: Connection, row: Mapping[str, Any], *, replacing: bool) -> Put:
    key = row["unique_key"]
    for _ in range(TRIES):
        found = _seen(connection, key, replacing) if backend_of(connection) is MYSQL else None
        if found is None:
            job_id, is_new = _insert(connection, row)
            if is_new:
                return Put(job_id, is_new=True)
            found = (
                _by_id(connection, row["unique_key"], job_id, _LOCKED)
                if job_id
                else holder(connection, row["unique_key"])
            )
        if found is None:
            continue
        if not replacing or found.status != Status.SCHEDULED:
            return Put(found.id, found.status)
        if _replace(connection, found.id, row):
            return Put(found.id, is_replaced=True)
    return Put(None)


def _seen(connection: Connection, key: str, replacing: bool) -> Holder | None:
    """Return who has ``key``, as far as an INSERT is not needed to find out.

    That of InnoDB locks the index first and then the row; a claim locks them the other way round.
    """
    found = holder(connection, key)
    if found is None or not is_repeatable(connection):
        return found
    return _by_id(connection, key, found.id, _LOCKED if replacing else _SHARED)


def holder(connection: Connection, key: str) -> Holder | None:
    """Return the job in the slot of ``key``."""
    row = connection.execute(_HOLDER, {"key": key}).first()
    return None if row is None else Holder(*row)


_HOLDER = select(J.id, J.status).where(J.unique_slot == bindparam("key"))


def _by_id(connection: Connection, key: str, job_id: int, statement: Select[Any]) -> Holder | None:
    # Primary key. The latest that was committed, whatever this transaction sees otherwise.
    row = connection.execute(statement, {"key": key, "_id": job_id}).first()
    return None if row is None else Holder(*row)


_LOCKED = _HOLDER.where(J.id == bindparam("_id")).with_for_update()
_SHARED = _HOLDER.where(J.id == bindparam("_id")).with_for_update(read=True)


def _insert(connection: Connection, row: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Insert a row if its key is free; return its id, or that of the one which has the key, and whether it is new."""
    backend = backend_of(connection)
    with in_line(connection, row["unique_key"]):
        result = cast("CursorResult[Any]", connection.execute(_if_free(backend), statements.inserted(row)))
    if backend is not MYSQL:
        job_id = result.scalar()
        return job_id, job_id is not None
    job_id = result.lastrowid
    return (job_id, True) if job_id < IN_USE else (job_id - IN_USE, False)


@cache
def _if_free(backend: Backend) -> Insert:
    return insert_if_free(backend, JOBS, "unique_slot")


def _replace(connection: Connection, job_id: int, row: Mapping[str, Any]) -> bool:
    """Write ``row`` over a job that waits with the same key; tell whether it still did. Primary key."""
    values = {**row, **_AS_NEW, "_id": job_id, "_key": row["unique_key"]}
    del values["created_at"]
    return cast("CursorResult[Any]", connection.execute(_REPLACE, values)).rowcount == 1


_REPLACE = update(JOBS).where(J.id == bindparam("_id"), J.unique_key == bindparam("_key"), WAITING)
# It is no longer the run of a recurring job that it may have been: that was for another time.
_AS_NEW = {"failures": 0, "losses": 0, "snoozes": 0, "error": None, "cancel_requested_at": None, "recurring_id": None}


def put_many(connection: Connection, rows: Sequence[Mapping[str, Any]], wishes: Mapping[int, str]) -> list[Put]:
    """Insert ``rows``; `put` those at the positions of ``wishes``, which have keys.

    These come in the order of their keys, so that two who have the same do not wait for each other.
    """
    plain = [at for at in range(len(rows)) if at not in wishes]
    ids = bulk.add_many(connection, [rows[at] for at in plain]) if plain else []
    done = {at: Put(job_id, is_new=True) for at, job_id in zip(plain, ids, strict=True)}
    for at in sorted(wishes, key=lambda at: (rows[at]["unique_key"], at)):
        done[at] = put(connection, rows[at], replacing=wishes[at] == "replace")
    return [done[at] for at in range(len(rows))]


def add_free(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Insert those of ``rows`` whose keys are free; return them by id. They are the runs of one recurring job."""
    if not rows or rows[0].get("unique_key") is None:
        return dict(zip(bulk.add_many(connection, rows) if rows else [], rows, strict=True))
    found = [(put(connection, row), row) for row in rows]
    return {each.job_id: row for each, row in found if each.is_new and each.job_id is not None}


# --- looking ------------------------------------------------------------------------------------------------------


def reread(session: Session | scoped_session[Any], job_id: int) -> ScheduledJob:
    """Return a job as it is now, as an object of ``session``. Primary key."""
    found = session.get(ScheduledJob, job_id, populate_existing=True)
    if found is None:  # newer than a snapshot of InnoDB's; a locking read does not go by that
        found = session.get_one(ScheduledJob, job_id, populate_existing=True, with_for_update={"read": True})
    return found


def key_given_up(connection: Connection, token: Token) -> str | None:
    """Return the key that a running job had while it waited; None if it has it still, or never had. Primary key."""
    found: str | None = connection.scalar(_GIVEN_UP, {"_id": token.id, "_attempt": token.attempt})
    return found


_GIVEN_UP = select(J.unique_key).where(
    J.id == bindparam("_id"), J.attempt == bindparam("_attempt"), RUNNING, ~KEEPS_ITS_KEY
)
