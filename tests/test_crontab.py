"""Crontabs as recurring jobs, and the runner of their commands."""

import getpass
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from future_jobs import CallableRefused, RecurringJob, ScheduledJob, Scheduler, create_tables
from future_jobs.contrib import crontab

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
CRONTABS = json.loads((Path(__file__).parent / "data" / "crontabs.json").read_text())
A_CRONTAB = r"""
# m h dom mon dow command
SHELL=/bin/bash
MAILTO = "root@example.org"
GREETING = 'good morning'
17 *	* * *	echo $GREETING
  @daily  date +\%F
CRON_TZ=Europe/Stockholm
0 9 * * mon-fri cat%first line%second line
@reboot /usr/bin/start
"""


@pytest.fixture
def session():
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    create_tables(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def scheduler(session):
    return Scheduler(session, timezone=UTC, clock=lambda: NOON, allow=["tests.", "future_jobs.contrib.crontab"])


def test_a_crontab_is_read_as_cron_reads_it():
    hourly, daily, weekdays, reboot = crontab.parse(A_CRONTAB, timezone="UTC")
    assert (hourly.schedule, hourly.command) == ("17 * * * *", "echo $GREETING")
    assert hourly.environment == {"SHELL": "/bin/bash", "MAILTO": "root@example.org", "GREETING": "good morning"}
    assert (daily.schedule, daily.command, str(daily.rule.timezone)) == ("@daily", "date +%F", "UTC")
    assert (weekdays.command, weekdays.stdin) == ("cat", "first line\nsecond line")
    assert str(weekdays.rule.timezone) == "Europe/Stockholm"
    assert "CRON_TZ" not in weekdays.environment
    assert (reboot.rule, "no instant is a reboot" in reboot.problem) == (None, True)


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_a_system_crontab_names_a_user(separator):
    (line,) = crontab.parse(f"25 6 * * *{separator}www-data{separator}cd / && run  this", system=True)
    assert (line.user, line.command) == ("www-data", "cd / && run  this")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("61 * * * * x", "minute '61'"),
        ("0 0 30 2 * x", "never fires"),
        ("* * * *", "neither a setting nor a time"),
        ("@sometimes x", "no such name"),
        ("CRON_TZ=Mars\n* * * * * x", "no such time zone"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(text, problem):
    (line,) = crontab.parse(text)
    assert line.rule is None
    assert problem in line.problem


def test_the_crontabs_of_debian_packages_are_read():
    text = "".join(f"{each['schedule']} root /usr/sbin/{each['package']}\n" for each in CRONTABS)
    lines = list(crontab.parse(text, system=True))
    assert [line.problem for line in lines if line.problem] == []
    assert [(line.schedule, line.user) for line in lines] == [(each["schedule"], "root") for each in CRONTABS]


def test_importing_a_changed_crontab_changes_the_rows(scheduler, session):
    def imported(text):
        found = crontab.declare(scheduler, list(crontab.parse(text)), prefix="tab")
        session.commit()
        return found

    imported("0 9 * * * backup\n0 10 * * * backup\n0 9 * * * report\n")
    imported("0 9 * * * backup\n0 11 * * * backup\n0 9 * * * report\n")
    rows = session.execute(select(RecurringJob.name, RecurringJob.rule).order_by(RecurringJob.name)).all()
    assert [tuple(row) for row in rows] == [
        ("tab: backup", "0 9 * * *"),
        ("tab: backup (2)", "0 11 * * *"),
        ("tab: report", "0 9 * * *"),
    ]


def test_a_command_runs_as_cron_runs_it(scheduler, session, tmp_path):
    text = f"HOME={tmp_path}\nWORD=hello\n0 * * * * pwd; echo $WORD; cat%first%second\n"
    crontab.declare(scheduler, list(crontab.parse(text)), prefix="tab")
    session.commit()
    scheduler.run_due(NOON + timedelta(hours=1))
    job = session.scalar(select(ScheduledJob))
    assert (job.status, job.return_value) == ("complete", f"{tmp_path}\nhello\nfirst\nsecond")


def test_a_command_that_fails_says_how(scheduler, session):
    crontab.declare(scheduler, list(crontab.parse("0 * * * * echo no such luck; exit 3")), prefix="tab")
    session.commit()
    assert scheduler.run_due(NOON + timedelta(hours=1), ignore_errors=True).failed == 1
    error = session.scalar(select(ScheduledJob.error))
    assert "exit code 3: echo no such luck; exit 3\nno such luck" in error


def test_a_user_other_than_this_one_needs_the_right_to_become_it(scheduler, session):
    scheduler.enqueue(crontab.PATH, args=["id -un"], kwargs={"user": getpass.getuser()})
    scheduler.enqueue(crontab.PATH, args=["id -un"], kwargs={"user": "nobody_at_all"})
    session.commit()
    report = scheduler.run_due(ignore_errors=True)
    assert (report.complete, report.failed) == (1, 1)


@pytest.mark.parametrize("allow", [None, ["future_jobs"], ["future_jobs.contrib"], ["tests."], "registered"])
def test_commands_are_refused_unless_the_allow_list_names_them(session, scheduler, allow, tmp_path):
    scheduler.enqueue(crontab.PATH, args=[f"touch {tmp_path}/done"])
    session.commit()
    session.info.clear()
    other = Scheduler(session, timezone=UTC, clock=lambda: NOON, allow=allow)
    assert other.run_due(ignore_errors=True).failed == 1
    assert "CallableRefused" in session.scalar(select(ScheduledJob.error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allow", [None, ["shop."]])
def test_commands_are_refused_when_they_are_declared(session, allow):
    scheduler = Scheduler(session, allow=allow)
    with pytest.raises(CallableRefused, match=r"put 'future_jobs\.contrib\.crontab' into"):
        crontab.declare(scheduler, list(crontab.parse("@daily x")), prefix="tab")
