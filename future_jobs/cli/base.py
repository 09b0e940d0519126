"""What the commands share: the options that say where the jobs are, the exit codes, and how errors are told."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import IO, Any, TypeVar

import click

from future_jobs.errors import AlreadyScheduled, FutureJobsError, IllegalTransition, UnknownRecurring, UsageError

from .output import paint, reserved_stdout, tidy, write_json

__all__ = ["Command", "Exit", "Given", "Group", "Main", "Problem", "given_of", "without_password"]

F = TypeVar("F", bound=Callable[..., Any])
SILENT = logging.NullHandler()  # what a command says is not logged to the screen as well
SECTIONS = ("Plan", "Look", "Run", "Set up")


class Exit(IntEnum):
    """What the exit code of a command says."""

    DONE = 0
    JOB = 1  # a job failed, or one that was named is missing or cannot be changed so
    USAGE = 2
    DATABASE = 3
    INTERRUPTED = 130


class Problem(click.ClickException):
    """Ends a command with one message and an exit code."""

    def __init__(self, message: str, code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click declares a class variable

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the message to stderr."""
        click.echo(f"{paint('Error:', sys.stderr, fg='red', bold=True)} {tidy(self.message)}", file=file, err=True)


@dataclass(slots=True)
class Given:
    """What the command line said about the application, wherever in it."""

    program: str = "future-jobs"
    app: str | None = None
    url: str | None = None
    allow: list[str] = field(default_factory=list)
    timezone: str | None = None
    json: bool = False
    place: str = ""  # where the jobs are, once that is found
    out: IO[str] | None = None  # the real standard output while --json keeps it clean

    @property
    def command(self) -> str:
        """How to call this program again for the same jobs."""
        words = [self.program]
        if self.app:
            words += ["-A", shlex.quote(self.app)]
        if self.url:
            words += ["--url", shlex.quote(without_password(self.url))]
        return " ".join(words)

    def write(self, value: object) -> None:
        """Write ``value`` as JSON to standard output."""
        write_json(value, self.out or sys.stdout)

    @contextmanager
    def stdout_kept(self) -> Iterator[None]:
        """With --json, let nothing but `write` reach standard output."""
        if not self.json:
            yield
            return
        with reserved_stdout() as self.out:
            yield
        self.out = None


def given_of(ctx: click.Context) -> Given:
    """Return what was given to the program that ``ctx`` is part of."""
    given: Given = ctx.find_root().ensure_object(Given)
    given.program = ctx.find_root().info_name or given.program
    return given


def without_password(url: str) -> str:
    """Return a URL, or what was meant to be one, fit to be shown."""
    return re.sub(r"(://[^:@/]*:)[^@]*(?=@)", r"\1***", url)


# --- options that stand anywhere ----------------------------------------------------------------------------------


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    given = given_of(ctx)
    if param.name == "allow":
        given.allow += value
    elif value and param.name:
        setattr(given, {"as_json": "json"}.get(param.name, param.name), value)


def _shared_options() -> list[click.Option]:
    settings: dict[str, Any] = {"expose_value": False, "callback": _remember}
    return [
        click.Option(
            ["-A", "--app"],
            metavar="MODULE:ATTR",
            help="The application's Engine, Session or Scheduler.",
            **settings,
        ),
        click.Option(["--url"], metavar="URL", help="The database, such as sqlite:///shop.db.", **settings),
        click.Option(
            ["--allow"],
            metavar="PREFIX",
            multiple=True,
            help="Only callables below this module, or 'registered'; may be repeated.",
            **settings,
        ),
        click.Option(["--timezone"], metavar="ZONE", help="Of local times, such as Europe/Stockholm.", **settings),
        click.Option(
            ["--json", "as_json"], is_flag=True, help="Write JSON to standard output, nothing else.", **settings
        ),
    ]


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter, title: str) -> None:
    own: list[tuple[str, str]] = []
    shared: list[tuple[str, str]] = []
    for param in command.get_params(ctx):
        if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
            (own if param.expose_value or param.is_eager else shared).append(record)
    for name, records in (("Options", own), (title, shared)):
        if records:
            with formatter.section(name):
                formatter.write_dl(records)


class Command(click.Command):
    """A command with the shared options, which tells the library's errors in one line."""

    def __init__(self, *args: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section
        self.params += _shared_options()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options first."""
        _write_options(self, ctx, formatter, "With every command")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with standard output kept clean for --json."""
        given = given_of(ctx)
        logging.getLogger("future_jobs").addHandler(SILENT)
        try:
            with given.stdout_kept():
                return super().invoke(ctx)
        except Exception as error:
            if (problem := _told(error, given)) is not None:
                raise problem from error
            raise


class Group(click.Group):
    """A group whose help lists its commands by section."""

    command_class = Command

    def __init__(self, *args: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section
        self.params += _shared_options()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, then the options."""
        self.format_commands(ctx, formatter)
        _write_options(self, ctx, formatter, "With every command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of commands after the other."""
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        longest = max(len(name) for name, _ in named)
        room = formatter.width - 6 - longest
        for section in (*SECTIONS, ""):
            rows = [
                (name.ljust(longest), command.get_short_help_str(room))
                for name, command in named
                if command is not None and not command.hidden and getattr(command, "section", "") == section
            ]
            if rows:
                with formatter.section(section or "Commands"):
                    formatter.write_dl(rows)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order in which they were added."""
        return list(self.commands)


class Main(Group):
    """The program: ends with the exit codes of `Exit` instead of tracebacks."""

    def main(  # type: ignore[override]  # click has an overload for either mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the program and exit."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            click.echo("Interrupted.", err=True)
            code = Exit.INTERRUPTED
        sys.exit(int(code or Exit.DONE))


# --- errors -------------------------------------------------------------------------------------------------------


def _told(error: Exception, given: Given) -> Problem | None:
    """Return what to say about ``error``; None if it is one that a traceback explains best."""
    if isinstance(error, UnknownRecurring | AlreadyScheduled):
        return Problem(str(error), Exit.JOB)
    if isinstance(error, UsageError | IllegalTransition):
        return Problem(str(error))
    message = None
    if isinstance(error, FutureJobsError):
        message = str(error)
    elif "sqlalchemy" in sys.modules:
        message = _database_words(error, given.place)
    if message is None:
        return None
    return Problem(message.replace("future-jobs db upgrade", f"{given.command} db upgrade"), Exit.DATABASE)


def _database_words(error: Exception, place: str) -> str | None:
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError  # noqa: PLC0415 (slow to import; so are those below)

    from future_jobs.dialects import is_lock_error, is_missing_table  # noqa: PLC0415

    if not isinstance(error, SQLAlchemyError):
        return None
    if is_missing_table(error):
        return "the tables of future_jobs are not in this database; run `future-jobs db upgrade`"
    original = error.orig if isinstance(error, DBAPIError) else None
    words = " ".join(str(original or error.args[0] if error.args else error).split())
    if is_lock_error(error):
        return f"the database is busy, another process holds it; try again ({words})"
    return f"the database of {place} says: {words}"
