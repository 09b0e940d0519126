"""The house has an order: a room imports only from the rooms above it. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "future_jobs"

# From the ground up; CONTRIBUTING.md says what each is for. `__init__` is the door, and opens each when it is used.
ORDER = (
    "errors",
    "status",
    "times",
    "events",
    "retries",
    "rates",
    "options",
    "callables",
    "payloads",
    "patterns",
    "rrules",
    "recurrence",
    "plans",
    "dialects",
    "models",
    "statements",
    "notify_statements",
    "claim_statements",
    "bulk",
    "unique_statements",
    "tick_statements",
    "limit_statements",
    "limits",
    "lifecycle",
    "sessions",
    "units",
    "patience",
    "filewatch",
    "wakeups",
    "watches",
    "ticks",
    "interruption",
    "execution",
    "performing",
    "passes",
    "explaining",
    "schedules",
    "scheduler",
    "schema",
    "alembic",
    "leases",
    "slots",
    "claims",
    "runners",
    "sources",
    "stations",
    "farm",
    "loops",
    "worker",
    "testing",
    "contrib",
    "demo",
    "cli",
    "__main__",
)

# Imports inside functions, which the order of loading does not show: (room, what is imported), and why.
LATE = {
    ("models", "future_jobs"): "job.reschedule() asks the public face for the Scheduler, which is above it",
    ("cli", "*"): "a command loads what it needs, so that --help and completion answer at once",
}

# They use the library as anybody does: `from future_jobs import Scheduler`.
AT_THE_DOOR = {"contrib", "demo", "cli", "__main__"}

# Rooms that may import an optional or heavy package. Whoever imports the library pays for nothing else.
ONLY_IN = {
    "alembic": {"schema", "alembic"},
    "click": {"cli", "demo"},
    "rich": {"cli", "demo"},
    "cronsim": {"recurrence"},
    "sqlalchemy.ext.asyncio": {"aio"},
    "sqlalchemy.dialects": {"dialects"},
    "sqlite3": {"dialects", "demo"},
    "psycopg": set(),  # the drivers are SQLAlchemy's business
    "pymysql": set(),
    "aiosqlite": set(),
    "greenlet": set(),
}

DIALECT = re.compile(r"(?<![A-Za-z])(sqlite|postgresql|mysql|mariadb)(?![A-Za-z])")
SPELLS_DIALECTS = {
    "dialects": "its purpose",
    "schema": "a message shows an example of a URL, and alembic's options are named after dialects",
    "demo": "makes its own SQLite file",
    "cli": "help texts show example URLs",
}
SPELLS_SQL = {
    "dialects": "what begins a transaction differs by database",
    "statements": "its purpose",
    "notify_statements": "its purpose",
    "schema": "the upgrade lock and its transaction",
    "demo": "shows VACUUM INTO",
}
PRINTS = {"cli", "demo"}
LOOKS_AT_THE_CLOCK = {
    "times": "its purpose",
    "demo": "an application, that passes its own time on",
}


def _rooms() -> list[str]:
    """Return the name of each module, or folder of modules, in the package."""
    files = [path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    folders = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    return sorted([*files, *folders])


@cache
def _trees(room: str) -> tuple[tuple[Path, ast.Module], ...]:
    folder = PACKAGE / room
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return tuple((path, ast.parse(path.read_text("utf-8"), str(path))) for path in paths)


def _nodes(room: str) -> Iterator[ast.AST]:
    for _, tree in _trees(room):
        yield from ast.walk(tree)


def _imports(room: str, within: type | tuple[type, ...] = ast.Module) -> Iterator[tuple[str, str]]:
    """Yield where each import stands, and the full name: ``from .a import b`` is ``future_jobs.a.b``."""
    for path, tree in _trees(room):
        parents = path.relative_to(ROOT).parent.parts
        for outer in ast.walk(tree):
            for node in ast.walk(outer) if isinstance(outer, within) else ():
                for name in _names(node, parents):
                    yield f"{path.name}:{node.lineno}", name


def _names(node: ast.AST, parents: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = parents[: len(parents) - node.level + 1] if node.level else ()
        yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def _is_from(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _room_of(name: str) -> str:
    """Return the room that a name of ours is in; ``future_jobs`` for what comes through the door."""
    part = name.split(".")[1] if "." in name else "future_jobs"
    return part if part in _rooms() else "future_jobs"


def _rooms_used(room: str) -> set[str]:
    """Return the rooms that one imports from anywhere in it, type-checking blocks included."""
    return {_room_of(name) for _, name in _imports(room) if _is_from(name, "future_jobs")} - {room}


def _docstrings(room: str) -> set[int]:
    found = set()
    for node in _nodes(room):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


each_room = pytest.mark.parametrize("room", _rooms())


def test_every_room_has_its_place():
    assert sorted(ORDER) == _rooms()


def test_the_contributors_page_draws_the_same_order():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    drawn = re.search(r"```text\n(errors .*?)```", text, re.DOTALL)
    assert drawn is not None
    assert tuple(line.split()[0].removesuffix(".py") for line in drawn[1].splitlines()) == ORDER


@each_room
def test_a_room_imports_only_from_rooms_above_it(room):
    above = {*ORDER[: ORDER.index(room)]}
    excused = {used for late, used in LATE if late == room} | ({"future_jobs"} if room in AT_THE_DOOR else set())
    assert _rooms_used(room) - above - excused == set()


@each_room
def test_an_import_inside_a_function_has_a_reason(room):
    late = _imports(room, (ast.FunctionDef, ast.AsyncFunctionDef))
    ours = [(where, _room_of(name)) for where, name in late if _is_from(name, "future_jobs")]
    if (room, "*") not in LATE:
        assert [(where, used) for where, used in ours if (room, used) not in LATE] == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_only_in_the_rooms_that_need_it(package):
    found = {room for room in _rooms() for _, name in _imports(room) if _is_from(name, package)}
    assert found <= ONLY_IN[package]


@each_room
def test_no_room_reaches_into_the_private_parts_of_another(room):
    ours = [name for _, name in _imports(room) if _is_from(name, "future_jobs") and _room_of(name) != room]
    assert [name for name in ours if re.search(r"\._(?!_)", name)] == []


@pytest.mark.parametrize("room", [room for room in _rooms() if room not in SPELLS_DIALECTS])
def test_only_dialects_spells_the_name_of_a_database(room):
    prose = _docstrings(room)
    spelled = [
        (node.lineno, node.value)
        for node in _nodes(room)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if DIALECT.search(node.value)
    ]
    keywords = [
        (node.value.lineno, node.arg)
        for node in _nodes(room)
        if isinstance(node, ast.keyword) and node.arg and DIALECT.match(node.arg)
    ]
    assert spelled + keywords == []


@pytest.mark.parametrize("room", [room for room in _rooms() if room not in SPELLS_SQL])
def test_no_other_room_writes_sql_as_text(room):
    assert [where for where, name in _imports(room) if name in {"sqlalchemy.text", "sqlalchemy.sql.text"}] == []
    assert [n.lineno for n in _nodes(room) if isinstance(n, ast.Attribute) and n.attr == "exec_driver_sql"] == []


@pytest.mark.parametrize("room", [room for room in _rooms() if room not in PRINTS])
def test_only_the_command_line_prints(room):
    calls = [node for node in _nodes(room) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [call.lineno for call in calls if call.func.id == "print"] == []


@pytest.mark.parametrize("room", [room for room in _rooms() if room not in LOOKS_AT_THE_CLOCK])
def test_now_is_an_argument(room):
    looks = {("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today"), ("time", "time")}
    reads = [
        node.lineno
        for node in _nodes(room)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in looks
    ]
    assert reads == []


@pytest.mark.parametrize(
    "revision", sorted((ROOT / "migrations" / "versions").glob("*.py")), ids=lambda path: path.stem
)
def test_a_revision_depends_on_nothing_that_moves(revision):
    tree = ast.parse(revision.read_text("utf-8"))
    ours = [name for node in ast.walk(tree) for name in _names(node) if _is_from(name, "future_jobs")]
    assert [name for name in ours if not _is_from(name, "future_jobs.dialects")] == []
