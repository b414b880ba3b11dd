"""`@event`, the registry of names and classes, and what counts as deeply immutable."""

from __future__ import annotations

import gc
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NewType, TypeVar
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from eventbus._events import EventType, Registry, event, is_event_class
from eventbus._immutable import is_deeply_immutable
from eventbus.errors import InvalidEventType

if TYPE_CHECKING:
    from fractions import Fraction

T = TypeVar("T")

# ------------------------------------------------------------------ the decorator


@event("order.created", version=2, key="order_id")
@attrs.frozen
class Above:
    order_id: str


@attrs.frozen
@event("order.paid", version=3, key="order_id")
class Below:
    order_id: str


@dataclass(frozen=True, slots=True)
@event("order.packed", key="order_id")
class BelowDataclass:
    order_id: str


@event
@dataclass
class Bare:
    x: int


@event("model.made", key="x")
class Model(pydantic.BaseModel):
    x: int


@event("struct.made", key="x")
class Struct(msgspec.Struct):
    x: int


@attrs.frozen
class Inheriting(Above):
    more: int = 0


class Undecorated(Above):
    pass


class Plain:
    pass


def test_the_decorator_gives_name_version_and_key() -> None:
    """What `@event` says is what is stored."""
    assert Registry().of(Above) == EventType("order.created", 2, Above, "order_id", shared=True)


@pytest.mark.parametrize(
    ("cls", "name", "version"),
    [(Below, "order.paid", 3), (BelowDataclass, "order.packed", 1), (Model, "model.made", 1), (Struct, "struct.made", 1)],
)
def test_the_decorator_works_above_and_below_any_other(cls: type, name: str, version: int) -> None:
    """It does not matter whether a class is made anew after `@event` has seen it."""
    kind = Registry().of(cls)
    assert (kind.name, kind.version, kind.cls) == (name, version, cls)


def test_the_decorator_returns_the_class() -> None:
    """`@event` changes nothing else about a class."""
    assert event("x.y")(Plain) is Plain
    assert event(Plain) is Plain
    assert event()(Plain) is Plain


@pytest.mark.parametrize("cls", [Bare, Undecorated, Inheriting])
def test_without_a_name_it_is_the_name_of_the_class(cls: type) -> None:
    """A bare `@event`, no decorator, and a subclass of a decorated class all take the class's own name and version 1."""
    kind = Registry().of(cls)
    assert (kind.name, kind.version, kind.key_field) == (cls.__name__, 1, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty"),
        ("order.*", "patterns"),
        ("*", "patterns"),
        ("order.", "patterns"),
        ("a" * 256, "256 characters"),
        ("a\nb", "control"),
        ("a\0b", "control"),
        ("a\x7fb", "control"),
        ("a\ud800", "surrogates"),
        (5, "is a str"),
        (b"order", "is a str"),
    ],
)
def test_a_name_that_cannot_be_is_refused_where_it_is_written(name: Any, words: str) -> None:
    """The mistake is reported at the class, with its reason."""
    with pytest.raises(InvalidEventType, match=words):
        event(name)


@pytest.mark.parametrize("name", ["a" * 255, "Bestellung.angelegt", "注文", "a b", ".x", "a/b:c-d_e"])
def test_other_names_are_fine(name: str) -> None:
    """Names may be of any language and use any separator."""
    assert event(name)(Plain) is Plain


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_a_version_is_an_int_from_1(version: Any) -> None:
    """Nothing else can be compared with what is stored."""
    with pytest.raises(InvalidEventType, match="int from 1"):
        event("a", version=version)


def test_the_key_must_be_a_field() -> None:
    """A mistyped key is found at registration, not at the first publish."""

    @event(key="order")
    @attrs.frozen
    class Mistyped:
        order_id: str

    with pytest.raises(InvalidEventType, match=r"key 'order' .* no field; its fields: order_id"):
        Registry().of(Mistyped)


# ------------------------------------------------------------------ what can be an event


@pytest.mark.parametrize("cls", [Above, BelowDataclass, Bare, Model, Struct, Undecorated])
def test_these_can_be_events(cls: type) -> None:
    """attrs classes, dataclasses, Structs and pydantic models need no base class of ours."""
    assert is_event_class(cls)


@pytest.mark.parametrize("thing", [Plain, int, dict, object, "str", None, Bare(1), pydantic.BaseModel, msgspec.Struct, list[int]])
def test_these_cannot_be_events(thing: Any) -> None:
    """Objects, builtins, plain classes and the libraries' own base classes are none."""
    assert not is_event_class(thing)


def test_a_class_that_is_none_is_refused_with_what_would_be() -> None:
    """The message says what to make of the class."""
    with pytest.raises(InvalidEventType, match=r"Plain cannot be an event; make it an attrs class, a dataclass"):
        Registry().of(Plain)


def test_nothing_imports_pydantic_or_trio() -> None:
    """Programs that do not use them do not pay for them."""
    code = "import eventbus._codec, eventbus._events, sys; print({'pydantic', 'trio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------ the registry


def test_registering_again_is_the_same_as_once() -> None:
    """A class is prepared once, however often it is met."""
    seen: list[type] = []
    registry = Registry(seen.append)
    assert registry.of(Above) is registry.register(Above) is registry.of(Above) is registry.by_name("order.created")
    assert seen == [Above]


def test_an_unknown_name_has_no_type() -> None:
    """Nothing is imported by a stored name."""
    assert Registry().by_name("os.system") is None


def test_two_classes_with_one_name_are_an_error_that_names_both() -> None:
    """Otherwise one would be decoded as the other."""

    @event("order.created")
    @dataclass
    class Other:
        y: int

    registry = Registry()
    registry.of(Above)
    with pytest.raises(InvalidEventType, match=r"(?s)'order.created'.*Above.*Other"):
        registry.of(Other)
    assert registry.by_name("order.created") == registry.of(Above)


def test_a_class_that_the_codec_refuses_stays_unknown() -> None:
    """After a refusal the name is still free."""

    def refuse(cls: type) -> None:
        raise InvalidEventType("no")

    registry = Registry(refuse)
    with pytest.raises(InvalidEventType):
        registry.of(Above)
    assert registry.by_name("order.created") is None
    with pytest.raises(InvalidEventType):
        registry.of(Above)


@attrs.frozen
class OnlyForTypeCheckers:
    share: Fraction


@attrs.frozen
class Nested:
    inner: list[OnlyForTypeCheckers]


def test_annotations_that_cannot_be_resolved_are_named() -> None:
    """The field, the name that is missing and the remedy stand in the message."""
    with pytest.raises(InvalidEventType, match=r"OnlyForTypeCheckers\.share.*'Fraction'.*TYPE_CHECKING"):
        Registry().of(OnlyForTypeCheckers)


def test_a_local_class_may_refer_to_itself() -> None:
    """Events can be defined in functions, as tests do."""

    @attrs.frozen
    class Node:
        below: tuple[Node, ...] = ()

    assert Registry().of(Node).shared


# ------------------------------------------------------------------ subclasses


class Shape(ABC):  # noqa: B024  # a plain base is meant
    pass


class Middle(Shape):
    pass


@attrs.frozen
class Circle(Middle):
    radius: float


@dataclass
class Square(Shape):
    side: float


@attrs.frozen
class Animal(ABC):
    name: str

    @abstractmethod
    def speak(self) -> str: ...


@attrs.frozen
class Dog(Animal):
    def speak(self) -> str:
        return "wuff"


@attrs.frozen
class Puppy(Dog):
    weeks: int = 0


def names(registry: Registry, base: type) -> list[str]:
    return sorted(kind.name for kind in registry.subclasses(base))


def test_any_class_may_be_a_base() -> None:
    """Also an abstract one without fields; classes between that are no events are passed through."""
    assert names(Registry(), Shape) == ["Circle", "Square"]


def test_a_base_that_can_be_an_event_is_one_of_them() -> None:
    """A subscription to it gets events of the class itself and of all below it, each once."""
    assert names(Registry(), Dog) == ["Dog", "Puppy"]
    assert names(Registry(), Animal) == ["Dog", "Puppy"]


def test_every_class_is_an_object() -> None:
    """A subscription to object would register every class of the program."""
    with pytest.raises(InvalidEventType, match=r"'\*'"):
        Registry().subclasses(object)


def test_a_subclass_by_two_ways_counts_once() -> None:
    """Multiple inheritance does not register a class twice."""

    class Base:
        pass

    class Left(Base):
        pass

    class Right(Base):
        pass

    @attrs.define
    class Both(Left, Right):
        x: int

    assert [kind.cls for kind in Registry().subclasses(Base)] == [Both]


def test_the_class_that_attrs_replaced_does_not_count() -> None:
    """attrs makes slotted classes anew; the first one lives on until it is collected, and shares their name."""

    @attrs.frozen
    class Base:
        x: int

    gc.collect()
    gc.disable()
    try:

        @attrs.frozen
        @event("derived.made")
        class Derived(Base):
            y: int

        assert len(type.__subclasses__(Base)) == 2
        assert [kind.cls for kind in Registry().subclasses(Base)] == [Base, Derived]
    finally:
        gc.enable()


def test_the_class_that_dataclass_replaced_does_not_count() -> None:
    """The same for dataclass(slots=True), whose first class looks finished."""

    class Base:
        pass

    gc.collect()
    gc.disable()
    try:

        @dataclass(slots=True)
        @event("derived.made")
        class Derived(Base):
            y: int

        assert len(type.__subclasses__(Base)) == 2
        assert [kind.cls for kind in Registry().subclasses(Base)] == [Derived]
    finally:
        gc.enable()


def test_two_real_classes_with_one_name_are_still_an_error() -> None:
    """What is passed over is only a class that was replaced, not one that happens to be called the same."""

    class Base:
        pass

    def make() -> type:
        @attrs.frozen
        class Made(Base):
            x: int

        return Made

    kept = make(), make()
    with pytest.raises(InvalidEventType, match="two classes are called 'Made'"):
        Registry().subclasses(Base)
    assert len(kept) == 2


class Box(pydantic.BaseModel, Generic[T]):
    content: T


def test_parametrizations_of_a_generic_model_are_not_subclasses() -> None:
    """pydantic makes a class of each `Box[int]`; they are not types that someone has defined."""
    assert len({Box, Box[int], Box[str]}) == 3
    assert names(Registry(), Box) == ["Box"]


# ------------------------------------------------------------------ deeply immutable


class Color(Enum):
    RED = 1


Name = NewType("Name", str)


@attrs.frozen
class FrozenGeneric(Generic[T]):
    content: T


@attrs.frozen
class FrozenTree:
    below: tuple[FrozenTree, ...]
    parent: FrozenTree | None = None


@attrs.frozen
class Everything:
    a: str
    b: int | float | bool | None
    c: tuple[bytes, Decimal]
    d: frozenset[UUID]
    e: datetime
    f: Color
    g: Literal["x", 1]
    h: Annotated[Name, "meta"]
    i: FrozenGeneric[int]


@dataclass(frozen=True)
class FrozenDataclass:
    x: tuple[int, ...]


class FrozenStruct(msgspec.Struct, frozen=True):
    x: int


class FrozenModel(pydantic.BaseModel, frozen=True):
    x: int


class OpenModel(pydantic.BaseModel, frozen=True, extra="allow"):
    x: int


class PrivateModel(pydantic.BaseModel, frozen=True):
    x: int
    _cache: dict[str, int] = pydantic.PrivateAttr(default_factory=dict)


@attrs.define
class MutableTree:
    below: tuple[MutableTree, ...]


@attrs.frozen
class HoldsMutable:
    tree: MutableTree | None


@attrs.frozen
class Untyped:
    x = attrs.field()  # type: ignore[var-annotated]


@pytest.mark.parametrize(
    "cls", [Above, Below, Everything, FrozenTree, FrozenDataclass, FrozenStruct, FrozenModel, FrozenGeneric[str]]
)
def test_frozen_down_to_the_last_field_is_shared(cls: type) -> None:
    """Handlers get one object if none of them can change it."""
    assert is_deeply_immutable(cls)


@pytest.mark.parametrize(
    "form",
    [
        Bare,
        Struct,
        Model,
        OpenModel,
        PrivateModel,
        MutableTree,
        HoldsMutable,
        Untyped,
        FrozenGeneric,
        FrozenGeneric[list[int]],
        FrozenGeneric[Any],
        list[int],
        tuple[list[int], ...],
        frozenset[Any],
        dict[str, str],
        object,
        Any,
        tuple,
        frozenset,
    ],
)
def test_what_could_be_changed_is_not_shared(form: Any) -> None:
    """One mutable field anywhere, or one that says nothing, and each handler gets its own copy."""
    assert not is_deeply_immutable(form)
