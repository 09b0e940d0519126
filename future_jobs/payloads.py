"""Arguments and results as JSON text, and back again unchanged.

What JSON has is stored as it is. What it lacks is an object with one key, a tag: ``{"!date": "2026-03-01"}``. The
tables at the end of this module are the whole format: a value of any other type is refused when it is written, and
any other object with a ``!`` key, when it is read, was damaged or written by a later version. A dict of the user's that
has such a key is itself tagged. Classes are written ``module:qualname``, looked up as exactly the kind that their
tag says, and never called otherwise.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Context, Decimal
from enum import Enum, Flag
from functools import partial
from importlib import import_module
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta, weekday
from sqlalchemy import inspect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapper, Session, scoped_session

from .errors import InvalidArgument, InvalidPayload, PayloadUnreadable, shown

__all__ = ["decode", "encode", "encode_many", "encode_result", "load_reference", "reference_of", "sanitise"]

Load: TypeAlias = Callable[[type[Any], tuple[Any, ...]], object]
Permit: TypeAlias = Callable[[str], None]

DIGITS = 600  # of an integer that stays a number: any process can read that many (sys.set_int_max_str_digits)
HUGE = 10**DIGITS
PLAIN = frozenset({str, int, float, bool, type(None)})
TEXT = frozenset({str})
EMPTY: Mapping[type[Any], str] = {list: "[]", dict: "{}"}
TAG = '"!'  # what a text contains that has a tag
PAIR = re.compile(r"(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")  # two lone surrogates, which JSON makes one character
KEY_LENGTH = 255
AT_ONCE = (
    200  # values that are written in one step; more would live long enough for the garbage collector to count them
)

_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_dump_lines = json.JSONEncoder(separators=(",\n", ":"), allow_nan=False, check_circular=False).encode


def encode(value: Any, *, where: str, limit: int = 256 * 1024, depth: int = 100, session: Session | None = None) -> str:
    """Return ``value`` as JSON text, in ASCII, which `decode` turns back into an equal value of the same types.

    ``where`` is how messages call it: ``args`` gives paths such as ``args[2].user``. A mapped object that is pending
    is flushed, to get its key; given ``session``, it must be pending there. Raises `InvalidArgument` for what cannot be
    stored, `InvalidPayload` for what is cyclic, nested deeper than ``depth``, or larger than ``limit`` bytes.
    """
    if type(value) in EMPTY and not value:
        return EMPTY[type(value)]
    if _is_flat(value):
        try:
            text = _dump(value)
        except ValueError:  # nan, or an integer beyond what str() may write: they have tags
            text = TAG
        if len(text) <= min(DIGITS, limit) and TAG not in text and r"\ud" not in text:
            return text
    writer = _Writer(where, limit, depth, session)
    try:
        text = _dump(writer.write(value))
    except _UnfitError as unfit:
        raise unfit.at(writer.path) from None
    except RecursionError:
        raise InvalidPayload(f"{where} is nested too deeply to be stored", argument=where, value=value) from None
    writer.room = limit
    writer.spend(len(text))
    return text


def encode_many(values: Sequence[Any], *, where: str, session: Session | None = None) -> Iterator[str]:
    """Yield what `encode` returns for each of ``values``; in a tenth of the time where all are flat lists, or dicts."""
    for start in range(0, len(values), AT_ONCE):
        some = values[start : start + AT_ONCE]
        yield from _encode_flat(some) or (encode(value, where=where, session=session) for value in some)


def decode(text: str | bytes | None, *, load: Load, permit: Permit | None = None) -> Any:
    """Return the value that was encoded as ``text``; None for None.

    ``load`` gets the class and the identity of each mapped object, and returns the live one. ``permit`` gets the
    dotted path of each class before anything is imported, then that of the place where the class is defined, and
    raises to refuse it. What these two raise passes through; anything else that is wrong is `PayloadUnreadable`.
    """
    if text is None:
        return None
    if text == "[]":
        return []
    if text == "{}":
        return {}
    if not isinstance(text, str):
        raise PayloadUnreadable(f"{shown(text)} is not text")
    try:
        return (_decoder(_Reader(load, permit).read) if TAG in text else _decode_plain)(text)
    except json.JSONDecodeError as error:
        raise PayloadUnreadable(f"{shown(text)} is not JSON: {error}") from error
    except RecursionError as error:
        raise PayloadUnreadable(f"{shown(text)} is nested too deeply to be read") from error


def encode_result(
    value: Any, *, limit: int = 1024 * 1024, depth: int = 100, session: Session | None = None
) -> tuple[str | None, str | None]:
    """Return what a handler returned as JSON text, and what is wrong with it, if anything is.

    A result that cannot be stored does not fail its job: the text is then a note which says that it was not kept,
    and why. Only a failing flush raises, since nothing can be committed after it.
    """
    if value is None:
        return None, None
    try:
        return encode(value, where="result", limit=limit, depth=depth, session=session), None
    except SQLAlchemyError:
        raise
    except Exception as error:
        problem = sanitise(f"the result was not kept: {error}", 2000)
        return _dump(problem), problem


def reference_of(obj: Any, *, where: str = "content_object", session: Session | None = None) -> tuple[str, str]:
    """Return the class path and the identity, as text, of a mapped object.

    A row has one reference, whichever of its polymorphic classes it was loaded through, so that a query for equal
    texts finds every job that is bound to it. A pending object is flushed, as by `encode`.
    """
    try:
        entity, identity = _identify(obj, session)
        content_type = _path_of(entity, obj)
    except _UnfitError as unfit:
        raise unfit.at(where) from None
    content_key = encode([_canonical(part) for part in identity], where=f"the key of {where}")
    if max(len(content_type), len(content_key)) > KEY_LENGTH:
        message = f"the class or the key of {where} takes over {KEY_LENGTH} characters; pass the object in args"
        raise InvalidPayload(message, argument=where, value=obj)
    return content_type, content_key


def load_reference(content_type: str, content_key: str, *, load: Load, permit: Permit | None = None) -> Any:
    """Return the object of a `reference_of`, by ``load``. Raises as `decode` does."""
    reader = _Reader(load, permit)
    return load(*reader.build("!object", [content_type, decode(content_key, load=load, permit=permit)]))


def sanitise(text: str, limit: int = 64 * 1024) -> str:
    r"""Return ``text`` as every database takes it, in at most ``limit`` bytes of UTF-8.

    NUL and lone surrogates become visible escapes (``\x00``, ``\ud800``). Of a text that is too long, the head and the
    tail are kept, and between them a line that says how much was cut.
    """
    data = text.replace("\0", r"\x00").encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data.decode()
    half = max(0, limit - len(f"\n... {len(data):,} bytes cut ...\n")) // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[len(data) - half :]))
    return f"{head}\n... {len(data) - len((head + tail).encode()):,} bytes cut ...\n{tail}"


# Writing


class _UnfitError(Exception):
    """A value that cannot be stored, and why. The walk that met it knows where it is."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(reason)
        self.value = value

    def at(self, path: str) -> InvalidArgument:
        return InvalidArgument(f"{path} is {shown(self.value)}, {self}", argument=path, value=self.value)


class _Writer:
    """One walk through one value, which knows where it is and how much it may still write."""

    def __init__(self, where: str, limit: int, depth: int, session: Session | None) -> None:
        self.where, self.limit, self.depth, self.session = where, limit, depth, session
        self.room = limit
        self.steps: list[tuple[str, object]] = []
        self.entered: set[int] = set()

    @property
    def path(self) -> str:
        steps = [form.format(shown(key), key) for form, key in self.steps]
        return self.where + "".join(steps if len(steps) < 20 else [*steps[:10], "…", *steps[-5:]])  # noqa: PLR2004

    def write(self, value: Any) -> Any:
        """Return what JSON has of ``value``: itself, or an object with a tag."""
        kind = type(value)
        self.spend(len(value) if kind is str or kind is bytes else 1)
        if kind in PLAIN and _is_json(value):
            return value
        if kind is list or kind is dict:
            made = self.enter(value, value)
            return made if type(made) is kind else {"!dict": made}
        if kind in _TAG_OF:
            tag = _TAG_OF[kind]
            return {tag: self.enter(value, _TAGS[tag].write(value))}
        if isinstance(value, Enum):
            return {"!enum": [_path_of(kind, value), self.write(_member(value))]}
        if _is_mapped(kind):
            _, identity = _identify(value, self.session)
            return {"!object": [_path_of(kind, value), [self.write(part) for part in identity]]}
        if is_dataclass(kind) and not isinstance(value, _BUILTINS):
            return {"!dataclass": [_path_of(kind, value), self.enter(value, _fields(value))]}
        raise _UnfitError(value, f"{_named(kind)}, which cannot be stored; {_instead(value)}")

    def spend(self, size: int) -> None:
        """Take what a value needs at the very least: parts that are shared could multiply without end."""
        self.room -= size
        if self.room < 0:
            remedy = "keep large data in a table or a file, and pass its key"
            message = f"{self.path} goes past the limit of {self.limit:,} bytes; {remedy}"
            raise InvalidPayload(message, argument=self.path)

    def enter(self, value: object, content: Any) -> Any:
        """Write ``content``, what ``value`` is made of; a dict that JSON does not have comes back as pairs."""
        if not isinstance(content, list | dict):
            return content
        if id(value) in self.entered:
            raise InvalidPayload(f"{self.path} is cyclic: it contains itself", argument=self.path, value=value)
        if len(self.steps) >= self.depth:
            raise InvalidPayload(f"{self.path} is nested deeper than {self.depth}", argument=self.path, value=value)
        self.entered.add(id(value))
        made: Any
        if isinstance(content, list):
            made = [self.step("[{}]", index, item) for index, item in enumerate(content)]
        elif content is not value:
            made = {name: self.step(".{1}", name, item) for name, item in content.items()}
        elif all(type(key) is str and not key.startswith("!") and _is_json(key) for key in content):
            made = {self.write(key): self.step("[{}]", key, item) for key, item in content.items()}
        else:
            made = [[self.step(" key {}", key, key), self.step("[{}]", key, item)] for key, item in content.items()]
        self.entered.remove(id(value))
        return made

    def step(self, form: str, key: object, value: Any) -> Any:
        self.steps.append((form, key))
        made = self.write(value)
        self.steps.pop()
        return made


def _encode_flat(values: Sequence[Any]) -> list[str] | None:
    """Return each of ``values`` as JSON, all written in one step; None if any may need more than that.

    No text within JSON has a line break, and nothing within a flat value ends as the value does: so the breaks between
    values are known from those between their items.
    """
    kinds = set(map(type, values))
    if kinds == {list}:
        parts = chain.from_iterable(values)
    elif kinds == {dict} and TEXT.issuperset(map(type, chain.from_iterable(values))):
        parts = chain.from_iterable(map(dict.values, values))
    else:
        return None
    if not PLAIN.issuperset(map(type, parts)):
        return None
    try:
        text = _dump_lines(values)
    except ValueError:
        return None
    if TAG in text or r"\ud" in text:
        return None
    ends = "],\n[" if kinds == {list} else "},\n{"
    texts = text[1:-1].replace(ends, ends.replace(",", "")).replace(",\n", ",").split("\n")
    return texts if max(map(len, texts)) <= DIGITS else None


def _is_flat(value: Any) -> bool:
    """Tell whether ``value`` is a list or dict of plain values, as the arguments of most jobs are."""
    if type(value) is list:
        return PLAIN.issuperset(map(type, value))
    return type(value) is dict and TEXT.issuperset(map(type, value)) and PLAIN.issuperset(map(type, value.values()))


def _is_json(value: Any) -> bool:
    """Tell whether JSON keeps a plain value as it is."""
    if isinstance(value, str):
        return value.isascii() or not PAIR.search(value)
    return value is None or (math.isfinite(value) if isinstance(value, float) else abs(value) < HUGE)


def _is_mapped(kind: type[Any]) -> bool:
    return isinstance(inspect(kind, raiseerr=False), Mapper)


def _identify(value: Any, session: Session | None) -> tuple[type[Any], tuple[Any, ...]]:
    """Return the class that the row of a mapped object is known by, and its key."""
    if not _is_mapped(type(value)):
        raise _UnfitError(value, f"{_named(type(value))}; pass a mapped object")
    state = inspect(value)
    if state.pending:
        if session is not None and value not in session:
            raise _UnfitError(value, "new in another Session; flush it there first, or add it to this one")
        (state.session if session is None else session).flush()
    if state.key is None:
        raise _UnfitError(value, "a mapped object in no Session, so it has no key yet; add it to the session first")
    if state.was_deleted or (state.session is not None and value in state.session.deleted):
        raise _UnfitError(value, "a mapped object that is deleted")
    entity, identity, shard = state.key
    if shard is not None:
        raise _UnfitError(value, f"a mapped object in shard {shard!r}; pass its key and load it in the handler")
    return entity, tuple(identity)


def _path_of(cls: type[Any], value: object) -> str:
    """Return the path of the class of ``value``, by which it can be found again."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise _UnfitError(value, f"whose class is not to be found as {_named(cls)}; define it at the top of a module")
    return f"{cls.__module__}:{cls.__qualname__}"


def _canonical(part: Any) -> Any:
    """Return one spelling for keys that are equal: a database gives ``2.50`` for the ``2.5`` that was stored."""
    if type(part) is Decimal and part.is_finite():
        return part.normalize(Context(prec=max(1, len(part.as_tuple().digits))))
    return part.astimezone(UTC) if type(part) is datetime and part.tzinfo is not None else part


def _member(value: Enum) -> str | int:
    if type(value).__members__.get(value.name) is value:
        return value.name
    if isinstance(value, Flag):
        return int(value.value)
    raise _UnfitError(value, f"which is no member of {_named(type(value))}")


def _fields(value: Any) -> dict[str, Any]:
    declared = fields(value)
    try:
        signature(type(value)).bind(**dict.fromkeys(field.name for field in declared if field.init))
    except (TypeError, ValueError) as error:
        raise _UnfitError(value, f"a dataclass that its fields alone cannot make: {error}") from None
    return {field.name: getattr(value, field.name) for field in declared if hasattr(value, field.name)}


def _moment(value: datetime | time) -> str | list[Any]:
    zone = value.tzinfo
    name: str | list[str] | None = None
    if type(zone) is ZoneInfo and zone.key:
        name, value = zone.key, value.replace(tzinfo=None)
    elif type(zone) is timezone and not zone.utcoffset(None).microseconds:  # fromisoformat() may lose them
        given, derived = zone.tzname(None), timezone(zone.utcoffset(None)).tzname(None)
        name = None if given == derived else [given]
    elif zone is not None:
        remedy = "use zoneinfo.ZoneInfo, or datetime.timezone of whole seconds"
        raise _UnfitError(value, f"whose time zone, {shown(zone)}, cannot be stored; {remedy}")
    return [value.isoformat(), name, value.fold] if name or value.fold else value.isoformat()


def _parts(value: relativedelta) -> dict[str, Any]:
    parts = {name: part for name in _RELATIVE if (part := getattr(value, name))}
    parts |= {name: part for name in _ABSOLUTE if (part := getattr(value, name)) is not None}
    if value.weekday is not None:
        parts["weekday"] = [value.weekday.weekday, value.weekday.n]
    if _read_parts(parts) != value:
        raise _UnfitError(value, "a relativedelta that was changed after it was made")
    return parts


def _named(kind: type[Any]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _instead(value: object) -> str:
    return next(
        (remedy for kinds, remedy in _REMEDIES if isinstance(value, kinds)),
        "pass plain data, a dataclass or a mapped object",
    )


# Reading


class _Reader:
    """Turns each tagged object in one text back into its value, the innermost first."""

    def __init__(self, load: Load, permit: Permit | None) -> None:
        self.load = load
        self.permit = permit or (lambda _: None)

    def read(self, mapping: dict[str, Any]) -> Any:
        if not any(key.startswith("!") for key in mapping):
            return mapping
        tag, content = next(iter(mapping.items()))
        if len(mapping) != 1:
            raise PayloadUnreadable(f"{shown(mapping)} is damaged: {tag} stands beside other keys")
        made = self.build(tag, content)
        return self.load(*made) if tag == "!object" else made

    def build(self, tag: str, content: Any) -> Any:
        """Return what ``content`` means under ``tag``; for a mapped object, its class and its key."""
        whole = shown({tag: content})
        if tag in _TAGS:
            shapes, read = _TAGS[tag].shapes, _TAGS[tag].read
        elif tag in _CLASSES:
            cls, content = self.locate(tag, content)
            shapes, read = _CLASSES[tag].shapes, partial(_CLASSES[tag].read, cls)
        else:
            raise PayloadUnreadable(f"{whole} has a tag unknown here: damaged, or written by a later version")
        if type(content) not in shapes:
            raise PayloadUnreadable(f"{whole} is damaged: {tag} of a {type(content).__name__}")
        try:
            return read(content)
        except Exception as error:
            raise PayloadUnreadable(f"{whole} cannot be read: {shown(error)}") from error

    def locate(self, tag: str, content: Any) -> tuple[type[Any], Any]:
        """Return the class that ``content`` names, and the rest of ``content``."""
        match content:
            case [str(path), rest]:
                module, _, name = path.partition(":")
            case _:
                raise PayloadUnreadable(f"{shown({tag: content})} is damaged: it names no class")
        self.permit(f"{module}.{name}")
        try:
            found: Any = import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            fits = isinstance(found, type) and _CLASSES[tag].fits(found)
        except (Exception, SystemExit) as error:
            raise PayloadUnreadable(f"{shown(path)} cannot be found: {shown(error)}") from error
        if not fits:
            raise PayloadUnreadable(f"{shown(path)} is {shown(found)}, which is not for {tag}")
        self.permit(f"{found.__module__}.{found.__qualname__}")
        return found, rest


def _read_member(cls: type[Enum], content: str | int) -> Enum:
    if isinstance(content, str):
        if content not in cls.__members__:
            raise LookupError(f"{_named(cls)} has no member {content}")
        return cls.__members__[content]
    if not issubclass(cls, Flag):
        raise TypeError(f"only a Flag is made from a number, and {_named(cls)} is none")
    return cls(content)


def _read_fields(cls: type[Any], stored: dict[str, Any]) -> Any:
    """Make the object as its class does, then set each field to what was stored.

    So what ``__post_init__`` adds is there, and what it changes is not changed twice.
    """
    declared = {field.name: field for field in fields(cls)}
    made = cls(**{name: value for name, value in stored.items() if declared[name].init})
    for name, value in stored.items():
        object.__setattr__(made, name, value)
    return made


def _read_key(cls: type[Any], content: list[Any]) -> tuple[type[Any], tuple[Any, ...]]:
    key = tuple(content)
    if len(key) != len(inspect(cls).primary_key):
        raise ValueError(f"the key of {_named(cls)} has {len(inspect(cls).primary_key)} columns")
    hash(key)
    return cls, key


def _read_moment(kind: type[Any], content: str | list[Any]) -> Any:
    text, zone, fold = (content, None, 0) if isinstance(content, str) else content
    value = kind.fromisoformat(text).replace(fold=fold)
    if isinstance(zone, str):
        return value.replace(tzinfo=ZoneInfo(zone))
    return value if zone is None else value.replace(tzinfo=timezone(value.utcoffset(), *zone))


def _read_parts(content: dict[str, Any]) -> relativedelta:
    parts = {name: content[name] for name in (*_RELATIVE, *_ABSOLUTE, "weekday") if name in content}
    if len(parts) != len(content):
        raise ValueError("unknown fields")
    if "weekday" in parts:
        day, nth = parts["weekday"]
        parts["weekday"] = weekday(range(7)[day], nth)
    return relativedelta(**parts)


def _read_int(digits: str) -> int:
    if len(digits) > DIGITS + 1:
        raise PayloadUnreadable(f"{shown(digits)} is an integer of {len(digits):,} digits, which is never written")
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise PayloadUnreadable(f"{name} is not JSON")


def _decoder(hook: Callable[[dict[str, Any]], Any] | None = None) -> Callable[[str], Any]:
    return json.JSONDecoder(object_hook=hook, parse_int=_read_int, parse_constant=_refuse_constant).decode


_decode_plain = _decoder()


# The format


class _Tag(NamedTuple):
    kind: type[Any]
    shapes: tuple[type[Any], ...]  # what is found under the tag
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


class _Class(NamedTuple):
    fits: Callable[[type[Any]], bool]
    shapes: tuple[type[Any], ...]  # what is found beside the class
    read: Callable[[Any, Any], Any]


_TAGS: Mapping[str, _Tag] = {
    "!int": _Tag(int, (str,), hex, partial(int, base=16)),
    "!float": _Tag(float, (str,), repr, float),
    "!str": _Tag(str, (list,), PAIR.split, "".join),
    "!bytes": _Tag(bytes, (str,), lambda value: b64encode(value).decode(), partial(b64decode, validate=True)),
    "!date": _Tag(date, (str,), date.isoformat, date.fromisoformat),
    "!datetime": _Tag(datetime, (str, list), _moment, partial(_read_moment, datetime)),
    "!time": _Tag(time, (str, list), _moment, partial(_read_moment, time)),
    "!timedelta": _Tag(timedelta, (list,), lambda v: [v.days, v.seconds, v.microseconds], lambda v: timedelta(*v)),
    "!relativedelta": _Tag(relativedelta, (dict,), _parts, _read_parts),
    "!uuid": _Tag(UUID, (str,), str, UUID),
    "!decimal": _Tag(Decimal, (str,), str, Decimal),
    "!tuple": _Tag(tuple, (list,), list, tuple),
    "!set": _Tag(set, (list,), list, set),
    "!frozenset": _Tag(frozenset, (list,), list, frozenset),
    "!dict": _Tag(dict, (list,), list, dict),
}
_CLASSES: Mapping[str, _Class] = {
    "!enum": _Class(lambda cls: issubclass(cls, Enum), (str, int), _read_member),
    "!dataclass": _Class(lambda cls: is_dataclass(cls) and not _is_mapped(cls), (dict,), _read_fields),
    "!object": _Class(_is_mapped, (list,), _read_key),
}
_TAG_OF = {tag.kind: name for name, tag in _TAGS.items()}
_RELATIVE = ("years", "months", "days", "leapdays", "hours", "minutes", "seconds", "microseconds")
_ABSOLUTE = ("year", "month", "day", "hour", "minute", "second", "microsecond")
_BUILTINS = (str, bytes, int, float, list, tuple, set, frozenset, dict)
_REMEDIES: tuple[tuple[Any, str], ...] = (
    ((Session, scoped_session), "annotate a parameter of the handler with Session: it gets the job's own"),
    ((type, Callable), "pass its dotted path as text"),
    (io.IOBase, "pass its path, or what it contains"),
    *((kind, f"pass a plain {kind.__name__}") for kind in (*_BUILTINS, datetime, date, time, timedelta, Decimal, UUID)),
    ((bytearray, memoryview), "pass bytes(...) of it"),
    (Mapping, "pass dict(...) of it"),
    ((Iterator, Collection), "pass list(...) of it"),
)
