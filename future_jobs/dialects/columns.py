"""The types of the columns, and the indexes, as each database has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Index, Integer, Text, text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.schema import Column
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "TABLE_OPTIONS",
    "BigKey",
    "Encoded",
    "JSONText",
    "LongText",
    "UTCDateTime",
    "Unreadable",
    "claim_indexes",
    "concurrency_index",
    "partial_index",
]

BigKey = BigInteger().with_variant(Integer(), "sqlite")  # only an INTEGER key is a rowid alias, and so autoincrements
# TEXT holds 64 KB there, less than a payload may have.
LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

TABLE_OPTIONS: dict[str, Any] = {
    "sqlite_autoincrement": True,  # a deleted job's id is never given to another
    # Keys and names are compared byte by byte, as on the other databases.
    **{
        f"{name}_{option}": value
        for name in ("mysql", "mariadb")
        for option, value in {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}.items()
    },
}


class UTCDateTime(TypeDecorator[datetime]):
    """An instant: aware datetimes in, UTC with microseconds stored, aware UTC datetimes out. Refuses naive ones."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type that keeps microseconds on ``dialect``."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TIMESTAMP(timezone=True))
        if dialect.name in {"mysql", "mariadb"}:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; without its zone where the column has none."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; instants are stored as aware datetimes only")
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return an aware UTC datetime."""
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Return what converts a parameter: in one step for SQLite, which has text, at a third of the time."""
        return _utc_as_text if _keeps_text(dialect) else super().bind_processor(dialect)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """Return what converts a column's value, in one step."""
        if _keeps_text(dialect):
            return _utc_from_text
        if dialect.name == "sqlite":
            return super().result_processor(dialect, coltype)
        return _utc_from_aware if dialect.name == "postgresql" else _utc_from_naive


def _keeps_text(dialect: Dialect) -> bool:
    return dialect.name == "sqlite" and not getattr(dialect, "native_datetime", False)


def _utc_as_text(value: datetime | Unreadable | None) -> object:
    if value is None:
        return None
    if isinstance(value, Unreadable):
        return value.value
    if value.tzinfo is None:
        raise ValueError(f"{value!r} has no time zone; instants are stored as aware datetimes only")
    return value.astimezone(UTC).isoformat(" ", "microseconds").removesuffix("+00:00")


def _utc_from_aware(value: datetime | None) -> datetime | None:
    return None if value is None else value.astimezone(UTC)


def _utc_from_naive(value: datetime | None) -> datetime | None:
    return None if value is None else value.replace(tzinfo=UTC)


def _utc_from_text(value: str | None) -> datetime | Unreadable | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value + "+00:00")
    except (ValueError, TypeError):
        return _utc_from_odd_text(value)


def _utc_from_odd_text(value: object) -> datetime | Unreadable:
    """Read what was written by hand: with an offset, without a time, or nonsense, which must stop nobody."""
    try:
        instant = datetime.fromisoformat(str(value))
        return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return Unreadable(value)


class Encoded(str):
    """JSON text that is stored as it is, where any other `str` would be encoded first."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What a column holds that should hold JSON, or a time, and does not: a row edited by hand.

    It is kept, and written back, as it is. Among times it comes first, so that the job is soon looked at, and fails.
    """

    value: object

    @property
    def text(self) -> str:
        """What the column holds, as text."""
        return str(self.value)

    def __lt__(self, other: object) -> bool:
        return not isinstance(other, Unreadable)

    def __le__(self, other: object) -> bool:
        return True

    def __gt__(self, other: object) -> bool:
        return False

    def __ge__(self, other: object) -> bool:
        return isinstance(other, Unreadable)


class JSONText(TypeDecorator[Any]):
    """JSON kept as the exact text that was written.

    Native JSON columns change what they store (MySQL turns large integers into floats and reorders keys) and raise
    on reading a damaged value; this type does neither.
    """

    impl = LongText
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Encode, unless ``value`` is `Encoded` or None."""
        if value is None or isinstance(value, Encoded):
            return value
        if isinstance(value, Unreadable):
            return value.text
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Decode; a damaged text comes back as `Unreadable`."""
        if value is None:
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return Unreadable(value)


def partial_index(name: str, *columns: str | Column[Any], where: str, unique: bool = False) -> Index:
    """Return an index on the rows that satisfy ``where``; on all rows where a database has no partial indexes."""
    return Index(name, *columns, unique=unique, postgresql_where=text(where), sqlite_where=text(where))


_HAVE_PARTIAL: dict[str, Any] = {"dialect": ("postgresql", "sqlite")}
_HAVE_NONE: dict[str, Any] = {"dialect": ("mysql", "mariadb")}


def claim_indexes() -> tuple[Index, ...]:
    """Return the index that claims use, and the one that finds running jobs.

    Without partial indexes, one index led by ``status`` serves both. Limited jobs are apart: however many of them must
    wait, a claim of others does not step over one.
    """
    due = ("limited", "queue", "priority", "run_at", "id", "limited_by")
    return (
        partial_index("ix_future_jobs_due", *due, where="status = 'scheduled'").ddl_if(**_HAVE_PARTIAL),
        partial_index("ix_future_jobs_running", "leased_by", where="status = 'running'").ddl_if(**_HAVE_PARTIAL),
        Index("ix_future_jobs_status", "status", *due).ddl_if(**_HAVE_NONE),
    )


def concurrency_index() -> Index:
    """Return the index that counts the running jobs of a key; what has no key is not in it.

    Without partial indexes there is none, since every status change of every job would pay for it: of the index led by
    ``status``, what runs and is limited is a small part.
    """
    where = "status = 'running' AND concurrency_key IS NOT NULL"
    return partial_index("ix_future_jobs_concurrency", "concurrency_key", where=where).ddl_if(**_HAVE_PARTIAL)
