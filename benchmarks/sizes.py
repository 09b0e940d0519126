"""How much of everything is done, in a full run and in a quick one."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work a case does, and how often."""

    rounds: int = 5
    single: int = 1_000
    bulk: int = 100_000
    drain: int = 20_000
    exact: int = 2_000
    backlog: int = 10_000
    rows: int = 1_000_000  # not due, and as many finished
    worker: int = 20_000
    worker_rounds: int = 3
    many: int = 1_000_000
    tries: int = 70  # to be picked up, in each round
    idle: float = 10.0  # seconds of nothing to do


SERVER = Sizes(rounds=3, single=300, drain=4_000, exact=500)
HURRIED = Sizes(rounds=3, worker=4_000, many=100_000, tries=20, idle=3.0)
QUICK = replace(HURRIED, single=200, bulk=10_000, drain=4_000, exact=400, backlog=2_000, rows=50_000)
SERVER_QUICK = replace(HURRIED, single=100, bulk=4_000, drain=1_000, exact=200, backlog=1_000, rows=20_000)


def sizes_for(kind: str, *, quick: bool) -> Sizes:
    """Return how much work fits into a run of some minutes; a server syncs every commit."""
    if kind == "sqlite":
        return QUICK if quick else Sizes()
    return SERVER_QUICK if quick else SERVER
