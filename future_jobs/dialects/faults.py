"""What an error of a database means."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, OperationalError

__all__ = ["is_away", "is_disconnect", "is_lock_error", "is_missing_table"]


_RETRY_SQLSTATES = {"40001", "40P01", "55P03", "25006", "57P01", "57P02", "57P03"}
_RETRY_MYSQL = {1205, 1213, 1020}
_RETRY_SQLITE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_lock_error(error: BaseException) -> bool:
    """Tell whether ``error`` is a deadlock, a serialization failure or a lock that was not given in time."""
    original = getattr(error, "orig", None)
    if not isinstance(error, DBAPIError) or original is None:
        return False
    if isinstance(original, sqlite3.OperationalError):
        return (getattr(original, "sqlite_errorcode", 0) & 0xFF) in _RETRY_SQLITE
    if getattr(original, "sqlstate", None) in _RETRY_SQLSTATES:
        return True
    return bool(original.args) and original.args[0] in _RETRY_MYSQL


def is_disconnect(error: BaseException) -> bool:
    """Tell whether the connection was lost; what it was doing may or may not have happened."""
    return isinstance(error, DBAPIError) and bool(error.connection_invalidated)


def is_away(error: BaseException) -> bool:
    """Tell whether the connection was lost, or none could be had."""
    if is_disconnect(error):
        return True
    # No statement and no deadlock: the server refuses the connection, or is starting, or gave up on a commit.
    return isinstance(error, OperationalError) and error.statement is None and not is_lock_error(error)


def is_missing_table(error: BaseException) -> bool:
    """Tell whether ``error`` says that a table does not exist."""
    original = getattr(error, "orig", None)
    if getattr(original, "sqlstate", None) == "42P01":
        return True
    args = getattr(original, "args", ()) or ("",)
    return args[0] == 1146 or (isinstance(error, OperationalError) and "no such table" in str(args[0]))  # noqa: PLR2004
