"""What came of it, as a table in Markdown and as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.peers.protocol import WORKS
from benchmarks.peers.systems import System

HEAD = "| | configuration | enqueue, one a transaction | enqueue in bulk | run, one process |\n|---|---|--:|--:|--:|"


@dataclass(slots=True)
class Measured:
    """The rates of one system, and why there are none."""

    system: System
    rates: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    version: str = ""

    def data(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "name": self.system.name,
            "version": self.version,
            "store": self.system.store,
            "configuration": self.system.configuration,
            "rival": self.system.rival,
            "counts": dict(self.system.counts),
            "rates": self.rates,
            "failures": self.failures,
        }


def times_as_fast(ours: Measured, theirs: Measured, work: str) -> float | None:
    """Return the median of the rounds' ratios, ours to theirs; None where either did not do it."""
    if work in ours.failures or work in theirs.failures:
        return None
    pairs = list(zip(ours.rates.get(work, ()), theirs.rates.get(work, ()), strict=False))
    return median(a / b for a, b in pairs) if pairs else None


def table(measured: Sequence[Measured]) -> str:
    """Return a line for each system: rates, and in brackets how many times as fast ours is in the same rounds."""
    rivals = {each.system.name: each for each in measured if not each.system.rival}
    lines = [HEAD]
    for each in measured:
        cells = [_cell(each, work, rivals.get(each.system.rival)) for work in WORKS]
        lines.append(f"| {each.system.name} {each.version} | {each.system.configuration} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measured: Measured, work: str, ours: Measured | None) -> str:
    if work not in measured.system.counts:
        return "none"
    if work in measured.failures:
        return f"failed: {measured.failures[work].replace('|', '/')}"
    if not measured.rates.get(work):
        return "not run"
    rate = f"{median(measured.rates[work]):,.0f}/s"
    times = None if ours is None else times_as_fast(ours, measured, work)
    return rate if times is None else f"{rate} ({times:.2g})" if times < 100 else f"{rate} ({times:.0f})"


def broken(measured: Iterable[Measured]) -> Iterator[str]:
    """Yield a sentence for each floor that is not reached, or that nothing can be said about."""
    measured = list(measured)
    rivals = {each.system.name: each for each in measured if not each.system.rival}
    for each in measured:
        for work, floor in each.system.floors.items():
            ours = rivals.get(each.system.rival)
            times = None if ours is None else times_as_fast(ours, each, work)
            if times is None:
                yield f"{each.system.name}, {work}: not measured, and ours should be {floor} times as fast"
            elif times < floor:
                yield f"{each.system.name}, {work}: ours is {times:.2f} times as fast, and should be {floor}"
