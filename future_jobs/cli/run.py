"""``future-jobs run``: one pass over what is due, told as it happens."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import click

from .app import database, scheduler_of
from .base import Command, Exit, Given, given_of
from .output import Progress, is_terminal, paint, say, tidy
from .words import COLOURS, distance, moment, span

if TYPE_CHECKING:
    from future_jobs import RunReport, ScheduledJob, Scheduler

__all__ = ["run"]

ENDS = {  # event -> what the report calls it
    "completed": "complete",
    "failed": "failed",
    "retried": "retried",
    "snoozed": "snoozed",
    "expired": "expired",
    "cancelled": "cancelled",
    "lost": "lost",
}
NOTICES = {
    "rescued": "job {job_id} was taken back from {worker}, which is gone",
    "result_not_kept": "job {job_id} is complete, but {reason}",
    "not_recorded": "the details of the failure of job {job_id} could not be recorded: {error}",
    "missed": "recurring job {recurring!r}: {missed} times missed, {skipped} skipped",
    "tick_failed": "recurring job {recurring!r} cannot go on: {error}",
}
LOOKS = {**COLOURS, "retried": "yellow", "snoozed": "cyan", "lost": "red"}


@click.command(
    cls=Command,
    section="Run",
    epilog="""\b
Examples:
  future-jobs run
  future-jobs run --queue mail --queue default --limit 100
  future-jobs run --now 3d                what the next three days bring, now
  * * * * *  cd /srv/shop && future-jobs run --ignore-errors --quiet""",
)
@click.option("-d", "--delete-completed", is_flag=True, help="Delete the jobs that complete.")
@click.option("-i", "--ignore-errors", is_flag=True, help="Go on after a job that fails.")
@click.option("--now", metavar="WHEN", help="Run as if it were then: a time, or a duration from now.")
@click.option("--limit", type=click.IntRange(0), metavar="N", help="Run at most N jobs.")
@click.option("--queue", "queues", multiple=True, metavar="NAME", help="Only this queue; may be repeated.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing unless something goes wrong.")
@click.pass_context
def run(
    ctx: click.Context,
    *,
    delete_completed: bool,
    ignore_errors: bool,
    now: str | None,
    limit: int | None,
    queues: tuple[str, ...],
    quiet: bool,
) -> None:
    """Run everything that is due, once.

    Meant for cron: any number of these may run at the same time, on any number of hosts. The first job that fails ends
    it, after its failure is recorded; what was not started yet waits for the next run. With --ignore-errors all are
    run. Either way the exit code is 1 if a job failed.
    """
    given = given_of(ctx)
    with scheduler_of(given) as scheduler:
        pretended = _instant(scheduler, now)
        shown = not quiet and not given.json
        began = monotonic()
        with (
            Progress("Running", lambda: _due(scheduler, pretended, queues), wanted=not shown) as progress,
            _Watch(scheduler, progress.advance, shown=shown, told=not given.json) as watch,
        ):
            report = watch.follow(
                lambda: scheduler.run_due(
                    pretended,
                    ignore_errors=ignore_errors,
                    delete_completed=delete_completed,
                    queues=queues or None,
                    limit=limit,
                )
            )
        seconds = timedelta(seconds=monotonic() - began)
        if given.json:
            given.write(watch.as_dict(report))
        elif watch.counts or not quiet:
            _write_end(given, scheduler, watch, seconds, shown=shown, queues=queues)
    if watch.counts["failed"]:
        ctx.exit(Exit.JOB)


def _instant(scheduler: Scheduler, now: str | None) -> datetime | None:
    from future_jobs.times import resolve, utc_now  # noqa: PLC0415 (slow to import; so are those below)

    return None if now is None else resolve(now, now=utc_now(), timezone=scheduler.timezone, argument="--now")


def _due(scheduler: Scheduler, now: datetime | None, queues: Sequence[str]) -> int:
    from sqlalchemy import func, select  # noqa: PLC0415

    from future_jobs import ScheduledJob, Status  # noqa: PLC0415
    from future_jobs.times import utc_now  # noqa: PLC0415

    due = select(func.count(ScheduledJob.id)).where(
        ScheduledJob.status == Status.SCHEDULED, ScheduledJob.run_at <= (now or utc_now())
    )
    count = scheduler.session.scalar(due.where(ScheduledJob.queue.in_(queues)) if queues else due) or 0
    scheduler.session.rollback()
    return count


class _Watch:
    """Listens to a pass: counts what happens, and says it."""

    def __init__(self, scheduler: Scheduler, advance: Callable[[int], None], *, shown: bool, told: bool) -> None:
        self.scheduler = scheduler
        self.advance = advance
        self.shown = shown  # every job
        self.told = told  # what goes wrong
        self.counts: Counter[str] = Counter()
        self.planned = 0
        self.ids: list[int] = []
        self.failures: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self._heard: list[tuple[str, Callable[..., None]]] = []

    def __enter__(self) -> Self:
        from future_jobs import events  # noqa: PLC0415

        self._heard = [(event, self._hears(word)) for event, word in ENDS.items()]
        self._heard += [(event, self._notices(words)) for event, words in NOTICES.items()]
        self._heard += [("scheduled", self._hear_planned), ("ticked", self._hear_ticked)]
        for event, listener in self._heard:
            events.listen(event, listener)
        return self

    def __exit__(self, *_: object) -> None:
        from future_jobs import events  # noqa: PLC0415

        for event, listener in self._heard:
            events.unlisten(event, listener)

    def follow(self, run_due: Callable[[], RunReport]) -> RunReport | None:
        """Run the pass; None if a job's error ended it, which is then kept."""
        try:
            return run_due()
        except Exception as error:
            if not self._is_of_a_job(error):
                raise
            self.error = error
            return None

    def _is_of_a_job(self, error: Exception) -> bool:
        from future_jobs import JobAborted  # noqa: PLC0415

        if not self.failures:
            return False
        return isinstance(error, JobAborted) or self.failures[-1]["error_type"].endswith(type(error).__qualname__)

    def as_dict(self, report: RunReport | None) -> dict[str, Any]:
        """Return what happened, as JSON has it."""
        counts = {word: self.counts[word] for word in ENDS.values()}
        ids = self.ids if report is None else report.job_ids
        return {**counts, "scheduled": self.planned, "job_ids": ids, "failures": self.failures}

    def _hears(self, word: str) -> Callable[..., None]:
        def hear(**data: Any) -> None:
            self._hear(word, data)

        return hear

    def _notices(self, words: str) -> Callable[..., None]:
        def notice(**data: Any) -> None:
            say(f"{paint('Note:', sys.stderr, fg='yellow')} {_one_line(words.format(**data))}", err=True)

        return notice

    def _hear_planned(self, **_: Any) -> None:
        self.planned += 1

    def _hear_ticked(self, job_ids: Sequence[int], **_: Any) -> None:
        self.planned -= len(job_ids)  # made by a rule, not by a job

    def _hear(self, word: str, data: dict[str, Any]) -> None:
        self.counts[word] += 1
        self.advance(1)
        if "attempt" in data:
            self.ids.append(data["job_id"])
        if word == "failed":
            known = {"id": data["job_id"], "callable_name": data["callable_name"], "attempt": data["attempt"]}
            self.failures.append({**known, "error_type": data["error_type"], "error": data["error"]})
        if self.shown or (self.told and word in {"failed", "lost"}):
            self._say(word, data)

    def _say(self, word: str, data: dict[str, Any]) -> None:
        name = tidy(data.get("callable_name", ""))
        words = [paint(word.ljust(9), fg=LOOKS.get(word)), f"{data['job_id']:>5}", f" {name}" if name else ""]
        say("  ".join([*words, paint(self._details(word, data), dim=True)]).rstrip())

    def _details(self, word: str, data: dict[str, Any]) -> str:
        if word == "expired":
            return f"no use after {moment(data['expires_at'], self.scheduler.timezone)}"
        if word == "cancelled":
            return _one_line(data["reason"])
        if word == "lost":
            return "it took longer than its lease, and was given to another"
        took = span(timedelta(seconds=data.get("seconds", 0)))
        if word == "snoozed":
            return f"until {moment(data['run_at'], self.scheduler.timezone)}"
        error = _one_line(f"{data.get('error_type', '')}: {data.get('error', '')}").strip(": ")
        if word == "retried":
            return f"{error}; again at {moment(data['run_at'], self.scheduler.timezone)}"
        return error or took


def _one_line(text: str) -> str:
    line = " ".join(tidy(text).split())
    return line if len(line) <= 200 else line[:199] + "…"  # noqa: PLR2004


# --- the end ------------------------------------------------------------------------------------------------------


def _write_end(
    given: Given, scheduler: Scheduler, watch: _Watch, seconds: timedelta, *, shown: bool, queues: Sequence[str]
) -> None:
    if watch.error is not None:
        _write_failure(given, scheduler, watch)
    if not shown:
        return
    if watch.counts:
        total = sum(watch.counts.values())
        ended = ", ".join(f"{count:,} {word}" for word, count in watch.counts.items())
        say(f"{total:,} {'job' if total == 1 else 'jobs'} in {span(seconds)}: {ended}.{_more(watch)}")
    else:
        say("Nothing is due.")
    if is_terminal(sys.stdout) and watch.error is None and (next_at := _next(scheduler, queues)) is not None:
        from future_jobs.times import utc_now  # noqa: PLC0415

        say(f"The next is due {distance(next_at, utc_now())}, at {moment(next_at, scheduler.timezone)}.")


def _more(watch: _Watch) -> str:
    return f" They scheduled {watch.planned:,} more." if watch.planned else ""


def _write_failure(given: Given, scheduler: Scheduler, watch: _Watch) -> None:
    from future_jobs import ScheduledJob  # noqa: PLC0415

    failure = watch.failures[-1]
    job: ScheduledJob | None = scheduler.session.get(ScheduledJob, failure["id"])
    say(err=True)
    headline = f"Job {failure['id']} failed: {tidy(failure['callable_name'])}"
    say(paint(headline, sys.stderr, fg="red", bold=True), err=True)
    text = job.error if job is not None and job.error else f"{failure['error_type']}: {failure['error']}"
    for line in text.rstrip().splitlines():
        say(f"  {tidy(line)}", err=True)
    say("It is recorded; what was not started waits for the next run.", err=True)
    for command, meaning in (
        (f"show {failure['id']}", "what is known about it"),
        (f"retry {failure['id']}", "let it run again"),
        ("run --ignore-errors", "go on with the others"),
    ):
        say(f"  {given.command} {command.ljust(20)} {paint(meaning, sys.stderr, dim=True)}", err=True)
    say(err=True)


def _next(scheduler: Scheduler, queues: Sequence[str]) -> datetime | None:
    """Return when the next job is due, without reading the jobs."""
    from future_jobs.statements import levels  # noqa: PLC0415
    from future_jobs.tick_statements import next_tick  # noqa: PLC0415
    from future_jobs.units import Units  # noqa: PLC0415

    units = Units(database(scheduler))
    waiting = [level.first_at for level in units.read(levels) if not queues or level.queue in queues]
    return min(filter(None, [*waiting, units.read(next_tick)]), default=None)
