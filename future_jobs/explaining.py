"""Why a job is not running, in words: what `Scheduler.why` and ``future-jobs show`` say. Only reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Connection, Row

from . import limit_statements
from .errors import shown
from .limit_statements import Waiting
from .limits import rate_of, state_of
from .rates import Starts
from .statements import J
from .status import Status

__all__ = ["Reason", "Why", "explain"]

MOST_NAMED = 5


class Reason(StrEnum):
    """What keeps a job from running, in one word; where several things do, the first of these."""

    MISSING = "missing"
    COMPLETE = "complete"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    RUNNING = "running"
    TOO_LATE = "too_late"
    NOT_DUE = "not_due"
    RETRY = "retry"
    QUEUE_PAUSED = "queue_paused"
    KEY_HELD = "key_held"
    RATE_LIMITED = "rate_limited"
    NO_WORKER = "no_worker"
    WORKERS_BUSY = "workers_busy"
    DUE = "due"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Why:
    """Why a job is not running. ``str(why)`` is a sentence for people; ``until`` is when that ends, if one can know."""

    reason: Reason
    text: str
    until: datetime | None = None

    def __str__(self) -> str:
        return self.text


_WANTED = ("status", "failures", "max_attempts", "error", "leased_by", "started_at", "finished_at", "expires_at")
_JOB = select(*(J[name] for name in dict.fromkeys((*Waiting._fields, *_WANTED))))


def explain(connection: Connection, job_id: int, *, now: datetime) -> Why:
    """Return why the job ``job_id`` is not running."""
    job = connection.execute(_JOB.where(J.id == job_id)).first()
    if job is None:
        return Why(Reason.MISSING, f"There is no job {job_id}.")
    if job.status == Status.SCHEDULED:
        return _of_time(job, now) or _of_limits(connection, job, now) or _of_workers(connection, job, now)
    return _of_status(job)


def _of_status(job: Row[Any]) -> Why:
    error = f": {_last_line(job.error)}" if job.error else ""
    again = "retry() lets it run again"
    texts = {
        Status.RUNNING: f"It runs, since {_at(job.started_at)}, by {job.leased_by or 'nobody'}.",
        Status.COMPLETE: f"It is complete, since {_at(job.finished_at)}.",
        Status.EXPIRED: f"It expired: nothing had run it by {_at(job.expires_at)}. {again}, if it is of use now.",
        Status.FAILED: f"It failed at {_at(job.finished_at)}{error}. {again}.",
        Status.CANCELLED: f"It was cancelled at {_at(job.finished_at)}{error}. {again}.",
    }
    if job.status not in texts:
        return Why(Reason.UNKNOWN, f"Its status is {shown(job.status)}, which this version does not know.")
    return Why(Reason(job.status), texts[job.status])


def _of_time(job: Row[Any], now: datetime) -> Why | None:
    if isinstance(job.expires_at, datetime) and job.expires_at < now:
        text = f"It is too late: it was of no use after {_at(job.expires_at)}, and expires at the next look."
        return Why(Reason.TOO_LATE, text)
    if not isinstance(job.run_at, datetime) or job.run_at <= now:
        return None
    if job.failures:
        tried = f"attempt {job.failures} of {job.max_attempts} failed with {_last_line(job.error)}"
        return Why(Reason.RETRY, f"It waits for another try at {_at(job.run_at)}: {tried}.", job.run_at)
    return Why(Reason.NOT_DUE, f"It is not due before {_at(job.run_at)}.", job.run_at)


def _of_limits(connection: Connection, job: Row[Any], now: datetime) -> Why | None:
    if (since := limit_statements.paused(connection).get(job.queue)) is not None:
        return Why(Reason.QUEUE_PAUSED, f"Its queue {job.queue!r} is paused, since {_at(since)}.")
    row = Waiting._make(getattr(job, name) for name in Waiting._fields)
    if row.limited_by is None:
        return None
    keys = [row.concurrency_key] if row.concurrency_key is not None else []
    texts = limit_statements.starts(connection, [row.limit_name])
    starts = {name: Starts(text) for name, text in texts.items()}
    state = state_of(row, limit_statements.running(connection, keys), starts, now)
    if state is None:
        return None
    if state.until is None and row.concurrency_key is not None:
        ids = limit_statements.holders(connection, row.concurrency_key)
        held = f"the key {row.concurrency_key!r} is held by {_jobs(ids)}"
        return Why(Reason.KEY_HELD, f"It is due, and {held}; {row.concurrency_limit or 1} at a time may run.")
    place = f"queue {row.queue!r}" if row.concurrency_key is None else f"key {row.concurrency_key!r}"
    text = f"It is due, and the rate of its {place}, {rate_of(row)}, is reached until {_at(state.until)}."
    return Why(Reason.RATE_LIMITED, text, state.until)


def _of_workers(connection: Connection, job: Row[Any], now: datetime) -> Why:
    due = f"It is due, since {_at(job.run_at)}"
    alive = [each for each in limit_statements.workers(connection) if not limit_statements.is_gone(each, now)]
    if not alive:
        text = f"{due}, and no worker is registered; `future-jobs worker` or run_due() would run it."
        return Why(Reason.NO_WORKER, text)
    slots = [_slots(each.queues, job.queue) for each in alive]
    if not any(slots):
        served = sorted({name for each in alive if isinstance(each.queues, Mapping) for name in each.queues})
        others = f"the workers there are serve {', '.join(served) or 'nothing'}"
        text = f"{due}, and no worker serves queue {job.queue!r}: {others}."
        return Why(Reason.NO_WORKER, text)
    running = limit_statements.at_work(connection, job.queue)
    if running >= sum(slots):
        text = f"{due}, and all {sum(slots)} slots of the workers that serve queue {job.queue!r} are busy."
        return Why(Reason.WORKERS_BUSY, text)
    count = sum(map(bool, slots))
    by = "a worker serves" if count == 1 else f"{count} workers serve"
    return Why(Reason.DUE, f"{due}, and {by} its queue {job.queue!r}: it starts any moment.")


def _slots(queues: Any, queue: str) -> int:
    found = queues.get(queue, queues.get("*", 0)) if isinstance(queues, Mapping) else 0
    return found if isinstance(found, int) else 0


def _jobs(ids: Iterable[int]) -> str:
    named = [str(each) for each in ids]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"{'job' if len(named) == 1 else 'jobs'} {', '.join(named[:MOST_NAMED])}{more}"


def _at(instant: Any) -> str:
    if not isinstance(instant, datetime):
        return "an unknown time"
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1].rstrip(".") if lines else "no reason given"
