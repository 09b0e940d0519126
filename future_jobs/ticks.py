"""Due times of recurring jobs -> jobs, each exactly once, whatever number of processes look.

A look reads without a lock, decides, and then writes in one short transaction: it holds the row if that still is as
it was seen, inserts the jobs, and moves ``next_run_at``. Whoever comes second finds it moved and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from sqlalchemy.engine import Connection, Row

from . import events, statements, tick_statements, unique_statements
from .dialects import Encoded, is_disconnect, is_lock_error
from .errors import DatabaseBusy, PayloadUnreadable, SchemaError, shown
from .payloads import sanitise
from .plans import ON_TIME, Plan
from .tick_statements import Span
from .times import as_utc, parse_duration, resolve, resolve_expiry
from .units import Units

__all__ = ["Tick", "decide", "job_row", "tick", "walk"]

PAGE = 200
MOST_AT_ONCE = 100
"""How many missed runs of one recurring job a look makes up for; the next look goes on. So they come spread."""

COUNTED = 10_000
"""How many missed times a look counts. A rule that fires every second is not walked through a year."""

RECENT = 20  # runs that may overlap with the next


# --- writing ------------------------------------------------------------------------------------------------------


def tick(units: Units, *, now: datetime) -> None:
    """Make jobs of what is due.

    After this every time that is due is a ``scheduled`` job, or was counted as missed or skipped, and ``next_run_at``
    is later than ``now``. Nothing is written if nothing is due. A row that cannot be understood is kept and says why;
    it does not stop the others.
    """
    last = 0
    while found := units.read(partial(tick_statements.due, now=now, after=last, limit=PAGE)):
        for each in found:
            _look(units, each.id, each.name, now)
        last = found[-1].id


def _look(units: Units, recurring_id: int, name: str, now: datetime) -> None:
    try:
        seen, spans = units.read(partial(_read, recurring_id=recurring_id))
        if seen is None or seen.next_run_at is None or seen.next_run_at > now:
            return  # removed meanwhile, or ticked by another
        plan = Plan.of(seen)
        decided = decide(plan, seen.next_run_at, now=now, fired=seen.fired, spans=spans)
        if decided is None:
            return
        rows = {at: job_row(seen, at, now=now) for at in decided.fire}
        written = units.write(partial(_write, seen=seen, decided=decided, rows=rows))
    except Exception as error:
        if isinstance(error, DatabaseBusy | SchemaError) or is_lock_error(error) or is_disconnect(error):
            raise
        _complain(units, recurring_id, name, error)
        return
    if written is not None:
        added, refused = written
        _tell(seen, replace(decided, skipped=decided.skipped + refused), added)


def _read(connection: Connection, *, recurring_id: int) -> tuple[Row[Any] | None, list[Span]]:
    seen = tick_statements.row(connection, recurring_id)
    if seen is None or seen.overlap == "allow":
        return seen, []
    return seen, tick_statements.runs(connection, recurring_id, limit=RECENT)


def _write(
    connection: Connection, *, seen: Row[Any], decided: Tick, rows: Mapping[datetime, dict[str, Any]]
) -> tuple[Mapping[int, Mapping[str, Any]], int] | None:
    """Write what was decided; return the jobs by id and how many were skipped, or None if somebody else was first."""
    if not tick_statements.hold(connection, seen):
        return None
    taken = tick_statements.taken(connection, seen.id, rows)  # by a backfill
    new = [row for at, row in rows.items() if at not in taken]
    added = unique_statements.add_free(connection, new)
    refused = len(new) - len(added)  # because another job has their unique key
    values = {
        "next_run_at": decided.next_at,
        "fired": seen.fired + len(decided.fire) - refused,
        "missed": seen.missed + decided.missed,
        "skipped": seen.skipped + decided.skipped + refused,
        "error": None,
    }
    if decided.fire:
        values["last_run_at"] = decided.fire[-1]
    tick_statements.change(connection, seen.id, values)
    return added, refused


def job_row(recurring: Any, at: datetime, *, now: datetime, expires_from: datetime | None = None) -> dict[str, Any]:
    """Return the job that a recurring job makes for ``at``; raise if it was damaged by hand.

    Its jitter moves ``run_at``, the same way for the same time. An expiry counts from there, or ``expires_from``.
    """
    columns = _columns(recurring.options)
    zone = Plan.of(recurring).rule.timezone
    run_at = at
    if recurring.jitter is not None:
        longest = resolve(parse_duration(recurring.jitter, argument="jitter"), now=at, timezone=zone) - at
        share = Random(f"{recurring.name} {at.isoformat()}").random()  # noqa: S311 (not a secret)
        run_at = at + timedelta(microseconds=int(longest / timedelta.resolution * share))
    expires_at = resolve_expiry(columns.pop("expires", None), run_at=expires_from or run_at, timezone=zone)
    return {
        **columns,
        "callable_name": recurring.callable_name,
        "args": _payload(recurring.args),
        "kwargs": _payload(recurring.kwargs),
        "content_type": recurring.content_type,
        "content_key": recurring.content_key,
        "run_at": as_utc(run_at, timezone=zone),
        "nominal_at": as_utc(at, timezone=zone),
        "expires_at": expires_at,
        "created_at": now,
        "recurring_id": recurring.id,
    }


def _columns(options: Any) -> dict[str, Any]:
    if not isinstance(options, dict) or not options.keys() <= {*statements.J.keys(), "expires"}:
        raise PayloadUnreadable(f"options is {shown(options)}; an object with columns of a job is needed")
    return dict(options)


def _payload(value: Any) -> Any:
    return Encoded(value) if isinstance(value, str) else value  # text as a look reads it, or data


def _complain(units: Units, recurring_id: int, name: str, error: Exception) -> None:
    """Keep why a recurring job cannot go on, in its row; say it once, not at every look."""
    reason = sanitise(f"{type(error).__name__}: {error}", 2000)
    if units.read(partial(tick_statements.error_of, recurring_id=recurring_id)) != reason:
        units.write(partial(tick_statements.change, recurring_id=recurring_id, values={"error": reason}))
        events.emit("tick_failed", recurring_id=recurring_id, recurring=name, error=reason)


def _tell(seen: Row[Any], decided: Tick, added: Mapping[int, Mapping[str, Any]]) -> None:
    if events.wanted("scheduled"):
        for job_id, row in added.items():
            names = ("callable_name", "queue", "run_at")
            events.emit("scheduled", job_id=job_id, **{name: row[name] for name in names})
    told = {"recurring_id": seen.id, "recurring": seen.name}
    if decided.missed or decided.skipped:
        events.emit("missed", **told, missed=decided.missed, skipped=decided.skipped)
    events.emit("ticked", **told, job_ids=list(added), next_run_at=decided.next_at)


# --- deciding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """What one look at a recurring job decided."""

    fire: tuple[datetime, ...]
    next_at: datetime | None
    missed: int = 0
    skipped: int = 0


def decide(plan: Plan, first: datetime, *, now: datetime, fired: int, spans: Sequence[Span]) -> Tick | None:
    """Decide what becomes of the times from ``first`` up to ``now``; None: they wait for the last run to end.

    ``spans`` are the latest runs. What came due while one of them waited or ran is not missed: it is skipped, or
    queued, as the plan says, whether or not somebody looked at that moment.
    """
    instants = _due(plan, first, now)
    if not instants or (plan.limit is not None and fired >= plan.limit):
        return Tick((), None)
    following = plan.after(instants[-1])
    if plan.overlap == "queue":
        decided = _queued(plan, instants, following, now, spans)
    elif plan.overlap == "skip":
        late = [at for at in instants if not _overlaps(at, spans)]
        skipped = len(instants) - len(late)
        if any(span.until is None for span in spans):
            decided = Tick((), following, len(late), skipped)
        else:
            caught = _caught_up(plan, late, following, now)
            decided = Tick(caught.fire, caught.next_at, caught.missed, skipped)
    else:
        decided = _caught_up(plan, instants, following, now)
    if decided is None or plan.limit is None or fired + len(decided.fire) < plan.limit:
        return decided
    return Tick(decided.fire[: plan.limit - fired], None, decided.missed, decided.skipped)


def _queued(
    plan: Plan, instants: list[datetime], following: datetime | None, now: datetime, spans: Sequence[Span]
) -> Tick | None:
    """One after the other: nothing while a run is not over, then the first that waited for it."""
    if any(span.until is None for span in spans):
        return None
    place = next((place for place, at in enumerate(instants) if _overlaps(at, spans)), len(instants))
    caught = _caught_up(plan, instants[:place], None, now)
    waiting = [*caught.fire, *instants[place:], *filter(None, [following])]
    fire = tuple(waiting[:1]) if waiting and waiting[0] <= now else ()
    return Tick(fire, next(iter(waiting[len(fire) :]), None), caught.missed)


def _overlaps(at: datetime, spans: Sequence[Span]) -> bool:
    return any(span.since <= at and (span.until is None or at < span.until) for span in spans)


def _caught_up(plan: Plan, late: list[datetime], following: datetime | None, now: datetime) -> Tick:
    if not late:
        return Tick((), following)
    if plan.catch_up == "all":
        kept = [at for at in late if plan.window is None or at >= now - plan.window]
        next_at = kept[MOST_AT_ONCE] if len(kept) > MOST_AT_ONCE else following
        return Tick(tuple(kept[:MOST_AT_ONCE]), next_at, len(late) - len(kept))
    if plan.catch_up == "skip" and late[-1] < now - (ON_TIME if plan.window is None else plan.window):
        return Tick((), following, len(late))
    return Tick((late[-1],), following, len(late) - 1)


def walk(plan: Plan, first: datetime | None, last: datetime) -> Iterator[datetime]:
    """Yield ``first`` and the times after it, up to ``last``."""
    while first is not None and first <= last:
        yield first
        first = plan.after(first)


def _due(plan: Plan, first: datetime, now: datetime) -> list[datetime]:
    """Return the times from ``first`` to ``now``; of very many the first `COUNTED`, and those that can still run."""
    last = now if plan.end is None else min(now, plan.end)
    counted = list(islice(walk(plan, first, last), COUNTED))
    if len(counted) < COUNTED:
        return counted
    if plan.catch_up != "all":
        return [*counted, *_newest(plan, counted[-1], last)]
    if plan.window is None or counted[-1] >= now - plan.window:
        return counted
    return [*counted, *islice(walk(plan, plan.after(now - plan.window - timedelta.resolution), last), MOST_AT_ONCE + 1)]


def _newest(plan: Plan, after: datetime, last: datetime) -> Iterator[datetime]:
    """Yield the last time in ``(after, last]``, if there is one, found from the end."""
    step = timedelta(seconds=1)
    while True:
        start = max(after, last - step)
        found = list(walk(plan, plan.after(start), last))
        if found or start == after:
            yield from found[-1:]
            return
        step *= 4
