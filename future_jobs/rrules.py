"""RFC 5545 recurrence rules as text: read, written, and put into words."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from datetime import timezone as datetime_timezone
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from dateutil import rrule as du
from dateutil.tz import tzlocal

from .errors import InvalidTime, shown
from .patterns import HOURLY, MONTHLY, WEEKLY, YEARLY, Pattern, RecurrenceSet, local
from .times import as_utc, zone

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["describe", "parse", "settled", "spell"]

FREQUENCIES = ("YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "MINUTELY", "SECONDLY")
WEEKDAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
RANGES = {
    "INTERVAL": (1, 10**8),
    "COUNT": (1, 10**9),
    "BYSECOND": (0, 59),
    "BYMINUTE": (0, 59),
    "BYHOUR": (0, 23),
    "BYMONTHDAY": (-31, 31),
    "BYYEARDAY": (-366, 366),
    "BYWEEKNO": (-53, 53),
    "BYMONTH": (1, 12),
    "BYSETPOS": (-366, 366),
    "BYEASTER": (-80, 250),
}
ZERO_MEANS_SOMETHING = {"BYSECOND", "BYMINUTE", "BYHOUR", "BYEASTER"}
DAY_FILTERS = ("BYMONTH", "BYWEEKNO", "BYYEARDAY", "BYMONTHDAY", "BYEASTER")
COUNTED = 10_000  # a COUNT up to this is walked once, when the rule is parsed
NAMED_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMED_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
NAMED_UNITS = ("year", "month", "week", "day", "hour", "minute", "second")


def parse(text: str, *, timezone: tzinfo | None, anchor: datetime) -> tuple[RecurrenceSet, str, tzinfo | None]:
    """Read RRULE, DTSTART, RDATE, EXDATE and EXRULE lines: what they mean, their canonical text, their zone.

    Without DTSTART the rule starts at ``anchor``. The zone of DTSTART, if it names one or ends in ``Z``, is the
    zone of the rule.
    """
    lines = _lines(text)
    starts = [line for line in lines if line[0] == "DTSTART"]
    if len(starts) > 1:
        raise _bad(text, "DTSTART may be given once")
    wall = local(anchor, timezone).replace(microsecond=0)
    start = anchor.replace(microsecond=0)
    for _, tzid, value in starts:
        timezone = UTC if value.endswith("Z") else zone(tzid, argument="TZID") if tzid else timezone
        wall, start = _moment(text, "DTSTART", value), _instant(text, "DTSTART", tzid, value, timezone)

    def instants(property_: str) -> list[datetime]:
        found = [(tzid, value) for name, tzid, values in lines if name == property_ for value in values.split(",")]
        return sorted({_instant(text, property_, tzid, value, timezone) for tzid, value in found})

    def patterns(property_: str) -> tuple[Pattern, ...]:
        values = [value for name, _, value in lines if name == property_]
        return tuple(_pattern(text, value, start=start, wall=wall, timezone=timezone) for value in values)

    meaning = RecurrenceSet(
        patterns("RRULE"), patterns("EXRULE"), tuple(instants("RDATE")), frozenset(instants("EXDATE"))
    )
    if not (meaning.patterns or meaning.dates):
        raise _bad(text, "there is no RRULE or RDATE in it, so it never fires")
    if meaning.after(datetime.min.replace(tzinfo=UTC)) is None:
        raise _bad(text, "it never fires: all of its times are excluded or skipped by clock changes")
    if len(lines) == 1 and lines[0][0] == "RRULE":
        return meaning, lines[0][2], timezone
    canonical = [f"{name};TZID={tzid}:{value}" if tzid else f"{name}:{value}" for name, tzid, value in lines]
    return meaning, "\n".join(canonical), timezone


def spell(rule: du.rrule | du.rruleset) -> str:
    """Return the RFC 5545 text of a dateutil object, time zones included, which ``str(rule)`` leaves out."""
    parts = vars(rule)
    if isinstance(rule, du.rrule):
        return "\n".join([*_spell_start(parts["_dtstart"]), f"RRULE:{_spell_rule(rule)}"])
    rules = [*parts["_rrule"], *parts["_exrule"]]
    starts = {tuple(_spell_start(vars(each)["_dtstart"])) for each in rules}
    if len(starts) > 1:
        raise InvalidTime(
            f"rule={shown(rule)}: RFC 5545 has one DTSTART per set, these rules start at different times",
            argument="rule",
            value=rule,
        )
    lines = [line for start in starts for line in start]
    lines += [f"RRULE:{_spell_rule(each)}" for each in parts["_rrule"]]
    lines += [f"EXRULE:{_spell_rule(each)}" for each in parts["_exrule"]]
    lines += [f"RDATE:{_spell_moment(each)}" for each in sorted(parts["_rdate"])]
    lines += [f"EXDATE:{_spell_moment(each)}" for each in sorted(parts["_exdate"])]
    return "\n".join(lines)


def settled(timezone: tzinfo | None) -> tzinfo | None:
    """Return the standard library's zone for one of dateutil, which cannot be hashed, and hardly stored."""
    if timezone is None or isinstance(timezone, ZoneInfo | datetime_timezone):
        return timezone
    file = re.fullmatch(r"tzfile\('(?:.*/zoneinfo/)?(\w[\w+-]*(?:/[\w+-]+)*)'\)", repr(timezone))
    if file:
        return zone(file[1])
    if isinstance(timezone, tzlocal):
        return None
    offset = timezone.utcoffset(None)
    if offset is None:
        raise InvalidTime(
            f"timezone={shown(timezone)} has no name to be stored by; use zoneinfo.ZoneInfo('Europe/Stockholm')",
            argument="timezone",
            value=timezone,
        )
    return datetime_timezone(offset) if offset else UTC


def describe(meaning: RecurrenceSet) -> list[str]:
    """Return a set in English, in parts."""
    rules = [", ".join(_describe(pattern)) for pattern in meaning.patterns]
    words = [", and ".join(rules)] if rules else []
    if meaning.dates:
        words.append(f"on {_amount(len(meaning.dates), 'more date' if rules else 'date')}")
    words += [f"except {', '.join(_describe(pattern))}" for pattern in meaning.exceptions]
    return words + ([f"except on {_amount(len(meaning.exdates), 'date')}"] if meaning.exdates else [])


def _describe(pattern: Pattern) -> list[str]:
    unit = NAMED_UNITS[pattern.freq]
    words = [f"every {unit}" if pattern.interval == 1 else f"every {pattern.interval} {unit}s"]
    words += [_describe_days(name, values) for name, values in pattern.days]
    if pattern.weekdays:
        words.append(_describe_weekdays(pattern.weekdays))
    clocks = [(hour, minute) for hour in pattern.hours for minute in pattern.minutes]
    if clocks and pattern.freq < HOURLY and len(clocks) <= 6:  # noqa: PLR2004
        shown_seconds = "" if pattern.seconds == (0,) else f" and {_joined(pattern.seconds)} seconds"
        words.append(f"at {_joined([f'{hour:02}:{minute:02}' for hour, minute in clocks])}{shown_seconds}")
    else:
        given = (("hour", pattern.hours), ("minute", pattern.minutes), ("second", pattern.seconds))
        words += [f"{name} {_joined(values)}" for name, values in given if values]
    if pattern.setpos:
        words.append(f"only the {_joined([_ordinal(position) for position in pattern.setpos])} of these")
    if pattern.last is not None:
        words.append(f"until {local(pattern.last, pattern.timezone):%Y-%m-%d %H:%M:%S}".removesuffix(":00"))
    return words


def _describe_days(name: str, values: tuple[int, ...]) -> str:
    if name == "BYMONTH":
        return f"in {_joined([NAMED_MONTHS[value - 1] for value in values])}"
    if name == "BYEASTER":
        return "Easter Sunday" if values == (0,) else f"{_joined(values)} days after Easter Sunday"
    unit = {"BYMONTHDAY": "day", "BYYEARDAY": "day of the year", "BYWEEKNO": "week of the year"}[name]
    return f"the {_joined([_ordinal(value) for value in values])} {unit}"


def _describe_weekdays(weekdays: tuple[tuple[int, int], ...]) -> str:
    days = [day for day, n in weekdays if not n]
    if len(days) > 2 and days == list(range(days[0], days[-1] + 1)):  # noqa: PLR2004
        return f"{NAMED_WEEKDAYS[days[0]]} to {NAMED_WEEKDAYS[days[-1]]}"
    return _joined([f"the {_ordinal(n)} {NAMED_WEEKDAYS[day]}" if n else NAMED_WEEKDAYS[day] for day, n in weekdays])


def _joined(items: Sequence[object]) -> str:
    *head, tail = map(str, items)
    return f"{', '.join(head)} and {tail}" if head else tail


def _amount(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _ordinal(number: int) -> str:
    if number < 0:
        return "last" if number == -1 else f"{_ordinal(-number)} last"
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _spell_start(dtstart: datetime) -> list[str]:
    timezone = settled(zone(dtstart.tzinfo))
    if dtstart.tzinfo is None or timezone is UTC or str(timezone) == "UTC":
        return [f"DTSTART:{_spell_moment(dtstart)}"]
    if isinstance(timezone, ZoneInfo) and timezone.key:
        return [f"DTSTART;TZID={timezone.key}:{dtstart:%Y%m%dT%H%M%S}"]
    raise InvalidTime(
        f"rule: its dtstart has the time zone {shown(dtstart.tzinfo)}, which has no name to be stored by; "
        "use zoneinfo.ZoneInfo('Europe/Stockholm')",
        argument="rule",
        value=dtstart,
    )


def _spell_moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}" if moment.tzinfo else f"{moment:%Y%m%dT%H%M%S}"


def _spell_rule(rule: du.rrule) -> str:
    text = str(rule).rpartition("RRULE:")[2]
    until = vars(rule)["_until"]
    return re.sub(r"UNTIL=\w+", f"UNTIL={_spell_moment(until)}", text) if until else text


def _lines(text: str) -> list[tuple[str, str, str]]:
    """Split into (property, TZID, value). Lines may be folded (RFC 5545, 3.1), or be one line with spaces."""
    unfolded = re.sub(r"\r?\n[ \t](?!\s*(?:DTSTART|RRULE|EXRULE|RDATE|EXDATE|FREQ)\b)", "", text, flags=re.IGNORECASE)
    lines = []
    for line in unfolded.split():
        head, _, value = line.rpartition(":")
        name, *parameters = (head or "RRULE").split(";")
        tzid = ""
        for parameter in parameters:
            key, _, given = parameter.partition("=")
            if key.upper() == "TZID" and given and name.upper() != "RRULE":
                tzid = given.strip('"')
            elif parameter.upper() not in ("VALUE=DATE-TIME", "VALUE=DATE"):
                raise _bad(text, f"{parameter} of {name} is not understood; TZID=, VALUE=DATE-TIME and VALUE=DATE are")
        if name.upper() not in ("DTSTART", "RRULE", "EXRULE", "RDATE", "EXDATE"):
            raise _bad(text, f"{name} is not one of DTSTART, RRULE, EXRULE, RDATE, EXDATE")
        lines.append((name.upper(), tzid, value.upper()))
    return lines


def _moment(text: str, name: str, value: str) -> datetime:
    """Read ``20260101T090000``, ``20260101T090000Z`` or ``20260101`` (its midnight, as in dateutil), naive."""
    if not re.fullmatch(r"\d{8}(T\d{6}Z?)?", value, re.ASCII):
        raise _bad(text, f"{name}={shown(value)} is not a time; write 20260101T090000, with Z for UTC")
    try:
        return datetime.strptime(value.rstrip("Z"), "%Y%m%dT%H%M%S" if "T" in value else "%Y%m%d")  # noqa: DTZ007
    except ValueError as error:
        raise _bad(text, f"{name}={shown(value)}: {error}") from None


def _instant(text: str, name: str, tzid: str, value: str, timezone: tzinfo | None) -> datetime:
    where = UTC if value.endswith("Z") else zone(tzid, argument="TZID") if tzid else timezone
    return as_utc(_moment(text, name, value), timezone=where, argument=name)


def _pattern(text: str, value: str, *, start: datetime, wall: datetime, timezone: tzinfo | None) -> Pattern:
    parts = _parts(text, value)
    freq = FREQUENCIES.index(parts["FREQ"])
    numbers = {name: _numbers(text, name, parts[name]) for name in RANGES if name in parts}
    days = {name: numbers[name] for name in DAY_FILTERS if name in numbers}
    weekdays = _weekdays(text, parts.get("BYDAY"), freq, within_months=freq == MONTHLY or "BYMONTH" in parts)
    if not (weekdays or set(days) - {"BYMONTH"}):
        if freq <= MONTHLY:
            days["BYMONTHDAY"] = (wall.day,)
        if freq == YEARLY:
            days.setdefault("BYMONTH", (wall.month,))
        if freq == WEEKLY:
            weekdays = ((wall.weekday(), 0),)
    pattern = Pattern(
        freq=freq,
        interval=numbers.get("INTERVAL", (1,))[0],
        start=start,
        wall=wall,
        timezone=timezone,
        wkst=_choice(text, "WKST", parts.get("WKST", "MO"), WEEKDAYS),
        days=tuple(days.items()),
        weekdays=weekdays,
        hours=numbers.get("BYHOUR", (wall.hour,) if freq < HOURLY else ()),
        minutes=numbers.get("BYMINUTE", (wall.minute,) if freq < HOURLY else ()),
        seconds=numbers.get("BYSECOND", (wall.second,) if freq < HOURLY else ()),
        setpos=numbers.get("BYSETPOS", ()),
    )
    return _bounded(text, parts, pattern)


def _bounded(text: str, parts: dict[str, str], pattern: Pattern) -> Pattern:
    """Refuse a rule that never fires, and turn COUNT and UNTIL into the last instant."""
    given = ";".join(f"{name}={value}" for name, value in parts.items() if name.startswith(("FREQ", "INTERVAL", "BY")))
    if not pattern.fires() or (first := next(pattern.occurrences(pattern.start), None)) is None:
        raise _bad(text, f"it never fires: no day and time ever has {given}")
    if "UNTIL" in parts:
        until = _instant(text, "UNTIL", "", parts["UNTIL"], pattern.timezone)
        if until < first:
            raise _bad(text, f"it never fires: UNTIL={parts['UNTIL']} is before its first time, {_spell_moment(first)}")
        return replace(pattern, last=until)
    if "COUNT" not in parts:
        return pattern
    count = int(parts["COUNT"])
    if pattern.freq >= HOURLY and not any(name.startswith("BY") for name in parts):
        try:
            return replace(pattern, last=pattern.start + (count - 1) * pattern.step)
        except OverflowError:
            return pattern
    if count > COUNTED:
        raise _bad(text, f"COUNT={count} is more than {COUNTED}; write UNTIL, or no end")
    return replace(pattern, last=next(islice(pattern.occurrences(pattern.start), count - 1, None), None))


def _parts(text: str, value: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    known = ("FREQ", "UNTIL", "WKST", "BYDAY", *RANGES)
    for part in value.split(";"):
        name, _, given = part.partition("=")
        name = "BYDAY" if name == "BYWEEKDAY" else name
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise _bad(text, f"unknown part {shown(part)}{hint}")
        if not given or name in parts:
            raise _bad(text, f"{name} is given twice" if given else f"{name} has no value")
        parts[name] = given
    if "FREQ" not in parts:
        raise _bad(text, f"FREQ is missing; it is one of {', '.join(FREQUENCIES)}")
    _choice(text, "FREQ", parts["FREQ"], FREQUENCIES)
    if "COUNT" in parts and "UNTIL" in parts:
        raise _bad(text, "COUNT and UNTIL exclude each other (RFC 5545, 3.3.10)")
    if "BYSETPOS" in parts and not any(name.startswith("BY") and name != "BYSETPOS" for name in parts):
        raise _bad(text, "BYSETPOS picks from what another BY part gives, and there is none (RFC 5545, 3.3.10)")
    return parts


def _choice(text: str, name: str, value: str, choices: tuple[str, ...]) -> int:
    if value not in choices:
        raise _bad(text, f"{name}={shown(value)} is not one of {', '.join(choices)}")
    return choices.index(value)


def _numbers(text: str, name: str, value: str) -> tuple[int, ...]:
    low, high = RANGES[name]
    found = set()
    for item in value.split(",") if name.startswith("BY") else [value]:
        number = int(item) if re.fullmatch(r"[+-]?\d{1,10}", item, re.ASCII) else None
        if name == "COUNT" and number == 0:
            raise _bad(text, "it never fires: COUNT=0")
        if number is None or not low <= number <= high or (number == 0 and name not in ZERO_MEANS_SOMETHING):
            without = " without 0" if low < 0 and name not in ZERO_MEANS_SOMETHING else ""
            raise _bad(text, f"{name}={shown(item)} is not a whole number in {low}..{high}{without}")
        found.add(number)
    return tuple(sorted(found))


def _weekdays(text: str, value: str | None, freq: int, *, within_months: bool) -> tuple[tuple[int, int], ...]:
    found = set()
    for item in value.split(",") if value else []:
        match = re.fullmatch(r"([+-]?\d{1,2})?(MO|TU|WE|TH|FR|SA|SU)", item, re.ASCII)
        if match is None or (match[1] and not 1 <= abs(int(match[1])) <= 53):  # noqa: PLR2004
            raise _bad(text, f"BYDAY={shown(item)} is not MO, TU, WE, TH, FR, SA or SU, nor one such as 1MO or -1FR")
        if match[1] and freq > MONTHLY:
            raise _bad(text, f"BYDAY={shown(item)}: a number is for MONTHLY and YEARLY rules (RFC 5545, 3.3.10)")
        found.add((WEEKDAYS.index(match[2]), int(match[1] or 0)))
    if any(n for _, n in found):  # dateutil takes MO,1FR for the Mondays that are also a first Friday
        every = range(1, 6 if within_months else 54)
        found |= {(day, n) for day, plain in found if not plain for n in every}
        found = {(day, n) for day, n in found if n}
    return tuple(sorted(found))


def _bad(text: str, reason: str) -> InvalidTime:
    return InvalidTime(f"rule={shown(text)}: {reason}", argument="rule", value=text)
