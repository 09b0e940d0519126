"""Thirty days of a small shop, played in about a second: what ``future-jobs demo`` shows.

It is an application like any other: three tables of its own, methods and functions that are scheduled as jobs, and a
Scheduler. Only its clock is unusual. The story begins thirty days ago and every pass is told what day it is, by
``run_due(now=...)``, so that it ends now. Every line that is told is read from the database.
"""

from __future__ import annotations

import csv
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ForeignKey, String, create_engine, event, func, make_url, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, relationship

from future_jobs import JobFailure, ScheduledJob, Scheduler, Status, create_tables, current_job, job_as_parameter
from future_jobs.dialects import UTCDateTime
from future_jobs.errors import UsageError

__all__ = ["Backup", "Customer", "Letter", "Line", "Summary", "back_up", "count_letters", "offer", "play"]

DAYS = 30
ASLEEP = range(17, 23)  # days on which the machine is off
APPLICATION_ID = 0x66_6A_64_6D  # "fjdm", in the header of the file: what the demo made, it may delete


# --- the shop -----------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The shop's own declarative base."""


class Customer(Base):
    """Somebody who tries the shop's service for two weeks. Its methods are jobs, bound to the customer."""

    __tablename__ = "demo_customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    email: Mapped[str] = mapped_column(String(100), unique=True)
    plan: Mapped[str] = mapped_column(String(10), default="trial")

    def welcome(self) -> None:
        """Write a welcome."""
        self._write("Welcome to your trial")

    def remind(self) -> None:
        """Say that the trial ends soon."""
        self._write("Your trial ends in 3 days")

    def end_trial(self) -> None:
        """End the trial, and say so."""
        self.plan = "ended"
        self._write("Your trial has ended")

    def _write(self, subject: str) -> None:
        """Put a letter into the outbox, through the job's Session: it is there if, and only if, the job completes."""
        if "@" not in self.email:
            raise ValueError(f"{self.email!r} is no e-mail address")
        session, job = object_session(self), current_job()
        assert session is not None
        assert job is not None
        session.add(Letter(customer=self, subject=subject, job_id=job.id))


class Letter(Base):
    """The outbox."""

    __tablename__ = "demo_letter"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))
    customer: Mapped[Customer] = relationship()
    subject: Mapped[str] = mapped_column(String(100))
    job_id: Mapped[int]


class Backup(Base):
    """A backup that was made and checked."""

    __tablename__ = "demo_backup"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int]
    path: Mapped[str] = mapped_column(String(500))
    size: Mapped[int]
    letters: Mapped[int]
    next_at: Mapped[datetime] = mapped_column(UTCDateTime)


def back_up(source: str, target: str) -> None:
    """Copy the database while it is in use, check the copy, and do it again in a week."""
    job = current_job()
    assert job is not None
    part = Path(f"{target}.part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as database:
        database.execute("VACUUM INTO ?", (str(part),))
    with closing(sqlite3.connect(part)) as copy:
        (verdict,) = copy.execute("PRAGMA integrity_check").fetchone()
        (letters,) = copy.execute("SELECT count(*) FROM demo_letter").fetchone()
    if verdict != "ok":
        raise RuntimeError(f"the copy is damaged: {verdict}")
    part.replace(target)
    again = job.reschedule("7d")
    job.session.add(
        Backup(job_id=job.id, path=target, size=os.path.getsize(target), letters=letters, next_at=again.run_at)  # noqa: PTH202
    )


def offer(session: Session) -> int:
    """Write to everybody about the weekend; return to how many. Of no use on Monday."""
    job = current_job()
    assert job is not None
    customers = session.scalars(select(Customer)).all()
    session.add_all(Letter(customer=each, subject="This weekend only", job_id=job.id) for each in customers)
    return len(customers)


@job_as_parameter
def count_letters(job: ScheduledJob, session: Session) -> dict[str, int]:
    """Return how many letters were written, by subject. The make-believe printer needs a second try."""
    if job.failures == 0:
        raise ConnectionError("the printer does not answer")
    counts = select(Letter.subject, func.count().label("letters")).group_by(Letter.subject).order_by(Letter.subject)
    return {row.subject: row.letters for row in session.execute(counts)}


# --- the telling --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened: on which day, what kind of thing, in words."""

    day: int
    at: datetime
    mark: str  # a `Status`, or a word for what the shop does
    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What the database holds at the end."""

    path: str
    url: str
    backup: str
    passes: int
    jobs: dict[str, int]  # by status
    letters: int
    failed_once: int  # the ids of jobs worth a look
    expired: int
    waiting: int


def play(path: Path, tell: Callable[[Line], None]) -> Summary:
    """Make the database ``path`` and play the month in it, telling each thing as it happens.

    A file that an earlier demo made is deleted first. Raises `UsageError` for any other file that is in the way.
    """
    path = path.absolute()
    url, target = _url(path), path.with_name(f"{path.stem}-backup{path.suffix}")
    _make_way(path, target)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("PRAGMA journal_mode = WAL")
    engine = create_engine(url)
    event.listen(engine, "connect", _sync_seldom)
    try:
        create_tables(engine)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            return _Story(session, path, target, tell).play()
    finally:
        engine.dispose()


def _sync_seldom(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA synchronous = NORMAL")  # as is usual with WAL; a slow disk would make the month long


def _url(path: Path) -> URL:
    url = URL.create("sqlite", database=str(path))
    if make_url(url.render_as_string()).database != str(path):
        raise UsageError(f"{path} cannot be written as a database URL; choose another path", argument="path")
    return url


def _make_way(path: Path, target: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}; make it, or choose another path", argument="path")
    for each in (path, target):
        if each.exists() and not _is_ours(each):
            raise UsageError(
                f"{each} exists, and no demo made it: it is left alone; choose another path", argument="path"
            )
    for each in (path, target):
        for suffix in ("", "-wal", "-shm", "-journal", ".part"):
            Path(f"{each}{suffix}").unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Tell whether an SQLite file has the demo's mark at byte 68, the application id of the format's header."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(72)
    return header.startswith(b"SQLite format 3\0") and header[68:72] == APPLICATION_ID.to_bytes(4, "big")


class _Story:
    """The month, day by day."""

    def __init__(self, session: Session, path: Path, target: Path, tell: Callable[[Line], None]) -> None:
        self.session = session
        self.path = path
        self.target = target
        self.tell = tell
        self.start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=DAYS)
        self.day = 0
        self.passes = 0
        self.scheduler = Scheduler(session, clock=lambda: self.now)

    @property
    def now(self) -> datetime:
        return self.start + timedelta(days=self.day)

    def play(self) -> Summary:
        arrivals = _customers()
        events = {
            0: self.plan_backups,
            6: self.one_pays,
            4: self.mend_the_address,
            10: self.plan_the_offer,
            17: self.fall_asleep,
            25: self.plan_the_count,
        }
        for day in range(DAYS + 1):
            self.day = day
            for row in arrivals.get(day, ()):
                self.sign_up(row["name"], row["email"])
            events.get(day, lambda: None)()
            if day not in ASLEEP:
                self.run()
        return self.summary()

    def say(self, mark: str, text: str) -> None:
        self.tell(Line(self.day, self.now, mark, text))

    # --- what the shop does

    def sign_up(self, name: str, email: str) -> None:
        """Add a customer, and the jobs of the trial, in one transaction: both or neither."""
        before = self.count()
        customer = Customer(name=name, email=email)
        try:
            self.session.add(customer)
            self.session.flush()
            self.scheduler.schedule("1d", customer.welcome)
            self.scheduler.schedule("11d", customer.remind)
            self.scheduler.schedule("14d", "end_trial", content_object=customer)
            self.session.commit()
        except IntegrityError:
            self.session.rollback()
            other = self.session.scalars(select(Customer).where(Customer.email == email)).one()
            self.say("refused", f"{name} has the address of {other.name}: rolled back, {self.count() - before} jobs")
            return
        self.say("sign-up", f"{name} and {self.count() - before} jobs, in one transaction")

    def plan_backups(self) -> None:
        job = self.scheduler.schedule("1d", back_up, args=[str(self.path), str(self.target)], queue="slow")
        self.session.commit()
        self.say("plan", f"back up on day {self.day_of(job.run_at)}: job {job.id}")

    def mend_the_address(self) -> None:
        """Do what somebody does who has looked at the failed jobs: mend the cause, and retry by hand."""
        for job in self.session.scalars(select(ScheduledJob).where(ScheduledJob.status == Status.FAILED)).all():
            customer = job.content_object
            customer.email = f"hello@{customer.email}"
            self.scheduler.retry(job)
            self.session.commit()
            self.say("by hand", f"address corrected to {customer.email}, job {job.id} retried")

    def one_pays(self) -> None:
        """End a trial early: the customer's waiting jobs are found by the customer."""
        customer = self.session.scalars(select(Customer).where(Customer.plan == "trial").order_by(Customer.id)).first()
        assert customer is not None
        customer.plan = "paid"
        waiting = (
            self.scheduler.jobs_for(customer)
            .with_only_columns(ScheduledJob.id)
            .where(ScheduledJob.status == Status.SCHEDULED)
        )
        cancelled = [job_id for job_id in self.session.scalars(waiting).all() if self.scheduler.cancel(job_id)]
        self.session.commit()
        self.say(Status.CANCELLED, f"{customer.name} pays: jobs {_listed(cancelled)} are not needed")

    def plan_the_offer(self) -> None:
        job = self.scheduler.schedule("8d", offer, expires="2d")
        self.session.commit()
        assert job.expires_at is not None
        due, end = self.day_of(job.run_at), self.day_of(job.expires_at)
        self.say("plan", f"weekend offer on day {due}, of no use after day {end}: job {job.id}")

    def fall_asleep(self) -> None:
        until = self.now + timedelta(days=len(ASLEEP))
        due = select(func.count(ScheduledJob.id)).where(
            ScheduledJob.status == Status.SCHEDULED, ScheduledJob.run_at < until
        )
        count = self.session.scalar(due)
        self.session.rollback()
        self.say("asleep", f"the machine is off for {len(ASLEEP)} days, in which {count} jobs become due")

    def plan_the_count(self) -> None:
        job = self.scheduler.schedule("2d", count_letters, max_attempts=3)
        self.session.commit()
        self.say("plan", f"count letters on day {self.day_of(job.run_at)}, {job.max_attempts} attempts: job {job.id}")

    # --- what the jobs do

    def run(self) -> None:
        """Run what is due on this day, and tell what the database says of it."""
        self.scheduler.run_due(now=self.now, ignore_errors=True)
        self.passes += 1
        ended = select(ScheduledJob).where(ScheduledJob.finished_at == self.now).order_by(ScheduledJob.id)
        jobs = [job for job in self.session.scalars(ended) if job.status != Status.CANCELLED]
        for job in jobs:
            if job.status == Status.EXPIRED:
                self.tell_expired(job)
        complete = sorted((job for job in jobs if job.status == Status.COMPLETE), key=lambda job: job.callable_name)
        for _, same in groupby(complete, key=lambda job: job.callable_name):
            self.tell_complete(list(same))
        for failure in self.session.scalars(select(JobFailure).where(JobFailure.failed_at == self.now)):
            self.tell_failure(failure)
        self.session.rollback()

    def tell_expired(self, job: ScheduledJob) -> None:
        assert job.expires_at is not None
        due, end = self.day_of(job.run_at), self.day_of(job.expires_at)
        self.say(job.status, f"job {job.id}, {_name(job)}: was due on day {due}, of no use after day {end}")

    def tell_complete(self, jobs: Sequence[ScheduledJob]) -> None:
        for words in self.results(jobs):
            late = max(self.now - job.run_at for job in jobs).days
            how = f" ({late} days late)" if late > 1 else " (a day late)" if late else ""
            self.say(Status.COMPLETE, words + how)

    def results(self, jobs: Sequence[ScheduledJob]) -> Iterator[str]:
        """Say what jobs of one function have done, from what they have written."""
        ids = [job.id for job in jobs]
        who = f"{'job' if len(ids) == 1 else 'jobs'} {_listed(ids)}"
        letters = self.session.scalars(select(Letter).where(Letter.job_id.in_(ids)).order_by(Letter.id)).all()
        for backup in self.session.scalars(select(Backup).where(Backup.job_id.in_(ids))):
            size = f"{backup.size / 1024:,.0f} KiB, {backup.letters} letters"
            yield f"{who}: database backed up and checked ({size}), next on day {self.day_of(backup.next_at)}"
        if letters:
            names = ", ".join(letter.customer.name for letter in letters)
            yield f"{who}: “{letters[0].subject}” to {names}"
        for job in jobs:
            if job.return_value is not None:
                tries = f" at attempt {job.attempt}" if job.attempt > 1 else ""
                yield f"{who}: {_name(job)} returned {job.return_value}{tries}"

    def tell_failure(self, failure: JobFailure) -> None:
        job = self.session.get(ScheduledJob, failure.job_id)
        assert job is not None
        what = f"job {job.id}, {_name(job)}: {failure.traceback.strip().splitlines()[-1]}"
        if job.status == Status.SCHEDULED:
            self.say("retried", f"{what}; next try on day {self.day_of(job.run_at)}")
        else:
            self.say(Status.FAILED, what)

    # --- the end

    def summary(self) -> Summary:
        by_status = select(ScheduledJob.status, func.count()).group_by(ScheduledJob.status)
        return Summary(
            path=str(self.path),
            url=_url(self.path).render_as_string(),
            backup=str(self.target),
            passes=self.passes,
            jobs={str(status): count for status, count in self.session.execute(by_status)},
            letters=self.session.scalar(select(func.count(Letter.id))) or 0,
            failed_once=self.one(ScheduledJob.id.in_(select(JobFailure.job_id)), ScheduledJob.max_attempts == 1),
            expired=self.one(ScheduledJob.status == Status.EXPIRED),
            waiting=self.one(ScheduledJob.status == Status.SCHEDULED),
        )

    def one(self, *conditions: Any) -> int:
        return self.session.scalars(select(ScheduledJob.id).where(*conditions).order_by(ScheduledJob.id)).first() or 0

    def count(self) -> int:
        return self.session.scalar(select(func.count(ScheduledJob.id))) or 0

    def day_of(self, at: datetime) -> int:
        return (at - self.start).days


def _customers() -> dict[int, list[dict[str, str]]]:
    """Return the customers of the bundled file by the day on which they sign up."""
    text = (files(__name__) / "customers.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return {int(day): list(group) for day, group in groupby(rows, key=lambda row: row["day"])}


def _name(job: ScheduledJob) -> str:
    return job.callable_name.rpartition(".")[2]


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
