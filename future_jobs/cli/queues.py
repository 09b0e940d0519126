"""The commands about queues: queues list, pause, resume."""

from __future__ import annotations

import sys
from typing import Any

import click

from .app import scheduler_of
from .base import Command, Exit, Group, given_of
from .output import Cell, paint, say, table, tidy
from .words import distance

__all__ = ["queues"]


@click.group(
    cls=Group,
    section="Look",
    epilog="""\b
Examples:
  future-jobs queues list
  future-jobs queues pause mail
  future-jobs queues resume mail""",
)
def queues() -> None:
    """Look at queues, and pause them."""


@queues.command(
    "list",
    cls=Command,
    epilog="""\b
Example:
  future-jobs queues list""",
)
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the queues in which jobs wait, that a worker serves, or that are paused."""
    from future_jobs import limit_statements, statements  # noqa: PLC0415 (slow to import)
    from future_jobs.times import utc_now  # noqa: PLC0415

    given, now = given_of(ctx), utc_now()
    with scheduler_of(given) as scheduler:
        connection = scheduler.session.connection()
        paused = limit_statements.paused(connection)
        first: dict[str, Any] = {}
        for level in statements.levels(connection):
            first[level.queue] = min(first.get(level.queue, level.first_at), level.first_at)
        living = [each for each in limit_statements.workers(connection) if not limit_statements.is_gone(each, now)]
    served = {name for each in living for name in each.queues} - {"*"}
    found = []
    for name in sorted({*paused, *first, *served}):
        workers = sum(name in each.queues or "*" in each.queues for each in living)
        found.append((name, paused.get(name), first.get(name), workers))
    if given.json:
        given.write(
            [
                {
                    "name": name,
                    "paused_at": at and at.isoformat(),
                    "next_at": due and due.isoformat(),
                    "workers": workers,
                }
                for name, at, due, workers in found
            ]
        )
    elif found:
        rows = [
            [
                Cell(tidy(name)),
                Cell("active", "green") if at is None else Cell("paused", "yellow"),
                Cell("" if due is None else distance(due, now)),
                Cell(str(workers)),
            ]
            for name, at, due, workers in found
        ]
        table(["NAME", "STATE", "NEXT DUE", "WORKERS"], rows)
    else:
        say("No queues: nothing waits, no worker is registered, and nothing is paused.")


@queues.command(
    cls=Command,
    epilog="""\b
Example:
  future-jobs queues pause mail""",
)
@click.argument("name")
@click.pass_context
def pause(ctx: click.Context, name: str) -> None:
    """Let no job of a queue start. What runs goes on."""
    _operate(ctx, name, "pause_queue", "is paused.", "is paused already")


@queues.command(
    cls=Command,
    epilog="""\b
Example:
  future-jobs queues resume mail""",
)
@click.argument("name")
@click.pass_context
def resume(ctx: click.Context, name: str) -> None:
    """Let the jobs of a queue start again."""
    _operate(ctx, name, "resume_queue", "goes on.", "is not paused")


def _operate(ctx: click.Context, name: str, verb: str, done: str, otherwise: str) -> None:
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
