"""``future-jobs worker``, as a person, a service and another program use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from future_jobs import ScheduledJob, Scheduler, create_tables
from future_jobs.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/shop.db"


@pytest.fixture
def session(url):
    engine = create_engine(url)
    create_tables(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def call(*words):
    return CliRunner().invoke(main, list(words), env={"FUTURE_JOBS_URL": "", "FUTURE_JOBS_APP": ""})


def test_it_tells_what_it_does_in_a_line_each(url, session, calls):
    Scheduler(session).enqueue("tests.jobs.record", args=[1], queue="mail", priority=1)
    Scheduler(session).enqueue("tests.jobs.failjob", queue="mail")
    session.commit()
    done = call("--url", url, "worker", "--queue", "mail=1", "--queue", "*=2", "--max-jobs", "2", "--name", "mine")
    assert done.exit_code == 0, done.output
    banner, _, lines = done.output.partition("\n\n")
    assert "queues  mail 1, all others 2 at once" in banner
    assert f", in {url}" in banner
    words = [line.split()[1:] for line in lines.splitlines()]
    assert [each[0] for each in words] == ["started", "complete", "failed", "stopped"]
    assert words[0][1].startswith("mine:")
    assert words[1][1:3] == ["1", "tests.jobs.record"]
    assert words[2][1:] == ["2", "tests.jobs.failjob", "ValueError:", "fail"]
    assert calls == [(1,)]


def test_quiet_it_says_only_what_went_wrong(url, session):
    Scheduler(session).enqueue("tests.jobs.sample_job")
    Scheduler(session).enqueue("tests.jobs.failjob")
    session.commit()
    lines = call("--url", url, "worker", "--quiet", "--max-jobs", "2").output.splitlines()
    assert [line.split()[1] for line in lines if line[:2].isdigit()] == ["started", "failed", "stopped"]


def test_json_is_a_line_for_each_event(url, session):
    job = Scheduler(session).enqueue("tests.jobs.record")
    session.commit()
    lines = call("--url", url, "--json", "worker", "--max-jobs", "1").stdout.splitlines()
    told = [json.loads(line) for line in lines]
    assert [each["event"] for each in told] == ["started", "completed", "stopped"]
    assert told[1]["job_id"] == job.id


@pytest.mark.parametrize("words", [("--queue", "mail"), ("--queue", "mail=0"), ("--queue", "=3"), ("--queue", "a=b")])
def test_a_queue_needs_a_name_and_slots(words):
    done = call("--url", "sqlite:///x.db", "worker", *words)
    assert done.exit_code == 2
    assert "is not NAME=SLOTS, such as mail=4" in done.output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--lease", "soon"), "lease"),
        (("--timeout", "1mo"), "timeout is '1mo'"),
        (("--poll", "-1s"), "poll"),
    ],
)
def test_settings_that_cannot_work_are_told_in_a_line(url, session, words, complaint):
    done = call("--url", url, "worker", *words)
    assert (done.exit_code, done.output.count("Traceback")) == (2, 0)
    assert complaint in done.output


def test_missing_tables_are_told_with_the_remedy(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/empty.db")
    engine.connect().close()
    engine.dispose()
    done = call("--url", f"sqlite:///{tmp_path}/empty.db", "worker")
    assert done.exit_code == 3
    assert "db upgrade" in done.output


@pytest.fixture
def service(url, session):
    process = subprocess.Popen(
        [sys.executable, "-m", "future_jobs", "--url", url, "worker"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if " started " in line:
            break
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_with_exit_code_0(service, session, number):
    Scheduler(session).enqueue("tests.jobs.sample_job")
    session.commit()
    for line in service.stdout:  # noticed although another process scheduled it
        if " complete " in line:
            break
    service.send_signal(number)
    out, _ = service.communicate(timeout=60)
    assert service.returncode == 0, out
    assert " stopped " in out
    assert session.scalar(select(ScheduledJob.status)) == "complete"


def test_a_url_has_as_many_connections_as_it_has_slots(url, session, calls):
    Scheduler(session).enqueue("tests.jobs.record")
    session.commit()
    assert call("--url", url, "worker", "--queue", "default=40", "--max-jobs", "1").exit_code == 0
    assert calls == [()]
