"""The loop of a worker, from its start to its end.

Settle what has finished, claim what free slots can use, hand it to them, and say how long nothing more will be due.

Completions ride in the transaction of the next claim. What is claimed beyond the free slots is what these can finish in
about a tenth of a second, so that fast jobs come in large batches and slow ones leave the rest to others.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import groupby
from time import monotonic

from sqlalchemy.engine import Connection, Engine

from . import claim_statements, events, execution, lifecycle, statements, tick_statements, ticks, wakeups, watches
from .claims import Claims, Taken, Wish
from .farm import Farm
from .leases import Leases
from .lifecycle import Released, Retried, Snoozed
from .patience import Deadline, PatientUnits
from .performing import Ended, tell, tell_released, told
from .runners import Here, Outbox, PatientPerformer, Runner, emptied
from .sessions import JobSession
from .slots import STALL_SECONDS, lanes_of
from .statements import Claimed, Level, Token
from .status import Status
from .times import utc_now

__all__ = ["Loop"]

AHEAD_SECONDS = 0.03  # so long before a job is due an idle worker looks, so that it need not when it is
LOOK_SECONDS = 0.1  # while busy, how long a job of a better priority may go unseen
MISSED_SECONDS = 0.02  # until the next try, when others hold what is due
PRUNE_SECONDS = 3600.0
PRUNE_LIMIT = 5_000


class Loop:
    """What one worker has and does while it works; ``tick`` is one round of it.

    ``application`` is the engine whose commits in this process it hears of, ``units`` work on one of its own. It runs
    no more than ``most`` jobs, by what ``make_runner`` returns for it, and ends when it is told to by ``deadline``.
    """

    def __init__(
        self,
        name: str,
        units: PatientUnits,
        context: execution.Context,
        *,
        application: Engine,
        open_session: Callable[[Claimed], JobSession],
        make_runner: Callable[[Loop], Runner],
        deadline: Deadline,
        queues: Mapping[str, int],
        prefetch: int | None,
        lease: timedelta,
        poll: float,
        retention: timedelta | None,
        most: float,
        notify: bool,
    ) -> None:
        self.name = name
        self.units = units
        self.context = context
        self.ran = 0
        self.alarm = wakeups.Alarm()
        self.held: dict[Token, Claimed] = {}
        self._application = application
        self._deadline = deadline
        self._poll = poll
        self._retention = retention
        self._most = most
        self._pid = os.getpid()
        self._is_claiming = False  # what it has committed may not be in what it holds
        self._told: deque[Level] = deque()  # levels in which a commit has scheduled something that is due
        self._looks_next = False  # what it was told of is claimed first
        self._stale_after = 0.0
        self._rested_at = 0.0  # until when looks take no more than a twentieth of the time of a busy worker
        self._misses = 0
        self._measure_at = self._prune_at = self._expire_at = self._tick_at = 0.0
        self.lanes = lanes_of(queues, prefetch)
        for lane in self.lanes.values():
            lane.ring = self.alarm.ring
            if units.is_alone:
                lane.slots = 1
        self.performer = PatientPerformer(units, open_session, context, worker=name)
        self.leases = Leases(
            units,
            name,
            lease,
            time=self.now,
            held=self._tokens,
            claiming=lambda: self._is_claiming,
            queues=queues,
            attend=self.performer.attend,
        )
        self.claims = Claims(self.lanes, worker=name, time=self.now, lease_end=self.leases.end)
        self.outbox = Outbox(self.alarm.ring, self.claims.is_waiting_for)
        self.watch = watches.watch(units.engine, self.hear, own=lambda: units.commits, notify=notify)
        self.runner = make_runner(self)

    def start(self) -> None:
        """Begin to hear of commits, and to keep leases."""
        self._measure()
        wakeups.listen(self._application, self.hear)
        if not self.units.is_alone:
            self.leases.start()
            self.watch.start()

    def end(self) -> None:
        """Give back everything."""
        wakeups.unlisten(self._application, self.hear)
        self.watch.stop()
        self.leases.stop()
        self.runner.stop()
        if not self.units.is_alone:
            self.units.engine.dispose()

    def leave(self) -> None:
        """Leave to the parent, from which this process was forked, what is its own."""
        self.watch.leave()
        self.units.engine.dispose(close=False)

    def now(self) -> datetime:
        """Return the database's time, as far as it was measured."""
        return self.context.time()  # which is set anew from time to time

    def _measure(self) -> None:
        """Set the clock by the database's; between two looks at that it goes by the monotonic one."""
        self.context.time = execution.ticking(self.units.read(statements.clock) or utc_now())
        self._measure_at = monotonic() + execution.MEASURE_SECONDS

    def _tokens(self) -> set[Token]:
        return set(self.held.copy())

    # --- one round

    def tick(self) -> float:
        """Settle what finished, claim what free slots can use, and submit it; return how many seconds to sleep.

        Where nothing has finished and nothing is due it only reads.
        """
        if self.runner.problem is not None:
            raise self.runner.problem
        done = self.outbox.take()
        try:
            waits_again = any(isinstance(each.outcome, Retried | Snoozed | Released) for each in done)
            if isinstance(self.runner, Farm) and any(each.is_written for each in done):
                waits_again = True  # what they have scheduled there woke nobody here
            is_stale = waits_again or monotonic() >= min(self._stale_after, self._tick_at)
            put_off = self._rest() if is_stale else 0.0
            told = emptied(self._told)
            self.claims.hear(told)
            self._looks_next = bool(told) and is_stale and not self._looks_next
            if put_off:
                self._stale_after = 0.0
            elif is_stale and not self._looks_next:
                self._look()
            wishes = [] if self.is_stopping else self.claims.wishes(self._left())
            claimed = self._settle_and_claim(done, wishes) if done or wishes else 0
        except BaseException:
            self.outbox.put_back(done)
            raise
        for lane in self.lanes.values():
            self.runner.start(lane)
        delay = 0.0 if self._looks_next else self._delay(wanted=bool(wishes), claimed=claimed)
        return min(delay, put_off) if put_off else delay

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop, or has run all that it may."""
        return self._deadline.is_set or self.ran >= self._most

    def _left(self) -> float:
        """Return how many more jobs it may take, of the most that it may run."""
        return self._most - len(self.held) - self.ran

    # --- looking

    def _rest(self) -> float:
        """Return for how long a worker that is busy puts off its next look; where looks are slow, they are seldom."""
        return max(0.0, self._rested_at - monotonic()) if any(lane.busy for lane in self.lanes.values()) else 0.0

    def _look(self) -> None:
        """See which levels have jobs waiting; expire what is too late. Writes nothing where nothing is."""
        if monotonic() >= self._measure_at:
            self._measure()
        if self._retention is not None and monotonic() >= self._prune_at:
            self._prune(self._retention)
        now = self.now()
        self.context.requeued.clear()  # of no use to a loop, and it would grow
        if self.context.asked_to_stop:
            self.context.asked_to_stop.intersection_update({token.id for token in self._tokens()})
        for token in self.outbox.take_lost():
            self._forget(token)

        def look(connection: Connection) -> tuple[list[Level], list[Level], datetime | None]:
            found = self.claims.levels(connection)
            due = [level for level in found if level.first_at <= now] if monotonic() >= self._expire_at else []
            late = [level for level in due if claim_statements.is_any_expired(connection, level, now=now)]
            return self.claims.startable(connection, found), late, tick_statements.next_tick(connection)

        self._stale_after = monotonic() + LOOK_SECONDS  # what wakes it meanwhile makes it stale again
        began = monotonic()
        self.claims.view, late, next_tick = self.units.read(look)
        took = monotonic() - began
        self._rested_at = monotonic() + 20 * took
        if began >= self._expire_at:  # that reads all that is due: seldom, where it takes long
            self._expire_at = monotonic() + max(self._poll, 20 * took)
        for level in late:
            for row in self.units.write(partial(lifecycle.expire, level=level, now=now)):
                tell("expired", row, run_at=row.run_at, expires_at=row.expires_at)
            self._expire_at = self._stale_after = 0.0
        self._recur(next_tick, now)

    def _recur(self, next_at: datetime | None, now: datetime) -> None:
        """Make jobs of the recurring jobs that are due, or note when the next is."""
        if next_at is None:
            self._tick_at = math.inf
        elif next_at > now:
            self._tick_at = monotonic() + (next_at - now).total_seconds()
        elif monotonic() >= self._tick_at:
            self._tick_at = monotonic() + self._poll  # one that cannot go on is not tried at every look
            ticks.tick(self.units, now=now)
            self._stale_after = 0.0

    def _prune(self, retention: timedelta) -> None:
        before = self.now() - retention

        def work(connection: Connection) -> int:
            return statements.prune(connection, before=before, statuses=[Status.COMPLETE], limit=PRUNE_LIMIT)

        more = self.units.write(work) == PRUNE_LIMIT
        self._prune_at = monotonic() + (0 if more else min(PRUNE_SECONDS, retention.total_seconds()))

    # --- settling and claiming

    def _settle_and_claim(self, done: list[Ended], wishes: list[Wish]) -> int:
        completions = [ended for ended in done if not ended.is_written]
        if not completions and not wishes:
            self._settled(done)
            return 0

        def work(connection: Connection) -> tuple[list[Ended], Taken]:
            return self.performer.complete(connection, completions), self.claims.take(connection, wishes)

        self._is_claiming = bool(wishes)
        try:
            ended, taken = self.units.write(work)
            for _, rows in taken.rows:
                self.held.update((row.token, row) for row in rows)
        finally:
            self._is_claiming = False
        self._settled([*[each for each in done if each.is_written], *ended] if completions else done)
        self.claims.took(taken)
        for lane, rows in taken.rows:
            if rows:
                lane.add(rows)
        claimed = [row for _, rows in taken.rows for row in rows]
        if events.wanted("claimed"):
            for row in claimed:
                tell("claimed", row, attempt=row.attempt, worker=self.name)
        return len(claimed)

    def _settled(self, ended: Iterable[Ended]) -> None:
        for lane, group in groupby(ended, key=lambda each: self.claims.lane_of(each.row.queue)):
            count, seconds = 0, 0.0
            for each in group:
                self._forget(each.token)
                count, seconds = count + each.was_run, seconds + each.seconds
                if isinstance(each.outcome, Released):
                    tell("released", each.row, attempt=each.row.attempt, reason=each.outcome.reason)
                else:
                    told(each)
            self.ran += count
            if count and lane is not None:
                lane.learn(seconds, count)

    def _forget(self, token: Token) -> None:
        self.held.pop(token, None)
        if self.claims.ended(token):
            self._wake()

    # --- sleeping

    def _delay(self, *, wanted: bool, claimed: int) -> float:
        if self.is_stopping:
            return 0.0
        longest = STALL_SECONDS if any(lane.may_stall for lane in self.lanes.values()) else self._poll
        longest = min(longest, max(0.0, self._tick_at - monotonic()))
        if wanted and not claimed:  # others were faster, or hold what is due
            self._misses += 1
            self._expire_at = self._stale_after = 0.0  # or all of it is too late
            return min(longest, MISSED_SECONDS * 2.0 ** min(self._misses - 1, 16))
        self._misses = 0
        if claimed and (isinstance(self.runner, Here) or any(any(lane.room()) for lane in self.lanes.values())):
            self._stale_after = 0.0  # all that was due is claimed, or run: look what comes next
            return 0.0
        level = self.claims.next() if self._left() else None
        return longest if level is None else min(longest, self._until_due(level))

    def _until_due(self, level: Level) -> float:
        """Return for how long to sleep, so that a job of ``level`` is claimed at once when it is due."""
        seconds = max(0.0, (level.first_at - self.now()).total_seconds())
        due_at = monotonic() + seconds
        if level.limited:
            self._stale_after = min(self._stale_after, due_at)  # which of them may start, a look then says
        elif seconds and due_at >= self._stale_after and not any(lane.busy for lane in self.lanes.values()):
            if seconds > AHEAD_SECONDS:
                return seconds - AHEAD_SECONDS
            self._stale_after = seconds = 0.0
        return seconds

    def _wake(self) -> None:
        self.leases.ring()
        self._stale_after = 0.0
        self.alarm.ring()

    def hear(self, levels: Sequence[Level]) -> None:
        """Hear what a commit has scheduled, of which nothing needs to be looked for; all, if it is told of nothing."""
        if os.getpid() != self._pid and not self.units.is_alone:  # its locks may be held for ever
            return
        now = self.now()
        soon = [level for level in levels if (level.first_at - now).total_seconds() < self._poll]
        if not levels or any(level.limited for level in soon):
            self._wake()
        elif soon:
            self._told.extend(soon)
            self.alarm.ring()

    # --- ending

    def drain(self) -> None:
        """Wait for what runs, until the deadline; hand back the rest, uncharged."""
        waiting = [row for lane in self.lanes.values() for row in lane.clear()] + self.runner.recall()
        self._release(waiting, "the worker stopped before its turn")
        while True:
            busy = not isinstance(self.runner, Here) and any(lane.busy for lane in self.lanes.values())
            if done := self.outbox.take():
                self._settle_and_claim(done, [])
            elif not busy or self._deadline.left() <= 0:
                break
            else:
                self.alarm.sleep(self._deadline.left())
        self._release(list(self.held.values()), "the worker stopped and could not wait for it")

    def _release(self, rows: list[Claimed], reason: str) -> None:
        if not rows:
            return
        tokens = [row.token for row in rows]
        gone = self.units.write(lambda connection: lifecycle.release_all(connection, tokens))
        for token in tokens:
            self._forget(token)
        tell_released(rows, reason, gone)
