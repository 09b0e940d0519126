"""Reports that take a while: a FastAPI application, which runs its jobs in a thread of its own.

    fastapi run fastapi_app.py --workers 4
    curl -X POST 'localhost:8000/reports?year=2026'
    curl localhost:8000/reports/1

Each of the four processes has such a thread. Each report is made by one of them; if that is killed, by another.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import date, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from future_jobs import ScheduledJob, Scheduler, create_tables

engine = create_engine("sqlite:///reports.db")
NewSession = sessionmaker(engine)


def report(year: int) -> dict[str, int]:
    """Count the Mondays of each month. What is returned is stored with the job."""
    first = date(year, 1, 1)
    days = (first + timedelta(days=number) for number in range(366))
    counts: dict[str, int] = {}
    for day in days:
        if day.year == year and day.weekday() == 0:
            counts[f"{day:%B}"] = counts.get(f"{day:%B}", 0) + 1
    return counts


def run_jobs(stopped: threading.Event) -> None:
    while not stopped.wait(0.5):
        with NewSession() as session:
            Scheduler(session).run_due(ignore_errors=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
    create_tables(engine)
    stopped = threading.Event()
    thread = threading.Thread(target=run_jobs, args=[stopped])
    thread.start()
    yield
    stopped.set()
    thread.join()


def new_session() -> Iterator[Session]:
    with NewSession() as session:
        yield session


RequestSession = Annotated[Session, Depends(new_session)]
app = FastAPI(lifespan=lifespan)


@app.post("/reports", status_code=202)
def order_report(year: int, session: RequestSession) -> dict[str, Any]:
    job = Scheduler(session).enqueue(report, args=[year], expires="1h", tags=["report"])
    session.commit()
    return {"id": job.id, "status": job.status}


@app.get("/reports/{job_id}")
def look(job_id: int, session: RequestSession) -> dict[str, Any]:
    job = session.get(ScheduledJob, job_id)
    if job is None:
        raise HTTPException(404)
    return {"id": job.id, "status": job.status, "report": job.return_value}
