"""Where the jobs are: the application or the database that a command line, the environment or pyproject.toml names."""

from __future__ import annotations

import inspect
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from future_jobs.errors import SchemaError, shown

from .base import Exit, Given, Problem, without_password
from .output import say, tidy

if TYPE_CHECKING:
    from types import ModuleType

    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.orm import Session

    from future_jobs import Scheduler

__all__ = ["Place", "Settings", "database", "find", "opened", "refuse_missing_file", "scheduler_of"]

KINDS = "an Engine, Session, scoped_session, sessionmaker or Scheduler, or a function that returns one"
VARIABLES = ("FUTURE_JOBS_APP", "FUTURE_JOBS_URL")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
KEYS = ("app", "url", "allow", "timezone")
NOWHERE = """\
where are the jobs? Say it in one of these ways (the first that is there counts):

  -A shop.db:Session                an Engine, Session or Scheduler of your application
  --url sqlite:///shop.db           a database
  FUTURE_JOBS_APP, FUTURE_JOBS_URL  the same, in the environment
  [tool.future_jobs]                in pyproject.toml, here or in a folder above this one,
  app = "shop.db:Session"           with app or url

For a look around, `{program} demo` makes a database of its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """An application or a database, and who named it."""

    kind: Literal["app", "url"]
    text: str
    origin: str
    folder: Path | None = None  # that relative paths start from, if it is not the current one

    def __str__(self) -> str:
        return f"{self.origin} {shown(without_password(self.text))}"


@dataclass(frozen=True, slots=True)
class Settings:
    """A place, and what is said about the Scheduler there."""

    place: Place
    allow: Any = None
    timezone: str | None = None


# --- finding ------------------------------------------------------------------------------------------------------


def find(given: Given) -> Settings:
    """Return the settings: those of the command line, then of the environment, then of pyproject.toml."""
    path, table = _pyproject()
    place = (
        _one(given.app, given.url, ("-A", "--url"))
        or _one(os.environ.get(VARIABLES[0]), os.environ.get(VARIABLES[1]), VARIABLES)
        or _one(table.get("app"), table.get("url"), (f"app in {path}", f"url in {path}"), path and path.parent)
    )
    if place is None:
        raise Problem(NOWHERE.format(program=given.program))
    allow: Any = given.allow or table.get("allow")
    if allow == ["registered"]:
        allow = "registered"
    elif allow is not None and "registered" in allow and allow != "registered":
        raise Problem("allow: 'registered' cannot be combined with prefixes")
    return Settings(place, allow, given.timezone or table.get("timezone"))


def _one(app: str | None, url: str | None, names: tuple[str, str], folder: Path | None = None) -> Place | None:
    if app and url:
        raise Problem(f"{names[0]} and {names[1]} are both given; give one")
    if app:
        return Place("app", app, names[0], folder)
    return Place("url", url, names[1], folder) if url else None


def _pyproject() -> tuple[Path | None, Mapping[str, Any]]:
    """Return the nearest pyproject.toml with a table [tool.future_jobs], and the table."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if b"future_jobs" not in data:
            continue
        try:
            table = tomllib.loads(data.decode()).get("tool", {}).get("future_jobs")
        except (ValueError, AttributeError) as error:
            raise Problem(f"{path} cannot be read: {error}") from error
        if table is not None:
            return path, _checked(path, table)
    return None, {}


def _checked(path: Path, table: Any) -> Mapping[str, Any]:
    if not isinstance(table, dict):
        raise Problem(f"{path}: tool.future_jobs is {shown(table)}; make it a table with {', '.join(KEYS)}")
    for key, value in table.items():
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KEYS)}"
            raise Problem(f"{path}: there is no setting {key!r} in [tool.future_jobs]; {hint}")
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not (is_list or value == "registered" if key == "allow" else isinstance(value, str)):
            wanted = 'a list such as ["shop."], or "registered"' if key == "allow" else "text"
            raise Problem(f"{path}: {key} is {shown(value)}; make it {wanted}")
    return table


# --- opening ------------------------------------------------------------------------------------------------------


@contextmanager
def opened(given: Given) -> Iterator[Scheduler]:
    """Yield a Scheduler on a Session of the application's; what is not committed at the end is rolled back."""
    settings = find(given)
    given.place = str(settings.place)
    scheduler = _scheduler(_load(settings.place), settings)
    try:
        yield scheduler
    finally:
        scheduler.session.close()
        if settings.place.kind == "url":
            database(scheduler).engine.dispose()


@contextmanager
def scheduler_of(given: Given) -> Iterator[Scheduler]:
    """Yield a Scheduler, having made sure that the tables are there and of the right revision."""
    from future_jobs import schema  # noqa: PLC0415 (slow to import; so are those below)

    with opened(given) as scheduler:
        bind = database(scheduler)
        refuse_missing_file(bind)
        schema.check(bind)
        yield scheduler


def database(scheduler: Scheduler) -> Engine | Connection:
    """Return what the Scheduler's Session is bound to."""
    from future_jobs import ScheduledJob  # noqa: PLC0415

    return scheduler.session.get_bind(ScheduledJob)


def refuse_missing_file(bind: Engine | Connection) -> None:
    """Keep SQLite from making an empty database where there is none, of a mistyped name."""
    from future_jobs.dialects import SQLITE, backend_of  # noqa: PLC0415

    name = bind.engine.url.database
    if backend_of(bind) is not SQLITE or not name or name == ":memory:" or name.startswith("file:"):
        return
    if not Path(name).exists():
        raise SchemaError(f"there is no database {Path(name).absolute()}; `future-jobs db upgrade` makes it")


def _load(place: Place) -> Any:
    for folder in filter(None, (place.folder, Path.cwd())):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return _engine(place) if place.kind == "url" else _attribute(place)


def _engine(place: Place) -> Engine:
    from sqlalchemy import create_engine  # noqa: PLC0415
    from sqlalchemy.engine import make_url  # noqa: PLC0415
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError  # noqa: PLC0415

    try:
        url = make_url(place.text)
        if place.folder is not None and url.get_backend_name() == "sqlite" and _is_relative(url.database):
            url = url.set(database=str(place.folder / str(url.database)))
        return create_engine(url)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        hint = "" if ":" in place.text else f"; for an SQLite file, write sqlite:///{place.text}"
        raise Problem(f"{place} is no URL of a database that SQLAlchemy knows{hint}") from error
    except ModuleNotFoundError as error:
        raise Problem(
            f"the driver {error.name!r} of {url.render_as_string(hide_password=True)} is not installed; "
            "pip install 'future-jobs[postgresql]' or 'future-jobs[mysql]', or the driver itself",
            Exit.DATABASE,
        ) from error


def _is_relative(name: str | None) -> bool:
    return bool(name) and name != ":memory:" and not str(name).startswith("file:") and not Path(str(name)).is_absolute()


# --- importing an application -------------------------------------------------------------------------------------


def _attribute(place: Place) -> Any:
    name, _, path = place.text.partition(":")
    if "/" in name or name.endswith(".py"):
        dotted = ".".join(Path(name).with_suffix("").parts)
        raise Problem(f"{place} is a file; write {dotted}:{path or 'ATTR'}, as in an import")
    if _MODULE.fullmatch(name) is None:
        raise Problem(f"{place} is no module; write MODULE:ATTR, such as shop.db:Session")
    module = _module(name, place)
    if not path:
        raise Problem(f"{place} names no object; write MODULE:ATTR. {_candidates(module)}")
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise Problem(f"{place} has no {part!r}. {_candidates(module)}") from None
    return found


def _module(name: str, place: Place) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise Problem(f"{place}: there is no module {error.name!r} in {Path.cwd()}, nor installed") from None
        problem: BaseException = error
    except (Exception, SystemExit) as error:
        problem = error
    _show_traceback(problem)
    raise Problem(f"{place}: importing {name} raised {_brief(problem)}") from problem


def _show_traceback(error: BaseException) -> None:
    trace = error.__traceback__
    while trace is not None and (
        trace.tb_frame.f_globals.get("__name__", "").startswith(("future_jobs.cli", "importlib"))
        or trace.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        trace = trace.tb_next
    say(tidy("".join(traceback.format_exception(type(error), error, trace)).rstrip()), err=True)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _candidates(module: ModuleType) -> str:
    found = [f"{module.__name__}:{name}" for name, value in vars(module).items() if _is_usable(value)]
    if found:
        return f"There is {', '.join(sorted(found)[:8])}"
    return f"{module.__name__} has no Engine, Session, sessionmaker or Scheduler"


def _is_usable(value: Any) -> bool:
    from sqlalchemy.engine import Engine  # noqa: PLC0415
    from sqlalchemy.orm import Session, scoped_session, sessionmaker  # noqa: PLC0415

    from future_jobs import Scheduler  # noqa: PLC0415

    return isinstance(value, Engine | Session | scoped_session | sessionmaker | Scheduler)


# --- making a Scheduler -------------------------------------------------------------------------------------------


def _scheduler(found: Any, settings: Settings) -> Scheduler:
    from future_jobs import Scheduler  # noqa: PLC0415

    if not _is_usable(found) and callable(found):
        found = _called(found, settings.place)
    if not isinstance(found, Scheduler):
        return Scheduler(_session(found, settings.place), timezone=settings.timezone, allow=settings.allow)
    if settings.allow is None and settings.timezone is None:
        return found
    return Scheduler(
        found.session,
        timezone=settings.timezone or found.timezone,
        clock=found.clock,
        allow=found.allow if settings.allow is None else settings.allow,
        expires=found.expires,
    )


def _called(function: Callable[[], Any], place: Place) -> Any:
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    _refuse_async(function, place)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Problem(f"{place} cannot be called without arguments: {error}") from None
    except ValueError:
        pass  # a built-in without a signature
    try:
        found = function()
    except SQLAlchemyError:
        raise
    except (Exception, SystemExit) as error:
        _show_traceback(error)
        raise Problem(f"{place}: calling it raised {_brief(error)}") from error
    if inspect.iscoroutine(found):
        found.close()
        raise Problem(f"{place} is a coroutine function; name {KINDS}")
    return found


def _session(found: Any, place: Place) -> Session:
    from sqlalchemy.engine import Engine  # noqa: PLC0415
    from sqlalchemy.orm import Session, scoped_session, sessionmaker  # noqa: PLC0415

    if isinstance(found, sessionmaker):
        found = found()
    if isinstance(found, Engine):
        return Session(found)
    if isinstance(found, Session | scoped_session):
        return found  # type: ignore[return-value]  # a scoped_session passes for one
    _refuse_async(found, place)
    raise Problem(f"{place} is {shown(found)}; name {KINDS}")


def _refuse_async(found: Any, place: Place) -> None:
    names: Sequence[str] = [cls.__name__ for cls in type(found).__mro__]
    kind = next((name for name in names if name.startswith(("Async", "async_"))), None)
    if kind is not None:
        raise Problem(
            f"{place} is an {kind}, and these commands are synchronous; name a synchronous Engine on the same "
            "database, or give its URL by --url"
        )
