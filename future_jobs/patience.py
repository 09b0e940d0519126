"""Units of work that outlast a database's absence: a worker waits for it to come back instead of ending."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from . import events
from .dialects import is_away
from .errors import DatabaseBusy
from .units import Units

__all__ = ["Deadline", "PatientUnits"]

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds


class Deadline:
    """When a worker that was told to stop waits for nothing any more; never, until it is."""

    def __init__(self) -> None:
        self._at = math.inf

    @property
    def is_set(self) -> bool:
        """Whether it was told to stop."""
        return self._at < math.inf

    def within(self, seconds: float) -> None:
        """Let it be no later than in so many ``seconds``."""
        self._at = min(self._at, monotonic() + seconds)

    def left(self) -> float:
        """Return how many seconds are left; none or less, if it is over."""
        return self._at - monotonic()


class PatientUnits(Units):
    """Units that are tried until the database answers, or until ``patience()``, in seconds, is used up.

    ``degraded`` is emitted once when it stops answering, ``recovered`` when it answers again, however many threads
    wait.
    """

    def __init__(self, bind: Engine | Connection, *, worker: str, patience: Callable[[], float]) -> None:
        super().__init__(bind)
        self._worker = worker
        self._patience = patience
        self._away_since: float | None = None
        self._telling = threading.Lock()

    def _run(self, work: Callable[[Connection], T], *, writing: bool) -> T:
        pause = FIRST_PAUSE
        while True:
            try:
                result = super()._run(work, writing=writing)
            except (SQLAlchemyError, DatabaseBusy) as error:
                may_end = is_away(error) or isinstance(error, PoolTimeoutError | DatabaseBusy)
                if not may_end or self._patience() <= 0:
                    raise
                self._suffer(error)
            else:
                if self._away_since is not None:
                    self._recover()
                return result
            threading.Event().wait(min(random.uniform(pause / 2, pause), self._patience()))  # noqa: S311 (not a secret)
            pause = min(2 * pause, LONGEST_PAUSE)

    @property
    def away_seconds(self) -> float:
        """For how long the database has not answered; 0 if it does."""
        since = self._away_since
        return 0.0 if since is None else monotonic() - since

    def _suffer(self, error: Exception) -> None:
        with self._telling:
            if self._away_since is not None:
                return
            self._away_since = monotonic()
        events.emit("degraded", worker=self._worker, error=" ".join(str(getattr(error, "orig", error)).split()))

    def _recover(self) -> None:
        with self._telling:
            if self._away_since is None:
                return
            seconds, self._away_since = monotonic() - self._away_since, None
        events.emit("recovered", worker=self._worker, seconds=seconds)
