"""Several real processes doing the same thing at the same time.

Run as ``python -m tests.processes URL ACTION [ARGUMENT ...]``: prints ``ready``, waits for a line on its standard
input, acts, and prints a result as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from future_jobs import AlreadyScheduled, Cancel, Scheduler, current_job, notify_workers

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


def run_until_nothing_runs(session: Session) -> list[int]:
    """The same, of handlers that may fail."""
    scheduler = Scheduler(session)
    ran: list[int] = []
    while ids := scheduler.run_due(ignore_errors=True, limit=5).job_ids:
        ran += ids
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


def schedule_many(session: Session, name: str, count: str) -> list[int]:
    ids = Scheduler(session).schedule_many("1d", "tests.jobs.record", [{"args": [name, n]} for n in range(int(count))])
    session.commit()
    return ids


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


def put(session: Session, on_conflict: str, *keys: str) -> dict[str, int | None]:
    """Schedule a job for each key, each in one transaction with a letter; return who has them."""
    from tests.shop import Letter

    scheduler = Scheduler(session)
    found: dict[str, int | None] = {}
    for key in keys:
        print("asks", file=sys.stderr, flush=True)
        session.add(Letter(text=f"{key} from {os.getpid()}"))
        try:
            job = scheduler.schedule(
                "1d", "tests.jobs.record", args=[os.getpid()], unique_key=key, on_conflict=on_conflict
            )
            found[key] = job.id
        except AlreadyScheduled as error:
            found[key] = error.job_id
        session.add(Letter(text=f"{key} again from {os.getpid()}"))  # the transaction is usable
        session.commit()
    return found


def put_all(session: Session, on_conflict: str, *keys: str) -> list[int]:
    calls = [{"args": [os.getpid()], "unique_key": key} for key in keys]
    ids = Scheduler(session).schedule_many("1d", "tests.jobs.record", calls, on_conflict=on_conflict)
    session.commit()
    return ids


def replace_until(session: Session, last: str, until: str) -> list[int]:
    """Replace a job that is due, again and again; return the numbers that some job has now."""
    scheduler = Scheduler(session)
    put = []
    for number in range(int(last)):
        try:
            scheduler.enqueue(
                "tests.processes.note_number",
                args=[number],
                unique_key="k",
                unique_until=until,
                on_conflict="replace",
            )
        except AlreadyScheduled:
            session.rollback()
            continue
        session.commit()
        put.append(number)
    return put


def run_for_a_while(session: Session, passes: str) -> int:
    scheduler = Scheduler(session)
    return sum(scheduler.run_due(ignore_errors=True).complete for _ in range(int(passes)))


def fail_for_a_while(session: Session, passes: str) -> dict[str, int]:
    """Run jobs that fail and want to be tried again at once."""
    reports = [Scheduler(session).run_due(ignore_errors=True) for _ in range(int(passes))]
    return {name: sum(getattr(each, name) for each in reports) for name in ("retried", "cancelled", "failed", "lost")}


def schedule_for_a_while(session: Session, times: str) -> int:
    scheduler = Scheduler(session)
    count = 0
    for _ in range(int(times)):
        try:
            scheduler.enqueue(
                "tests.jobs.failjob", unique_key="k", unique_until="started", max_attempts=1000, backoff="0s"
            )
            count += 1
        except AlreadyScheduled:
            pass
        session.commit()
    return count


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


def note_number(number: int, session: Session) -> None:
    from tests.shop import Letter

    session.add(Letter(text=str(number)))


def fail() -> None:
    raise ValueError("fail")


def poll_until_asked() -> Cancel:
    pause = threading.Event()
    while not current_job().cancel_requested:
        pause.wait(0.01)
    return Cancel("it was asked")


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
