"""`JSONCodec` gives back what it was given, for every kind of class and every type it accepts."""

from __future__ import annotations

import enum
import string
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, NewType, Self, TypedDict, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import hypothesis.strategies as st
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from typing_extensions import TypeAliasType

from eventbus._codec import Fault, JSONCodec

T = TypeVar("T")
U = TypeVar("U")

CODEC = JSONCodec()


class Color(enum.StrEnum):
    RED = "red"
    GREEN = "green"


class Plain(enum.Enum):
    ONE = 1
    TWO = "2"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 10


class Perms(enum.Flag):
    R = enum.auto()
    W = enum.auto()
    X = enum.auto()


class Sku(str):
    __slots__ = ()


OrderId = NewType("OrderId", UUID)
Price = Annotated[Decimal, "in EUR"]
Alias = TypeAliasType("Alias", dict[str, list[int] | None])


@attrs.frozen
class Box(Generic[T]):
    content: T
    more: list[T] = attrs.field(factory=list)


@dataclass
class Pair(Generic[T, U]):
    left: T
    right: U


@attrs.frozen
class IntBox(Box[int]):
    name: str = ""


@attrs.frozen
class Mixed(IntBox, Generic[T]):  # T is int in Box, and something else here
    own: T | None = None


@attrs.frozen
class Tree:
    name: str
    below: tuple[Tree, ...] = ()
    parent: Tree | None = None
    by_name: dict[str, Self] = attrs.field(factory=dict)


@attrs.define
class Private:
    _hidden: int
    __mangled: str = "m"
    shown: str = attrs.field(alias="display", default="d")
    kw: int = attrs.field(kw_only=True, default=0)


@attrs.frozen
class Card:
    kind: Literal["card"]
    number: str


@attrs.frozen
class Cash:
    kind: Literal["cash"]
    amount: Price


@attrs.frozen
class Coins:
    kind: Literal["cash"]
    pieces: int


@dataclass(frozen=True)
class Voucher:
    code: str
    worth: int = 0


@attrs.frozen
class Point:
    x: int
    y: int = 0


class Mini(msgspec.Struct, frozen=True):
    n: int
    at: datetime | None = None


class Tagged(msgspec.Struct, tag="tagged", rename="camel", omit_defaults=True):
    long_name: str
    items: list[Mini] = []
    raw: bytes = b""
    span: timedelta = timedelta(0)
    any: Any = None


class Arrayed(msgspec.Struct, array_like=True):
    a: int
    b: str = ""


class Inner(pydantic.BaseModel):
    price: Decimal
    tags: set[str] = set()


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)

    id: UUID
    name: str = pydantic.Field(alias="theName")
    at: pydantic.AwareDatetime
    span: timedelta = timedelta(0)
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    any: Any = None
    kind: Literal["a", "b"] = "a"
    _private: int = pydantic.PrivateAttr(default_factory=lambda: 5)


class Rooted(pydantic.RootModel[list[int]]):
    pass


class PBox(pydantic.BaseModel, Generic[T]):
    content: T


class Named(NamedTuple):
    a: int
    at: datetime


class Typed(TypedDict):
    a: int
    price: Decimal


# ------------------------------------------------------------------ values

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["", "\0", "\x7f", "💥", '"', "\\", "]}"])
ints = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
decimals = st.decimals(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [Decimal("-0"), Decimal("1E+500"), Decimal("9.50")]
)
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)


def whole_seconds(zone: timezone) -> timezone:
    return timezone(timedelta(seconds=zone.utcoffset(None) // timedelta(seconds=1)))


zones = st.sampled_from([UTC, ZoneInfo("Europe/Vienna"), ZoneInfo("Asia/Kathmandu")]) | offsets
moments = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=zones)  # noqa: DTZ001
json = st.recursive(
    st.none() | st.booleans() | ints | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
minis = st.builds(Mini, ints, st.none() | moments.map(lambda moment: moment.astimezone(UTC)))
inners = st.builds(Inner, price=decimals, tags=st.sets(texts, max_size=3))
trees = st.recursive(
    st.builds(Tree, texts),
    lambda inner: st.builds(
        Tree, texts, st.lists(inner, max_size=2).map(tuple), st.none() | inner, st.dictionaries(texts, inner, max_size=2)
    ),
    max_leaves=6,
)
models = st.builds(
    Model,
    id=st.uuids(),
    theName=texts,
    at=moments.map(lambda moment: moment.astimezone(UTC)),
    span=st.timedeltas(timedelta(days=-1000), timedelta(days=1000)),
    inner=st.none() | inners,
    many=st.lists(inners, max_size=2).map(tuple),
    any=json,
    kind=st.sampled_from(["a", "b"]),
)
tagged = st.builds(Tagged, texts, st.lists(minis, max_size=2), st.binary(max_size=9), st.timedeltas(), json)

TYPES: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    int: ints,
    float: floats,
    bool: st.booleans(),
    None: st.none(),
    bytes: st.binary(max_size=20),
    Decimal: decimals,
    UUID: st.uuids(),
    datetime: moments,
    date: st.dates(),
    time: st.times(timezones=st.none() | offsets.map(whole_seconds)),
    timedelta: st.timedeltas(),
    Path: texts.filter(lambda text: "\0" not in text).map(Path),
    PurePosixPath: texts.map(PurePosixPath),
    Color: st.sampled_from(Color),
    Plain: st.sampled_from(Plain),
    Level: st.sampled_from(Level),
    Perms: st.sampled_from([Perms(0), Perms.R, Perms.R | Perms.X]),
    Sku: texts.map(Sku),
    OrderId: st.uuids(),
    Price: decimals,
    Alias: st.dictionaries(texts, st.none() | st.lists(ints, max_size=2), max_size=2),
    Final[int]: ints,
    Any: json,
    object: json,
    T: json,
    dict: st.dictionaries(texts, json, max_size=3),
    list: st.lists(json, max_size=3),
    tuple: st.lists(json, max_size=3).map(tuple),
    set: st.sets(texts | ints, max_size=3),
    Literal["a", 1, True, Color.RED] | None: st.sampled_from(["a", 1, True, None, Color.RED]),
    int | None: st.none() | ints,
    int | str | None: st.none() | ints | texts,
    int | float: ints | floats,
    float | str: floats | texts,
    bool | int | Decimal | list[int] | dict[str, int]: st.booleans()
    | ints
    | decimals
    | st.lists(ints, max_size=2)
    | st.dictionaries(texts, ints, max_size=2),
    Literal["auto"] | int: st.just("auto") | ints,
    Literal["auto"] | str: st.just("auto") | texts,  # noqa: PYI051  # users write it
    Color | Literal["auto"]: st.sampled_from([*Color, "auto"]),
    Color | Level | None: st.sampled_from([*Color, *Level, None]),
    list[int]: st.lists(ints, max_size=3),
    list[datetime | None]: st.lists(st.none() | moments, max_size=3),
    Sequence[str]: st.lists(texts, max_size=3).map(tuple),
    tuple[int, ...]: st.lists(ints, max_size=3).map(tuple),
    tuple[int, Decimal, Color]: st.tuples(ints, decimals, st.sampled_from(Color)),
    tuple[()]: st.just(()),
    set[UUID]: st.sets(st.uuids(), max_size=3),
    frozenset[Decimal]: st.frozensets(decimals, max_size=3),
    frozenset[int | str | None]: st.frozensets(ints | texts | st.none(), max_size=4),
    frozenset[bytes]: st.frozensets(st.binary(max_size=4), max_size=3),
    frozenset[Point]: st.frozensets(st.builds(Point, ints, ints), max_size=3),
    AbstractSet[Color]: st.sets(st.sampled_from(Color)) | st.frozensets(st.sampled_from(Color)),
    dict[str, list[float]]: st.dictionaries(texts, st.lists(floats, max_size=2), max_size=3),
    dict[str, Any]: st.dictionaries(texts, json, max_size=3),
    Mapping[int, str]: st.dictionaries(ints, texts, max_size=3),
    dict[UUID, int]: st.dictionaries(st.uuids(), ints, max_size=3),
    dict[OrderId, Point]: st.dictionaries(st.uuids(), st.builds(Point, ints), max_size=3),
    dict[Color, int]: st.dictionaries(st.sampled_from(Color), ints),
    dict[Level, int]: st.dictionaries(st.sampled_from(Level), ints),
    dict[Plain, int]: st.dictionaries(st.sampled_from(Plain), ints),
    dict[date, int]: st.dictionaries(st.dates(), ints, max_size=3),
    dict[datetime, int]: st.dictionaries(moments.map(lambda moment: moment.astimezone(UTC)), ints, max_size=3),
    dict[timedelta, int]: st.dictionaries(st.timedeltas(), ints, max_size=3),
    dict[Decimal, int]: st.dictionaries(decimals, ints, max_size=3),
    dict[bytes, int]: st.dictionaries(st.binary(max_size=4), ints, max_size=3),
    dict[Literal["a", "b"], int]: st.dictionaries(st.sampled_from(["a", "b"]), ints),
    Tree: trees,
    Private: st.builds(Private, ints, texts, texts, kw=ints),
    Point | None: st.none() | st.builds(Point, ints, ints),
    Card | Cash: st.builds(Card, st.just("card"), texts) | st.builds(Cash, st.just("cash"), decimals),
    Card | Cash | Coins: st.builds(Card, st.just("card"), texts)
    | st.builds(Cash, st.just("cash"), decimals)
    | st.builds(Coins, st.just("cash"), ints),
    Card | Voucher | Point | None: st.builds(Card, st.just("card"), texts)
    | st.builds(Voucher, texts, ints)
    | st.builds(Point, ints)
    | st.none(),
    list[Card | Cash | int]: st.lists(st.builds(Card, st.just("card"), texts) | ints, max_size=3),
    Box[int]: st.builds(Box, ints, st.lists(ints, max_size=2)),
    Box[Box[Decimal]]: st.builds(Box, st.builds(Box, decimals)),
    Box: st.builds(Box, json),
    IntBox: st.builds(IntBox, ints, st.lists(ints, max_size=2), texts),
    Mixed[str]: st.builds(Mixed, ints, own=texts),
    Pair[int, list[UUID]]: st.builds(Pair, ints, st.lists(st.uuids(), max_size=2)),
    Mini: minis,
    Mini | None: st.none() | minis,
    Mini | int: ints | minis,
    list[Tagged]: st.lists(tagged, max_size=2),
    Arrayed | Point: st.builds(Arrayed, ints, texts) | st.builds(Point, ints),
    Model: models,
    Model | None: st.none() | models,
    dict[str, Inner]: st.dictionaries(texts, inners, max_size=2),
    Rooted: st.lists(ints, max_size=2).map(Rooted),
    PBox[int]: ints.map(lambda number: PBox[int](content=number)),
    Named: st.builds(Named, ints, moments),
    Typed: st.fixed_dictionaries({"a": ints, "price": decimals}),
    deque[int]: st.lists(ints, max_size=3).map(deque),
    OrderedDict[str, Decimal]: st.dictionaries(texts, decimals, max_size=2).map(OrderedDict),
    defaultdict[str, int]: st.dictionaries(texts, ints, max_size=2).map(lambda found: defaultdict(int, found)),
    Counter[str]: st.dictionaries(texts, st.integers(0, 100), max_size=2).map(Counter),
}


def same(one: Any, other: Any) -> bool:
    """Equal, and of equal types; aware datetimes by what they say, for PEP 495's sake."""
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (datetime, time)):
        return bool(one == other or one.isoformat() == other.isoformat())
    if isinstance(one, Named):
        return one.a == other.a and same(one.at, other.at)
    return bool(one == other) and (type(one) is type(other) or isinstance(one, (set, frozenset)))


@pytest.mark.parametrize("annotation", TYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_accepted_comes_back(annotation: Any, data: st.DataObject) -> None:
    """In an attrs class and in a dataclass, as a field, in a list, and where it is optional."""
    value = data.draw(TYPES[annotation])
    form = type(None) if annotation is None else annotation
    cls = attrs.make_class("Holder", {"value": attrs.field(type=form), "again": attrs.field(type=list[form])}, frozen=True)  # type: ignore[valid-type]
    event = cls(value, [value])
    encoded = CODEC.encode(event)
    back = CODEC.decode(encoded, cls)
    assert same(back.value, value)
    assert same(back.again, [value])
    assert CODEC.encode(back) == encoded


def test_the_cases_are_all_different() -> None:
    """A dict of types loses one that equals another, and with it its test."""
    assert len(TYPES) > 90


# ------------------------------------------------------------------ whole events


@attrs.frozen
class AttrsEvent:
    id: UUID
    _secret: str
    total: Price
    at: datetime
    lines: tuple[Point | Voucher, ...]
    meta: dict[str, Any]
    note: str | None = None


@dataclass
class DataEvent:
    id: UUID
    total: Decimal
    lines: list[Point | Voucher] = field(default_factory=list)
    level: Level = Level.LOW
    meta: dict[str, Any] = field(default_factory=dict, kw_only=True)


lines = st.builds(Point, ints, ints) | st.builds(Voucher, texts, ints)
metas = st.dictionaries(texts, json, max_size=3)
utc_moments = moments.map(lambda moment: moment.astimezone(UTC))
events = st.one_of(
    st.builds(
        AttrsEvent, st.uuids(), texts, decimals, utc_moments, st.lists(lines, max_size=3).map(tuple), metas, st.none() | texts
    ),
    st.builds(DataEvent, st.uuids(), decimals, st.lists(lines, max_size=3), st.sampled_from(Level), meta=metas),
    trees,
    tagged,
    minis,
    models,
    st.builds(Arrayed, ints, texts),
    ints.map(lambda number: PBox[int](content=number)),
)


@settings(max_examples=40, deadline=None)
@given(events)
def test_an_event_comes_back_equal(event: object) -> None:
    """Whatever a handler gets from the store is what was published."""
    back = CODEC.decode(CODEC.encode(event), type(event))
    assert type(back) is type(event)
    assert back == event


@settings(max_examples=40, deadline=None)
@given(
    st.binary(max_size=40) | st.builds(lambda value: msgspec.json.encode(value), json),
    st.sampled_from([AttrsEvent, Tree, Model, Mini]),
)
def test_bytes_of_others_never_give_a_wrong_event(data: bytes, cls: type) -> None:
    """They are refused, or they are an event that could have been published."""
    try:
        event = CODEC.decode(data, cls)
    except Exception:
        return
    assert CODEC.decode(CODEC.encode(event), cls) == event


hostile = st.floats() | st.decimals() | st.text(string.printable + "\ud800") | st.integers() | st.datetimes() | st.binary()


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        hostile | json | moments,
        lambda inner: st.lists(inner) | st.dictionaries(texts | ints, inner) | st.tuples(inner) | st.builds(Box, inner),
    ),
    st.sampled_from(
        [Any, int, str, float, Decimal, datetime, bytes, dict, list, Box, Box[float], list[Decimal], dict[str, float]]
    ),
)
def test_a_value_comes_back_or_is_refused(value: object, annotation: Any) -> None:
    """There is no third way: nothing is stored that could not be read, or would be read as something else."""
    cls = attrs.make_class("Holder", {"value": attrs.field(type=annotation)}, frozen=True)
    event = cls(value)
    try:
        encoded = CODEC.encode(event)
    except Fault:
        return
    back = CODEC.decode(encoded, cls).value
    assert same(back, value) or (back == value and annotation is not Any)
