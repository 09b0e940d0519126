"""A crontab's lines as recurring jobs that run their commands.

A row of the database that runs a shell command is a row that can do anything, so this is off: `run` refuses unless
the Scheduler that runs the job names this module, ``allow=["shop.", "future_jobs.contrib.crontab"]``.

The format is that of crontab(5): five fields or ``@daily`` and the like, settings (``PATH=...``), ``%`` for a newline
and what follows the first as standard input, and a column with a user in the system's crontabs. ``CRON_TZ`` is the
zone of the lines below it.
"""

from __future__ import annotations

import getpass
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from typing import Any

from sqlalchemy.orm import Session

from future_jobs import CallableRefused, InvalidTime, RecurringJob, Scheduler
from future_jobs.callables import Allow
from future_jobs.models import SCHEDULER
from future_jobs.recurrence import Rule, parse_rule

__all__ = ["CommandFailed", "Line", "declare", "parse", "run"]

PATH = f"{__name__}.run"
KEPT = 10_000  # characters of what a command writes
LONGEST_NAME = 200

_SETTING = re.compile(r"""\s*(?P<quote>["']?)(?P<name>[A-Za-z_]\w*)(?P=quote)\s*=\s*(?P<value>.*)""")
_ENTRY = re.compile(r"\s*(?P<schedule>@\S+|\S+(?:\s+\S+){4})\s+(?P<rest>\S.*)")


# --- running ------------------------------------------------------------------------------------------------------


class CommandFailed(Exception):
    """A command that ended with another exit code than 0; the message has the end of what it wrote."""


def run(
    command: str,
    *,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    session: Session,
) -> str | None:
    """Run a shell command as cron would; return the end of what it wrote.

    Refuses unless ``allow`` names this module. Raises `CommandFailed` if the exit code is not 0.
    """
    _refuse_unless_named(getattr(session.info.get(SCHEDULER), "allow", None))
    settings = dict(environment or {})
    done = subprocess.run(  # noqa: S603 (that is what it is for)
        [settings.get("SHELL", "/bin/sh"), "-c", command],
        input=stdin or "",
        env={**os.environ, **settings},
        cwd=settings.get("HOME"),
        user=None if user in {None, getpass.getuser()} else user,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise CommandFailed(f"exit code {done.returncode}: {command}\n{done.stdout[-KEPT:]}")
    return done.stdout[-KEPT:] or None


def _refuse_unless_named(allow: Allow) -> None:
    named = [] if allow is None or isinstance(allow, str) else [each.rstrip(".") for each in allow]
    if not {__name__, PATH}.intersection(named):
        raise CallableRefused(
            f"commands are not run unless the allow list says so; put {__name__!r} into that of the Scheduler",
            argument="allow",
            value=allow,
        )


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One entry of a crontab. ``rule`` is None where it cannot recur, and ``problem`` says why."""

    number: int
    schedule: str
    command: str
    rule: Rule | None = None
    problem: str | None = None
    stdin: str | None = None
    user: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def kwargs(self) -> dict[str, Any]:
        """What `run` is given besides the command."""
        given = {"stdin": self.stdin, "environment": dict(self.environment), "user": self.user}
        return {name: value for name, value in given.items() if value}


def parse(text: str, *, timezone: tzinfo | str | None = None, system: bool = False) -> Iterator[Line]:
    """Yield the entries of a crontab; ``system`` tells that each names a user, as in /etc/crontab and /etc/cron.d."""
    environment: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if setting := _SETTING.fullmatch(line):
            environment[setting["name"]] = _unquoted(setting["value"].strip())
            continue
        yield _entry(number, line, dict(environment), timezone, system=system)


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _entry(number: int, line: str, environment: dict[str, str], timezone: tzinfo | str | None, *, system: bool) -> Line:
    entry = _ENTRY.fullmatch(line)
    if entry is None:
        return Line(number, line.strip(), "", problem="it is neither a setting nor a time and a command")
    user, rest = None, entry["rest"]
    if system:
        user, _, rest = rest.partition(" ") if "\t" not in rest.split(" ")[0] else rest.partition("\t")
    schedule, (command, stdin) = " ".join(entry["schedule"].split()), _parted(rest.strip())
    zone = environment.pop("CRON_TZ", None) or timezone
    if not command:
        return Line(number, schedule, "", problem="there is no command")
    try:
        rule = parse_rule(schedule, timezone=zone)
    except InvalidTime as error:
        return Line(number, schedule, command, problem=str(error))
    return Line(number, schedule, command, rule, None, stdin, user, environment)


def _parted(text: str) -> tuple[str, str | None]:
    r"""Return the command and its standard input: ``%`` is a newline, and the first ends the command; ``\%`` is one."""
    command, *lines = [part.replace("\\%", "%") for part in re.split(r"(?<!\\)%", text)]
    return command.strip(), "\n".join(lines) if lines else None


# --- declaring ----------------------------------------------------------------------------------------------------


def names(lines: list[Line], prefix: str) -> list[str]:
    """Return a name for each line, made of its command, so that a new time changes the row and adds none."""
    found: list[str] = []
    for line in lines:
        plain = " ".join(f"{prefix}: {line.command}".split())[: LONGEST_NAME - 6].strip()
        same = sum(each == plain or re.fullmatch(re.escape(plain) + r" \(\d+\)", each) is not None for each in found)
        found.append(f"{plain} ({same + 1})" if same else plain)
    return found


def declare(scheduler: Scheduler, lines: list[Line], *, prefix: str, **settings: Any) -> list[RecurringJob]:
    """Declare a recurring job for each line that can recur, under the name of its command; commit as usual.

    The Scheduler's ``allow`` has to name this module, as that of whoever runs the jobs. ``settings`` are those of
    `Scheduler.recurring`.
    """
    _refuse_unless_named(scheduler.allow)
    usable = [line for line in lines if line.rule is not None]
    return [
        scheduler.recurring(
            name, line.schedule, PATH, args=[line.command], kwargs=line.kwargs, timezone=line.rule.timezone, **settings
        )
        for name, line in zip(names(usable, prefix), usable, strict=True)
        if line.rule is not None
    ]
