"""`JSONCodec` and the classes of events: those that run code on load, those of other libraries, those that grow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from typing import Annotated, Any
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest

from eventbus._codec import Codec, Fault, JSONCodec
from eventbus.errors import InvalidEventType

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001  # the mistake that is tested for
LATE_ZONE = timezone(timedelta(hours=1, minutes=2, seconds=3, microseconds=4))


@attrs.frozen
class Line:
    price: float
    name: str = ""


def holder(annotation: Any) -> type:
    """An event class with one field `value` of this type."""
    return attrs.make_class("Holder", {"value": attrs.field(type=annotation)}, frozen=True)


# ------------------------------------------------------------------ code that runs on load


def test_attrs_converters_and_validators_run_on_load() -> None:
    """An event is made the way its class makes it, whatever the bytes say."""

    @attrs.frozen
    class Checked:
        name: str = attrs.field(converter=_stripped)
        age: int = attrs.field(validator=attrs.validators.ge(0))

    codec = JSONCodec()
    assert codec.decode(b'{"name": " a ", "age": 1}', Checked) == Checked("a", 1)
    with pytest.raises(Exception, match="must be >= 0"):
        codec.decode(b'{"name": "a", "age": -1}', Checked)


def _stripped(text: str) -> str:
    return text.strip()


def _split(text: str) -> list[str]:
    return text.split(",")


def test_a_converter_that_does_not_take_its_own_result_is_refused() -> None:
    """It would fail, or give something else, each time the event is delivered."""

    @attrs.frozen
    class Split:
        words: list[str] = attrs.field(converter=_split)

    with pytest.raises(Fault, match="could not be read back"):
        JSONCodec().encode(Split("a,b"))


def test_a_post_init_that_changes_a_field_again_is_refused() -> None:
    """The event that comes back must be the one that was published."""

    @dataclass
    class Growing:
        name: str

        def __post_init__(self) -> None:
            self.name += "!"

    with pytest.raises(Fault) as caught:
        JSONCodec().encode(Growing("a"))
    assert caught.value.field == "name"
    assert "'a!!'" in caught.value.reason


def test_a_field_that_init_does_not_take_is_made_again() -> None:
    """It is not stored; if the class makes another value each time, the event is refused."""

    @dataclass
    class Totalled:
        parts: list[int]
        total: int = field(init=False)

        def __post_init__(self) -> None:
            self.total = sum(self.parts)

    @attrs.frozen
    class Anew:
        id: UUID = attrs.field(init=False, factory=uuid4)

    codec = JSONCodec()
    event = Totalled([1, 2])
    assert codec.encode(event) == b'{"parts":[1,2]}'
    assert codec.decode(codec.encode(event), Totalled) == event
    with pytest.raises(Fault) as caught:
        codec.encode(Anew())
    assert caught.value.field == "id"


def test_fields_that_do_not_count_for_equality_may_differ() -> None:
    """A cache or a lock beside the data does not keep an event from being stored."""

    @attrs.frozen
    class Cached:
        x: int
        seen: object = attrs.field(init=False, factory=object, eq=False)

    codec = JSONCodec()
    assert codec.encode(Cached(1)) == b'{"x":1}'


def test_an_init_of_ones_own_is_checked() -> None:
    """A class whose `__init__` does other things with the fields is read back before it is accepted."""

    @attrs.define(init=False)
    class Own:
        x: int

        def __init__(self, x: int) -> None:
            self.__attrs_init__(x + 1)

    @dataclass
    class Parent:
        x: int

    class Child(Parent):
        def __init__(self, x: int) -> None:
            super().__init__(x * 2)

    for event in (Own(1), Child(1)):
        with pytest.raises(Fault) as caught:
            JSONCodec().encode(event)
        assert caught.value.field == "x"


def test_a_mutable_event_with_a_value_that_its_validator_would_refuse_is_refused() -> None:
    """Validators that do not run on assignment run before the event is stored."""

    @attrs.define(on_setattr=[])
    class Loose:
        x: int = attrs.field(validator=attrs.validators.ge(0))

    @attrs.frozen
    class Holding:
        xs: list[int] = attrs.field(validator=attrs.validators.min_len(1))

    loose, holding = Loose(1), Holding([1])
    loose.x = -1
    holding.xs.clear()
    for event, words in ((loose, "must be >= 0"), (holding, "Length of 'xs' must be >= 1")):
        with pytest.raises(Fault, match=words):
            JSONCodec().encode(event)


def _listed(lines: Iterable[Line]) -> list[Line]:
    return list(lines)


def test_classes_without_equality_are_compared_by_their_fields() -> None:
    """`eq=False` is no reason to refuse an event."""

    @attrs.define(eq=False)
    class Plain:
        x: int
        at: datetime
        lines: list[Line] = attrs.field(converter=_listed)

    codec = JSONCodec()
    back = codec.decode(codec.encode(Plain(1, NOW, [Line(1.0)])), Plain)
    assert attrs.asdict(back) == attrs.asdict(Plain(1, NOW, [Line(1.0)]))


# ------------------------------------------------------------------ msgspec and pydantic


class Strict(msgspec.Struct):
    x: int
    at: datetime | None = None
    any: Any = None
    limited: int | None = None


class Positive(msgspec.Struct):
    x: int
    meta: dict[str, list[float]] = {}


class Constrained(msgspec.Struct):
    x: Annotated[int, msgspec.Meta(gt=0)]


class PModel(pydantic.BaseModel):
    x: int
    when: datetime | None = None
    any: Any = None
    price: float = 0.0


@pytest.mark.parametrize(
    ("event", "path"),
    [
        (Strict("5"), "x"),  # type: ignore[arg-type]
        (Strict(1, any=(1,)), "any"),
        (Strict(1, any=NOW), "any"),
        (Strict(1, at=NAIVE), "at"),
        (Strict(1, at=datetime(2020, 1, 1, tzinfo=LATE_ZONE)), "at"),
        (Strict(1, any=math.nan), "any"),
        (Strict(2**63), "x"),
        (Positive(1, {"a b": [1.0, math.nan]}), "meta['a b'][1]"),
        (Positive(1, {"a": [1.0, "x"]}), "meta[...][1]"),  # type: ignore[list-item]
        (PModel(x=1, when=NAIVE), "when"),
        (PModel(x=1, any=(1,)), "any"),
        (PModel(x=1, any=NOW), "any"),
        (PModel(x=1, any="\ud800"), "any"),
        (PModel(x=1, price=math.nan), "price"),
        (PModel(x=2**63), "x"),
        (PModel.model_construct(x="five"), "x"),
    ],
)
def test_what_their_libraries_let_pass_is_refused(event: Any, path: str) -> None:
    """msgspec writes NaN as null and checks nothing when an object is made; pydantic writes whatever is in Any."""
    with pytest.raises(Fault) as caught:
        JSONCodec().encode(event)
    assert caught.value.field == path


def test_a_constraint_of_msgspec_is_checked_before_the_event_is_stored() -> None:
    """Meta is checked by msgspec only when it decodes."""
    with pytest.raises(Fault) as caught:
        JSONCodec().encode(Constrained(-1))
    assert caught.value.field == "x"


def test_a_secret_that_would_be_stored_as_stars_is_refused() -> None:
    """pydantic hides secrets in its JSON; the event that came back would hold the stars."""

    class Login(pydantic.BaseModel):
        password: pydantic.SecretStr

    with pytest.raises(Fault) as caught:
        JSONCodec().encode(Login(password=pydantic.SecretStr("hunter2")))
    assert caught.value.field == "password"
    assert "hunter2" not in str(caught.value)


def test_an_excluded_field_that_is_needed_is_refused() -> None:
    """pydantic would leave it out and then ask for it."""

    class Partly(pydantic.BaseModel):
        x: int = pydantic.Field(exclude=True)

    with pytest.raises(Fault, match="x: could not be read back"):
        JSONCodec().encode(Partly(x=1))


# ------------------------------------------------------------------ users' own


@attrs.frozen
class Shared:
    share: Fraction | None
    line: Line


def test_hooks_of_ones_own_are_used_and_checked() -> None:
    """A pair of cattrs hooks gives any class a form in JSON; what they lose is found when an event is published."""
    codec = JSONCodec()
    codec.converter.register_unstructure_hook(Fraction, str)
    codec.converter.register_structure_hook(Fraction, lambda text, _: Fraction(text))
    codec.converter.register_unstructure_hook(Line, lambda line: f"{line.price:.1f}")
    codec.converter.register_structure_hook(Line, lambda text, _: Line(float(text)))
    cls = Shared
    event = cls(Fraction(1, 3), Line(1.5))
    assert codec.encode(event) == b'{"share":"1/3","line":"1.5"}'
    assert codec.decode(codec.encode(event), cls) == event
    with pytest.raises(Fault) as caught:
        codec.encode(cls(None, Line(1.55)))
    assert caught.value.field == "line.price"


def test_one_hook_without_the_other_is_refused() -> None:
    """Stored one way and read another, nothing would come back."""
    codec = JSONCodec()
    codec.converter.register_unstructure_hook(Line, lambda line: line.price)
    with pytest.raises(InvalidEventType, match="both"):
        codec.prepare(holder(Line))


def test_json_codec_is_a_codec() -> None:
    """The protocol that users implement fits our own."""
    codec: Codec = JSONCodec()
    assert codec.content_type == "application/json"


# ------------------------------------------------------------------ classes that grow


def test_a_new_field_with_a_default_reads_old_events() -> None:
    """Additive evolution needs no upcaster."""

    @attrs.frozen
    class Grown:
        a: int
        b: str = "b"
        c: list[int] = attrs.field(factory=list, kw_only=True)

    codec = JSONCodec()
    assert codec.decode(b'{"a": 1}', Grown) == Grown(1)
    assert codec.decode(b'{"a": 1, "c": [2]}', Grown) == Grown(1, c=[2])


def test_a_field_that_is_gone_is_left_out() -> None:
    """A newer program's field does not hinder an older one, nor the other way round."""
    assert JSONCodec().decode(b'{"price": 1.5, "tax": 1}', Line) == Line(1.5)


def test_a_missing_field_without_default_is_named() -> None:
    """The dead letter says which field the stored event lacks, at any depth."""
    with pytest.raises(Fault, match=r"value\[1\]\.price: is missing"):
        JSONCodec().decode(b'{"value": [{"price": 1}, {"name": "x"}]}', holder(list[Line]))


def test_bytes_that_are_no_json_are_refused() -> None:
    """Damage is an error, not an empty event."""
    for data in (b"", b"{", b'{"price": 1.0} x', b"\xff", b"[" * 10_000):
        with pytest.raises(Exception, match=r".") as caught:
            JSONCodec().decode(data, Line)
        assert isinstance(caught.value, (ValueError, msgspec.DecodeError, RecursionError))
