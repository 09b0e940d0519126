"""A worker made before a fork, as in an application that gunicorn loads once for all its processes."""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, event, select

from future_jobs import NotSupported, ScheduledJob, Worker
from tests import workjobs
from tests.shop import letters
from tests.workjobs import Stage

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    # That is what is tested.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


def in_child(act):
    """Call ``act`` in a forked child, and return what it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = json.dumps(act())
        except BaseException:
            said = json.dumps({"raised": traceback.format_exc()})
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert not (isinstance(said, dict) and "raised" in said), said["raised"]
    return said


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(workjobs, "STAGE", stage)
    yield stage
    stage.gate.set()


@pytest.fixture
def engine(shared_url):
    engine = create_engine(shared_url)
    yield engine
    engine.dispose()


def counted(scheduler, count):
    """Schedule jobs of which each leaves one letter; return their ids as text."""
    ids = scheduler.schedule_many("0s", "tests.workjobs.count_in_database", [{} for _ in range(count)])
    scheduler.session.commit()
    return sorted(map(str, ids))


def statuses(session):
    session.rollback()
    return dict(Counter(str(status) for status in session.scalars(select(ScheduledJob.status))))


def test_a_worker_made_before_a_fork_works_on_both_sides_of_it(engine, scheduler, session):
    ids = counted(scheduler, 20)
    session.close()
    opened = []
    event.listen(engine, "connect", lambda *_: opened.append(os.getpid()))
    with engine.connect():
        pass  # an idle connection in the pool, which the child must neither use nor close
    before = list(opened)
    worker = Worker(engine, max_jobs=10, queues={"default": 2})

    def work():
        worker.run()
        worker.run()  # and once more: now its connections are its own
        return worker.ran

    assert in_child(work) == 10
    with engine.connect() as connection:
        assert connection.scalar(select(ScheduledJob.id).limit(1)) is not None
    assert opened == before
    worker.run()
    assert worker.ran == 10
    assert statuses(session) == {"complete": 20}
    assert sorted(letters(session)) == ids


def test_a_fork_of_a_process_that_works_leaves_the_jobs_of_its_parent_alone(engine, scheduler, session, stage):
    if engine.dialect.name == "sqlite":
        pytest.skip("its own locks may be held by a thread of the parent, and then are for ever in the child")
    held = scheduler.enqueue("tests.workjobs.held", priority=1)
    session.commit()
    worker = Worker(engine, queues={"default": 1}, poll="1s")
    with worker.background():
        stage.wait_for(lambda: stage.now == 1)
        ids = counted(scheduler, 5)

        def work():
            worker.stop()  # as leaving `background` would; there is nothing of its own to hand back
            while worker.ran < 5:
                seconds = worker.tick()
                worker._loop.alarm.sleep(seconds)
            worker.stop()

        in_child(work)
        session.rollback()
        assert (held.status, held.attempt) == ("running", 1)
        stage.gate.set()
        stage.wait_for(lambda: len(stage.ended) == 1)
    assert statuses(session) == {"complete": 6}
    assert sorted(letters(session)) == ids


def test_an_executor_that_was_in_use_stays_with_the_parent(engine, scheduler, session, stage):
    with ThreadPoolExecutor(2) as executor:
        worker = Worker(engine, executor=executor)
        with worker.background():

            def work():
                with pytest.raises(NotSupported, match="after the fork"):
                    worker.tick()

            in_child(work)
            scheduler.enqueue("tests.workjobs.note")
            session.commit()
            stage.wait_for(lambda: len(stage.ended) == 1)
    assert statuses(session) == {"complete": 1}
