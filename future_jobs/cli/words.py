"""Jobs in words: when, what, how it went, and why. Pure, but for `as_dict`, which reads the attributes of a row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any

from future_jobs.status import Status

if TYPE_CHECKING:
    from future_jobs import JobFailure, RecurringJob, ScheduledJob

__all__ = [
    "COLOURS",
    "about",
    "as_dict",
    "both_moments",
    "brief_call",
    "call",
    "distance",
    "last_line",
    "moment",
    "note",
    "progress_words",
    "remedy",
    "short_moment",
    "span",
    "times",
    "value_words",
    "why",
]

COLOURS: dict[str, str] = {
    Status.SCHEDULED: "cyan",
    Status.RUNNING: "yellow",
    Status.COMPLETE: "green",
    Status.FAILED: "red",
    Status.EXPIRED: "magenta",
    Status.CANCELLED: "bright_black",
}
HIDDEN = frozenset({"unique_slot", "limited", "limited_by"})  # of use to statements only


# --- time ---------------------------------------------------------------------------------------------------------


def moment(at: datetime, zone: tzinfo | None, *, seconds: bool = True) -> str:
    """Return ``at`` in local time, with the zone: ``2026-12-01 09:00:00 CET``."""
    return at.astimezone(zone).strftime(f"%Y-%m-%d %H:%M{':%S' if seconds else ''} %Z").rstrip()


def both_moments(at: datetime, zone: tzinfo | None) -> str:
    """Return ``at`` in local time and, where that differs, in UTC."""
    local, utc = moment(at, zone), moment(at, UTC)
    return local if local == utc else f"{local}   {utc}"


def short_moment(at: datetime, zone: tzinfo | None, now: datetime) -> str:
    """Return ``at`` in local time as briefly as a table wants it: without the year where that is the present one."""
    local = at.astimezone(zone)
    return local.strftime("%d %b %H:%M" if local.year == now.astimezone(zone).year else "%Y-%m-%d %H:%M")


_UNITS = (("years", 365 * 86400), ("months", 30 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60))


def span(length: timedelta) -> str:
    """Return how long something takes, to about two digits: ``3 ms``, ``1.5 s``, ``4 minutes``, ``36 hours``."""
    seconds = abs(length.total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s".replace(".0 ", " ")
    seconds = round(seconds)
    for unit, size in _UNITS:
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{seconds} s"


def distance(at: datetime, now: datetime) -> str:
    """Return how far ``at`` is from ``now``: ``in 3 days``, ``2 hours ago``."""
    if abs(at - now) < timedelta(seconds=1):
        return "now"
    return f"in {span(at - now)}" if at > now else f"{span(now - at)} ago"


# --- the call -----------------------------------------------------------------------------------------------------


def call(job: ScheduledJob | RecurringJob, *, limit: int = 2000) -> str:
    """Return the call as Python would write it: ``shop.mail.welcome(11, k=12)``, arguments as stored."""
    args = job.args if isinstance(job.args, list) else [job.args]
    kwargs = job.kwargs if isinstance(job.kwargs, dict) else {"**": job.kwargs}
    words = [value_words(each) for each in args]
    words += [f"{name}={value_words(each)}" for name, each in kwargs.items()]
    text = ", ".join(words)
    return f"{job.callable_name}({text if len(text) <= limit else text[: limit - 1] + '…'})"


def brief_call(job: ScheduledJob | RecurringJob) -> str:
    """Return the call as a table wants it: what it is about in its place, ``Order(7).send_invoice()``."""
    text = call(job, limit=20)
    if job.content_type is None:
        return text
    owner = job.content_type.rpartition(":")[2]
    path, _, rest = text.partition("(")
    return f"{owner}({str(job.content_key).strip('[]')}).{path.rpartition('.')[2]}({rest}"


def about(job: ScheduledJob) -> str | None:
    """Return the object that a job is bound to: ``shop.models.Order 7``."""
    if job.content_type is None:
        return None
    return f"{job.content_type.replace(':', '.')} {str(job.content_key).strip('[]')}"


def value_words(value: Any) -> str:
    """Return a stored value as Python would write it, more or less; what was tagged is named."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("!"):
        tag, content = next(iter(value.items()))
        if tag == "!object" and isinstance(content, list) and len(content) == 2:  # noqa: PLR2004
            name, key = str(content[0]).rpartition(":")[2], content[1]
            return f"{name}({', '.join(map(value_words, key)) if isinstance(key, list) else value_words(key)})"
        return f"{tag[1:]}({value_words(content)})"
    if isinstance(value, list):
        return f"[{', '.join(map(value_words, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {value_words(each)}' for name, each in value.items())}}}"
    return repr(value)


def progress_words(progress: Any) -> str:
    """Return how far a job is: ``40 %, page 12``."""
    if not hasattr(progress, "fraction"):  # a row edited by hand
        return value_words(progress)
    return ", ".join(filter(None, [f"{progress.fraction * 100:.0f} %", progress.message]))


def last_line(error: str | None) -> str:
    """Return what was raised, from a traceback's end."""
    lines = [line for line in (error or "").splitlines() if line.strip()]
    plain = [line for line in lines if not line.startswith((" ", "\t"))]
    return (plain or lines or ["no error was recorded"])[-1].strip()


# --- the state ----------------------------------------------------------------------------------------------------


def note(job: ScheduledJob, now: datetime) -> str:  # noqa: PLR0911 (one a state)
    """Return what matters most about a job, in a few words."""
    match job.status:
        case Status.SCHEDULED:
            return _waiting_note(job, now)
        case Status.RUNNING:
            asked = "asked to stop, " if job.cancel_requested_at else ""
            done = "" if job.latest_progress is None else f"{progress_words(job.latest_progress)}, "
            return f"{asked}{done}attempt {job.attempt} by {job.leased_by or 'nobody'}"
        case Status.COMPLETE if job.finished_at and job.started_at:
            returned = "" if job.return_value is None else f" → {value_words(job.return_value)}"
            took = job.finished_at - job.started_at
            return f"{distance(job.finished_at, now)}{f', took {span(took)}' if took else ''}{returned}"
        case Status.FAILED:
            return last_line(job.error)
        case Status.EXPIRED if job.expires_at:
            return f"of no use since {span(now - job.expires_at)}"
        case Status.CANCELLED if job.finished_at:
            return last_line(job.error) if job.error else distance(job.finished_at, now)
    return ""


def _waiting_note(job: ScheduledJob, now: datetime) -> str:
    if job.expires_at is not None and job.expires_at < now:
        return f"late: no use since {span(now - job.expires_at)}"
    when = distance(job.run_at, now) if job.run_at > now else f"due {distance(job.run_at, now)}"
    if job.failures:
        return f"{when}, try {job.failures + 1} of {job.max_attempts}: {last_line(job.error)}"
    return when


def why(job: ScheduledJob, failures: Sequence[JobFailure], now: datetime, *, waits: str) -> str:  # noqa: PLR0911 (one a state)
    """Return in sentences why a job is in the state it is in; ``waits`` is why it does not run though it is due."""
    status: str = job.status
    match status:
        case Status.SCHEDULED:
            return _why_waiting(job, now, waits)
        case Status.RUNNING:
            return _why_running(job, now)
        case Status.COMPLETE:
            return _why_complete(job, failures)
        case Status.FAILED:
            which = f", at the last of {job.failures} attempts" if job.failures > 1 else ""
            if job.failures == 0 and job.losses:
                return f"Its worker vanished {job.losses} times, and so it was given up."
            missing = "" if failures else " (No failure is recorded.)"
            return f"It failed {_ago(job.finished_at, now)}{which}: {last_line(job.error)}{missing}"
        case Status.EXPIRED:
            return (
                f"It was due {distance(job.run_at, now)}, and of no use after {_at(job.expires_at, now)}. By then "
                f"nothing had run it, which was noticed {_ago(job.finished_at, now)}."
            )
        case Status.CANCELLED:
            reason = f": {last_line(job.error)}" if job.error else ""
            return f"It was cancelled {_ago(job.finished_at, now)}{reason}."
    return f"Its status {status!r} is unknown to this version: the row was edited by hand, or by a later one."


def _ago(at: datetime | None, now: datetime) -> str:
    return "at an unknown time" if at is None else distance(at, now)


def _at(at: datetime | None, now: datetime) -> str:
    return "any time" if at is None else f"{at:%Y-%m-%d %H:%M} UTC, {distance(at, now)}"


def _why_waiting(job: ScheduledJob, now: datetime, waits: str) -> str:
    past = ""
    if job.failures:
        past = f"{job.failures} of {job.max_attempts} attempts failed, the last with {last_line(job.error)}. "
    if job.losses:
        past += f"Its worker vanished {times(job.losses)}. "
    if job.snoozes:
        past += f"It asked to run later {times(job.snoozes)}. "
    if job.expires_at is not None and job.expires_at < now:
        late = span(now - job.expires_at)
        return f"{past}Nothing has run it in time: it is of no use since {late}, and expires at the next run."
    if job.run_at > now:
        return f"{past}It waits until it is due, {distance(job.run_at, now)}."
    return f"{past}{waits}"


def times(count: int) -> str:
    """Return how often something happened."""
    return "once" if count == 1 else f"{count} times"


def _why_running(job: ScheduledJob, now: datetime) -> str:
    since = "" if job.started_at is None else f" since {span(now - job.started_at)}"
    asked = f" It was asked to stop {distance(job.cancel_requested_at, now)}." if job.cancel_requested_at else ""
    if job.leased_until is None or job.leased_until < now:
        ended = "" if job.leased_until is None else f", {span(now - job.leased_until)} ago"
        lease = f"The lease has ended{ended}: the worker is probably gone, and another will take the job over."
    else:
        lease = f"The lease lasts {span(job.leased_until - now)} more, and is renewed while the worker lives."
    return f"Attempt {job.attempt} runs{since}, by {job.leased_by or 'nobody'}. {lease}{asked}"


def _why_complete(job: ScheduledJob, failures: Sequence[JobFailure]) -> str:
    if job.started_at is None or job.finished_at is None:
        return "It is done."
    late = job.started_at - job.run_at
    when = f"{span(late)} after it was due" if late >= timedelta(seconds=1) else "when it was due"
    took = job.finished_at - job.started_at
    past = f" Before that it had failed {times(len(failures))}." if failures else ""
    return f"It ran {when}{f', and took {span(took)}' if took else ''}.{past}"


def remedy(job: ScheduledJob) -> tuple[str, str] | None:
    """Return the command that helps a job on, and what it does; None if there is nothing to do."""
    match job.status:
        case Status.FAILED | Status.EXPIRED | Status.CANCELLED:
            return f"retry {job.id}", "let it run again"
        case Status.SCHEDULED:
            return f"cancel {job.id}", "do not run it"
        case Status.RUNNING if job.cancel_requested_at is None:
            return f"cancel {job.id}", "ask it to stop"
    return None


# --- data ---------------------------------------------------------------------------------------------------------


def as_dict(row: ScheduledJob | JobFailure | RecurringJob) -> dict[str, Any]:
    """Return the columns of a row as JSON has them: instants in ISO 8601 in UTC, payloads as stored."""
    names = {column.name: row.__mapper__.get_property_by_column(column).key for column in row.__table__.columns}
    return {name: _plain(getattr(row, key)) for name, key in names.items() if name not in HIDDEN}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, Status):
        return value.value
    if hasattr(value, "fraction"):  # `Progress`
        return {"fraction": value.fraction, "message": value.message, "at": _plain(value.at)}
    if hasattr(value, "text") and not isinstance(value, str):  # `Unreadable`: the JSON in the row is damaged
        return {"unreadable": value.text}
    return value
