"""What keeps a worker's jobs its own while it lives, and gives them to others when it does not.

A thread of its own renews the leases of all that the worker holds, each quarter of a lease, by one UPDATE, and watches
the leases of others. In between it attends to the jobs that run: were they asked to stop, how far are they? The thread
also keeps the row that tells others that the worker is there.

A job is taken back when its lease is over by the database's clock, *and* nobody has touched it for a whole lease on the
watcher's own monotonic clock. So a clock that jumps takes nothing from the living.
"""

from __future__ import annotations

import math
import os
import random
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from time import monotonic

from sqlalchemy.engine import Connection

from . import claim_statements, events, lifecycle, limit_statements, statements
from .performing import ATTEND_SECONDS, tell_rescued
from .statements import Token
from .units import Units
from .wakeups import Alarm

__all__ = ["Leases"]

MOST_WATCHED = 5_000
WATCHED = 0.7  # of a lease: with less left than this it was not renewed in time
RING_SECONDS = 0.05  # what calls meanwhile is answered together


class Leases:
    """The leases of one worker, and its eye on those of others."""

    def __init__(
        self,
        units: Units,
        worker: str,
        lease: timedelta,
        *,
        time: Callable[[], datetime],
        held: Callable[[], set[Token]],
        claiming: Callable[[], bool],
        queues: Mapping[str, int],
        attend: Callable[[], None],
    ) -> None:
        self.units = units
        self.worker = worker
        self.lease = lease
        self._time = time
        self._held = held
        self._claiming = claiming
        self._queues = dict(queues)
        self._attend = attend
        self._started_at: datetime | None = None
        self._strays: set[Token] = set()
        self._rescue_at = math.inf
        self._watched: dict[tuple[Token, datetime | None], float] = {}
        self._alarm = Alarm()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="future_jobs leases", daemon=True)

    def end(self) -> datetime:
        """Return until when a lease that is taken now holds."""
        return self._time() + self.lease

    def start(self) -> None:
        """Begin to renew and to watch, in a thread that no busy job can starve."""
        self._thread.start()

    def ring(self) -> None:
        """Attend to what runs now, since somebody may have asked it to stop."""
        self._alarm.ring(RING_SECONDS)

    def stop(self) -> None:
        """Return once nothing is renewed any more."""
        self._over.set()
        self._alarm.ring()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # it may be waiting for a database that is away
        if self._started_at is not None:
            try:
                self.units.write(lambda connection: limit_statements.unregister(connection, [self.worker]))
            except Exception:
                events.logger.exception("the row of %s stays; another worker will remove it", self.worker)

    def _run(self) -> None:
        pause = self.lease.total_seconds() / 4
        renew_at = 0.0
        while not self._over.is_set():
            began = monotonic()
            steps = [self._attend]
            if began >= renew_at:
                # First what only reads: others wait for it, and the writes may have to wait for a lock.
                steps, renew_at = [self.watch, self.renew, self.appear, self._attend], began + pause
            elif began >= self._rescue_at:
                steps = [self.watch, self._attend]
            for step in steps:
                try:
                    step()
                except Exception:
                    if not self._over.is_set():
                        events.logger.exception("the leases of %s: %s failed", self.worker, step.__name__)
            now = monotonic()
            self._alarm.sleep(max(0.0, min(renew_at, self._rescue_at, began + ATTEND_SECONDS) - now))

    def appear(self) -> None:
        """Say that the worker is alive, and forget those that have not said so for long."""
        now = self._time()
        self._started_at = self._started_at or now
        row = {
            "name": self.worker,
            "host": socket.gethostname()[:255],
            "pid": os.getpid(),
            "queues": self._queues,
            "started_at": self._started_at,
            "seen_at": now,
            "lease_seconds": self.lease.total_seconds(),
        }

        def work(connection: Connection) -> None:
            if not limit_statements.seen(connection, self.worker, now=now):
                limit_statements.register(connection, row)
                limit_statements.forget_limits(connection, before=now)
            gone = [each.name for each in limit_statements.workers(connection) if limit_statements.is_gone(each, now)]
            if gone:
                limit_statements.unregister(connection, gone)

        self.units.write(work)

    def renew(self) -> None:
        """Extend the leases of all that the worker holds.

        A job that the database says it holds, and it knows nothing of, was claimed by a transaction whose commit was
        reported as lost. Renewed with the others it would never run: if it is still there the next time, it goes back.
        While the worker claims, it may have committed what it does not know of yet.
        """
        if not self._held() and not self._strays:
            return
        renewed = self.units.write(lambda connection: statements.renew(connection, self.worker, self.end()))
        unknown = set() if self._claiming() else renewed - self._held()
        lasting, self._strays = unknown & self._strays, unknown
        if lasting:
            self.units.write(lambda connection: lifecycle.release_all(connection, lasting))

    def watch(self) -> None:
        """Look at leases that were not renewed in time, and take back the jobs of those that stay so.

        A living worker's lease has about three quarters left at the least; the watch begins when it has less.
        """
        now, seen, held = self._time(), monotonic(), self._held()

        def look(connection: Connection) -> dict[tuple[Token, datetime | None], float]:
            rows = claim_statements.leases(connection, before=now + self.lease * WATCHED, limit=MOST_WATCHED)
            keys = [(Token(row.id, row.attempt), row.leased_until) for row in rows]
            return {key: self._watched.get(key, seen) for key in keys if key[0] not in held}

        self._watched = self.units.read(look)
        lease = self.lease.total_seconds()
        # Looked at again when the first of them is over; not at once, where the database's clock is behind.
        self._rescue_at = max(min(self._watched.values(), default=math.inf) + lease, seen + lease / 16)
        still = seen - lease
        over = {key for key, since in self._watched.items() if since <= still and (key[1] is None or key[1] < now)}
        if over:
            self._rescue(over, now)

    def _rescue(self, over: set[tuple[Token, datetime | None]], now: datetime) -> None:
        delay = self.lease * random.uniform(0, 1 / 8)  # noqa: S311 (so that what died together does not start together)
        rescued = self.units.write(
            lambda connection: lifecycle.rescue(connection, now=now, grace=timedelta(0), watched=over, delay=delay)
        )
        for row, status in rescued:
            tell_rescued(row, status)
