"""``future-jobs worker``: runs what is due until it is told to stop, one line for each thing that happens."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from .app import database, find, scheduler_of
from .base import Command, Exit, Given, Problem, given_of
from .output import paint, say, tidy
from .run import LOOKS
from .words import moment, span

if TYPE_CHECKING:
    from future_jobs import Scheduler, Worker

__all__ = ["worker"]

QUIET = {
    "started",
    "stopped",
    "failed",
    "retried",
    "expired",
    "lost",
    "rescued",
    "not_recorded",
    "degraded",
    "recovered",
}
WORDS = {"completed": "complete"}
UNTOLD = {"scheduled", "claimed"}
DETAILS = {
    "completed": "{took}",
    "failed": "{error_type}: {error}",
    "retried": "{error_type}: {error}; again at {then}",
    "snoozed": "until {then}",
    "released": "{reason}",
    "cancelled": "{reason}",
    "rescued": "taken back from {worker}, lost {losses} times",
    "lost": "its lease was over, and it was given to another",
    "result_not_kept": "{reason}",
    "not_recorded": "without details: {error}",
    "started": "{worker}",
    "stopped": "{worker}, jobs: {jobs}",
    "degraded": "the database does not answer: {error}",
    "recovered": "the database answers again, after {took}",
}
COLOURS = {**LOOKS, "completed": "green", "degraded": "red", "recovered": "green", "rescued": "yellow"}


def _queues(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, int] | None:
    queues = {}
    for each in given:
        name, equals, slots = each.rpartition("=")
        if not equals or not name or not slots.isdecimal() or int(slots) < 1:
            raise click.BadParameter(f"{each!r} is not NAME=SLOTS, such as mail=4")
        queues[name] = int(slots)
    return queues or None


@click.command(
    cls=Command,
    section="Run",
    epilog="""\b
Examples:
  future-jobs worker
  future-jobs -A shop.db:Session worker --queue mail=4 --queue '*=10'
  future-jobs worker --max-jobs 100000 --retention 30d --quiet""",
)
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME=SLOTS",
    callback=_queues,
    help="Serve this queue, so many jobs at once; may be repeated. '*' are the others. (default=10)",
)
@click.option("--lease", default="60s", metavar="TIME", help="How long its jobs stay its own if it dies. (60s)")
@click.option("--poll", default="1s", metavar="TIME", help="How often to look for jobs, at least. (1s)")
@click.option("--timeout", default="30s", metavar="TIME", help="How long running jobs may finish at the end. (30s)")
@click.option("--prefetch", type=click.IntRange(0), metavar="N", help="Hold at most N jobs beyond the slots.")
@click.option("--max-jobs", type=click.IntRange(1), metavar="N", help="End after N jobs.")
@click.option("--retention", metavar="TIME", help="Delete complete jobs after this time.")
@click.option("--name", metavar="NAME", help="What its leases begin with, beside host and process.")
@click.option("--notify", is_flag=True, help="Listen for what others schedule, on PostgreSQL.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing of what goes well.")
@click.pass_context
def worker(ctx: click.Context, /, *, timeout: str, quiet: bool, **settings: Any) -> None:
    """Run what is due, until told to stop.

    Any number of these may run at the same time, on any number of hosts. SIGTERM and SIGINT (Ctrl-C) end it: nothing
    more is started, what runs has --timeout to finish, and what has not is handed back; a second one ends it at once.
    """
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        made = _made(given, scheduler, settings)
        if not (quiet or given.json):
            _write_banner(given, scheduler, made, settings)
        with _told(given, scheduler, quiet=quiet):
            made.run(timeout=timeout)
    if made.was_hurried:
        ctx.exit(Exit.INTERRUPTED)


def _made(given: Given, scheduler: Scheduler, settings: dict[str, Any]) -> Worker:
    from sqlalchemy.engine import Engine  # noqa: PLC0415 (slow to import; so are those below)
    from sqlalchemy.orm import scoped_session, sessionmaker  # noqa: PLC0415

    from future_jobs import Worker  # noqa: PLC0415
    from future_jobs.sessions import session_maker  # noqa: PLC0415

    bind = database(scheduler)
    if not isinstance(bind, Engine):
        raise Problem("the Session is bound to a Connection; a worker needs one that is bound to an Engine")
    session = scheduler.session
    source: Any = session
    if find(given).place.kind == "url":
        source = bind.url  # whose engine gets as many connections as there are slots
    elif not isinstance(session, scoped_session):
        make = session_maker(session)
        source = sessionmaker(class_=make.func, **make.keywords)  # type: ignore[attr-defined]  # a partial
    session.rollback()
    return Worker(source, allow=scheduler.allow, timezone=scheduler.timezone, **settings)


def _write_banner(given: Given, scheduler: Scheduler, made: Worker, settings: dict[str, Any]) -> None:
    from future_jobs import __version__  # noqa: PLC0415

    url = database(scheduler).engine.url.render_as_string(hide_password=True)
    listens = ", and listens" if made.notify else ""
    queues = ", ".join(f"{'all others' if name == '*' else name} {slots}" for name, slots in made.queues.items())
    say(paint(f"future-jobs {__version__} worker, process {os.getpid()}", bold=True))
    for label, words in (
        ("jobs", f"{tidy(given.place)}, in {tidy(url)}"),
        ("queues", f"{tidy(queues)} at once"),
        ("lease", f"{settings['lease']}, looks every {settings['poll']} at least{listens}"),
    ):
        say(f"  {label.ljust(7)} {words}")
    say("  Ctrl-C or SIGTERM ends it once what runs is finished, a second one at once.")
    say()


@contextmanager
def _told(given: Given, scheduler: Scheduler, *, quiet: bool) -> Iterator[None]:
    """Write a line for each event meanwhile."""
    from future_jobs import events  # noqa: PLC0415

    def listener(event: str) -> Callable[..., None]:
        def hear(**data: Any) -> None:
            if given.json:
                _write_json(given, event, data)
            else:
                _write_line(scheduler, event, data)

        return hear

    wanted = [event for event in events.EVENTS if event in QUIET or not (quiet or event in UNTOLD)]
    listening = [(event, events.listen(event, listener(event))) for event in wanted]
    try:
        yield
    finally:
        for event, hear in listening:
            events.unlisten(event, hear)


def _write_json(given: Given, event: str, data: dict[str, Any]) -> None:
    from future_jobs.times import utc_now  # noqa: PLC0415

    line = json.dumps({"at": utc_now().isoformat(), "event": event, **data}, default=str)
    (given.out or sys.stdout).write(f"{line}\n")
    (given.out or sys.stdout).flush()


def _write_line(scheduler: Scheduler, event: str, data: dict[str, Any]) -> None:
    from future_jobs.times import utc_now  # noqa: PLC0415

    at = utc_now().astimezone(scheduler.timezone).strftime("%H:%M:%S")
    subject = f"{data['job_id']:>6}" if "job_id" in data else " " * 6
    words = [paint(at, dim=True), paint(WORDS.get(event, event).ljust(9), fg=COLOURS.get(event)), subject]
    name, details = tidy(data.get("callable_name", "")), _details(scheduler, event, data)
    say("  ".join(filter(None, [*words, name, paint(details, dim=True)])).rstrip())


def _details(scheduler: Scheduler, event: str, data: dict[str, Any]) -> str:
    line = " ".join(tidy(_words(scheduler, event, data)).split())
    return line if len(line) <= 200 else f"{line[:199]}…"  # noqa: PLR2004


def _words(scheduler: Scheduler, event: str, data: dict[str, Any]) -> str:
    known = dict(data)
    if "seconds" in data:
        known["took"] = span(timedelta(seconds=data["seconds"]))
    if "run_at" in data:
        known["then"] = moment(data["run_at"], scheduler.timezone)
    return DETAILS.get(event, "").format_map(known)
