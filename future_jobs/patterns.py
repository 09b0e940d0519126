"""Recurrence patterns -> instants: the arithmetic under RFC 5545 rules, and what clock changes do to it.

dateutil knows the calendar: it finds the *days*, and the sets that ``BYSETPOS`` picks from. This module keeps
three promises that it does not make:

- *Old rules are cheap.* dateutil walks from ``DTSTART``. Here it is started at the first period at or after the
  instant asked about whose number, counted from ``DTSTART``, is a multiple of ``INTERVAL``.
- *Impossible rules are found out.* dateutil looks for 30 February until the year 9999. The Gregorian calendar
  repeats every 400 years, so a rule with nothing in 9600 to 9999 never fires, and there dateutil ends at once.
- *Clocks change.* From ``DAILY`` up a rule speaks of wall clock times: those that a change skips are removed (RFC
  5545, 3.3.10), one that happens twice is the first. Below, it counts elapsed time and filters by the wall clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

from dateutil.rrule import rrule, weekday

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DAILY",
    "HOURLY",
    "MONTHLY",
    "SECONDLY",
    "WEEKLY",
    "YEARLY",
    "Pattern",
    "RecurrenceSet",
    "exact",
    "local",
    "next_change",
]

YEARLY, MONTHLY, WEEKLY, DAILY, HOURLY, MINUTELY, SECONDLY = range(7)
CYCLE = (400, 4_800, 20_871, 146_097)  # years, months, weeks, days until the calendar repeats
PATIENCE = 1_500  # steps without a match after which a sub-daily rule is taken to never fire
CENTURY = timedelta(days=36_525)  # and so is one without a match for so long
EXCLUDED = 5_000  # times in a row that an EXRULE may take away

Clock = TypeVar("Clock", time, datetime)


def local(instant: datetime, timezone: tzinfo | None) -> datetime:
    """Return what the wall clock of ``timezone`` shows at ``instant``, naive."""
    return instant.astimezone(timezone).replace(tzinfo=None, fold=0)


def exact(wall: datetime, timezone: tzinfo | None) -> datetime | None:
    """Return the first instant at which the wall clock shows ``wall``, or None if a clock change skips it."""
    instant = wall.replace(tzinfo=timezone).astimezone(UTC)
    return instant if local(instant, timezone) == wall else None


def next_change(start: datetime, end: datetime, timezone: tzinfo | None) -> datetime | None:
    """Return the first instant in ``(start, end]`` at which the UTC offset is another, or None.

    Looks every third day: in the IANA database two changes of one zone are never less than 95 hours apart.
    """
    offset = start.astimezone(timezone).utcoffset()
    while start < end:
        ahead = min(end, start + timedelta(days=3))
        if ahead.astimezone(timezone).utcoffset() != offset:
            seconds = range(math.ceil((ahead - start).total_seconds()))
            start = start.replace(microsecond=0)
            return start + timedelta(
                seconds=bisect_left(
                    seconds,
                    True,
                    key=lambda second: (start + timedelta(seconds=second)).astimezone(timezone).utcoffset() != offset,
                )
            )
        start = ahead
    return None


@dataclass(frozen=True, slots=True)
class Pattern:
    """One RRULE and its DTSTART, with what RFC 5545 takes from DTSTART written out."""

    freq: int
    interval: int
    start: datetime
    wall: datetime
    timezone: tzinfo | None
    wkst: int
    days: tuple[tuple[str, tuple[int, ...]], ...]
    weekdays: tuple[tuple[int, int], ...]
    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    seconds: tuple[int, ...]
    setpos: tuple[int, ...]
    last: datetime | None = None

    @property
    def step(self) -> timedelta:
        """The interval of an HOURLY, MINUTELY or SECONDLY rule."""
        return timedelta(seconds=self.interval * 60 ** (SECONDLY - self.freq))

    def after(self, instant: datetime) -> datetime | None:
        """Return the first occurrence after ``instant``, in UTC."""
        if self.last is not None and instant >= self.last:
            return None
        found = next((at for at in self.occurrences(instant) if at > instant), None)
        return None if found is None or (self.last is not None and found > self.last) else found

    def occurrences(self, since: datetime) -> Iterator[datetime]:
        """Yield the occurrences from ``since`` on, whatever COUNT and UNTIL say."""
        since = max(since, self.start)
        try:
            if self.freq >= HOURLY:
                yield from self._counted(since)
                return
            for wall in self.walls(local(since, self.timezone)):
                at = exact(wall, self.timezone)
                if at is not None and at >= since:
                    yield at
        except (OverflowError, ValueError):  # the calendar ends with the year 9999
            return

    def fires(self) -> bool:
        """Tell whether the calendar has any day for this rule, whatever COUNT, UNTIL and the zone say."""
        if self.freq >= HOURLY:
            return not self.days or next(self._dates(date(9600, 1, 1)), None) is not None
        thinned = replace(self, interval=math.gcd(self.interval, CYCLE[self.freq]))
        return next(thinned.walls(datetime(9600, 1, 1)), None) is not None  # noqa: DTZ001

    def walls(self, since: datetime) -> Iterator[datetime]:
        """Yield the wall clock times from ``since`` on, of a rule that is DAILY or longer."""
        since = max(since, self.wall)
        if self.setpos and self.freq != DAILY:
            behind = (self._period(since.date()) - self._period(self.wall.date())) % self.interval
            opening = datetime.combine(self._opening(self._period(since.date()) - behind), time())
            rule = self._dateutil(self.freq, max(opening, self.wall), self.interval, whole=False)
            yield from (wall for wall in rule if wall >= since)
            return
        times = [time(*clock) for clock in product(self.hours, self.minutes, self.seconds)]
        if self.freq == DAILY:
            times = _picked(times, self.setpos)
        for day in self._dates(since.date()):
            yield from (wall for wall in (datetime.combine(day, clock) for clock in times) if wall >= since)

    def _dates(self, since: date) -> Iterator[date]:
        """Yield the days from ``since`` on, in periods whose number from DTSTART is a multiple of INTERVAL."""
        first, interval = self._period(self.wall.date()), self.interval if self.freq < HOURLY else 1
        ahead = (first - self._period(since)) % interval
        if ahead:
            since = self._opening(self._period(since) + ahead)
        if self.freq > MONTHLY and not self.days:
            stride = interval if self.freq == DAILY else 1
            weekdays = {day for day, _ in self.weekdays} or set(range(7))
            days = map(date.fromordinal, range(since.toordinal(), date.max.toordinal(), stride))
            every = (day for day in days if day.weekday() in weekdays)
            yield from (day for day in every if (self._period(day) - first) % interval == 0)
        elif self.freq <= MONTHLY:
            rule = self._dateutil(self.freq, datetime.combine(since, time()), interval, whole=True)
            yield from (wall.date() for wall in rule)
        else:  # year by year: between two leap days dateutil is fifty times faster than day by day
            rule = self._dateutil(YEARLY, datetime.combine(since, time()), 1, whole=True)
            yield from (wall.date() for wall in rule if (self._period(wall.date()) - first) % interval == 0)

    def _dateutil(self, freq: int, dtstart: datetime, interval: int, *, whole: bool) -> rrule:
        filters: dict[str, Any] = {name.lower(): values for name, values in self.days}
        weekdays = self.weekdays or (tuple((day, 0) for day in range(7)) if freq != self.freq else ())
        return rrule(
            freq,  # type: ignore[arg-type]
            dtstart=dtstart,
            interval=interval,
            wkst=self.wkst,
            byweekday=[weekday(day, n or None) for day, n in weekdays] or None,
            byhour=0 if whole else self.hours,
            byminute=0 if whole else self.minutes,
            bysecond=0 if whole else self.seconds,
            bysetpos=None if whole else self.setpos,
            **filters,
        )

    def _period(self, day: date) -> int:
        if self.freq == YEARLY:
            return day.year
        if self.freq == MONTHLY:
            return day.year * 12 + day.month - 1
        return (day.toordinal() - 1 - self.wkst) // 7 if self.freq == WEEKLY else day.toordinal()

    def _opening(self, period: int) -> date:
        if self.freq == YEARLY:
            return date(period, 1, 1)
        if self.freq == MONTHLY:
            return date(period // 12, period % 12 + 1, 1)
        return date.fromordinal(max(1, period * 7 + 1 + self.wkst) if self.freq == WEEKLY else period)

    def _counted(self, since: datetime) -> Iterator[datetime]:
        """Yield occurrences of an HOURLY, MINUTELY or SECONDLY rule: elapsed time, filtered by the wall clock."""
        step = self.step
        number, idle, tick, heard = (since - self.start) // step, 0, since, since
        while idle < PATIENCE and tick - heard < CENTURY:
            idle += 1
            tick = self.start + number * step
            wall = local(tick, self.timezone)
            meant = self._meant(wall)
            if meant is None:
                return
            if meant > wall:
                # The way there is as long as the wall clock says unless the clock changes: then look again.
                ahead = tick + (meant - wall)
                ahead = next_change(tick, ahead, self.timezone) or ahead
                number = max(number + 1, -((self.start - ahead) // step))
                continue
            number += 1
            for clock in self._expanded(wall):
                at = tick + (clock - wall)
                if at >= since and local(at, self.timezone) == clock:
                    idle, heard = 0, at
                    yield at

    def _meant(self, wall: datetime) -> datetime | None:
        """Return ``wall`` if the filters allow it, else the next wall clock time at which they might."""
        if self.days or self.weekdays:
            allowed = _first_date(self, wall.date())
            if allowed is None:
                return None
            if allowed > wall.date():
                return datetime.combine(allowed, time())
        clock = (wall.hour, wall.minute, wall.second)
        for place, values in enumerate((self.hours, self.minutes, self.seconds)[: self.freq - DAILY]):
            if values and clock[place] not in values:
                later = next((value for value in values if value > clock[place]), (24, 60, 60)[place])
                unit = timedelta(seconds=60 ** (2 - place))
                past = (wall - datetime.combine(wall, time())) % (unit * 60 if place else timedelta(days=1))
                return wall - past + later * unit
        return wall

    def _expanded(self, wall: datetime) -> list[datetime]:
        """Return the wall clock times which BYMINUTE, BYSECOND and BYSETPOS make of one step."""
        minutes = (self.freq == HOURLY and self.minutes) or (wall.minute,)
        seconds = (self.freq != SECONDLY and self.seconds) or (wall.second,)
        clocks = [wall.replace(minute=minute, second=second) for minute, second in product(minutes, seconds)]
        return _picked(clocks, self.setpos)


@lru_cache(maxsize=4096)
def _first_date(pattern: Pattern, since: date) -> date | None:
    return next(pattern._dates(since), None)  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class RecurrenceSet:
    """What RRULE, RDATE, EXRULE and EXDATE lines mean together (RFC 5545, 3.8.5)."""

    patterns: tuple[Pattern, ...]
    exceptions: tuple[Pattern, ...]
    dates: tuple[datetime, ...]
    exdates: frozenset[datetime]

    def after(self, instant: datetime) -> datetime | None:
        """Return the first occurrence after ``instant`` that is not excluded, in UTC."""
        for _ in range(EXCLUDED + len(self.exdates)):
            coming = [at for at in (pattern.after(instant) for pattern in self.patterns) if at]
            coming += self.dates[bisect_right(self.dates, instant) :][:1]
            if not coming:
                return None
            instant = min(coming)
            if instant not in self.exdates and not any(
                rule.after(instant - timedelta.resolution) == instant for rule in self.exceptions
            ):
                return instant
        return None


def _picked(clocks: list[Clock], setpos: tuple[int, ...]) -> list[Clock]:
    if not setpos:
        return clocks
    positions = {position - 1 if position > 0 else len(clocks) + position for position in setpos}
    return [clocks[position] for position in sorted(positions) if 0 <= position < len(clocks)]
