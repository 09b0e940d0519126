"""What may be said about a job besides when and what. One `TypedDict`, checked in one place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Literal, TypedDict

from .errors import InvalidArgument, InvalidOption, UnknownOption, shown
from .rates import parse_rate
from .retries import BackoffOption, dump_backoff, dump_exceptions
from .times import When, parse_duration

__all__ = [
    "MAX_PRIORITY",
    "MAX_QUEUE",
    "JobOptions",
    "checked",
    "checked_word",
    "limit_columns",
    "run_options",
    "unique_columns",
]

MAX_PRIORITY = 100
MAX_QUEUE = 100
MAX_UNIQUE_KEY = 255
MAX_ATTEMPTS = 1_000_000
MAX_TAGS = 50
MAX_KEY = 255
MAX_CONCURRENCY = 1_000_000

Exceptions = type[BaseException] | str | Sequence[type[BaseException] | str]


class JobOptions(TypedDict, total=False):
    """The options of `schedule`, `enqueue`, `schedule_many`, `reschedule`, `recurring` and ``@job(...)``."""

    expires: When | None
    queue: str
    priority: int
    content_object: object
    max_attempts: int
    backoff: BackoffOption | None
    retry_on: Exceptions
    discard_on: Exceptions
    timeout: str | timedelta | None
    transaction: Literal["job", "own"]
    missing: Literal["fail", "discard", "none"]
    concurrency_key: str | None
    concurrency_limit: int
    rate_limit: str | None
    unique_key: str | None
    unique_until: Literal["started", "finished"]
    on_conflict: Literal["raise", "return_existing", "replace"]
    tags: Iterable[str]


NAMES = tuple(JobOptions.__annotations__)


def checked(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``defaults`` overlaid with ``given``, every value checked.

    Raises `UnknownOption` naming the nearest option, `InvalidOption` for a value outside its range, and
    `InvalidArgument` for one of the wrong type.
    """
    options = {**defaults, **given} if defaults else dict(given)
    for name, value in options.items():
        if name not in NAMES:
            raise _unknown(name)
        if name in _CHECKS:
            options[name] = _CHECKS[name](name, value)
    return options


def run_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return, as JSON data for the row, those of the checked ``options`` that only the run needs."""
    kept = {name: options[name] for name in _RUN if options.get(name) not in (None, _RUN[name])}
    return kept or None


def limit_columns(options: Mapping[str, Any], queue: str) -> dict[str, Any]:
    """Return the columns that say what holds a job back besides its time, from the checked ``options``.

    Jobs of one ``limited_by`` are held back together, and by the same; see ``limits.py``.
    """
    key, rate = options.get("concurrency_key"), options.get("rate_limit")
    limit = options.get("concurrency_limit", 1) if key is not None else None
    if key is None and "concurrency_limit" in options:
        raise InvalidOption(
            "concurrency_limit says how many jobs of a concurrency_key may run at once; give that as well",
            argument="concurrency_limit",
            value=options["concurrency_limit"],
        )
    limited = key is not None or rate is not None
    place = f"queue:{queue}" if key is None else f"key:{key}"
    return {
        "concurrency_key": key,
        "concurrency_limit": limit,
        "rate_limit": rate,
        "limited_by": f"{limit or '-'} {rate or '-'} {place}" if limited else None,
        "limited": limited,
    }


def unique_columns(options: Mapping[str, Any], *, given: Mapping[str, Any]) -> dict[str, str]:
    """Return ``unique_key`` and ``unique_until`` for the row, from the checked ``options``; nothing if there is no key.

    Raises `InvalidOption` if those that were ``given`` with the call say what is to be done about a key, and none does
    which.
    """
    key = options.get("unique_key")
    if key is not None:
        return {"unique_key": key, "unique_until": options.get("unique_until", "finished")}
    for name in ("unique_until", "on_conflict"):
        if name in given and "unique_key" not in given:
            raise InvalidOption(
                f"{name} is {shown(given[name])}, but there is no unique_key; pass that too",
                argument=name,
                value=given[name],
            )
    return {}


_RUN = {
    "backoff": None,
    "retry_on": None,
    "discard_on": None,
    "timeout": None,
    "transaction": "job",
    "missing": "fail",
}


def _unknown(name: str) -> UnknownOption:
    close = get_close_matches(name, NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(NAMES)}"
    return UnknownOption(f"there is no option {name!r}; {hint}", argument=name)


def _integer(lowest: int, highest: int) -> Any:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidArgument(
                f"{name} is {shown(value)}; pass a whole number from {lowest} to {highest}", argument=name, value=value
            )
        if not lowest <= value <= highest:
            raise InvalidOption(f"{name} is {shown(value)}; use {lowest} to {highest}", argument=name, value=value)
        return value

    return check


def checked_word(name: str, value: Any, most: int = MAX_QUEUE) -> str:
    """Return ``value``, the name of a queue or a tag, or a key; raise for what is none."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} is {shown(value)}; pass text", argument=name, value=value)
    if not 1 <= len(value) <= most or value != value.strip() or any(map(_is_control, value)):
        raise InvalidOption(
            f"{name} is {shown(value)}; use 1 to {most} printable characters, no space at the ends",
            argument=name,
            value=value,
        )
    return value


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs", "Cn"}


def _timeout(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | timedelta):
        raise InvalidArgument(
            f"{name} is {shown(value)}; pass a duration such as '30s', or None", argument=name, value=value
        )
    duration = parse_duration(value, argument=name) if isinstance(value, str) else value
    if not isinstance(duration, timedelta) or duration <= timedelta(0):
        raise InvalidOption(
            f"{name} is {shown(value)}; use an exact duration above zero, such as '30s' or '2h'",
            argument=name,
            value=value,
        )
    return f"{duration.total_seconds():f}s" if isinstance(value, timedelta) else value


def _one_of(*choices: str) -> Any:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise InvalidOption(
                f"{name} is {shown(value)}; use {' or '.join(map(repr, choices))}", argument=name, value=value
            )
        return str(value)

    return check


def _tags(name: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} is {shown(value)}; pass a list of words", argument=name, value=value)
    tags = [checked_word(f"{name}[{position}]", tag) for position, tag in enumerate(value)]
    if len(tags) > MAX_TAGS:
        raise InvalidOption(f"{name} has {len(tags)} words; use at most {MAX_TAGS}", argument=name, value=value)
    return tags


def _or_none(check: Any) -> Any:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS = {
    "queue": checked_word,
    "priority": _integer(-MAX_PRIORITY, MAX_PRIORITY),
    "max_attempts": _integer(1, MAX_ATTEMPTS),
    "backoff": lambda name, value: dump_backoff(value),  # noqa: ARG005
    "retry_on": lambda name, value: dump_exceptions(value, name),
    "discard_on": lambda name, value: dump_exceptions(value, name),
    "timeout": _timeout,
    "transaction": _one_of("job", "own"),
    "missing": _one_of("fail", "discard", "none"),
    "unique_key": lambda name, value: None if value is None else checked_word(name, value, MAX_UNIQUE_KEY),
    "unique_until": _one_of("started", "finished"),
    "on_conflict": _one_of("raise", "return_existing", "replace"),
    "tags": _tags,
    "concurrency_key": _or_none(lambda name, value: checked_word(name, value, MAX_KEY)),
    "concurrency_limit": _integer(1, MAX_CONCURRENCY),
    "rate_limit": _or_none(lambda name, value: str(parse_rate(value, argument=name))),
}
