"""What is passed to a job arrives as it was given, or is refused when it is scheduled."""

import dataclasses
import enum
import json
import math
import sys
import uuid
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from dateutil.relativedelta import FR, MO, SU, relativedelta
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import ForeignKey, Numeric, create_engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column, scoped_session
from sqlalchemy.pool import StaticPool

from future_jobs.errors import (
    CallableRefused,
    InvalidArgument,
    InvalidPayload,
    ObjectMissing,
    PayloadUnreadable,
    UsageError,
)
from future_jobs.payloads import (
    AT_ONCE,
    DIGITS,
    decode,
    encode,
    encode_many,
    encode_result,
    load_reference,
    reference_of,
    sanitise,
)

HERE = __name__


class Colour(enum.Enum):
    RED = 1
    BLUE = 2
    AZURE = BLUE


class Size(enum.StrEnum):
    LARGE = "large"


class Level(enum.IntEnum):
    HIGH = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    BOTH = 3


class Bits(enum.IntFlag):
    ONE = 1
    FOUR = 4


@dataclass(frozen=True)
class Point:
    x: object
    y: object = None


@dataclass
class Price:
    cents: int
    label: str = field(init=False, default="new")

    def __post_init__(self):
        self.cents += 1
        self.shown = f"{self.cents / 100:.2f}"


@dataclass
class Scaled:
    size: int
    scale: InitVar[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slotted:
    name: str
    tags: tuple = ()


class Outer:
    class Inner(enum.Enum):
        DEEP = "deep"


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)


class Line(Base):
    __tablename__ = "line"
    order: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(primary_key=True)


class Token(Base):
    __tablename__ = "token"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)


class Rate(Base):
    __tablename__ = "rate"
    id: Mapped[Decimal] = mapped_column(Numeric(10, 2, asdecimal=True), primary_key=True)


class Staff(Base):
    __tablename__ = "staff"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}


class Manager(Staff):
    __tablename__ = "manager"
    id: Mapped[int] = mapped_column(ForeignKey("staff.id"), primary_key=True)
    bonus: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "manager"}


class Mark(MappedAsDataclass, Base):
    __tablename__ = "mark"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def engine():
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine):
    with Session(engine) as session:
        yield session


def no_object(cls, identity):
    raise AssertionError(f"nothing to load, but {cls} {identity}")


def there_and_back(value, **options):
    return decode(encode(value, where="args", **options), load=no_object)


def loader(session):
    def load(cls, identity):
        found = session.get(cls, identity)
        if found is None:
            raise ObjectMissing(cls.__name__, identity)
        return found

    return load


def same(a, b):
    """Equal, of the same types all the way down, and printed alike (1 is not True, -0.0 is not 0.0)."""
    match a:
        case _ if type(a) is not type(b):
            return False
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
        case dict():
            return len(a) == len(b) and all(map(same, a.items(), b.items()))
        case set() | frozenset():
            return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
        case Point() | Slotted():
            return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
        case _:
            return spelled(a) == spelled(b)


def spelled(value):
    return hex(value) if type(value) is int else (repr(value), getattr(value, "fold", 0))


# There and back

offsets = st.integers(-86_399, 86_399).map(lambda seconds: timedelta(seconds=seconds))
zones = st.one_of(
    st.none(),
    st.just(UTC),
    offsets.map(timezone),
    st.builds(timezone, offsets, st.sampled_from(["CET", "", "\ud83d\ude00"])),
    st.sampled_from(["Europe/Stockholm", "America/New_York", "UTC", "Asia/Kathmandu"]).map(ZoneInfo),
)
folds = st.sampled_from([0, 1])
datetimes = st.builds(lambda d, z, f: d.replace(tzinfo=z, fold=f), st.datetimes(), zones, folds)
times = st.builds(lambda t, z, f: t.replace(tzinfo=z, fold=f), st.times(), zones, folds)
relatives = st.builds(
    relativedelta,
    years=st.integers(-50, 50),
    months=st.integers(-50, 50),
    days=st.integers(-500, 500) | st.sampled_from([0.5, -1.25]),
    leapdays=st.integers(-1, 1),
    hours=st.integers(-50, 50),
    microseconds=st.integers(-5, 5),
    month=st.none() | st.integers(1, 12),
    hour=st.none() | st.integers(0, 23),
    minute=st.none() | st.just(0),
    weekday=st.none() | st.sampled_from([MO, SU(-1), FR(+2)]),
)
characters = st.characters(exclude_categories=()) | st.sampled_from(
    ["\0", "\ud83d", "\ude00", "\ud800", "!", '"', "\\"]
)
texts = st.text(characters) | st.sampled_from(["!date", "!dict", "\ud83d\ude00", "😀", '"!', "__type__"])
members = st.sampled_from([*Colour, *Size, *Level, *Access, *Bits, Access(0), Bits(5), Bits(64), Outer.Inner.DEEP])
digits = st.sampled_from([19, 599, 600, 601, 640, 4300, 5000])
huge = st.builds(lambda sign, power, less: sign * (10**power - less), st.sampled_from([1, -1]), digits, st.booleans())
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    huge,
    st.floats(),
    texts,
    st.binary(),
    datetimes,
    st.dates(),
    times,
    st.timedeltas(),
    relatives,
    st.uuids(),
    st.decimals(),
    st.sampled_from([Decimal("sNaN"), Decimal("-0.00"), Decimal("1E+5000")]),
    members,
)
hashables = st.recursive(
    leaves.filter(lambda v: not isinstance(v, Decimal) or not v.is_snan()),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3) | st.builds(Slotted, name=texts)
    ),
    max_leaves=5,
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Slotted, name=inner, tags=inner),
    ),
    max_leaves=12,
)


flat = st.none() | st.booleans() | st.integers() | st.floats() | texts


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(flat)) | st.lists(st.dictionaries(texts, flat)) | st.lists(values))
@example([["],\n[", "a\nb"], ["]", "[", ","], []])
@example([{"},\n{": "},\n{"}, {}, {",\n": 1}])
@example([[1], {"k": 1}])
@example([[10**DIGITS], ["x" * DIGITS], [math.nan], ["!"], ["\ud800", "\udc00"]])
@example([{1: 2}, {None: 3}, {"!": 4}])
@example([[n] for n in range(2 * AT_ONCE + 1)])
def test_many_values_become_the_texts_that_each_becomes(some):
    assert list(encode_many(some, where="args")) == [encode(value, where="args") for value in some]


@settings(max_examples=500, deadline=None)
@given(values)
@example({"!date": "2026-03-01"})
@example({"!dict": [["a", 1]], "b": 2})
@example([{"!unknown": {"!tuple": []}}])
@example({(1, (2, "x")): {None: {1.5: {True: "deep"}}}})
@example({"\ud83d\ude00": 1, "😀": 2})
@example({(1, 2), (3, frozenset({4}))})
@example([-0.0, math.nan, math.inf, -math.inf, 10**5000])
@example([True, 1, 1.0, Level.HIGH, 3])
def test_what_goes_in_comes_out(value):
    text = encode(value, where="args")
    assert same(decode(text, load=no_object), value)
    assert text.isascii()
    assert "\0" not in text
    json.loads(text, parse_constant=no_object)  # strict JSON


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.none() | st.booleans() | st.integers() | huge | st.floats() | texts) | st.dictionaries(texts, leaves)
)
def test_the_short_way_for_plain_values_writes_what_the_long_way_does(value):
    short, long = encode(value, where="args"), encode([[value]], where="args")
    assert f"[[{short}]]" == long


def test_none_stands_for_no_payload():
    assert decode(None, load=no_object) is None
    assert encode(None, where="result") == "null"


def test_the_order_of_a_dict_survives():
    for value in ({"b": 1, "a": 2}, {2: "x", 1: "y", "!": "z"}):
        assert list(there_and_back(value).items()) == list(value.items())


def test_plain_payloads_are_the_json_one_expects():
    assert encode([11, "a", None, True, 1.5], where="args") == '[11,"a",null,true,1.5]'
    assert encode({"k": 12}, where="kwargs") == '{"k":12}'
    assert encode({"k": [{"a": {}}]}, where="kwargs") == '{"k":[{"a":{}}]}'


def test_an_enum_alias_is_its_member_and_a_renamed_member_is_unreadable():
    text = encode(Colour.AZURE, where="args")
    assert text == f'{{"!enum":["{HERE}:Colour","BLUE"]}}'
    with pytest.raises(PayloadUnreadable, match="GREEN"):
        decode(text.replace("BLUE", "GREEN"), load=no_object)


def test_an_aware_datetime_keeps_its_zone_and_which_of_two_wall_times_it_means():
    first = datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Stockholm"))
    second = first.replace(fold=1)
    assert there_and_back(second).tzinfo is ZoneInfo("Europe/Stockholm")
    assert [there_and_back(t).astimezone(UTC).hour for t in (first, second)] == [0, 1]


def test_a_dataclass_is_made_as_its_class_does_and_then_has_the_fields_that_were_stored():
    price = Price(99)
    price.label = "sale"
    back = there_and_back(price)
    assert (back.cents, back.label, back.shown) == (100, "sale", "1.01")  # derived anew, but the fields are exact


def test_a_field_that_was_added_since_gets_its_default():
    assert decode(f'{{"!dataclass":["{HERE}:Point",{{"x":1}}]}}', load=no_object) == Point(1)


def test_one_datum_that_is_used_twice_is_not_a_cycle():
    part = [1]
    assert there_and_back([part, part, {"k": part}]) == [[1], [1], {"k": [1]}]


# Refused


def local_enum():
    class Local(enum.Enum):
        A = 1

    return Local.A


def local_dataclass():
    @dataclass
    class Local:
        a: int = 1

    return Local()


class Text(str):
    __slots__ = ()


class Zone(tzinfo):
    pass


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (object(), "pass plain data"),
        (Unprintable(), "repr"),
        (Text("x"), "plain str"),
        (Pair(1, 2), "plain tuple"),
        (OrderedDict(a=1), "plain dict"),
        (defaultdict(list), "plain dict"),
        (deque([1]), r"list\(...\)"),
        ((i for i in ()), r"list\(...\)"),
        ({}.keys(), r"list\(...\)"),
        (bytearray(b"x"), r"bytes\(...\)"),
        (sys.stdout, "path"),
        (print, "dotted path"),
        (lambda: 1, "dotted path"),
        (int, "dotted path"),
        (Session(), "annotate a parameter"),
        (scoped_session(Session), "annotate a parameter"),
        (1j, "pass plain data"),
        (ValueError("x"), "pass plain data"),
        (local_enum(), "top of a module"),
        (local_dataclass(), "top of a module"),
        (Scaled(1, scale=2), "scale"),
        (datetime(2026, 1, 1, tzinfo=Zone()), "ZoneInfo"),
        (datetime(2026, 1, 1, tzinfo=timezone(timedelta(microseconds=1))), "whole seconds"),
        (User(id=1), "add it to the session first"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_path_and_what_to_pass_instead(value, remedy):
    for given_value, path in (
        ([1, 2, value], "args[2]"),
        ([1, {"k": [value]}], "args[1]['k'][0]"),
        ((Point(1, value),), "args[0].y"),
        ({(1, 2): value}, "args[(1, 2)]"),
    ):
        with pytest.raises(InvalidArgument, match=remedy) as caught:
            encode(given_value, where="args")
        assert str(caught.value).startswith(f"{path} is ")
        assert (caught.value.argument, caught.value.value) == (path, value)
        assert isinstance(caught.value, TypeError | UsageError)


def test_a_key_that_cannot_be_stored_is_named():
    with pytest.raises(InvalidArgument, match=r"^kwargs\['k'\] key \(1, <built-in function print>\)\[1\] is <built-in"):
        encode({"k": {(1, print): 2}}, where="kwargs")


def test_a_cycle_is_refused_with_its_path():
    cyclic = [1]
    cyclic.append({"k": cyclic})
    mutual = {}
    mutual["self"] = (mutual,)
    for value, path in ((cyclic, r"args\[1\]\['k'\] is cyclic"), (mutual, r"args\['self'\]\[0\] is cyclic")):
        with pytest.raises(InvalidPayload, match=path):
            encode(value, where="args")


def nested(levels, wrap=lambda value: [value]):
    value = wrap(1)
    for _ in range(levels - 1):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {1: v}, Point])
def test_a_hundred_levels_are_stored_and_one_more_is_refused(wrap):
    assert same(there_and_back(nested(100, wrap)), nested(100, wrap))
    with pytest.raises(InvalidPayload, match="deeper than 100"):
        encode(nested(101, wrap), where="args")


def test_no_depth_ends_in_a_recursion_error():
    for depth in (100, 10**6):
        with pytest.raises(InvalidPayload, match="nested"):
            encode(nested(50_000), where="args", depth=depth)
    assert there_and_back(nested(150), depth=150) == nested(150)


def test_arguments_over_the_limit_are_refused_with_the_part_that_passes_it():
    with pytest.raises(InvalidPayload, match=r"args\[1\] goes past the limit of 262,144 bytes"):
        encode([1, "x" * 300_000], where="args")
    with pytest.raises(InvalidPayload, match="limit of 10 bytes"):
        encode(["x" * 10], where="args", limit=10)
    assert there_and_back(["x" * 6], limit=10) == ["x" * 6]
    with pytest.raises(InvalidPayload, match="limit of 60,000"):
        encode(["😀" * 10_000], where="args", limit=60_000)  # 12 bytes each in ASCII


def test_parts_that_are_shared_do_not_multiply_without_end():
    value = [1] * 10
    for _ in range(40):
        value = [value] * 10
    with pytest.raises(InvalidPayload, match="goes past the limit"):
        encode(value, where="args")


def test_an_integer_of_5000_digits_survives_under_every_limit_on_int_to_text():
    before = sys.get_int_max_str_digits()
    try:
        for written, read in ((0, 640), (640, 0), (4300, 4300)):
            sys.set_int_max_str_digits(written)
            text = encode([10**5000 + 1, 10**700], where="args")
            sys.set_int_max_str_digits(read)
            assert decode(text, load=no_object) == [10**5000 + 1, 10**700]
    finally:
        sys.set_int_max_str_digits(before)


# Damaged

DAMAGED = [
    "",
    "{",
    "[1,]",
    "NaN",
    "[Infinity]",
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"!set":[' * 50_000,
    "1" * 5000,
    '[{"!tuple":[' + "1" * 5000 + "]}]",
    '{"!later":1}',
    '{"!":1}',
    '{"!2":["a payload of codec 2"]}',
    '{"!date":"2026-03-01","b":1}',
    '{"b":1,"!date":"2026-03-01"}',
    '{"!date":"2026-02-30"}',
    '{"!date":5}',
    '{"!date":{"!date":"2026-03-01"}}',
    '{"!datetime":["2026-03-01","Mars/Olympus",0]}',
    '{"!datetime":["2026-03-01","../../etc/passwd",0]}',
    '{"!datetime":["2026-03-01","Europe",0]}',
    '{"!datetime":["2026-03-01",null,7]}',
    '{"!datetime":[1]}',
    '{"!time":["12:00",["x"],0]}',
    '{"!timedelta":[[]]}',
    '{"!timedelta":[99999999999,0,0]}',
    '{"!relativedelta":{"dt1":1}}',
    '{"!relativedelta":{"weekday":[9,1]}}',
    '{"!relativedelta":{"years":"x"}}',
    '{"!uuid":"x"}',
    '{"!decimal":"x"}',
    '{"!bytes":"***"}',
    '{"!int":"xyz"}',
    '{"!float":"xyz"}',
    '{"!str":[1]}',
    '{"!tuple":"ab"}',
    '{"!set":[[1]]}',
    '{"!frozenset":[{}]}',
    '{"!dict":[[[1],2]]}',
    '{"!dict":[1]}',
    '{"!enum":"x"}',
    '{"!enum":["os:path","x"]}',
    '{"!enum":["","x"]}',
    '{"!enum":["no.such.module:X","A"]}',
    '{"!enum":["\\u0000:X","A"]}',
    '{"!enum":["future_jobs.status:Status","NOPE"]}',
    '{"!enum":["future_jobs.status:Status",1]}',
    '{"!enum":["future_jobs.status:Status",[1]]}',
    '{"!enum":["future_jobs.status:ALLOWED","A"]}',
    '{"!enum":["os:system","echo"]}',
    '{"!dataclass":["os:system",{"command":"echo"}]}',
    '{"!dataclass":["subprocess:Popen",{"args":["echo"]}]}',
    f'{{"!dataclass":["{HERE}:Point",{{}}]}}',
    f'{{"!dataclass":["{HERE}:Point",{{"z":1}}]}}',
    f'{{"!dataclass":["{HERE}:Point",[1]]}}',
    f'{{"!dataclass":["{HERE}:Mark",{{"id":1}}]}}',
    f'{{"!dataclass":["{HERE}:Colour","RED"]}}',
    f'{{"!object":["{HERE}:Point",[1]]}}',
    f'{{"!object":["{HERE}:User",[1,2]]}}',
    f'{{"!object":["{HERE}:User",[[1]]]}}',
    f'{{"!object":["{HERE}:User","1"]}}',
    f'{{"!object":["{HERE}:User",1]}}',
    f'{{"!object":["{HERE}:Base",[1]]}}',
]


@pytest.mark.parametrize("text", [*DAMAGED, b"\x00\xff"], ids=lambda text: str(text[:60]))
def test_a_damaged_payload_is_unreadable_and_says_why(text):
    with pytest.raises(PayloadUnreadable) as caught:
        decode(text, load=no_object)
    assert 5 < len(str(caught.value)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
TAGS = "int float str bytes date datetime time timedelta relativedelta uuid decimal tuple set frozenset dict enum"
paths = st.sampled_from([f"{HERE}:{name}" for name in ("Colour", "Bits", "Point", "Slotted", "User", "no_object")])
tagged = st.recursive(
    json_values | st.builds(lambda path, rest: [path, rest], paths, json_values),
    lambda inner: (
        st.dictionaries(
            st.sampled_from([f"!{tag}" for tag in (*TAGS.split(), "dataclass", "object", "x")]),
            inner,
            min_size=1,
            max_size=2,
        )
        | st.lists(inner, max_size=3)
    ),
)


@settings(max_examples=500, deadline=None)
@given((json_values | tagged).map(json.dumps) | st.text())
def test_whatever_a_row_contains_is_read_or_unreadable(text):
    try:
        decode(text, load=lambda *_: None)
        load_reference(f"{HERE}:User", text, load=lambda *_: None)
    except PayloadUnreadable:
        pass


@settings(max_examples=200, deadline=None)
@given(values, st.data())
def test_a_payload_that_was_cut_or_edited_is_read_or_unreadable(value, data):
    text = encode(value, where="args")
    at = data.draw(st.integers(0, len(text)))
    edited = text[:at] + data.draw(st.sampled_from(["", "!", '"', "{", "9"])) + text[at + 1 :]
    try:
        decode(edited, load=no_object)
    except PayloadUnreadable:
        pass


# Allowed


class Refused:
    """An allow-list that remembers what it was asked."""

    def __init__(self, *prefixes):
        self.prefixes, self.asked = prefixes, []

    def __call__(self, path):
        self.asked.append(path)
        if not path.startswith(self.prefixes):
            raise CallableRefused(f"{path} is not allowed")


def test_a_class_is_asked_for_before_its_module_is_imported():
    sys.modules.pop("this", None)
    permit = Refused("shop.")
    with pytest.raises(CallableRefused):
        decode('{"!enum":["this:X","A"]}', load=no_object, permit=permit)
    assert permit.asked == ["this.X"]
    assert "this" not in sys.modules


def test_a_class_is_asked_for_again_where_it_is_defined():
    permit = Refused("future_jobs.lifecycle.", "future_jobs.models.")
    with pytest.raises(CallableRefused, match=r"future_jobs\.status\.Status is not allowed"):
        decode('{"!enum":["future_jobs.models:Status","FAILED"]}', load=no_object, permit=permit)
    permit = Refused(HERE)
    assert decode(encode([Colour.RED, Point(1)], where="args"), load=no_object, permit=permit) == [Colour.RED, Point(1)]
    assert permit.asked == [f"{HERE}.Colour"] * 2 + [f"{HERE}.Point"] * 2


def test_what_load_raises_passes_through():
    def load(cls, identity):
        raise ObjectMissing(cls.__name__, identity)

    with pytest.raises(ObjectMissing, match=r"User \(7,\) no longer exists"):
        decode(f'[{{"!object":["{HERE}:User",[7]]}}]', load=load)


# Mapped objects


def test_a_mapped_object_arrives_as_the_live_object(session):
    user = User(id=7, name="Ada")
    line = Line(order=1, number="b")
    session.add_all([user, line])
    text = encode([user, {"line": line}], where="args")
    assert text == f'[{{"!object":["{HERE}:User",[7]]}},{{"line":{{"!object":["{HERE}:Line",[1,"b"]]}}}}]'
    assert decode(text, load=loader(session)) == [user, {"line": line}]


def test_a_pending_object_gets_its_key_by_a_flush(session):
    user, token = User(name="Ada"), Token()
    session.add_all([user, token])
    text = encode([user, token], where="args", session=session)
    assert user.id is not None
    assert f'{{"!uuid":"{token.id}"}}' in text
    session.expunge_all()
    again, other = decode(text, load=loader(session))
    assert (again.name, other.id) == ("Ada", token.id)


def test_a_scoped_session_is_known_as_the_session_of_its_objects(engine):
    scoped = scoped_session(lambda: Session(engine))
    user = User()
    scoped.add(user)
    assert encode([user], where="args", session=scoped) == f'[{{"!object":["{HERE}:User",[1]]}}]'
    scoped.remove()


def test_an_object_that_is_new_in_another_session_is_refused(session, engine):
    with Session(engine) as other:
        user = User()
        other.add(user)
        with pytest.raises(InvalidArgument, match=r"args\[0\] is .* new in another Session"):
            encode([user], where="args", session=session)
        other.flush()
        assert encode([user], where="args", session=session)


def test_detached_and_expired_objects_are_stored_without_a_query(session, engine):
    user = User(id=7)
    session.add(user)
    session.commit()
    expected = f'[{{"!object":["{HERE}:User",[7]]}}]'
    assert encode([user], where="args") == expected
    assert "id" not in user.__dict__  # still expired
    session.expunge(user)
    assert encode([user], where="args") == expected


def test_a_deleted_object_is_refused(session):
    user = User(id=7)
    session.add(user)
    session.commit()
    session.delete(user)
    with pytest.raises(InvalidArgument, match=r"args\[0\] is .* deleted"):
        encode([user], where="args")
    session.flush()
    with pytest.raises(InvalidArgument, match="deleted"):
        encode([user], where="args")
    session.commit()
    with pytest.raises(InvalidArgument, match="deleted"):
        reference_of(user)


def test_an_object_whose_insert_was_rolled_back_is_refused(session):
    user = User(id=7)
    session.add(user)
    session.flush()
    session.rollback()
    with pytest.raises(InvalidArgument, match="add it to the session first"):
        encode([user], where="args")


def test_a_polymorphic_object_is_loaded_as_what_it_is(session):
    session.add(Manager(id=3, bonus=10))
    session.commit()
    manager = session.get(Staff, 3)
    text = encode([manager], where="args")
    assert text == f'[{{"!object":["{HERE}:Manager",[3]]}}]'
    assert decode(text, load=loader(session)) == [manager]


def test_a_mapped_dataclass_is_a_reference(session):
    session.add(Mark(id=1))
    session.flush()
    assert '"!object"' in encode([session.get(Mark, 1)], where="args")


def test_a_row_has_one_reference_whichever_class_it_was_loaded_through(session):
    session.add(Manager(id=3, bonus=10))
    session.commit()
    session.expunge_all()
    as_staff = reference_of(session.get(Staff, 3))
    session.expunge_all()
    as_manager = reference_of(session.get(Manager, 3))
    assert as_staff == as_manager == (f"{HERE}:Staff", "[3]")
    assert isinstance(load_reference(*as_staff, load=loader(session)), Manager)


def test_a_reference_is_the_same_before_and_after_the_database_has_spelled_the_key(session):
    rate = Rate(id=Decimal("2.5"))
    session.add(rate)
    before = reference_of(rate)
    session.commit()
    session.expunge_all()
    loaded = session.scalars(select(Rate.id)).one()
    assert str(loaded) == "2.50"
    assert reference_of(session.get(Rate, loaded)) == before
    assert load_reference(*before, load=loader(session)).id == Decimal("2.5")


def test_a_reference_keeps_the_types_of_a_key(session):
    token, line = Token(), Line(order=1, number="1")
    session.add_all([token, line])
    assert reference_of(line, session=session) == (f"{HERE}:Line", '[1,"1"]')
    assert load_reference(*reference_of(token), load=loader(session)) is token


def test_a_reference_that_does_not_fit_its_column_is_refused(session):
    line = Line(order=1, number="x" * 255)
    session.add(line)
    with pytest.raises(InvalidPayload, match="content_object takes over 255"):
        reference_of(line)


@pytest.mark.parametrize("value", [5, None, User, object(), Point(1), User()])
def test_only_a_stored_mapped_object_has_a_reference(value):
    with pytest.raises(
        InvalidArgument, match=r"^content_object is .*(pass a mapped object|add it to the session first)"
    ):
        reference_of(value)


def test_the_class_of_a_reference_must_be_allowed():
    with pytest.raises(CallableRefused):
        load_reference("this:X", "[1]", load=no_object, permit=Refused("shop."))


# Results


def test_a_result_is_stored_or_the_reason_why_not(session):
    assert encode_result(None) == (None, None)
    assert encode_result((1, 2)) == ('{"!tuple":[1,2]}', None)
    user = User()
    session.add(user)
    assert encode_result(user) == (f'{{"!object":["{HERE}:User",[1]]}}', None)
    for value, reason in ((object(), "cannot be stored"), ("x" * 2**20, "1,048,576"), (nested(101), "deeper")):
        text, problem = encode_result(value)
        assert problem.startswith("the result was not kept: result")
        assert reason in problem
        assert decode(text, load=no_object) == problem
        assert len(problem) < 2001


def test_a_result_that_raises_when_it_is_looked_at_is_not_kept():
    @property
    def broken(self):
        raise RuntimeError("boom")

    point = Point(1)
    before = Point.__dict__.get("y")
    try:
        Point.y = broken
        text, problem = encode_result(point)
    finally:
        Point.y = before
    assert "boom" in problem
    assert text


def test_a_result_whose_flush_fails_is_the_failure_of_the_job(session):
    session.add_all([User(name="Ada"), user := User(name="Ada")])
    with pytest.raises(IntegrityError):
        encode_result(user, session=session)


# Text


def test_nul_and_lone_surrogates_become_visible():
    assert sanitise("a\0b\ud800c\udfff 😀 é") == r"a\x00b\ud800c\udfff 😀 é"


@settings(deadline=None)
@given(st.text(characters), st.integers(60, 200))
def test_any_text_fits_any_database_and_its_limit(text, limit):
    clean = sanitise(text, limit)
    assert len(clean.encode()) <= limit
    assert "\0" not in clean


def test_a_long_text_keeps_its_head_and_its_tail():
    text = "head" + "é" * 100_000 + "tail"
    clean = sanitise(text)
    assert clean.startswith("headé")
    assert clean.endswith("étail")
    assert len(clean.encode()) <= 64 * 1024
    head, marker, tail = clean.split("\n")
    assert marker == f"... {len(text.encode()) - len((head + tail).encode()):,} bytes cut ..."


def test_the_pieces_of_text_below_the_limit_are_untouched():
    for a, b in pairwise(["", "x", "x" * 65_536]):
        assert (sanitise(a), sanitise(b)) == (a, b)


def test_dates_are_not_datetimes():
    assert type(there_and_back(date(2026, 3, 1))) is date
