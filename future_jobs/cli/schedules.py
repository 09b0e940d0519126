"""The commands about recurring jobs: schedules ..., import-crontab."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from future_jobs.errors import shown

from .app import scheduler_of
from .base import Command, Exit, Group, Problem, given_of
from .output import Cell, is_terminal, paint, say, table, tidy
from .words import as_dict, both_moments, brief_call, call, distance, moment, short_moment

if TYPE_CHECKING:
    from datetime import datetime

    from future_jobs import RecurringJob, Scheduler
    from future_jobs.contrib.crontab import Line

__all__ = ["import_crontab", "schedules"]

AHEAD = 3  # fire times that are shown of a crontab's line


@click.group(
    cls=Group,
    section="Look",
    epilog="""\b
Examples:
  future-jobs schedules list
  future-jobs schedules preview daily-report
  future-jobs schedules pause daily-report""",
)
def schedules() -> None:
    """Look at recurring jobs, and operate them."""


def _now() -> datetime:
    from future_jobs.times import utc_now  # noqa: PLC0415 (slow to import; so are those below)

    return utc_now()


def _found(scheduler: Scheduler, name: str) -> RecurringJob:
    from sqlalchemy import select  # noqa: PLC0415

    from future_jobs import RecurringJob  # noqa: PLC0415

    found = scheduler.session.scalar(select(RecurringJob).where(RecurringJob.name == name))
    if found is None:
        scheduler.preview(name, 0)  # says which is nearest
        raise Problem(f"there is no recurring job {shown(name)}", Exit.JOB)
    return found


# --- list, show, preview ------------------------------------------------------------------------------------------


@schedules.command(
    "list",
    epilog="""\b
Example:
  future-jobs schedules list""",
)
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the recurring jobs, by name."""
    from sqlalchemy import select  # noqa: PLC0415

    from future_jobs import RecurringJob  # noqa: PLC0415

    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        found = list(scheduler.session.scalars(select(RecurringJob).order_by(RecurringJob.name)))
        if given.json:
            given.write([as_dict(each) for each in found])
        elif found:
            _write_table(found, scheduler)
        else:
            say("No recurring jobs.")


def _write_table(found: list[RecurringJob], scheduler: Scheduler) -> None:
    now, whole = _now(), not is_terminal(sys.stdout)
    rows = []
    for each in found:
        at = each.next_run_at
        when = (
            "" if at is None else moment(at, scheduler.timezone) if whole else short_moment(at, scheduler.timezone, now)
        )
        state, colour = _state(each)
        rows.append(
            [
                Cell(tidy(each.name)),
                Cell(state, colour),
                Cell(when),
                Cell(str(each.fired)),
                Cell(str(each.missed)),
                Cell(str(each.skipped)),
                Cell(tidy(" ".join(each.rule.split()))),
                Cell(tidy(each.callable_name if whole else brief_call(each)), dim=True),
            ]
        )
    table(["NAME", "STATE", "NEXT", "FIRED", "MISSED", "SKIPPED", "RULE", "CALL"], rows)


def _state(found: RecurringJob) -> tuple[str, str]:
    if found.error:
        return "broken", "red"
    if found.paused_at is not None:
        return "paused", "yellow"
    return ("active", "green") if found.next_run_at is not None else ("over", "bright_black")


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules show daily-report""",
)
@click.argument("name")
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show everything about a recurring job."""
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        found = _found(scheduler, name)
        if given.json:
            given.write(as_dict(found))
            return
        state, colour = _state(found)
        say(f"{paint(tidy(found.name), bold=True)}  {paint(state, fg=colour, bold=True)}")
        if found.error:
            say(f"\nIt cannot go on: {tidy(found.error)}\nDeclare it again, or remove it.")
        say()
        for label, text in _fields(found, scheduler, _now()):
            if text:
                say(f"  {paint(label.ljust(9), dim=True)}  {tidy(text)}")


def _fields(found: RecurringJob, scheduler: Scheduler, now: datetime) -> Iterator[tuple[str, str | None]]:
    def at(instant: datetime | None) -> str | None:
        if instant is None:
            return None
        return f"{both_moments(instant, scheduler.timezone)}   {distance(instant, now)}"

    window = f" within {found.catch_up_window}" if found.catch_up_window else ""
    yield "call", call(found)
    yield "rule", found.rule
    yield "in words", _explained(found)
    yield "next", at(found.next_run_at)
    yield "last", at(found.last_run_at)
    yield "paused", at(found.paused_at)
    yield "counted", f"{found.fired} fired, {found.missed} missed, {found.skipped} skipped"
    yield "catch up", f"{found.catch_up}{window}"
    yield "overlap", found.overlap
    yield "jitter", found.jitter
    yield "start", at(found.start_at)
    yield "end", at(found.end_at)
    yield "limit", None if found.run_limit is None else f"{found.run_limit} runs"
    yield (
        "options",
        ", ".join(f"{key}={value!r}" for key, value in dict(found.options).items()) if found.options else None,
    )
    yield "declared", at(found.updated_at)


def _explained(found: RecurringJob) -> str | None:
    from future_jobs import InvalidTime  # noqa: PLC0415
    from future_jobs.recurrence import explain, parse_rule  # noqa: PLC0415

    try:
        return explain(parse_rule(found.rule, timezone=found.timezone, anchor=found.anchor_at))
    except InvalidTime:
        return None


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules preview daily-report -n 5""",
)
@click.argument("name")
@click.option("--count", "-n", type=click.IntRange(0, 10_000), default=10, metavar="N", help="How many. [default: 10]")
@click.pass_context
def preview(ctx: click.Context, name: str, count: int) -> None:
    """Show when a recurring job is next due, in the zone of its rule."""
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        ahead, now = scheduler.preview(name, count), _now()
        if given.json:
            given.write([at.isoformat() for at in ahead])
            return
        for at in ahead:
            say(f"{moment(at, at.tzinfo)}   {paint(distance(at, now), dim=True)}")
        if not ahead and count:
            say("It is over.")


# --- pause, resume, trigger, backfill, remove ---------------------------------------------------------------------


def _operate(ctx: click.Context, name: str, verb: str, done: str, otherwise: str) -> None:
    """Do one thing to a recurring job, commit, and say what is so now; exit code 1 if it was so before."""
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        has_won = getattr(scheduler, verb)(name)
        scheduler.session.commit()
    if given.json:
        given.write({"name": name, "done": has_won})
    elif has_won:
        say(f"{tidy(name)} {done}")
    else:
        say(f"{paint('Error:', sys.stderr, fg='red', bold=True)} {tidy(name)} {otherwise}", err=True)
    if not has_won:
        ctx.exit(Exit.JOB)


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules pause daily-report""",
)
@click.argument("name")
@click.pass_context
def pause(ctx: click.Context, name: str) -> None:
    """Stop making jobs. Those that wait already still run."""
    _operate(ctx, name, "pause", "is paused.", "is paused already")


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules resume daily-report""",
)
@click.argument("name")
@click.pass_context
def resume(ctx: click.Context, name: str) -> None:
    """Make jobs again. What was missed follows its catch-up policy, at the next run."""
    _operate(ctx, name, "resume", "goes on.", "is not paused")


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules remove daily-report""",
)
@click.argument("name")
@click.pass_context
def remove(ctx: click.Context, name: str) -> None:
    """Forget a recurring job. The jobs that it made stay.

    If the application still declares it, it is back at the next start.
    """
    _operate(ctx, name, "remove", "is removed.", "does not exist")


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules trigger daily-report && future-jobs run""",
)
@click.argument("name")
@click.pass_context
def trigger(ctx: click.Context, name: str) -> None:
    """Schedule a run for now, beside the rhythm."""
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        job = scheduler.trigger(name)
        scheduler.session.commit()
        if given.json:
            given.write(as_dict(job))
        else:
            say(f"Job {job.id} is due now: {tidy(call(job))}")


@schedules.command(
    epilog="""\b
Example:
  future-jobs schedules backfill daily-report 2026-11-01T00:00 2026-11-07T23:59""",
)
@click.argument("name")
@click.argument("start")
@click.argument("end")
@click.pass_context
def backfill(ctx: click.Context, name: str, start: str, end: str) -> None:
    """Schedule, for now, the runs of a stretch of the past.

    Every time from START to END gets a job, unless it has one. They are dates and times in ISO 8601, local unless they
    say otherwise.
    """
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        ids = scheduler.backfill(name, start, end)
        scheduler.session.commit()
    if given.json:
        given.write({"name": name, "job_ids": ids})
    else:
        say(f"{len(ids)} {'job is' if len(ids) == 1 else 'jobs are'} due now.")


# --- import-crontab -----------------------------------------------------------------------------------------------


@click.command(
    "import-crontab",
    cls=Command,
    section="Plan",
    epilog="""\b
Examples:
  crontab -l | future-jobs import-crontab - --dry-run
  future-jobs --allow future_jobs.contrib.crontab import-crontab /etc/cron.d/backup --system""",
)
@click.argument("file", type=click.File("r", encoding="utf-8", errors="surrogateescape"))
@click.option("--system", is_flag=True, help="Each line names a user before the command, as in /etc/cron.d.")
@click.option("--prefix", metavar="WORD", help="What the names begin with. [default: the file's name]")
@click.option("--dry-run", is_flag=True, help="Show when each line would fire next; write nothing.")
@click.pass_context
def import_crontab(ctx: click.Context, file: IO[str], prefix: str | None, *, system: bool, dry_run: bool) -> None:
    """Turn the lines of a crontab into recurring jobs.

    FILE is a crontab, or - for standard input. Each line becomes a recurring job named after its command, so that
    importing a changed crontab changes the rows. Running commands has to be allowed, here and where the jobs are run:
    --allow future_jobs.contrib.crontab. Nothing is written if a line is wrong; @reboot is no time, and left out.
    """
    from future_jobs.contrib import crontab  # noqa: PLC0415

    given = given_of(ctx)
    path = getattr(file, "name", "-")
    title = prefix or ("crontab" if path in {"-", "<stdin>"} else Path(path).name)
    with scheduler_of(given) as scheduler:
        lines = list(crontab.parse(file.read(), timezone=scheduler.timezone, system=system))
        wrong = [line for line in lines if line.problem and line.schedule.lower() != "@reboot"]
        usable = [line for line in lines if line.rule is not None]
        named = list(zip(crontab.names(usable, title), usable, strict=True))
        if not wrong and not dry_run:
            crontab.declare(scheduler, lines, prefix=title)
            scheduler.session.commit()
        if given.json:
            given.write([_planned(name, line) for name, line in named])
        else:
            _write_planned(named, dry_run=dry_run or bool(wrong))
    for line in lines:
        if line.problem:
            words = f"line {line.number}: {line.schedule} {line.command}: {line.problem}"
            say(f"{paint('Note:', sys.stderr, fg='yellow')} {tidy(words)}", err=True)
    if wrong:
        raise Problem(f"{len(wrong)} of {len(lines)} lines cannot be understood; nothing was written")


def _ahead(line: Line) -> list[datetime]:
    def walk() -> Iterator[datetime]:
        at = _now()
        while line.rule is not None and (following := line.rule.next_after(at)) is not None:
            yield (at := following)

    return list(islice(walk(), AHEAD))


def _planned(name: str, line: Line) -> dict[str, Any]:
    known = {"name": name, "line": line.number, "rule": line.schedule, "command": line.command, **line.kwargs}
    return known | {"next": [at.isoformat() for at in _ahead(line)]}


def _write_planned(named: list[tuple[str, Line]], *, dry_run: bool) -> None:
    for name, line in named:
        say(f"{paint(tidy(name), bold=True)}  {tidy(line.schedule)}")
        for at in _ahead(line):
            say(f"  {moment(at, at.tzinfo)}")
    count = f"{len(named)} recurring {'job' if len(named) == 1 else 'jobs'}"
    say(f"Would declare {count}. Nothing was written." if dry_run else f"Declared {count}.")
