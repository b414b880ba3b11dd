"""Waiting for the end: `receipt.handled` for one event, `drain` for everything that was published."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Delivery, Draft, EventBus, HandlingFailed, Receipt, RetryPolicy, UnknownEvent, WaitTimeout, event
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, QUICK, Recorder


@attrs.frozen
class Placed:
    n: int


@attrs.frozen
class Shipped:
    n: int


class Telling(SQLiteStore):
    """A store that says that events are written when it is let."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.written = Recorder()
        self.tell = threading.Event()

    def commit(self, batch: Batch) -> Committed:
        committed = super().commit(batch)
        if batch.appends:
            self.written.add(len(batch.appends))
            self.tell.wait(10)
        return committed


ORDERS: dict[str, dict[str, Any]] = {
    "type": {"order": "type"},
    "key": {"order": "key", "concurrency": 4},
    "log": {"order": "log"},
    "none": {"order": "none", "concurrency": 4},
}
each_order = pytest.mark.parametrize("order", list(ORDERS))


# ------------------------------------------------------------------ handled


@each_order
async def test_handled_returns_after_the_ack_is_committed(db: str, order: str) -> None:
    """When `handled` has returned, every subscription has handled the event and a kill would not bring it again."""
    bus, seen = EventBus(db), Recorder()

    @bus.subscribe(Placed, name="slow", **ORDERS[order])
    async def slow(placed: Placed) -> None:
        await anyio.sleep(0.01)
        seen.add(placed.n)

    @bus.subscribe(Placed, name="plain", **ORDERS[order])
    def plain(placed: Placed) -> None:
        seen.add(placed.n)

    async with bus:
        for n in range(5):
            receipt = await bus.publish(Placed(n))
            await receipt.handled(20)
            assert seen.seen.count(n) == 2
            assert await bus.status(receipt.id) == {"plain": "handled", "slow": "handled"}


async def test_handled_again_and_by_many() -> None:
    """`handled` may be called again, later, and by several tasks at once."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> None:
        await anyio.sleep(0.01)
        seen.add(placed)

    async with bus:
        receipt = await bus.publish(Placed(1))
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(receipt.handled, 5)
        await receipt.handled(0.5)
        await receipt.handled()
    assert seen.seen == [Placed(1)]


async def test_handled_without_a_subscription() -> None:
    """An event that is for nobody is handled."""
    async with EventBus(":memory:") as bus:
        await (await bus.publish(Placed(1))).handled(1)


@each_order
async def test_handled_waits_for_this_event_only(order: str) -> None:
    """With order "none", and for other keys, `handled` does not wait for earlier events that take longer."""
    bus, gate = EventBus(":memory:"), anyio.Event()

    @bus.subscribe(Placed, name="h", **ORDERS[order])
    async def handler(placed: Placed) -> None:
        if placed.n == 0:
            await gate.wait()

    async with bus:
        await bus.publish(Placed(0), key="a")
        late = await bus.publish(Placed(1), key="b")
        if order in ("none", "key"):
            await late.handled(20)
        else:
            with pytest.raises(WaitTimeout):
                await late.handled(0.03)
        gate.set()
        await late.handled(20)


@each_order
async def test_handled_waits_for_retries(order: str) -> None:
    """An event that fails at first is handled when a later attempt has succeeded."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", retry=QUICK, **ORDERS[order])
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        seen.add(delivery.attempt)
        if delivery.attempt < 3:
            raise ValueError("again")

    async with bus:
        await (await bus.publish(Placed(1), key="a")).handled(20)
        assert seen.seen == [1, 2, 3]


@each_order
async def test_handled_raises_with_the_dead_letters(db: str, order: str) -> None:
    """HandlingFailed carries the dead letters of this event, of every subscription that gave up on it."""
    bus = EventBus(db)

    @bus.subscribe(Placed, name="bad", retry=NO_RETRY, **ORDERS[order])
    async def bad(placed: Placed) -> None:
        if placed.n != 2:
            raise ValueError(f"no {placed.n}")

    @bus.subscribe(Placed, name="worse", retry=NO_RETRY, **ORDERS[order])
    async def worse(placed: Placed) -> None:
        if placed.n == 1:
            raise LookupError(f"nothing {placed.n}")

    bus.subscribe(Placed, name="good")(Recorder().note)
    async with bus:
        zero, one, two = await bus.publish_many([Placed(0), Placed(1), Placed(2)])
        with pytest.raises(HandlingFailed) as caught:
            await one.handled(20)
        assert sorted((d.subscription, d.error_type, d.error) for d in caught.value.dead_letters) == [
            ("bad", "ValueError", "no 1"),
            ("worse", "LookupError", "nothing 1"),
        ]
        assert caught.value.blocked == {}
        assert "bad" in str(caught.value)
        assert "no 1" in str(caught.value)
        with pytest.raises(HandlingFailed) as caught:
            await zero.handled(20)
        assert [d.subscription for d in caught.value.dead_letters] == ["bad"]
        await two.handled(20)


async def test_handled_times_out() -> None:
    """A timeout is a WaitTimeout, which is a TimeoutError; the work goes on."""
    bus, gate = EventBus(":memory:"), anyio.Event()

    @bus.subscribe(Placed, name="h")
    async def handler(_placed: Placed) -> None:
        await gate.wait()

    async with bus:
        receipt = await bus.publish(Placed(1))
        with pytest.raises(WaitTimeout) as caught:
            await receipt.handled(0.02)
        assert isinstance(caught.value, TimeoutError)
        assert receipt.id in str(caught.value)
        with pytest.raises(WaitTimeout):
            await receipt.handled(0)
        gate.set()
        await receipt.handled(20)


async def test_handled_at_once_where_it_is_paused() -> None:
    """A paused subscription is reported at once, one that is paused meanwhile as soon as it is."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h", retry=NO_RETRY, on_exhausted="pause")
    async def handler(placed: Placed) -> None:
        if placed.n == 0:
            raise ValueError("stop here")

    async with bus:
        first = await bus.publish(Placed(0))
        with pytest.raises(HandlingFailed, match="paused: ValueError: stop here") as caught:
            await first.handled(20)
        assert list(caught.value.blocked) == ["h"]
        second = await bus.publish(Placed(1))
        with pytest.raises(HandlingFailed, match="paused"):
            await second.handled()


async def test_handled_at_once_where_there_is_no_handler(db: str) -> None:
    """A subscription without a handler, or not dispatched here, is reported at once; what it had handled before is not."""
    bus, seen = EventBus(db), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        done = await bus.publish(Placed(1), idempotency_key="1")
        await done.handled(20)
    async with bus.open(dispatch=False):
        await (await bus.publish(Placed(1), idempotency_key="1")).handled(20)
        with pytest.raises(HandlingFailed, match="'h': not dispatched here"):
            await (await bus.publish(Placed(2))).handled()
    other = EventBus(db)
    async with other:
        with pytest.raises(HandlingFailed, match="'h': no handler"):
            await (await other.publish(Placed(3))).handled()
        await (await other.publish(Shipped(3))).handled()


@each_order
async def test_handled_at_once_from_inside_the_lane(order: str) -> None:
    """A handler that waits for an event of its own lane would wait for itself: it is told at once."""
    bus, told = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", retry=NO_RETRY, **ORDERS[order])
    async def handler(placed: Placed) -> None:
        if placed.n == 0:
            receipt = await bus.publish(Placed(1), key="a")
            try:
                await receipt.handled(20)
                told.add("handled")
            except HandlingFailed as error:
                told.add(str(error))

    async with bus:
        await bus.publish(Placed(0), key="a")
        assert await bus.drain(20) == {}
    if order == "none":
        assert told.seen == ["handled"]
    else:
        assert len(told.seen) == 1
        assert "from inside the lane" in told.seen[0]


@each_order
async def test_handled_of_itself(order: str) -> None:
    """An attempt that waits for the very event it handles is told at once, whatever the order."""
    bus, told, receipts = EventBus(":memory:"), Recorder(), list[Receipt]()
    published = anyio.Event()

    @bus.subscribe(Placed, name="h", **ORDERS[order])
    async def handler(_placed: Placed) -> None:
        await published.wait()
        with pytest.raises(HandlingFailed, match="from inside the lane"):
            await receipts[0].handled(20)
        told.add("told")

    async with bus:
        receipts.append(await bus.publish(Placed(0)))
        published.set()
        assert await bus.drain(20) == {}
    assert told.seen == ["told"]


async def test_handled_of_another_subscription_from_inside_a_handler() -> None:
    """A handler may wait for an event that other subscriptions handle."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="parent")
    async def parent(placed: Placed) -> None:
        await (await bus.publish(Shipped(placed.n))).handled(20)
        seen.add("parent")

    @bus.subscribe(Shipped, name="child")
    async def child(_shipped: Shipped) -> None:
        seen.add("child")

    async with bus:
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
    assert seen.seen == ["child", "parent"]


async def test_handled_of_a_scheduled_event() -> None:
    """A scheduled event is waited for until it is due and handled; a cancelled one is told."""
    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        receipt = await bus.publish(Placed(1), due=timedelta(seconds=0.05))
        assert receipt.position is None
        with pytest.raises(WaitTimeout):
            await receipt.handled(0.01)
        assert not seen.seen
        await receipt.handled(20)
        assert seen.seen == [Placed(1)]
        later = await bus.publish(Placed(2), due=timedelta(hours=1))
        assert await bus.cancel(later.id)
        with pytest.raises(UnknownEvent, match="cancelled"):
            await later.handled(20)


async def test_cancelling_a_scheduled_event_tells_who_waits_for_it() -> None:
    """Whoever waits for a scheduled event learns at once that it was cancelled."""
    bus, outcome = EventBus(":memory:"), Recorder()
    async with bus:
        receipt = await bus.publish(Placed(1), due=timedelta(hours=1))

        async def wait() -> None:
            with pytest.raises(UnknownEvent, match="cancelled"):
                await receipt.handled(20)
            outcome.add("told")

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.02)  # nothing tells that it waits
            await bus.cancel(receipt.id)
            await outcome.wait_for(1, timeout=20)


async def test_handled_of_a_duplicate() -> None:
    """The receipt of a duplicate waits for the event that was stored first, scheduled ones too."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        await anyio.sleep(0.01)
        seen.add(placed.n)
        if placed.n == 2:
            raise ValueError("dead")

    async with bus:
        await bus.publish(Placed(1), idempotency_key="a")
        again = await bus.publish(Placed(1), idempotency_key="a")
        assert again.duplicate
        await again.handled(20)
        await bus.publish(Placed(2), idempotency_key="b")
        with pytest.raises(HandlingFailed, match="dead"):
            await (await bus.publish(Placed(2), idempotency_key="b")).handled(20)
        due = timedelta(seconds=0.05)
        await bus.publish(Placed(3), idempotency_key="c", due=due)
        scheduled = await bus.publish(Placed(3), idempotency_key="c", due=due)
        assert scheduled.duplicate
        await scheduled.handled(20)
    assert seen.seen == [1, 2, 3]


async def test_handled_of_a_subscription_that_is_removed() -> None:
    """If a subscription is removed, nobody waits for it any more."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h")
    async def handler(_placed: Placed) -> None:
        await anyio.sleep_forever()

    async with bus.open(stop_timeout=0):
        receipt = await bus.publish(Placed(1))
        outcome: list[object] = []

        async def wait() -> None:
            try:
                await receipt.handled(20)
                outcome.append(None)
            except HandlingFailed as error:
                outcome.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.02)  # nothing tells that it waits
            await bus.unsubscribe("h")
        assert isinstance(outcome[0], HandlingFailed)
        await receipt.handled(20)


# ------------------------------------------------------------------ drain


async def test_drain_of_nothing() -> None:
    """An idle bus, or one without subscriptions, is drained at once."""
    async with EventBus(":memory:") as bus:
        assert await bus.drain(1) == {}
        await bus.publish(Placed(1))
        assert await bus.drain() == {}


@each_order
async def test_drain_waits_for_everything_published(db: str, order: str) -> None:
    """What was published before the call is settled after it: handled or dead-lettered, and committed."""
    bus, seen = EventBus(db), Recorder()

    @bus.subscribe(Placed, name="h", retry=QUICK, **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        await anyio.sleep(0.0005)
        seen.add(placed.n)
        if placed.n % 10 == 3 and (placed.n == 13 or delivery.attempt == 1):
            raise ValueError("no")

    async with bus:
        receipts = await bus.publish_many([Draft(Placed(n), key=n % 7) for n in range(100)])
        assert await bus.drain(10) == {}
        assert set(seen.seen) == set(range(100))
        for receipt in receipts:
            status = await bus.status(receipt.id)
            assert status == {"h": "dead" if receipt is receipts[13] else "handled"}


async def test_drain_of_a_type_that_was_never_seen() -> None:
    """The first event of a type that comes up while the bus runs is waited for as well."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe("*", name="all")
    async def handler(envelope: Any) -> None:
        await anyio.sleep(0.01)
        seen.add(envelope.type)

    async with bus:
        await (await bus.publish(Placed(1))).handled(20)
        assert seen.seen == ["Placed"]
        await bus.publish(Shipped(1))
        assert await bus.drain(20) == {}
        assert seen.seen == ["Placed", "Shipped"]


async def test_drain_follows_what_handlers_return() -> None:
    """Cascades are waited for: what the handlers publish with their acks, and what follows from that."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", order="log")
    async def handler(placed: Placed, delivery: Delivery) -> Placed | None:
        await anyio.sleep(0.002)
        seen.add(placed.n)
        if placed.n == 2:
            delivery.publish(Shipped(2))
        return Placed(placed.n + 1) if placed.n < 5 else None

    @bus.subscribe(Shipped, name="shipped")
    async def shipped(event: Shipped) -> None:
        await anyio.sleep(0.03)
        seen.add(event)

    async with bus:
        await bus.publish(Placed(0))
        assert await bus.drain(20) == {}
        assert sorted(n for n in seen.seen if isinstance(n, int)) == list(range(6))
        assert Shipped(2) in seen.seen


async def test_drain_follows_what_handlers_publish_beside_their_ack() -> None:
    """So is what handlers publish with `bus.publish`, and `publish_many`, from inside the attempt."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", order="none")
    async def handler(placed: Placed) -> None:
        await anyio.sleep(0.002)
        seen.add(placed.n)
        if placed.n < 4:
            await bus.publish(Placed(placed.n + 1))
            await bus.publish_many([Shipped(placed.n)])

    @bus.subscribe(Shipped, name="shipped")
    async def shipped(event: Shipped) -> None:
        await anyio.sleep(0.01)
        seen.add(event)

    async with bus:
        await bus.publish(Placed(0))
        assert await bus.drain(20) == {}
        assert {n for n in seen.seen if isinstance(n, int)} == set(range(5))
        assert sum(isinstance(n, Shipped) for n in seen.seen) == 4


async def test_drain_while_others_keep_publishing() -> None:
    """`drain` waits for what was there at the call, and ends though others never stop publishing."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> None:
        seen.add(placed.n)
        await anyio.sleep(0.001)

    async def publish() -> None:
        n = 1000
        while True:
            await bus.publish(Placed(n))
            n += 1

    async with bus:
        async with anyio.create_task_group() as group:
            await bus.publish_many([Placed(n) for n in range(20)])
            group.start_soon(publish)
            assert await bus.drain(20) == {}
            assert set(range(20)) <= set(seen.seen)
            group.cancel_scope.cancel()


async def test_drain_of_what_is_about_to_be_announced(db: str) -> None:
    """`drain` waits for an event that is in the log before this instance is told of it, also with lanes that it is not for."""
    store, seen = Telling(db), Recorder()
    bus = EventBus(store)
    bus.subscribe(Placed, name="stock", order="key", concurrency=4)(seen.note)

    async def drain() -> None:
        with anyio.fail_after(10):
            assert await bus.drain() == {}
        assert seen.seen == [Placed(1)]

    async with bus, anyio.create_task_group() as group:
        group.start_soon(bus.publish, Placed(1))
        await store.written.wait_for(1)
        group.start_soon(drain)
        await anyio.wait_all_tasks_blocked()
        await bus.stats()  # read after how far the log goes
        store.tell.set()


@each_order
async def test_drain_returns_what_it_left(order: str) -> None:
    """After its timeout `drain` returns how many deliveries of which subscription are not settled; it does not raise."""
    bus, gate = EventBus(":memory:"), anyio.Event()

    @bus.subscribe(Placed, name="slow", **ORDERS[order])
    async def slow(_placed: Placed) -> None:
        await gate.wait()

    bus.subscribe(Placed, name="quick", **ORDERS[order])(Recorder().note)
    async with bus:
        await bus.publish_many([Draft(Placed(n), key=n % 3) for n in range(10)])
        assert await bus.drain(0.05) == {"slow": 10}
        gate.set()
        assert await bus.drain(20) == {}


@each_order
async def test_drain_counts_what_waits_for_a_retry(order: str) -> None:
    """What waits for another attempt, and what waits behind it, is counted among what is left."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(first=3600), **ORDERS[order])
    async def handler(placed: Placed) -> None:
        if placed.n == 0:
            raise ValueError("in an hour")

    async with bus:
        await bus.publish_many([Draft(Placed(n), key="a") for n in range(3)])
        expected = {"type": 3, "log": 3, "key": 3, "none": 1}
        assert await bus.drain(0.1) == {"h": expected[order]}


async def test_drain_does_not_wait_for_what_is_paused() -> None:
    """A paused subscription is not waited for, but counted; nor is one that is paused meanwhile."""
    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="paused")(seen.note)

    @bus.subscribe(Placed, name="pausing", retry=NO_RETRY, on_exhausted="pause")
    async def pausing(_placed: Placed) -> None:
        await anyio.sleep(0.02)
        raise ValueError("stop")

    async with bus:
        await bus.pause("paused")
        await bus.publish_many([Placed(1), Placed(2)])
        with anyio.fail_after(20):
            assert await bus.drain() == {"paused": 2, "pausing": 2}


async def test_drain_does_not_wait_for_what_is_due_later() -> None:
    """A scheduled event is not waited for."""
    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        await bus.publish(Placed(1), due=timedelta(hours=1))
        assert await bus.drain(20) == {}
        assert not seen.seen


async def test_drain_waits_for_redrives() -> None:
    """A redrive that was asked for before the call is waited for."""
    bus, seen, broken = EventBus(":memory:"), Recorder(), True

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        if broken:
            raise ValueError("no")
        await anyio.sleep(0.01)
        seen.add(placed)

    async with bus:
        await bus.publish_many([Placed(n) for n in range(5)])
        assert await bus.drain(20) == {}
        broken = False
        assert await bus.dead_letters.redrive(all=True) == 5
        assert await bus.drain(20) == {}
        assert len(seen.seen) == 5
        assert await bus.dead_letters.list() == []


@each_order
async def test_drain_from_inside_a_handler(order: str) -> None:
    """A handler may drain: its own lane is not waited for, everything else is."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="drainer", **ORDERS[order])
    async def drainer(_placed: Placed) -> None:
        await bus.drain(20)
        seen.add("drained")

    @bus.subscribe(Placed, name="other")
    async def other(_placed: Placed) -> None:
        await anyio.sleep(0.02)
        seen.add("other")

    async with bus:
        await bus.publish(Placed(1))
        with anyio.fail_after(20):
            assert await bus.drain() == {}
    assert seen.seen == ["other", "drained"]


async def test_drain_from_another_task_of_a_handler() -> None:
    """Nor does a task that a handler has started wait for its handler's lane."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h")
    async def handler(_placed: Placed) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(bus.drain, 5)
        seen.add("drained")

    async with bus:
        await bus.publish(Placed(1))
        with anyio.fail_after(20):
            await bus.drain()
    assert seen.seen == ["drained"]


async def test_drain_covers_what_is_dispatched_here(db: str) -> None:
    """What is not dispatched here is neither waited for nor counted."""
    bus, seen = EventBus(db), Recorder()
    bus.subscribe(Placed, name="one")(seen.note)
    bus.subscribe(Placed, name="two")(Recorder().note)
    async with bus.open(dispatch=["one"]):
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
    assert seen.seen == [Placed(1)]


async def test_drain_does_not_wait_for_a_redrive_that_cannot_be_decoded(db: str) -> None:
    """A redrive of an event that this program has no class for waits for a program that has; `drain` does not."""

    @event("order.placed", version=2)
    @attrs.frozen
    class Newer:
        n: int

    @event("order.placed", version=1)
    @attrs.frozen
    class Older:
        n: int

    new, old = EventBus(db), EventBus(db)

    @new.subscribe(Newer, name="h", retry=NO_RETRY)
    async def fails(_event: Newer) -> None:
        raise ValueError("dead")

    async with new:
        await new.publish(Newer(1))
        assert await new.drain(20) == {}
    old.subscribe(Older, name="h")(Recorder().note)
    async with old:
        await old.dead_letters.redrive(all=True)
        with anyio.fail_after(20):
            assert await old.drain() == {"h": 1}
        assert (await old.stats()).subscriptions["h"].state == "blocked"
        (letter,) = await old.dead_letters.list()
        assert letter.redriving


async def test_drain_when_a_subscription_is_removed() -> None:
    """A subscription that is removed while its redrive waits holds up nobody."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        if hang:
            await anyio.sleep_forever()
        raise ValueError("dead")

    hang = False
    async with bus.open(stop_timeout=0):
        await bus.publish(Placed(1))
        await bus.drain(20)
        hang = True
        await bus.dead_letters.redrive(all=True)
        left: list[object] = []

        async def drain() -> None:
            left.append(await bus.drain(20))

        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(drain)
                await anyio.sleep(0.02)  # nothing tells that it waits
                assert not left
                await bus.unsubscribe("h")
        assert left == [{}]


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """Waits that are cancelled disturb neither the bus nor those who wait beside them."""
    bus, gate = EventBus(":memory:"), anyio.Event()

    @bus.subscribe(Placed, name="h")
    async def handler(_placed: Placed) -> None:
        await gate.wait()

    async with bus:
        receipt = await bus.publish(Placed(1))
        for wait in (receipt.handled, bus.drain):
            with anyio.move_on_after(0.01) as scope:
                await wait()
            assert scope.cancelled_caught
        async with anyio.create_task_group() as group:
            group.start_soon(receipt.handled, 5)
            group.start_soon(bus.drain, 5)
            await anyio.sleep(0.01)
            gate.set()
