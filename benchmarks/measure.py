"""Rounds, medians and the table. A rate is work per second; only ratios of rates in one round are compared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

Work = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    name: str
    database: str
    what: str  # "ours / raw", say
    ratio: float
    lowest: float
    highest: float
    floor: float | None = None
    ceiling: float | None = None
    ours: str = ""
    other: str = ""
    binding: bool = True  # False: the bound is a goal, shown and not enforced

    @property
    def is_met(self) -> bool:
        """Whether the ratio keeps its bound, if it has one."""
        return (self.floor is None or self.ratio >= self.floor) and (self.ceiling is None or self.ratio <= self.ceiling)

    @property
    def bound(self) -> str:
        """The bound as text."""
        if self.floor is not None:
            return f">= {self.floor:.2f}"
        return "" if self.ceiling is None else f"<= {self.ceiling:.2f}"

    @property
    def verdict(self) -> str:
        """Whether the bound is kept, as one word; in brackets where it is only a goal."""
        if not self.bound:
            return ""
        word = "pass" if self.is_met else "FAIL" if self.binding else "below"
        return word if self.binding else f"({word})"

    def data(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {**asdict(self), "is_met": self.is_met}


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since, or after the block the seconds in it."""
    gc.collect()
    began = perf_counter()
    ended: list[float] = []
    yield lambda: (ended[0] if ended else perf_counter()) - began
    ended.append(perf_counter())


def rate(count: int, work: Callable[[], object]) -> float:
    """Return how many times a second ``work``, which does something ``count`` times, does it."""
    with timed() as seconds:
        work()
    return count / seconds()


def interleaved(rounds: int, *works: Work) -> tuple[list[float], ...]:
    """Measure them in turn; the first round of each warms caches and is not counted."""
    turns = [[work() for work in works] for _ in range(rounds + 1)]
    return tuple(list(rates) for rates in zip(*turns[1:], strict=True))


def compared(
    name: str,
    database: str,
    rates: Sequence[Sequence[float]],
    *,
    what: str = "ours / raw",
    unit: str = "/s",
    floor: float | None = None,
    ceiling: float | None = None,
    binding: bool = True,
) -> Result:
    """Return the median of the rounds' ratios, of the second to the first."""
    others, own = rates
    ratios = [b / a for a, b in zip(others, own, strict=True)]
    return Result(
        name=name,
        database=database,
        what=what,
        ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        floor=floor,
        ceiling=ceiling,
        ours=f"{median(own):,.0f}{unit}",
        other=f"{median(others):,.0f}{unit}",
        binding=binding,
    )


HEAD = ("benchmark", "database", "what", "ratio", "lowest..highest", "bound", "", "ours", "other")


def table(results: Iterable[Result]) -> str:
    """Return the results as aligned text."""
    lines = [HEAD, *(_cells(each) for each in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(result: Result) -> tuple[str, ...]:
    spread = f"{result.lowest:.2f}..{result.highest:.2f}"
    return (
        result.name,
        result.database,
        result.what,
        f"{result.ratio:.2f}",
        spread,
        result.bound,
        result.verdict,
        result.ours,
        result.other,
    )
