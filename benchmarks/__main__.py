"""``python -m benchmarks``: run the cases, print the table, write it as JSON; exit 1 if a bound is broken."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, strftime

import sqlalchemy

from benchmarks.cases import CASES, ONCE
from benchmarks.databases import KINDS, answers
from benchmarks.measure import Result, table
from benchmarks.sizes import sizes_for

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return 1 if a binding bound is broken."""
    options = _options(arguments)
    kinds = [kind for kind in options.database or KINDS if _is_there(kind)]
    began = perf_counter()
    results: list[Result] = []
    for name in options.only or CASES:
        for kind in kinds if name not in ONCE else [ONCE[name]]:
            for result in CASES[name](kind, sizes_for(kind, quick=options.quick)):
                _progress(f"{result.name} [{result.database}]: {result.ratio:.2f} {result.verdict}")
                results.append(result)
    print(table(results))
    path = _write(results, options.json, quick=options.quick)
    broken = [each for each in results if each.binding and not each.is_met]
    print(f"\n{len(broken)} of {len(results)} outside their bound; {perf_counter() - began:,.0f} s; {path}")
    return 1 if broken else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=sys.modules[__name__].__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for a look, not for a claim")
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--database", action="append", choices=KINDS, help="one of them; default: all that answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a new file in benchmarks/results/")
    return parser.parse_args(arguments)


def _is_there(kind: str) -> bool:
    if answers(kind):
        return True
    _progress(f"{kind} does not answer and is left out")
    return False


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(results: Sequence[Result], path: Path | None, *, quick: bool) -> Path:
    path = path or RESULTS / f"{strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "sqlalchemy": sqlalchemy.__version__,
        "sqlite": sqlite3.sqlite_version,
        "cpus": os.cpu_count(),
    }
    data = {"quick": quick, "versions": versions, "results": [each.data() for each in results]}
    path.write_text(json.dumps(data, indent=2) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
