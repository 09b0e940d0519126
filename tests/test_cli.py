"""The commands, as a person, a crontab and another program use them."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from select import select as select_ready

import click
import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session

from future_jobs import JobFailure, ScheduledJob, Scheduler, __version__, create_tables
from future_jobs.cli import main, output, words
from future_jobs.models import Progress

ROOT = Path(__file__).resolve().parent.parent
MODULE = "clishop"
APPLICATION = """
import os, subprocess, sys, threading
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from future_jobs import Scheduler, Snooze, job

class AsyncEngine: pass

engine = create_engine("sqlite:///{file}")
Maker = sessionmaker(engine)
scoped = scoped_session(Maker)
session = Maker()
scheduler = Scheduler(session, timezone="Europe/Stockholm", expires="1d")
url = "sqlite:///{file}"
an_async_engine = AsyncEngine()

def make(): return Maker()
def make_engine(): return engine
def needs(argument): return Maker()
def breaks(): raise RuntimeError("no settings")
async def coroutine(): return Maker()

def fine(n=1, k=2): return n + k
def fail(text="nothing to send"): raise ValueError(text)
def leave(): sys.exit(3)
def loud():
    print("from python")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
def snooze(): return Snooze("2h")
def later(session: Session): Scheduler.of(session).schedule("3d", fine)
def slow():
    with open("started", "w") as pipe:
        pipe.write("yes")
    threading.Event().wait(60)

@job(name="a.lasting.name")
def named(): pass
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in, no settings around it, nothing left of the modules imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("FUTURE_JOBS_APP", "FUTURE_JOBS_URL", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    yield
    module = sys.modules.pop(MODULE, None)
    if module is not None:
        module.session.close()
        module.scoped.remove()
        module.engine.dispose()


@pytest.fixture
def file(tmp_path):
    """An SQLite file with the tables."""
    path = tmp_path / "jobs.db"
    engine = create_engine(f"sqlite:///{path}")
    create_tables(engine)
    engine.dispose()
    return path


@pytest.fixture
def app(tmp_path, file):
    """An application in the current folder: its name."""
    tmp_path.joinpath(f"{MODULE}.py").write_text(APPLICATION.replace("{file}", str(file)))
    return MODULE


@pytest.fixture
def session(file):
    engine = create_engine(f"sqlite:///{file}")
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture
def fj(file, app):
    """Call the program in this process, on the file; return its result, which has the exit code that was asked for."""
    return lambda *line, code=0: call("--url", f"sqlite:///{file}", *line, code=code)


def runner():
    """A runner that keeps standard output and standard error apart, as those of click 8.2 and newer always do."""
    return CliRunner(**({"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}))


def call(*line, code=0, **settings):
    result = runner().invoke(main, [str(word) for word in line], **settings)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def program(*line, **settings):
    """Call the program as another process."""
    settings = {"capture_output": True, "text": True, "timeout": 60, "env": environment()} | settings
    return subprocess.run([sys.executable, "-m", "future_jobs", *map(str, line)], check=False, **settings)


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "TERM": "xterm-256color", **more}


def in_terminal(*line, columns=80, **more):
    """Call the program in a terminal; return what it showed and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "future_jobs", *map(str, line)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**more)) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so at the end
                break
            if not part:
                break
            shown += part
    os.close(ours)
    return shown.decode().replace("\r\n", "\n"), process.returncode


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", text)


def only(session):
    session.rollback()
    return session.scalars(select(ScheduledJob)).one()


def count(session):
    session.rollback()
    return session.scalar(select(func.count(ScheduledJob.id)))


def commands(command=main, path=()):
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


# --- the program ------------------------------------------------------------------------------------------------------


def test_help_imports_neither_sqlalchemy_nor_alembic():
    code = """if True:
        import sys
        from future_jobs.cli import main
        for words in ["--help"], ["run", "--help"], ["db", "upgrade", "--help"], ["--version"], []:
            main(words, standalone_mode=False)
        print([name for name in ("sqlalchemy", "alembic", "dateutil", "rich") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_level_has_help_with_an_example(path):
    shown = call(*path, "--help").output
    assert "Usage:" in shown
    if path[:1] != ("db",) or path == ("db",):
        assert "future-jobs " in shown.partition("Example")[2]


def test_every_option_says_what_it_does():
    for path, command in commands():
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, (path, param.name)


def test_short_help_is_not_cut():
    assert "..." not in call("--help").output.partition("Set up:")[0].partition("Plan:")[2]
    assert "..." not in call("db", "--help").output.partition("Options:")[0].partition("Commands:")[2]


def test_no_command_shows_the_help():
    assert call().output == call("--help").output


def test_the_version_names_what_matters_in_a_bug_report():
    shown = call("--version").output
    assert shown.startswith(f"future-jobs {__version__} (Python 3.")
    assert f"SQLAlchemy {version('sqlalchemy')}" in shown


def test_python_dash_m_is_the_program():
    done = program("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == call("--version").output


def test_the_entry_point_is_the_program():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"future-jobs": "future_jobs.cli:main"}


def test_an_unknown_command_is_a_usage_error():
    assert "No such command 'lst'" in call("lst", code=2).stderr


@pytest.mark.parametrize("line", [["list", "--colour"], ["list", "--limit", "-1"], ["show", "x"], ["show", "0"],
                                  ["show", 10**30], ["cancel"], ["list", "--status", "done"]])  # fmt: skip
def test_a_line_that_cannot_be_right_exits_with_2(fj, line):
    assert "Error: " in fj(*line, code=2).stderr


# --- where the jobs are -----------------------------------------------------------------------------------------------


def test_nothing_said_is_an_error_that_lists_the_ways():
    shown = call("list", code=2).stderr
    for way in ("-A ", "--url ", "FUTURE_JOBS_APP", "FUTURE_JOBS_URL", "[tool.future_jobs]", "demo"):
        assert way in shown


@pytest.mark.parametrize("name", ["engine", "Maker", "scoped", "session", "scheduler", "make", "make_engine"])
def test_an_application_is_anything_that_leads_to_a_session(app, name, session):
    call("-A", f"{app}:{name}", "schedule", "1h", "clishop.fine", "[5]")
    assert only(session).args == [5]


def test_an_attribute_may_be_deep(app):
    call("-A", f"{app}:scheduler.session", "list")


def test_options_may_stand_before_or_after_the_command(app):
    before = call("-A", f"{app}:Maker", "--json", "list")
    after = call("list", "-A", f"{app}:Maker", "--json")
    assert before.output == after.output == "[]\n"


def test_the_settings_of_a_scheduler_are_kept(app, session):
    call("-A", f"{app}:scheduler", "schedule", "2026-12-01T09:00", "clishop.fine")
    job = only(session)
    assert job.run_at == datetime(2026, 12, 1, 8, tzinfo=UTC)
    assert job.expires_at - job.run_at == timedelta(days=1)


def test_the_command_line_wins_over_the_settings_of_a_scheduler(app, session):
    call("-A", f"{app}:scheduler", "--timezone", "Asia/Tokyo", "schedule", "2026-12-01T09:00", "clishop.fine")
    job = only(session)
    assert job.run_at == datetime(2026, 12, 1, 0, tzinfo=UTC)
    assert job.expires_at - job.run_at == timedelta(days=1)
    assert (
        "not allowed"
        in call("-A", f"{app}:scheduler", "--allow", "shop", "schedule", "1d", "clishop.fine", code=2).stderr
    )


@pytest.mark.parametrize("variable", ["FUTURE_JOBS_APP", "FUTURE_JOBS_URL"])
def test_the_environment_may_say_it(app, file, variable, monkeypatch):
    monkeypatch.setenv(variable, f"{app}:Maker" if variable.endswith("APP") else f"sqlite:///{file}")
    call("list")


def test_both_of_a_kind_are_refused(app, file, monkeypatch):
    assert "-A and --url are both given" in call("-A", "x:y", "--url", "sqlite://", "list", code=2).stderr
    monkeypatch.setenv("FUTURE_JOBS_APP", "x:y")
    monkeypatch.setenv("FUTURE_JOBS_URL", "sqlite://")
    assert "FUTURE_JOBS_APP and FUTURE_JOBS_URL are both given" in call("list", code=2).stderr


def test_the_command_line_wins_over_the_environment_and_that_over_pyproject(app, file, tmp_path, monkeypatch):
    tmp_path.joinpath("pyproject.toml").write_text("[tool.future_jobs]\napp = 'no.such.module:x'\n")
    assert "no module 'no'" in call("list", code=2).stderr
    monkeypatch.setenv("FUTURE_JOBS_APP", "neither.this:x")
    assert "no module 'neither'" in call("list", code=2).stderr
    call("list", "-A", f"{app}:Maker")


def test_pyproject_is_found_in_a_folder_above_and_its_paths_start_there(app, file, tmp_path, session, monkeypatch):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    settings = tmp_path / "pyproject.toml"
    settings.write_text(f"[tool.future_jobs]\nurl = 'sqlite:///{file.name}'\ntimezone = 'Asia/Tokyo'\n")
    call("schedule", "2026-12-01T09:00", "clishop.fine")
    assert only(session).run_at == datetime(2026, 12, 1, 0, tzinfo=UTC)
    settings.write_text(f"[tool.future_jobs]\napp = '{app}:Maker'\nallow = ['shop.']\n")
    assert "not allowed" in call("schedule", "1d", "clishop.fine", code=2).stderr
    call("schedule", "1d", "clishop.fine", "--allow", "clishop")
    below.joinpath("pyproject.toml").write_text("[project]\nname = 'something.else'\n")
    call("list")


@pytest.mark.parametrize(
    ("table", "words_"),
    [
        ("ap = 'x'", "did you mean 'app'"),
        ("app = 3", "app is 3; make it text"),
        ("allow = 'shop'", 'make it a list such as ["shop."], or "registered"'),
        ("app = 'x:y'\nurl = 'sqlite://'", "are both given"),
        ("app = ", "cannot be read"),
        ("allow = ['registered', 'x']\napp='x:y'", "cannot be combined"),
    ],
)
def test_a_mistake_in_pyproject_is_named(tmp_path, table, words_):
    tmp_path.joinpath("pyproject.toml").write_text(f"[tool.future_jobs]\n{table}\n")
    shown = call("list", code=2).stderr
    assert words_ in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("name", "words_"),
    [
        ("clishop", "There is clishop:Maker"),
        ("clishop:", "There is clishop:Maker"),
        ("clishop:Makr", "has no 'Makr'. There is clishop:Maker"),
        ("clishop.py:Maker", "write clishop:Maker"),
        ("./clishop.py", "write clishop:ATTR"),
        ("clishop:url", "name an Engine"),
        ("clishop:needs", "cannot be called without arguments"),
        ("clishop:breaks", "calling it raised RuntimeError: no settings"),
        ("clishop:coroutine", "coroutine function"),
        ("clishop:an_async_engine", "synchronous"),
        ("clishop:fine", "is 3; name an Engine"),
        ("nothere:x", "there is no module 'nothere' in"),
        ("clishop.nothere:x", "there is no module 'clishop.nothere' in"),
        ("broken:x", "importing broken raised ZeroDivisionError"),
        ("lacking:x", "importing lacking raised ModuleNotFoundError: No module named 'not_installed'"),
        ("leaving:x", "importing leaving raised SystemExit: 4"),
        (":", "is no module; write MODULE:ATTR"),
        (".x:y", "is no module; write MODULE:ATTR"),
        ("", "where are the jobs?"),
    ],
)
def test_an_application_that_is_not_there_is_explained(app, tmp_path, name, words_):
    tmp_path.joinpath("broken.py").write_text("1 / 0\n")
    tmp_path.joinpath("lacking.py").write_text("import not_installed\n")
    tmp_path.joinpath("leaving.py").write_text("raise SystemExit(4)\n")
    shown = call("-A", name, "list", code=2).stderr
    assert words_ in shown


def test_an_error_in_the_application_is_shown_where_it_is(tmp_path):
    tmp_path.joinpath("broken.py").write_text("x = 1\ny = x / 0\n")
    shown = call("-A", "broken:x", "list", code=2).stderr
    assert 'broken.py", line 2' in shown
    assert "future_jobs" not in shown


@pytest.mark.parametrize(
    ("url", "code", "words_"),
    [
        ("jobs.db", 2, "write sqlite:///jobs.db"),
        ("nonsense://x", 2, "no URL of a database"),
        ("postgres://me:hunter2@x/y", 2, "no URL of a database"),
        ("postgresql+psycopg2:///x", 3, "is not installed"),
        ("sqlite:////no/such/folder/x.db", 3, "there is no database /no/such/folder/x.db"),
        ("sqlite:///new.db", 3, "`future-jobs --url sqlite:///new.db db upgrade` makes it"),
    ],
)
def test_a_url_that_does_not_work_is_explained_in_a_line(url, code, words_, tmp_path):
    shown = call("--url", url, "list", code=code).stderr
    assert words_ in shown
    assert "hunter2" not in shown
    assert len(shown.splitlines()) == 1
    assert not tmp_path.joinpath("new.db").exists()


def test_allow_refuses_what_it_does_not_name(fj, session):
    assert "not allowed" in fj("--allow", "shop.", "schedule", "1d", "clishop.fine", code=2).stderr
    fj("--allow", "shop.", "--allow", "clishop.", "schedule", "0s", "clishop.fine")
    shown = fj("run", "--allow", "shop.", code=1)
    assert "CallableRefused" in shown.output
    assert only(session).status == "failed"


def test_registered_allows_only_what_is_decorated(app, session):
    at = ("-A", f"{app}:Maker", "--allow", "registered")
    assert "not registered" in call(*at, "schedule", "1d", "clishop.fine", code=2).stderr
    call(*at, "schedule", "1d", "clishop.named")
    assert only(session).callable_name == "clishop.named"
    assert "cannot be combined" in call(*at, "--allow", "clishop", "list", code=2).stderr


# --- schedule, reschedule ---------------------------------------------------------------------------------------------


def test_schedule_writes_a_job(fj, session):
    options = [
        "--expires",
        "5d",
        "--queue",
        "mail",
        "--priority",
        "7",
        "--max-attempts",
        "3",
        "--timeout",
        "30s",
        "--tag",
        "a",
        "--tag",
        "b",
    ]
    shown = fj("schedule", "3d", "clishop.fine", "[11]", '{"k": 12}', *options).output
    job = only(session)
    assert (job.callable_name, job.args, job.kwargs) == ("clishop.fine", [11], {"k": 12})
    assert (job.queue, job.priority, job.max_attempts, job.tags) == ("mail", 7, 3, ["a", "b"])
    assert job.options == {"timeout": "30s"}
    assert job.expires_at - job.run_at == timedelta(days=5)
    assert abs(job.run_at - datetime.now(UTC) - timedelta(days=3)) < timedelta(minutes=1)
    assert f"Job {job.id} is scheduled: clishop.fine(11, k=12)" in shown
    assert "in 3 days" in shown
    assert "in 8 days" in shown


def test_keys_and_rates_can_be_said_too(fj, session):
    options = ["--backoff", "1m", "--concurrency-key", "k", "--concurrency-limit", 2, "--rate-limit", "100/min"]
    unique = ["--unique-key", "u"]
    fj("schedule", "3d", "clishop.fine", *options, *unique)
    job = only(session)
    assert (job.concurrency_key, job.concurrency_limit, job.unique_key) == ("k", 2, "u")
    assert (job.rate_limit, job.options) == ("100/60s", {"backoff": "1m"})
    session.commit()
    assert f"job {job.id}" in fj("schedule", "5d", "clishop.fine", *unique, code=1).stderr
    fj("schedule", "5d", "clishop.fine", *unique, "--on-conflict", "replace")
    session.refresh(job)
    assert abs(job.run_at - datetime.now(UTC) - timedelta(days=5)) < timedelta(minutes=1)


def test_schedule_takes_a_list_an_object_both_or_neither(fj, session):
    for payload in ([], ["[]"], ["[1]"], ['{"k": 5}'], ['{"k": 5}', "[1]"]):
        fj("schedule", "1d", "clishop.fine", *payload)
    jobs = session.scalars(select(ScheduledJob).order_by(ScheduledJob.id)).all()
    assert [(job.args, job.kwargs) for job in jobs] == [([], {}), ([], {}), ([1], {}), ([], {"k": 5}), ([1], {"k": 5})]


def test_an_object_that_looks_like_a_stored_one_is_kept_as_it_is(fj, session):
    fj("schedule", "0s", "clishop.fail", '[{"!date": "2026-01-01"}]')
    fj("run", code=1)
    assert only(session).error.splitlines()[-1] == "ValueError: {'!date': '2026-01-01'}"


@pytest.mark.parametrize("payload", [["11"], ["x"], ['"x"'], ["[1", "2]"], ["[1]", "[2]"], ["{}", "{}"], ["[NaN]"],
                                     ["null"], ["[" * 100_000], ['{"k": 1}', "3"]])  # fmt: skip
def test_a_payload_that_is_neither_is_refused(fj, session, payload):
    shown = fj("schedule", "1d", "clishop.fine", *payload, code=2).stderr
    assert "write positional arguments as a list" in shown
    assert count(session) == 0


@pytest.mark.parametrize(
    ("line", "words_"),
    [
        (["3", "clishop.fine"], "did you mean '3d'"),
        (["5 parsecs", "clishop.fine"], "when='5 parsecs'"),
        (["2026-02-30T09:00", "clishop.fine"], "2026-02-30"),
        (["3d", "clishop.fin"], "did you mean 'fine'"),
        (["3d", "nothere.fine"], "no module 'nothere'"),
        (["3d", "fine"], "such as 'shop.mail.welcome'"),
        (["3d", "clishop.fine", "[1, 2, 3]"], "the arguments do not fit"),
        (["3d", "clishop.fine", "--expires", "soon"], "expires='soon'"),
        (["3d", "clishop.fine", "--priority", "101"], "priority is 101"),
        (["3d", "clishop.fine", "--max-attempts", "0"], "max_attempts is 0"),
        (["3d", "clishop.fine", "--queue", ""], "queue is ''"),
        (["3d", "clishop.fine", "--timezone", "Europe/Stokholm"], "did you mean 'Europe/Stockholm'"),
    ],
)
def test_what_the_library_refuses_is_a_usage_error_in_a_line(fj, session, line, words_):
    shown = fj("schedule", *line, code=2).stderr
    assert words_ in shown
    assert len(shown.splitlines()) == 1
    assert count(session) == 0


def test_never_is_an_expiry(fj, session):
    assert "never" in fj("schedule", "3d", "clishop.fine", "--expires", "never").output
    assert only(session).expires_at is None


def test_a_dry_run_shows_both_times_and_writes_nothing(fj, session):
    shown = fj(
        "schedule", "--dry-run", "2026-12-24T18:00", "clishop.fine", "[5]", "--timezone", "Europe/Stockholm"
    ).output
    assert "Would schedule clishop.fine(5)" in shown
    assert "2026-12-24 18:00:00 CET   2026-12-24 17:00:00 UTC" in shown
    assert "2026-12-31 18:00:00 CET   2026-12-31 17:00:00 UTC" in shown
    assert "The function is there and takes these arguments. Nothing was written." in shown
    assert count(session) == 0
    assert fj("schedule", "--dry-run", "3d", "clishop.fin", code=2).stdout == ""


def test_a_dry_run_in_json_has_no_id(fj, session):
    shown = json.loads(fj("schedule", "--dry-run", "3d", "clishop.fine", "--json").stdout)
    assert (shown["id"], shown["dry_run"], shown["callable_name"]) == (None, True, "clishop.fine")
    assert count(session) == 0


def test_reschedule_makes_a_copy_counted_from_the_time_of_the_job(fj, session):
    fj("schedule", "2026-12-01T09:00Z", "clishop.fine", "[1]", "--queue", "mail", "--tag", "a")
    assert "Job 2 is scheduled, a copy of job 1: clishop.fine(1)" in fj("reschedule", 1, "3d", "--priority", 5).output
    first, copy = session.scalars(select(ScheduledJob).order_by(ScheduledJob.id)).all()
    assert (first.run_at.day, copy.run_at) == (1, datetime(2026, 12, 4, 9, tzinfo=UTC))
    assert (copy.args, copy.queue, copy.tags, copy.priority) == ([1], "mail", ["a"], 5)
    assert "there is no job 99" in fj("reschedule", 99, "3d", code=1).stderr


# --- cancel, retry ----------------------------------------------------------------------------------------------------


def test_cancel_does_what_it_can_and_says_what_it_cannot(fj, session):
    fj("schedule", "1d", "clishop.fine")
    fj("schedule", "0s", "clishop.fine")
    fj("run")
    done = fj("cancel", 1, 2, 99, code=1)
    assert done.stdout == "Job 1 is cancelled: clishop.fine()\n"
    assert done.stderr == "Error: job 2 is complete, and cannot be cancelled\nError: there is no job 99\n"
    assert session.get(ScheduledJob, 1).status == "cancelled"
    shown = json.loads(fj("cancel", 1, 99, "--json", code=1).stdout)
    assert shown == [
        {"id": 1, "cancelled": False, "status": "cancelled"},
        {"id": 99, "cancelled": False, "status": None},
    ]


def test_cancel_asks_a_running_job_to_stop(fj, session):
    fj("schedule", "0s", "clishop.fine")
    session.execute(text("UPDATE future_jobs_scheduled_job SET status = 'running', attempt = 1"))
    session.commit()
    assert "Job 1 is running, and is asked to stop" in fj("cancel", 1).output
    assert "was asked to stop already" in fj("cancel", 1, code=1).stderr
    assert "It was asked to stop" in fj("show", 1).output


def test_retry_lets_a_failed_job_run_again(fj, session):
    fj("schedule", "0s", "clishop.fail")
    fj("run", code=1)
    assert "Job 1 waits again, due now" in fj("retry", 1).output
    assert "is scheduled, and cannot be retried" in fj("retry", 1, code=1).stderr
    fj("run", code=1)
    assert "due in 2 hours" in fj("retry", 1, "--when", "2h", "--expires", "never").output
    job = only(session)
    assert (job.status, job.expires_at) == ("scheduled", None)
    assert "when='nonsense'" in fj("retry", 1, "--when", "nonsense", code=2).stderr


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_tells_each_job_and_the_sum(fj):
    fj("schedule", "0s", "clishop.fine")
    fj("schedule", "0s", "clishop.later")
    fj("schedule", "0s", "clishop.snooze")
    fj("schedule", "0s", "clishop.fail", "--max-attempts", 2)
    lines = fj("run").output.splitlines()
    assert re.match(r"complete +1 +clishop\.fine  ", lines[0])
    assert re.match(r"complete +2 +clishop\.later  ", lines[1])
    assert re.match(r"snoozed +3 +clishop\.snooze  until 20", lines[2])
    assert re.match(r"retried +4 +clishop\.fail  ValueError: nothing to send; again at 20", lines[3])
    assert re.match(r"4 jobs in .*: 2 complete, 1 snoozed, 1 retried\. They scheduled 1 more\.", lines[4])


def test_run_with_nothing_to_do_says_so(fj):
    assert fj("run").output == "Nothing is due.\n"


def test_a_failure_ends_the_run_with_one_readable_block(fj, session):
    fj("schedule", "0s", "clishop.fail", "--priority", 1)
    fj("schedule", "0s", "clishop.fine")
    done = fj("run", code=1)
    assert "Job 1 failed: clishop.fail" in done.stderr
    assert "ValueError: nothing to send" in done.stderr
    assert "clishop.py" in done.stderr
    assert "future_jobs/passes.py" not in done.stderr
    for command in ("show 1", "retry 1", "run --ignore-errors"):
        assert re.search(rf"  future-jobs --url \S+ {command}", done.stderr)
    assert [job.status for job in session.scalars(select(ScheduledJob).order_by(ScheduledJob.id))] == [
        "failed",
        "scheduled",
    ]


def test_ignore_errors_runs_the_rest_and_still_exits_with_1(fj, session):
    fj("schedule", "0s", "clishop.fail", "--priority", 1)
    fj("schedule", "0s", "clishop.fine")
    assert "1 failed, 1 complete" in fj("run", "-i", code=1).output
    assert session.get(ScheduledJob, 2).status == "complete"


def test_a_handler_that_exits_is_a_failed_job(fj):
    fj("schedule", "0s", "clishop.leave")
    assert "SystemExit: 3" in fj("run", code=1).stderr


def test_delete_completed_deletes_them(fj, session):
    fj("schedule", "0s", "clishop.fine")
    fj("run", "-d")
    assert count(session) == 0


def test_run_heeds_limit_and_queue(fj, session):
    for queue in ("mail", "mail", "slow", "other"):
        fj("schedule", "0s", "clishop.fine", "--queue", queue)
    report = json.loads(fj("run", "--queue", "mail", "--queue", "slow", "--limit", "2", "--json").stdout)
    assert report["complete"] == 2
    assert json.loads(fj("run", "--queue", "slow", "--queue", "mail", "--json").stdout)["complete"] == 1
    assert session.get(ScheduledJob, 4).status == "scheduled"


@pytest.mark.parametrize("as_instant", [False, True])
def test_now_is_another_time(fj, session, as_instant):
    now = (datetime.now(UTC) + timedelta(days=3)).isoformat() if as_instant else "3d"
    fj("schedule", "2d", "clishop.fine")
    fj("schedule", "4d", "clishop.fine")
    assert "1 complete" in fj("run", "--now", now).output
    assert session.get(ScheduledJob, 1).finished_at - datetime.now(UTC) > timedelta(days=2)
    assert "--now='soon'" in fj("run", "--now", "soon", code=2).stderr


def test_what_expires_is_told(fj, session):
    fj("schedule", "1d", "clishop.fine", "--expires", "1h")
    assert re.match(r"expired +1 +clishop\.fine +no use after", fj("run", "--now", "3d").output)
    assert only(session).status == "expired"


def test_quiet_is_silent_unless_something_goes_wrong(fj):
    fj("schedule", "0s", "clishop.fine")
    assert fj("run", "-q").output == ""
    fj("schedule", "0s", "clishop.fail")
    done = fj("run", "-q", "-i", code=1)
    assert done.output.startswith("failed ")


def test_json_is_a_report(fj):
    fj("schedule", "0s", "clishop.fine")
    fj("schedule", "0s", "clishop.fail")
    done = fj("run", "--json", code=1)
    report = json.loads(done.stdout)
    assert (report["complete"], report["failed"], report["job_ids"]) == (1, 1, [1, 2])
    assert report["failures"] == [
        {"id": 2, "callable_name": "clishop.fail", "attempt": 1, "error_type": "ValueError", "error": "nothing to send"}
    ]
    assert done.stderr == ""


def test_nothing_but_json_reaches_standard_output(app, fj):
    fj("schedule", "0s", "clishop.loud")
    done = program("-A", f"{app}:Maker", "run", "--json")
    assert json.loads(done.stdout)["complete"] == 1
    assert "from python\n" in done.stderr
    assert "from a child\n" in done.stderr
    assert json.loads(program("list", "-A", f"{app}:Maker", "--json").stdout)[0]["status"] == "complete"


def test_what_a_handler_prints_is_seen_without_json(app, fj):
    fj("schedule", "0s", "clishop.loud")
    done = program("-A", f"{app}:Maker", "run")
    assert "from a child\n" in done.stdout
    assert "1 complete" in done.stdout


def test_an_interrupt_hands_the_jobs_back_and_exits_with_130(fj, session, tmp_path):
    fj("schedule", "0s", "clishop.slow")
    fj("schedule", "0s", "clishop.fine")
    os.mkfifo(tmp_path / "started")
    pipe = os.open(tmp_path / "started", os.O_RDONLY | os.O_NONBLOCK)
    command = [sys.executable, "-m", "future_jobs", "--url", f"sqlite:///{tmp_path}/jobs.db", "run"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert select_ready([pipe], [], [], 30)[0], "the handler did not start"
        process.send_signal(signal.SIGINT)
        shown = process.communicate(timeout=30)[1]
    os.close(pipe)
    assert process.returncode == 130
    assert "Interrupted." in shown
    assert "Traceback" not in shown
    assert {job.status for job in session.scalars(select(ScheduledJob))} == {"scheduled"}


# --- list, show -------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(fj):
    """Five jobs: complete, failed, waiting, expired, cancelled."""
    fj("schedule", "0s", "clishop.fine", "[1]", "--tag", "a", "--tag", "b")
    fj("schedule", "0s", "clishop.fail", "--queue", "mail", "--tag", "a")
    fj("run", "-i", code=1)
    fj("schedule", "3d", "clishop.later", "--queue", "mail")
    fj("schedule", "1d", "clishop.fine", "--expires", "0s")
    fj("schedule", "1h", "clishop.snooze")
    fj("cancel", 5)
    fj("run", "--now", "1d1h")


def listed(result):
    return [int(line.split()[0]) for line in result.stdout.splitlines()[1:]]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ([], [5, 4, 3, 2, 1]),
        (["--sort", "due"], [1, 2, 5, 4, 3]),
        (["--status", "failed"], [2]),
        (["--status", "failed", "--status", "expired"], [4, 2]),
        (["--queue", "mail"], [3, 2]),
        (["--callable", "clishop.fine"], [4, 1]),
        (["--callable", "clishop"], [5, 4, 3, 2, 1]),
        (["--callable", "clishop."], [5, 4, 3, 2, 1]),
        (["--callable", "*.f*"], [4, 2, 1]),
        (["--callable", "clish"], []),
        (["--callable", "clishop.fail", "--callable", "clishop.later"], [3, 2]),
        (["--tag", "a"], [2, 1]),
        (["--tag", "a", "--tag", "b"], [1]),
        (["--limit", "2"], [5, 4]),
        (["-n", "0"], [5, 4, 3, 2, 1]),
    ],
)
def test_list_filters(fj, several, filters, ids):
    assert listed(fj("list", *filters)) == ids
    assert [job["id"] for job in json.loads(fj("list", *filters, "--json").stdout)] == ids


def test_list_says_when_there_are_more(fj, several):
    assert "There are more" in fj("list", "--limit", "4").stderr
    assert fj("list", "--limit", "5").stderr == ""


def test_list_says_when_there_is_nothing(fj):
    assert fj("list").output == "No jobs.\n"
    assert fj("list", "--queue", "mail").output == "No such jobs.\n"


def test_a_pipe_gets_plain_text_with_nothing_cut(fj, several):
    header, *lines = fj("list").output.splitlines()
    assert header.split() == ["ID", "STATUS", "RUN", "AT", "QUEUE", "CALL", "NOTE"]
    assert any(line.endswith("ValueError: nothing to send") and "clishop.fail" in line for line in lines)
    assert "\x1b" not in fj("list").output


def test_show_has_every_field_and_says_why(fj, several):
    shown = {number: fj("show", number).output for number in range(1, 6)}
    assert "Job 1  complete" in shown[1]
    assert "It ran when it was due" in shown[1]
    assert "returned   3" in shown[1]
    assert "tags       a, b" in shown[1]
    assert "It failed " in shown[2]
    assert "ValueError: nothing to send" in shown[2]
    assert "clishop.py" in shown[2]
    assert "retry 2   # let it run again" in shown[2]
    assert "It waits until it is due, in 3 days." in shown[3]
    assert "cancel 3   # do not run it" in shown[3]
    assert "queue      mail, priority 0" in shown[3]
    assert "of no use after" in shown[4]
    assert "It was cancelled" in shown[5]
    for page in shown.values():
        for label in ("call", "run at", "expires", "attempts", "created"):
            assert re.search(rf"^  {label} ", page, re.MULTILINE)
    assert fj("show", 99, code=1).stderr == "Error: there is no job 99\n"


def test_a_running_job_is_shown_with_how_far_it_is(fj, session):
    fj("schedule", "0s", "clishop.fine")
    job = only(session)
    job.status, job.latest_progress = "running", Progress(0.4, "page 12", datetime.now(UTC))
    session.commit()
    assert re.search(r"progress +40 %, page 12 +now", fj("show", job.id).output)
    assert "40 %, page 12, attempt 0" in fj("list").output
    [shown] = json.loads(fj("--json", "list").output)
    assert (shown["progress"]["fraction"], shown["progress"]["message"]) == (0.4, "page 12")


def test_show_in_json_has_every_column(fj, several):
    shown = json.loads(fj("show", 2, "--json").stdout)
    hidden = {"unique_slot", "limited", "limited_by"}
    assert set(shown) == {*ScheduledJob.__table__.columns.keys()} - hidden | {"failed_attempts", "why"}
    assert shown["why"] == "failed"
    assert (shown["status"], shown["failures"]) == ("failed", 1)
    assert datetime.fromisoformat(shown["run_at"]).tzinfo is not None
    (failure,) = shown["failed_attempts"]
    assert set(failure) == set(JobFailure.__table__.columns.keys())
    assert failure["error_type"] == "ValueError"


def test_a_damaged_row_can_be_looked_at(fj, session):
    fj("schedule", "1d", "clishop.fine")
    session.execute(
        text("UPDATE future_jobs_scheduled_job SET args = '{oops', tags = '7', status = 'weird', options = '[]'")
    )
    session.commit()
    assert "weird" in fj("list").output
    assert "unknown to this version" in fj("show", 1).output
    assert json.loads(fj("show", 1, "--json").stdout)["args"] == {"unreadable": "{oops"}
    assert fj("list", "--tag", "x").output == "No such jobs.\n"


def test_a_late_job_says_that_nobody_runs_it(fj, session):
    fj("schedule", "0s", "clishop.fine")
    earlier = datetime.now(UTC) - timedelta(hours=3)
    only(session).run_at = earlier
    session.commit()
    assert "It is due, since" in fj("show", 1).output
    assert "no worker is registered" in fj("show", 1).output
    assert "due 3 hours ago" in fj("list").output
    only(session).expires_at = earlier + timedelta(hours=1)
    session.commit()
    assert "of no use since 2 hours, and expires at the next run" in " ".join(fj("show", 1).output.split())


def test_nothing_stored_can_steer_the_terminal(fj):
    fj("schedule", "0s", "clishop.fail", r'["\u001b[31mred\u001b]0;title\u0007"]')
    shown = fj("run", code=1).output + fj("list").output + fj("show", 1).output
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert r"\x1b[31mred" in shown


# --- prune ------------------------------------------------------------------------------------------------------------


def test_prune_deletes_old_complete_jobs(fj, session):
    for _ in range(3):
        fj("schedule", "0s", "clishop.fine")
    fj("schedule", "0s", "clishop.fail")
    fj("run", "-i", code=1)
    assert "Deleted 0 jobs" in fj("prune").output
    assert "Would delete 3 jobs" in fj("prune", "--older-than", "0s", "--dry-run").output
    assert count(session) == 4
    assert "Deleted 3 jobs" in fj("prune", "--older-than", "0s").output
    assert only(session).status == "failed"
    shown = json.loads(fj("prune", "--older-than", "0s", "--status", "failed", "--status", "expired", "--json").stdout)
    assert (shown["deleted"], shown["dry_run"]) == (1, False)
    assert session.scalar(select(func.count(JobFailure.id))) == 0


def test_prune_commits_chunk_by_chunk(fj, session, monkeypatch):
    from future_jobs.cli import change

    Scheduler(session).schedule_many("0s", "tests.jobs.record", [{} for _ in range(25)])
    session.commit()
    fj("run", "-q")
    monkeypatch.setattr(change, "CHUNK", 10)
    seen = []
    prune = Scheduler.prune

    def watched(self, *args, **kwargs):
        seen.append(count(session))
        return prune(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "prune", watched)
    assert "Deleted 25 jobs" in fj("prune", "--older-than", "0s").output
    assert seen == [25, 15, 5, 0]


@pytest.mark.parametrize("age", ["soon", "-3d", "9999y", "1e9d", ""])
def test_prune_refuses_an_age_that_is_none(fj, age):
    assert "--older-than=" in fj("prune", "--older-than", age, code=2).stderr


# --- db ---------------------------------------------------------------------------------------------------------------


def test_db_makes_the_tables_and_says_so_once(tmp_path):
    at = ("--url", f"sqlite:///{tmp_path}/new.db")
    assert call(*at, "db", "upgrade").output == "The tables are at revision 0002 now.\n"
    assert call(*at, "db", "upgrade").output == "The tables are at revision 0002 already.\n"
    assert call(*at, "db", "current").output == "0002 (the newest)\n"
    assert call(*at, "db", "check").output == "The tables are as they should be (revision 0002).\n"
    call(*at, "schedule", "0s", "builtins.print")
    assert json.loads(call(*at, "db", "upgrade", "--json").stdout) == {"before": "0002", "after": "0002"}
    assert json.loads(call(*at, "db", "current", "--json").stdout) == {"current": "0002", "head": "0002"}
    assert json.loads(call(*at, "db", "check", "--json").stdout) == {"current": "0002", "differences": []}


def test_missing_tables_are_a_line_with_the_command_that_makes_them(tmp_path):
    path = tmp_path / "empty.db"
    path.touch()
    at = ("--url", f"sqlite:///{path}")
    assert call(*at, "db", "current").output.startswith("There are no tables.")
    for line in (["list"], ["run"], ["schedule", "1d", "builtins.print"], ["show", 1], ["prune"], ["db", "check"]):
        shown = call(*at, *line, code=3).stderr
        assert f"`future-jobs --url sqlite:///{path} db upgrade`" in shown
        assert len(shown.splitlines()) == 1
    for line in (["db", "current"], ["db", "check"]):
        assert "makes it" in call("--url", f"sqlite:///{tmp_path}/none.db", *line, code=3).stderr


def test_tables_of_another_revision_are_refused(fj, session):
    session.execute(text("UPDATE future_jobs_version SET version_num = '9999'"))
    session.commit()
    assert "newer than 0002" in fj("list", code=3).stderr
    assert "newer than 0002" in fj("db", "upgrade", code=3).stderr


def test_db_check_names_what_was_changed_by_hand(fj, session):
    session.execute(text("ALTER TABLE future_jobs_scheduled_job ADD COLUMN extra TEXT"))
    session.commit()
    done = fj("db", "check", code=3)
    assert "extra" in done.stdout
    assert "changed by hand" in done.stderr


def test_db_sql_connects_to_nothing(tmp_path):
    for kind in ("sqlite", "postgresql", "mysql"):
        assert "CREATE TABLE future_jobs_scheduled_job" in call("--url", f"{kind}://", "db", "sql").output
    assert "CREATE" not in call("--url", "sqlite://", "db", "sql", "--since", "0002").output
    assert "CREATE TABLE" in json.loads(call("--url", "sqlite:///none.db", "db", "sql", "head", "--json").stdout)["sql"]
    assert not tmp_path.joinpath("none.db").exists()
    assert "there is no revision '7'" in call("--url", "sqlite://", "db", "sql", "7", code=3).stderr


def test_db_sql_knows_the_dialect_of_an_application(app):
    assert "AUTOINCREMENT" in call("-A", f"{app}:engine", "db", "sql").output


def test_a_database_that_is_no_database_is_a_line(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database at all, only some text\n" * 50)
    shown = call("--url", f"sqlite:///{path}", "list", code=3).stderr
    assert "file is not a database" in shown
    assert len(shown.splitlines()) == 1


def test_a_database_that_is_busy_is_a_line(file, app, tmp_path):
    tmp_path.joinpath("hasty.py").write_text(
        "from sqlalchemy import create_engine\n"
        f"engine = create_engine('sqlite:///{file}', connect_args={{'timeout': 0.05}})\n"
    )
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        shown = call("-A", "hasty:engine", "schedule", "1d", "clishop.fine", code=3).stderr
    engine.dispose()
    sys.modules.pop("hasty").engine.dispose()
    assert "the database is busy" in shown


# --- every database ---------------------------------------------------------------------------------------------------


def test_the_whole_life_of_a_job_on_every_database(shared_url, app):
    def on(*line, code=0):
        return call("--url", shared_url, *line, code=code)

    job = json.loads(on("schedule", "0s", "clishop.fail", "--tag", "a", "--json").stdout)["id"]
    assert "1 failed" in on("run", code=1).stdout
    assert listed(on("list", "--status", "failed", "--tag", "a", "--callable", "clishop")) == [job]
    assert "ValueError: nothing to send" in on("show", job).output
    on("retry", job)
    on("cancel", job)
    copy = json.loads(on("reschedule", job, "1d", "--json").stdout)["id"]
    assert json.loads(on("run", "--now", "2d", "-i", "--json", code=1).stdout)["job_ids"] == [copy]
    assert json.loads(on("prune", "--older-than", "0s", "--status", "cancelled", "--json").stdout)["deleted"] == 1
    assert on("db", "check").output.startswith("The tables are as they should be")


# --- in a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_gets_colours_and_a_table_that_fits(fj, file, several, columns):
    shown, code = in_terminal("--url", f"sqlite:///{file}", "list", columns=columns)
    assert code == 0
    assert "\x1b[" in shown
    lines = plain(shown).splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) == 6


def test_no_color_is_heeded(fj, file, several):
    for line in (["list"], ["show", 2], ["run"]):
        assert "\x1b[3" not in in_terminal("--url", f"sqlite:///{file}", *line, NO_COLOR="1")[0]


def test_a_terminal_is_told_what_is_next(fj, file, several):
    shown, _ = in_terminal("--url", f"sqlite:///{file}", "run")
    assert "Nothing is due.\nThe next is due in 3 days, at 20" in plain(shown)


def test_without_rich_the_table_fits_as_well(fj, several, monkeypatch):
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    monkeypatch.setattr(output, "width", lambda: 60)
    monkeypatch.setenv("TERM", "xterm")
    shown = runner().invoke(main, ["-A", "clishop:Maker", "list"], color=True)
    lines = plain(shown.output).splitlines()
    assert max(map(len, lines)) <= 60
    assert "\x1b[" in shown.output
    assert "…" in plain(shown.output)


def test_long_work_shows_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    ticks = iter(range(1000))
    monkeypatch.setattr(output, "monotonic", lambda: next(ticks) / 4)
    with output.Progress("Deleting", lambda: 40) as progress:
        for _ in range(4):
            progress.advance(10)
    shown = capsys.readouterr().err
    assert "Deleting [######" in shown
    assert "30 of 40" in shown
    assert shown.endswith("\r\x1b[K")


def test_no_progress_where_nobody_watches(capsys):
    with output.Progress("Deleting", lambda: pytest.fail("not counted for nobody")) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words_"),
    [(0.0, "0 ms"), (0.0123, "12 ms"), (1, "1 s"), (1.54, "1.5 s"), (59, "59 s"), (119, "119 s"), (120, "2 minutes"),
     (3600, "60 minutes"), (7200, "2 hours"), (86400, "24 hours"), (172799.99, "2 days"), (86400 * 60, "2 months"),
     (86400 * 800, "2 years")],
)  # fmt: skip
def test_a_span_has_about_two_digits(seconds, words_):
    assert words.span(timedelta(seconds=seconds)) == words_


def test_stored_values_read_like_python():
    assert words.value_words([1, {"!date": "2026-01-01"}, {"!object": ["shop:Order", [7]]}, {"k": None}]) == (
        "[1, date('2026-01-01'), Order(7), {'k': None}]"
    )


def test_a_lost_worker_is_explained(fj, session):
    fj("schedule", "0s", "clishop.fine")
    job = only(session)
    job.status, job.attempt, job.started_at = "running", 1, datetime.now(UTC) - timedelta(hours=5)
    job.leased_by, job.leased_until = "far:1:x", datetime.now(UTC) - timedelta(hours=4)
    session.commit()
    shown = " ".join(fj("show", 1).output.split())
    assert (
        "Attempt 1 runs since 5 hours, by far:1:x. The lease has ended, 4 hours ago: the worker is probably gone"
        in shown
    )
    assert "taken back from far:1:x" in fj("run").stderr


# --- the manual -------------------------------------------------------------------------------------------------------

MANUAL = (ROOT / "docs" / "cli.md").read_text()


def section(name):
    return MANUAL.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", [path for path, command in commands() if path], ids=" ".join)
def test_the_manual_has_every_command_and_option(path):
    command = dict(commands())[path]
    place = section(path[0])
    assert f"future-jobs {' '.join(path)}" in place
    for param in command.params:
        names = param.opts if isinstance(param, click.Option) else [(param.metavar or param.name.upper()).strip("[].")]
        for name in names:
            assert f"`{name}" in (place if param.expose_value else section("Where the jobs are")) + place, name


def test_the_manual_has_no_option_that_is_not_there():
    known = {name for _, command in commands() for param in command.params for name in param.opts} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", MANUAL)) <= known
