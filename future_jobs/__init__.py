"""Durable scheduled jobs in your own database, written by your own SQLAlchemy Session.

Names are loaded when they are first used, so that ``import future_jobs`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callables import job as job
    from .callables import job_as_parameter as job_as_parameter
    from .dialects import configure_sqlite as configure_sqlite
    from .errors import FutureJobsError as FutureJobsError
    from .execution import current_job as current_job
    from .models import JobFailure as JobFailure
    from .models import RecurringJob as RecurringJob
    from .models import ScheduledJob as ScheduledJob
    from .models import metadata as metadata
    from .passes import RunReport as RunReport
    from .plans import recurring as recurring
    from .retries import Backoff as Backoff
    from .retries import Cancel as Cancel
    from .retries import Retry as Retry
    from .retries import Snooze as Snooze
    from .scheduler import Scheduler as Scheduler
    from .schema import create_tables as create_tables
    from .status import Status as Status
    from .wakeups import notify_workers as notify_workers
    from .worker import Worker as Worker

__version__ = "0.1.0"

_ROOMS = {
    "callables": ("job", "job_as_parameter"),
    "dialects": ("configure_sqlite",),
    "execution": ("current_job",),
    "models": ("JobFailure", "RecurringJob", "ScheduledJob", "metadata"),
    "passes": ("RunReport",),
    "plans": ("recurring",),
    "retries": ("Backoff", "Cancel", "Retry", "Snooze"),
    "schema": ("create_tables",),
    "scheduler": ("Scheduler",),
    "status": ("Status",),
    "wakeups": ("notify_workers",),
    "worker": ("Worker",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 (names only)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    errors = import_module(".errors", __name__)
    if name in errors.__all__ and isinstance(getattr(errors, name), type):
        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
