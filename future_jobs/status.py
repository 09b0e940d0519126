"""The life of a job: its states, and which state may follow which.

`ALLOWED` is the whole state machine. Every write of a status goes through `check`, and the chart in
``docs/lifecycle.md`` is drawn from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from .errors import IllegalTransition

__all__ = ["ALLOWED", "FINISHED", "Status", "check"]


class Status(StrEnum):
    """What a job is doing. Compares equal to its text: ``job.status == "failed"``."""

    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


ALLOWED: Mapping[Status, Mapping[Status, str]] = {
    Status.SCHEDULED: {
        Status.RUNNING: "claim",
        Status.EXPIRED: "expire",
        Status.CANCELLED: "cancel",
    },
    Status.RUNNING: {
        Status.COMPLETE: "complete",
        Status.FAILED: "fail",
        Status.SCHEDULED: "retry, snooze, release or rescue",
        Status.CANCELLED: "cancel",
    },
    Status.COMPLETE: {},
    Status.FAILED: {Status.SCHEDULED: "retry"},
    Status.EXPIRED: {Status.SCHEDULED: "retry"},
    Status.CANCELLED: {Status.SCHEDULED: "retry"},
}

FINISHED = frozenset(Status) - {Status.SCHEDULED, Status.RUNNING}


def check(source: Status, target: Status) -> None:
    """Raise `IllegalTransition` unless a job may go from ``source`` to ``target``."""
    if target not in ALLOWED[source]:
        raise IllegalTransition(source, target)
