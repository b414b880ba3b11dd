"""Events that cannot be made into objects: damaged ones are dead letters at once, unknown ones wait for a program that knows them."""

from __future__ import annotations

import sqlite3
from typing import Any

import anyio
import attrs
import pytest

from eventbus import (
    Delivery,
    Envelope,
    EventBus,
    HandlingFailed,
    RetryPolicy,
    UndecodableEvent,
    UnknownEventType,
    event,
)
from eventbus.hooks import LaneBlocked, Moment
from eventbus.stores.base import Order
from tests.bus.support import QUICK, Recorder

ORDERS: list[Order] = ["type", "log", "key", "none"]


@event("note", key="key")
@attrs.frozen
class Note:
    key: str
    n: int


@event("note", version=2, key="key")
@attrs.frozen
class NewerNote:
    key: str
    n: int
    colour: str


@event("memo", key="key")
@attrs.frozen
class Memo:
    key: str
    n: int


class Numbers:
    """An async handler that notes the numbers of the events it is given."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    async def __call__(self, event: Any) -> None:
        self.recorder.add(event.n)


class Blocks:
    """A hook that tells of lanes that wait for another program."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def __call__(self, moment: Moment) -> None:
        if isinstance(moment, LaneBlocked):
            self.recorder.add(moment)


async def store(db: str, *events: object) -> list[int]:
    """Put events into the log without handling them; returns their positions."""
    bus = EventBus(db)
    for cls in (Note, Memo):
        bus.subscribe(cls, name=f"s {cls.__name__}", start="beginning")(Numbers())
    async with bus.open(dispatch=False):
        receipts = await bus.publish_many(events)
    return [receipt.position or 0 for receipt in receipts]


def change(db: str, text: str, *values: object) -> None:
    """Change the tables behind the bus's back."""
    connection = sqlite3.connect(db)
    try:
        with connection:
            assert connection.execute(text, values).rowcount == 1
    finally:
        connection.close()


# ------------------------------------------------------------------ damaged


DAMAGE = {
    "bytes": ("data", b'{"key":"a","n":9}'),
    "other bytes": ("data", b"\xff\x00 no JSON"),
    "no bytes": ("data", b""),
    "key": ("key", "z"),
    "headers": ("headers", '{"trace": "changed"}'),
    "broken headers": ("headers", '{"trace": '),
    "version": ("version", 1_000),
    "content type": ("content_type", "application/x-else"),
    "time": ("time", 1.0),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_event_is_a_dead_letter_at_once(db: str, order: Order, damage: str) -> None:
    """What was changed on the disk does not reach a handler: it is a dead letter without a second attempt, and the rest flows."""
    column, value = DAMAGE[damage]
    positions = await store(db, *(Note("a", n) for n in range(4)))
    change(db, f"UPDATE events SET {column} = ? WHERE position = ?", value, positions[1])
    bus, numbers = EventBus(db), Numbers()
    bus.subscribe(Note, name="s", order=order, start="beginning", retry=QUICK)(numbers)
    async with bus:
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list(subscription="s")
        assert (letter.error_type, letter.attempts, letter.envelope.position) == ("UndecodableEvent", 1, positions[1])
        with pytest.raises(UndecodableEvent):
            _ = letter.envelope.event
        assert await bus.dead_letters.discard(letter.id) == 1
    assert numbers.recorder.seen == [0, 2, 3]


async def test_a_damaged_event_reaches_no_handler_of_envelopes_either(db: str) -> None:
    """A handler of a pattern takes undecoded bytes, but not damaged ones."""
    positions = await store(db, *(Note("a", n) for n in range(3)))
    change(db, "UPDATE events SET data = ? WHERE position = ?", b'{"key":"a","n":9}', positions[1])
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe("*", name="audit", order="log", start="beginning")
    async def audit(envelope: Envelope) -> None:
        recorder.add(envelope.position)

    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert [x.envelope.position for x in await bus.dead_letters.list(subscription="audit")] == [positions[1]]
    assert recorder.seen == [positions[0], positions[2]]


async def test_bytes_that_do_not_fit_the_class_are_a_dead_letter_at_once(db: str) -> None:
    """An event of a known version that the class does not take is a dead letter at once that says why; a mended class redrives it."""

    @event("note", key="key")
    @attrs.frozen
    class Note2:
        key: str
        n: int
        must: str

    await store(db, Note("a", 1))
    bus, numbers = EventBus(db), Numbers()
    bus.subscribe(Note2, name="s", start="beginning", retry=QUICK)(numbers)
    async with bus:
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list(subscription="s")
        assert (letter.error_type, letter.attempts) == ("UndecodableEvent", 1)
        assert "must" in letter.error
    bus = EventBus(db)
    bus.subscribe(Note, name="s")(numbers)
    async with bus:
        assert await bus.dead_letters.redrive(subscription="s") == 1
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert numbers.recorder.seen == [1]


async def test_each_subscription_of_a_damaged_event_has_its_dead_letter(db: str) -> None:
    """Damage is found by every subscription for itself; live ones that never read it from the disk handle it."""
    bus, live, late = EventBus(db), Numbers(), Numbers()
    bus.subscribe(Note, name="live")(live)
    async with bus:
        (receipt,) = await bus.publish_many([Note("a", 1)])
        await receipt.handled(timeout=20)
    change(db, "UPDATE events SET data = ? WHERE position = ?", b"{}", receipt.position)
    bus = EventBus(db)
    bus.subscribe(Note, name="live")(live)
    bus.subscribe(Note, name="late", start="beginning")(late)
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert [x.subscription for x in await bus.dead_letters.list()] == ["late"]
    assert (live.recorder.seen, late.recorder.seen) == ([1], [])


# ------------------------------------------------------------------ newer, unknown


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("order", ORDERS)
async def test_a_newer_version_waits_for_the_program_that_knows_it(db: str, order: Order, plain: bool) -> None:
    """An event of a newer version blocks its lane, reported, uncounted; a program with the class goes on there, in order."""
    newer = EventBus(db)
    newer.subscribe(NewerNote, name="s", order=order)(Numbers())
    async with newer.open(dispatch=False):
        await newer.publish(NewerNote("a", 1, "red"))
        await newer.publish(NewerNote("a", 2, "blue"))

    blocks, recorder = Blocks(), Recorder()
    older = EventBus(db, hooks=[blocks])

    async def on_loop(event: Note, delivery: Delivery) -> None:
        recorder.add((event.n, delivery.attempt))

    def in_thread(event: Note, delivery: Delivery) -> None:
        recorder.add((event.n, delivery.attempt))

    older.subscribe(Note, name="s", order=order, retry=RetryPolicy(attempts=1))(in_thread if plain else on_loop)
    async with older:
        (block,) = await blocks.recorder.wait_for(1)
        assert block.subscription == "s"
        assert "version 1" in block.reason
        stats = (await older.stats()).subscriptions["s"]
        assert (stats.state, stats.lag, stats.dead, stats.failed) == ("blocked", 2, 0, 0)
        assert "version 2" in str(stats.reason)
        (info,) = await older.subscriptions()
        assert info.state == "blocked"
        assert set(await older.drain(timeout=20)) == {"s"}
        receipt = await older.publish(Note("a", 3))
        with pytest.raises(HandlingFailed, match="version 2"):
            await receipt.handled(timeout=20)
        assert await older.dead_letters.list() == []

    third = Recorder()
    newest = EventBus(db)

    @newest.subscribe(NewerNote, name="s", order=order, retry=RetryPolicy(attempts=1))
    async def handle(event: NewerNote, delivery: Delivery) -> None:
        third.add((event.n, delivery.attempt))

    async with newest:
        assert set(await newest.drain(timeout=20)) == set()
        dead = await newest.dead_letters.list()
    assert [n for n, _ in third.seen] == [1, 2]
    assert {attempt for _, attempt in third.seen} == {1}
    # Version 1 is older than the class, which cannot take it without an upcaster.
    assert [x.envelope.version for x in dead] == [1]
    assert recorder.seen == []


async def test_a_newer_version_blocks_only_its_lane(db: str) -> None:
    """In order "type" the other types of the subscription flow; other subscriptions do so in any case."""
    newer = EventBus(db)
    newer.subscribe(NewerNote, Memo, name="s")(Numbers())
    newer.subscribe(Memo, name="memos")(Numbers())
    async with newer.open(dispatch=False):
        await newer.publish_many([NewerNote("a", 1, "red"), Memo("a", 2)])
    blocks, numbers, memos = Blocks(), Numbers(), Numbers()
    older = EventBus(db, hooks=[blocks])
    older.subscribe(Note, Memo, name="s")(numbers)
    older.subscribe(Memo, name="memos")(memos)
    async with older:
        await older.publish(Memo("a", 3))
        assert await numbers.recorder.wait_for(2) == [2, 3]
        assert await memos.recorder.wait_for(2) == [2, 3]
        await blocks.recorder.wait_for(1)
        assert await older.drain(timeout=20) == {"s": 1}


@pytest.mark.parametrize("order", ORDERS)
async def test_a_subclass_that_is_not_imported_is_not_passed_by(db: str, order: Order) -> None:
    """Events of a subclass that this program does not know wait, in every mode, until a program that does is started."""

    @attrs.frozen
    class Base:
        n: int

    @attrs.frozen
    class Known(Base):
        pass

    def registered(*, with_subclass: bool) -> tuple[EventBus, Numbers, type]:
        @event("base")
        @attrs.frozen
        class Fresh:
            n: int

        cls: type = Fresh
        if with_subclass:

            @event("base.sub")
            @attrs.frozen
            class Sub(Fresh):
                pass

            cls = Sub
        bus, numbers = EventBus(db), Numbers()
        bus.subscribe(Fresh, name="s", order=order)(numbers)
        return bus, numbers, cls

    bus, _, sub = registered(with_subclass=True)
    base = sub.__mro__[1]
    async with bus.open(dispatch=False):
        await bus.publish_many([sub(1), base(2), sub(3)])
    bus, without, base = registered(with_subclass=False)
    async with bus:
        await bus.publish(base(4))
        left = await bus.drain(timeout=0.3)
        assert "s" in left or order == "type"
        assert await bus.dead_letters.list() == []
    bus, with_it, _ = registered(with_subclass=True)
    async with bus:
        assert await bus.drain(timeout=20) == {}
    assert sorted(without.recorder.seen + with_it.recorder.seen) == [1, 2, 3, 4]
    assert {1, 3} <= set(with_it.recorder.seen)
    if order == "log":
        assert with_it.recorder.seen == [1, 2, 3, 4]


async def test_a_handler_of_envelopes_that_cannot_decode_its_own_event_waits(db: str) -> None:
    """A handler of a pattern that decodes its envelope waits where the class is missing, like any other."""
    await store(db, Note("a", 1), Memo("a", 2))
    blocks, recorder = Blocks(), Recorder()
    bus = EventBus(db, hooks=[blocks])
    bus.subscribe(Note, name="notes")(Numbers())  # so that notes are known here, and memos are not

    @bus.subscribe("*", name="audit", order="log", start="beginning", retry=RetryPolicy(attempts=1))
    async def audit(envelope: Envelope) -> None:
        recorder.add(envelope.event)

    async with bus:
        await blocks.recorder.wait_for(1)
        assert await bus.dead_letters.list(subscription="audit") == []
        assert (await bus.drain(timeout=20))["audit"] == 1
    assert recorder.seen == [Note("a", 1)]

    bus = EventBus(db)
    bus.subscribe(Note, Memo, name="notes")(Numbers())

    @bus.subscribe("*", name="audit", order="log", retry=RetryPolicy(attempts=1))
    async def again(envelope: Envelope) -> None:
        recorder.add(envelope.event)

    async with bus:
        assert await bus.drain(timeout=20) == {}
    assert recorder.seen == [Note("a", 1), Memo("a", 2)]


async def test_a_handler_that_fails_to_decode_another_event_has_failed(db: str) -> None:
    """A handler that meets events other than its own that it cannot decode fails by its policy; its lane does not wait for ever."""
    await store(db, Memo("a", 1))
    bus, attempts = EventBus(db), []

    @bus.subscribe(Note, name="s", retry=RetryPolicy(attempts=2, first=0.0))
    async def handle(event: Note, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        async for envelope in bus.history("memo"):
            _ = envelope.event

    async with bus:
        await bus.publish(Note("a", 2))
        assert set(await bus.drain(timeout=20)) <= {"s Memo", "s Note"}
        (letter,) = await bus.dead_letters.list(subscription="s")
        assert letter.error_type == UnknownEventType.__name__
    assert attempts == [1, 2]


async def test_a_redrive_of_an_event_that_cannot_be_decoded_yet_loses_nothing(db: str) -> None:
    """A dead letter of a newer version that an older program redrives waits there, and is delivered by a newer program."""
    newer = EventBus(db)

    @newer.subscribe(NewerNote, name="s", retry=RetryPolicy(attempts=1))
    async def fail(event: NewerNote) -> None:
        raise ValueError

    async with newer:
        await newer.publish(NewerNote("a", 1, "red"))
        assert await newer.drain(timeout=20) == {}
    blocks, numbers = Blocks(), Numbers()
    older = EventBus(db, hooks=[blocks])
    older.subscribe(Note, name="s")(numbers)
    async with older:
        assert await older.dead_letters.redrive(all=True) == 1
        await blocks.recorder.wait_for(1)
        with anyio.fail_after(20):
            assert set(await older.drain()) == {"s"}
        assert len(await older.dead_letters.list()) == 1
    newest, fresh = EventBus(db), Numbers()
    newest.subscribe(NewerNote, name="s")(fresh)
    async with newest:
        assert await newest.drain(timeout=20) == {}
        assert await newest.dead_letters.list() == []
    assert (numbers.recorder.seen, fresh.recorder.seen) == ([], [1])
