"""Where a subscription begins, and what becomes of stored ones when the program that declares them has changed."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest

from eventbus import Delivery, Draft, EventBus, InvalidSubscription, RetryPolicy, StoreCorrupt, UnknownSubscription, event
from tests.bus.support import NO_RETRY, MovableClock, Recorder


@attrs.frozen
class Placed:
    n: int


@attrs.frozen
class Shipped:
    n: int


ORDERS: dict[str, dict[str, Any]] = {
    "type": {"order": "type"},
    "key": {"order": "key", "concurrency": 4},
    "log": {"order": "log"},
    "none": {"order": "none", "concurrency": 4},
}
each_order = pytest.mark.parametrize("order", list(ORDERS))


def a_bus(db: str, *types: Any, **options: Any) -> tuple[EventBus, Recorder]:
    bus, seen = EventBus(db), Recorder()

    @bus.subscribe(*types, **{"name": "h", **options})
    async def handler(event: Any) -> None:
        seen.add(event.n if hasattr(event, "n") else event)

    return bus, seen


async def handled(bus: EventBus, seen: Recorder) -> list[int]:
    """Open, work everything off, and tell what was handled, sorted."""
    async with bus:
        assert await bus.drain(20) == {}
    found, seen.seen = sorted(seen.seen), []
    return found


# ------------------------------------------------------------------ start


@each_order
async def test_now_is_the_default(db: str, order: str) -> None:
    """A new subscription begins with what is published after it was registered."""
    async with EventBus(db) as early:
        await early.publish(Placed(0))
    bus, seen = a_bus(db, Placed, **ORDERS[order])
    async with bus:
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
    assert seen.seen == [1]


@each_order
async def test_beginning(db: str, order: str) -> None:
    """`start="beginning"` begins with the first event that is retained, and misses none of those that come meanwhile."""
    async with EventBus(db) as early:
        await early.publish_many([Draft(Placed(n), key=n) for n in range(1200)])
    bus, seen = a_bus(db, Placed, start="beginning", **ORDERS[order])
    async with bus:
        for n in range(1200, 1300):
            await bus.publish(Placed(n), key=n)
        assert await bus.drain(10) == {}
    assert sorted(seen.seen) == list(range(1300))
    if order in ("type", "log"):
        assert seen.seen == list(range(1300))


@each_order
async def test_a_position(db: str, order: str) -> None:
    """A position begins with the event after it; 0 is the beginning, one above the head leaves out what lies below it."""
    async with EventBus(db) as early:
        receipts = await early.publish_many([Placed(n) for n in range(5)])
    position = receipts[2].position
    assert position is not None
    assert await handled(*a_bus(db, Placed, start=position, **ORDERS[order])) == [3, 4]
    assert await handled(*a_bus(db, Placed, start=0, name="all", **ORDERS[order])) == [0, 1, 2, 3, 4]
    later, seen = a_bus(db, Placed, start=position + 4, name="later", **ORDERS[order])
    async with later:
        await later.publish_many([Placed(n) for n in range(5, 10)])
        assert await later.drain(20) == {}
    assert sorted(seen.seen) == [7, 8, 9]


@each_order
async def test_a_datetime(db: str, order: str) -> None:
    """A datetime begins with the first event published at or after it; one in the future with what is published next."""
    clock = MovableClock()
    early = EventBus(db, clock=clock)
    async with early:
        for n in range(4):
            await early.publish(Placed(n))
            clock.move(timedelta(hours=1))
        times = [envelope.time async for envelope in early.history()]
    assert await handled(*a_bus(db, Placed, start=times[2], **ORDERS[order])) == [2, 3]
    assert await handled(*a_bus(db, Placed, start=times[2] + timedelta(microseconds=1), name="b", **ORDERS[order])) == [3]
    assert await handled(*a_bus(db, Placed, start=datetime(2000, 1, 1, tzinfo=UTC), name="c", **ORDERS[order])) == [0, 1, 2, 3]
    future, seen = a_bus(db, Placed, start=datetime(2200, 1, 1, tzinfo=UTC), name="d", **ORDERS[order])
    async with future:
        await future.publish(Placed(9))
        assert await future.drain(20) == {}
    assert seen.seen == [9]


async def test_start_counts_for_new_subscriptions_only(db: str) -> None:
    """A stored subscription goes on where it was, whatever `start` says now."""
    bus, seen = a_bus(db, Placed)
    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
    assert seen.seen == [1]
    assert await handled(*a_bus(db, Placed, start="beginning")) == []


@pytest.mark.parametrize("start", ["yesterday", -1, 1.5, True, datetime(2024, 1, 1)])  # noqa: DTZ001  # the fault
def test_what_cannot_be_a_start(start: Any) -> None:
    """A start that cannot be is refused where it is declared."""
    with pytest.raises(InvalidSubscription, match="start="):
        a_bus("never.db", Placed, start=start)


# ------------------------------------------------------------------ types


@each_order
async def test_a_type_that_joins_later_begins_at_the_head(db: str, order: str) -> None:
    """A type added to a stored subscription brings what is published from then on; the old types go on where they were."""
    bus, seen = a_bus(db, Placed, **ORDERS[order])
    async with bus.open(dispatch=False):
        await bus.publish_many([Placed(1), Shipped(2), Placed(3), Shipped(4)])
    wider, seen = a_bus(db, Placed, Shipped, start="beginning", **ORDERS[order])
    async with wider:
        await wider.publish_many([Shipped(5), Placed(6)])
        assert await wider.drain(20) == {}
    assert sorted(seen.seen) == [1, 3, 5, 6]


@each_order
async def test_a_type_that_leaves_comes_no_more(db: str, order: str) -> None:
    """A type taken out of the declaration is not delivered; taken in again, it goes on where it began first."""
    both, seen = a_bus(db, Placed, Shipped, **ORDERS[order])
    async with both:
        await both.publish_many([Placed(1), Shipped(2)])
        await both.drain(20)
    assert sorted(seen.seen) == [1, 2]
    one, seen = a_bus(db, Placed, **ORDERS[order])
    async with one:
        await one.publish_many([Placed(3), Shipped(4)])
        assert await one.drain(20) == {}
    assert seen.seen == [3]


async def test_patterns_take_types_that_come_up_later(db: str) -> None:
    """A pattern brings events of types that nobody had seen when it was registered."""

    @event("order.placed")
    @attrs.frozen
    class OrderPlaced:
        n: int

    @event("order.paid")
    @attrs.frozen
    class OrderPaid:
        n: int

    bus, seen = EventBus(db), Recorder()

    @bus.subscribe("order.*", name="h")
    async def handler(envelope: Any) -> None:
        seen.add(envelope.type)

    async with bus:
        await (await bus.publish(OrderPlaced(1))).handled(20)
    publisher = EventBus(db)
    async with publisher:
        await publisher.publish(OrderPaid(1))
    async with bus:
        assert await bus.drain(20) == {}
    assert seen.seen == ["order.placed", "order.paid"]


# ------------------------------------------------------------------ changed options


CHANGES = [
    ({"order": "type"}, {"order": "log"}),
    ({"order": "log"}, {"order": "type"}),
    ({"order": "type"}, {"order": "key"}),
    ({"order": "key"}, {"order": "none"}),
    ({"order": "none"}, {"order": "key"}),
    ({"order": "key", "concurrency": 4}, {"order": "key", "concurrency": 8}),
    ({"order": "none", "concurrency": 4}, {"order": "none", "concurrency": 2}),
]


@pytest.mark.parametrize(("old", "new"), CHANGES, ids=str)
async def test_a_change_of_order_settles_nothing_twice(db: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Order and concurrency change with the next start, wherever the lanes stand: what was settled is not delivered again, and
    what was not is."""
    settled: list[int] = []
    before = EventBus(db)

    @before.subscribe(Placed, name="h", retry=RetryPolicy(first=3600), **old)
    def handler(placed: Placed) -> None:
        if placed.n % 3 == 2:
            raise ValueError("in an hour")
        settled.append(placed.n)

    async with before:
        await before.publish_many([Draft(Placed(n), key=n % 7) for n in range(20)])
        await before.drain(0.05)
    after, seen = a_bus(db, Placed, **new)
    async with after:
        await after.publish(Placed(20), key="a")
        assert await after.drain(20) == {}
        (info,) = await after.subscriptions()
        assert (info.order, info.concurrency) == (new["order"], new.get("concurrency", info.concurrency))
    assert sorted(settled + seen.seen) == list(range(21))


async def test_a_dead_letter_does_not_hold_up_a_change(db: str) -> None:
    """Dead letters are settled; they can be redriven with the new options."""
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(_placed: Placed) -> None:
        raise ValueError("dead")

    async with bus:
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
    changed, seen = a_bus(db, Placed, order="key")
    async with changed:
        await changed.dead_letters.redrive(all=True)
        assert await changed.drain(20) == {}
        assert await changed.dead_letters.list() == []
    assert seen.seen == [1]


async def test_other_options_may_change(db: str) -> None:
    """Retry, timeout, replay and the handler itself are the program's own: they may change at any time."""
    bus, _ = a_bus(db, Placed)
    async with bus.open(dispatch=False):
        await bus.publish(Placed(1))
    changed, seen = a_bus(db, Placed, retry=NO_RETRY, timeout=None, replay=False, on_exhausted="pause", start="beginning")
    assert await handled(changed, seen) == [1]


# ------------------------------------------------------------------ orphans


async def test_a_subscription_without_a_handler_is_reported_and_kept(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """What waits for a subscription that this program does not declare is reported at start and in stats, never dropped."""
    bus, seen = a_bus(db, Placed)
    async with bus.open(dispatch=False):
        await bus.publish(Placed(1))
    other = EventBus(db, retention=timedelta(microseconds=1))
    with caplog.at_level(logging.WARNING, "eventbus"):
        async with other:
            await other.publish(Placed(2))
            stats = await other.stats()
            assert stats.subscriptions["h"].state == "no handler"
            assert stats.subscriptions["h"].lag == 2
    assert any("'h'" in record.getMessage() and "unsubscribe" in record.getMessage() for record in caplog.records)
    assert await handled(bus, seen) == [1, 2]


async def test_an_orphan_is_removed_by_unsubscribe(db: str) -> None:
    """`unsubscribe` removes a subscription, with a handler or without; declared again it is new."""
    bus, seen = a_bus(db, Placed)
    async with bus.open(dispatch=False):
        await bus.publish(Placed(1))
    async with EventBus(db) as other:
        await other.unsubscribe("h")
        assert await other.subscriptions() == []
        with pytest.raises(UnknownSubscription):
            await other.unsubscribe("h")
        await (await other.publish(Placed(2))).handled(20)
    async with bus:
        await bus.publish(Placed(3))
        assert await bus.drain(20) == {}
    assert seen.seen == [3]


async def test_unsubscribe_while_it_is_dispatched(db: str) -> None:
    """A subscription that is removed while it runs gets nothing more, in this run and the next; the bus goes on."""
    import anyio

    bus, seen, other, running = EventBus(db), Recorder(), Recorder(), anyio.Event()

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed, delivery: Delivery) -> Shipped:
        seen.add(placed.n)
        running.set()
        await anyio.sleep(0.01)
        return Shipped(placed.n)

    bus.subscribe(Placed, name="other")(other.note)
    async with bus:
        await bus.publish_many([Placed(1), Placed(2)])
        await running.wait()
        await bus.unsubscribe(handler)
        await (await bus.publish(Placed(3))).handled(20)
        assert await bus.drain(20) == {}
        assert [info.name for info in await bus.subscriptions()] == ["other"]
        with pytest.raises(UnknownSubscription):
            await bus.pause("h")
    async with bus:
        await bus.publish(Placed(4))
        assert await bus.drain(20) == {}
        assert [envelope async for envelope in bus.history(Shipped)] == []
    assert seen.seen == [1]
    assert [placed.n for placed in other.seen] == [1, 2, 3, 4]


async def test_the_dead_letters_of_a_removed_subscription_stay(db: str) -> None:
    """Dead letters are kept for people, whatever becomes of the subscription."""
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(_placed: Placed) -> None:
        raise ValueError("dead")

    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
        await bus.unsubscribe("h")
        (letter,) = await bus.dead_letters.list(subscription="h")
        assert letter.envelope.event == Placed(1)
        assert await bus.dead_letters.discard(letter.id) == 1


@each_order
async def test_a_damaged_lane_begins_again_without_its_row(db: str, order: str) -> None:
    """A bus does not start with a lane that does not match its checksum; what the error says to do makes it deliver all again."""
    bus, seen = a_bus(db, Placed, **ORDERS[order])
    async with bus:
        await bus.publish_many([Placed(n) for n in range(3)])
        assert await bus.drain(10) == {}
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE lanes SET checkpoint = checkpoint + 1")
    with pytest.raises(StoreCorrupt, match="With the row deleted from `lanes`"):
        async with bus:
            pass
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("DELETE FROM lanes")
    async with bus:
        assert await bus.drain(10) == {}
    assert sorted(seen.seen) == sorted([*range(3), *range(3)])
