"""Run one claimed job and say how it ended. Nothing here writes: the outcome is written by whoever claimed the job."""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, tzinfo
from functools import cached_property, partial
from time import monotonic
from types import TracebackType
from typing import Any

from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from . import events, payloads, retries
from .callables import bound_method, invoke, method_name, resolve
from .dialects import Unreadable, is_away, is_lock_error
from .errors import ObjectMissing, PayloadUnreadable, shown
from .interruption import Deadlines, Interrupted, InterruptedAlone, Interruption
from .lifecycle import Cancelled, Completed, Failed, Failure, Outcome, Released, Retried, Snoozed
from .models import Progress, ScheduledJob, loaded
from .retries import Cancel, Retry, Snooze
from .sessions import JobSession
from .statements import AS_TEXT, Claimed
from .status import Status
from .times import parse_duration
from .times import resolve as resolve_when

__all__ = ["Context", "Running", "current_job", "failed", "run", "running"]

_COMPLETED = Completed()
_TYPE_LENGTH = 255
_MESSAGE_LENGTH = 2000


MEASURE_SECONDS = 60.0  # after which what ticks is set anew by the database's clock


def ticking(start: datetime) -> Callable[[], datetime]:
    """Return a clock that shows ``start`` now and goes on from there, whatever happens to the system's."""
    began = monotonic()
    return lambda: start + timedelta(seconds=monotonic() - began)


@dataclass(slots=True)
class Context:
    """What runs have in common: where names may lead, what time it is, how local times are read."""

    check: Callable[[str], None]  # of callables
    check_class: Callable[[str], None]  # of the classes that arguments name
    time: Callable[[], datetime]
    timezone: tzinfo | None
    now: Callable[[], datetime] | None = None  # what "now" is for handlers, if it is not simply now
    is_interrupted: bool = False  # by a real Ctrl-C
    around: Callable[[JobSession, Callable[[], Any]], Any] | None = None
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    asked_to_stop: set[int] = field(default_factory=set)  # jobs cancelled by handlers of this pass
    requeued: set[int] = field(default_factory=set)  # jobs that wait again, for the next pass
    is_alone: bool = False  # there is one connection, and no other to take its place
    at_work: set[Running] = field(default_factory=set)  # what runs now, in any thread
    deadlines: Deadlines = field(default_factory=Deadlines)

    def function(self, name: str) -> Callable[..., Any]:
        """Return the callable called ``name``, found once."""
        if name not in self.functions:
            self.functions[name] = resolve(name, self.check)
        return self.functions[name]


class Running:
    """The job being run, as handlers see it, and those who have to tell it something from another thread."""

    is_asked_to_stop = False
    interruption: Interruption | None = None
    news: Progress | None = None  # what the handler said of its progress, and is not written yet

    def __init__(self, row: Claimed, open_session: Callable[[Claimed], JobSession], context: Context) -> None:
        self.row = row
        self.context = context
        self.opened: JobSession | None = None
        self._open_session = open_session

    @property
    def work(self) -> JobSession:
        """The job's Session and transaction, made when they are first asked for: most jobs never do."""
        if self.opened is None:
            self.opened = self._open_session(self.row)
        return self.opened

    @cached_property
    def job(self) -> ScheduledJob:
        """The job's row as an object of its Session, made from what the claim returned: nothing is read."""
        job = ScheduledJob()
        for name, value in self.row._asdict().items():
            decode = name in AS_TEXT and value is not None
            set_committed_value(job, name, json.loads(value) if decode else value)
        set_committed_value(job, "status", Status.RUNNING)
        job.watched_by(self)
        make_transient_to_detached(job)
        self.work.session.add(job)
        return job

    def ask_to_stop(self) -> None:
        """Let the handler know that its job was cancelled; one that is a coroutine is cancelled."""
        self.is_asked_to_stop = True
        if self.interruption is not None:
            self.interruption.cancel()

    def tell(self, fraction: float, message: str | None) -> None:
        """Take note of how far the handler says it is; to be written by others, when they find the time."""
        self.news = Progress(fraction, message, self.context.time())

    def call(self) -> Any:
        """Find the callable, load what it is about, and call it; return what it returns, awaited if need be."""
        seconds = _seconds(_check_readable(self.row))
        if seconds is None:
            return self._call()
        self.interruption = Interruption(InterruptedAlone if self.context.is_alone else Interrupted)
        return self.interruption.limit(self._call, seconds, self.context.deadlines)

    def _call(self) -> Any:
        row, context = self.row, self.context
        args, kwargs = self._arguments()
        leading: list[Any] = []
        if row.content_type is None:
            function = context.function(row.callable_name)
        else:
            content = payloads.load_reference(
                row.content_type, row.content_key or "null", load=self._load, permit=context.check_class
            )
            function, leading = self._bound(content)
        result = invoke(function, args, kwargs, leading=leading, supply=self._supply)
        return self._awaited(result) if result is not None and inspect.isawaitable(result) else result

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        args = payloads.decode(self.row.args, load=self._load, permit=self.context.check_class)
        kwargs = payloads.decode(self.row.kwargs, load=self._load, permit=self.context.check_class)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise PayloadUnreadable(
                f"args is {shown(args)} and kwargs is {shown(kwargs)}; a list and a dict are needed"
            )
        return args, kwargs

    def _supply(self, kind: str) -> Any:
        return self.job if kind == "job" else self.work.session

    def _bound(self, content: Any) -> tuple[Callable[..., Any], list[Any]]:
        name, check = self.row.callable_name, self.context.check
        if "." not in name and content is not None:
            return bound_method(content, name, check), []
        function = self.context.function(name)
        method = method_name(name, function, content)
        return (function, [content]) if method is None else (bound_method(content, method, check), [])

    def _load(self, cls: type, identity: tuple[Any, ...]) -> Any:
        return loaded(self.work.session, cls, identity, required=_options(self.row).get("missing") != "none")

    def _awaited(self, result: Awaitable[Any]) -> Any:
        self.interruption = interruption = self.interruption or Interruption()
        interruption.hand_over()

        async def wait() -> Any:
            task = asyncio.current_task()
            assert task is not None
            interruption.follow(asyncio.get_running_loop(), task, is_asked=self.is_asked_to_stop)
            return await result

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(wait())
        # Inside a running loop (a notebook, an ASGI endpoint) no other can run in this thread, which waits for it
        # anyway.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(copy_context().run, asyncio.run, wait()).result()


def _check_readable(row: Claimed) -> Mapping[str, Any]:
    if not (type(row.run_at) is type(row.nominal_at) is type(row.created_at) is datetime) or isinstance(
        row.expires_at, Unreadable
    ):
        times = {name: getattr(row, name) for name in ("run_at", "nominal_at", "expires_at", "created_at")}
        wrong = {name: value.text for name, value in times.items() if isinstance(value, Unreadable)}
        raise PayloadUnreadable(f"the row holds what is no time: {shown(wrong)}")
    return _options(row)


def _seconds(options: Mapping[str, Any]) -> float | None:
    limit = options.get("timeout")
    if limit is None:
        return None
    duration = parse_duration(limit, argument="timeout")
    if not isinstance(duration, timedelta):
        raise PayloadUnreadable(f"timeout is {shown(limit)}; an exact duration is needed")
    return duration.total_seconds()


def time_limit(row: Claimed) -> float | None:
    """Return the ``timeout`` of a job in seconds; None if it has none, or one that cannot be read."""
    if row.options is None or '"timeout"' not in row.options:
        return None
    try:
        return _seconds(_options(row))
    except Exception:  # which its run will say
        return None


def _options(row: Claimed) -> Mapping[str, Any]:
    if row.options is None:
        return {}
    try:
        options = json.loads(row.options)
    except (ValueError, RecursionError) as error:
        raise PayloadUnreadable(f"options is {shown(row.options)}, which is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise PayloadUnreadable(f"options is {shown(options)}; an object is needed")
    return options


running: ContextVar[Running | None] = ContextVar("future_jobs.running", default=None)


def given_now() -> datetime | None:
    """Return the "now" of a `run_due` around this call, if it was given a time or a clock; None if it was not."""
    now_running = running.get()
    return None if now_running is None or now_running.context.now is None else now_running.context.now()


def current_job() -> ScheduledJob | None:
    """Return the job whose handler is running, an object of the job's Session; None outside of one."""
    now_running = running.get()
    return None if now_running is None else now_running.job


def run(this: Running) -> Outcome:
    """Run a claimed job and return how it ended.

    Whatever a handler raises becomes an outcome, SystemExit included; only a real interrupt passes through.
    """
    context = this.context
    token = running.set(this)
    context.at_work.add(this)
    try:
        call = partial(_wrapped, this) if events.wrappers() else this.call
        result = call() if context.around is None else context.around(this.work, call)
        if this.opened is not None:
            this.opened.flush()
        return _COMPLETED if result is None else _returned(this, result)
    except BaseException as error:
        if context.is_interrupted and isinstance(error, KeyboardInterrupt):
            raise
        if this.is_asked_to_stop and isinstance(error, asyncio.CancelledError):
            return Cancelled("asked to stop")
        return failed(this.row, error, context)
    finally:
        context.at_work.discard(this)
        running.reset(token)


def _wrapped(this: Running) -> Any:
    row = this.row
    facts = {"job_id": row.id, "attempt": row.attempt, "callable_name": row.callable_name, "queue": row.queue}
    with ExitStack() as stack:
        try:
            for wrapper, arguments in events.wrappers():
                told = {**facts, "args": row.args, "kwargs": row.kwargs} if arguments else facts
                stack.enter_context(wrapper(**told))
            return this.call()
        except BaseException as error:
            swallowed = error
            raise
    raise swallowed  # by a wrapper, which is not the one to say that the job went well


def _returned(this: Running, result: Any) -> Outcome:
    if isinstance(result, Snooze | Retry | Cancel):
        return replace(_asked(this.row, result, this.context, _options(this.row)), keeps_writes=True)
    session = this.opened.session if this.opened is not None and this.opened.was_used else None
    return Completed(*payloads.encode_result(result, session=session))


def failed(row: Claimed, error: BaseException, context: Context) -> Outcome:
    """Return what follows from ``error``: another try, the end, or nothing charged where the database was busy."""
    try:
        options = _options(row)
    except PayloadUnreadable:
        options = {}
    if isinstance(error, Snooze | Retry | Cancel):
        try:
            return _asked(row, error, context, options)
        except Exception as unusable:
            error = unusable
    failure = _failure(error)
    if is_lock_error(error) or is_away(error):
        return Released(failure.message, otherwise=_again(row, error, failure, context, options))
    if isinstance(error, ObjectMissing) and options.get("missing") == "discard":
        return Cancelled(failure.message, failure)
    if retries.matches(error, options.get("discard_on") or ()):
        return Cancelled(f"{failure.error_type}: {failure.message}", failure)
    retry_on = options.get("retry_on")
    if retry_on is not None and not retries.matches(error, retry_on):
        return Failed(failure, error)
    return _again(row, error, failure, context, options)


def _asked(
    row: Claimed, wish: Snooze | Retry | Cancel, context: Context, options: Mapping[str, Any]
) -> Cancelled | Snoozed | Failed | Retried:
    if isinstance(wish, Cancel):
        return Cancelled(payloads.sanitise(wish.reason))
    if isinstance(wish, Snooze):
        return Snoozed(resolve_when(wish.when, now=context.time(), timezone=context.timezone))
    return _again(row, wish, _failure(wish), context, options)


def _again(
    row: Claimed, error: BaseException, failure: Failure, context: Context, options: Mapping[str, Any]
) -> Failed | Retried:
    failures = row.failures + 1
    when = error.when if isinstance(error, Retry) else None
    is_asked = isinstance(error, Retry) and row.max_attempts == 1  # no limit was set, but another try is asked for
    if failures >= row.max_attempts and not is_asked:
        return Failed(failure, error)
    problem = None
    if when is not None:
        run_at = resolve_when(when, now=context.time(), timezone=context.timezone)
    else:
        run_at, problem = _after_backoff(row, error, context, options.get("backoff"))
    if isinstance(row.expires_at, datetime) and run_at > row.expires_at:
        return Failed(failure, error)
    return Retried(failure, run_at, problem)


def _after_backoff(row: Claimed, error: BaseException, context: Context, stored: Any) -> tuple[datetime, str | None]:
    """Return when the next try is, and what is wrong with the job's own backoff if that is after the default one."""
    now, failures, seed = context.time(), row.failures + 1, f"{row.id}:{row.attempt}"
    try:
        path = retries.path_in(stored)
        wait = retries.delay(stored, failures, seed) if path is None else context.function(path)(failures, error)
        return now + retries.exact(wait, "backoff"), None
    except BaseException as problem:
        if context.is_interrupted and isinstance(problem, KeyboardInterrupt):
            raise
        reason = payloads.sanitise(f"{type(problem).__name__}: {_message(problem)}", _MESSAGE_LENGTH)
        return now + retries.delay(None, failures, seed), reason


# --- what went wrong, as text -------------------------------------------------------------------------------------


def _failure(error: BaseException) -> Failure:
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    try:
        text = "".join(traceback.format_exception(cls, error, _users_part(error.__traceback__)))
    except BaseException as second:
        text = f"{name}: {_message(error)} (the traceback could not be formatted: {type(second).__name__})"
    return Failure(payloads.sanitise(name, _TYPE_LENGTH), _message(error), payloads.sanitise(text))


def _message(error: BaseException) -> str:
    try:
        return payloads.sanitise(str(error), _MESSAGE_LENGTH)
    except BaseException as second:
        return f"<{type(error).__name__} whose str() raised {type(second).__name__}>"


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Skip the frames of this library, which are the same in every traceback, unless there are no others."""
    first = trace
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    return trace or first
