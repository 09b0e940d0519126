"""The commands about recurring jobs."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import Session

from future_jobs import RecurringJob, ScheduledJob, Scheduler, create_tables
from future_jobs.cli import main
from tests.test_cli import runner

ALLOWED = "--allow=future_jobs.contrib.crontab"


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FUTURE_JOBS_APP", "FUTURE_JOBS_URL"):
        monkeypatch.delenv(name, raising=False)
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
def session(url):
    engine = create_engine(url)
    create_tables(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def daily(session):
    """A recurring job called "daily"."""
    found = Scheduler(session, timezone="Europe/Stockholm").recurring(
        "daily", "0 9 * * *", "tests.jobs.record", args=[1]
    )
    session.commit()
    return found


@pytest.fixture
def fj(url, session):
    def call(*line, code=0, **settings):
        session.rollback()
        words = ["--url", url, "--timezone", "Europe/Stockholm", *map(str, line)]
        result = runner().invoke(main, words, **settings)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


def read(result):
    return json.loads(result.stdout)


def test_an_empty_list_says_so(fj):
    assert fj("schedules", "list").stdout == "No recurring jobs.\n"
    assert read(fj("--json", "schedules", "list")) == []


def test_the_list_has_state_and_counters(fj, daily, session):
    Scheduler(session, timezone="Europe/Stockholm").recurring(
        "over", "@daily", "tests.jobs.record", end="2001-01-01T00:00"
    )
    session.execute(update(RecurringJob).where(RecurringJob.name == "daily").values(fired=7, missed=2, skipped=1))
    session.commit()
    header, first, second = fj("schedules", "list").stdout.splitlines()
    assert header.split() == ["NAME", "STATE", "NEXT", "FIRED", "MISSED", "SKIPPED", "RULE", "CALL"]
    assert first.split()[:2] == ["daily", "active"]
    assert first.split()[5:] == ["7", "2", "1", "0", "9", "*", "*", "*", "tests.jobs.record"]
    assert second.split()[:2] == ["over", "over"]
    assert [each["name"] for each in read(fj("--json", "schedules", "list"))] == ["daily", "over"]


def test_show_says_everything(fj, daily):
    shown = fj("schedules", "show", "daily").stdout
    for words in (
        "daily  active",
        "tests.jobs.record(1)",
        "at 09:00 every day, Europe/Stockholm",
        "0 fired, 0 missed",
        "expires=",
    ):
        assert words in shown
    assert read(fj("--json", "schedules", "show", "daily"))["rule"] == "0 9 * * *"


def test_show_says_why_a_damaged_one_cannot_go_on(fj, daily, session):
    now = datetime.now(UTC) - timedelta(hours=1)
    session.execute(update(RecurringJob).values(rule="nonsense", next_run_at=now))
    session.commit()
    assert "recurring job 'daily' cannot go on: InvalidTime: rule='nonsense'" in fj("run").stderr
    shown = fj("schedules", "show", "daily").stdout
    assert "daily  broken" in shown
    assert "It cannot go on: InvalidTime: rule='nonsense'" in shown


def test_preview_shows_the_next_times(fj, daily):
    lines = fj("schedules", "preview", "daily", "-n", 3).stdout.splitlines()
    assert len(lines) == 3
    assert all(" 09:00:00 CE" in line for line in lines)
    assert len(read(fj("--json", "schedules", "preview", "daily"))) == 10


def test_pause_and_resume(fj, daily):
    assert fj("schedules", "pause", "daily").stdout == "daily is paused.\n"
    assert "is paused already" in fj("schedules", "pause", "daily", code=1).stderr
    assert "paused" in fj("schedules", "list").stdout
    assert fj("schedules", "resume", "daily").stdout == "daily goes on.\n"
    assert read(fj("--json", "schedules", "resume", "daily", code=1)) == {"name": "daily", "done": False}


def test_trigger_makes_a_job(fj, daily, session):
    assert fj("schedules", "trigger", "daily").stdout == "Job 1 is due now: tests.jobs.record(1)\n"
    assert session.scalar(select(ScheduledJob.recurring_id)) == 1
    assert "They scheduled" not in fj("run").stdout


def test_backfill_makes_jobs_of_the_past(fj, daily):
    stretch = ("2026-11-01T00:00", "2026-11-07T23:59")
    assert fj("schedules", "backfill", "daily", *stretch).stdout == "7 jobs are due now.\n"
    assert read(fj("--json", "schedules", "backfill", "daily", *stretch)) == {"name": "daily", "job_ids": []}
    assert "start='x'" in fj("schedules", "backfill", "daily", "x", "y", code=2).stderr


def test_remove(fj, daily, session):
    assert fj("schedules", "remove", "daily").stdout == "daily is removed.\n"
    assert "does not exist" in fj("schedules", "remove", "daily", code=1).stderr
    assert session.scalar(select(RecurringJob)) is None


@pytest.mark.parametrize("command", ["show", "preview", "pause", "resume", "trigger"])
def test_an_unknown_name_is_answered_with_the_nearest(fj, daily, command):
    assert "is called 'dayly'; did you mean 'daily'?" in fj("schedules", command, "dayly", code=1).stderr


def test_a_pass_does_not_take_what_a_rule_made_for_scheduled_by_jobs(fj, daily):
    assert "They scheduled" not in fj("run", "--now", "2d").stdout


# --- import-crontab ---------------------------------------------------------------------------------------------------

A_CRONTAB = "PATH=/usr/bin\n0 9 * * mon-fri date +\\%F\n@reboot start\n30 2 * * * cd / && backup\n"


def test_a_dry_run_shows_the_next_times_and_writes_nothing(fj, session):
    done = fj("import-crontab", "-", "--dry-run", input=A_CRONTAB)
    lines = done.stdout.splitlines()
    assert lines[0] == "crontab: date +%F  0 9 * * mon-fri"
    assert all(" 09:00:00 CE" in line for line in lines[1:4])
    assert lines[-1] == "Would declare 2 recurring jobs. Nothing was written."
    assert "line 3: @reboot start" in done.stderr
    assert session.scalar(select(RecurringJob)) is None
    found = read(fj("--json", "import-crontab", "-", "--dry-run", input=A_CRONTAB))
    assert [(each["rule"], len(each["next"])) for each in found] == [("0 9 * * mon-fri", 3), ("30 2 * * *", 3)]


def test_an_import_declares_recurring_jobs(fj, session, tmp_path):
    tab = tmp_path / "nightly"
    tab.write_text("0 9 * * * root date\n")
    done = fj(ALLOWED, "import-crontab", tab, "--system")
    assert done.stdout.splitlines()[-1] == "Declared 1 recurring job."
    found = session.scalar(select(RecurringJob))
    assert (found.name, found.args, found.kwargs) == ("nightly: date", ["date"], {"user": "root"})
    fj(ALLOWED, "import-crontab", tab, "--system", "--prefix", "nightly")
    session.rollback()
    assert len(session.scalars(select(RecurringJob)).all()) == 1


def test_an_import_that_is_not_allowed_is_refused(fj, session):
    for allow in ([], ["--allow=shop."], ["--allow=future_jobs"]):
        shown = fj(*allow, "import-crontab", "-", input="@daily date", code=2).stderr
        assert "put 'future_jobs.contrib.crontab' into" in shown
    assert session.scalar(select(RecurringJob)) is None


def test_one_wrong_line_and_nothing_is_written(fj, session):
    done = fj(ALLOWED, "import-crontab", "-", input="0 9 * * * date\n61 * * * * date\n", code=2)
    assert "line 2: 61 * * * * date: " in done.stderr
    assert "1 of 2 lines cannot be understood; nothing was written" in done.stderr
    assert session.scalar(select(RecurringJob)) is None
