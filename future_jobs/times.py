"""When: durations, points in time, time zones and clocks.

Everything here is pure, and everything it returns is an aware datetime in UTC with microseconds. A ``when``
is one of

==========================  ==============================================================================
an aware datetime           that instant
a naive datetime            local time of the scheduler's zone (``None``: the system's)
a timedelta                 counted from now, exact
a relativedelta             counted from now on the calendar of the scheduler's zone
duration text               ``90s 30m 5h 3d 2w 1mo 1y``, ``1h30m``, ``3 days``, ``P1DT2H``
ISO 8601 date and time      ``2026-12-01T09:00``, with ``Z`` or an offset, or without: local time
==========================  ==============================================================================

Seconds to weeks are exact: ``1d`` is 24 hours whatever the clocks do. Months and years are calendar units:
they keep the time of day and stop at the month's end. A local time that a clock change skips moves forward
by as much as the clock did; one that happens twice is the first (``fold=1`` asks for the second).

Nothing is guessed. Text that is not one of these forms is refused with `InvalidTime`, a ``ValueError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from datetime import UTC, date, datetime, timedelta, tzinfo
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from dateutil.relativedelta import relativedelta

from .errors import InvalidArgument, InvalidTime, shown

__all__ = [
    "UTC",
    "Clock",
    "Duration",
    "When",
    "as_utc",
    "parse_duration",
    "resolve",
    "resolve_age",
    "resolve_expiry",
    "seconds_of",
    "utc_now",
    "zone",
]

Clock: TypeAlias = Callable[[], datetime]
Duration: TypeAlias = timedelta | relativedelta
When: TypeAlias = datetime | timedelta | relativedelta | str

# Largest first: the order in which they may be written, each at most once.
UNITS = {
    "years": "y|years?",
    "months": "mo|months?",
    "weeks": "w|weeks?",
    "days": "d|days?",
    "hours": "h|hours?",
    "minutes": "m|mins?|minutes?",
    "seconds": "s|secs?|seconds?",
    "milliseconds": "ms|milliseconds?",
    "microseconds": "us|microseconds?",
}
CALENDAR_UNITS = ("years", "months")
WALL_CLOCK_FIELDS = ("year", "month", "day", "weekday", "hour", "minute", "second", "microsecond")

DURATION_FORMS = "a duration is 90s 30m 5h 3d 2w 1mo 1y, 1h30m, '3 days' or P1DT2H, each unit once, largest first"
TIME_FORMS = "a time is 2026-12-01T09:00, with Z or an offset, or without for local time"
BACKWARDS = "a duration cannot count backwards; for when, pass a past datetime to run at once"
LONGEST_DURATION = 100  # characters; longer text is refused unread

_NUMBER = dict.fromkeys(UNITS, r"\d+(?:[.]\d+)?") | dict.fromkeys(CALENDAR_UNITS, r"\d+")
_TEXT_AND = r"(?:(?<=[a-z]),? ?(?:and )?)?"
_DURATION_TEXT = re.compile(
    "".join(rf"(?:{_TEXT_AND}(?P<{unit}>{_NUMBER[unit]}) ?(?:{words})(?![a-z]))?" for unit, words in UNITS.items()),
    re.ASCII,
)
_DURATION_ISO = re.compile(
    r"P{years}{months}{weeks}{days}(?:T(?=\d){hours}{minutes}{seconds})?".format(
        **{unit: rf"(?:(?P<{unit}>{number.replace('.', '.,')}){unit[0].upper()})?" for unit, number in _NUMBER.items()}
    ),
    re.ASCII,
)
# Stricter than `datetime.fromisoformat`: it takes any separator, cuts nanoseconds, reads 09:00,5 as half a second.
_DATE_TIME = re.compile(
    r"\d{4}(?P<dash>-?)(?:\d\d(?P=dash)\d\d|W\d\d(?P=dash)\d)"
    r"(?:[T ](?P<hour>\d\d)(?P<colon>:?)\d\d(?:(?P=colon)\d\d(?:[.,](?P<fraction>\d{1,9}))?)?"
    r"(?:Z|[+-]\d\d(?::?\d\d(?::?\d\d)?)?)?)?",
    re.ASCII | re.IGNORECASE,
)


def utc_now() -> datetime:
    """Return the present instant: the clock of a Scheduler that was given none."""
    return datetime.now(UTC)


def zone(value: tzinfo | str | None, *, argument: str = "timezone") -> tzinfo | None:
    """Return the time zone that ``value`` names; ``None``, the system's, stays ``None``.

    A zone made by pytz becomes the `ZoneInfo` of its name: used without pytz's own ``localize`` it would
    give local mean time, minutes off.
    """
    if isinstance(value, tzinfo) and hasattr(value, "localize"):
        value = getattr(value, "zone", None) or value
    if value is None or isinstance(value, tzinfo):
        return value
    if not isinstance(value, str):
        raise _wrong_type(value, argument, "a tzinfo, a name such as 'Europe/Stockholm' or None")
    try:
        return ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # no such file; a path, not a name; a directory
        names = {name.rpartition("/")[2].casefold(): name for name in sorted(available_timezones())}
        names |= {name.casefold(): name for name in available_timezones()}
        near = get_close_matches(value[:64].casefold().replace(" ", "_"), names, 1, 0.75)
        advice = f"did you mean {names[near[0]]!r}?" if near else "use a name such as 'Europe/Stockholm'"
        message = f"{argument}={shown(value)}: no such time zone here; {advice}"
        raise InvalidTime(message, argument=argument, value=value) from None


def parse_duration(text: str, *, argument: str = "duration") -> Duration:
    """Return the duration that ``text`` spells: a `relativedelta` if it has months or years, else a `timedelta`.

    ``90s 30m 5h 3d 2w 1mo 1y``, compounds (``1h30m``), words (``1 hour and 30 minutes``) and ISO 8601
    (``P1DT2H``). Exact units may have a decimal fraction. Never negative.
    """
    if not isinstance(text, str):
        raise _wrong_type(text, argument, "text such as '3d'")
    try:
        duration = _duration(text)
        if duration is None:
            raise ValueError(_why_not(text, DURATION_FORMS))  # noqa: TRY301
    except (ValueError, OverflowError) as error:
        raise _refused(error, argument, text) from None
    # A relativedelta can be changed in place; the cache keeps its own.
    return duration if isinstance(duration, timedelta) else copy(duration)


def resolve(when: When, *, now: datetime, timezone: tzinfo | None, argument: str = "when") -> datetime:
    """Return the instant that ``when`` means, in UTC; durations count from ``now``.

    Raises `InvalidArgument` (a ``TypeError``) for what is neither a time nor a duration, such as a number or a
    date, and `InvalidTime` (a ``ValueError``) for one that means nothing, counts backwards, or lies outside
    the years 1 to 9999. ``argument`` is the name that the message uses.
    """
    start = as_utc(now, timezone=timezone)
    if not isinstance(when, str | datetime | timedelta | relativedelta):
        raise _wrong_type(when, argument, "a datetime, timedelta, relativedelta or text such as '3d'")
    try:
        meaning = _read(when) if isinstance(when, str) else when
        if isinstance(meaning, datetime):
            return _instant(meaning, timezone)
        return _count(meaning, start, timezone)
    except (ValueError, OverflowError, OSError) as error:
        raise _refused(error, argument, when) from None


def resolve_expiry(expires: When | None, *, run_at: datetime, timezone: tzinfo | None) -> datetime | None:
    """Return the instant after which a job due at ``run_at`` no longer starts, in UTC; ``None`` is never.

    Durations count from ``run_at``. Expiring at ``run_at`` itself is allowed, earlier is not.
    """
    if expires is None:
        return None
    due = as_utc(run_at, timezone=timezone, argument="run_at")
    expiry = resolve(expires, now=due, timezone=timezone, argument="expires")
    if expiry < due:
        raise InvalidTime(
            f"expires={shown(expires)}: {expiry.isoformat()} is before the job is due, {due.isoformat()}; "
            "a duration counts from then, None is never",
            argument="expires",
            value=expires,
        )
    return expiry


def resolve_age(age: When, *, now: datetime, timezone: tzinfo | None, argument: str = "older_than") -> datetime:
    """Return the instant that lies ``age`` before ``now``, in UTC; a point in time is itself."""
    try:
        meaning = _read(age) if isinstance(age, str) else age
        if isinstance(meaning, timedelta | relativedelta):
            return as_utc(now, timezone=timezone) - meaning
    except (ValueError, OverflowError) as error:
        raise _refused(error, argument, age) from None
    return resolve(age, now=now, timezone=timezone, argument=argument)


def as_utc(value: datetime, *, timezone: tzinfo | None, argument: str = "now") -> datetime:
    """Return the instant of ``value``, in UTC; a naive one is local time of ``timezone``."""
    if not isinstance(value, datetime):
        raise _wrong_type(value, argument, "a datetime")
    try:
        return _instant(value, timezone)
    except (ValueError, OverflowError, OSError) as error:
        raise _refused(error, argument, value) from None


def _instant(value: datetime, timezone: tzinfo | None) -> datetime:
    if type(value) is not datetime:  # a subclass, such as pandas.Timestamp
        value = datetime.combine(value.date(), value.timetz())
    if value.utcoffset() is not None:
        return value.astimezone(UTC)
    wall = value.replace(tzinfo=None)
    instant = wall.replace(tzinfo=timezone).astimezone(UTC)
    # In a gap, fold=1 (and some dateutil zones always) read the time with the offset that holds after it: the
    # result lies before the gap, and lacks its length.
    lacking = wall - instant.astimezone(timezone).replace(tzinfo=None)
    return instant + max(lacking, timedelta(0))


def _count(duration: Duration, start: datetime, timezone: tzinfo | None) -> datetime:
    end = start + duration if isinstance(duration, timedelta) else _count_calendar(duration, start, timezone)
    if end < start:
        raise ValueError(BACKWARDS)
    return end


def _count_calendar(duration: relativedelta, start: datetime, timezone: tzinfo | None) -> datetime:
    """Add months and years on the wall clock of ``timezone``, then the rest exactly.

    One that sets fields (``hour=9``, ``weekday=MO``) speaks of the wall clock: it is added there as a whole.
    """
    local = start.astimezone(timezone)
    wall = local.replace(tzinfo=None, fold=0)
    if duration.leapdays or any(getattr(duration, field) is not None for field in WALL_CLOCK_FIELDS):
        return _instant((wall + duration).replace(fold=local.fold), timezone)
    exact = timedelta(
        days=duration.days,
        hours=duration.hours,
        minutes=duration.minutes,
        seconds=duration.seconds,
        microseconds=duration.microseconds,
    )
    if not (duration.years or duration.months):
        return start + exact
    return _instant(wall + relativedelta(years=duration.years, months=duration.months), timezone) + exact


def _read(text: str) -> Duration | datetime:
    duration = _duration(text)
    if duration is not None:
        return duration
    match = _DATE_TIME.fullmatch(text.strip())
    if match is None and re.match(r"\s*\d\d?:\d\d", text):
        raise ValueError("a time of day needs a date, and an hour in 0..23; write '2026-12-01T09:00'")
    if match is None or not (match["hour"] or match["dash"]):
        raise ValueError(_why_not(text, f"{DURATION_FORMS}; {TIME_FORMS}"))
    if match["hour"] is None:
        date.fromisoformat(match[0].upper())
        raise ValueError(f"a date without a time of day is ambiguous; write '{match[0]}T00:00'")
    if match["hour"] > "23":  # a newer Python may read 24:00 as the next day
        raise ValueError("hour must be in 0..23")
    if (match["fraction"] or "")[6:].strip("0"):
        raise ValueError("times are kept to the microsecond, this is finer")
    return datetime.fromisoformat(match[0].upper())


def _duration(text: str) -> Duration | None:
    return _parsed(text) if len(text) <= LONGEST_DURATION else None


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Duration | None:
    text = " ".join(text.split())
    match = _DURATION_TEXT.fullmatch(text) or _DURATION_ISO.fullmatch(text)
    numbers = match.groupdict("") if match else {}
    given = {unit: Fraction(number.replace(",", ".")) for unit, number in numbers.items() if number}
    if not given:
        return None
    years, months = (given.pop(unit, None) for unit in CALENDAR_UNITS)
    microseconds = sum(number * (timedelta(**{unit: 1}) // timedelta.resolution) for unit, number in given.items())
    if microseconds != int(microseconds):
        raise ValueError("durations are kept to the microsecond, this is finer")
    exact = timedelta(microseconds=int(microseconds))
    if years is None and months is None:
        return exact
    return relativedelta(
        years=int(years or 0),
        months=int(months or 0),
        days=exact.days,
        seconds=exact.seconds,
        microseconds=exact.microseconds,
    )


def _why_not(text: str, forms: str) -> str:
    """Say what is wrong with ``text``, which is no duration and, where ``forms`` has them, no time."""
    if len(text) <= LONGEST_DURATION:
        if text.lstrip().startswith(("-", "−")) and _is_duration(text.lstrip()[1:]):
            return BACKWARDS
        for meant in _corrections(text):
            if _is_duration(meant):
                return f"not understood, did you mean {meant!r}? {forms}"
    return f"not understood; {forms}"


def _corrections(text: str) -> Iterator[str]:
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text.strip())  # digits of other scripts
    if len(text) < 4:  # noqa: PLR2004
        yield f"{text}d"
    yield text.replace("M", "mo")
    yield text.lower()
    yield text.upper()
    yield re.sub(r"^([a-z]+) ?(\d+)$", r"\2\1", text)
    yield re.sub("[a-z]+", lambda word: (get_close_matches(word[0], UNITS, 1, 0.75) or word)[0], text.lower())


def _is_duration(text: str) -> bool:
    with suppress(ValueError, OverflowError):
        return _duration(text) is not None
    return False


def seconds_of(value: str | timedelta, argument: str) -> float:
    """Return a duration, such as ``"60s"``, in seconds; raise `InvalidTime` if it is not exact, or negative."""
    duration = parse_duration(value, argument=argument) if isinstance(value, str) else value
    if not isinstance(duration, timedelta) or duration < timedelta(0):
        raise InvalidTime(
            f"{argument} is {shown(value)}; pass an exact duration such as '60s'", argument=argument, value=value
        )
    return duration.total_seconds()


def _refused(error: Exception, argument: str, value: object) -> InvalidTime:
    reason = "outside the years 1 to 9999" if isinstance(error, OverflowError | OSError) else error
    return InvalidTime(f"{argument}={shown(value)}: {reason}", argument=argument, value=value)


def _wrong_type(value: object, argument: str, wanted: str) -> InvalidArgument:
    advice = "; a date is ambiguous, pass a datetime" if type(value) is date else ""
    return InvalidArgument(f"{argument} must be {wanted}, not {shown(value)}{advice}", argument=argument, value=value)
