"""What a worker takes next: of the levels that have jobs due, the best first, as much as its lanes can use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

from sqlalchemy.engine import Connection

from . import claim_statements, lifecycle, statements
from .lifecycle import FRAGILE
from .limits import Limits
from .slots import Lane
from .statements import Claimed, Level, Token

__all__ = ["Claims", "Taken", "Wish"]

NO_LIMIT = (1 << 63) - 1
HARMLESS = 1  # one that was lost no more than so often was held by one that died, as a rule


class Wish(NamedTuple):
    """How many jobs a lane can use: for free slots, and ahead of those."""

    lane: Lane
    free: int
    ahead: int


class Taken(NamedTuple):
    """What was claimed, for each lane, and the levels as they are now known to be."""

    rows: list[tuple[Lane, list[Claimed]]]
    view: list[Level]


class Claims:
    """The levels that one worker knows to have jobs waiting, and what it takes from them.

    A job that was lost twice is only taken for a slot that is free now; of those that were lost again and again, one at
    a time, so that a job which kills its workers takes few others with it.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        worker: str,
        time: Callable[[], datetime],
        lease_end: Callable[[], datetime],
    ) -> None:
        self.lanes = lanes
        self.worker = worker
        self.view: list[Level] = []
        self._time = time
        self._lease_end = lease_end
        self._fragile: set[Token] = set()
        self._limits = Limits()

    def lane_of(self, queue: str) -> Lane | None:
        """Return the lane that serves ``queue``; None if none does."""
        return self.lanes.get(queue) or self.lanes.get("*")

    def levels(self, connection: Connection) -> list[Level]:
        """Return the levels with jobs waiting that any lane serves, best priority first."""
        return [level for level in statements.levels(connection) if self.lane_of(level.queue)]

    def startable(self, connection: Connection, levels: list[Level]) -> list[Level]:
        """Return ``levels`` without those of paused queues, and with the limited ones as due when a job may start."""
        return self._limits.startable(connection, levels, now=self._time())

    def hear(self, levels: Sequence[Level]) -> None:
        """Take note of levels in which jobs were just scheduled, as if a look had found them.

        One of a queue that is paused does no harm: the claim takes nothing from it.
        """
        if not levels:
            return
        found = {level[:2]: level for level in self.view if not level.limited}
        for level in levels:
            known = found.get(level[:2])
            if self.lane_of(level.queue) and (known is None or level.first_at < known.first_at):
                found[level[:2]] = level
        limited = [level for level in self.view if level.limited]
        self.view = statements.in_order([*found.values(), *limited])

    def wishes(self, most: float) -> list[Wish]:
        """Return what the lanes can use of what is due, ``most`` jobs in all."""
        now = self._time()
        due = {id(self.lane_of(level.queue)) for level in self.view if level.first_at <= now}
        wishes = []
        for lane in self.lanes.values():
            free, ahead = lane.room() if id(lane) in due else (0, 0)
            free = int(min(free, most))
            ahead = int(min(ahead, most - free))
            most -= free + ahead
            if free or ahead:
                wishes.append(Wish(lane, free, ahead))
        return wishes

    def take(self, connection: Connection, wishes: list[Wish]) -> Taken:
        """Claim what is wished for. Nothing is claimed, or known, until the caller has committed."""
        view, taken = list(self.view), []
        for lane, free, ahead in wishes:
            rows = self._take_for(connection, lane, view, free)
            is_suspect = any(row.losses > HARMLESS for row in rows)  # as others may be: the next slots are theirs
            if len(rows) == free and not is_suspect:
                rows += self._take_for(connection, lane, view, ahead, is_ahead=True)
            taken.append((lane, rows))
        return Taken(taken, view)

    def took(self, taken: Taken) -> None:
        """Take note of what was committed."""
        self.view = taken.view
        for _, rows in taken.rows:
            self._limits.took(rows)
            self._fragile.update(row.token for row in rows if row.losses >= FRAGILE)

    def is_waiting_for(self, token: Token) -> bool:
        """Tell whether another job may wait for the end of this attempt. Any thread may ask."""
        return token in self._fragile or self._limits.holds(token.id)

    def ended(self, token: Token) -> bool:
        """Take note that an attempt is over; tell whether another job may have waited for that."""
        self._fragile.discard(token)
        return self._limits.freed([token.id])

    def next(self) -> Level | None:
        """Return where there will next be something that a lane with room can use; None if nothing is known."""
        open_lanes = {id(lane) for lane in self.lanes.values() if any(lane.room())}
        usable = (level for level in self.view if id(self.lane_of(level.queue)) in open_lanes)
        return min(usable, key=lambda level: level.first_at, default=None)

    def _take_for(
        self, connection: Connection, lane: Lane, view: list[Level], wanted: int, *, is_ahead: bool = False
    ) -> list[Claimed]:
        now = self._time()
        rows: list[Claimed] = []
        due = [level for level in view if level.first_at <= now and self.lane_of(level.queue) is lane]
        most_losses = FRAGILE - 1 if self._fragile else statements.ANY_LOSSES
        if is_ahead:  # of a free slot; a limited job counts as started when it is claimed
            most_losses, due = HARMLESS, [level for level in due if not level.limited]
        for _, group in groupby(due, key=lambda level: level.priority):
            levels = list(group)
            while levels and len(rows) < wanted:
                share = math.ceil((wanted - len(rows)) / len(levels))  # queues of one priority take turns
                for level in list(levels):
                    asked = min(share, wanted - len(rows))
                    found = self._claim(connection, level, asked, now, most_losses) if asked else []
                    rows += found
                    if len(found) < asked:  # nothing is left there, until the next look
                        levels.remove(level)
                        if not is_ahead:
                            view.remove(level)
                    elif found:
                        levels[levels.index(level)] = view[view.index(level)] = level._replace(
                            first_at=found[-1].run_at
                        )
        return self._without_company(connection, rows)

    def _claim(
        self, connection: Connection, level: Level, limit: int, now: datetime, most_losses: int
    ) -> list[Claimed]:
        if level.limited:
            return self._limits.claim(
                connection,
                level,
                limit=limit,
                now=now,
                worker=self.worker,
                leased_until=self._lease_end(),
                most_losses=most_losses,
            )
        return claim_statements.claim(
            connection,
            level,
            after=(level.first_at, 0),
            newest=NO_LIMIT,
            limit=limit,
            now=now,
            worker=self.worker,
            leased_until=self._lease_end(),
            losses=(0, most_losses),
        )

    def _without_company(self, connection: Connection, rows: list[Claimed]) -> list[Claimed]:
        """Hand back all but the first of those that were lost again and again."""
        surplus = {row.token for row in [row for row in rows if row.losses >= FRAGILE][1:]}
        if not surplus:
            return rows
        lifecycle.release_all(connection, surplus)
        return [row for row in rows if row.token not in surplus]
