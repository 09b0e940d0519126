"""Many jobs in one statement: adding them, completing them, handing them back.

What the rows have in common is bound once. What differs travels as one JSON text, which the database unfolds into rows
by itself: one parameter for a thousand jobs, where one for each value would cost more than all the rest. `COPY` is no
faster, since each row repeats what is common, and it works with one driver only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import ColumnElement, Text, bindparam, func, insert, select, update
from sqlalchemy.engine import Connection, CursorResult
from sqlalchemy.sql.dml import Insert, Update

from .dialects import Backend, Encoded, backend_of
from .statements import JOBS, NEW, J, Token, spelled
from .status import Status

__all__ = ["add_many", "complete_all", "move_all"]

MOST_ROWS = 5_000  # in one statement
MOST_TEXT = 1 << 20  # characters in one statement; escaped twice, it stays below every max_allowed_packet


def add_many(
    connection: Connection, rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Sequence[str]] | None = None
) -> list[int]:
    """Insert jobs in few round trips; return their ids in the order of ``rows``, which have the same keys.

    ``texts`` has, by name, what each row holds instead, as JSON text: rows that differ in nothing else may then be one
    object. A database that does not tell which ids it gave gets one statement for each row.
    """
    if not rows:
        return []
    texts = texts or {}
    if not connection.dialect.insert_returning:
        own = ({name: Encoded(texts[name][at]) for name in texts} for at in range(len(rows)))
        return [_add_one(connection, {**row, **each}) for row, each in zip(rows, own, strict=True)]
    columns = {
        name: _written(connection, name, [row[name] for row in rows]) for name in _varying(rows) if name not in texts
    }
    shared = {**rows[0], **NEW}
    for name, column in texts.items():
        if column.count(column[0]) == len(column):
            shared[name] = Encoded(column[0])
        else:
            columns[name] = column
    columns = columns or {"args": _written(connection, "args", [shared["args"]] * len(rows))}
    shared = {name: value for name, value in shared.items() if name not in columns}
    statement = _insert(backend_of(connection), tuple(shared), tuple(columns))
    params = {f"shared_{name}": value for name, value in shared.items()}
    ids: list[int] = []
    for chunk in _chunks([*columns.values()]):
        # Ids are given in the order of the rows, and grow; RETURNING promises no order.
        ids += sorted(connection.scalars(statement, {**params, "rows": _dump(chunk)}).all())
    assert len(ids) == len(rows)
    return ids


def _add_one(connection: Connection, row: Mapping[str, Any]) -> int:
    key = connection.execute(_INSERT, {**row, **NEW}).inserted_primary_key
    assert key is not None
    return int(key[0])


_INSERT = insert(JOBS)


@lru_cache(maxsize=128)
def _insert(backend: Backend, shared: tuple[str, ...], varying: tuple[str, ...]) -> Insert:
    order, columns = backend.unfold(bindparam("rows", type_=Text), [J[name].type for name in varying])
    bound: list[ColumnElement[Any]] = [bindparam(f"shared_{name}", type_=J[name].type) for name in shared]
    rows = select(*bound, *columns).order_by(order)
    return insert(JOBS).from_select([*shared, *varying], rows, include_defaults=False).returning(J.id)


def complete_all(connection: Connection, results: Mapping[Token, str | None], values: Mapping[str, Any]) -> int:
    """Write ``values`` and its own result to the running job of each token; return how many were. Primary key."""
    return _move(connection, ("return_value",), [(*token, result) for token, result in results.items()], values)


def move_all(
    connection: Connection, tokens: Iterable[Token], values: Mapping[str, Any], *conditions: ColumnElement[bool]
) -> int:
    """Write ``values`` to the running job of each token, if it meets ``conditions``; return how many. Primary key."""
    return _move(connection, (), list(tokens), values, conditions)


def _move(
    connection: Connection,
    own: tuple[str, ...],
    rows: Sequence[tuple[Any, ...]],
    values: Mapping[str, Any],
    conditions: tuple[ColumnElement[bool], ...] = (),
) -> int:
    statement = _held(backend_of(connection), own, conditions)
    chunks = _chunks(list(zip(*rows, strict=True)))
    moved = (connection.execute(statement, {**values, "rows": _dump(chunk)}) for chunk in chunks)
    return sum(cast("CursorResult[Any]", each).rowcount for each in moved)


@lru_cache(maxsize=16)
def _held(backend: Backend, own: tuple[str, ...], conditions: tuple[ColumnElement[bool], ...]) -> Update:
    kinds = [J[name].type for name in ("id", "attempt", *own)]
    _, (job_id, attempt, *values) = backend.unfold(bindparam("rows", type_=Text), kinds)
    # The status is compared in a form that no index holds: found by it, the rows of others would be read, and locked.
    running = func.coalesce(J.status, "") == spelled(Status.RUNNING)
    held = update(JOBS).where(J.id == job_id, J.attempt == attempt, running, *conditions)
    return held.values(dict(zip(own, values, strict=True))) if own else held


# --- rows as JSON -------------------------------------------------------------------------------------------------


def _varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values are not the same in all ``rows``."""
    first, same = rows[0], list(rows[0])
    while same:
        values = itemgetter(*same)
        expected = values(first)
        other = next((row for row in rows if row is not first and values(row) != expected), None)
        if other is None:
            break
        same = [name for name in same if other[name] == first[name]]
    return [name for name in first if name not in same]


def _written(connection: Connection, name: str, column: list[Any]) -> Sequence[Any]:
    """Return the values of a column as the driver would be given them."""
    kind = J[name].type.dialect_impl(connection.dialect)
    write = kind.bind_processor(connection.dialect)
    return column if write is None or set(map(type, column)) == {Encoded} else list(map(write, column))


def _chunks(columns: Sequence[Sequence[Any]]) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the rows of ``columns``, as many at a time as one statement should hold."""
    for start in range(0, len(columns[0]) if columns else 0, MOST_ROWS):
        block = [column[start : start + MOST_ROWS] for column in columns]
        longest = sum(max((len(each) for each in column if isinstance(each, str)), default=0) for column in block)
        step = max(1, MOST_TEXT // max(1, longest))
        for at in range(0, len(block[0]), step):
            yield list(zip(*(column[at : at + step] for column in block), strict=True))


_dump: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=str).encode
