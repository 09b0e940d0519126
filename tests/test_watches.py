"""Threads that notice what others commit, and what they tell."""

from __future__ import annotations

import os
import resource
import socket
import sys
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, text

from future_jobs import NotSupported, Scheduler, Worker, filewatch, notify_statements, notify_workers, watches
from future_jobs.filewatch import watching
from future_jobs.statements import Level
from future_jobs.watches import Listener, Watch
from tests import processes


@pytest.fixture(params=["told", "looking"])
def way(request, monkeypatch):
    """How a watch learns that a file was written: Linux tells it, or it looks, as it has to elsewhere."""
    if request.param == "looking":
        monkeypatch.setattr(filewatch, "_libc", lambda: None)
    elif sys.platform != "linux":
        pytest.skip("only Linux tells")
    else:
        monkeypatch.setattr(watches, "BUSY_SECONDS", watches.IDLE_SECONDS)  # it is calm from the start
        monkeypatch.setattr(watches, "CALM_SECONDS", 600.0)
    return request.param


@pytest.mark.parametrize("kind", ["file"], indirect=True)
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_commit_by_anybody_is_seen_where_the_database_counts_them(engine, scheduler, session, way, journal):
    assert session.scalar(text(f"PRAGMA journal_mode = {journal}")) == journal
    session.commit()
    wakes = SimpleQueue()
    watch = Watch(engine, wakes.put)
    watch.start()
    assert wakes.get(timeout=20) == []  # it watches
    for _ in range(3):
        scheduler.schedule("1h", "tests.jobs.record")
        session.commit()
        assert wakes.get(timeout=20) == []
    watch.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_file_that_is_written_is_told_whether_or_not_it_was_there(tmp_path):
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.touch()
    bell, ear = socket.socketpair()
    with watching([str(there), str(absent)], bell=ear.fileno()) as files:
        assert not files.wait(0)
        there.write_text("1")
        assert files.wait(20)
        assert not files.wait(0)
        absent.touch()
        assert not files.wait(0)  # made, and found now
        absent.write_text("1")
        assert files.wait(20)
        there.unlink()
        there.touch()
        files.wait(0)  # that it is gone
        there.write_text("2")  # another file of that name
        assert files.wait(20)
        bell.close()
        assert not files.wait(20)
    ear.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_where_no_more_files_can_be_watched_one_looks(tmp_path):
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        bell, ear = socket.socketpair()
        stack.callback(bell.close)
        stack.callback(ear.close)
        resource.setrlimit(resource.RLIMIT_NOFILE, (ear.fileno() + 1, hard))
        stack.enter_context(_no_descriptor_left())
        assert stack.enter_context(watching([str(tmp_path / "any")], bell=ear.fileno())) is None


@contextmanager
def _no_descriptor_left():
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in taken:
            os.close(each)


@pytest.mark.parametrize("kind", ["file"], indirect=True)
def test_a_commit_that_may_hide_behind_one_of_the_workers_own_is_seen(engine, scheduler, session):
    wakes, own = SimpleQueue(), 0

    def count():
        nonlocal own
        own += 1  # always busy
        return own

    watch = Watch(engine, wakes.put, own=count)
    watch.start()
    assert wakes.get(timeout=20) == []
    scheduler.schedule("1h", "tests.jobs.record")
    session.commit()
    assert wakes.get(timeout=20) == []
    watch.stop()


@pytest.mark.parametrize("kind", ["file"], indirect=True)
def test_a_watch_takes_no_connection_from_the_pool(engine):
    small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=5)
    wakes = SimpleQueue()
    watch = Watch(small, wakes.put)
    watch.start()
    assert wakes.get(timeout=20) == []
    small.connect().close()
    watch.stop()
    small.dispose()


def waits(commits):
    """Return for how many looks each of ``commits`` has to wait, which are numbers of the look that finds them."""
    rest, waits, waiting = watches._Rest(-1.0), [], []
    for look in range(max(commits) + 100):
        now = look * watches.BUSY_SECONDS
        if look in commits:
            rest.note(now, is_own=False)
            waiting.append(look)
        if rest.is_over(now):
            waits += [look - each for each in waiting]
            waiting = []
    return waits


def test_where_one_commit_follows_the_other_they_are_woken_for_together():
    found = waits(range(2000))
    assert found.count(0) < 150
    assert 15 <= max(found) <= 21  # a tenth of a second


def test_a_burst_makes_none_of_those_late_that_come_now_and_then_after_it():
    sparse = [210 + 13 * n for n in range(100)]
    assert max(waits([*range(200), *sparse])[202:]) <= 4


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"], indirect=True)
def test_where_there_is_no_count_the_watch_ends(engine):
    watch = Watch(engine, SimpleQueue().put)
    watch.start()
    watch._thread.join(20)
    assert not watch._thread.is_alive()
    watch.stop()


# --- notifications ------------------------------------------------------------------------------------------------

postgresql = pytest.mark.parametrize("kind", ["postgresql"], indirect=True)


@pytest.fixture
def heard(engine):
    """What a listener on ``engine`` has woken a worker with, in turn."""
    heard = SimpleQueue()
    listener = Listener(engine, heard.put)
    listener.start()
    assert heard.get(timeout=20) == []  # it listens
    yield heard
    listener.stop()


@postgresql
def test_a_listener_hears_where_the_jobs_are(engine, session, heard):
    scheduler = Scheduler(session, timezone="Asia/Kathmandu")
    notify_workers(engine)
    job = scheduler.enqueue("tests.jobs.record", queue='"Ünter" \U0001f4ee', priority=-3)
    session.commit()
    assert heard.get(timeout=20) == [Level('"Ünter" \U0001f4ee', -3, job.run_at)]
    limited = scheduler.enqueue("tests.jobs.record", concurrency_key="k")
    session.commit()
    assert heard.get(timeout=20) == [Level("default", 0, limited.run_at, limited=True)]


@postgresql
def test_notifications_that_come_together_wake_once(session, now, heard):
    first, second = Level("a", 0, now), Level("b", 1, now)
    notify_statements.notify(session.connection(), [first])
    notify_statements.notify(session.connection(), [second])
    session.commit()
    assert heard.get(timeout=20) == [first, second]
    notify_statements.notify(session.connection(), [first])
    notify_statements.notify(session.connection(), [])
    session.commit()
    assert heard.get(timeout=20) == []


@postgresql
@pytest.mark.parametrize("count", [1, 16])
def test_what_does_not_fit_into_a_notification_is_to_be_looked_for(session, now, heard, count):
    levels = [Level(f"{n:02}" + "\U0001f4ee" * 62, 0, now) for n in range(count)]
    notify_statements.notify(session.connection(), levels)
    session.commit()
    assert heard.get(timeout=20) == (levels if count == 1 else [])


AT = "2026-11-28T12:00:00+00:00"


@pytest.mark.parametrize(
    "payload",
    [
        *("", "hello", "1", "null", "[1]", "{}", '["abcd"]', "[[]]", "[" * 5000, f"[[{'9' * 5000}]]"),
        f'[["q",0,"{AT}"]]',
        f'[["q",0,"{AT}",false,1]]',
        f'[["q","0","{AT}",false]]',
        f'[["q",32768,"{AT}",false]]',
        f'[["q",true,"{AT}",false]]',
        f'[["q",0.5,"{AT}",false]]',
        '[["q",0,"2026-11-28T12:00:00",false]]',
        '[["q",0,"soon",false]]',
        f'[["q\\u0000",0,"{AT}",false]]',
        f'[["\\ud800",0,"{AT}",false]]',
        f'[["{"q" * 200}",0,"{AT}",false]]',
        f'[[null,0,"{AT}",false]]',
        f'[["q",0,"{AT}",false],["q"]]',
    ],
)
def test_words_that_are_not_ours_say_to_look(payload):
    assert notify_statements.levels_in(payload) == []


@postgresql
def test_a_listener_that_loses_its_connection_takes_another(engine, scheduler, session):
    notify_workers(engine)
    wakes = SimpleQueue()
    listener = Listener(engine, wakes.put)
    listener.start()
    assert wakes.get(timeout=20) == []
    ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN future_jobs'"
    session.execute(text(f"{ends} AND datname = current_database()"))  # others run this file on other databases
    session.commit()
    assert wakes.get(timeout=20) == []  # it listens again
    job = scheduler.enqueue("tests.jobs.record")
    session.commit()
    assert wakes.get(timeout=20) == [Level("default", 0, job.run_at)]
    listener.stop()


@postgresql
def test_a_worker_that_listens_need_not_look(engine, calls):
    process = processes.start(engine.url.render_as_string(hide_password=False), "enqueue", "tests.jobs.record")
    with Worker(engine, poll="1h", max_jobs=1, notify=True).background() as worker:
        processes.together([process])
        worker._closed.wait(20)
    assert len(calls) == 1


def test_a_driver_that_cannot_listen_is_refused():
    dbapi = SimpleNamespace(paramstyle="format", __version__="1.31.0")
    engine = create_engine("postgresql+pg8000://127.0.0.1/shop", module=dbapi)
    with pytest.raises(NotSupported, match=r"postgresql\+psycopg://"):
        Worker(engine, notify=True)
