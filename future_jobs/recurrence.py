"""Rules that fire again and again: cron, RFC 5545, intervals -> next instant. Pure: no clock, no database.

`parse_rule` reads one of

==============================  =======================================================================
``"0 9 * * mon-fri"``           cron, five fields as in Debian's; ``@hourly @daily @weekly @monthly @yearly``
``"FREQ=MONTHLY;BYDAY=-1FR"``   RFC 5545, one RRULE or lines of DTSTART, RRULE, RDATE, EXDATE
``"15m"``, a timedelta          an interval: exact for seconds to weeks, calendar for months and years
a dateutil rrule, rruleset      becomes its RFC 5545 text
==============================  =======================================================================

and gives a `Rule`: a value that can be compared, hashed, pickled, and stored as its text, zone and anchor.
`Rule.next_after` is strictly later than the instant it is given, compared in UTC; never an instant twice, never
a local time that does not exist.

When clocks change (Debian's cron(8)): a job whose minute or hour field starts with ``*`` runs at every instant whose
wall clock time matches, so twice in a repeated hour and not at all in a skipped one. Any other job runs once for each
wall clock time: a skipped one at the first minute after the gap, a repeated one the first time.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from math import floor
from typing import TYPE_CHECKING

from cronsim import CronSim, CronSimError
from dateutil.relativedelta import relativedelta
from dateutil.rrule import rrule, rruleset

from . import patterns, rrules
from .errors import InvalidArgument, InvalidTime, shown
from .times import WALL_CLOCK_FIELDS, Duration, as_utc, parse_duration, zone

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EPOCH", "Cron", "Interval", "Recurrence", "Rule", "explain", "parse_rule"]

EPOCH = datetime(2001, 1, 1)  # noqa: DTZ001
"""Where rules without an anchor count from: midnight in the rule's zone, a Monday, first of a month and a year."""

LONGEST_RULE = 65_536  # characters; longer text is refused unread
SHORTEST_INTERVAL = timedelta(seconds=1)
AVERAGE_MONTH = timedelta(days=30.436875)
RULE_FORMS = (
    "a rule is cron ('0 9 * * mon-fri', '@daily'), an interval ('15m', '1mo') or RFC 5545 ('FREQ=MONTHLY;BYDAY=-1FR')"
)
UNITS = {
    "y": "year",
    "mo": "month",
    "w": "week",
    "d": "day",
    "h": "hour",
    "m": "minute",
    "s": "second",
    "ms": "millisecond",
    "us": "microsecond",
}
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
FIELDS = (
    ("minute", "0-59"),
    ("hour", "0-23"),
    ("day-of-month", "1-31, L for the last day, LW for the last weekday"),
    ("month", "1-12 or jan-dec"),
    ("day-of-week", "0-7 or sun-sat (0 and 7 are Sunday), 5L for the last Friday, 1#2 for the second Monday"),
)


def parse_rule(
    rule: str | Duration | rrule | rruleset, *, timezone: tzinfo | str | None, anchor: datetime | None = None
) -> Rule:
    """Return what ``rule`` means on the clocks of ``timezone`` (None: the system's).

    ``anchor`` is where an interval, or an RRULE without DTSTART, counts from; `EPOCH` if it is None. A rule that
    does not need one ignores it. An RFC 5545 rule whose DTSTART names a zone keeps that zone.

    Raises `InvalidTime` (a ``ValueError``) for a rule that means nothing or never fires, and `InvalidArgument` (a
    ``TypeError``) for another type.
    """
    where = rrules.settled(zone(timezone))
    start = None if anchor is None else as_utc(anchor, timezone=where, argument="anchor")
    if isinstance(rule, timedelta | relativedelta):
        return _parsed(_spell_duration(rule, rule), where, start)
    if isinstance(rule, rrule | rruleset):
        return _parsed(rrules.spell(rule), where, start)
    if isinstance(rule, str):
        return _parsed(rule, where, start)
    raise InvalidArgument(
        f"rule must be text, a timedelta, a relativedelta or a dateutil rrule, not {shown(rule)}; {RULE_FORMS}",
        argument="rule",
        value=rule,
    )


def explain(rule: Rule) -> str:
    """Return ``rule`` in words: ``at 09:00, Monday to Friday, Europe/Stockholm``."""
    return ", ".join([*rule._words(), str(rule.timezone or "the system's time zone")])  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Rule(ABC):
    """When something recurs. ``parse_rule(text, timezone=timezone, anchor=anchor)`` gives an equal one.

    ``timezone`` None is the system's. ``anchor`` is None unless the rule counts from the one that was given.
    """

    text: str
    timezone: tzinfo | None
    anchor: datetime | None = None

    def next_after(self, instant: datetime) -> datetime | None:
        """Return the first instant after ``instant``, aware, in the rule's zone; None if there is none."""
        if not isinstance(instant, datetime):
            message = f"instant must be an aware datetime, not {shown(instant)}"  # type: ignore[unreachable]
            raise InvalidArgument(message, argument="instant", value=instant)
        if instant.utcoffset() is None:
            message = f"instant={shown(instant)} has no time zone; add one, such as tzinfo=UTC"
            raise InvalidTime(message, argument="instant", value=instant)
        try:
            found = self._next(instant.astimezone(UTC))
            return None if found is None else found.astimezone(self.timezone)
        except OverflowError:  # the calendar ends with the year 9999
            return None

    @property
    def needs_anchor(self) -> bool:
        """Whether the rule counts from its anchor: an interval, or RFC 5545 without DTSTART."""
        return False

    @abstractmethod
    def _next(self, instant: datetime) -> datetime | None:
        """Return the first instant after ``instant``, both in UTC."""

    @abstractmethod
    def _words(self) -> list[str]:
        """Return what `explain` says, in parts."""


@dataclass(frozen=True, slots=True)
class Cron(Rule):
    """Five fields. cronsim finds the wall clock times; which instants they are is decided here."""

    @property
    def wildcard(self) -> bool:
        """Whether the minute or the hour starts with ``*``: the jobs that do not notice clock changes."""
        minute, hour, *_ = self.text.split()
        return minute.startswith("*") or hour.startswith("*")

    def _next(self, instant: datetime) -> datetime | None:
        return self._next_match(instant) if self.wildcard else self._next_wall_time(instant)

    def _next_match(self, instant: datetime) -> datetime | None:
        start = instant + timedelta.resolution
        while True:
            wall = patterns.local(start, self.timezone)
            match = next(self._walls(wall - timedelta.resolution), None)
            if match is None:
                return None
            # The way there is as long as the wall clock says unless the clock changes: then look again from there.
            change = patterns.next_change(start, start + (match - wall), self.timezone)
            if change is None:
                return start + (match - wall)
            start = change

    def _next_wall_time(self, instant: datetime) -> datetime | None:
        # A minute earlier: a gap may end within a minute (zones had offsets with seconds until 1972).
        since = patterns.local(
            max(instant, datetime.min.replace(day=3, tzinfo=UTC)) - timedelta(minutes=1), self.timezone
        )
        instants = (self._instant(wall) for wall in self._walls(since))
        return next((at for at in instants if at > instant), None)

    def _instant(self, wall: datetime) -> datetime:
        at = patterns.exact(wall, self.timezone)
        if at is not None:
            return at
        near = wall.replace(tzinfo=self.timezone).astimezone(UTC)
        gap = timedelta(hours=26)  # the longest is a day: Apia had no 30 December 2011
        after = patterns.next_change(near - gap, near + gap, self.timezone) or near
        return after + timedelta(seconds=-patterns.local(after, self.timezone).second % 60)

    def _walls(self, since: datetime) -> Iterator[datetime]:
        with suppress(OverflowError, ValueError):  # the calendar ends with the year 9999
            yield from CronSim(self.text, since)

    def _words(self) -> list[str]:
        words = CronSim(self.text, EPOCH).explain()
        words = re.sub(r"\b(\d?)([123])th\b", _ordinal, words[0].lower() + words[1:])
        return [re.sub(r"(?<!it's) on ", ", ", words.replace(" through ", " to "), count=1)]


@dataclass(frozen=True, slots=True)
class Interval(Rule):
    """``start + n * (months + exact)`` for every whole n: the 31st of ``1mo`` stays the last day of the month."""

    start: datetime = field(kw_only=True)
    months: int = field(kw_only=True)
    exact: timedelta = field(kw_only=True)

    @property
    def needs_anchor(self) -> bool:
        """Always."""
        return True

    def _next(self, instant: datetime) -> datetime | None:
        number = floor((instant - self.start) / (self.months * AVERAGE_MONTH + self.exact))
        if not self.months:
            number = (instant - self.start) // self.exact  # the division above is of floats
        with suppress(ValueError):  # the calendar ends with the year 9999
            while self._at(number) > instant:
                number -= 1
            while self._at(number) <= instant:
                number += 1
            return self._at(number)
        return None

    def _at(self, number: int) -> datetime:
        if not (self.months and number):
            return self.start + number * self.exact
        wall = patterns.local(self.start, self.timezone) + relativedelta(months=number * self.months)
        return as_utc(wall, timezone=self.timezone) + number * self.exact

    def _words(self) -> list[str]:
        counts = re.findall(r"(\d+)([a-z]+)", self.text)
        words = [f"{count} {UNITS[unit]}{'s' * (count != '1')}" for count, unit in counts]
        start = f"{self.start.astimezone(self.timezone):%Y-%m-%d %H:%M:%S}".removesuffix(":00")
        every = " ".join(words).removeprefix("1 ") if len(words) == 1 else " ".join(words)
        return [f"every {every}", *([f"counted from {start}"] if self.anchor else [])]


@dataclass(frozen=True, slots=True)
class Recurrence(Rule):
    """RFC 5545 text and what it means."""

    meaning: patterns.RecurrenceSet = field(kw_only=True)

    @property
    def needs_anchor(self) -> bool:
        """Whether DTSTART is missing."""
        return "DTSTART" not in self.text

    def _next(self, instant: datetime) -> datetime | None:
        return self.meaning.after(instant)

    def _words(self) -> list[str]:
        return rrules.describe(self.meaning)


@lru_cache(maxsize=1024)
def _parsed(text: str, timezone: tzinfo | None, anchor: datetime | None) -> Rule:
    if len(text) > LONGEST_RULE:
        raise _bad(text, f"{len(text)} characters are too many; at most {LONGEST_RULE}")
    plain = " ".join(text.split())
    if re.match(r"(DTSTART|RRULE|EXRULE|RDATE|EXDATE)[;:]|(\S*;)?FREQ\b", plain, re.IGNORECASE):
        start = anchor or as_utc(EPOCH, timezone=timezone)
        meaning, canonical, where = rrules.parse(text.strip(), timezone=timezone, anchor=start)
        return Recurrence(canonical, where, None if "DTSTART" in canonical else anchor, meaning=meaning)
    if plain.startswith("@") or "*" in plain or len(plain.split()) == len(FIELDS):
        return _cron(plain, timezone)
    try:
        duration = parse_duration(plain, argument="rule")
    except InvalidTime as error:
        raise InvalidTime(f"{error}; {RULE_FORMS}", argument="rule", value=text) from None
    canonical = _spell_duration(duration, plain)
    months = 12 * duration.years + duration.months if isinstance(duration, relativedelta) else 0
    start = anchor or as_utc(EPOCH, timezone=timezone)
    return Interval(canonical, timezone, anchor, start=start, months=months, exact=_exact(duration))


def _cron(plain: str, timezone: tzinfo | None) -> Cron:
    text = NICKNAMES.get(plain.lower(), plain)
    if text.startswith("@"):
        raise _bad(plain, f"no such name; there are {', '.join(NICKNAMES)}, and no instant is a reboot")
    values = text.split()
    if len(values) != len(FIELDS):
        raise _bad(plain, f"cron has five fields (minute hour day-of-month month day-of-week), this has {len(values)}")
    for place, ((name, allowed), value) in enumerate(zip(FIELDS, values, strict=True)):
        try:
            values[place] = ",".join(_term(place, term) for term in value.split(","))
        except (CronSimError, ValueError, AssertionError):
            raise _bad(
                plain, f"{name} {shown(value)} is not understood; it is {allowed}, lists, ranges, steps"
            ) from None
    text = " ".join(values)
    with suppress(CronSimError):
        if next(CronSim(text, EPOCH), None):
            return Cron(text, timezone)
    _, _, day, month, weekday = values
    raise _bad(plain, f"it never fires: day-of-month {day} of month {month} with day-of-week {weekday} does not exist")


def _term(place: int, term: str) -> str:
    """Check one term of one field alone, and correct ``5-5/2``, which cronsim takes for ``5/2``."""
    _alone(place, term)
    span = term.partition("/")[0]
    return span if "/" in term and "-" in span and len(_alone(place, span)) == 1 else term


def _alone(place: int, term: str) -> set[object]:
    fields = ["*"] * len(FIELDS)
    fields[place] = term if term.isascii() else "?"
    parsed = CronSim(" ".join(fields), EPOCH)
    return {*(parsed.minutes, parsed.hours, parsed.days, parsed.months, parsed.weekdays)[place]}


def _exact(duration: Duration) -> timedelta:
    if isinstance(duration, timedelta):
        return duration
    units = ("days", "hours", "minutes", "seconds", "microseconds")
    return timedelta(**{unit: getattr(duration, unit) for unit in units})


def _spell_duration(duration: Duration, rule: object) -> str:
    """Return the text of ``duration``, largest unit first; refuse what is no interval."""
    exact = _exact(duration)
    months = 0
    if isinstance(duration, relativedelta):
        if duration.leapdays or any(getattr(duration, name) is not None for name in WALL_CLOCK_FIELDS):
            raise _bad(rule, "an interval is a length; for a time of day or a weekday use cron or an RRULE")
        months = 12 * int(duration.years) + int(duration.months)
    if months < 0 or exact < timedelta(0) or not (months or exact >= SHORTEST_INTERVAL):
        raise _bad(rule, "an interval is at least one second, and does not count backwards")
    left = exact // timedelta.resolution
    words = [f"{number}{unit}" for number, unit in zip(divmod(months, 12), ("y", "mo"), strict=True) if number]
    if exact.days % 7 == 0 and exact == timedelta(days=exact.days):
        return "".join([*words, f"{exact.days // 7}w"]) if exact else "".join(words)
    for unit, size in (("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1000)):
        number, left = divmod(left, size)
        words += [f"{number}{unit}"] if number else []
    return "".join([*words, f"{left}us"] if left else words)


def _ordinal(match: re.Match[str]) -> str:
    """Correct the 21th, 22th and 23th of cronsim."""
    tens, ones = match.groups()
    return match[0] if tens == "1" else f"{tens}{ones}{('st', 'nd', 'rd')[int(ones) - 1]}"


def _bad(rule: object, reason: str) -> InvalidTime:
    return InvalidTime(f"rule={shown(rule)}: {reason}", argument="rule", value=rule)
