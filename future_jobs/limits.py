"""Jobs that must wait for others, however long they are due: a key of which so many may run at once, or a rate.

They are a level of their own (see ``statements.py``), and claimed in two steps. *Looking* reads: the first that are
due, in order, of groups that are not full; what is left out costs an entry of the index each, and is remembered, since
there may be a hundred thousand of it. *Claiming* writes: it locks the `Limit` of each key, so that no two claimers
count the same free place, counts what runs, and takes what still fits. The running jobs are the count, so whatever ends
a job, or takes it back from a worker that died, frees its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import monotonic

from sqlalchemy.engine import Connection

from . import claim_statements, limit_statements, statements
from .errors import UsageError
from .limit_statements import Waiting
from .rates import Rate, Starts, parse_rate
from .statements import Claimed, Level

__all__ = ["Limits", "State", "state_of"]

WINDOW = 100  # jobs read in one statement
MOST_SEEN = 1_000  # jobs remembered of one level
MOST_LEFT_OUT = 1_000  # groups that one statement leaves out
LOOK_SECONDS = 0.05  # how long one look may take; the next goes on from there
SOON = timedelta(seconds=0.1)  # until a look that could not see everything goes on
PATIENCE = 20.0  # a look from the beginning is not repeated for so many times the time it took
ROUNDS = 4  # tries to find, in one claim, what others do not hold
NO_LIMIT = (1 << 63) - 1


@dataclass(slots=True)
class _Place:
    """What is known of one level."""

    after: tuple[datetime, int]
    seen: list[Waiting] = field(default_factory=list)
    full: dict[str | None, tuple[Waiting, datetime | None]] = field(default_factory=dict)  # until when, if one can know
    is_through: bool = False
    cost: float = 0.0  # seconds that the looks have taken
    again_at: float = math.inf  # when to look from the beginning again, set when all was seen once

    @property
    def open(self) -> list[Waiting]:
        return [row for row in self.seen if row.limited_by not in self.full]


class Limits:
    """What one claimer knows of the limited jobs, level by level."""

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._places: dict[tuple[str, int], _Place] = {}
        self._mine: dict[int, Waiting] = {}

    def look(
        self, connection: Connection, level: Level, *, now: datetime, at: datetime | None = None, newest: int = NO_LIMIT
    ) -> tuple[datetime | None, bool]:
        """Return when the next job of ``level`` may start, as far as one can know, and whether that is all of it.

        None: when another job of its key ends. What is due is so ``now``, and would start ``at``. Only reads.
        """
        at = at or now
        place = self._places.get(level[:2])
        if place is None or monotonic() >= place.again_at:
            place = self._places[level[:2]] = _Place((level.first_at, 0))
        place.full = _full(connection, [*(row for row, _ in place.full.values()), *place.open[:WINDOW]], at)
        began, place.is_through = monotonic(), False
        while not place.open:
            left_out = [group for group in place.full if group is not None][:MOST_LEFT_OUT]
            rows = limit_statements.due(
                connection, level, after=place.after, newest=newest, without=left_out, now=now, limit=WINDOW
            )
            if rows:
                place.after = (rows[-1].run_at, rows[-1].id)
                place.seen += rows
                place.full |= _full(connection, rows, at)
                _trim(place)
            if len(rows) < WINDOW:
                place.is_through = True
                break
            if monotonic() - began > LOOK_SECONDS:
                break
        place.cost += monotonic() - began
        if place.is_through and place.again_at == math.inf:
            place.again_at = monotonic() + self._patience * place.cost
        if place.open:
            return place.open[0].run_at, True
        return min((until for _, until in place.full.values() if until), default=None), place.is_through

    def startable(self, connection: Connection, levels: Iterable[Level], *, now: datetime) -> list[Level]:
        """Return ``levels`` without those of paused queues, the limited ones as due when the next may start.

        One of which nothing may start before another job ends is left out.
        """
        found, paused = [], None
        for level in levels:
            paused = limit_statements.paused(connection) if paused is None else paused
            if level.queue in paused:
                continue
            if not level.limited or level.first_at > now:
                found.append(level)
                continue
            first_at, is_all = self.look(connection, level, now=now)
            if first_at is not None or not is_all:
                found.append(level._replace(first_at=first_at or now + SOON))
        return found

    def claim(
        self,
        connection: Connection,
        level: Level,
        *,
        limit: int,
        now: datetime,
        worker: str,
        leased_until: datetime,
        started_at: datetime | None = None,
        most_losses: int = statements.ANY_LOSSES,
    ) -> list[Claimed]:
        """Take up to ``limit`` of the jobs that the last look at ``level`` has found, and that still may start.

        What others hold is skipped, never waited for. The caller says what it `took` once that is committed.
        """
        place, at = self._places.get(level[:2]), started_at or now
        taken: list[Claimed] = []
        tried: set[int] = set()
        for _ in range(ROUNDS if place is not None else 0):
            assert place is not None
            picked = _pick(place, limit - len(taken), tried)
            if not picked:
                break
            tried.update(row.id for row in picked)
            claimed = _fitting(connection, place, picked, now=now, at=at, most_losses=most_losses)
            if claimed:
                ids = [row.id for row in claimed]
                claim_statements.take(connection, ids, worker=worker, leased_until=leased_until, started_at=at)
            taken += claimed
        return taken

    def took(self, rows: Iterable[Claimed]) -> None:
        """Note that ``rows`` are this claimer's."""
        if not self._places:
            return
        ids = {row.id for row in rows}
        for place in self._places.values():
            self._mine.update((row.id, row) for row in place.seen if row.id in ids)
            place.seen = [row for row in place.seen if row.id not in ids]
        running = Counter(row.concurrency_key for row in self._mine.values())
        for place in self._places.values():
            for row in place.open:
                if row.concurrency_limit is not None and running[row.concurrency_key] >= row.concurrency_limit:
                    place.full[row.limited_by] = (row, None)

    def holds(self, job_id: int) -> bool:
        """Tell whether a job of this claimer is limited."""
        return job_id in self._mine

    def freed(self, job_ids: Iterable[int]) -> bool:
        """Note that jobs ended, and the places they held with them; tell whether any was limited."""
        ended = [self._mine.pop(job_id) for job_id in job_ids if job_id in self._mine]
        names = {row.limit_name for row in ended}
        for place in self._places.values() if ended else ():
            for group, (row, _) in list(place.full.items()):
                if row.limit_name in names:
                    del place.full[group]
        return bool(ended)


# --- which may start ----------------------------------------------------------------------------------------------


def _full(
    connection: Connection, rows: Iterable[Waiting], now: datetime
) -> dict[str | None, tuple[Waiting, datetime | None]]:
    """Return the groups of ``rows`` of which none may start now: one row of each, and until when, if one can know."""
    groups = {row.limited_by: row for row in rows}
    running = limit_statements.running(connection, _keys(groups.values()))
    texts = limit_statements.starts(connection, {row.limit_name for row in groups.values() if row.rate_limit})
    starts = {name: Starts(text) for name, text in texts.items()}
    found = {}
    for group, row in groups.items():
        state = state_of(row, running, starts, now)
        if state is not None:
            found[group] = (row, state.until)
    return found


def _keys(rows: Iterable[Waiting]) -> set[str]:
    return {row.concurrency_key for row in rows if row.concurrency_key is not None}


@dataclass(frozen=True, slots=True)
class State:
    """Why a limited job may not start: others of its key run, or (``until``) so many have started."""

    until: datetime | None


def state_of(row: Waiting, running: Counter[str], starts: dict[str, Starts], now: datetime) -> State | None:
    """Return what holds ``row`` back, None if nothing does."""
    if row.concurrency_key is not None and running[row.concurrency_key] >= (row.concurrency_limit or 1):
        return State(None)
    rate, counted = rate_of(row), starts.get(row.limit_name)
    if rate is not None and counted is not None and counted.room(rate, now) <= 0:
        return State(counted.opens_at(rate, now))
    return None


def rate_of(row: Waiting) -> Rate | None:
    """Return the rate of a job; None if it has none, or what was written there by hand is none."""
    with suppress(UsageError):
        return parse_rate(row.rate_limit) if row.rate_limit is not None else None
    return None


def _pick(place: _Place, number: int, tried: set[int]) -> list[Waiting]:
    """Return the first ``number`` jobs that might start together, if none of their keys ran."""
    picked: list[Waiting] = []
    keys: Counter[str] = Counter()
    for row in place.open:
        if len(picked) >= number:
            break
        if row.id in tried or (row.concurrency_key and keys[row.concurrency_key] >= (row.concurrency_limit or 1)):
            continue
        keys[row.concurrency_key or ""] += 1
        picked.append(row)
    return picked


def _fitting(
    connection: Connection, place: _Place, picked: list[Waiting], *, now: datetime, at: datetime, most_losses: int
) -> list[Claimed]:
    """Return those of ``picked`` that may start, locked, and write down the starts that a rate counts."""
    texts = limit_statements.lock(connection, sorted({row.limit_name for row in picked}))
    mine = [row for row in picked if row.limit_name in texts]
    place.full |= {row.limited_by: (row, None) for row in picked if row.limit_name not in texts}
    found = {row.id: row for row in claim_statements.lock_waiting(connection, [row.id for row in mine], now=now)}
    gone = {row.id for row in mine} - found.keys()
    place.seen = [row for row in place.seen if row.id not in gone]
    running = limit_statements.running(connection, _keys(mine))
    starts = {name: Starts(text) for name, text in texts.items()}
    fitting, counted = [], set()
    for row in mine:
        if row.id not in found or found[row.id].losses > most_losses:
            continue
        state = state_of(row, running, starts, at)
        if state is not None:
            place.full[row.limited_by] = (row, state.until)
            continue
        fitting.append(found[row.id])
        if row.concurrency_key is not None:
            running[row.concurrency_key] += 1
        if (rate := rate_of(row)) is not None:
            starts[row.limit_name].add(rate, at)
            counted.add(row.limit_name)
    for name in sorted(counted):
        limit_statements.keep_starts(connection, name, starts[name].dumped(), starts[name].kept_until)
    return fitting


def _trim(place: _Place) -> None:
    """Forget, where much is remembered, what waits behind another of its group."""
    if len(place.seen) <= MOST_SEEN:
        return
    kept, groups = [], set()
    for row in place.seen:
        if row.limited_by not in place.full or row.limited_by not in groups:
            kept.append(row)
        groups.add(row.limited_by)
    place.seen = kept
