"""`Scheduler`: when, what. All that it writes goes through the Session it was given, and is committed by its owner."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from functools import partial
from itertools import islice
from time import monotonic, sleep
from typing import Any, Unpack

from sqlalchemy import Select, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from . import (
    bulk,
    events,
    execution,
    explaining,
    lifecycle,
    limit_statements,
    payloads,
    statements,
    unique_statements,
    wakeups,
)
from .callables import Allow, Call, describe, permit, permit_classes, plain_arguments
from .callables import resolve as resolve_callable
from .dialects import Encoded, begin_before_savepoint, cannot_roll_back, is_autocommit
from .errors import (
    AlreadyScheduled,
    InvalidArgument,
    InvalidOption,
    ObjectMissing,
    UsageError,
    WaitTimeout,
    shown,
)
from .models import SCHEDULER, RecurringJob, ScheduledJob
from .options import JobOptions, checked, checked_word, limit_columns, run_options, unique_columns
from .passes import Pass, RunReport
from .retries import path_in
from .schedules import Schedules
from .sessions import AnySession, InRegistry, JobSession, checked_session, session_maker
from .status import FINISHED, Status
from .times import Clock, When, as_utc, resolve, resolve_age, resolve_expiry, seconds_of, utc_now, zone
from .unique_statements import Put
from .units import Units, schema_errors

__all__ = ["Scheduler"]

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.5  # seconds between two looks at a job that is waited for
_ARGUMENTS = frozenset({"args", "kwargs"})
_NO_ARGS, _NO_KWARGS = Encoded("[]"), Encoded("{}")
_COPIED = (
    *("callable_name", "args", "kwargs", "content_type", "content_key"),
    *("queue", "priority", "max_attempts", "tags", "options", "unique_key", "unique_until"),
)


class Scheduler(Schedules):
    """Schedules calls through one Session, and runs those that are due.

    ``timezone`` (a tzinfo or an IANA name; None: the system's) is what naive datetimes and calendar durations are
    counted in. ``clock`` returns the current time as an aware datetime; the default is the system's. ``allow``
    restricts which callables may be named: a list of modules, or ``"registered"``. ``expires`` is how long after its
    time a job is still worth running, if a call does not say.
    """

    def __init__(
        self,
        session: AnySession,
        *,
        timezone: tzinfo | str | None = None,
        clock: Clock | None = None,
        allow: Allow = None,
        expires: When | None = "7d",
    ) -> None:
        self.session = checked_session(session)
        self.timezone = zone(timezone)
        self.clock = clock
        self.allow = allow
        self.expires = expires
        self.check = permit(allow)
        self.check_class = permit_classes(allow)
        self._prepared: Engine | None = None
        resolve_expiry(expires, run_at=utc_now(), timezone=self.timezone)
        with suppress(Exception):  # a scoped_session may have no bind before its application is set up
            self._prepare()

    @classmethod
    def of(cls, session: Session) -> Scheduler:
        """Return the Scheduler that ``session`` belongs to, or a new one with the defaults."""
        found = session.info.get(SCHEDULER)
        if isinstance(found, Scheduler):
            if found._is_bound_to(session):  # noqa: SLF001 (one Scheduler asks another)
                return found
            return cls(session, timezone=found.timezone, clock=found.clock, allow=found.allow, expires=found.expires)
        return cls(session)

    # --- scheduling

    def schedule(
        self,
        when: When,
        callable: Callable[..., Any] | str,  # noqa: A002 (the field's own word)
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[JobOptions],
    ) -> ScheduledJob:
        """Schedule ``callable(*args, **kwargs)`` for ``when``; return the job, which has its id.

        After commit there is one more ``scheduled`` row; after a rollback there never was. The Session is flushed and
        not committed. Raises a `UsageError` before anything is written if any part of it could not work.

        If another job has its ``unique_key`` there is not one more row. ``on_conflict`` says what happens instead:
        `AlreadyScheduled` is raised, or that job is returned, as it is or with this time and these arguments.
        """
        self._prepare()
        call, shared, on_conflict = self._draft(when, callable, options, now=self._now())
        return self._add(self._row(call, shared, args, kwargs), on_conflict)

    def enqueue(
        self,
        callable: Callable[..., Any] | str,  # noqa: A002
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[JobOptions],
    ) -> ScheduledJob:
        """Schedule ``callable`` for now."""
        return self.schedule("0s", callable, args=args, kwargs=kwargs, **options)

    def schedule_many(
        self,
        when: When,
        callable: Callable[..., Any] | str,  # noqa: A002
        calls: Iterable[Mapping[str, Any]],
        **options: Unpack[JobOptions],
    ) -> list[int]:
        """Schedule one job for each of ``calls``, in few round trips; return the ids in the same order.

        Each call is a mapping with ``args``, ``kwargs`` and whatever options differ from ``options``. Nothing is
        written unless all of them can be. Where another job has the ``unique_key`` of a call, and ``on_conflict`` is
        not ``"raise"``, the id of that job is in its place.
        """
        self._prepare()
        now = self._now()
        drafts: list[dict[str, Any]] = []
        wishes: dict[int, str] = {}  # of those with a unique key
        texts: dict[str, list[str]] = {"args": [], "kwargs": []}
        checked_calls = self._calls(when, callable, calls, options, now=now)
        while some := list(islice(checked_calls, payloads.AT_ONCE)):
            rows, on_conflicts, *arguments = zip(*some, strict=True)
            wishes |= {len(drafts) + at: on_conflicts[at] for at, row in enumerate(rows) if "unique_key" in row}
            drafts += rows
            for name, values in zip(texts, arguments, strict=True):
                try:
                    texts[name] += payloads.encode_many(values, where=name, session=self._own())
                except UsageError as error:
                    error.add_note(f"in calls[{len(texts[name])}]")
                    raise
        if not drafts:
            return []
        self.session.flush()
        with self._connection() as connection:
            if wishes:
                whole = [
                    {**draft, **{name: Encoded(column[at]) for name, column in texts.items()}}
                    for at, draft in enumerate(drafts)
                ]
                ids = self._put_many(connection, whole, wishes)
            else:
                ids = bulk.add_many(connection, drafts, texts)
            wakeups.announce(self._own(), connection, drafts, now=now)
        if not wishes and events.wanted("scheduled"):
            for job_id, row in zip(ids, drafts, strict=True):
                _tell_scheduled(job_id, row)
        return ids

    def _put_many(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]], wishes: Mapping[int, str]
    ) -> list[int]:
        """Insert ``rows``, of which some have a unique key, or nothing; return the ids in order."""
        with connection.begin_nested():
            put = unique_statements.put_many(connection, rows, wishes)
            taken = {at: put[at] for at, wish in wishes.items() if _is_refused(put[at], wish)}
            if taken:
                raise _taken(taken, rows, wishes, new={each.job_id for each in put if each.is_new})
        for each, row in zip(put, rows, strict=True):
            _tell_put(each, row)
            if each.is_replaced:
                self._refresh(each.known_id)
                if running := execution.running.get():
                    running.context.requeued.add(each.known_id)
        return [each.known_id for each in put]

    def reschedule(
        self,
        job: ScheduledJob,
        when: When,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[JobOptions],
    ) -> ScheduledJob:
        """Schedule a copy of ``job``, ``when`` counted from the time that ``job`` was scheduled for.

        What is not given is copied; an expiry keeps its distance from the time of the job. A unique key is copied as
        well: a job that keeps it until it is finished hands it to the copy that its own handler makes.
        """
        self._prepare()
        if not isinstance(job, ScheduledJob):
            raise InvalidArgument(f"job is {shown(job)}; pass a ScheduledJob", argument="job", value=job)
        given = self._checked(options, {})
        run_at = resolve(when, now=job.nominal_at, timezone=self.timezone)
        row = {name: getattr(job, name) for name in _COPIED}
        row |= {name: given[name] for name in ("queue", "priority", "max_attempts", "tags") if name in given}
        own_args, own_kwargs = plain_arguments(args or (), kwargs)
        if args is not None:
            row["args"] = Encoded(payloads.encode(list(own_args), where="args", session=self._own()))
        if kwargs is not None:
            row["kwargs"] = Encoded(payloads.encode(own_kwargs, where="kwargs", session=self._own()))
        if given.get("content_object") is not None:
            row["content_type"], row["content_key"] = payloads.reference_of(
                given["content_object"], session=self._own()
            )
        row["options"] = {**(job.options or {}), **(run_options(given) or {})} or None
        row |= limit_columns({**_limits_of(job), **given}, row["queue"])
        if "expires" in given:
            expires_at = resolve_expiry(given["expires"], run_at=run_at, timezone=self.timezone)
        else:
            expires_at = self._same_grace(job, run_at)
        row |= {"run_at": run_at, "nominal_at": run_at, "expires_at": expires_at, "created_at": self._now()}
        copied = {name: row[name] for name in ("unique_key", "unique_until") if row[name] is not None}
        row |= {"unique_key": None, "unique_until": None, **unique_columns({**copied, **given}, given=given)}
        if row["unique_key"] is not None and row["unique_key"] == job.unique_key:
            self._hand_over_key(job)
        return self._add(row, given.get("on_conflict", "raise"))

    def _hand_over_key(self, job: ScheduledJob) -> None:
        """Let a running job give up its key to the copy that its handler makes, if and when that is committed."""
        running = execution.running.get()
        if running is None or running.row.id != job.id or job.session is not self._own():
            return
        with self._connection() as connection:
            statements.move(connection, running.row.token, Status.RUNNING, {"unique_until": "started"})

    # --- changing one's mind

    def cancel(self, job: ScheduledJob | int) -> bool:
        """Cancel a waiting job, or ask a running one to stop; True if this call did.

        False if it is finished, was asked already, or does not exist.
        """
        self._prepare()
        job_id = _id_of(job)
        self.session.flush()
        with self._connection() as connection:
            now = self._now()
            was = lifecycle.cancel(connection, job_id, now=now)
            if was is Status.RUNNING:
                wakeups.announce(self._own(), connection, (), now=now)  # a worker that wakes up looks for it
        if was is None:
            return False
        self._refresh(job_id)
        if running := execution.running.get():
            running.context.asked_to_stop.add(job_id)
        if was is Status.RUNNING:
            events.emit("cancel_requested", job_id=job_id)
        else:
            events.emit("cancelled", job_id=job_id, reason="cancel() was called")
        return True

    def retry(self, job: ScheduledJob | int, *, when: When = "0s", expires: When | None = "same") -> bool:
        """Let a failed, expired or cancelled job run again at ``when``, with all its attempts; True if this call did.

        Its expiry keeps its distance from the time of the job, unless ``expires`` is given. False if the job is
        waiting, running, complete, or does not exist, and if another job has its unique key.
        """
        self._prepare()
        job_id = _id_of(job)
        self.session.flush()
        with self._connection() as connection:
            found = statements.place_of(connection, job_id)
        if found is None:
            return False
        run_at = resolve(when, now=self._now(), timezone=self.timezone)
        if expires == "same":
            expires_at = self._same_grace(found, run_at)
        else:
            expires_at = resolve_expiry(expires, run_at=run_at, timezone=self.timezone)
        with self._connection() as connection:
            won = lifecycle.revive(connection, job_id, run_at=run_at, expires_at=expires_at)
            if won:
                wakeups.announce(self._own(), connection, [{**found._asdict(), "run_at": run_at}], now=self._now())
        if won:
            self._refresh(job_id)
            if running := execution.running.get():
                running.context.requeued.add(job_id)
        return won

    def prune(
        self, older_than: When = "30d", *, statuses: Iterable[Status | str] = ("complete",), limit: int | None = None
    ) -> int:
        """Delete finished jobs, and their failures, that ended more than ``older_than`` ago; return how many.

        Only complete ones unless ``statuses`` says otherwise; at most ``limit`` of them, oldest id first.
        """
        self._prepare()
        wanted = _finished(statuses)
        before = resolve_age(older_than, now=self._now(), timezone=self.timezone, argument="older_than")
        self.session.flush()
        with self._connection() as connection:
            return statements.prune(connection, before=before, statuses=wanted, limit=limit)

    # --- queues

    def pause_queue(self, queue: str) -> bool:
        """Let no job of ``queue`` start until `resume_queue`, wherever it would run; True if this call did.

        What runs goes on, and so does what a worker has claimed. After commit nothing more is claimed from the queue.
        """
        self._prepare()
        queue = checked_word("queue", queue)
        self.session.flush()
        with self._connection() as connection:
            return limit_statements.pause(connection, queue, now=self._now())

    def resume_queue(self, queue: str) -> bool:
        """Let the jobs of ``queue`` start again; True if it was paused."""
        self._prepare()
        queue = checked_word("queue", queue)
        self.session.flush()
        with self._connection() as connection:
            now = self._now()
            wakeups.announce(self._own(), connection, (), now=now)
            return limit_statements.resume(connection, queue)

    # --- looking

    def why(self, job: ScheduledJob | int) -> explaining.Why:
        """Return why ``job`` is not running; printed, it is a sentence. Its ``reason`` is for programs."""
        self._prepare()
        job_id = _id_of(job)
        self.session.flush()
        with self._connection() as connection:
            return explaining.explain(connection, job_id, now=self._now())

    def jobs_for(self, obj: object) -> Select[ScheduledJob]:
        """Return a Select of the jobs bound to the mapped object ``obj``, to be narrowed and executed by the caller."""
        content_type, content_key = payloads.reference_of(obj, where="obj", session=self._own())
        return select(ScheduledJob).where(
            ScheduledJob.content_type == content_type, ScheduledJob.content_key == content_key
        )

    def wait(self, job: ScheduledJob | int, *, timeout: str | timedelta | None = None) -> ScheduledJob:
        """Return ``job``, as it is then, once others have finished it; for scripts and tests.

        The Session's pending work is committed first, since nobody can run what nobody can see, and no transaction is
        open while it waits. Raises `WaitTimeout` after ``timeout``, `ObjectMissing` if there is no such job (any more),
        and `UsageError` where nobody else can run it: inside of a transaction, or on an in-memory database.
        """
        bind = self._prepare()
        job_id = _id_of(job)
        seconds = math.inf if timeout is None else seconds_of(timeout, "timeout")
        with self._connection():
            self.session.commit()
        units, until, pause = Units(bind), monotonic() + seconds, FIRST_PAUSE
        while True:
            found = units.read(lambda connection: statements.state(connection, job_id))
            if found is None:
                raise ObjectMissing(ScheduledJob.__qualname__, job_id)
            if found[1] in FINISHED:
                return self._own().get_one(ScheduledJob, job_id, populate_existing=True)
            if units.is_alone:
                raise UsageError(f"job {job_id} is {found[1]}, and nobody else can run it here; call run_due()")
            left = until - monotonic()
            if left <= 0:
                raise WaitTimeout(job_id, found[1], timeout)
            sleep(min(pause, left))
            pause = min(1.5 * pause, LONGEST_PAUSE)

    # --- running

    def run_due(
        self,
        now: datetime | None = None,
        *,
        ignore_errors: bool = False,
        delete_completed: bool = False,
        queues: Iterable[str] | None = None,
        limit: int | None = None,
    ) -> RunReport:
        """Run everything that is due, once; return what happened.

        The Session's pending work is committed first. Then what has expired is marked, and what is due runs by
        priority, then time, each job in a transaction of its own. ``now`` makes it any other time, for the handlers
        too. The first error that a handler raises is raised here, after it is recorded, and what was claimed and not
        started is handed back; ``ignore_errors`` goes on instead. ``delete_completed`` deletes jobs that complete.
        ``queues`` restricts which queues are served, ``limit`` how many jobs are run. What handlers schedule meanwhile
        waits for the next pass.
        """
        bind = self._prepare()
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise InvalidOption(
                f"limit is {shown(limit)}; pass a whole number, 0 or more", argument="limit", value=limit
            )
        if isinstance(queues, str) or not isinstance(queues, Iterable | None):
            raise InvalidArgument(f"queues is {shown(queues)}; pass a list of names", argument="queues", value=queues)
        served = None if queues is None else frozenset(checked_word("queues[...]", each) for each in queues)
        given = None if now is None else as_utc(now, timezone=self.timezone)
        given = given or execution.given_now()
        with self._connection():
            self.session.commit()
        if isinstance(bind, Connection) and not bind.in_transaction():
            bind = bind.engine  # nothing around it that others must not see, so that they can be seen
        units = Units(bind)
        start = given or (self._now() if self.clock else units.read(statements.clock) or utc_now())
        now_for_handlers = None if self.clock is None else self._clock_now
        if given is not None:
            now_for_handlers = partial(_same, given)
        make = session_maker(self.session)
        context = execution.Context(
            check=self.check,
            check_class=self.check_class,
            time=execution.ticking(start) if given is None else partial(_same, given),
            timezone=self.timezone,
            now=now_for_handlers,
            around=InRegistry(self.session) if isinstance(self.session, scoped_session) else None,
        )
        try:
            return Pass(
                units,
                partial(self._open, make, bind),
                context,
                now=start,
                delete_completed=delete_completed,
                ignore_errors=ignore_errors,
                queues=served,
                limit=limit,
            ).run()
        finally:
            self._forget()

    def _open(self, make: Callable[[], Session], bind: Engine | Connection, row: statements.Claimed) -> JobSession:
        joined = row.options is None or '"transaction":"own"' not in row.options
        hold = partial(statements.hold, token=row.token)
        return JobSession(make, bind, hold=hold, joined=joined, info={SCHEDULER: self})

    # --- helpers

    def _draft(
        self, when: When, given: Callable[..., Any] | str, options: Mapping[str, Any], *, now: datetime
    ) -> tuple[Call, dict[str, Any], str]:
        """Return what is to be called, the row to insert without its arguments, and what to do if its key is taken.

        Everything in it is checked.
        """
        run_at = resolve(when, now=now, timezone=self.timezone)
        call = describe(given, content_object=options.get("content_object"), check=self.check)
        chosen = self._checked(options, call.spec.options)
        expires_at = resolve_expiry(chosen.get("expires", self.expires), run_at=run_at, timezone=self.timezone)
        content_type = content_key = None
        if call.content_object is not None:
            content_type, content_key = payloads.reference_of(call.content_object, session=self._own())
        row = {
            "callable_name": call.name,
            "args": _NO_ARGS,
            "kwargs": _NO_KWARGS,
            "content_type": content_type,
            "content_key": content_key,
            "options": run_options(chosen),
            "tags": chosen.get("tags") or None,
            "queue": chosen.get("queue", "default"),
            "priority": chosen.get("priority", 0),
            "max_attempts": chosen.get("max_attempts", 1),
            **limit_columns(chosen, chosen.get("queue", "default")),
            "run_at": run_at,
            "nominal_at": run_at,
            "expires_at": expires_at,
            "created_at": now,
            **unique_columns(chosen, given=options),
        }
        return call, row, chosen.get("on_conflict", "raise")

    def _checked(self, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        chosen = checked(options, defaults)
        if path := path_in(chosen.get("backoff")):
            resolve_callable(path, self.check)
        return chosen

    def _calls(
        self,
        when: When,
        given: Callable[..., Any] | str,
        calls: Iterable[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        now: datetime,
    ) -> Iterator[tuple[dict[str, Any], str, list[Any], dict[str, Any]]]:
        """Yield the draft and the arguments of each of ``calls``, checked; those without options share one draft."""
        plain = None
        for position, each in enumerate(calls):
            if not isinstance(each, Mapping):
                raise InvalidArgument(
                    f"calls[{position}] is {shown(each)}; pass mappings such as {{'args': [1]}}",
                    argument="calls",
                    value=each,
                )
            try:
                if each.keys() <= _ARGUMENTS:
                    call, draft, on_conflict = plain = plain or self._draft(when, given, options, now=now)
                else:
                    own = {name: value for name, value in each.items() if name not in _ARGUMENTS}
                    call, draft, on_conflict = self._draft(when, given, {**options, **own}, now=now)
                args, kwargs = call.arguments(each.get("args", ()), each.get("kwargs"))
            except UsageError as error:
                error.add_note(f"in calls[{position}]")
                raise
            yield draft, on_conflict, args, kwargs

    def _row(
        self, call: Call, draft: dict[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return ``draft`` with its arguments, checked."""
        args, kwargs = call.arguments(args, kwargs)
        row = draft.copy()
        if args:
            row["args"] = Encoded(payloads.encode(args, where="args", session=self._own()))
        if kwargs:
            row["kwargs"] = Encoded(payloads.encode(kwargs, where="kwargs", session=self._own()))
        return row

    def _add(self, row: dict[str, Any], on_conflict: str = "raise") -> ScheduledJob:
        self.session.flush()
        with self._connection() as connection:
            if row.get("unique_key") is not None:
                return self._put(connection, row, on_conflict)
            job = statements.add(self._own(), connection, row)
            wakeups.announce(self._own(), connection, [row], now=row["created_at"])
        if events.wanted("scheduled"):
            _tell_scheduled(job.id, row)
        return job

    def _put(self, connection: Connection, row: dict[str, Any], on_conflict: str) -> ScheduledJob:
        """Insert the job of ``row``, or do what ``on_conflict`` says if another has its key."""
        put = unique_statements.put(connection, row, replacing=on_conflict == "replace")
        if _is_refused(put, on_conflict):
            raise _taken({0: put}, [row], {0: on_conflict})
        if put.is_new or put.is_replaced:
            wakeups.announce(self._own(), connection, [row], now=row["created_at"])
        if put.is_new:
            job = statements.persistent(self._own(), row, put.known_id)
        else:
            job = unique_statements.reread(self.session, put.known_id)
            if put.is_replaced and (running := execution.running.get()):
                running.context.requeued.add(job.id)
        _tell_put(put, row)
        return job

    def _now(self) -> datetime:
        return execution.given_now() or self._clock_now()

    def _same_grace(self, job: Any, run_at: datetime) -> datetime | None:
        """Return the expiry that has the same distance from ``run_at`` as that of ``job`` from its time."""
        if job.expires_at is None:
            return None
        if not isinstance(job.expires_at, datetime) or not isinstance(job.nominal_at, datetime):  # edited by hand
            return resolve_expiry(self.expires, run_at=run_at, timezone=self.timezone)
        return run_at + (job.expires_at - job.nominal_at)

    def _clock_now(self) -> datetime:
        return utc_now() if self.clock is None else as_utc(self.clock(), timezone=self.timezone, argument="clock()")

    def _prepare(self) -> Engine | Connection:
        """Check that the Session can keep the promises, and make its SAVEPOINTs nest; return its bind."""
        try:
            bind = self.session.get_bind(ScheduledJob)
        except UnboundExecutionError as error:
            raise InvalidOption(f"the Session is bound to no database: {error}", argument="session") from error
        engine = bind if isinstance(bind, Engine) else bind.engine
        if engine is self._prepared:
            return bind
        if is_autocommit(bind):
            raise _autocommit(self.session)
        begin_before_savepoint(engine)
        self.session.info.setdefault(SCHEDULER, self)
        self._prepared = None if isinstance(self.session, scoped_session) else engine
        return bind

    def _is_bound_to(self, session: Session) -> bool:
        return self.session is session or (isinstance(self.session, scoped_session) and self._own() is session)

    def _own(self) -> Session:
        return self.session() if isinstance(self.session, scoped_session) else self.session

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """Yield the Session's connection for statements of the library."""
        try:
            connection = self.session.connection(bind_arguments={"mapper": ScheduledJob})
        except InvalidRequestError as error:
            if "closed" not in str(error):
                raise
            raise InvalidOption(
                f"the Session is closed for good ({error}); bind the Scheduler to an open one", argument="session"
            ) from error
        if cannot_roll_back(connection):
            raise _autocommit(self.session)
        with schema_errors():
            yield connection

    def _refresh(self, job_id: int) -> None:
        session = self._own()
        held = session.identity_map.get(session.identity_key(ScheduledJob, job_id))
        if held is not None:
            session.expire(held)

    def _forget(self) -> None:
        """Make the Session read again what the pass has changed behind its back."""
        session = self._own()
        for held in list(session.identity_map.values()):
            if isinstance(held, ScheduledJob | RecurringJob):
                session.expire(held)


def _limits_of(job: ScheduledJob) -> dict[str, Any]:
    names = ("concurrency_key", "concurrency_limit", "rate_limit")
    return {name: value for name in names if (value := getattr(job, name)) is not None}


def _same(value: datetime) -> datetime:
    return value


def _autocommit(session: AnySession) -> InvalidOption:
    return InvalidOption(
        "the Session's database connection is in AUTOCOMMIT mode, where nothing can be rolled back; bind the Session "
        "to an engine without it",
        argument="session",
        value=session,
    )


def _id_of(job: ScheduledJob | int) -> int:
    if isinstance(job, ScheduledJob):
        return job.id
    if isinstance(job, int) and not isinstance(job, bool):
        return job if 0 < job < 1 << 63 else 0  # which no job has, and every database can look for
    raise InvalidArgument(f"job is {shown(job)}; pass a ScheduledJob or its id", argument="job", value=job)


def _finished(statuses: Iterable[Status | str]) -> list[Status]:
    wanted = []
    for each in [statuses] if isinstance(statuses, str) else statuses:
        if each not in FINISHED:
            raise InvalidOption(
                f"statuses has {shown(each)}; use {', '.join(sorted(FINISHED))}", argument="statuses", value=each
            )
        wanted.append(Status(each))
    return wanted


def _tell_scheduled(job_id: int, row: Mapping[str, Any], event: str = "scheduled") -> None:
    names = ("callable_name", "queue", "run_at")
    events.emit(event, job_id=job_id, **{name: row[name] for name in names})


def _tell_put(put: Put, row: Mapping[str, Any]) -> None:
    if put.is_new or put.is_replaced:
        _tell_scheduled(put.known_id, row, "scheduled" if put.is_new else "replaced")


def _is_refused(put: Put, on_conflict: str) -> bool:
    """Tell whether nothing can be done with what has the key: there is no job to return, or it runs."""
    return not (put.is_new or put.is_replaced or (on_conflict == "return_existing" and put.job_id is not None))


def _taken(
    taken: Mapping[int, Put],
    rows: Sequence[Mapping[str, Any]],
    wishes: Mapping[int, str],
    new: Collection[int | None] | None = None,
) -> AlreadyScheduled:
    """Return what to raise for the rows of ``taken``; ``new`` are the jobs of other rows, if there can be any."""
    at, put = next(iter(taken.items()))
    key = rows[at]["unique_key"]
    known = {each: None if new and found.job_id in new else found.job_id for each, found in taken.items()}
    if put.job_id is None:
        problem = "has a job that was scheduled since this transaction began, which it cannot see; end it and try again"
    elif known[at] is None:
        problem = "is that of an earlier call as well; pass each key once, or another on_conflict"
    elif put.status == Status.RUNNING and wishes[at] == "replace":
        problem = (
            f"is that of job {put.job_id}, which is running and cannot be replaced; with unique_until='started' it "
            "would give the key up when it starts"
        )
    else:
        or_replace = " or 'replace'" if put.status == Status.SCHEDULED else ""
        problem = f"is that of job {put.job_id} ({put.status}); pass on_conflict='return_existing'{or_replace}"
    message = f"unique_key {shown(key)} {problem}"
    if new is not None:
        message = f"calls[{at}]: {message}" + (f" (and {len(taken) - 1} more)" if len(taken) > 1 else "")
    return AlreadyScheduled(message, unique_key=key, job_id=known[at], conflicts=known if new is not None else None)
