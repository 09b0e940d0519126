"""How many starts in how long, and the starts that were: what a ``rate_limit`` says and what it counts. Pure.

However the starts fall, no more than ``most`` of them lie within any time of the length ``period``. Starts that follow
closely are remembered as one, at the time of the last, so that what is remembered stays short; a place is then free
again a little later than it could be, never sooner.
"""

from __future__ import annotations

import json
import re
from bisect import insort
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from .errors import InvalidArgument, InvalidOption, InvalidTime, shown
from .times import parse_duration

__all__ = ["Rate", "Starts", "parse_rate"]

MOST_COUNT = 1_000_000
LONGEST_PERIOD = timedelta(days=366)
MOST_REMEMBERED = 100  # starts, or groups of them
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FORMS = "use a number and a time, such as '10/s', '100/min', '1000/h' or '5/10s'"

_RATE = re.compile(r"(\d{1,9}) ?/ ?(\d*)(.*)", re.ASCII | re.DOTALL)


class Rate(NamedTuple):
    """At most ``most`` starts within any ``period``."""

    most: int
    period: timedelta

    def __str__(self) -> str:
        microseconds = self.period // timedelta.resolution
        length, unit = (microseconds, "us") if microseconds % 1_000_000 else (microseconds // 1_000_000, "s")
        return f"{self.most}/{length}{unit}"


def parse_rate(text: Any, *, argument: str = "rate_limit") -> Rate:
    """Read a rate such as ``100/min``: a number of starts, and a length of time; ``5/10s`` is five in ten seconds."""
    if not isinstance(text, str):
        raise InvalidArgument(f"{argument} is {shown(text)}; {FORMS}", argument=argument, value=text)
    found = _RATE.fullmatch(text.strip())
    try:
        period = parse_duration(f"{found[2] or 1}{found[3]}") if found else None
    except InvalidTime:
        period = None
    if found is None or not isinstance(period, timedelta) or not found[3].strip():
        raise InvalidOption(f"{argument} is {shown(text)}; {FORMS}", argument=argument, value=text)
    count = int(found[1])
    if not 1 <= count <= MOST_COUNT or not timedelta(0) < period <= LONGEST_PERIOD:
        raise InvalidOption(
            f"{argument} is {shown(text)}; use 1 to {MOST_COUNT} starts in at most {LONGEST_PERIOD.days} days",
            argument=argument,
            value=text,
        )
    return Rate(count, period)


class Starts:
    """The starts that may still count, in order: when, in microseconds since 1970, and how many."""

    def __init__(self, text: str | None = None) -> None:
        self.period, self._starts = _read(text)

    def room(self, rate: Rate, now: datetime) -> int:
        """Return how many more may start ``now``."""
        return rate.most - sum(number for _, number in self._near(rate, now))

    def opens_at(self, rate: Rate, now: datetime) -> datetime:
        """Return when the next may start."""
        near = list(self._near(rate, now))
        number = sum(number for _, number in near)
        opens_at = now
        for at, leaving in near:
            if number < rate.most:
                break
            number -= leaving
            opens_at = max(now, EPOCH + timedelta(microseconds=at) + rate.period)
        return opens_at

    def add(self, rate: Rate, now: datetime) -> None:
        """Count one more, that starts ``now``."""
        at, self.period = _microseconds(now), max(self.period, rate.period // timedelta.resolution)
        starts = [(each, number) for each, number in self._starts if each > at - self.period]
        same = sum(number for each, number in starts if each == at)
        self._starts = [start for start in starts if start[0] != at]
        insort(self._starts, (at, same + 1))
        if len(self._starts) > MOST_REMEMBERED:
            self._join_closest()

    @property
    def kept_until(self) -> datetime | None:
        """From when on nothing of this counts any more."""
        return EPOCH + timedelta(microseconds=self._starts[-1][0] + self.period) if self._starts else None

    def dumped(self) -> str:
        """Return the text that is stored."""
        return json.dumps([self.period, self._starts], separators=(",", ":"))

    def _near(self, rate: Rate, now: datetime) -> Iterator[tuple[int, int]]:
        # Those of the future as well: another process's clock may be ahead, and a test may have travelled there.
        at, period = _microseconds(now), rate.period // timedelta.resolution
        return ((each, number) for each, number in self._starts if at - period < each < at + period)

    def _join_closest(self) -> None:
        gaps = [later[0] - earlier[0] for earlier, later in pairwise(self._starts)]
        closest = gaps.index(min(gaps))
        (_, first), (at, second) = self._starts[closest : closest + 2]
        self._starts[closest : closest + 2] = [(at, first + second)]


def _read(text: str | None) -> tuple[int, list[tuple[int, int]]]:
    try:
        period, starts = json.loads(text or "[0,[]]")
        return int(period), sorted((int(at), int(number)) for at, number in starts)
    except (ValueError, TypeError):  # edited by hand
        return 0, []


def _microseconds(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta.resolution
