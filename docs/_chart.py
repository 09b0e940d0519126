"""Draw the state chart of ``lifecycle.md`` from the table of transitions: ``python docs/_chart.py`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from future_jobs.status import ALLOWED, FINISHED, Status

PAGE = Path(__file__).with_name("lifecycle.md")
PLACE = re.compile(r"(<!-- chart -->\n).*?(<!-- end of chart -->)", re.DOTALL)


def chart() -> str:
    """Return the chart as a Mermaid block: every move of the table, and where a job begins and rests."""
    lines = [f"[*] --> {Status.SCHEDULED}: schedule"]
    for source, moves in ALLOWED.items():
        lines += [f"{source} --> {target}: {verb}" for target, verb in moves.items()]
    lines += [f"{status} --> [*]" for status in Status if status in FINISHED]
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {line}" for line in lines), "```", ""])


def drawn(page: str) -> str:
    """Return the text of a page with the chart in its place."""
    return PLACE.sub(rf"\1{chart()}\2", page)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text("utf-8")), "utf-8")
