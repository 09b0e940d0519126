"""The handlers of the benchmarks, and the table that one of them writes into."""

from __future__ import annotations

from sqlalchemy import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """The application's own tables."""


class Effect(Base):
    """One row for each job that ran."""

    __tablename__ = "bench_effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


INSERT = insert(Base.metadata.tables["bench_effect"])


def nothing(n: int) -> None:
    """Do nothing, like the raw loop."""


def answer(n: int) -> dict[str, int]:
    """Return something that is kept."""
    return {"n": n}


def write_row(n: int, session: Session) -> None:
    """Write one row in the job's own transaction."""
    session.execute(INSERT, {"n": n})


def write_object(n: int, session: Session) -> None:
    """Write the same row by the unit of work."""
    session.add(Effect(n=n))


def compute(n: int) -> None:
    """Keep the interpreter busy for a millisecond or two."""
    for turn in range(100_000):
        n += turn
