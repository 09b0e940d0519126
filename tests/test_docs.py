"""The pages say what the code does: every example in them runs, and what there is to know is in them."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

import future_jobs
from future_jobs import Scheduler, callables, errors, events, plans, schedules
from future_jobs.cli import main
from future_jobs.options import JobOptions

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Part:
    """A piece of a page that is run: a ``python`` block, or text that may have ``>>>`` examples in it.

    A block with ``title="shop.py"`` is a file, which is written and imported. One with ``needs="flask"`` is run only
    where that package is; there may be several, with commas.
    """

    text: str
    line: int
    is_block: bool
    title: str | None = None
    needs: str | None = None


def parts_of(page: str) -> list[Part]:
    found, end = [], 0

    def add(start, text, **rest):
        found.append(Part(text, page.count("\n", 0, start), **rest))

    for fence in FENCE.finditer(page):
        language, info, body = fence.groups()
        add(end, page[end : fence.start()], is_block=False)
        said = dict(re.findall(r'(\w+)="([^"]+)"', info))
        if language in {"pycon", "python"}:
            add(fence.start(3), body, is_block=language == "python", title=said.get("title"), needs=said.get("needs"))
        end = fence.end()
    add(end, page[end:], is_block=False)
    return found


def run_examples(part, name, namespace):
    examples = doctest.DocTestParser().get_examples(part.text, name)
    test = doctest.DocTest(examples, {}, f"{name}:{part.line}", name, part.line, None)
    test.globs = namespace  # not a copy: the parts of a page share it
    complaints: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=complaints.append, clear_globs=False)
    assert not complaints, "".join(complaints)


def run_block(part, name, namespace):
    if part.title is not None:
        Path(part.title).write_text(part.text, "utf-8")
        importlib.invalidate_caches()
        importlib.import_module(Path(part.title).stem)
        return
    code = compile("\n" * part.line + part.text, name, "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, namespace)


def run_page(page, namespace, needs=None):
    for part in parts_of(page.read_text("utf-8")):
        if part.needs not in {None, needs}:
            continue
        run = run_block if part.is_block else run_examples
        run(part, str(page.relative_to(ROOT)), namespace)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder to work in, from which modules are imported and of which nothing is left afterwards."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(callables, "_registered", dict(callables._registered))
    monkeypatch.setattr(events, "_listeners", dict(events._listeners))
    monkeypatch.setattr(plans, "DECLARED", {})
    monkeypatch.setattr(schedules, "DECLARED", plans.DECLARED)
    namespace = {"__name__": "__docs__"}
    yield namespace
    made = [module for module in sys.modules.values() if str(folder) in str(getattr(module, "__file__", None))]
    values = [value for each in (namespace, *map(vars, made)) for value in each.values()]
    for value in values:
        if isinstance(value, Session):
            value.close()
    for value in values:
        if isinstance(value, Engine):
            value.dispose()
    for module in made:
        del sys.modules[module.__name__]


def named(pages):
    return [pytest.param(page, id=page.name) for page in pages]


# --- what is in them works ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", named(PAGES))
def test_every_example_on_the_page_does_what_the_page_says(page, desk):
    run_page(page, desk)


NEEDS = [
    pytest.param(page, needs, id=f"{page.name}-{needs}")
    for page in PAGES
    for needs in sorted({part.needs for part in parts_of(page.read_text("utf-8")) if part.needs})
]


@pytest.mark.parametrize(("page", "needs"), NEEDS)
def test_every_example_that_needs_a_package_works_where_it_is(page, needs, desk):
    for package in needs.split(","):
        pytest.importorskip(package, reason=f"{package} is not installed; its examples on {page.name} were not run")
    run_page(page, desk, needs=needs)


def test_the_seed_holds_on_every_database(session, calls):
    run_page(ROOT / "tests" / "scheduled_jobs.md", {"session": session})


def test_a_wrong_example_is_noticed(tmp_path, desk, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "wrong.md"
    page.write_text("```python\nn = 1\n```\n\n```pycon\n>>> n\n2\n\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)line 6.*Got:\s+1"):
        run_page(page, desk)


@pytest.mark.parametrize("page", named(PAGES))
def test_fences_say_what_is_in_them(page):
    text = page.read_text("utf-8")
    odd = [line for line in re.findall(r"^```.*$", text, re.MULTILINE)[::2] if line == "```"]
    assert not odd, f"{len(odd)} blocks have no language; mark what cannot be run as text or console"
    for language, _, body in FENCE.findall(text):
        if language == "pycon":
            assert body.endswith("\n\n"), f"no empty line before the end of the block:\n{body}"
        else:
            assert ">>> " not in body, f"this block is never run; mark it as pycon:\n{body}"


# --- what should be in them is ------------------------------------------------------------------------------------


def code_in(pages):
    """Everything that the pages print as code."""
    text = "\n".join(page.read_text("utf-8") for page in pages)
    blocks = [body for _, _, body in FENCE.findall(text)]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))])


def rows_of(page):
    """The first cells of the tables of a page that are one word of code, and the rest of their rows."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    return dict(re.findall(r"^\| `(\w+)` +\|(.*)\|$", text, re.MULTILINE))


def test_every_event_is_documented():
    assert sorted(rows_of("events.md")) == sorted(events.EVENTS)


def test_events_carry_what_the_page_says():
    said = re.findall(r"^``(\w+)`` +``([\w, ]+)``", events.__doc__, re.MULTILINE)
    data = {name: re.findall(r"`(\w+)`", row.partition("|")[0]) for name, row in rows_of("events.md").items()}
    assert data == {name: names.split(", ") for name, names in said}


def test_every_option_is_documented():
    assert sorted(rows_of("options.md")) == sorted(JobOptions.__annotations__)


def test_every_error_is_documented():
    code = code_in([ROOT / "docs" / "errors.md"])
    tree = [name for name in errors.__all__ if name[0].isupper() and name != "SHOWN"]
    assert [name for name in tree if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize("name", future_jobs.__all__)
def test_every_public_name_is_documented(name):
    assert re.search(rf"(?<!\w){name}\b", code_in(PAGES))


@pytest.mark.parametrize("name", [name for name in dir(Scheduler) if name[0] != "_"])
def test_every_method_of_the_scheduler_is_documented(name):
    assert re.search(rf"\b(scheduler|jobs|Scheduler)\.{name}\(|(?<!\w){name}\(", code_in(PAGES))


@pytest.mark.parametrize("page", named(PAGES))
def test_commands_that_pages_show_exist(page):
    shown = re.findall(r"future-jobs(?: (?:-A|--app|--url|--allow) \S+)* ([a-z][a-z-]*)", code_in([page]))
    assert [command for command in shown if command not in main.commands] == []


def test_the_state_chart_is_that_of_the_table_of_transitions():
    tool = runpy.run_path(str(ROOT / "docs" / "_chart.py"))
    page = tool["PAGE"].read_text("utf-8")
    assert tool["chart"]() in page, "run python docs/_chart.py"


# --- the map ------------------------------------------------------------------------------------------------------


def anchors_of(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", FENCE.sub("", page.read_text("utf-8")))
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name} links to {path}#{anchor}"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert [page.name for page in DOCS if page.name != "index.md" and f"]({page.name})" not in index] == []
