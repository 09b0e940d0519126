"""What a worker has while it works: connections of its own, leases, a watch, and something that runs jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy.engine import Connection, Engine

from . import execution, lifecycle, statements, watches
from .claims import Claims
from .dialects import is_single_connection
from .errors import CallableNotFound
from .leases import Leases
from .lifecycle import Released, Snoozed
from .patience import PatientUnits
from .performing import Ended, Performer
from .runners import Outbox, Runner
from .sessions import JobSession, Kept
from .statements import Claimed
from .status import Status
from .times import utc_now

__all__ = ["Crew", "PatientPerformer", "opener"]

MEASURE_SECONDS = 60.0  # between two looks at the database's clock
UNKNOWN_DELAY = timedelta(minutes=1)  # until a job is tried again whose callable this process does not know
AWAY_SECONDS = 1.0  # a database that takes longer to answer was away


@dataclass(slots=True)
class Crew:
    """What one worker has from its start to its end."""

    name: str
    units: PatientUnits
    context: execution.Context
    performer: Performer
    leases: Leases
    watch: watches.Watch
    claims: Claims
    runner: Runner
    outbox: Outbox
    measure_at: float = 0.0
    prune_at: float = 0.0
    expire_at: float = 0.0
    tick_at: float = 0.0

    def now(self) -> datetime:
        """Return the database's time, as far as it was measured."""
        return self.context.time()  # which is set anew from time to time

    def measure(self) -> None:
        """Set the clock by the database's; between two looks at that it goes by the monotonic one."""
        self.context.time = execution.ticking(self.units.read(statements.clock) or utc_now())
        self.measure_at = monotonic() + MEASURE_SECONDS

    def leave(self) -> None:
        """Leave to the parent, from which this process was forked, what is its own."""
        self.watch.leave()
        self.units.engine.dispose(close=False)

    def end(self) -> None:
        """Give back everything."""
        self.watch.stop()
        self.leases.stop()
        self.runner.stop()
        if not self.units.is_alone:
            self.units.engine.dispose()


class PatientPerformer(Performer):
    """A Performer that tries a job again once the database answers, and hands back what this process cannot run."""

    def perform(self, row: Claimed) -> Ended:
        """Run a claimed job, unless nothing here is called what it calls.

        Another process may know it, while a new version is rolled out; or this one after its restart.
        """
        try:
            if row.content_type is None:
                self.context.function(row.callable_name)
        except CallableNotFound:
            now = self.context.time()
            later = Snoozed(now + UNKNOWN_DELAY)

            def settle(connection: Connection) -> Status | None:
                return lifecycle.settle(connection, row.token, later, now=now, worker=self.worker)

            status = self.units.write(settle)
            return Ended(row, Released("this process knows no such callable"), 0.0, status, was_run=False)
        except Exception:  # noqa: S110 (what else is wrong with it is told by running it)
            pass
        return super().perform(row)

    def _attempt(self, row: Claimed, began: float) -> Ended:
        ended = super()._attempt(row, began)
        while isinstance(ended.outcome, Released):
            asked = monotonic()
            self.units.read(statements.newest)
            if monotonic() - asked < AWAY_SECONDS:
                break  # it was a lock, which has its own number of tries
            ended = super()._attempt(row, monotonic())
        return ended


def opener(
    make: Callable[[], Any], engine: Engine, info: dict[str, Any], kept: Kept
) -> Callable[[Claimed], JobSession]:
    """Return what opens the Session of a job on ``engine``, with ``info`` for who asks for it."""
    lender = None if is_single_connection(engine) else kept

    def open_session(row: Claimed) -> JobSession:
        joined = row.options is None or '"transaction":"own"' not in row.options
        hold = partial(statements.hold, token=row.token)
        return JobSession(make, engine, hold=hold, joined=joined, info=info, lender=lender)

    return open_session
