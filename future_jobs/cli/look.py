"""The commands that only read: list, show."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from future_jobs.status import FINISHED, Status

from .app import scheduler_of
from .base import Command, given_of
from .change import JOB_ID, found
from .output import Cell, is_terminal, paint, say, table, tidy, width, wrapped
from .words import (
    COLOURS,
    about,
    as_dict,
    both_moments,
    brief_call,
    call,
    distance,
    moment,
    note,
    progress_words,
    remedy,
    short_moment,
    span,
    times,
    value_words,
    why,
)

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Select

    from future_jobs import JobFailure, ScheduledJob, Scheduler

__all__ = ["list_", "show"]

NARROW = 70  # columns
STATES = click.Choice([each.value for each in Status])


@click.command(
    "list",
    cls=Command,
    section="Look",
    epilog="""\b
Examples:
  future-jobs list --status failed
  future-jobs list --sort due --status scheduled --queue mail
  future-jobs list --callable shop.mail --limit 0 --json""",
)
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=STATES,
    help="In this state; may be repeated.",
)
@click.option("--queue", "queues", multiple=True, metavar="NAME", help="In this queue; may be repeated.")
@click.option(
    "--callable",
    "callables",
    multiple=True,
    metavar="PATH",
    help="Of this function, or below this module; * stands for anything. May be repeated.",
)
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="With this tag; with all of them, if repeated.")
@click.option(
    "--sort",
    type=click.Choice(["newest", "due"]),
    default="newest",
    help="What comes first: the newest, or the first due. [default: newest]",
)
@click.option("--limit", "-n", type=click.IntRange(0), default=50, metavar="N", help="At most N; 0: all. [default: 50]")
@click.pass_context
def list_(ctx: click.Context, /, sort: str, limit: int, **filters: Any) -> None:
    """List jobs.

    Times are local. A terminal gets what fits its width, a pipe everything.
    """
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        matching = _matching(scheduler, sort=sort, **filters)
        jobs = list(islice(matching, limit or None))
        more = bool(limit) and next(matching, None) is not None
        matching.close()
        if given.json:
            given.write([as_dict(job) for job in jobs])
        elif jobs:
            _write_table(jobs, scheduler)
        else:
            say("No jobs." if not any(filters.values()) else "No such jobs.")
    if more:
        say(f"There are more; -n/--limit says how many to show (0: all), here {limit}.", err=True)


def _matching(
    scheduler: Scheduler,
    *,
    statuses: Sequence[str],
    queues: Sequence[str],
    callables: Sequence[str],
    tags: Sequence[str],
    sort: str,
) -> Any:
    """Yield the jobs that match. What SQL cannot compare alike on every database is compared here."""
    from sqlalchemy import select  # noqa: PLC0415 (slow to import; so are those below)

    from future_jobs import ScheduledJob  # noqa: PLC0415

    query: Select[Any] = select(ScheduledJob)
    query = (
        query.order_by(ScheduledJob.id.desc())
        if sort == "newest"
        else query.order_by(ScheduledJob.run_at, ScheduledJob.id)
    )
    if statuses:
        query = query.where(ScheduledJob.status.in_([Status(each) for each in statuses]))
    if queues:
        query = query.where(ScheduledJob.queue.in_(queues))
    if tags:
        query = query.where(ScheduledJob.tags.is_not(None))
    return _filtered(scheduler.session.scalars(query.execution_options(yield_per=200)), callables, tags)


def _filtered(jobs: Any, callables: Sequence[str], tags: Sequence[str]) -> Iterator[ScheduledJob]:
    with jobs:
        for job in jobs:
            if callables and not any(_is_below(job.callable_name, each) for each in callables):
                continue
            if tags and not (isinstance(job.tags, list) and set(tags) <= set(job.tags)):
                continue
            yield job


def _is_below(path: str, pattern: str) -> bool:
    plain = pattern.rstrip(".")
    return path == plain or path.startswith(f"{plain}.") or ("*" in pattern and fnmatchcase(path, pattern))


def _write_table(jobs: Sequence[ScheduledJob], scheduler: Scheduler) -> None:
    now = _now()
    whole = not is_terminal(sys.stdout)
    queues = any(job.queue != "default" for job in jobs) and (whole or width() >= NARROW)
    rows = []
    for job in jobs:
        when = moment(job.run_at, scheduler.timezone) if whole else short_moment(job.run_at, scheduler.timezone, now)
        rows.append(
            [
                Cell(str(job.id)),
                Cell(tidy(str(job.status)), COLOURS.get(job.status)),
                Cell(when),
                *([Cell(tidy(job.queue))] if queues else []),
                Cell(tidy(job.callable_name if whole else brief_call(job))),
                Cell(" ".join(tidy(note(job, now)).split()), dim=True),
            ]
        )
    table(["ID", "STATUS", "RUN AT", *(["QUEUE"] if queues else []), "CALL", "NOTE"], rows)


def _now() -> datetime:
    from future_jobs.times import utc_now  # noqa: PLC0415

    return utc_now()


# --- show ---------------------------------------------------------------------------------------------------------


@click.command(
    cls=Command,
    section="Look",
    epilog="""\b
Example:
  future-jobs show 12""",
)
@click.argument("job_id", metavar="ID", type=JOB_ID)
@click.pass_context
def show(ctx: click.Context, job_id: int) -> None:
    """Show a job: what, when, how it went and why."""
    from sqlalchemy import select  # noqa: PLC0415

    from future_jobs import JobFailure  # noqa: PLC0415

    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        job = found(scheduler, job_id)
        failed = select(JobFailure).where(JobFailure.job_id == job_id).order_by(JobFailure.id)
        failures = list(scheduler.session.scalars(failed))
        if given.json:
            given.write(
                {
                    **as_dict(job),
                    "why": scheduler.why(job).reason,
                    "failed_attempts": [as_dict(each) for each in failures],
                }
            )
        else:
            _write_job(job, failures, scheduler, given.command)


def _write_job(job: ScheduledJob, failures: Sequence[JobFailure], scheduler: Scheduler, command: str) -> None:
    now = _now()
    status = tidy(str(job.status))
    say(f"{paint(f'Job {job.id}', bold=True)}  {paint(status, fg=COLOURS.get(job.status), bold=True)}")
    say()
    for line in wrapped(tidy(why(job, failures, now, waits=str(scheduler.why(job)))), min(width(), 100)):
        say(line)
    if (helpful := remedy(job)) is not None:
        say(f"  {command} {helpful[0]}   {paint(f'# {helpful[1]}', dim=True)}")
    say()
    for label, text in _fields(job, scheduler, now):
        if text:
            say(f"  {paint(label.ljust(9), dim=True)}  {tidy(text)}")
    if failures:
        say()
        say(paint("Failed attempts", bold=True))
        for each in failures:
            when = moment(each.failed_at, scheduler.timezone)
            say(tidy(f"  {each.attempt:>3}  {when}  {each.error_type}  by {each.worker or 'nobody'}"))
    if job.error:
        say()
        say(paint(f"The last error{f', of attempt {failures[-1].attempt}' if failures else ''}", bold=True))
        for line in job.error.rstrip().splitlines():
            say(f"  {tidy(line)}")


def _fields(job: ScheduledJob, scheduler: Scheduler, now: datetime) -> Iterator[tuple[str, str | None]]:
    def at(moment_: datetime | None) -> str | None:
        if moment_ is None:
            return None
        return f"{both_moments(moment_, scheduler.timezone)}   {distance(moment_, now)}"

    yield "call", call(job)
    yield "about", about(job)
    yield "run at", at(job.run_at)
    yield "planned", at(job.nominal_at) if job.nominal_at != job.run_at else None
    yield "expires", at(job.expires_at) or "never"
    yield "queue", f"{job.queue}, priority {job.priority}"
    yield "tags", ", ".join(map(str, job.tags)) if isinstance(job.tags, list) else job.tags and str(job.tags)
    yield "attempts", _attempts(job)
    yield (
        "options",
        ", ".join(f"{name}={value!r}" for name, value in job.options.items())
        if isinstance(job.options, dict)
        else job.options and str(job.options),
    )
    yield "unique", job.unique_key and f"{job.unique_key} until {job.unique_until}"
    yield "limit", job.concurrency_key and f"{job.concurrency_limit} at a time of {job.concurrency_key}"
    yield "rate", job.rate_limit
    yield "rule", None if job.recurring_id is None else f"made by recurring job {job.recurring_id}"
    yield "created", at(job.created_at)
    yield "started", at(job.started_at)
    yield "finished", at(job.finished_at)
    if (
        job.started_at
        and job.finished_at
        and job.started_at != job.finished_at
        and job.status in FINISHED - {Status.EXPIRED}
    ):
        yield "took", span(job.finished_at - job.started_at)
    yield "worker", job.leased_by
    yield "lease", at(job.leased_until)
    yield "stop", None if job.cancel_requested_at is None else f"asked for {at(job.cancel_requested_at)}"
    yield "progress", None if job.latest_progress is None else _progress(job.latest_progress, now)
    yield "returned", None if job.return_value is None else value_words(job.return_value)


def _progress(progress: Any, now: datetime) -> str:
    said = f"   {distance(progress.at, now)}" if hasattr(progress, "at") else ""
    return f"{progress_words(progress)}{said}"


def _attempts(job: ScheduledJob) -> str:
    extra = [f"{job.failures} failed" if job.failures else "", f"{job.losses} lost" if job.losses else ""]
    extra += [f"{job.snoozes} snoozed" if job.snoozes else ""]
    tried = f"started {times(job.attempt)}" if job.attempt else "not tried yet"
    return ", ".join(filter(None, [f"{job.max_attempts} at most", tried, *extra]))
