"""Handlers for tests. They record what they were called with in `CALLS`, or write letters into the shop's outbox."""

from __future__ import annotations

from sqlalchemy import text as sql
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, job, job_as_parameter
from tests.shop import Letter

CALLS: list = []


def record(*args, **kwargs):
    CALLS.append((args, kwargs) if kwargs else args)


def sample_job():
    print("Simple job executed.")


def job_with_args(n, k):
    print(f"Job with arguments: n = {n}, k = {k}")


@job_as_parameter
def job_job(job):
    print(f"Got job as argument: {job}")


def failjob():
    raise ValueError("fail")


def write_letter(text, session: Session):
    session.add(Letter(text=text))


def write_then_fail(text, session: Session):
    session.add(Letter(text=text))
    session.flush()
    raise ValueError("fail")


KEPT = []


def read_in_part(session: Session):
    found = session.connection().execute(sql("SELECT 1 UNION ALL SELECT id FROM future_jobs_scheduled_job"))
    found.fetchone()
    KEPT.append(found)


def fail_having_read_in_part(session: Session):
    read_in_part(session)
    raise ValueError("in part")


def lose_its_connection_having_read_in_part(session: Session):
    read_in_part(session)
    session.connection().invalidate()
    raise ValueError("in part")


def give_back_its_connection_having_read_in_part(session: Session):
    read_in_part(session)
    session.connection().close()
    raise ValueError("in part")


def annotated(number, job: ScheduledJob, session: Session):
    CALLS.append((number, job.id, job.session is session))


def schedule_another(session: Session):
    Scheduler.of(session).enqueue("tests.jobs.record")


def about(order, *args):
    CALLS.append((type(order).__name__, order.customer, *args))


async def a_coroutine(text, session: Session):
    session.add(Letter(text=text))
    CALLS.append(text)


@job(queue="mail", priority=7, max_attempts=3, expires=None, tags=["letter"])
def decorated(*args):
    CALLS.append(args)


@job(name="a.lasting.name", aliases=["its.former.name"])
def renamed(*args):
    CALLS.append(args)


def generator():
    yield 1


class Callable:
    def __call__(self):
        pass


class Plain:
    def method(self):
        pass


AN_INSTANCE = Callable()
