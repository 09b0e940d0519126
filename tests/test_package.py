"""What `import future_jobs` costs, what it offers, and what the wheel holds."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import future_jobs
from future_jobs import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "future_jobs"
ROOMS = sorted(
    [
        *(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")),
        *(path.parent.name for path in PACKAGE.glob("*/__init__.py")),
    ]
)


def loaded_by(code):
    """Return the modules that a new process has loaded after running ``code``."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return set(run.stdout.split())


@cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_importing_the_package_loads_next_to_nothing():
    loaded = loaded_by("import future_jobs") - loaded_by("import typing, importlib")
    assert {name for name in loaded if name.startswith("future_jobs")} == {"future_jobs"}
    assert loaded & {"sqlalchemy", "alembic", "click", "cronsim", "dateutil", "rich", "asyncio"} == set()


@pytest.mark.parametrize("name", ["Scheduler", "ScheduledJob", "job", "current_job", "RunReport"])
def test_a_name_loads_neither_alembic_nor_click_nor_what_asyncio_needs(name):
    loaded = loaded_by(f"from future_jobs import {name}")
    assert loaded & {"alembic", "click", "rich", "sqlalchemy.ext.asyncio", "psycopg", "pymysql"} == set()


def test_making_the_tables_loads_no_alembic():
    code = "import future_jobs, sqlalchemy; future_jobs.create_tables(sqlalchemy.create_engine('sqlite://'))"
    assert loaded_by(code) & {"alembic", "click", "rich", "cronsim"} == set()


def test_catching_an_error_loads_no_database():
    assert "sqlalchemy" not in loaded_by("from future_jobs import FutureJobsError, InvalidTime, Status")


@pytest.mark.parametrize("name", future_jobs.__all__)
def test_every_public_name_is_there(name):
    assert getattr(future_jobs, name) is getattr(future_jobs, name)
    assert name in dir(future_jobs)


@pytest.mark.parametrize("name", errors.__all__)
def test_the_whole_tree_of_errors_is_at_the_top(name):
    found = getattr(errors, name)
    if isinstance(found, type):
        assert issubclass(found, errors.FutureJobsError)
        assert getattr(future_jobs, name) is found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'future_jobs' has no attribute 'Schedular'"):
        future_jobs.Schedular


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    declared = {
        (node.module, alias.name): alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert {name for _, name in declared} >= {*future_jobs.__all__} - {"__version__"}
    for (room, name), exported in declared.items():
        assert exported == name  # the form that makes a name public
        assert getattr(import_module(f"future_jobs.{room}"), name) is getattr(future_jobs, name)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_offers(room):
    module = import_module(f"future_jobs.{room}")
    assert (module.__doc__ or "").strip()
    assert module.__all__ == [*dict.fromkeys(module.__all__)]
    for name in module.__all__:
        offered = getattr(module, name)
        if inspect.isfunction(offered) or (inspect.isclass(offered) and offered.__module__ == module.__name__):
            assert inspect.getdoc(offered), name


def test_the_version_is_told_once():
    assert future_jobs.__version__ == project()["version"]


def test_the_changelog_has_a_section_for_the_version():
    assert f"\n## [{future_jobs.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_drivers_of_databases_are_optional():
    core = " ".join(project()["dependencies"]).lower()
    assert [name for name in ("psycopg", "pymysql", "aiosqlite", "greenlet", "asyncio", "rich") if name in core] == []
