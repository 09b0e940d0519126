"""The commands one begins with: the tables, and the demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import click

from .app import Place, database, find, opened, refuse_missing_file
from .base import Command, Exit, Group, given_of
from .output import say

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from future_jobs import Scheduler

__all__ = ["db", "demo"]


@click.group(
    cls=Group,
    section="Set up",
    epilog="""\b
Examples:
  future-jobs --url sqlite:///shop.db db upgrade
  future-jobs db check && future-jobs run
  future-jobs --url postgresql:// db sql > future_jobs.sql""",
)
def db() -> None:
    """Make the tables, and keep them up to date."""


@db.command()
@click.argument("revision", default="head")
@click.pass_context
def upgrade(ctx: click.Context, revision: str) -> None:
    """Make the tables, or bring them up to date.

    They are brought up to REVISION, the newest if it is not given. Does nothing if they are there. Any number of
    processes may do this at once.
    """
    from future_jobs import schema  # noqa: PLC0415 (slow to import; so are those below)

    given = given_of(ctx)
    with opened(given) as scheduler:
        engine = _engine(scheduler)
        before = schema.current(engine)
        schema.upgrade(engine, revision)
        after = schema.current(engine)
    if given.json:
        given.write({"before": before, "after": after})
    elif before == after:
        say(f"The tables are at revision {after} already.")
    else:
        say(f"The tables are at revision {after} now." + (f" They were at {before}." if before else ""))


@db.command()
@click.pass_context
def current(ctx: click.Context) -> None:
    """Show which revision the tables are at."""
    from future_jobs import schema  # noqa: PLC0415

    given = given_of(ctx)
    with opened(given) as scheduler:
        refuse_missing_file(_engine(scheduler))
        revision = schema.current(_engine(scheduler))
    if given.json:
        given.write({"current": revision, "head": schema.HEAD})
    elif revision is None:
        say(f"There are no tables. `{given.command} db upgrade` makes them (revision {schema.HEAD}).")
    else:
        newest = "the newest" if revision == schema.HEAD else f"the newest is {schema.HEAD}"
        say(f"{revision} ({newest})")


@db.command()
@click.pass_context
def check(ctx: click.Context) -> None:
    """Compare the tables with what is needed.

    The exit code is 3 if they are missing, of another revision, or were changed by hand.
    """
    from future_jobs import schema  # noqa: PLC0415

    given = given_of(ctx)
    with opened(given) as scheduler:
        engine = _engine(scheduler)
        refuse_missing_file(engine)
        schema.check(engine)
        differences = schema.drift(engine)
    if given.json:
        given.write({"current": schema.HEAD, "differences": differences})
    elif not differences:
        say(f"The tables are as they should be (revision {schema.HEAD}).")
    else:
        for each in differences:
            say(f"  {each}")
        say(f"{len(differences)} differences from revision {schema.HEAD}: the tables were changed by hand.", err=True)
    if differences:
        ctx.exit(Exit.DATABASE)


@db.command()
@click.argument("revision", default="head")
@click.option("--since", metavar="REVISION", help="Where the tables are now. [default: there are none]")
@click.pass_context
def sql(ctx: click.Context, revision: str, since: str | None) -> None:
    """Write the SQL, for somebody else to run.

    It leads from --since to REVISION, the newest if it is not given. Nothing is connected to: with --url, the kind of
    database is enough, such as postgresql:// or sqlite://.
    """
    from future_jobs import schema  # noqa: PLC0415

    given = given_of(ctx)
    place: Place = find(given).place
    if place.kind == "url":
        text = schema.sql(place.text, revision, since=since)
    else:
        with opened(given) as scheduler:
            text = schema.sql(_engine(scheduler).dialect, revision, since=since)
    if given.json:
        given.write({"sql": text})
    else:
        click.echo(text, nl=False)


def _engine(scheduler: Scheduler) -> Engine:
    return database(scheduler).engine


# --- demo ---------------------------------------------------------------------------------------------------------


@click.command(
    cls=Command,
    section="Set up",
    epilog="""\b
Examples:
  future-jobs demo
  future-jobs demo --path /tmp/tour.db --quick""",
)
@click.option(
    "--path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("future-jobs-demo.db"),
    show_default=True,
    help="The SQLite file to make; an earlier demo's is made anew.",
)
@click.option("--quick", is_flag=True, help="Do not wait for the reader.")
@click.pass_context
def demo(ctx: click.Context, path: Path, *, quick: bool) -> None:
    """Watch thirty days of a small shop, in a few seconds.

    Makes an SQLite database and plays a month in it: reminders for customers, weekly backups, a job that fails and is
    retried, one that comes too late. Nothing else is touched. The database stays, to look around in.
    """
    from future_jobs import demo as story  # noqa: PLC0415

    from .tour import Narrator  # noqa: PLC0415

    given = given_of(ctx)
    narrator = Narrator(given.program, path.absolute(), shown=not given.json, paused=not quick)
    began = monotonic()
    summary = story.play(path, narrator)
    narrator.end(summary, monotonic() - began)
    if given.json:
        given.write(asdict(summary))
