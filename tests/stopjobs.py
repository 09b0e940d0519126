"""Handlers for tests that stop them."""

from __future__ import annotations

import asyncio
import threading

from sqlalchemy import select
from sqlalchemy.orm import Session

from future_jobs import Scheduler, current_job, job
from future_jobs.interruption import Interrupted
from tests.shop import Letter

SEEN: list = []


class Told(Exception):
    pass


def spin():
    while True:
        pass


@job(timeout="50ms")
def spin_by_default():
    spin()


def count_to(number):
    for n in range(number):  # noqa: B007
        pass
    return n + 1


def write_and_spin(text, session: Session):
    session.add(Letter(text=text))
    session.flush()
    spin()


def query_for_ever(session: Session):
    while True:
        session.execute(select(Letter)).all()


def clean_up():
    try:
        spin()
    finally:
        SEEN.append("cleaned up")


def swallow():
    try:
        spin()
    except Exception:  # the exception itself where the database is one connection
        return "as if nothing had happened"
    except Interrupted:
        return "as if nothing had happened"


def protest():
    try:
        spin()
    finally:
        raise Told


async def sleep_for_ever(session: Session = None):
    SEEN.append("began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        SEEN.append("cancelled")
        raise


async def write_and_sleep(text, session: Session):
    session.add(Letter(text=text))
    session.flush()
    await sleep_for_ever()


async def ignore_cancellation():
    SEEN.append("began")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "finished all the same"


async def who():
    await asyncio.sleep(0)
    SEEN.append(current_job().id)


# --- those which are asked to stop; they say so, and wait for it -----------------------------------------------------


BEGAN = threading.Event()
MAY_END = threading.Event()


def until_asked(then):
    """Poll, as a handler should, and end in one way or another."""
    running = current_job()
    BEGAN.set()
    while not running.cancel_requested:
        if MAY_END.wait(0.01):
            return "was not asked"
    if then == "raise":
        raise Told
    return "asked"


def write_until_asked(text, then, session: Session):
    until_asked(then)
    session.add(Letter(text=text))
    if then == "write and raise":
        session.flush()
        raise Told


async def sleep_until_asked():
    BEGAN.set()
    await sleep_for_ever()


def ignore_everything():
    BEGAN.set()
    MAY_END.wait(20)


def cancel_itself(session: Session):
    SEEN.append(Scheduler.of(session).cancel(current_job()))


# --- those which tell how far they are -------------------------------------------------------------------------------


def tell(*steps):
    for fraction, message in steps:
        current_job().progress(fraction, message)


def tell_and_wait(text, session: Session):
    if text is not None:
        session.add(Letter(text=text))
        session.flush()
    running = current_job()
    running.progress(0.4, "page 12")
    BEGAN.set()
    MAY_END.wait(20)
    running.progress(0.8, "page 24")


def tell_and_fail():
    current_job().progress(0.5, "half")
    raise Told
