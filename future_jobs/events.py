"""What happens, by name, and who wants to know.

The rooms below say *that* something happened; what is done about it (a log line, a counter, a span) is a listener's
business. An event carries facts as keyword data and never a job's arguments. A listener that raises is logged and
otherwise ignored: it can break nothing. What has to be *around* a job, such as an application context, is a wrapper.

====================  ==============================================================================================
event                 data
====================  ==============================================================================================
``scheduled``         ``job_id, callable_name, queue, run_at``
``replaced``          ``job_id, callable_name, queue, run_at`` - a waiting job was given another time and arguments
``claimed``           ``job_id, attempt, callable_name, queue, worker``
``completed``         ``job_id, attempt, callable_name, queue, seconds``
``failed``            ``job_id, attempt, callable_name, queue, seconds, error_type, error``
``retried``           ``job_id, attempt, callable_name, queue, seconds, error_type, error, run_at``
``backoff_failed``    ``job_id, attempt, callable_name, queue, reason`` - the default is used instead
``snoozed``           ``job_id, attempt, callable_name, queue, run_at``
``released``          ``job_id, attempt, callable_name, queue, reason``
``expired``           ``job_id, callable_name, queue, run_at, expires_at``
``cancel_requested``  ``job_id`` - a running job was asked to stop
``cancelled``         ``job_id, reason``
``lost``              ``job_id, attempt, callable_name, queue`` - the attempt's lease was lost; its writes are gone
``rescued``           ``job_id, attempt, callable_name, queue, worker, losses`` - taken back from a dead worker
``result_not_kept``   ``job_id, attempt, callable_name, reason``
``not_recorded``      ``job_id, attempt, error`` - a failure could only be recorded without its details
``started``           ``worker, queues`` - a worker began to look for jobs
``stopped``           ``worker, jobs`` - it ended, and holds no job any more
``degraded``          ``worker, error`` - its database does not answer; it goes on trying
``recovered``         ``worker, seconds`` - the database answers again
``ticked``            ``recurring_id, recurring, job_ids, next_run_at``
``missed``            ``recurring_id, recurring, missed, skipped``
``tick_failed``       ``recurring_id, recurring, error`` - a recurring job that cannot go on; its row says why
====================  ==============================================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, NamedTuple, TypeVar

__all__ = [
    "EVENTS",
    "Around",
    "around_job",
    "emit",
    "listen",
    "log_every_job",
    "not_around_job",
    "unlisten",
    "wrappers",
]

Listener = Callable[..., None]
Wrapper = Callable[..., AbstractContextManager[Any]]
W = TypeVar("W", bound=Wrapper)

logger = logging.getLogger("future_jobs")

MOST_SHOWN = 1_000  # characters of arguments in one line of the log

EVENTS: Final = (
    "scheduled",
    "replaced",
    "claimed",
    "completed",
    "failed",
    "retried",
    "backoff_failed",
    "snoozed",
    "released",
    "expired",
    "cancel_requested",
    "cancelled",
    "lost",
    "rescued",
    "result_not_kept",
    "not_recorded",
    "started",
    "stopped",
    "degraded",
    "recovered",
    "ticked",
    "missed",
    "tick_failed",
)

_listeners: dict[str, tuple[Listener, ...]] = {}


def listen(event: str, listener: Listener) -> Listener:
    """Call ``listener(**data)`` at every ``event`` from now on; return it.

    Raises ValueError for a name that is not in `EVENTS`.
    """
    if event not in EVENTS:
        raise ValueError(f"no event is called {event!r}; there are {', '.join(EVENTS)}")
    _listeners[event] = (*_listeners.get(event, ()), listener)
    return listener


def unlisten(event: str, listener: Listener) -> None:
    """Stop calling ``listener`` at ``event``; nothing happens if it was not listening."""
    _listeners[event] = tuple(each for each in _listeners.get(event, ()) if each is not listener)


def emit(event: str, **data: Any) -> None:
    """Tell the listeners of ``event``, the log among them."""
    for listener in _listeners.get(event, ()):
        try:
            listener(**data)
        except Exception:
            logger.exception("the listener %r of %r raised", listener, event)


def wanted(event: str) -> bool:
    """Tell whether anybody listens to ``event``, so that a busy loop need not gather data for nobody."""
    return bool(_listeners.get(event))


# --- around each job ----------------------------------------------------------------------------------------------


class Around(NamedTuple):
    """A wrapper, and whether it is told the arguments of jobs."""

    wrapper: Wrapper
    arguments: bool


_wrappers: tuple[Around, ...] = ()


def around_job(wrapper: W, *, arguments: bool = False) -> W:
    """Enter ``wrapper(**facts)``, a context manager, around every job that this process runs from now on; return it.

    The facts are those of ``claimed`` without the worker: ``job_id, attempt, callable_name, queue``; with ``arguments``
    also ``args`` and ``kwargs``, as the JSON text that is stored. The first wrapper is the outermost. Each is entered
    before the arguments are decoded, in the thread of the handler, where `current_job` works. What it raises fails the
    attempt; what the handler raises passes through it and cannot be swallowed.
    """
    global _wrappers  # noqa: PLW0603 (as the listeners: they belong to the process)
    _wrappers = (*_wrappers, Around(wrapper, arguments))
    return wrapper


def not_around_job(wrapper: Wrapper) -> None:
    """Enter ``wrapper`` no more; nothing happens if it was none."""
    global _wrappers  # noqa: PLW0603
    _wrappers = tuple(each for each in _wrappers if each.wrapper is not wrapper)


def wrappers() -> tuple[Around, ...]:
    """Return what is to be entered around each job, the outermost first."""
    return _wrappers


# --- the log is one listener --------------------------------------------------------------------------------------

_LINES: Final = {
    "replaced": (logging.INFO, "job {job_id} replaced, due at {run_at}: {callable_name}"),
    "claimed": (logging.DEBUG, "job {job_id} claimed, attempt {attempt}: {callable_name}"),
    "completed": (logging.INFO, "job {job_id} complete in {seconds:.3f} s: {callable_name}"),
    "failed": (logging.ERROR, "job {job_id} failed, attempt {attempt}: {callable_name}: {error_type}: {error}"),
    "retried": (logging.WARNING, "job {job_id} failed, again at {run_at}: {callable_name}: {error_type}: {error}"),
    "backoff_failed": (logging.WARNING, "job {job_id}: its backoff failed, the default is used: {reason}"),
    "snoozed": (logging.INFO, "job {job_id} snoozed until {run_at}: {callable_name}"),
    "released": (logging.INFO, "job {job_id} handed back: {callable_name}: {reason}"),
    "expired": (logging.WARNING, "job {job_id} expired at {expires_at}: {callable_name}"),
    "cancel_requested": (logging.INFO, "job {job_id} was asked to stop"),
    "cancelled": (logging.INFO, "job {job_id} cancelled: {reason}"),
    "lost": (logging.WARNING, "job {job_id} lost its lease, attempt {attempt}: {callable_name}"),
    "rescued": (logging.WARNING, "job {job_id} taken back from {worker}, lost {losses} times: {callable_name}"),
    "result_not_kept": (logging.WARNING, "job {job_id} complete, result not kept: {callable_name}: {reason}"),
    "not_recorded": (logging.ERROR, "job {job_id}: details of attempt {attempt} could not be recorded: {error}"),
    "started": (logging.INFO, "worker {worker} started: {queues}"),
    "stopped": (logging.INFO, "worker {worker} stopped after {jobs} jobs"),
    "degraded": (logging.ERROR, "worker {worker}: the database does not answer: {error}"),
    "recovered": (logging.WARNING, "worker {worker}: the database answers again, after {seconds:.1f} s"),
    "ticked": (logging.DEBUG, "recurring job {recurring!r}: jobs {job_ids}, next at {next_run_at}"),
    "missed": (logging.WARNING, "recurring job {recurring!r}: {missed} times missed, {skipped} skipped"),
    "tick_failed": (logging.ERROR, "recurring job {recurring!r} cannot go on: {error}"),
}


def _log(event: str) -> Listener:
    level, line = _LINES[event]

    def write(**data: Any) -> None:
        if logger.isEnabledFor(level):
            with suppress(KeyError):
                logger.log(level, "%s", line.format(**data), extra={"event": event, **data})

    return write


for _event in _LINES:
    if _event not in {"claimed", "completed"}:
        listen(_event, _log(_event))


def log_every_job(*, arguments: bool = False) -> None:
    """Log claims and completions too. Off by default: at thousands of jobs a second a line each is felt.

    With ``arguments`` those of each job are logged as it starts, which nothing else does: they may be secrets.
    """
    for event in ("claimed", "completed"):
        listen(event, _log(event))
    if arguments:
        around_job(_log_call, arguments=True)


def _log_call(*, args: str, kwargs: str, **facts: Any) -> AbstractContextManager[None]:
    line = "job {job_id} starts, attempt {attempt}: {callable_name} with args={args}, kwargs={kwargs}"
    if logger.isEnabledFor(logging.INFO):
        text = line.format(**facts, args=args[:MOST_SHOWN], kwargs=kwargs[:MOST_SHOWN])
        logger.info("%s", text, extra={"event": "starts", **facts})
    return nullcontext()
