"""Publishing: what a receipt promises, groups, keys, and events that cannot be stored."""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anyio
import attrs
import msgspec
import pydantic
import pytest

from eventbus import (
    Delivery,
    Draft,
    Envelope,
    EventBus,
    HandlingFailed,
    InvalidEvent,
    InvalidEventType,
    Reject,
    WaitTimeout,
    event,
)
from tests.bus.support import NO_RETRY, Recorder


@attrs.frozen
class Placed:
    order: str
    total: Decimal = Decimal(0)


@attrs.define
class Basket:
    """Mutable, so no two handlers may share one."""

    lines: list[str] = attrs.field(factory=list)


@event("keyed", key="customer")
@attrs.frozen
class Keyed:
    customer: int | None


async def stored(bus: EventBus) -> list[Envelope]:
    return [envelope async for envelope in bus.history()]


# ------------------------------------------------------------------ receipts


async def test_published_is_stored(any_db: str) -> None:
    """What publish has returned is in the log, at the receipt's position, with the receipt's id."""
    async with EventBus(any_db) as bus:
        receipt = await bus.publish(Placed("o-1", Decimal("9.50")))
        (envelope,) = await stored(bus)
        assert (envelope.position, envelope.id) == (receipt.position, receipt.id)
        assert envelope.event == Placed("o-1", Decimal("9.50"))
        assert not receipt.duplicate


async def test_survives_reopening(db: str) -> None:
    """What was published is there when the file is opened again."""
    async with EventBus(db) as bus:
        receipt = await bus.publish(Placed("o-1"))
    other = EventBus(db)
    other.subscribe(Placed, start="beginning", name="late")(Recorder().note)
    async with other:
        (envelope,) = await stored(other)
        assert (envelope.id, envelope.event) == (receipt.id, Placed("o-1"))


async def test_visible_to_other_connections(db: str) -> None:
    """When publish returns, the event is committed: another connection to the file sees it."""
    import sqlite3

    async with EventBus(db) as bus:
        receipt = await bus.publish(Placed("o-1"))
        connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
        try:
            assert connection.execute("SELECT position FROM events").fetchall() == [(receipt.position,)]
        finally:
            connection.close()


async def test_ids_are_uuid7_and_grow() -> None:
    """Ids are UUIDs of version 7, and with the positions they grow strictly from event to event."""
    async with EventBus(":memory:") as bus:
        receipts = [await bus.publish(Placed(str(n))) for n in range(20)]
        receipts += await bus.publish_many([Placed(str(n)) for n in range(20)])
    assert all(uuid.UUID(receipt.id).version == 7 for receipt in receipts)
    ids, positions = [r.id for r in receipts], [r.position or 0 for r in receipts]
    assert ids == sorted(set(ids))
    assert positions == sorted(set(positions))


async def test_time_of_publishing() -> None:
    """An envelope's time is when it was published, in UTC."""
    async with EventBus(":memory:") as bus:
        before = datetime.now(UTC)
        await bus.publish(Placed("o-1"))
        after = datetime.now(UTC)
        (envelope,) = await stored(bus)
    assert before <= envelope.time <= after
    assert envelope.time.utcoffset() == timedelta(0)


async def test_without_subscription() -> None:
    """An event that nobody has subscribed to is stored, and handled at once."""
    async with EventBus(":memory:") as bus:
        receipt = await bus.publish(Placed("o-1"))
        await receipt.handled(timeout=1)
        assert len(await stored(bus)) == 1


async def test_delivered_as_it_was() -> None:
    """A handler gets an event equal to the one published."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed)(recorder.note)
    async with bus:
        await bus.publish(Placed("ö-1 🎉", Decimal("1.10")))
        assert await recorder.wait_for(1) == [Placed("ö-1 🎉", Decimal("1.10"))]


async def test_changed_afterwards() -> None:
    """What a publisher does to its object after the call changes nothing of what is stored or delivered."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Basket)(recorder.note)
    async with bus:
        basket = Basket(["a"])
        async with anyio.create_task_group() as group:
            group.start_soon(bus.publish, basket)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            basket.lines.append("b")
        assert await recorder.wait_for(1) == [Basket(["a"])]


async def test_own_copies_of_what_is_mutable() -> None:
    """A handler that changes a mutable event changes nothing for other handlers, nor for its own next attempt."""
    bus, recorder = EventBus(":memory:"), Recorder()

    async def spoil(basket: Basket) -> None:
        recorder.add(list(basket.lines))
        basket.lines.append("spoilt")

    for name in ("one", "two", "three"):
        bus.subscribe(Basket, name=name)(spoil)
    async with bus:
        await bus.publish(Basket(["a"]))
        assert await recorder.wait_for(3) == [["a"]] * 3


# ------------------------------------------------------------------ handled


async def test_handled_waits_for_all() -> None:
    """`handled` returns when every subscription has handled the event, not before."""
    bus, recorder, gate = EventBus(":memory:"), Recorder(), anyio.Event()
    bus.subscribe(Placed, name="quick")(recorder.note)

    @bus.subscribe(Placed)
    async def slow(placed: Placed) -> None:
        await gate.wait()
        recorder.add("slow")

    async with bus:
        receipt = await bus.publish(Placed("o-1"))
        with pytest.raises(WaitTimeout):
            await receipt.handled(timeout=0.05)
        gate.set()
        await receipt.handled(timeout=20)
        assert recorder.seen == [Placed("o-1"), "slow"]


async def test_handled_at_first_sight_of_a_type() -> None:
    """`handled` and `drain` wait for a subscription to a pattern, also for the first event ever of a type."""
    bus, seen, gate = EventBus(":memory:"), [], anyio.Event()

    @bus.subscribe("*", name="all")
    async def take(envelope: Envelope) -> None:
        await gate.wait()
        seen.append(envelope.type)

    async with bus:
        receipt = await bus.publish(Placed("o-1"))
        with pytest.raises(WaitTimeout):
            await receipt.handled(timeout=0.05)
        gate.set()
        await receipt.handled(timeout=20)
        assert seen == ["Placed"]
        await bus.publish(Basket())
        assert await bus.drain(timeout=20) == {}
        assert seen == ["Placed", "Basket"]


async def test_handled_says_what_failed() -> None:
    """`handled` raises HandlingFailed with the dead letters when a subscription gives up."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, retry=NO_RETRY)
    async def refuse(placed: Placed) -> None:
        raise Reject("not today")

    async with bus:
        receipt = await bus.publish(Placed("o-1"))
        with pytest.raises(HandlingFailed) as caught:
            await receipt.handled(timeout=20)
        (letter,) = caught.value.dead_letters
        assert (letter.subscription, letter.error_type, letter.error) == ("refuse", "Reject", "not today")


# ------------------------------------------------------------------ groups


async def test_group_is_in_order(any_db: str) -> None:
    """publish_many stores its events in the order given, however many they are."""
    bus, recorder = EventBus(any_db), Recorder()
    bus.subscribe(Placed)(recorder.note)
    async with bus:
        receipts = await bus.publish_many(Placed(str(n)) for n in range(1300))
        positions = [receipt.position or 0 for receipt in receipts]
        assert positions == sorted(set(positions))
        assert [placed.order for placed in await recorder.wait_for(1300)] == [str(n) for n in range(1300)]
        assert [envelope.id for envelope in await stored(bus)] == [receipt.id for receipt in receipts]


async def test_empty_group() -> None:
    """publish_many of nothing stores nothing and returns nothing."""
    async with EventBus(":memory:") as bus:
        assert await bus.publish_many([]) == []


@pytest.mark.parametrize("bad", [Placed("o-2", Decimal("NaN")), "no event", Draft(Placed("o-2"), key="")])
async def test_group_is_all_or_nothing(bad: object) -> None:
    """If one event of a group cannot be stored, none is."""
    async with EventBus(":memory:") as bus:
        with pytest.raises((InvalidEvent, InvalidEventType)):
            await bus.publish_many([Placed("o-1"), bad, Placed("o-3")])
        assert await stored(bus) == []


async def test_drafts_and_events_mixed() -> None:
    """publish_many takes bare events and Drafts, each with its own options."""
    async with EventBus(":memory:") as bus:
        await bus.publish_many([Placed("o-1"), Draft(Placed("o-2"), key=7, headers={"a": "b"})])
        first, second = await stored(bus)
    assert (first.key, dict(first.headers)) == (None, {})
    assert (second.key, second.headers["a"]) == ("7", "b")


# ------------------------------------------------------------------ keys


async def test_key_of_the_class() -> None:
    """The key is the field that @event names, as text; `key=` goes before it; a field of None is no key."""
    async with EventBus(":memory:") as bus:
        await bus.publish(Keyed(7))
        await bus.publish(Keyed(7), key="other")
        await bus.publish(Keyed(None))
        await bus.publish(Keyed(7), key=0)
        assert [envelope.key for envelope in await stored(bus)] == ["7", "other", None, "0"]


# ------------------------------------------------------------------ events that cannot be stored


@attrs.frozen
class Line:
    price: float


@event("attrs.kind")
@attrs.define
class AttrsKind:
    number: float = 0.0
    whole: int = 0
    text: str = ""
    at: datetime | None = None
    tree: Any = None
    lines: list[Line] = attrs.field(factory=list)


@event("dataclass.kind")
@dataclasses.dataclass
class DataclassKind:
    number: float = 0.0
    whole: int = 0
    text: str = ""
    at: datetime | None = None
    tree: Any = None
    lines: list[Line] = dataclasses.field(default_factory=list)


@event("struct.kind")
class StructKind(msgspec.Struct):
    number: float = 0.0
    whole: int = 0
    text: str = ""
    at: datetime | None = None
    tree: Any = None
    lines: list[Line] = msgspec.field(default_factory=list)


@event("pydantic.kind")
class PydanticKind(pydantic.BaseModel):
    number: float = 0.0
    whole: int = 0
    text: str = ""
    at: datetime | None = None
    tree: Any = None


def nest(depth: int) -> list[Any]:
    tree: list[Any] = []
    for _ in range(depth - 1):
        tree = [tree]
    return tree


def cycle() -> list[Any]:
    tree: list[Any] = []
    tree.append(tree)
    return tree


KINDS: list[Callable[..., Any]] = [AttrsKind, DataclassKind, StructKind, PydanticKind]
HOSTILE: list[tuple[str, Callable[[], Any]]] = [
    ("number", lambda: math.nan),
    ("number", lambda: -math.inf),
    ("whole", lambda: 2**63),
    ("whole", lambda: -(2**63) - 1),
    ("text", lambda: "a\ud800b"),
    ("at", lambda: datetime(2026, 1, 1)),  # noqa: DTZ001
    ("tree", lambda: nest(65)),
    ("tree", lambda: nest(50_000)),
    ("tree", cycle),
    ("tree", lambda: {"a": [1, {"b": math.nan}]}),
    ("tree", lambda: {"a": {"b": 10**30}}),
    ("tree", lambda: ["\udfff"]),
    ("tree", lambda: {"\udfff": 1}),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_hostile_payloads(kind: Callable[..., Any]) -> None:
    """An event that cannot be stored is refused with its type and field, and harms no other, whoever publishes at that time."""
    bus, good = EventBus(":memory:"), 0

    async def publish_good() -> None:
        nonlocal good
        for n in range(30):
            await bus.publish(Placed(str(n)))
            good += 1

    async with bus:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(publish_good)
            for field, make in HOSTILE:
                try:
                    bad = kind(**{field: make()})
                except ValueError:
                    continue  # the class itself refuses it
                with pytest.raises(InvalidEvent) as caught:
                    await bus.publish(bad)
                assert caught.value.type == f"{kind.__name__[:-4].lower()}.kind", field
                assert caught.value.field.startswith(field), (field, str(caught.value)[:200])
                assert len(str(caught.value)) < 2000
        assert good == 90
        assert [envelope.type for envelope in await stored(bus)] == ["Placed"] * 90
        await bus.publish(kind(number=1.5, whole=2**63 - 1, text="ok", at=datetime.now(UTC), tree=nest(60)))


async def test_path_to_the_field() -> None:
    """InvalidEvent gives the path to a value deep inside."""
    async with EventBus(":memory:") as bus:
        with pytest.raises(InvalidEvent, match=r"attrs\.kind") as caught:
            await bus.publish(AttrsKind(lines=[Line(1.0), Line(math.nan)]))
        assert caught.value.field == "lines[1].price"


async def test_too_large() -> None:
    """An event beyond max_event_bytes is refused, whatever others publish; one below is stored."""
    async with EventBus(":memory:", max_event_bytes=1000) as bus:
        with pytest.raises(InvalidEvent, match="1,000") as caught:
            await bus.publish(Placed("x" * 1000))
        assert caught.value.type == "Placed"
        await bus.publish(Placed("x" * 900))


async def test_large_events_come_through(any_db: str) -> None:
    """Events of nearly a megabyte are stored and delivered whole."""
    bus, recorder = EventBus(any_db), Recorder()
    bus.subscribe(Placed)(recorder.note)
    texts = [letter * 1_000_000 for letter in "abcde"]
    async with bus:
        await bus.publish_many([Placed(text) for text in texts])
        assert [placed.order for placed in await recorder.wait_for(5)] == texts


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"key": ""}, "key"),
        ({"key": "k" * 256}, "key"),
        ({"key": "\ud800"}, "key"),
        ({"key": "a\0b"}, "key"),
        ({"key": Unprintable()}, "key"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"idempotency_key": "\ud800"}, "idempotency_key"),
        ({"idempotency_key": 7}, "idempotency_key"),
        ({"headers": {"a": 1}}, "headers"),
        ({"headers": {1: "a"}}, "headers"),
        ({"headers": {"a": "\ud800"}}, "headers"),
        ({"headers": {"a": "x" * 20_000}}, "headers"),
        ({"headers": "text"}, "headers"),
        ({"headers": ["ab", "cd"]}, "headers"),
        ({"due": datetime(2030, 1, 1)}, "due"),  # noqa: DTZ001
        ({"due": 5}, "due"),
        ({"due": timedelta.max}, "due"),
        ({"due": timedelta.min}, "due"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_hostile_options(options: dict[str, Any], field: str) -> None:
    """An option of publish that cannot be is refused by its name, and nothing is stored."""
    async with EventBus(":memory:") as bus:
        with pytest.raises(InvalidEvent) as caught:
            await bus.publish(Placed("o-1"), **options)
        assert caught.value.type == "Placed"
        assert caught.value.field.startswith(field)
        assert await stored(bus) == []
        assert (await bus.stats()).next_due is None


@pytest.mark.parametrize("thing", [None, 5, "text", {"a": 1}, Placed, [Placed("o-1")]], ids=repr)
async def test_no_event(thing: object) -> None:
    """What is no event is refused, with a message that says what is one."""
    async with EventBus(":memory:") as bus:
        with pytest.raises(InvalidEventType, match="attrs class"):
            await bus.publish(thing)


async def test_nul_in_text_is_stored() -> None:
    """NUL characters in text are valid, and come through."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed)(recorder.note)
    async with bus:
        await bus.publish(Placed("a\0b"))
        assert await recorder.wait_for(1) == [Placed("a\0b")]


async def test_bad_event_in_a_handler_fails_that_attempt_only() -> None:
    """A handler that publishes what cannot be stored fails its attempt; what others publish is not harmed."""
    bus, recorder = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, retry=NO_RETRY)
    async def derive(placed: Placed, delivery: Delivery) -> None:
        delivery.publish(AttrsKind(number=math.nan if placed.order == "bad" else 1.0))

    bus.subscribe(AttrsKind)(recorder.note)
    async with bus:
        receipts = await bus.publish_many([Placed("good"), Placed("bad"), Placed("good")])
        await recorder.wait_for(2)
        await receipts[2].handled(timeout=20)
        (letter,) = await bus.dead_letters.list()
        assert letter.error_type == "InvalidEvent"
        assert "attrs.kind.number" in letter.error
        assert len(recorder.seen) == 2
