"""What a handler may ask for instead of finishing, and when a failed attempt is tried again. Pure: no clock, no SQL."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dateutil.relativedelta import relativedelta

from .errors import InvalidArgument, InvalidCallable, InvalidOption, shown
from .times import When, parse_duration

__all__ = [
    "Backoff",
    "Cancel",
    "Retry",
    "Snooze",
    "delay",
    "dump_backoff",
    "dump_exceptions",
    "exact",
    "matches",
    "path_in",
]


class Snooze(Exception):
    """Run this job again at ``when``, as if it had not been started: no attempt is charged.

    Returned, what the handler wrote is kept; raised, it is rolled back.
    """

    def __init__(self, when: When) -> None:
        super().__init__(when)
        self.when = when


class Retry(Exception):
    """This attempt failed; try again at ``when``, or after the job's ``backoff``.

    ``max_attempts`` is the limit, if the job has one: with the default of 1 a handler may ask until the job expires.
    """

    def __init__(self, when: When | None = None, reason: str | None = None) -> None:
        super().__init__(reason or "the handler asked for another try")
        self.when = when


class Cancel(Exception):
    """Do not run this job again; it ends ``cancelled`` with ``reason``."""

    def __init__(self, reason: str = "cancelled by its handler") -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Backoff:
    """A delay that grows: ``base * factor ** (failures - 1)``, at most ``cap``, spread by ``jitter``.

    ``jitter`` is the part of the delay (0 to 1) that varies, so that jobs which failed together are not retried
    together. It depends on the job and the attempt alone: the same try always gets the same delay.
    """

    base: str = "10s"
    factor: float = 2.0
    cap: str = "1h"
    jitter: float = 0.2

    def __post_init__(self) -> None:
        exact(self.base, "backoff.base")
        exact(self.cap, "backoff.cap")
        if not 1 <= self.factor <= 100:  # noqa: PLR2004
            raise InvalidOption(
                f"backoff.factor is {self.factor!r}; use 1 to 100", argument="backoff", value=self.factor
            )
        if not 0 <= self.jitter <= 1:
            raise InvalidOption(f"backoff.jitter is {self.jitter!r}; use 0 to 1", argument="backoff", value=self.jitter)

    def delay(self, failures: int, seed: str) -> timedelta:
        """Return how long to wait after the ``failures``-th failure (the first is 1)."""
        cap = exact(self.cap, "backoff.cap").total_seconds()
        # 2 ** 1024 overflows a float; long before that every delay is the cap.
        seconds = min(cap, exact(self.base, "backoff.base").total_seconds() * self.factor ** min(failures - 1, 64))
        spread = random.Random(seed).uniform(-1, 1) * self.jitter * seconds / 2  # noqa: S311 (not a secret)
        return timedelta(seconds=max(0.0, seconds + spread))


BackoffOption = str | timedelta | Sequence[str | timedelta] | Backoff | Callable[[int, BaseException], str | timedelta]


def dump_backoff(value: BackoffOption | None) -> Any:
    """Return ``value`` as JSON data for the row; raise for what is no backoff."""
    if value is None:
        return None
    if isinstance(value, Backoff):
        return {"base": value.base, "factor": value.factor, "cap": value.cap, "jitter": value.jitter}
    if isinstance(value, str | timedelta):
        return _text(value)
    if isinstance(value, Sequence) and value:
        return [_text(each) for each in value]
    if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__"):
        return {_CALL: _found_again(value)}
    raise InvalidArgument(
        f"backoff is {shown(value)}; pass a duration such as '30s', a list of them, Backoff(...) or a function",
        argument="backoff",
        value=value,
    )


_CALL = "call"


def _found_again(function: Any) -> str:
    if "<" in function.__qualname__ or not isinstance(getattr(function, "__module__", None), str):
        raise InvalidCallable(
            f"backoff is {shown(function)}, which cannot be found again; use a module-level function",
            argument="backoff",
            value=function,
        )
    return f"{function.__module__}.{function.__qualname__}"


def path_in(stored: Any) -> str | None:
    """Return the path of the function that is the backoff, from what `dump_backoff` stored; None if none is."""
    return stored.get(_CALL) if isinstance(stored, dict) else None


def delay(stored: Any, failures: int, seed: str) -> timedelta:
    """Return how long to wait after the ``failures``-th failure, from what `dump_backoff` stored."""
    if stored is None:
        return Backoff().delay(failures, seed)
    if isinstance(stored, dict):
        return Backoff(**stored).delay(failures, seed)
    if isinstance(stored, list):
        stored = stored[min(failures, len(stored)) - 1]
    return exact(stored, "backoff")


def dump_exceptions(value: type[BaseException] | str | Iterable[type[BaseException] | str], argument: str) -> list[str]:
    """Return exception classes as their paths, for the row."""
    each_of = value if isinstance(value, Iterable) and not isinstance(value, str | type) else [value]
    names = []
    for each in each_of:
        if isinstance(each, str):
            names.append(each)
        elif isinstance(each, type) and issubclass(each, BaseException):
            names.append(_path(each))
        else:
            raise InvalidArgument(
                f"{argument} holds {shown(each)}; pass exception classes or their paths", argument=argument, value=each
            )
    return names


def matches(error: BaseException, names: Iterable[str]) -> bool:
    """Tell whether ``error`` is of one of the classes named, or of a subclass; nothing is imported."""
    own = {_path(each) for each in type(error).__mro__}
    own |= {each.__qualname__ for each in type(error).__mro__ if each.__module__ == "builtins"}
    return not own.isdisjoint(names)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _text(value: str | timedelta) -> str:
    duration = exact(value, "backoff")
    return value if isinstance(value, str) else f"{duration.total_seconds():f}s"


def exact(value: str | timedelta, argument: str) -> timedelta:
    """Return ``value`` as a timedelta; raise `InvalidOption` for what is no exact duration, or a negative one."""
    duration = parse_duration(value) if isinstance(value, str) else value
    if isinstance(duration, relativedelta) or not isinstance(duration, timedelta) or duration < timedelta(0):
        raise InvalidOption(
            f"{argument} is {shown(value)}; use an exact duration such as '30s', '5m' or '2h'",
            argument=argument,
            value=value,
        )
    return duration
