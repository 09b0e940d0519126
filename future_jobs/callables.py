"""Paths and callables: what may be scheduled, how it is found again, and how it is called.

A callable is stored as ``module.qualname`` and found by importlib when the job runs. What cannot be found again that
way (a lambda, a function inside a function) is refused when it is scheduled. ``allow`` restricts what a row may name;
the path is judged before anything is imported, and the place where the function is defined after.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, TypeVar, overload

from sqlalchemy import inspect as inspect_mapped
from sqlalchemy.orm import Session

from .errors import CallableNotFound, CallableRefused, InvalidArgument, InvalidCallable, InvalidOption, shown
from .options import checked

__all__ = [
    "Allow",
    "Call",
    "Spec",
    "describe",
    "invoke",
    "job",
    "job_as_parameter",
    "permit",
    "permit_classes",
    "plain_arguments",
    "registered_in",
    "resolve",
    "spec_of",
]

Allow = Iterable[str] | Literal["registered"] | None
F = TypeVar("F", bound=Callable[..., Any])

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_LONGEST = 500
_ADVICE = "use a module-level function, or its path as text"


# --- @job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spec:
    """What ``@job(...)`` says of a callable: the name it is stored under, and its default options."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


_registered: dict[str, Callable[..., Any]] = {}


@overload
def job(function: F, /) -> F: ...
@overload
def job(*, name: str | None = None, aliases: Iterable[str] = (), **options: Any) -> Callable[[F], F]: ...
def job(
    function: F | None = None, /, *, name: str | None = None, aliases: Iterable[str] = (), **options: Any
) -> F | Callable[[F], F]:
    """Mark a callable as a job: give it a lasting name and default options.

    ``name`` is stored instead of the path, and ``aliases`` (earlier names or paths) keep finding the callable after it
    was renamed or moved. The options are those of `Scheduler.schedule`, and are checked here; what a call gives wins
    over them.
    """
    checked(options, {})

    def mark(function: F) -> F:
        for each in (name, *aliases, path_of(function)):
            if each is not None:
                _registered[each] = function
        function.__future_job__ = Spec(name, options)  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def job_as_parameter(function: F) -> F:
    """Pass the running job as the first argument."""
    function.job_as_parameter = True  # type: ignore[attr-defined]
    return function


def spec_of(function: Callable[..., Any]) -> Spec:
    """Return what ``@job(...)`` says of ``function``."""
    spec = getattr(function, "__future_job__", None)
    return spec if isinstance(spec, Spec) else Spec()


def registered_in() -> tuple[str, ...]:
    """Return the modules of what is registered here: importing them elsewhere makes the same names known there."""
    return tuple(sorted({function.__module__ for function in _registered.values()} - {"__main__"}))


# --- allow --------------------------------------------------------------------------------------------------------


def permit(allow: Allow) -> Callable[[str], None]:
    """Return a check that raises `CallableRefused` for a path outside ``allow``.

    ``"shop."`` and ``"shop"`` both mean the module or package and what is below it.
    """
    if allow is None:
        return lambda _path: None
    if allow == "registered":
        return _check_registered
    if isinstance(allow, str):
        raise InvalidOption(f"allow is {allow!r}; pass a list such as [{allow!r}], or 'registered'", argument="allow")
    prefixes = tuple(entry.rstrip(".") for entry in allow)

    def check(path: str) -> None:
        if not any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes):
            raise CallableRefused(
                f"{shown(path)} is not allowed; allow={list(prefixes)!r} names what is", argument="callable", value=path
            )

    return check


def _check_registered(path: str) -> None:
    known = _registered.get(path)
    if known is None and not any(path == path_of(each) for each in _registered.values()):
        raise CallableRefused(
            f"{shown(path)} is not registered; decorate it with @job and import its module first",
            argument="callable",
            value=path,
        )


def permit_classes(allow: Allow) -> Callable[[str], None]:
    """Return the same check for the classes that arguments name: Enums, dataclasses and mapped classes.

    Classes are not registered. Under ``"registered"`` those of modules that the application has imported are allowed,
    so that a row can cause no import.
    """
    if allow != "registered":
        return permit(allow)

    def check(path: str) -> None:
        module = path.rpartition(".")[0]
        outer, _, inner = module.rpartition(".")
        if module not in sys.modules and not isinstance(getattr(sys.modules.get(outer), inner, None), type):
            raise CallableRefused(
                f"{shown(path)} is not allowed; import its module first", argument="callable", value=path
            )

    return check


# --- path <-> callable --------------------------------------------------------------------------------------------


def path_of(function: Callable[..., Any]) -> str:
    """Return ``module.qualname``."""
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def resolve(path: str, check: Callable[[str], None]) -> Callable[..., Any]:
    """Return the callable that ``path`` names.

    Raises `InvalidCallable` for what is no path, `CallableRefused` for one that ``check`` rejects (before anything is
    imported, and again for the place where it is defined), `CallableNotFound` where there is nothing.
    """
    check(path)
    found = _registered.get(path)
    if found is None:
        found = _find(path)
    if not callable(found):
        raise InvalidCallable(
            f"{shown(path)} is a {type(found).__name__}, not a function", argument="callable", value=path
        )
    check(path_of(inspect.unwrap(found)))
    return found


def _find(path: str) -> Any:
    if not _PATH.fullmatch(path) or len(path) > _LONGEST:
        raise InvalidCallable(
            f"callable is {shown(path)}; write the path of a function, such as 'shop.mail.welcome'",
            argument="callable",
            value=path,
        )
    parts = path.split(".")
    module, rest = _import_longest(path, parts)
    found: Any = module
    for position, name in enumerate(rest):
        owner = found
        found = inspect.getattr_static(owner, name, None) if isinstance(owner, type) else getattr(owner, name, None)
        if found is None:
            known = path if not position else f"{module.__name__}.{'.'.join(rest[:position])}"
            where = f"module {module.__name__!r}" if not position else f"class {known!r}"
            close = get_close_matches(name, dir(owner), n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            if module.__name__ == "__main__":
                hint = "; it was scheduled by a script, which only that script can run: move it into a module"
            raise CallableNotFound(
                f"callable is {shown(path)}: {where} has no {name!r}{hint}", argument="callable", value=path
            )
        if isinstance(owner, type):
            found = getattr(owner, name)
        if name is not rest[-1] and not isinstance(found, type):
            raise InvalidCallable(
                f"callable is {shown(path)}: {name!r} is neither a module nor a class", argument="callable", value=path
            )
    return found


def _import_longest(path: str, parts: list[str]) -> tuple[Any, list[str]]:
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            # Not from sys.modules, where a module is that another thread is still importing.
            return import_module(name), parts[end:]
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise  # the module is there; something that it imports is not
    raise CallableNotFound(
        f"callable is {shown(path)}: there is no module {parts[0]!r} here", argument="callable", value=path
    )


# --- what is scheduled --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """What is called, and under which name it is stored; ``args`` and ``kwargs`` are those of a partial."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    content_object: Any
    is_method: bool
    _fitting: set[tuple[int, tuple[str, ...]]] = field(default_factory=set, repr=False, compare=False)

    def arguments(self, args: Iterable[Any], kwargs: Mapping[str, Any] | None) -> tuple[list[Any], dict[str, Any]]:
        """Return all arguments of one call; raise `InvalidArgument` for those that the callable cannot take."""
        own_args, own_kwargs = plain_arguments(args, kwargs)
        args, kwargs = [*self.args, *own_args], {**self.kwargs, **own_kwargs}
        shape = len(args), tuple(kwargs)  # on which it depends whether they fit
        if shape not in self._fitting:
            _check_arguments(self, args, kwargs)
            self._fitting.add(shape)
        return args, kwargs

    @property
    def spec(self) -> Spec:
        """What ``@job(...)`` says of the callable."""
        return spec_of(self.function)


def describe(given: Callable[..., Any] | str, *, content_object: Any = None, check: Callable[[str], None]) -> Call:
    """Return what ``given`` is: a function, a path, a `functools.partial`, a bound method or a method's name.

    Raises one of the errors of `resolve` or `InvalidCallable` for what could not be found again.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while isinstance(given, functools.partial):
        args, kwargs = (*given.args, *args), {**given.keywords, **kwargs}
        given = given.func
    if isinstance(given, str):
        return _by_name(given, args, kwargs, content_object, check)
    if inspect.ismethod(given) and not isinstance(given.__self__, type):
        return _by_bound_method(given, args, kwargs, content_object, check)
    return Call(_checked_name(given, check), given, args, kwargs, content_object, is_method=False)


def plain_arguments(args: Iterable[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``args`` and ``kwargs`` as a tuple and a dict; raise `InvalidArgument` for what is neither."""
    if not isinstance(args, (list, tuple)):
        raise InvalidArgument(f"args is {shown(args)}; pass a list or tuple", argument="args", value=args)
    if kwargs is None:
        return tuple(args), {}
    if not isinstance(kwargs, Mapping):
        raise InvalidArgument(f"kwargs is {shown(kwargs)}; pass a dict", argument="kwargs", value=kwargs)
    for key in kwargs:
        if not isinstance(key, str):
            raise InvalidArgument(f"kwargs has the key {shown(key)}; names are text", argument="kwargs", value=key)
    return tuple(args), dict(kwargs)


def _by_name(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], content_object: Any, check: Callable[[str], None]
) -> Call:
    if content_object is not None and name.isidentifier():
        method = bound_method(content_object, name, check)
        return Call(name, method, args, kwargs, content_object, is_method=True)
    function = resolve(name, check)
    _refuse_unsuitable(function)
    is_method = content_object is not None and method_name(name, function, content_object) is not None
    if is_method:
        function = getattr(content_object, function.__name__)
    return Call(name, function, args, kwargs, content_object, is_method=is_method)


def _by_bound_method(
    method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], content_object: Any, check: Callable[[str], None]
) -> Call:
    owner = method.__self__
    if inspect_mapped(owner, raiseerr=False) is None:
        raise InvalidCallable(
            f"{shown(method)} is a method of {type(owner).__name__}, which is no mapped object that can be loaded "
            f"again; {_ADVICE}",
            argument="callable",
            value=method,
        )
    if content_object is not None and content_object is not owner:
        raise InvalidArgument(
            "content_object is given twice: by the bound method and by name", argument="content_object"
        )
    _refuse_unsuitable(method.__func__)
    name = path_of(method.__func__)
    check(name)
    return Call(name, method, args, kwargs, owner, is_method=True)


def bound_method(content_object: Any, name: str, check: Callable[[str], None]) -> Callable[..., Any]:
    """Return the method ``name`` of ``content_object``; raise if there is none, or if it may not be called."""
    cls = type(content_object)
    check(f"{path_of(cls)}.{name}")
    static = inspect.getattr_static(cls, name, None)
    method: Callable[..., Any] | None = getattr(content_object, name, None) if static is not None else None
    if method is None or not callable(method):
        close = get_close_matches(name, [each for each in dir(cls) if not each.startswith("_")], n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        raise CallableNotFound(f"{cls.__name__} has no method {name!r}{hint}", argument="callable", value=name)
    check(path_of(inspect.unwrap(getattr(method, "__func__", method))))
    return method


def method_name(path: str, function: Callable[..., Any], content_object: Any) -> str | None:
    """Return the name of the method of ``content_object`` that ``path`` means; None if it means a plain function."""
    name = path.rpartition(".")[2]
    if not inspect.isfunction(function) or "." not in function.__qualname__:
        return None
    for cls in type(content_object).__mro__:
        if inspect.getattr_static(cls, name, None) is not None and cls.__dict__.get(name) is function:
            return name
    return None


def _checked_name(function: Any, check: Callable[[str], None]) -> str:
    spec = spec_of(function)
    if spec.name is not None:
        check(spec.name)
        return spec.name
    path = path_of(function)
    check(path)
    _refuse_unsuitable(function)
    if not _is_found_again(function, path):
        raise InvalidCallable(
            f"{shown(function)} cannot be found again as {path!r}, which names something else here; {_ADVICE}",
            argument="callable",
            value=function,
        )
    return path


def _is_found_again(function: Any, path: str) -> bool:
    try:
        found = _find(path)
    except CallableNotFound:
        return False
    return found is function or found == function


def _refuse_unsuitable(function: Any) -> None:
    if reason := _unsuitable(function):
        raise InvalidCallable(f"{shown(function)} is {reason}; {_ADVICE}", argument="callable", value=function)


def _unsuitable(function: Any) -> str | None:
    if not callable(function):
        raise InvalidArgument(
            f"callable is {shown(function)}, a {type(function).__name__}; {_ADVICE}",
            argument="callable",
            value=function,
        )
    if isinstance(function, type):
        return "a class, not a function"
    if getattr(function, "__qualname__", None) is None:
        return f"a callable instance of {type(function).__name__}"
    return _unsuitable_function(function)


@functools.lru_cache(maxsize=2048)
def _unsuitable_function(function: Any) -> str | None:
    name = function.__qualname__
    if "<lambda>" in name:
        return "a lambda, which has no name to find it by"
    if "<locals>" in name:
        return "defined inside a function, where it cannot be found again"
    unwrapped = inspect.unwrap(function)
    if inspect.isgeneratorfunction(unwrapped) or inspect.isasyncgenfunction(unwrapped):
        return "a generator function, whose body would never run"
    return None


# --- calling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    signature: inspect.Signature | None
    wants_job: bool
    supplied: Mapping[str, str]  # parameter -> "job" or "session"
    positional: tuple[str, ...] = ()
    keywords: frozenset[str] = frozenset()  # what may be given by name
    required: frozenset[str] = frozenset()  # what the caller must give
    is_open: bool = True  # takes *args or **kwargs

    def surely_fits(self, count: int, names: AbstractSet[str]) -> bool:
        """Tell, in a tenth of the time of `inspect`, that ``count`` positional arguments and ``names`` fit."""
        if self.is_open or count > len(self.positional):
            return False
        bound = self.positional[:count]
        return names <= self.keywords and names.isdisjoint(bound) and self.required <= {*bound, *names}


@functools.lru_cache(maxsize=2048)
def _plan(function: Callable[..., Any], *, is_bound: bool) -> _Plan:
    wants_job = bool(getattr(function, "job_as_parameter", False))
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return _Plan(None, wants_job, {})
    if is_bound:
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:
        hints = {}  # a name imported for type checking only; judged by its text below
    supplied = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY}:
            continue
        if kind := _supplied_kind(hints.get(name, parameter.annotation)):
            supplied[name] = kind
    parameters = signature.parameters.values()
    return _Plan(
        signature,
        wants_job,
        supplied,
        positional=tuple(
            each.name for each in parameters if each.kind in {each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD}
        ),
        keywords=frozenset(
            each.name for each in parameters if each.kind in {each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY}
        ),
        required=frozenset(
            each.name for each in parameters if each.default is each.empty and each.name not in supplied
        ),
        is_open=any(each.kind in {each.VAR_POSITIONAL, each.VAR_KEYWORD} for each in parameters),
    )


def _supplied_kind(annotation: Any) -> str | None:
    if isinstance(annotation, str):
        return {"Session": "session", "ScheduledJob": "job"}.get(annotation.rpartition(".")[2].strip("'\" "))
    if not isinstance(annotation, type):
        return None
    if issubclass(annotation, Session):
        return "session"
    return "job" if (annotation.__module__, annotation.__qualname__) == ("future_jobs.models", "ScheduledJob") else None


def _plan_of(function: Callable[..., Any]) -> _Plan:
    # A bound method is a new object at each look; its function is not. A plan is kept for the latter.
    bound = getattr(function, "__self__", None)
    if bound is None or isinstance(bound, type) or not inspect.ismethod(function):
        return _plan(function, is_bound=False)
    return _plan(function.__func__, is_bound=True)


def _check_arguments(call: Call, args: list[Any], kwargs: dict[str, Any]) -> None:
    plan = _plan_of(call.function)
    leading = plan.wants_job + (call.content_object is not None and not call.is_method)
    if plan.signature is None or plan.surely_fits(leading + len(args), kwargs.keys()):
        return
    try:
        bound = plan.signature.bind_partial(*[None] * leading, *args, **kwargs)
    except TypeError as error:
        raise _misfit(call, plan, args, str(error)) from None
    for name, parameter in plan.signature.parameters.items():
        variadic = parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
        if parameter.default is parameter.empty and not variadic and name not in {*bound.arguments, *plan.supplied}:
            raise _misfit(call, plan, args, f"missing a required argument: {name!r}")


def _misfit(call: Call, plan: _Plan, args: list[Any], problem: str) -> InvalidArgument:
    return InvalidArgument(
        f"the arguments do not fit {call.name}{plan.signature}: {problem}", argument="args", value=args
    )


def invoke(
    function: Callable[..., Any],
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    *,
    leading: Iterable[Any],
    supply: Callable[[str], Any],
) -> Any:
    """Call ``function`` with ``leading``, ``args`` and ``kwargs``.

    Parameters annotated ``Session`` or ``ScheduledJob`` that the caller left out get what ``supply("session")`` or
    ``supply("job")`` returns; a function marked by `job_as_parameter` gets the job first.
    """
    plan = _plan_of(function)
    positional = [*leading, *args]
    if plan.wants_job:
        positional.insert(0, supply("job"))
    if plan.supplied:
        given = {*plan.positional[: len(positional)], *kwargs}
        kwargs = {**{name: supply(kind) for name, kind in plan.supplied.items() if name not in given}, **kwargs}
    return function(*positional, **kwargs)
