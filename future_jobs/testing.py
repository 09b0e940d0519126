"""Help for an application's tests: a month in a second.

`travel` goes through time as a process that never sleeps would: it stops at every instant at which something is due,
and runs it with "now" being that instant. What handlers schedule on the way is run when it is due, and recurring jobs
fire at each of their times. Nothing is patched, and the same journey has the same stops every time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection

from .errors import FutureJobsError, InvalidTime, shown
from .models import ScheduledJob
from .passes import RunReport
from .statements import next_due
from .tick_statements import next_tick
from .times import When, as_utc, resolve, utc_now
from .units import Units

if TYPE_CHECKING:
    from .scheduler import Scheduler

__all__ = ["Journey", "travel"]

MOST_PASSES = 1_000
"""How many passes one instant may take, before what schedules itself for now is taken to do so for ever."""


@dataclass(slots=True)
class Journey(RunReport):
    """What happened between ``start`` and ``end``: the sums of all passes, and ``stops``, the instants of them."""

    start: datetime = field(kw_only=True)
    end: datetime = field(kw_only=True)
    stops: list[datetime] = field(default_factory=list)

    def add(self, at: datetime, report: RunReport) -> None:
        """Count a pass."""
        if not self.stops or self.stops[-1] != at:
            self.stops.append(at)
        for each in fields(RunReport):
            setattr(self, each.name, getattr(self, each.name) + getattr(report, each.name))


def travel(scheduler: Scheduler, until: When, *, start: datetime | None = None, ignore_errors: bool = False) -> Journey:
    """Run everything that comes due until ``until``, each thing at its own time; return what happened.

    The journey begins ``start``, or now by the scheduler's clock, and a duration counts from there. Afterwards the
    database is as if that time had passed. An error that a handler raises ends the journey, unless ``ignore_errors``.
    """
    begin = (scheduler.clock or utc_now)() if start is None else start
    begin = as_utc(begin, timezone=scheduler.timezone, argument="start")
    end = resolve(until, now=begin, timezone=scheduler.timezone, argument="until")
    if end < begin:
        raise InvalidTime(f"until={shown(until)}: it is before the start, {begin}", argument="until", value=until)
    scheduler.session.commit()
    journey, units = Journey(start=begin, end=end), Units(scheduler.session.get_bind(ScheduledJob))
    now, passes = begin, 0
    while now <= end:
        report = scheduler.run_due(now, ignore_errors=ignore_errors)
        has_moved = any(getattr(report, each.name) for each in fields(RunReport))
        if has_moved:
            journey.add(now, report)
        # What handlers scheduled for now is run now. Where a pass did nothing, what is still due is not to be moved.
        following = units.read(partial(_next, after=None if has_moved else now))
        if following is None:
            break
        passes = passes + 1 if following <= now else 0
        if passes == MOST_PASSES:
            message = f"{passes} passes at {now.isoformat()}, and more is due at once; does a job enqueue itself?"
            raise FutureJobsError(message)
        now = max(now, following)
    return journey


def _next(connection: Connection, *, after: datetime | None) -> datetime | None:
    return min(filter(None, (next_due(connection, after=after), next_tick(connection, after=after))), default=None)
