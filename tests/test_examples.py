"""The programs in ``examples/`` work; those that need a web framework, where it is installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import future_jobs
from future_jobs import callables
from tests import asgi

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import an example in an empty folder, and forget it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(callables, "_registered", dict(callables._registered))
    loaded = []

    def load(name, needs):
        pytest.importorskip(needs, reason=f"{needs} is not installed; examples/{name}.py was not run")
        loaded.append(importlib.import_module(name))
        return loaded[-1]

    yield load
    for module in loaded:
        module.engine.dispose()
        del sys.modules[module.__name__]


def test_the_script_reminds_every_day_until_the_thing_is_done(tmp_path):
    where = {**os.environ, "PYTHONPATH": str(Path(future_jobs.__file__).parent.parent)}

    def script(*words):
        command = [sys.executable, EXAMPLES / "script.py", *words]
        done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert script("add", "Water the plants", "3d")[0].startswith("1: Water the plants; a reminder at ")
    assert script("run") == []
    assert script("run", "--in", "3d") == ["1: Water the plants"]
    assert script("run", "--in", "3d") == []
    assert script("run", "--in", "4d") == ["1: Water the plants"]
    script("done", "1")
    assert script("run", "--in", "5d") == []
    assert script("list") == ["1: Water the plants; done"]


def test_the_flask_app_reminds_of_orders_that_are_not_paid(load):
    shop = load("flask_app", "flask")
    client = shop.app.test_client()
    for customer in ("Ada", "Grace"):
        assert client.post(f"/orders/{customer}").status_code == 201
    client.post("/orders/2/pay")

    assert shop.app.test_cli_runner().invoke(args=["run-jobs"]).output == "0 complete, 0 failed, 0 expired\n"
    report = shop.scheduler.run_due(now=datetime.now(UTC) + timedelta(days=3))
    shop.session.remove()

    assert report.complete == 1
    orders = [client.get(f"/orders/{number}").json for number in (1, 2)]
    assert [order["reminders"] for order in orders] == [1, 0]
    assert [[job["status"] for job in order["jobs"]] for order in orders] == [
        ["complete", "scheduled"],
        ["cancelled", "cancelled"],
    ]
    assert client.get("/orders/3").status_code == 404


def test_the_fastapi_app_makes_reports_in_its_own_thread(load):
    reports = load("fastapi_app", "fastapi")
    with asgi.served(reports.app) as request:
        assert request("POST", "/reports?year=2026") == (202, {"id": 1, "status": "scheduled"})
        deadline = time.monotonic() + 30
        while (answer := request("GET", "/reports/1"))[1]["status"] != "complete":
            assert time.monotonic() < deadline, answer
        assert answer[1]["report"]["January"] == 4
        assert request("GET", "/reports/2")[0] == 404


def test_every_example_is_tested():
    here = Path(__file__).read_text("utf-8")
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'"{path.stem}' not in here] == []
