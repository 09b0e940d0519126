"""What a `Scheduler` does with recurring jobs: declare, pause, resume, trigger, look ahead, make up for, remove.

Like everything a Scheduler writes it goes through the caller's Session and is committed by its owner. The jobs are
made by ``ticks.py``, in every pass of every process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

from sqlalchemy import select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from . import events, tick_statements, ticks, wakeups
from .dialects import Unreadable
from .errors import InvalidOption, InvalidTime, UnknownRecurring, shown
from .models import RecurringJob, ScheduledJob
from .options import JobOptions
from .plans import DECLARED, Plan, checked_name, duration_text, timing
from .recurrence import parse_rule
from .sessions import AnySession
from .times import Duration, When, as_utc, zone

if TYPE_CHECKING:
    from dateutil.rrule import rrule, rruleset

    from .callables import Call

__all__ = ["Schedules"]

MOST_BACKFILLED = 10_000
MOST_PREVIEWED = 10_000

_OF_ONE_RUN = {"callable_name", "args", "kwargs", "content_type", "content_key"}
_OF_ONE_RUN |= {"run_at", "nominal_at", "expires_at", "created_at"}
_WHEN = ("rule", "timezone", "anchor_at", "start_at", "end_at", "run_limit")


class Schedules:
    """The part of `Scheduler` that is about recurring jobs."""

    session: AnySession
    timezone: tzinfo | None
    expires: When | None

    if TYPE_CHECKING:

        def _prepare(self) -> Engine | Connection: ...
        def _now(self) -> datetime: ...
        def _own(self) -> Session: ...
        def _connection(self) -> AbstractContextManager[Connection]: ...
        def _draft(
            self, when: When, given: Callable[..., Any] | str, options: Mapping[str, Any], *, now: datetime
        ) -> tuple[Call, dict[str, Any], str]: ...
        def _row(
            self, call: Call, draft: dict[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
        ) -> dict[str, Any]: ...
        def _add(self, row: dict[str, Any]) -> ScheduledJob: ...

    # --- declaring

    def recurring(
        self,
        name: str,
        rule: str | Duration | rrule | rruleset,
        callable: Callable[..., Any] | str,  # noqa: A002 (the field's own word)
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timezone: tzinfo | str | None = None,
        catch_up: str = "latest",
        catch_up_window: Duration | str | None = None,
        overlap: str = "skip",
        jitter: Duration | str | None = None,
        start: datetime | str | None = None,
        end: datetime | str | None = None,
        limit: int | None = None,
        **options: Unpack[JobOptions],
    ) -> RecurringJob:
        """Declare that ``callable(*args, **kwargs)`` is called whenever ``rule`` says; return the recurring job.

        Meant to be called at every start of every process: after commit there is one row called ``name`` that says
        what was declared last. If it says so already nothing is written. A new rule moves the next time, and keeps the
        counters and the jobs that were made. ``options`` are those of the jobs.

        Raises a `UsageError` before anything is written if any part of it could not work.
        """
        self._prepare()
        now, where = self._now(), self.timezone if timezone is None else zone(timezone)
        columns = timing(
            name,
            rule,
            timezone=where,
            catch_up=catch_up,
            catch_up_window=catch_up_window,
            overlap=overlap,
            jitter=jitter,
            start=start,
            end=end,
            limit=limit,
        )
        columns |= self._what(callable, args, kwargs, options, now=now)
        self.session.flush()
        with self._connection() as connection:
            found = tick_statements.named(self.session, name)
            if found is None:
                was_first = tick_statements.add(connection, _as_new(columns, now=now))
                found = tick_statements.named(self.session, name, locked=not was_first)
                assert found is not None, f"{name!r} was removed while it was declared"
        self._update(found, columns, now=now)
        return found

    def sync_recurring(self) -> list[RecurringJob]:
        """Declare every function that was decorated with ``@recurring`` and imported; return the recurring jobs.

        One that is no longer decorated stays as it is until it is removed.
        """
        return [self.recurring(each.name, each.rule, each.function, **each.settings) for each in DECLARED.values()]

    def _what(
        self,
        given: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        options: JobOptions,
        *,
        now: datetime,
    ) -> dict[str, Any]:
        """Return the columns that say what is called, everything in them checked."""
        if isinstance(options.get("expires"), datetime):
            message = f"expires={shown(options['expires'])}: each run has its own time; pass a duration"
            raise InvalidTime(message, argument="expires", value=options["expires"])
        if "on_conflict" in options:
            message = f"on_conflict={shown(options['on_conflict'])}: a run whose unique_key is taken is always skipped"
            raise InvalidOption(message, argument="on_conflict", value=options["on_conflict"])
        call, draft, _ = self._draft(now, given, options, now=now)
        row = self._row(call, draft, args, kwargs)
        expires = {"expires": self.expires, **call.spec.options, **options}["expires"]
        kept = {
            name: value
            for name, value in row.items()
            if name not in _OF_ONE_RUN and value is not None and value is not False
        }
        return {
            **{name: row[name] for name in ("callable_name", "content_type", "content_key")},
            **{name: _data(row[name]) for name in ("args", "kwargs")},
            "options": {**kept, "expires": duration_text(expires, "expires")},
        }

    def _update(self, found: RecurringJob, columns: dict[str, Any], *, now: datetime) -> None:
        """Write what differs, and nothing if nothing does."""
        anchored = {**columns, "anchor_at": _anchor(columns, base=found.anchor_at)}
        changed = {name for name, value in anchored.items() if not _is_same(getattr(found, name), value)}
        if not changed:
            return
        for name in changed:
            setattr(found, name, anchored[name])
        if changed.intersection(_WHEN):
            found.next_run_at = _first(found, now=now)
        found.error = None
        self._touch(found, now)

    def _touch(self, found: RecurringJob, now: datetime) -> None:
        # Strictly later, so that a tick which has read the row before knows that it has changed.
        found.updated_at = max(now, found.updated_at + timedelta.resolution)
        self.session.flush()

    # --- operating

    def pause(self, name: str) -> bool:
        """Stop making jobs; True if this call did, False if it was paused already. Jobs that wait still run."""
        found, now = self._found(name), self._now()
        if found.paused_at is not None:
            return False
        found.paused_at = now
        self._touch(found, now)
        return True

    def resume(self, name: str) -> bool:
        """Make jobs again; True if this call did. What was missed follows ``catch_up``, at the next look."""
        found = self._found(name)
        if found.paused_at is None:
            return False
        found.paused_at = None
        self._touch(found, self._now())
        return True

    def trigger(self, name: str) -> ScheduledJob:
        """Schedule a run for now, beside the rhythm, paused or not; return the job."""
        found, now = self._found(name), self._now()
        at = now
        with self._connection() as connection:
            while at == found.next_run_at or tick_statements.taken(connection, found.id, [at]):
                at += timedelta.resolution  # that time is another run's
        return self._add({**ticks.job_row(found, at, now=now, expires_from=now), "run_at": now})

    def preview(self, name: str, count: int = 10) -> list[datetime]:
        """Return the next ``count`` times, aware, in the zone of the rule. Nothing is written."""
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_PREVIEWED:
            message = f"count is {shown(count)}; pass a whole number from 0 to {MOST_PREVIEWED}"
            raise InvalidOption(message, argument="count", value=count)
        found, now = self._found(name), self._now()
        plan = Plan.of(found)
        left = count if found.run_limit is None else min(count, found.run_limit - found.fired)
        first = found.next_run_at
        if first is not None and first <= now:
            first = plan.after(now)
        forever = datetime.max.replace(tzinfo=UTC)
        return [at.astimezone(plan.rule.timezone) for at in islice(ticks.walk(plan, first, forever), max(0, left))]

    def backfill(self, name: str, start: datetime | str, end: datetime | str) -> list[int]:
        """Schedule, for now, the runs of the times from ``start`` to ``end`` that have no job; return the ids in order.

        Both are included. A job's ``nominal_at`` is the time that it is for; its expiry counts from now. Times in the
        future are left to the rhythm. Whether runs overlap is not looked at, and the counters stay as they are.
        """
        found, now = self._found(name), self._now()
        since = self._moment(start, "start")
        until = min(self._moment(end, "end"), now)
        if since > until:
            message = f"start={shown(start)}: it is not before the end, or not in the past"
            raise InvalidTime(message, argument="start", value=start)
        plan = Plan.of(found)
        first = plan.after(since - timedelta.resolution)
        instants = list(islice(ticks.walk(plan, first, until), MOST_BACKFILLED + 1))
        if len(instants) > MOST_BACKFILLED:
            message = f"start={shown(start)}: more than {MOST_BACKFILLED} times; make up for less at once"
            raise InvalidOption(message, argument="start", value=start)
        rows = {at: ticks.job_row(found, at, now=now, expires_from=now) | {"run_at": at} for at in instants}
        with self._connection() as connection:
            added = tick_statements.add_jobs(connection, found.id, rows)
            if added:
                wakeups.announce(self._own(), connection, (), now=now)
        for job_id, row in added.items():
            told = {each: row[each] for each in ("callable_name", "queue", "run_at")}
            events.emit("scheduled", job_id=job_id, **told)
        return list(added)

    def remove(self, name: str) -> bool:
        """Forget a recurring job; True if there was one. The jobs that it made stay, and those that wait still run."""
        found = self._named(name)
        if found is None:
            return False
        self.session.delete(found)
        self.session.flush()
        return True

    # --- helpers

    def _found(self, name: str) -> RecurringJob:
        found = self._named(name)
        if found is not None:
            return found
        near = get_close_matches(name, self.session.scalars(select(RecurringJob.name)), 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownRecurring(f"no recurring job is called {name!r}{hint}", argument="name", value=name)

    def _named(self, name: str) -> RecurringJob | None:
        self._prepare()
        self.session.flush()
        with self._connection():
            return tick_statements.named(self.session, checked_name(name))

    def _moment(self, value: datetime | str, argument: str) -> datetime:
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                message = f"{argument}={shown(value)}: pass a date and time such as '2026-12-01T09:00'"
                raise InvalidTime(message, argument=argument, value=value) from None
        return as_utc(value, timezone=self.timezone, argument=argument)


def _as_new(columns: dict[str, Any], *, now: datetime) -> dict[str, Any]:
    fresh = {
        **columns,
        "anchor_at": _anchor(columns, base=now),
        **dict.fromkeys(("fired", "missed", "skipped"), 0),
        "created_at": now,
        "updated_at": now,
    }
    return {**fresh, "next_run_at": _first(RecurringJob(**fresh), now=now)}


def _anchor(columns: Mapping[str, Any], *, base: datetime) -> datetime:
    rule = parse_rule(columns["rule"], timezone=columns["timezone"])
    return columns["start_at"] or Plan(rule).anchor(base)


def _first(recurring: RecurringJob, *, now: datetime) -> datetime | None:
    if recurring.run_limit is not None and recurring.fired >= recurring.run_limit:
        return None
    return Plan.of(recurring).first(now=now, start=recurring.start_at)


def _data(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a number that Python does not read from text; it is kept as it is
        return Unreadable(text)


def _is_same(stored: Any, declared: Any) -> bool:
    return bool(stored == declared) or _sorted_sets(stored) == _sorted_sets(declared)


def _sorted_sets(value: Any) -> Any:
    """Return JSON data with the members of sets in order: how they are written differs between processes."""
    if isinstance(value, list):
        return [_sorted_sets(each) for each in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items()), (None, None))
    if len(value) == 1 and tag in {"!set", "!frozenset"} and isinstance(content, list):
        return {tag: sorted((_sorted_sets(each) for each in content), key=json.dumps)}
    return {name: _sorted_sets(each) for name, each in value.items()}
