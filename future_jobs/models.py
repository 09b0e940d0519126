"""The tables.

A `ScheduledJob` is one call to make, a `JobFailure` one attempt at it that went wrong, a `RecurringJob` the rule that
makes new jobs. A `Queue` is one that is paused, a `Limit` what several claimers must agree on, a `RunningWorker` one
that says it is alive. All live on the library's own `Base`, so that an application's metadata stays its own; reading
them is what they are for. The states of jobs are written by ``lifecycle.py`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from math import isnan
from typing import TYPE_CHECKING, Any, Protocol, Unpack, cast

from sqlalchemy import Computed, Double, ForeignKey, Index, Integer, MetaData, SmallInteger, String
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session
from sqlalchemy.types import TypeDecorator

from . import payloads
from .dialects import (
    TABLE_OPTIONS,
    BigKey,
    Encoded,
    JSONText,
    LongText,
    Unreadable,
    UTCDateTime,
    claim_indexes,
    concurrency_index,
    partial_index,
)
from .errors import InvalidArgument, ObjectMissing, UsageError, shown
from .status import Status

if TYPE_CHECKING:
    from .options import JobOptions
    from .times import When

__all__ = [
    "SCHEDULER",
    "Base",
    "JobFailure",
    "Limit",
    "Progress",
    "Queue",
    "RecurringJob",
    "RunningWorker",
    "ScheduledJob",
    "metadata",
]

SCHEDULER = "future_jobs.scheduler"  # where a Session's info keeps its Scheduler

MESSAGE_LENGTH = 500  # of what a handler says of its progress
_RUN = "_run"  # where the object of a running job keeps who runs it

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
}

UNIQUE_SLOT = "CASE WHEN status = 'scheduled' OR (status = 'running' AND unique_until = 'finished') THEN unique_key END"


class Base(DeclarativeBase):
    """The library's own declarative base: its metadata holds the library's tables and nothing else."""

    metadata = MetaData(naming_convention=NAMING)


metadata = Base.metadata


def loaded(session: Session, cls: type, identity: tuple[Any, ...], *, required: bool = True) -> Any:
    """Return the mapped object ``identity`` of ``cls``; None, or `ObjectMissing` if ``required``, where it is gone."""
    found = session.get(cls, identity)
    if found is None and required:
        raise ObjectMissing(cls.__qualname__, identity[0] if len(identity) == 1 else identity)
    return found


class StatusText(TypeDecorator[Status]):
    """A `Status` kept as its text. A text that is none, in a row edited by hand, comes back as it is."""

    impl = String(10)
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> Status | None:  # noqa: ARG002
        """Return the member, or the text where there is none."""
        try:
            return Status(value) if value is not None else None
        except ValueError:
            return cast("Status", value)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a handler has said that it is: ``fraction`` from 0 to 1, a ``message`` or None, and when."""

    fraction: float
    message: str | None
    at: datetime


class ProgressText(JSONText):
    """A `Progress` as JSON. What is none, in a row edited by hand, comes back as it is."""

    cache_ok = True

    def process_bind_param(self, value: Progress | None, dialect: Dialect) -> str | None:
        """Encode."""
        if not isinstance(value, Progress):
            return super().process_bind_param(value, dialect)
        return json.dumps({"fraction": value.fraction, "message": value.message, "at": value.at.isoformat()})

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Decode."""
        found = super().process_result_value(value, dialect)
        try:
            return None if found is None else Progress(**{**found, "at": datetime.fromisoformat(found["at"])})
        except (TypeError, KeyError, ValueError):
            return found


class Watched(Protocol):
    """A run of a job, as the job itself sees it."""

    is_asked_to_stop: bool

    def tell(self, fraction: float, message: str | None) -> None:
        """Take note of the progress of the handler."""


class ScheduledJob(Base):
    """One call to make: what, when, for how long it makes sense, and how it went.

    ``(id, attempt)`` is the fencing token: ``attempt`` grows with every claim and is never lowered.
    """

    __tablename__ = "future_jobs_scheduled_job"
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)

    callable_name: Mapped[str] = mapped_column(String(500))
    args: Mapped[Any] = mapped_column(JSONText, default=Encoded("[]"))
    kwargs: Mapped[Any] = mapped_column(JSONText, default=Encoded("{}"))
    content_type: Mapped[str | None] = mapped_column(String(255))
    content_key: Mapped[str | None] = mapped_column(String(255))
    # What only a run needs: backoff, retry_on, transaction, missing, ...
    options: Mapped[Any] = mapped_column(JSONText, nullable=True)
    tags: Mapped[Any] = mapped_column(JSONText, nullable=True)

    queue: Mapped[str] = mapped_column(String(100), default="default")
    priority: Mapped[int] = mapped_column(SmallInteger, default=0)
    status: Mapped[Status] = mapped_column(StatusText, default=Status.SCHEDULED)
    run_at: Mapped[datetime] = mapped_column(UTCDateTime)  # moves when a job is retried or snoozed
    nominal_at: Mapped[datetime] = mapped_column(UTCDateTime)  # what it was scheduled for; never moves
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    failures: Mapped[int] = mapped_column(Integer, default=0)
    max_attempts: Mapped[int] = mapped_column(Integer, default=1)
    losses: Mapped[int] = mapped_column(Integer, default=0)
    snoozes: Mapped[int] = mapped_column(Integer, default=0)
    leased_by: Mapped[str | None] = mapped_column(String(200))
    leased_until: Mapped[datetime | None] = mapped_column(UTCDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    return_value: Mapped[Any] = mapped_column(JSONText, nullable=True)
    error: Mapped[str | None] = mapped_column(LongText)
    latest_progress: Mapped[Any] = mapped_column("progress", ProgressText, nullable=True)  # a `Progress`

    unique_key: Mapped[str | None] = mapped_column(String(255))
    unique_until: Mapped[str | None] = mapped_column(String(8))
    unique_slot: Mapped[str | None] = mapped_column(String(255), Computed(UNIQUE_SLOT, persisted=True))
    concurrency_key: Mapped[str | None] = mapped_column(String(255))
    concurrency_limit: Mapped[int | None] = mapped_column(Integer)

    recurring_id: Mapped[int | None] = mapped_column(BigKey)

    rate_limit: Mapped[str | None] = mapped_column(String(32))
    # Jobs with the same text here are held back together; see limits.py, which writes both. What is in no group, which
    # is nearly everything, is claimed without a thought of limits: the index is led by the flag.
    limited_by: Mapped[str | None] = mapped_column(String(320))
    limited: Mapped[bool] = mapped_column(server_default="0")

    __table_args__ = (
        *claim_indexes(),
        partial_index("uq_future_jobs_unique_slot", "unique_slot", where="unique_slot IS NOT NULL", unique=True),
        partial_index("ix_future_jobs_content", "content_type", "content_key", where="content_type IS NOT NULL"),
        concurrency_index(),
        partial_index(
            "uq_future_jobs_recurring",
            "recurring_id",
            "nominal_at",
            where="recurring_id IS NOT NULL",
            unique=True,
        ),
        TABLE_OPTIONS,
    )

    def __repr__(self) -> str:
        status, name = self.__dict__.get("status"), self.__dict__.get("callable_name")
        if (status is None or name is None) and object_session(self) is not None:
            status, name = self.status, self.callable_name
        return f"<{type(self).__name__} ({status}) callable={name!r}>"

    @property
    def session(self) -> Session:
        """The Session this object lives in; inside a handler, the job's own."""
        session = object_session(self)
        if session is None:
            raise UsageError("this job is in no Session (it was rolled back, deleted or detached)")
        return session

    @property
    def content_object(self) -> Any:
        """The mapped object this job is bound to, loaded through `session`; None if it is bound to none.

        Raises `ObjectMissing` if it was deleted.
        """
        if self.content_type is None or self.content_key is None:
            return None
        return payloads.load_reference(self.content_type, self.content_key, load=self._load, permit=self._permit)

    @property
    def result(self) -> Any:
        """What the handler returned, of the types it had; `return_value` is the same as JSON data."""
        stored = self.return_value
        text = stored.text if isinstance(stored, Unreadable) else json.dumps(stored)
        return payloads.decode(text, load=self._load, permit=self._permit)

    @property
    def late_by(self) -> timedelta | None:
        """How long after its time it was last started; None if it never was."""
        return None if self.started_at is None else self.started_at - self.nominal_at

    def reschedule(
        self,
        when: When,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[JobOptions],
    ) -> ScheduledJob:
        """Schedule a copy of this job, ``when`` counted from the time this one was scheduled for.

        What is not given is copied. Takes the options of `Scheduler.schedule`.
        """
        from future_jobs import Scheduler  # noqa: PLC0415 (the public face, resolved late: this room is above it)

        return Scheduler.of(self.session).reschedule(self, when, args=args, kwargs=kwargs, **options)

    @property
    def cancel_requested(self) -> bool:
        """Whether it was asked to stop.

        Of the job that is running here this asks no database and may be looked at as often as one likes, from any
        thread. Of any other it is what was last read.
        """
        run: Watched | None = self.__dict__.get(_RUN)
        return self.cancel_requested_at is not None if run is None else run.is_asked_to_stop

    def progress(self, fraction: float, message: str | None = None) -> None:
        """Say, in its handler, how far the job is: from 0 to 1, and in words.

        This only takes note. It is written beside the job's transaction, within about a second and at the end, to
        `latest_progress`; where that is not possible it is left out. Below 0 is 0 and above 1 is 1.
        """
        run: Watched | None = self.__dict__.get(_RUN)
        if run is None:
            raise UsageError("this job is not running here; its handler may tell progress, by current_job().progress()")
        if not isinstance(fraction, int | float) or isnan(fraction):
            raise InvalidArgument(
                f"fraction is {shown(fraction)}; pass a number from 0 to 1", argument="fraction", value=fraction
            )
        if not isinstance(message, str | None):
            raise InvalidArgument(f"message is {shown(message)}; pass text", argument="message", value=message)
        text = None if message is None else payloads.sanitise(message, MESSAGE_LENGTH)
        run.tell(min(1.0, max(0.0, float(fraction))), text)

    def watched_by(self, run: Watched) -> None:
        """Let ``run`` answer what only a run can know."""
        self.__dict__[_RUN] = run

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _RUN}

    @property
    def _load(self) -> Callable[[type, tuple[Any, ...]], Any]:
        return partial(loaded, self.session)

    @property
    def _permit(self) -> Callable[[str], None] | None:
        """What the Scheduler of the session allows; a row must not name what a job may not."""
        return getattr(self.session.info.get(SCHEDULER), "check_class", None)


class JobFailure(Base):
    """One attempt that failed or was lost. A job that goes well has none."""

    __tablename__ = "future_jobs_job_failure"
    __table_args__ = (Index("ix_future_jobs_failure_job", "job_id"), TABLE_OPTIONS)

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    job_id: Mapped[int] = mapped_column(BigKey, ForeignKey(ScheduledJob.id, ondelete="CASCADE"))
    attempt: Mapped[int] = mapped_column(Integer)
    failed_at: Mapped[datetime] = mapped_column(UTCDateTime)
    worker: Mapped[str | None] = mapped_column(String(200))
    error_type: Mapped[str] = mapped_column(String(255))
    traceback: Mapped[str] = mapped_column(LongText)

    def __repr__(self) -> str:
        return f"<JobFailure of job {self.job_id}, attempt {self.attempt}: {self.error_type}>"


class RecurringJob(Base):
    """A rule that makes jobs: what to call, how often, and what to do about the times that were missed."""

    __tablename__ = "future_jobs_recurring_job"

    id: Mapped[int] = mapped_column(BigKey, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    rule: Mapped[str] = mapped_column(LongText)
    timezone: Mapped[str | None] = mapped_column(String(64))
    anchor_at: Mapped[datetime] = mapped_column(UTCDateTime)

    callable_name: Mapped[str] = mapped_column(String(500))
    args: Mapped[Any] = mapped_column(JSONText)
    kwargs: Mapped[Any] = mapped_column(JSONText)
    content_type: Mapped[str | None] = mapped_column(String(255))
    content_key: Mapped[str | None] = mapped_column(String(255))
    options: Mapped[Any] = mapped_column(JSONText)  # of the jobs it makes

    catch_up: Mapped[str] = mapped_column(String(10))
    catch_up_window: Mapped[str | None] = mapped_column(String(64))
    overlap: Mapped[str] = mapped_column(String(10))
    jitter: Mapped[str | None] = mapped_column(String(64))
    start_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    end_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    run_limit: Mapped[int | None] = mapped_column(Integer)

    next_run_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    last_run_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    paused_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    fired: Mapped[int] = mapped_column(BigKey, default=0)
    missed: Mapped[int] = mapped_column(BigKey, default=0)
    skipped: Mapped[int] = mapped_column(BigKey, default=0)
    error: Mapped[str | None] = mapped_column(LongText)  # why it cannot go on
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime)

    __table_args__ = (
        partial_index("ix_future_jobs_next_run", "next_run_at", where="paused_at IS NULL"),
        TABLE_OPTIONS,
    )

    def __repr__(self) -> str:
        return f"<RecurringJob {self.name!r} ({self.rule})>"


class Queue(Base):
    """A queue that is paused: none of its jobs is started. A queue without a row is not."""

    __tablename__ = "future_jobs_queue"
    __table_args__ = (TABLE_OPTIONS,)

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(UTCDateTime)

    def __repr__(self) -> str:
        return f"<Queue {self.name!r}, paused>"


class Limit(Base):
    """What claimers of limited jobs lock, so that no two count the same free place, and the starts that a rate counts.

    Its name is ``key:`` and a concurrency key, or ``queue:`` and a queue. After ``kept_until`` it says nothing.
    """

    __tablename__ = "future_jobs_limit"
    __table_args__ = (TABLE_OPTIONS,)

    name: Mapped[str] = mapped_column(String(261), primary_key=True)
    starts: Mapped[Any] = mapped_column(JSONText, nullable=True)
    kept_until: Mapped[datetime | None] = mapped_column(UTCDateTime)

    def __repr__(self) -> str:
        return f"<Limit {self.name!r}>"


class RunningWorker(Base):
    """A worker, from its start to its end. One that was killed is forgotten by the others after a while."""

    __tablename__ = "future_jobs_worker"
    __table_args__ = (TABLE_OPTIONS,)

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    queues: Mapped[Any] = mapped_column(JSONText)  # {"mail": 4, "*": 10}
    started_at: Mapped[datetime] = mapped_column(UTCDateTime)
    seen_at: Mapped[datetime] = mapped_column(UTCDateTime)
    lease_seconds: Mapped[float] = mapped_column(Double)

    def __repr__(self) -> str:
        return f"<RunningWorker {self.name!r}>"
