"""``python -m benchmarks.peers``: ours and theirs at the same work, in turn; exit 1 if a floor is not reached.

``install`` makes the virtual environments first, in ``.benchmark-venvs/``. What is not installed, cannot be reached or
fails is a line of the table that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from time import perf_counter, strftime

from benchmarks.peers.protocol import WORKS
from benchmarks.peers.running import Failed, install, measure
from benchmarks.peers.systems import REQUIREMENTS, STORES, SYSTEMS, System
from benchmarks.peers.tables import Measured, broken, table

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    options = _options(arguments)
    if options.command == "install":
        return _install(options.only or REQUIREMENTS)
    began = perf_counter()
    measured = [Measured(each) for each in _chosen(options.only or REQUIREMENTS, options.store or STORES)]
    for turn in range(1 if options.quick else options.rounds):
        for work in options.work or WORKS:
            for each in measured:
                _measure(each, work, share=10 if options.quick else 1)
        _progress(f"round {turn + 1}: {perf_counter() - began:,.0f} s")
    print(table(measured))
    path = options.json or RESULTS / f"peers-{strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"quick": options.quick, "python": platform.python_version(), "cpus": os.cpu_count()}
    path.write_text(json.dumps({**data, "systems": [each.data() for each in measured]}, indent=2) + "\n")
    complaints = list(broken(measured))
    print(*("", *complaints, f"{len(complaints)} floors broken; {perf_counter() - began:,.0f} s; {path}"), sep="\n")
    return 1 if complaints else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "install"), default="run")
    parser.add_argument("--only", action="append", choices=REQUIREMENTS, help="one of these peers, beside ours")
    parser.add_argument("--store", action="append", choices=STORES, help="the peers on this one, beside ours")
    parser.add_argument("--work", action="append", choices=WORKS, help="one of these alone")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="one round of a tenth of the work: for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a new file in benchmarks/results/")
    return parser.parse_args(arguments)


def _install(adapters: Iterable[str]) -> int:
    failed = []
    for each in adapters:
        _progress(f"{each}: {', '.join(REQUIREMENTS[each])}")
        try:
            install(each)
        except (OSError, subprocess.CalledProcessError) as error:
            _progress(f"{each}: {error}")
            failed.append(each)
    return 1 if failed else 0


def _chosen(adapters: Collection[str], stores: Collection[str]) -> list[System]:
    peers = [each for each in SYSTEMS if each.adapter in adapters and each.store in stores]
    rivals = {each.rival for each in peers}
    return [each for each in SYSTEMS if each in peers or each.name in rivals]


def _measure(measured: Measured, work: str, *, share: int) -> None:
    if work not in measured.system.counts or work in measured.failures:
        return
    try:
        report = measure(measured.system, work, max(100, measured.system.counts[work] // share))
    except Failed as error:
        measured.failures[work] = str(error)
        _progress(f"{measured.system.name}, {work}: {error}")
        return
    measured.version = report.version
    measured.rates.setdefault(work, []).append(report.rate)
    _progress(f"{measured.system.name}, {work}: {report.rate:,.0f}/s")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
