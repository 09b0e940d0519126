"""The commands about queues, and `show` for a job that must wait."""

import json

from future_jobs import Scheduler
from tests.test_cli_schedules import fj, session, url

__all__ = ["fj", "session", "url"]


def test_an_empty_list_says_so(fj):
    assert fj("queues", "list").stdout.startswith("No queues")
    assert json.loads(fj("--json", "queues", "list").stdout) == []


def test_a_queue_is_paused_and_resumed(fj, session):
    Scheduler(session).schedule("3d", "tests.jobs.record", queue="mail")
    session.commit()
    assert fj("queues", "pause", "mail").stdout == "mail is paused.\n"
    assert "is paused already" in fj("queues", "pause", "mail", code=1).stderr
    assert fj("queues", "list").stdout.splitlines()[1].split() == ["mail", "paused", "in", "3", "days", "0"]
    (mail,) = json.loads(fj("--json", "queues", "list").stdout)
    assert (mail["name"], mail["workers"], mail["paused_at"] is None) == ("mail", 0, False)
    assert fj("queues", "resume", "mail").stdout == "mail goes on.\n"
    assert json.loads(fj("--json", "queues", "resume", "mail", code=1).stdout) == {"name": "mail", "done": False}


def test_show_says_why_a_job_waits(fj, session):
    Scheduler(session).enqueue("tests.jobs.record", queue="mail", concurrency_key="k", rate_limit="5/min")
    Scheduler(session).pause_queue("mail")
    session.commit()
    shown = " ".join(fj("show", 1).stdout.split())
    assert "queue 'mail' is paused" in shown
    assert "1 at a time of k" in shown
    assert "5/60s" in shown
    assert json.loads(fj("--json", "show", 1).stdout)["why"] == "queue_paused"
