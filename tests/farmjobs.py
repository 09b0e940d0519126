"""Handlers that run in other processes, and tell where by what they write into the shop's outbox."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import threading
from pathlib import Path
from time import monotonic

from sqlalchemy import select
from sqlalchemy.orm import Session

from future_jobs import CallableNotFound, Scheduler, Snooze, current_job, job
from tests.shop import Letter


class Stubborn(Exception):
    """An exception that does not survive a journey to another process."""

    def __init__(self, *, needed):
        super().__init__(needed)
        self.hold = threading.Lock()


def whereabouts():
    return os.getpid()


def nothing():
    pass


def write(session: Session):
    """One row a job, so that a job which committed twice shows."""
    session.add(Letter(text=f"{current_job().id}"))


def write_then_fail(session: Session):
    session.add(Letter(text="gone"))
    session.flush()
    raise Stubborn(needed="what went wrong")


def fail_once():
    if current_job().failures == 0:
        raise Stubborn(needed="the first time")


def snooze_once():
    return Snooze("0s") if current_job().snoozes == 0 else None


def schedule_another(session: Session):
    Scheduler.of(session).enqueue("tests.farmjobs.write")


def zone(session: Session):
    scheduler = Scheduler.of(session)
    return [str(scheduler.timezone), list(scheduler.allow)]


@job(name="a.name.of.its.own")
def named():
    return "found"


def give_up():
    raise CallableNotFound("a handler may raise this, too")


def refuse_to_start():
    raise RuntimeError("no such GPU")


def wait_in_c(session: Session):
    """Hold what it wrote, in a function that is not written in Python, which no exception interrupts."""
    session.add(Letter(text="never"))
    session.flush()
    threading.Event().wait(300)


# --- ways to die --------------------------------------------------------------------------------------------------


def leave():
    os._exit(9)


def shoot_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def fault():
    faulthandler.disable()  # it would write a page
    ctypes.string_at(0)


def write_and_die(session: Session):
    write(session)
    session.flush()
    os._exit(9)


# --- in step with the test ----------------------------------------------------------------------------------------


def meet(folder, name, session: Session):
    """Say that it runs, and go on when the test lets it."""
    write(session)
    Path(folder, f"{name}.{os.getpid()}.{current_job().attempt}").touch()
    wait_for(lambda: Path(folder, "go").exists())


def wait_for(true):
    deadline, pause = monotonic() + 30, threading.Event()
    while not true():
        assert monotonic() < deadline
        pause.wait(0.01)


def count_letters(session: Session):
    return len(session.scalars(select(Letter.id)).all())
