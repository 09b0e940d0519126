"""Handlers for the tests of the worker: they can be held, and say when they began."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from future_jobs import Scheduler, Snooze, current_job
from tests.shop import Letter


class Stage:
    """What handlers and a test know of each other."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.began: list = []
        self.ended: list = []
        self.now = 0
        self.most = 0
        self.gate = threading.Event()

    def wait_for(self, true, timeout=20):
        with self.changed:
            assert self.changed.wait_for(true, timeout), (self.began, self.ended)

    def enter(self, name):
        with self.changed:
            self.began.append(name)
            self.now += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()

    def leave(self, name):
        with self.changed:
            self.now -= 1
            self.ended.append(name)
            self.changed.notify_all()


STAGE = Stage()


def held(name=None):
    """Run until the test opens the gate."""
    stage = STAGE  # that of the test that began it: another may have begun by the time it ends
    stage.enter(name)
    stage.gate.wait(20)
    stage.leave(name)


def note(name=None):
    stage = STAGE
    stage.enter(name)
    stage.leave(name)


def when():
    """Note how late it started."""
    note((datetime.now(UTC) - current_job().run_at).total_seconds())


def write(text, session: Session):
    session.add(Letter(text=text))
    session.flush()
    note(text)


def write_held(text, session: Session):
    session.add(Letter(text=text))
    session.flush()
    held(text)


def fail():
    note("fail")
    raise ValueError("fail")


def fail_once():
    note(current_job().attempt)
    if current_job().failures == 0:
        raise ValueError("the first time")


def snooze_once():
    note(current_job().attempt)
    if current_job().snoozes == 0:
        return Snooze("0s")
    return None


def chain(left, session: Session):
    note(left)
    if left:
        Scheduler.of(session).enqueue("tests.workjobs.chain", args=[left - 1])


def count_in_database(session: Session):
    """One row a job, whose text is unique."""
    session.add(Letter(text=f"{current_job().id}"))


def settings(session: Session):
    scheduler = Scheduler.of(session)
    note((str(scheduler.timezone), scheduler.allow, session is current_job().session))


def die():
    os._exit(9)


WORKER = None


def stop():
    WORKER.stop()
