"""What the jobs of the lab do, and the ledger that tells how often they did it.

A job writes one row into the ledger for each attempt that commits. Nothing there is unique: two rows of one job would
be two attempts that both had their effect, and are to be counted, not prevented. Its return value is the attempt as
well, so that a completion written by an attempt which no longer held the job shows, too.

What happens outside of the database is noted in files, one for each process, with the time of a clock that all
processes of a host share. A line that was written survives the death of its process.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from time import monotonic, sleep

from sqlalchemy import BigInteger, Integer
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from future_jobs import current_job

FOLDER = "FUTURE_JOBS_CRASH_FOLDER"  # where notes are written, and gates are


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "crash_effect"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int] = mapped_column(Integer)


def note(what: str, job_id: int = 0, attempt: int = 0) -> None:
    line = f"{what} {job_id} {attempt} {monotonic():.6f}\n"
    path = Path(os.environ[FOLDER], f"{os.getpid()}.notes")
    with path.open("ab", buffering=0) as notes:
        notes.write(line.encode())


def begin() -> tuple[int, int]:
    job = current_job()
    note("began", job.id, job.attempt)
    return job.id, job.attempt


# --- handlers -----------------------------------------------------------------------------------------------------


def write(session: Session, seconds: float = 0.0) -> int:
    job_id, attempt = begin()
    sleep(seconds)
    session.add(Effect(job_id=job_id, attempt=attempt))
    return attempt


def write_and_commit(session: Session, seconds: float = 0.0) -> int:
    """Commit in the middle, as a handler written for a web request does."""
    job_id, attempt = begin()
    session.add(Effect(job_id=job_id, attempt=attempt))
    session.commit()
    sleep(seconds)
    return attempt


def answer(seconds: float = 0.0) -> int:
    """Write nothing: its completion is written with those of others."""
    _, attempt = begin()
    sleep(seconds)
    return attempt


def write_when_let_go(session: Session) -> int:
    """Wait for the gate of this attempt; then write."""
    job_id, attempt = begin()
    gate, turn = Path(os.environ[FOLDER], f"gate-{job_id}-{attempt}"), threading.Event()
    give_up_at = monotonic() + 120
    while not gate.exists():
        if monotonic() > give_up_at:
            raise TimeoutError(gate)
        turn.wait(0.005)
    session.add(Effect(job_id=job_id, attempt=attempt))
    return attempt


def write_for_a_while(session: Session, seconds: float) -> int:
    return write(session, seconds)


def die() -> None:
    begin()
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    begin()
    os._exit(9)


PLAIN = ("write", "write_and_commit", "answer")
WITHOUT_EFFECT = ("answer", "die", "leave")
