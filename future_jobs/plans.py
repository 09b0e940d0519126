"""What a recurring job was told, checked when it is declared and read again at each look; and ``@recurring``.

Pure, but for what the decorator remembers: no clock, no database.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta

from .callables import path_of
from .errors import InvalidArgument, InvalidOption, InvalidTime, UnknownOption, shown
from .options import NAMES as JOB_OPTIONS
from .recurrence import Interval, Rule, parse_rule
from .times import Duration, as_utc, parse_duration, resolve

__all__ = ["DECLARED", "Declaration", "Plan", "duration_text", "recurring", "timing"]

F = TypeVar("F", bound=Callable[..., Any])

CATCH_UP = ("latest", "all", "skip")
OVERLAP = ("skip", "queue", "allow")
LONGEST_NAME = 200
MOST_RUNS = 2**31 - 1
ON_TIME = timedelta(minutes=2)
"""How late a run may start before ``catch_up="skip"`` takes it for missed, unless ``catch_up_window`` says."""


# --- at each look -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """When it fires, and what is done about the times that were missed."""

    rule: Rule
    catch_up: str = "latest"
    window: Duration | None = None
    overlap: str = "skip"
    end: datetime | None = None
    limit: int | None = None

    @classmethod
    def of(cls, row: Any) -> Plan:
        """Return what a `RecurringJob`, or its row, says; raise for one that was damaged by hand."""
        for name, value, known in (("catch_up", row.catch_up, CATCH_UP), ("overlap", row.overlap, OVERLAP)):
            _one_of(name, value, known)
        return cls(
            parse_rule(row.rule, timezone=row.timezone, anchor=row.anchor_at),
            row.catch_up,
            None if row.catch_up_window is None else parse_duration(row.catch_up_window, argument="catch_up_window"),
            row.overlap,
            row.end_at,
            row.run_limit,
        )

    def anchor(self, base: datetime) -> datetime:
        """Return what it counts from if no start was given: the second of ``base``, or the midnight of an RRULE."""
        if isinstance(self.rule, Interval):
            return base.replace(microsecond=0)
        wall = base.astimezone(self.rule.timezone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
        return as_utc(wall, timezone=self.rule.timezone)

    def after(self, instant: datetime) -> datetime | None:
        """Return the first time after ``instant``, in UTC; None if there is none, or the end comes first."""
        found = self.rule.next_after(instant)
        if found is None or (self.end is not None and found > self.end):
            return None
        return found.astimezone(UTC)

    def first(self, *, now: datetime, start: datetime | None) -> datetime | None:
        """Return the first time after ``now``, or from ``start`` on if that is not over."""
        return self.after(now) if start is None or start < now else self.after(start - timedelta.resolution)


# --- at the declaration -------------------------------------------------------------------------------------------


def timing(
    name: str,
    rule: Any,
    *,
    timezone: tzinfo | None,
    catch_up: str,
    catch_up_window: Duration | str | None,
    overlap: str,
    jitter: Duration | str | None,
    start: datetime | str | None,
    end: datetime | str | None,
    limit: int | None,
) -> dict[str, Any]:
    """Return the columns of a `RecurringJob` that say when, everything in them checked."""
    start_at, end_at = _instant(start, "start", timezone), _instant(end, "end", timezone)
    if start_at is not None and end_at is not None and end_at < start_at:
        message = f"end={shown(end)}: {end_at.isoformat()} is before the start, {start_at.isoformat()}"
        raise InvalidTime(message, argument="end", value=end)
    parsed = parse_rule(rule, timezone=timezone, anchor=start_at)
    return {
        "name": checked_name(name),
        "rule": parsed.text,
        "timezone": _zone_name(parsed.timezone),
        "catch_up": _one_of("catch_up", catch_up, CATCH_UP),
        "catch_up_window": duration_text(catch_up_window, "catch_up_window"),
        "overlap": _one_of("overlap", overlap, OVERLAP),
        "jitter": duration_text(jitter, "jitter"),
        "start_at": start_at,
        "end_at": end_at,
        "run_limit": _limit(limit),
    }


def checked_name(name: Any) -> str:
    """Return ``name`` if a recurring job can be called so."""
    if not isinstance(name, str):
        raise InvalidArgument(f"name is {shown(name)}; pass text", argument="name", value=name)
    is_printable = all(unicodedata.category(character) not in {"Cc", "Cs", "Cn"} for character in name)
    if not 1 <= len(name) <= LONGEST_NAME or name != name.strip() or not is_printable:
        raise InvalidOption(
            f"name is {shown(name)}; use 1 to {LONGEST_NAME} printable characters, no space at the ends",
            argument="name",
            value=name,
        )
    return name


def duration_text(value: Any, argument: str) -> str | None:
    """Return a duration as the text that is stored."""
    if value is None:
        return None
    if isinstance(value, str):
        value = parse_duration(value, argument=argument)
    if not isinstance(value, timedelta | relativedelta):  # a caller without types
        message = f"{argument} is {shown(value)}; pass a timedelta, a relativedelta or text such as '10m'"
        raise InvalidArgument(message, argument=argument, value=value)
    if not value:
        return "0s"
    if isinstance(value, timedelta) and timedelta(0) < value < timedelta(seconds=1):
        return f"{value // timedelta.resolution}us"
    try:
        return parse_rule(value, timezone=UTC).text  # an interval is spelled as what it is, a duration
    except InvalidTime:
        message = f"{argument} is {shown(value)}; pass a length of time that does not count backwards"
        raise InvalidTime(message, argument=argument, value=value) from None


def _instant(value: Any, argument: str, timezone: tzinfo | None) -> datetime | None:
    if value is None:
        return None
    moves = isinstance(value, timedelta | relativedelta)
    if isinstance(value, str):
        try:
            parse_duration(value)
            moves = True
        except InvalidTime:
            return resolve(value, now=datetime(2000, 1, 1, tzinfo=UTC), timezone=timezone, argument=argument)
    if moves:
        message = f"{argument}={shown(value)}: it would move with every declaration; pass a date and time"
        raise InvalidTime(message, argument=argument, value=value)
    return as_utc(value, timezone=timezone, argument=argument)


def _zone_name(timezone: tzinfo | None) -> str | None:
    if timezone is None or timezone is UTC:
        return timezone and "UTC"
    if isinstance(timezone, ZoneInfo) and timezone.key:
        return timezone.key
    message = f"timezone={shown(timezone)} has no name to be stored by; use one such as 'Europe/Stockholm'"
    raise InvalidTime(message, argument="timezone", value=timezone)


def _one_of(argument: str, value: Any, known: tuple[str, ...]) -> str:
    if value in known:
        return str(value)
    near = get_close_matches(value, known, 1) if isinstance(value, str) else []
    hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(map(repr, known))}"
    raise InvalidOption(f"{argument} is {shown(value)}; {hint}", argument=argument, value=value)


def _limit(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"limit is {shown(value)}; pass a whole number or None", argument="limit", value=value)
    if not 1 <= value <= MOST_RUNS:
        raise InvalidOption(f"limit is {shown(value)}; use 1 to {MOST_RUNS}", argument="limit", value=value)
    return value


# --- @recurring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Declaration:
    """What ``@recurring(...)`` says of a function."""

    name: str
    rule: Any
    function: Callable[..., Any]
    settings: Mapping[str, Any]


DECLARED: dict[str, Declaration] = {}
"""What was decorated, by name, in the order of the source."""

SETTINGS = frozenset(
    {*JOB_OPTIONS, "args", "kwargs", "timezone", "catch_up", "catch_up_window", "overlap", "jitter"}
    | {"start", "end", "limit"}
)


def recurring(rule: Any, *, name: str | None = None, **settings: Any) -> Callable[[F], F]:
    """Declare a function as a recurring job; `Scheduler.sync_recurring` writes what was declared.

    ``name`` is the function's path if it is not given. The settings are those of `Scheduler.recurring`. Nothing is
    written here, and the function itself stays as it is.
    """
    for each in settings:
        if each not in SETTINGS:
            near = get_close_matches(each, SETTINGS, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(SETTINGS))}"
            raise UnknownOption(f"there is no option {each!r}; {hint}", argument=each)

    def mark(function: F) -> F:
        called = checked_name(path_of(function) if name is None else name)
        known = DECLARED.get(called)
        if known is not None and path_of(known.function) != path_of(function):
            raise InvalidOption(
                f"name is {called!r}, which {path_of(known.function)} has already; give one of them another",
                argument="name",
                value=name,
            )
        DECLARED[called] = Declaration(called, rule, function, settings)
        return function

    return mark
