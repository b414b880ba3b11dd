"""Retention: what may go, what must stay, and that pruning holds nothing up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Delivery, Draft, Envelope, EventBus, HandlingFailed, RetryPolicy
from eventbus.stores.base import Batch, Committed, Prune
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, MovableClock, Recorder

HOUR = timedelta(hours=1)


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


class CountingStore(SQLiteStore):
    """A SQLite store that notes when a round of pruning has ended, and how large its steps were."""

    def __init__(self, path: str = ":memory:") -> None:
        super().__init__(path, durability="fast")
        self.rounds = Recorder()
        self.steps: list[Prune] = []

    def commit(self, batch: Batch) -> Committed:
        committed = super().commit(batch)
        for command, result in zip(batch.commands, committed.results, strict=True):
            if isinstance(command, Prune):
                self.steps.append(command)
                if result is None:
                    self.rounds.add(len(self.steps))
        return committed

    async def pruned(self) -> None:
        """Wait until a round that begins after now has ended."""
        await self.rounds.wait_for(len(self.rounds.seen) + 2)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prune every few milliseconds instead of once a minute."""
    monkeypatch.setattr("eventbus._options.PRUNE_EVERY", 0.01)
    monkeypatch.setattr("eventbus._upkeep._PRUNE_PAUSE", 0.001)


def a_bus(store: CountingStore, clock: MovableClock, **options: Any) -> EventBus:
    return EventBus(store, clock=clock, **{"retention": HOUR, **options})


async def left(bus: EventBus) -> list[int]:
    return [envelope.event.n async for envelope in bus.history()]  # type: ignore[attr-defined]


@each_order
async def test_old_events_that_everybody_has_settled_go(order: str) -> None:
    """An event older than retention that every subscription has settled is removed; a younger one stays."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock)
    bus.subscribe(Placed, name="h", **ORDERS[order])(Recorder().note)
    async with bus:
        await bus.publish_many([Placed(n) for n in range(5)])
        clock.move(HOUR / 2)
        await bus.publish(Placed(5))
        assert await bus.drain(20) == {}
        await store.pruned()
        assert await left(bus) == [0, 1, 2, 3, 4, 5]
        clock.move(HOUR / 2 + timedelta(seconds=1))
        await store.pruned()
        assert await left(bus) == [5]
        assert (await bus.stats()).head == 6


async def test_without_retention_everything_stays() -> None:
    """By default nothing is removed."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock, retention=None)
    async with bus:
        await bus.publish(Placed(0))
        clock.move(1000 * HOUR)
        await store.pruned()
        assert await left(bus) == [0]


async def test_events_that_nobody_is_subscribed_to_go() -> None:
    """What no subscription matches is needed by nobody."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock)
    bus.subscribe(Shipped, name="h")(Recorder().note)
    async with bus:
        await bus.publish(Placed(0))
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []


@each_order
async def test_what_a_subscription_needs_is_never_removed(order: str) -> None:
    """However old: what is not handled, waits for a retry, or waits behind one, stays, and is delivered in the end."""
    store, clock, seen, broken = CountingStore(), MovableClock(), Recorder(), True
    bus = a_bus(store, clock)

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(attempts=None, first=0.05, factor=1, jitter=0), **ORDERS[order])
    async def handler(placed: Placed) -> None:
        if broken and placed.n == 2:
            raise ValueError("not yet")
        seen.add(placed.n)

    async with bus:
        await bus.publish_many([Draft(Placed(n), key=n % 2) for n in range(6)])
        await seen.wait_for({"type": 2, "log": 2, "key": 4, "none": 5}[order])
        clock.move(100 * HOUR)
        await store.pruned()
        await store.pruned()
        expected = {"type": [2, 3, 4, 5], "log": [2, 3, 4, 5], "key": [2, 4], "none": [2]}
        assert await left(bus) == expected[order]
        broken = False
        assert await bus.drain(20) == {}
        assert sorted(seen.seen) == [0, 1, 2, 3, 4, 5]
        await store.pruned()
        assert await left(bus) == []


@pytest.mark.parametrize("how", ["paused", "not dispatched", "no handler"])
@each_order
async def test_what_a_silent_subscription_needs_is_never_removed(db: str, how: str, order: str) -> None:
    """A subscription that is paused, not dispatched, or has no handler keeps its events in the log."""
    store, clock, seen = CountingStore(db), MovableClock(), Recorder()
    bus = a_bus(store, clock)
    bus.subscribe(Placed, name="h", **ORDERS[order])(seen.note)
    async with bus:
        if how == "paused":
            await bus.pause("h")
        await bus.drain(20)
    silent = bus if how != "no handler" else a_bus(store, clock)
    async with silent.open(dispatch=how != "not dispatched"):
        await silent.publish_many([Draft(Placed(n), key=n) for n in range(3)])
        await silent.publish(Shipped(9))
        clock.move(100 * HOUR)
        await store.pruned()
        await store.pruned()
        assert await left(silent) == [0, 1, 2]
    async with bus:
        if how == "paused":
            await bus.resume("h")
        assert await bus.drain(20) == {}
        await store.pruned()
        assert await left(bus) == []
    assert sorted(placed.n for placed in seen.seen) == [0, 1, 2]


async def test_an_event_that_is_being_handled_stays() -> None:
    """The event of an attempt that runs is not settled."""
    store, clock, gate, running = CountingStore(), MovableClock(), anyio.Event(), anyio.Event()
    bus = a_bus(store, clock)

    @bus.subscribe(Placed, name="h", order="none")
    async def handler(_placed: Placed) -> None:
        running.set()
        await gate.wait()

    async with bus:
        await bus.publish(Placed(0))
        await running.wait()
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == [0]
        gate.set()
        await bus.drain(20)
        await store.pruned()
        assert await left(bus) == []


async def test_in_small_steps() -> None:
    """A long log is pruned in steps of at most 500 events, between which others write."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock)
    async with bus:
        for _ in range(5):
            await bus.publish_many([Placed(n) for n in range(1000)])
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []
        assert len({step.after for step in store.steps}) >= 10
        assert all(step.limit <= 500 for step in store.steps)


async def test_a_running_replay_keeps_its_range() -> None:
    """While a replay runs, nothing of its range is removed."""
    store, clock, gate, seen = CountingStore(), MovableClock(), anyio.Event(), Recorder()
    bus = a_bus(store, clock)

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if delivery.replaying:
            seen.add(placed.n)
            await gate.wait()

    async with bus:
        receipts = await bus.publish_many([Placed(n) for n in range(10)])
        await bus.drain(20)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: bus.replay(since=receipts[4].position))
            await seen.wait_for(1)
            clock.move(2 * HOUR)
            await store.pruned()
            kept = await left(bus)
            gate.set()
        assert kept[-6:] == seen.seen == [4, 5, 6, 7, 8, 9]
        assert 0 not in kept
        await store.pruned()
        assert await left(bus) == []


async def test_handled_of_an_event_that_is_gone() -> None:
    """What retention has removed was settled by everybody: `handled` returns, or raises with the dead letters."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock)

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        if placed.n == 1:
            raise ValueError("dead")

    async with bus:
        good, bad = await bus.publish_many([Draft(Placed(n), idempotency_key=str(n)) for n in range(2)])
        await bus.drain(20)
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []
        again = [await bus.publish(Placed(n), idempotency_key=str(n)) for n in range(2)]
        assert [receipt.duplicate for receipt in again] == [True, True]
        for receipt in (good, again[0]):
            await receipt.handled(20)
        for receipt in (bad, again[1]):
            with pytest.raises(HandlingFailed, match="dead"):
                await receipt.handled(20)


async def test_a_dead_letter_outlives_its_event() -> None:
    """A dead letter holds its own copy: it can be read and redriven after its event is gone."""
    store, clock, broken, seen = CountingStore(), MovableClock(), True, Recorder()
    bus = a_bus(store, clock)

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        if broken:
            raise ValueError("dead")
        seen.add(placed.n)

    async with bus:
        await bus.publish(Placed(7))
        await bus.drain(20)
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []
        (letter,) = await bus.dead_letters.list()
        assert letter.envelope.event == Placed(7)
        broken = False
        await bus.dead_letters.redrive(letter.id)
        assert await bus.drain(20) == {}
        assert seen.seen == [7]


async def test_a_dead_letter_of_a_type_of_which_nothing_is_left(db: str) -> None:
    """A subscription to a pattern redrives a dead letter after a restart though no event of its type is in the log."""
    store, clock, broken, seen = CountingStore(db), MovableClock(), True, Recorder()
    bus = a_bus(store, clock)

    @bus.subscribe("*", name="h", retry=NO_RETRY)
    async def handler(envelope: Envelope) -> None:
        if broken:
            raise ValueError("dead")
        seen.add(envelope.type)

    async with bus:
        await bus.publish(Placed(7))
        await bus.drain(20)
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []
    broken = False
    async with bus:
        assert await bus.dead_letters.redrive(all=True) == 1
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
    assert seen.seen == ["Placed"]


async def test_idempotency_keys_are_kept_for_their_own_time() -> None:
    """A key is known for `dedup_for`, whatever retention has removed; after that it may be used again."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock, dedup_for=10 * HOUR)
    async with bus:
        first = await bus.publish(Placed(0), idempotency_key="a")
        clock.move(9 * HOUR)
        await store.pruned()
        assert await left(bus) == []
        again = await bus.publish(Placed(0), idempotency_key="a")
        assert again.duplicate
        assert (again.id, again.position) == (first.id, first.position)
        await again.handled(20)
        clock.move(2 * HOUR)
        await store.pruned()
        third = await bus.publish(Placed(0), idempotency_key="a")
        assert not third.duplicate
        assert third.id != first.id


async def test_keys_go_without_retention_too() -> None:
    """`dedup_for` bounds the keys also where events are kept for ever; the key of a scheduled event stays until it is due."""
    store, clock = CountingStore(), MovableClock()
    bus = a_bus(store, clock, retention=None, dedup_for=HOUR)
    async with bus:
        await bus.publish(Placed(0), idempotency_key="a")
        await bus.publish(Placed(1), idempotency_key="b", due=1000 * HOUR)
        clock.move(2 * HOUR)
        await store.pruned()
        assert not (await bus.publish(Placed(0), idempotency_key="a")).duplicate
        assert (await bus.publish(Placed(1), idempotency_key="b", due=1000 * HOUR)).duplicate


async def test_positions_are_not_given_twice(db: str) -> None:
    """After everything was removed, and after a restart, positions go on where they were."""
    store, clock, seen = CountingStore(db), MovableClock(), Recorder()
    bus = a_bus(store, clock)
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        last = (await bus.publish_many([Placed(n) for n in range(5)]))[-1].position
        await bus.drain(20)
        clock.move(2 * HOUR)
        await store.pruned()
        assert await left(bus) == []
    async with bus:
        receipt = await bus.publish(Placed(5))
        assert last is not None
        assert receipt.position is not None
        assert receipt.position > last
        await receipt.handled(20)
    assert [placed.n for placed in seen.seen] == list(range(6))


async def test_a_late_subscriber_begins_with_what_is_retained() -> None:
    """`start="beginning"` on a log whose beginning is gone begins with the oldest event that is left."""
    store, clock, seen = CountingStore(), MovableClock(), Recorder()
    bus = a_bus(store, clock)
    bus.subscribe(Placed, name="late", start="beginning")(seen.note)
    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        clock.move(2 * HOUR)
        await bus.publish(Placed(1))
        await bus.drain(20)
        await store.pruned()
        assert await left(bus) == [1]
    assert [placed.n for placed in seen.seen] == [0, 1]


async def test_pruning_goes_on_while_events_are_published() -> None:
    """Pruning beside publishers and handlers loses nothing of what they need."""
    store, clock, seen = CountingStore(), MovableClock(), Recorder()
    bus = a_bus(store, clock, retention=timedelta(microseconds=1))

    @bus.subscribe(Placed, name="h", order="key", retry=RetryPolicy(first=0.005, jitter=0), concurrency=4)
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if placed.n % 7 == 0 and delivery.attempt == 1:
            raise ValueError("once")
        seen.add(placed.n)

    async with bus:
        for n in range(400):
            await bus.publish(Placed(n), key=n % 5)
        assert await bus.drain(10) == {}
        await store.pruned()
        assert await left(bus) == []
    assert sorted(seen.seen) == list(range(400))
    for key in range(5):
        assert [n for n in seen.seen if n % 5 == key] == list(range(key, 400, 5))
