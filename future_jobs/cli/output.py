"""How things get on the screen: colours, tables, progress, JSON. Nothing here knows what a job is.

A terminal gets colours and tables that fit its width, by rich if that is installed (``pip install future-jobs[cli]``).
A pipe gets plain text with nothing cut. ``NO_COLOR`` is heeded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from textwrap import wrap
from time import monotonic
from typing import IO, Any, Self, TextIO

import click

__all__ = ["Cell", "Progress", "paint", "reserved_stdout", "say", "table", "tidy", "wrapped", "write_json"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def tidy(text: str) -> str:
    r"""Return ``text`` without what could steer a terminal: ESC becomes ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_terminal(stream: IO[Any]) -> bool:
    """Tell whether somebody watches ``stream``."""
    try:
        return stream.isatty()
    except ValueError:  # it is closed
        return False


def wants_colour(stream: IO[Any]) -> bool:
    """Tell whether ``stream`` is a terminal that shows colours, and nobody minds."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, stream: IO[Any] | None = None, **style: Any) -> str:
    """Return ``text`` in a style of `click.style`, if ``stream`` (standard output) shows it."""
    return click.style(text, **style) if style and wants_colour(stream or sys.stdout) else text


def say(text: str = "", *, err: bool = False) -> None:
    """Write a line."""
    stream = sys.stderr if err else sys.stdout
    click.echo(text, err=err, color=wants_colour(stream))


def width() -> int:
    """Return the width of the terminal in columns."""
    return shutil.get_terminal_size().columns


def wrapped(text: str, columns: int) -> list[str]:
    """Return the lines of a paragraph; paths and commands are not broken."""
    return wrap(text, columns, break_on_hyphens=False, break_long_words=False) or [""]


# --- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """A text and its colour; in a terminal only."""

    text: str
    colour: str | None = None
    dim: bool = False


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write a table; a terminal's is cut to its width, the last column first."""
    if is_terminal(sys.stdout) and find_spec("rich") is not None:
        _rich_table(headers, rows)
        return
    columns = zip(headers, *([cell.text for cell in row] for row in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    if is_terminal(sys.stdout):
        widths = _fitted(widths, width())
    say(_line([Cell(header) for header in headers], widths, bold=True))
    for row in rows:
        say(_line(row, widths))


def _line(row: Sequence[Cell], widths: Sequence[int], **style: Any) -> str:
    words = []
    for cell, size in zip(row, widths, strict=True):
        text = cell.text if len(cell.text) <= size else cell.text[: size - 1] + "…"
        look = {key: value for key, value in {"fg": cell.colour, "dim": cell.dim, **style}.items() if value}
        words.append(paint(text.ljust(size), **look))
    return "  ".join(words).rstrip()


def _rich_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    from rich.cells import cell_len  # noqa: PLC0415 (the extra "cli")
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(file=sys.stdout, highlight=False)
    columns = zip(headers, *([cell.text for cell in row] for row in rows), strict=True)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    sizes = _fitted([max(map(cell_len, column)) for column in columns], console.width)
    for header, size in zip(headers, sizes, strict=True):
        made.add_column(header, no_wrap=True, overflow="ellipsis", width=size)
    for row in rows:
        made.add_row(*(Text(cell.text, style=_rich_style(cell)) for cell in row))
    console.print(made)


def _fitted(widths: Sequence[int], room: int) -> list[int]:
    """Return the widths of columns that fit into ``room``: the last two are cut, the last to no less than a third."""
    *fixed, call, note = widths
    left = max(2, room - sum(fixed) - 2 * (len(widths) - 1))
    call = min(call, max(left - note, left * 2 // 3))
    return [*fixed, max(1, call), max(1, min(note, left - call))]


def _rich_style(cell: Cell) -> str:
    return " ".join(filter(None, [cell.colour, "dim" if cell.dim else None]))


# --- progress -----------------------------------------------------------------------------------------------------


class Progress:
    """A line on stderr that says how far something has come; nothing for what takes no time, or if nobody watches."""

    def __init__(self, label: str, length: Callable[[], int], *, wanted: bool = True) -> None:
        self.label = label
        self.wanted = wanted and is_terminal(sys.stderr)
        self.length = length() if self.wanted else 0
        self.done = 0
        self.began = monotonic()
        self.shown_at = self.began + 0.4

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more."""
        self.done += steps
        now = monotonic()
        if not self.wanted or now - self.shown_at < 0.1:  # noqa: PLR2004
            return
        self.shown_at = now
        part = min(1.0, self.done / self.length) if self.length else 0.0
        bar = ("#" * round(30 * part)).ljust(30, ".")
        self._write(f"{self.label} [{bar}] {self.done:,} of {max(self.length, self.done):,}, {now - self.began:.0f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text[: width() - 1]}\x1b[K")
        sys.stderr.flush()


# --- JSON ---------------------------------------------------------------------------------------------------------


def write_json(value: object, out: IO[str]) -> None:
    """Write ``value`` as indented JSON, in ASCII."""
    out.write(json.dumps(value, indent=2) + "\n")
    out.flush()


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Yield the real standard output; what anybody else prints, child processes too, goes to stderr meanwhile."""
    real = sys.stdout
    try:
        shared = real.fileno() == 1
    except (OSError, ValueError, AttributeError):
        shared = False
    if not shared:
        with redirect_stdout(sys.stderr):
            yield real
        return
    real.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        with suppress(OSError):
            real.flush()
        os.dup2(kept, 1)
        os.close(kept)
