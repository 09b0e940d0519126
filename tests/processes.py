"""Several real processes doing the same thing at the same time.

Run as ``python -m tests.processes URL ACTION [ARGUMENT ...]``: prints ``ready``, waits for a line on its standard
input, acts, and prints a result as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from future_jobs import Scheduler, current_job, notify_workers

ROOT = Path(__file__).parent.parent
LEDGER = "FUTURE_JOBS_TEST_LEDGER"


def start(url: str, action: str, *arguments: str, ledger: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), LEDGER: str(ledger or "")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.processes", url, action, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    line = process.stdout.readline()
    if line != "ready\n":
        raise RuntimeError(line + process.communicate()[1])
    return process


def together(processes: list[subprocess.Popen[str]]) -> list:
    """Let the processes go at once; return their results."""
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        if process.returncode:
            raise RuntimeError(err)
        assert "locked" not in err, err
        results.append(json.loads(out))
    return results


# --- what the processes do ----------------------------------------------------------------------------------------


def run_until_nothing_is_due(session: Session) -> list[int]:
    scheduler = Scheduler(session)
    ran: list[int] = []
    while report := scheduler.run_due(ignore_errors=True):
        assert not report.failed, report
        assert not report.lost, report
        if not report.job_ids:
            return ran
        ran += report.job_ids
    return ran


def run_one_pass(session: Session) -> list[int]:
    return Scheduler(session).run_due(ignore_errors=True).job_ids


def cancel_all(session: Session, *ids: str) -> list[int]:
    won = []
    for each in ids:
        if Scheduler(session).cancel(int(each)):
            won.append(int(each))
        session.commit()
    return won


def schedule_and_run(session: Session, count: str) -> list[int]:
    scheduler = Scheduler(session)
    for _ in range(int(count)):
        scheduler.enqueue("tests.processes.note_in_database")
        session.commit()
    return run_until_nothing_is_due(session)


def enqueue(session: Session, name: str) -> list[int]:
    """Schedule a job for now, of which the workers that listen are notified."""
    notify_workers(session.get_bind())
    job_id = Scheduler(session).enqueue(name).id
    session.commit()
    return [job_id]


def declare(session: Session, now: str, *names: str) -> list[int]:
    """Declare recurring jobs, in one transaction with a letter of this process."""
    from tests.shop import Letter

    scheduler = Scheduler(session, timezone=UTC, clock=lambda: datetime.fromisoformat(now))
    session.add(Letter(text=f"from {os.getpid()}"))
    ids = [scheduler.recurring(name, "15m", "tests.jobs.record", args=[name]).id for name in names]
    session.commit()
    return ids


def tick(session: Session, now: str) -> list[int]:
    return Scheduler(session).run_due(datetime.fromisoformat(now)).job_ids


def backfill(session: Session, name: str, since: str, now: str) -> list[int]:
    scheduler = Scheduler(session, clock=lambda: datetime.fromisoformat(now))
    ids = scheduler.backfill(name, datetime.fromisoformat(since), datetime.fromisoformat(now))
    session.commit()
    return ids


# --- handlers -----------------------------------------------------------------------------------------------------


def note_in_ledger() -> None:
    """One line a run, so that a job which ran twice shows."""
    with Path(os.environ[LEDGER]).open("a", encoding="ascii") as ledger:
        ledger.write(f"{current_job().id}\n")


def note_in_database(session: Session) -> None:
    """Read, then write one row a job; the text is unique, so that a second would be an error."""
    from tests.shop import Letter

    job_id = current_job().id
    assert session.query(Letter).filter_by(text=str(job_id)).first() is None
    session.add(Letter(text=str(job_id)))


def enter_and_leave() -> None:
    """Two lines a run: one when it begins, one when it ends, with what it did between long enough to meet others."""
    with Path(os.environ[LEDGER]).open("a", encoding="ascii", buffering=1) as ledger:
        ledger.write("+\n")
        sum(range(100_000))
        ledger.write("-\n")


def note_the_time() -> None:
    with Path(os.environ[LEDGER]).open("a", encoding="ascii") as ledger:
        ledger.write(f"{current_job().started_at.timestamp():.6f}\n")


def die() -> None:
    os._exit(9)


def main() -> None:
    url, action, *arguments = sys.argv[1:]
    engine = create_engine(url)
    with Session(engine) as session:
        session.connection()
        session.rollback()
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(globals()[action](session, *arguments)))


if __name__ == "__main__":
    main()
