"""The demo: what it shows must be so."""

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from future_jobs import JobFailure, ScheduledJob, UsageError, demo
from future_jobs.cli import main
from tests.test_cli import in_terminal, plain, runner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """What was told, and the summary."""
    lines = []
    summary = demo.play(tmp_path_factory.mktemp("demo") / "tour.db", lines.append)
    return lines, summary


@pytest.fixture
def session(tour):
    engine = create_engine(tour[1].url)
    with Session(engine) as session:
        yield session
    engine.dispose()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def demo_command(*line, code=0):
    result = runner().invoke(main, ["demo", "--quick", *line])
    assert result.exit_code == code, result.output
    return result


def test_the_month_has_every_kind_of_end(session):
    ends = {job.status for job in session.scalars(select(ScheduledJob))}
    assert ends == {"complete", "expired", "cancelled", "scheduled"}
    assert {failure.error_type for failure in session.scalars(select(JobFailure))} == {"ValueError", "ConnectionError"}


def test_letters_are_those_of_complete_jobs_and_of_no_others(session):
    complete = {job.id for job in session.scalars(select(ScheduledJob).where(ScheduledJob.status == "complete"))}
    written = [letter.job_id for letter in session.scalars(select(demo.Letter))]
    assert set(written) <= complete
    assert len(written) == len(set(written))


def test_a_customer_who_was_refused_left_no_jobs(session):
    known = {str(customer.id) for customer in session.scalars(select(demo.Customer))}
    bound = {job.content_key.strip("[]") for job in session.scalars(select(ScheduledJob)) if job.content_key}
    assert bound == known


def test_the_job_that_failed_was_retried_and_completed(tour, session):
    job = session.get(ScheduledJob, tour[1].failed_once)
    assert (job.status, job.attempt) == ("complete", 2)
    assert job.content_object.email.startswith("hello@")


def test_the_job_that_came_too_late_was_not_run(tour, session):
    job = session.get(ScheduledJob, tour[1].expired)
    assert (job.status, job.attempt) == ("expired", 0)
    assert job.finished_at > job.expires_at


def test_the_backup_is_a_whole_database(tour, session):
    with closing(sqlite3.connect(tour[1].backup)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (letters,) = copy.execute("SELECT count(*) FROM demo_letter").fetchone()
    last = session.scalars(select(demo.Backup).order_by(demo.Backup.id.desc())).first()
    assert (last.letters, last.size) == (letters, Path(tour[1].backup).stat().st_size)
    assert session.get(ScheduledJob, tour[1].waiting).run_at == last.next_at


def test_the_telling_is_what_the_database_says(tour, session):
    lines, summary = tour
    assert [line.day for line in lines] == sorted(line.day for line in lines)
    text = "\n".join(line.text for line in lines)
    for customer in session.scalars(select(demo.Customer)):
        assert customer.name in text
    for failure in session.scalars(select(JobFailure)):
        assert failure.traceback.strip().splitlines()[-1] in text
    assert summary.letters == len(session.scalars(select(demo.Letter)).all())
    assert sum(summary.jobs.values()) == len(session.scalars(select(ScheduledJob)).all())


def test_the_commands_at_the_end_work_elsewhere_in_another_process(tmp_path):
    shown = demo_command("--path", str(tmp_path / "a demo.db")).output
    there = tmp_path / "elsewhere"
    there.mkdir()
    lines = [line.strip() for line in shown.partition("Look further\n")[2].splitlines() if not line.startswith("  #")]
    assert len(lines) == 6
    for line in lines:
        name, *rest = shlex.split(line)
        assert name == "future-jobs"
        done = subprocess.run(
            [sys.executable, "-m", "future_jobs", *rest], cwd=there, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), line
        assert done.stdout
    assert not list(there.iterdir())


def test_an_earlier_demo_is_made_anew(tmp_path):
    first = json.loads(demo_command("--json").stdout)
    second = json.loads(demo_command("--json").stdout)
    assert first == {**second, "url": first["url"]}
    assert first["path"] == str(tmp_path / "future-jobs-demo.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["future-jobs-demo-backup.db", "future-jobs-demo.db"]


@pytest.mark.parametrize("name", ["mine.db", "mine-backup.db"])
@pytest.mark.parametrize("kind", ["text", "empty", "sqlite", "folder"])
def test_a_foreign_file_is_left_alone(tmp_path, name, kind):
    path = tmp_path / name
    match kind:
        case "text":
            path.write_text("precious")
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "sqlite":
            with closing(sqlite3.connect(path)) as database:
                database.execute("CREATE TABLE precious (id)")
    before = None if kind == "folder" else path.read_bytes()
    shown = demo_command("--path", str(tmp_path / "mine.db"), code=2)
    assert (shown.stdout, path.exists()) == ("", True)
    assert kind == "folder" or path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="there is no folder"):
        demo.play(Path("no/such/folder/x.db"), print)


@pytest.mark.parametrize("name", ["x?mode=ro.db", "50%.db", "a b#c.db", "ü'\".db"])
def test_a_strange_name_works_as_a_url_or_is_refused(tmp_path, name):
    shown = runner().invoke(main, ["demo", "--json", "--path", name])
    if shown.exit_code == 2:
        assert "cannot be written as a database URL" in shown.stderr
        return
    assert runner().invoke(main, ["--url", json.loads(shown.stdout)["url"], "show", "1"]).exit_code == 0
    assert tmp_path.joinpath(name).exists()


def test_in_a_terminal_it_is_over_soon_and_fits(tmp_path):
    shown, code = in_terminal("demo", "--path", tmp_path / "t.db", columns=80)
    lines = plain(shown).partition("Now: ")[0].splitlines()
    assert code == 0
    assert max(map(len, lines[2:])) <= 80
    assert "\x1b[32m" in shown
    assert float(plain(shown).partition(" passes, ")[2].partition(" s.")[0]) < 20


def test_the_customers_come_with_the_package():
    hatch = pytest.importorskip("hatchling.builders.wheel")
    shipped = {file.relative_path for file in hatch.WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"future_jobs/demo/customers.csv", "future_jobs/cli/__init__.py", "future_jobs/__main__.py"} <= shipped
