"""The commands that write: schedule, reschedule, cancel, retry, prune."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from future_jobs.errors import InvalidTime, shown
from future_jobs.status import FINISHED, Status

from .app import scheduler_of
from .base import Command, Exit, F, Given, Problem, given_of
from .output import Progress, paint, say, tidy
from .words import as_dict, both_moments, call, distance, moment

if TYPE_CHECKING:
    from datetime import datetime

    from future_jobs import ScheduledJob, Scheduler

__all__ = ["JOB_ID", "cancel", "prune", "reschedule", "retry", "schedule"]

JOB_ID = click.IntRange(1, 2**63 - 1)
CHUNK = 5_000


def job_options(command: F) -> F:
    """Add the options that say something about a job."""
    for option in (
        click.option("--tag", "tags", multiple=True, metavar="WORD", help="A word to find it by; may be repeated."),
        click.option("--rate-limit", metavar="RATE", help="So many may start in a time, such as 100/min."),
        click.option("--concurrency-limit", type=int, metavar="N", help="How many of its key may run. [default: 1]"),
        click.option("--concurrency-key", metavar="KEY", help="Of the jobs with this key one runs at a time."),
        click.option(
            "--on-conflict",
            type=click.Choice(["raise", "return_existing", "replace"]),
            help="What to do if another job has its unique key. [default: raise]",
        ),
        click.option("--unique-key", metavar="KEY", help="Only if no other job with this key waits or runs."),
        click.option("--backoff", metavar="DURATION", help="How long to wait after a failure. [default: growing]"),
        click.option("--max-attempts", type=int, metavar="N", help="Try again after a failure, N attempts in all."),
        click.option("--timeout", metavar="DURATION", help="How long one run may take. [default: for ever]"),
        click.option("--priority", type=int, metavar="N", help="-100 to 100; higher runs first. [default: 0]"),
        click.option("--queue", metavar="NAME", help="The queue it waits in. [default: default]"),
        click.option(
            "--expires",
            metavar="WHEN",
            help="How long after its time it still makes sense; or 'never'. [default: 7d]",
        ),
    ):
        command = option(command)
    return command


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Return the job options that were given."""
    chosen = {name: value for name, value in options.items() if value not in (None, ())}
    if chosen.get("expires") == "never":
        chosen["expires"] = None
    return chosen


# --- schedule, reschedule -----------------------------------------------------------------------------------------


@click.command(
    cls=Command,
    section="Plan",
    epilog="""\b
Examples:
  future-jobs schedule 3d shop.mail.welcome '[11]'
  future-jobs schedule 2026-12-01T09:00 shop.report.monthly '{"month": 11}'
  future-jobs schedule 1h30m shop.mail.remind '[11]' '{"tone": "kind"}' --expires 2d
  future-jobs schedule 0s shop.backup.run --queue slow --dry-run""",
)
@click.argument("when")
@click.argument("callable_name", metavar="CALLABLE")
@click.argument("payload", metavar="[JSON]...", nargs=-1)
@job_options
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be scheduled; write nothing.")
@click.pass_context
def schedule(
    ctx: click.Context,
    /,
    when: str,
    callable_name: str,
    payload: tuple[str, ...],
    *,
    dry_run: bool,
    **options: Any,
) -> None:
    """Schedule a call.

    WHEN is a duration from now (90s, 30m, 5h, 3d, 2w, 1mo, 1y, 1h30m) or a date and time in ISO 8601, local unless it
    says otherwise. CALLABLE is the path of a function. A JSON list holds its positional arguments, a JSON object its
    keyword arguments; either or both may be given.
    """
    given = given_of(ctx)
    args, kwargs = _arguments(payload)
    with scheduler_of(given) as scheduler:
        job = scheduler.schedule(when, callable_name, args=args, kwargs=kwargs, **_chosen(options))
        if dry_run:
            _tell_planned(given, scheduler, job, f"Would schedule {paint(tidy(call(job)), bold=True)}", dry_run=True)
            scheduler.session.rollback()
            return
        scheduler.session.commit()
        _tell_planned(given, scheduler, job, f"Job {job.id} is scheduled: {paint(tidy(call(job)), bold=True)}")


@click.command(
    cls=Command,
    section="Plan",
    epilog="""\b
Examples:
  future-jobs reschedule 12 3d              three days after the time of job 12
  future-jobs reschedule 12 2026-12-01T09:00 --queue slow""",
)
@click.argument("job_id", metavar="ID", type=JOB_ID)
@click.argument("when")
@job_options
@click.pass_context
def reschedule(ctx: click.Context, /, job_id: int, when: str, **options: Any) -> None:
    """Schedule a copy of a job.

    A duration counts from the time that job ID was scheduled for, not from now. The copy has the same call, queue,
    priority and so on, but for what the options say; job ID itself stays as it is.
    """
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        copy = scheduler.reschedule(found(scheduler, job_id), when, **_chosen(options))
        scheduler.session.commit()
        words = f"Job {copy.id} is scheduled, a copy of job {job_id}: {paint(tidy(call(copy)), bold=True)}"
        _tell_planned(given, scheduler, copy, words)


def found(scheduler: Scheduler, job_id: int) -> ScheduledJob:
    """Return the job; end the command if there is none."""
    from future_jobs import ScheduledJob  # noqa: PLC0415 (slow to import; so are those below)

    job: ScheduledJob | None = scheduler.session.get(ScheduledJob, job_id)
    if job is None:
        raise Problem(f"there is no job {job_id}", Exit.JOB)
    return job


def _arguments(payload: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    for text in payload:
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise _not_arguments(text, f"is not JSON: {error}") from None
        if isinstance(value, list) and args is None:
            args = value
        elif isinstance(value, dict) and kwargs is None:
            kwargs = value
        else:
            kinds: dict[type, str] = {list: "a second list", dict: "a second object"}
            kind = kinds.get(type(value), "neither a list nor an object")
            raise _not_arguments(text, f"is {kind}")
    return args or [], kwargs or {}


def _refuse(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _not_arguments(text: str, problem: str) -> click.BadParameter:
    forms = """write positional arguments as a list, '[11, "ada"]', keyword arguments as an object, '{"k": 12}'"""
    return click.BadParameter(f"{shown(text)} {problem}; {forms}", param_hint="JSON")


def _tell_planned(
    given: Given, scheduler: Scheduler, job: ScheduledJob, headline: str, *, dry_run: bool = False
) -> None:
    if given.json:
        given.write({**as_dict(job), **({"id": None, "dry_run": True} if dry_run else {})})
        return
    now = _now()
    say(headline)
    _tell_moment(scheduler, "runs", job.run_at, now)
    if job.expires_at is None:
        say(f"  {paint('expires', dim=True)}  never")
    else:
        _tell_moment(scheduler, "expires", job.expires_at, now)
    if dry_run:
        say("The function is there and takes these arguments. Nothing was written.")


def _tell_moment(scheduler: Scheduler, label: str, at: datetime, now: datetime) -> None:
    words = f"{both_moments(at, scheduler.timezone)}   {distance(at, now)}"
    say(f"  {paint(label.ljust(7), dim=True)}  {words}")


def _now() -> datetime:
    from future_jobs.times import utc_now  # noqa: PLC0415

    return utc_now()


# --- cancel, retry ------------------------------------------------------------------------------------------------


@click.command(
    cls=Command,
    section="Plan",
    epilog="""\b
Example:
  future-jobs cancel 12 13""",
)
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True, type=JOB_ID)
@click.pass_context
def cancel(ctx: click.Context, job_ids: tuple[int, ...]) -> None:
    """Cancel jobs that wait, and ask running ones to stop.

    The exit code is 1 if one of them is finished already or does not exist; the others are cancelled all the same.
    """
    _change(ctx, job_ids, "cancelled", lambda scheduler, job_id: scheduler.cancel(job_id))


@click.command(
    cls=Command,
    section="Plan",
    epilog="""\b
Examples:
  future-jobs retry 12
  future-jobs retry 12 13 --when 2h --expires never""",
)
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True, type=JOB_ID)
@click.option("--when", default="0s", metavar="WHEN", help="When to run them. [default: now]")
@click.option(
    "--expires", default="same", metavar="WHEN", help="From then on, or 'never'. [default: as far away as it was]"
)
@click.pass_context
def retry(ctx: click.Context, job_ids: tuple[int, ...], when: str, expires: str) -> None:
    """Let failed, expired or cancelled jobs run again.

    They wait for the next run, with all their attempts. The exit code is 1 if one of them is in no such state or does
    not exist; the others are retried all the same.
    """
    until = None if expires == "never" else expires
    _change(ctx, job_ids, "retried", lambda scheduler, job_id: scheduler.retry(job_id, when=when, expires=until))


def _change(ctx: click.Context, job_ids: Sequence[int], done: str, change: Callable[[Scheduler, int], bool]) -> None:
    """Make one change to each of several jobs, commit, and say which were changed."""
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        won = {job_id: change(scheduler, job_id) for job_id in dict.fromkeys(job_ids)}
        scheduler.session.commit()
        jobs = {job_id: _state(scheduler, job_id) for job_id in won}
        if given.json:
            given.write(
                [{"id": each, done: won[each], "status": job and str(job.status)} for each, job in jobs.items()]
            )
        else:
            for job_id, job in jobs.items():
                _tell_changed(scheduler, job_id, job, done, won=won[job_id])
    if not all(won.values()):
        ctx.exit(Exit.JOB)


def _state(scheduler: Scheduler, job_id: int) -> ScheduledJob | None:
    from future_jobs import ScheduledJob  # noqa: PLC0415

    return scheduler.session.get(ScheduledJob, job_id)


def _tell_changed(scheduler: Scheduler, job_id: int, job: ScheduledJob | None, done: str, *, won: bool) -> None:
    if job is None:
        say(f"{paint('Error:', fg='red', bold=True)} there is no job {job_id}", err=True)
    elif not won:
        what = "was asked to stop already" if job.cancel_requested_at and not job.finished_at else f"is {job.status}"
        say(f"{paint('Error:', fg='red', bold=True)} job {job_id} {what}, and cannot be {done}", err=True)
    elif job.status == Status.RUNNING:
        say(f"Job {job_id} is running, and is asked to stop: {tidy(call(job, limit=60))}")
    elif job.status == Status.SCHEDULED:
        say(f"Job {job_id} waits again, {_due(scheduler, job)}: {tidy(call(job, limit=60))}")
    else:
        say(f"Job {job_id} is {job.status}: {tidy(call(job, limit=60))}")


def _due(scheduler: Scheduler, job: ScheduledJob) -> str:
    now = _now()
    if job.run_at <= now:
        return "due now"
    return f"due {distance(job.run_at, now)}, at {moment(job.run_at, scheduler.timezone)}"


# --- prune --------------------------------------------------------------------------------------------------------


@click.command(
    cls=Command,
    section="Run",
    epilog="""\b
Examples:
  future-jobs prune
  future-jobs prune --older-than 1y --status failed --status expired
  future-jobs prune --older-than 0s --dry-run""",
)
@click.option("--older-than", default="30d", metavar="DURATION", help="How long ago they ended. [default: 30d]")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(sorted(each.value for each in FINISHED)),
    help="How they ended; may be repeated. [default: complete]",
)
@click.option("--dry-run", is_flag=True, help="Count them; delete nothing.")
@click.pass_context
def prune(ctx: click.Context, older_than: str, statuses: tuple[str, ...], *, dry_run: bool) -> None:
    """Delete old finished jobs.

    What is recorded of their failures goes with them. They go in chunks that are committed one by one, so that nobody
    waits for long, and what is gone when you press Ctrl-C stays gone.
    """
    given = given_of(ctx)
    wanted = statuses or (Status.COMPLETE.value,)
    with scheduler_of(given) as scheduler:
        before = _before(older_than)
        if dry_run:
            count = _prunable(scheduler, before, wanted)
        else:
            with Progress("Deleting", lambda: _prunable(scheduler, before, wanted)) as progress:
                count = _prune(scheduler, before, wanted, progress.advance)
        ended = f"{' or '.join(sorted(wanted))} before {moment(before, scheduler.timezone)}"
    if given.json:
        deleted = 0 if dry_run else count
        given.write({"deleted": deleted, "found": count, "before": before.isoformat(), "dry_run": dry_run})
    else:
        say(f"{'Would delete' if dry_run else 'Deleted'} {count:,} {'job' if count == 1 else 'jobs'} ({ended}).")


def _before(older_than: str) -> datetime:
    from future_jobs.times import parse_duration  # noqa: PLC0415

    try:
        return _now() - parse_duration(older_than, argument="--older-than")
    except (ValueError, OverflowError) as error:
        if isinstance(error, InvalidTime):
            raise
        raise Problem(f"--older-than={shown(older_than)}: that is before the year 1") from None


def _prunable(scheduler: Scheduler, before: datetime, statuses: Sequence[str]) -> int:
    from sqlalchemy import func, select  # noqa: PLC0415

    from future_jobs import ScheduledJob  # noqa: PLC0415

    old = select(func.count(ScheduledJob.id)).where(
        ScheduledJob.status.in_([Status(each) for each in statuses]), ScheduledJob.finished_at < before
    )
    count = scheduler.session.scalar(old) or 0
    scheduler.session.rollback()
    return count


def _prune(scheduler: Scheduler, before: datetime, statuses: Sequence[str], advance: Callable[[int], None]) -> int:
    count = 0
    while gone := scheduler.prune(before, statuses=statuses, limit=CHUNK):
        scheduler.session.commit()
        advance(gone)
        count += gone
    scheduler.session.rollback()
    return count
