"""What can be an event, what it is called, and which subscriptions it is for."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from abc import ABC, abstractmethod
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Generic, TypeVar
from uuid import UUID

import anyio
import attrs
import msgspec
import pydantic
import pytest

from eventbus import (
    ConfigurationError,
    Delivery,
    Draft,
    Envelope,
    EventBus,
    EventBusError,
    HandlingFailed,
    InvalidEvent,
    InvalidEventType,
    InvalidSubscription,
    StoreBusy,
    UnknownEventType,
    event,
)
from tests.bus.support import NO_RETRY, Recorder, RefusingStore

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = 7


@attrs.frozen
class Money:
    amount: Decimal
    currency: str = "EUR"


def _positive(_instance: object, _field: object, value: int) -> None:
    if value < 0:
        raise ValueError("must not be negative")


@attrs.frozen(kw_only=True)
class AttrsEvent:
    price: Money
    at: datetime
    day: date
    took: timedelta
    id: UUID
    colour: Colour
    tags: frozenset[str]
    lines: tuple[Money, ...]
    ratio: float | None
    raw: bytes
    either: int | str
    _private: int = attrs.field(default=0, validator=_positive)


@dataclasses.dataclass
class DataclassEvent:
    price: Money
    at: datetime
    counts: dict[str, int]
    parts: list[Money | None]
    colour: Colour = Colour.BLUE


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedEvent:
    text: str


class StructEvent(msgspec.Struct, frozen=True):
    price: Decimal
    at: datetime
    tags: list[str]


class PydanticEvent(pydantic.BaseModel):
    price: Decimal
    at: datetime
    extra: dict[str, list[int]]
    inner: StructLike | None = None


class StructLike(pydantic.BaseModel):
    name: str


PydanticEvent.model_rebuild()


@attrs.frozen
class Box(Generic[T]):
    content: T


@attrs.frozen
class MoneyBox(Box[Money]):
    pass


@attrs.frozen
class Nothing:
    pass


@attrs.frozen
class Tree:
    children: tuple[Tree, ...] = ()


NOW = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
EVENTS = [
    AttrsEvent(
        price=Money(Decimal("1.10")),
        at=NOW,
        day=date(2026, 2, 3),
        took=timedelta(days=-1, microseconds=1),
        id=UUID(int=5),
        colour=Colour.BLUE,
        tags=frozenset({"a", "b"}),
        lines=(Money(Decimal(1)), Money(Decimal("1e-9"), "USD")),
        ratio=None,
        raw=b"\0\xff",
        either="5",
        private=3,
    ),
    DataclassEvent(Money(Decimal(2)), NOW, {"a": 1, "": 2**62}, [None, Money(Decimal(3))]),
    SlottedEvent("text"),
    StructEvent(Decimal("1.5"), NOW, ["a"]),
    PydanticEvent(price=Decimal("1.5"), at=NOW, extra={"a": [1]}, inner=StructLike(name="x")),
    MoneyBox(Money(Decimal(4))),
    Nothing(),
    Tree((Tree(), Tree((Tree(),)))),
]


@pytest.mark.parametrize("thing", EVENTS, ids=lambda thing: type(thing).__name__)
async def test_kinds(db: str, thing: object) -> None:
    """Events of each kind come to a handler equal and of the same class, live as well as read from the file after a restart."""
    bus, recorder = EventBus(db), Recorder()
    bus.subscribe(type(thing), name="take")(recorder.note)
    async with bus:
        await bus.publish(thing)
        await recorder.wait_for(1)
    async with bus.open(dispatch=False):
        await bus.publish(thing)
    async with bus:
        await recorder.wait_for(2)
        (first, second) = [envelope.event async for envelope in bus.history(type(thing))]
    for got in (*recorder.seen, first, second):
        assert type(got) is type(thing)
        assert got == thing


async def test_validators_run_on_publish_or_load() -> None:
    """A value that does not fit its annotation is refused when it is published: nothing can be stored that cannot be read."""
    async with EventBus(":memory:") as bus:
        for bad in (Money("1.10"), Money(Decimal(1), 5), DataclassEvent(Money(Decimal(2)), NOW, {"a": "b"}, [])):  # type: ignore[arg-type, dict-item]
            with pytest.raises(InvalidEvent):
                await bus.publish(bad)


# ------------------------------------------------------------------ names, versions


@event("order.created", version=3, key="order")
@attrs.frozen
class OrderCreated:
    order: int


@attrs.frozen
@event("order.line.added")
class LineAdded:
    line: int


@event
@attrs.frozen
class OrderPaid:
    pass


async def test_names_and_versions() -> None:
    """@event gives the stored name and version; without it they are the class's name and 1."""
    async with EventBus(":memory:") as bus:
        await bus.publish_many([OrderCreated(1), LineAdded(2), OrderPaid(), Nothing()])
        found = [(envelope.type, envelope.version, envelope.key) async for envelope in bus.history()]
    assert found == [("order.created", 3, "1"), ("order.line.added", 1, None), ("OrderPaid", 1, None), ("Nothing", 1, None)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: event(""),
        lambda: event("a.*"),
        lambda: event("a."),
        lambda: event("*"),
        lambda: event("a\nb"),
        lambda: event("\ud800"),
        lambda: event("n" * 256),
        lambda: event(5),  # type: ignore[call-overload]
        lambda: event("a", version=0),
        lambda: event("a", version=True),
        lambda: event("a", version="1"),  # type: ignore[call-overload]
    ],
)
def test_bad_names(make: Any) -> None:
    """A name or version that cannot be is refused where it is given."""
    with pytest.raises(InvalidEventType):
        make()


def test_bad_keys() -> None:
    """A key that is no field is refused when the class is registered, with the fields there are."""

    @event("bad.key", key="oder")
    @attrs.frozen
    class BadKey:
        order: int

    with pytest.raises(InvalidEventType, match="order"):
        EventBus(":memory:").subscribe(BadKey)


async def test_same_name_twice() -> None:
    """Two classes with one name on one bus are refused, at subscribe or at publish; the first stays usable."""

    def make() -> Any:
        @attrs.frozen
        class Twin:
            x: int = 0

        return Twin

    one, two = make(), make()
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(one)(recorder.note)
    with pytest.raises(InvalidEventType, match="'Twin'"):
        bus.subscribe(two)
    async with bus:
        with pytest.raises(InvalidEventType, match="'Twin'"):
            await bus.publish(two())
        await bus.publish(one())
        await recorder.wait_for(1)
    other = EventBus(":memory:")
    async with other:
        await other.publish(two())


async def test_newer_version_waits(db: str) -> None:
    """An event of a newer version than the class is not delivered and not lost: the subscription says that it is blocked."""

    def make(version: int) -> Any:
        @event("versioned", version=version)
        @attrs.frozen
        class Versioned:
            x: int = 0

        return Versioned

    old, new = make(1), make(2)
    registering = EventBus(db)
    registering.subscribe(old, name="take")(Recorder().note)
    async with registering:
        pass
    writer, recorder = EventBus(db), Recorder()
    writer.subscribe(new, name="take")(recorder.note)
    async with writer.open(dispatch=False):
        await writer.publish(new(5))
    moments = Recorder()
    reader = EventBus(db, hooks=[moments.add])
    reader.subscribe(old, name="take", retry=NO_RETRY)(recorder.note)
    async with reader:
        await moments.wait_for(1)
        (info,) = await reader.subscriptions()
        assert info.state == "blocked"
        assert "version 2" in str(info.reason)
        assert await reader.dead_letters.list() == []
    assert recorder.seen == []
    async with writer:
        assert await recorder.wait_for(1) == [new(5)]


# ------------------------------------------------------------------ patterns


async def test_patterns(any_db: str) -> None:
    """A string is a name, a prefix with ".*", or "*" for all; its handler takes the envelope."""
    bus, recorder = EventBus(any_db), Recorder()
    patterns = {
        "all": "*",
        "order": "order.*",
        "line": "order.line.*",
        "exact": "order.created",
        "class": "OrderPaid",
        "none": "order",
        "half": "ord.*",
    }
    for name, pattern in patterns.items():

        async def take(envelope: Envelope, delivery: Delivery) -> None:
            assert delivery.envelope == envelope
            recorder.add((delivery.subscription, envelope.event))

        bus.subscribe(pattern, name=name)(take)
    events = [OrderCreated(1), LineAdded(2), OrderPaid(), Nothing()]
    expected = (
        [("all", each) for each in events]
        + [("order", each) for each in events[:2]]
        + [("line", events[1]), ("exact", events[0]), ("class", events[2])]
    )
    async with bus:
        for _ in range(2):
            await bus.publish_many(events)
        assert await bus.drain(timeout=20) == {}
    assert sorted(map(str, recorder.seen)) == sorted(map(str, expected * 2))


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_patterns_in_every_order(db: str, order: Any) -> None:
    """A subscription to "*" gets every event of types that come up while it runs, in every order, and after a restart."""
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe("*", order=order)
    async def take(envelope: Envelope) -> None:
        recorder.add(envelope.position)

    def fresh(n: int) -> Any:
        return attrs.make_class(f"Fresh{n}", ["x"], frozen=True)

    published: list[int] = []
    kinds = [fresh(n) for n in range(12)]

    async def publish(kind: Any) -> None:
        for x in range(5):
            receipt = await bus.publish(kind(x))
            published.append(receipt.position or 0)

    for dispatch in (True, False, True):
        async with bus.open(dispatch=dispatch):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(publish, kinds.pop())
            if dispatch:
                assert await bus.drain(timeout=20) == {}
                assert sorted(recorder.seen) == sorted(published)
    assert len(recorder.seen) == 60


async def test_envelopes_of_unknown_classes(db: str) -> None:
    """A subscription to names needs no class: the data is at hand, and only `envelope.event` asks for the class."""
    async with EventBus(db) as bus:
        await bus.publish(OrderCreated(1))
    other, recorder = EventBus(db), Recorder()
    other.subscribe("order.*", name="audit", start="beginning")(recorder.note)
    async with other:
        (envelope,) = await recorder.wait_for(1)
        assert (envelope.type, envelope.version, envelope.key) == ("order.created", 3, "1")
        assert msgspec.json.decode(envelope.data) == {"order": 1}
        assert envelope.content_type == "application/json"
        with pytest.raises(UnknownEventType, match=r"order\.created"):
            _ = envelope.event
    other.subscribe(OrderCreated, name="typed")(recorder.note)
    assert envelope.event == OrderCreated(1)


@pytest.mark.parametrize("pattern", ["", "a*", "*.a", "a.*.b", ".*", "**", "a\nb"])
def test_bad_patterns(pattern: str) -> None:
    """A pattern that cannot be is refused, with what can."""
    with pytest.raises(InvalidSubscription, match="'\\*'"):
        EventBus(":memory:").subscribe(pattern)


# ------------------------------------------------------------------ subclasses


@attrs.frozen
class Animal:
    name: str


@attrs.frozen
class Dog(Animal):
    tricks: int = 0


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


@attrs.frozen
class Square(Shape):
    side: float

    def area(self) -> float:
        return self.side**2


async def test_subclasses() -> None:
    """A subscription to a base class takes its subclasses too, each as what it is; one to a subclass takes no other."""
    bus, animals, dogs = EventBus(":memory:"), Recorder(), Recorder()
    bus.subscribe(Animal, order="log")(animals.note)
    bus.subscribe(Dog, name="dogs")(dogs.note)
    async with bus:
        await bus.publish_many([Animal("a"), Dog("d", 3), Animal("b")])
        assert await animals.wait_for(3) == [Animal("a"), Dog("d", 3), Animal("b")]
        assert await bus.drain(timeout=20) == {}
        assert dogs.seen == [Dog("d", 3)]


async def test_abstract_bases() -> None:
    """A base class that cannot be an event itself can be subscribed to: also with no subclass at first."""

    class Marker:
        pass

    bus, shapes, marked = EventBus(":memory:"), Recorder(), Recorder()
    bus.subscribe(Shape, name="shapes")(shapes.note)
    bus.subscribe(Marker, name="marked")(marked.note)
    async with bus:
        await bus.publish(Square(2.0))
        assert await shapes.wait_for(1) == [Square(2.0)]

        @attrs.frozen
        class Marked(Marker):
            x: int = 0

        await bus.publish(Marked(1))
        assert await marked.wait_for(1) == [Marked(1)]


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
@pytest.mark.parametrize("where", ["outside", "async handler", "plain handler"])
async def test_subclasses_that_come_up_later(any_db: str, order: Any, where: str) -> None:
    """A subclass made while the bus runs is delivered from its first event on, published by a handler or from outside."""

    @attrs.frozen
    class Base:
        x: int

    @attrs.frozen
    class Go:
        pass

    bus, recorder = EventBus(any_db), Recorder()
    bus.subscribe(Base, order=order, name="base")(recorder.note)

    @attrs.frozen
    class Before(Base):
        pass

    def make(n: int) -> Any:
        return attrs.frozen(type(f"Late{n}", (Base,), {"__module__": __name__}))

    if where == "plain handler":

        @bus.subscribe(Go)
        def go(go: Go, delivery: Delivery) -> Any:
            delivery.publish(make(1)(11))
            return [make(2)(12), make(3)(13)]
    else:

        @bus.subscribe(Go)
        async def go_async(go: Go, delivery: Delivery) -> Any:
            delivery.publish(make(1)(11))
            return [make(2)(12), make(3)(13)]

    async with bus:
        await bus.publish(Base(0))
        await bus.publish(Before(1))
        if where == "outside":
            receipts = [await bus.publish(make(n)(10 + n)) for n in (1, 2, 3)]
            for receipt in receipts:
                await receipt.handled(timeout=20)
        else:
            await bus.publish(Go())
        assert await bus.drain(timeout=20) == {}
        assert sorted(each.x for each in recorder.seen) == [0, 1, 11, 12, 13]
        assert {type(each).__name__ for each in recorder.seen} == {"Base", "Before", "Late1", "Late2", "Late3"}


async def test_subclasses_from_many_threads() -> None:
    """Subclasses first seen by many threads at once are all delivered, none is taken for known before it is."""

    @attrs.frozen
    class Base:
        x: int

    @attrs.frozen
    class Go:
        x: int

    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Base, order="log", name="base")(seen.note)
    gate = threading.Barrier(8)
    fresh: dict[int, Any] = {}
    lock = threading.Lock()

    @bus.subscribe(Go, order="none", concurrency=8)
    def go(go: Go) -> Any:
        gate.wait(5)
        with lock:
            kind = fresh.setdefault(go.x // 4, None) or attrs.frozen(type(f"Fresh{go.x // 4}", (Base,), {"__module__": __name__}))
            fresh[go.x // 4] = kind
        return kind(go.x)

    async with bus:
        await bus.publish_many([Go(x) for x in range(64)])
        assert await bus.drain(timeout=10) == {}
        assert sorted(each.x for each in seen.seen) == list(range(64))


async def test_subclass_first_published_without_dispatch(db: str) -> None:
    """Published where its subscription is not dispatched, a new subclass is not missed, nor said to be handled."""

    @attrs.frozen
    class Base:
        x: int

    bus, recorder = EventBus(db), Recorder()
    bus.subscribe(Base)(recorder.note)
    async with bus.open(dispatch=False):

        @attrs.frozen
        class Later(Base):
            pass

        receipt = await bus.publish(Later(1))
        with pytest.raises(HandlingFailed) as caught:
            await receipt.handled(timeout=20)
        assert list(caught.value.blocked.values()) == ["not dispatched here"]
    async with bus:
        assert await recorder.wait_for(1) == [Later(1)]


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_a_subclass_that_cannot_join_at_once(order: Any) -> None:
    """If a new subclass cannot be registered for the moment, it is tried again: the subscription is not without it for good."""

    @attrs.frozen
    class Base:
        x: int

    store, recorder = RefusingStore(), Recorder()
    bus = EventBus(store)
    bus.subscribe(Base, order=order)(recorder.note)
    async with bus:

        @attrs.frozen
        class Later(Base):
            pass

        store.refuse(1)
        with contextlib.suppress(StoreBusy):
            await bus.publish(Later(0))
        # At once: the registration goes before whatever is stored next, or this event would be missed.
        receipt = await bus.publish(Later(1))
        await receipt.handled(timeout=20)
        assert Later(1) in recorder.seen


async def test_subclasses_after_a_restart(db: str) -> None:
    """What a running bus has taken on as a subclass is delivered after a restart as well, from where it was left."""

    @attrs.frozen
    class Base:
        x: int

    bus, recorder, block = EventBus(db), Recorder(), True

    @bus.subscribe(Base)
    async def take(base: Base) -> None:
        if block:
            await anyio.sleep_forever()
        recorder.add(base.x)

    async with bus.open(stop_timeout=0):

        @attrs.frozen
        class Later(Base):
            pass

        await bus.publish_many([Later(n) for n in range(5)])
    async with bus.open(dispatch=False):
        await bus.publish(Later(5))
    block = False
    async with bus:
        assert await recorder.wait_for(6) == list(range(6))


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_subclasses_that_a_program_does_not_know(db: str, order: Any) -> None:
    """Events of a subclass that a program in between has not imported wait for one that has; they are not passed by."""

    def program(*, knows: bool) -> tuple[Any, Any]:
        @event("base")
        @attrs.frozen
        class Base:
            x: int

        if not knows:
            return Base, None

        @event("later")
        @attrs.frozen
        class Later(Base):
            pass

        return Base, Later

    base, later = program(knows=True)
    first = EventBus(db)
    first.subscribe(base, order=order, name="take")(Recorder().note)
    async with first.open():
        pass
    async with first.open(dispatch=False):
        await first.publish_many([Draft(kind(n), key="k") for n, kind in enumerate([later, base, later, base])])
    recorder = Recorder()
    for knows in (False, True):
        bus = EventBus(db)
        bus.subscribe(program(knows=knows)[0], order=order, name="take")(recorder.note)
        async with bus:
            await bus.drain(timeout=1)
    assert sorted(each.x for each in recorder.seen) == [0, 1, 2, 3]


async def test_several_types() -> None:
    """One subscription may take several types; with order "log" in the order of the log."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(OrderCreated, LineAdded, OrderPaid, order="log", name="all")(recorder.note)
    events = [OrderCreated(1), OrderPaid(), LineAdded(1), OrderCreated(2), OrderPaid()]
    async with bus:
        for each in events:
            await bus.publish(each)
        assert await recorder.wait_for(5) == events


@pytest.mark.parametrize("thing", [object, list[int], OrderCreated | OrderPaid, 5, None, [OrderCreated], OrderPaid()], ids=str)
def test_no_event_types(thing: Any) -> None:
    """What can have no events is refused when it is subscribed to."""
    with pytest.raises(ConfigurationError):
        EventBus(":memory:").subscribe(thing)


async def test_unresolvable_annotations() -> None:
    """A class whose annotations cannot be resolved is refused when it is registered, with the field and the name."""

    @attrs.frozen
    class Broken:
        part: Missing  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidEventType, match=r"part.*Missing"):
        EventBus(":memory:").subscribe(Broken)
    async with EventBus(":memory:") as bus:
        with pytest.raises(EventBusError, match=r"part.*Missing"):
            await bus.publish(Broken(5))
