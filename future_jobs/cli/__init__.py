"""The command line: ``future-jobs``, or ``python -m future_jobs``.

Each command is a thin layer over `future_jobs.Scheduler`: it finds the application, does one thing through the public
interface, commits, and says what happened; ``docs/cli.md`` is its manual. SQLAlchemy, Alembic and the application are
imported by the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from future_jobs import __version__

from .base import Main
from .change import cancel, prune, reschedule, retry, schedule
from .look import list_, show
from .queues import queues
from .run import run
from .schedules import import_crontab, schedules
from .setup import db, demo
from .work import worker

__all__ = ["main"]


def _versions(ctx: click.Context, _param: click.Parameter, wanted: Any) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    found = [f"Python {platform.python_version()}"]
    for package in ("SQLAlchemy", "alembic", "click"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    click.echo(f"future-jobs {__version__} ({', '.join(found)})")
    ctx.exit()


@click.group(
    "future-jobs",
    cls=Main,
    invoke_without_command=True,
    epilog="""\b
Examples:
  future-jobs demo                                          a tour of five seconds
  future-jobs --url sqlite:///shop.db db upgrade            make the tables
  future-jobs -A shop.db:Session schedule 3d shop.mail.welcome '[11]'
  * * * * *  cd /srv/shop && future-jobs run -q             in a crontab
  future-jobs -A shop.db:Session worker                     at once, until it is stopped

\b
Exit codes:
  0  done                   2  the command line cannot be right
  1  a job failed, or a     3  the database cannot be used
     named one is missing   130  interrupted""",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions, help="Show the versions and exit."
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run calls later, from your own database.

    A job is a row beside your data: what to call, when, and until when it makes sense. These commands schedule jobs,
    run those that are due, and show what became of them.

    The options below the commands may stand before or after a command's name.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (
    *(schedule, reschedule, cancel, retry, import_crontab),
    *(list_, show, schedules, queues, run, worker, prune, db, demo),
):
    main.add_command(_command)
