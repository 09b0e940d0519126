"""The demo on the screen: a timeline, and where to look further."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING

from future_jobs.status import Status

from .output import is_terminal, paint, say, width, wrapped
from .words import COLOURS

if TYPE_CHECKING:
    from pathlib import Path

    from future_jobs.demo import Line, Summary

__all__ = ["Narrator"]

PAUSE = 0.07  # seconds a line, for whoever reads along
LOOKS = {**COLOURS, Status.CANCELLED: "blue", "retried": "yellow", "refused": "red"}
INDENT = 27


class Narrator:
    """Writes a line for each thing that happens."""

    def __init__(self, program: str, path: Path, *, shown: bool, paused: bool) -> None:
        self.program = program
        self.path = path
        self.shown = shown
        self.paused = shown and paused and is_terminal(sys.stdout)
        self._day = -1

    def __call__(self, line: Line) -> None:
        """Write a line of the timeline."""
        if not self.shown:
            return
        if self._day < 0:
            say(f"{paint('Thirty days of a small shop', bold=True)}, in {self.path}\n")
        day = f"day {line.day:>2}  {line.at.astimezone():%d %b}" if line.day != self._day else ""
        self._day = line.day
        first, *rest = wrapped(line.text, max(30, min(width(), 110) - INDENT))
        mark = paint(line.mark.ljust(10), fg=LOOKS.get(line.mark), dim=line.mark not in LOOKS or None)
        say(f"{paint(day.ljust(15), dim=True)}{mark} {first}")
        for each in rest:
            say(" " * (INDENT - 1) + each)
        if self.paused:
            time.sleep(PAUSE)

    def end(self, summary: Summary, seconds: float) -> None:
        """Write what is there now, and the commands that show it."""
        if not self.shown:
            return
        counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.jobs.items()))
        say()
        say(
            f"{paint('Now', bold=True)}: {sum(summary.jobs.values())} jobs ({counts}), {summary.letters} letters; "
            f"{summary.passes} passes, {seconds:.1f} s."
        )
        say(f"The backup is {summary.backup}")
        say()
        say(paint("Look further", bold=True))
        there = f"{self.program} --url {shlex.quote(summary.url)}"
        for command, meaning in (
            ("list", "every job, the newest first"),
            (f"show {summary.failed_once}", "the one that failed, and was retried by hand"),
            (f"show {summary.expired}", "the one that came too late"),
            (f"retry {summary.expired}", "let it run after all"),
            ("run --now 10d", "the next ten days, now"),
            ("list --status complete --json", "for other programs"),
        ):
            say(paint(f"  # {meaning}", dim=True))
            say(f"  {there} {command}")
