"""`JSONCodec` refuses what it could not give back: at registration by the annotation, at publish by the value."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal, TypeVar
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from eventbus._codec import Fault, JSONCodec
from eventbus.errors import InvalidEventType

T = TypeVar("T")

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


class Color(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Shape(enum.Enum):
    ROUND = ("round", 1)


class Perms(enum.Flag):
    R = 1
    W = 2


@attrs.frozen
class Line:
    price: float
    name: str = ""


@attrs.frozen
class SubLine(Line):
    pass


@dataclass
class Meta:
    x: Any = None


class Mini(msgspec.Struct):
    n: Any = None


class MiniModel(pydantic.BaseModel):
    n: Any = None


def holder(annotation: Any) -> type:
    """An event class with one field `value` of this type."""
    return attrs.make_class("Holder", {"value": attrs.field(type=annotation)}, frozen=True)


def encoded(annotation: Any, value: Any) -> bytes:
    return JSONCodec().encode(holder(annotation)(value))


def refused(annotation: Any, value: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        encoded(annotation, value)
    return caught.value


# ------------------------------------------------------------------ a value that does not fit its annotation


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (str, 5),
        (str, b"x"),
        (str, None),
        (str, Path("x")),
        (int, "5"),
        (int, 5.0),
        (int, True),
        (int, None),
        (int, Decimal(5)),
        (float, "5"),
        (float, True),
        (float, Decimal("1.5")),
        (float, 2**53 + 1),
        (float, 10**400),
        (bool, 1),
        (bool, "true"),
        (bytes, "x"),
        (bytes, bytearray(b"x")),
        (bytes, memoryview(b"x")),
        (Decimal, 1.5),
        (Decimal, 1),
        (Decimal, "1.5"),
        (UUID, "0190163d-8694-739b-aea5-966c26f8ad91"),
        (datetime, NOW.isoformat()),
        (datetime, NOW.date()),
        (datetime, NOW.timestamp()),
        (date, NOW),
        (date, "2020-01-01"),
        (time, "10:00"),
        (timedelta, 5),
        (Path, "x"),
        (Color, "red"),
        (Level, 1),
        (Shape, ("round", 1)),
        (Literal["a"], "b"),
        (Literal[1], True),
        (Literal[1], 1.0),
        (Literal[True], 1),
        (Literal["red"], Color.RED),
        (Literal["a"], ["a"]),
        (NoneType, 0),
        (int | None, "5"),
        (int | str, 5.5),
        (int | str, None),
        (list[int], (1,)),
        (list[int], [1, "2"]),
        (list[int], {1}),
        (list[str], "abc"),
        (tuple[int, ...], [1]),
        (tuple[int, str], (1,)),
        (tuple[int, str], (1, "a", "b")),
        (tuple[()], (1,)),
        (Sequence[int], [1]),
        (Sequence[str], "abc"),
        (set[int], frozenset({1})),
        (frozenset[int], {1}),
        (AbstractSet[int], [1]),
        (dict[str, int], [("a", 1)]),
        (dict[str, int], {"a": "1"}),
        (dict[str, int], {1: 1}),
        (dict[int, int], {"1": 1}),
        (dict[int, int], {True: 1}),
        (dict[UUID, int], {"x": 1}),
        (Line, {"price": 1.0}),
        (Line, SubLine(1.0)),
        (Line | None, SubLine(1.0)),
        (Line | int, SubLine(1.0)),
        (Mini, {"n": 1}),
        (MiniModel, {"n": 1}),
    ],
)
def test_a_value_of_another_type_is_refused(annotation: Any, value: Any) -> None:
    """It would be stored and could never be decoded, or would come back as something else."""
    assert refused(annotation, value).field.startswith("value")


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (str, "5"),
        (int, '"5"'),
        (int, "5.7"),
        (int, "5.0"),
        (int, "true"),
        (int, "null"),
        (float, '"5"'),
        (float, "true"),
        (bool, "1"),
        (bool, '"true"'),
        (bytes, '"not base64"'),
        (bytes, "[1]"),
        (Decimal, "1.5"),
        (Decimal, '"NaN"'),
        (Decimal, '"x"'),
        (UUID, '"x"'),
        (UUID, "5"),
        (datetime, '"2020-01-01T00:00:00"'),
        (datetime, "5"),
        (date, '"2020-01-01T00:00:00"'),
        (timedelta, "5"),
        (Color, '"blue"'),
        (Level, "true"),
        (Level, '"1"'),
        (Literal["a", 1], "true"),
        (Literal["a", 1], '"b"'),
        (list[int], '"12"'),
        (list[int], "{}"),
        (list[int], '["1"]'),
        (tuple[int, int], "[1]"),
        (tuple[int, int], "[1, 2, 3]"),
        (set[int], "{}"),
        (dict[str, int], "[]"),
        (dict[int, str], '{"01": "x"}'),
        (dict[int, str], '{"x": "x"}'),
        (Line, "[]"),
        (Line, '"price"'),
        (Meta, "[]"),
        (Meta, '"x"'),
        (int | str, "1.5"),
        (int | None, '"1"'),
    ],
)
def test_json_of_another_type_is_refused(annotation: Any, text: str) -> None:
    """Nothing is converted on the way back, either."""
    with pytest.raises(Exception, match="value") as caught:
        JSONCodec().decode(f'{{"value": {text}}}'.encode(), holder(annotation))
    assert isinstance(caught.value, Fault)
    assert caught.value.field.startswith("value")


# ------------------------------------------------------------------ hostile values, each with its field


def cyclic_list() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@attrs.define
class Knot:
    again: Any = None
    more: Knot | None = None


def knot() -> Knot:
    made = Knot()
    made.more = made
    return made


NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001  # the mistake that is tested for
LATE_ZONE = timezone(timedelta(hours=1, minutes=2, seconds=3, microseconds=4))

HOSTILE = [
    (float, math.nan, "value", "nan"),
    (float, math.inf, "value", "inf"),
    (float | None, -math.inf, "value", "-inf"),
    (Decimal, Decimal("NaN"), "value", "NaN"),
    (Decimal, Decimal("sNaN"), "value", "NaN"),
    (Decimal, Decimal("-Infinity"), "value", "Infinity"),
    (datetime, NAIVE, "value", "naive"),
    (str, "\ud800", "value", "surrogate"),
    (str, "ok\udfff", "value", "surrogate"),
    (Path, Path("a\udcff"), "value", "surrogate"),
    (int, 2**63, "value", "64 bits"),
    (int, -(2**63) - 1, "value", "64 bits"),
    (int, 10**5000, "value", "64 bits"),
    (list[Line], [Line(1.0), Line(2.0), Line(math.nan)], "value[2].price", "nan"),
    (list[Line], [Line(1.0, "\ud800")], "value[0].name", "surrogate"),
    (dict[str, Meta], {"a b": Meta(math.nan)}, "value['a b'].x", "nan"),
    (dict[str, int], {"\ud800": 1}, "value", "surrogate"),
    (dict[int, int], {2**63: 1}, "value", "64 bits"),
    (tuple[int, float], (1, math.nan), "value[1]", "nan"),
    (set[float], {math.nan}, "value[0]", "nan"),
    (Line | None, Line(math.nan), "value.price", "nan"),
    (Line | int, Line(math.nan), "value.price", "nan"),
    (Any, math.nan, "value", "nan"),
    (Any, {"a": [1, {"b": math.inf}]}, "value['a'][1]['b']", "inf"),
    (Any, ["\ud800"], "value[0]", "surrogate"),
    (Any, 2**64, "value", "64 bits"),
    (Any, {"a": 2**64}, "value['a']", "64 bits"),
    (Any, {1: 2}, "value", "key int 1"),
    (Any, {None: 2}, "value", "key"),
    (Any, NOW, "value", "annotation gives no type"),
    (Any, (1,), "value", "annotation gives no type"),
    (Any, [{1}], "value[0]", "annotation gives no type"),
    (Any, b"x", "value", "annotation gives no type"),
    (Any, Decimal(1), "value", "annotation gives no type"),
    (Any, Color.RED, "value", "annotation gives no type"),
    (Any, Level.LOW, "value", "annotation gives no type"),
    (Any, Line(1.0), "value", "annotation gives no type"),
    (object, UUID("0190163d-8694-739b-aea5-966c26f8ad91"), "value", "annotation gives no type"),
    (dict, {"a": NOW}, "value['a']", "annotation gives no type"),
    (dict[str, Any], {"a": OrderedDict()}, "value['a']", "annotation gives no type"),
    (list, [(1,)], "value[0]", "annotation gives no type"),
    (list[object], [{"a": (1,)}], "value[0]['a']", "annotation gives no type"),
    (T, (1,), "value", "annotation gives no type"),
    (Any, cyclic_list(), "value", "holds itself"),
    (list, cyclic_list(), "value", "holds itself"),
    (Any, deep(64), "value", "64 levels"),
    (Any, deep(5000), "value", "64 levels"),
    (Any, {"fine": deep(10), "bad": {"x": deep(70)}}, "value", "64 levels"),
    (Knot, knot(), "value", "holds itself"),
    (Mini, Mini(math.nan), "value.n", "nan"),
    (Mini, Mini([1, math.inf]), "value.n[1]", "inf"),
    (list[MiniModel], [MiniModel(n=1), MiniModel(n=NAIVE)], "value[1].n", "naive"),
    (MiniModel, MiniModel(n={"a": 2**64}), "value.n['a']", "64 bits"),
]


@pytest.mark.parametrize(("annotation", "value", "path", "words"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_a_hostile_value_is_refused_and_its_field_is_named(annotation: Any, value: Any, path: str, words: str) -> None:
    """The publisher is told which part of the event is wrong, and why."""
    fault = refused(annotation, value)
    assert fault.field == path
    assert words in fault.reason
    assert len(str(fault)) < 300


def test_nesting_is_counted_exactly() -> None:
    """64 levels are stored, 65 are not; brackets in texts do not count."""
    cls = holder(Any)
    codec = JSONCodec()
    for value in (deep(63), ["[{" * 1000, '"[', "\\[" * 100, [[]] * 100]):
        event = cls(value)
        assert codec.decode(codec.encode(event), cls) == event
    assert refused(Any, deep(64)).field == "value"


def test_an_event_with_a_bad_repr_is_still_explained() -> None:
    """What a user's `__repr__` does cannot hide the fault."""

    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Rude" in refused(int, Rude()).reason


def test_an_attribute_that_was_never_set_is_refused() -> None:
    """An object that `__init__` did not finish is no event."""
    with pytest.raises(Fault, match="price"):
        JSONCodec().encode(Line.__new__(Line))


# ------------------------------------------------------------------ types that cannot be stored


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (complex, "complex"),
        (Callable[[], int], "Callable"),
        (type, "type"),
        (Exception, "Exception"),
        (Fraction, "Fraction"),
        (dict[float, int], "key of a dict"),
        (dict[bool, int], "key of a dict"),
        (dict[tuple[int, int], int], "key of a dict"),
        (dict[str | int, int], "key of a dict"),
        (dict[int | None, int], "key of a dict"),
        (list[complex], "complex"),
        (str | UUID, "told apart"),
        (str | datetime, "told apart"),
        (date | datetime, "told apart"),
        (Decimal | str | None, "told apart"),
        (Color | str, "told apart"),
        (Color | Literal["red"], "told apart"),
        (Literal["red", Color.RED], "both stored"),
        (Level | int, "told apart"),
        (list[int] | tuple[int, ...], "told apart"),
        (dict[str, int] | Line, "told apart"),
        (Line | SubLine, "told apart"),
        (Mini | Line, "told apart"),
        (Any | datetime, "Any"),
        (Literal[b"x"], "literal"),
    ],
)
def test_a_type_that_could_not_be_read_back_is_refused_at_registration(annotation: Any, words: str) -> None:
    """A class that can never keep the promise is found before anything is published."""
    codec = JSONCodec()
    with pytest.raises(InvalidEventType, match=words):
        codec.prepare(holder(annotation))
    with pytest.raises(InvalidEventType, match=words):
        codec.prepare(holder(annotation))


@attrs.frozen
class Inner:
    bad: complex


@attrs.frozen
class Outer:
    inner: Inner


def test_a_refused_class_leaves_nothing_behind() -> None:
    """Half-built knowledge of it is not used for the next class."""
    codec = JSONCodec()
    for _ in range(2):
        with pytest.raises(InvalidEventType, match="complex"):
            codec.prepare(Outer)
        with pytest.raises(InvalidEventType, match="complex"):
            codec.prepare(Inner)


def test_a_class_that_is_no_event_is_refused() -> None:
    """Used by itself, without a registry, the codec says so, too."""
    with pytest.raises(InvalidEventType, match="no event class"):
        JSONCodec().encode("text")


def test_a_struct_that_msgspec_cannot_decode_is_refused_at_registration() -> None:
    """msgspec's own reason stands in the message."""
    cls = msgspec.defstruct("Bad", [("x", list[int] | tuple[int, ...])])
    with pytest.raises(InvalidEventType, match="more than one array-like"):
        JSONCodec().prepare(cls)


# ------------------------------------------------------------------ values that are made fitting


def test_ints_become_floats_and_subclasses_of_str_and_int_become_themselves() -> None:
    """The few values that are taken though their class is another come back equal."""
    for annotation, value, text in (
        (float, 3, b"3.0"),
        (float | None, -0.0, b"-0.0"),
        (str, Color.RED, b'"red"'),
        (int, Level.LOW, b"1"),
        (dict[str, int], defaultdict(int, a=1), b'{"a":1}'),
        (dict[Color, int], {Color.RED: 1}, b'{"red":1}'),
        (PurePosixPath, PurePosixPath("a/b"), b'"a/b"'),
        (Shape, Shape.ROUND, b'"ROUND"'),
        (Perms, Perms.R | Perms.W, b"3"),
    ):
        cls = holder(annotation)
        codec = JSONCodec()
        data = codec.encode(cls(value))
        assert data == b'{"value":' + text + b"}"
        assert codec.decode(data, cls) == cls(value)


def test_equal_sets_give_equal_bytes() -> None:
    """An idempotency key is compared with the content: the order of a set differs between processes."""
    values = [f"v{i}" for i in range(50)]
    assert encoded(frozenset[str], frozenset(values)) == encoded(frozenset[str], frozenset(reversed(values)))
    assert encoded(AbstractSet[int], {3, 1, 2}) == b'{"value":[1,2,3]}'
    assert encoded(frozenset[int | str | None], frozenset({None, "b", 1})) == encoded(
        frozenset[int | str | None], frozenset({1, None, "b"})
    )


def test_a_mapping_keeps_its_order() -> None:
    """dict's order is part of what users see."""
    assert encoded(Mapping[str, int], {"b": 1, "a": 2}) == b'{"value":{"b":1,"a":2}}'
