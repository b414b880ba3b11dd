"""Back-pressure: bounded memory, and a stalled subscription that holds up nobody."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import attrs
import pytest

from eventbus import EventBus
from eventbus._running import WAITING_BYTES
from tests.bus.support import GatedStore, Recorder


@attrs.frozen
class Placed:
    number: int
    load: str = ""


@attrs.frozen
class Other:
    number: int


async def numbers(bus: EventBus) -> list[int]:
    return [envelope.event.number async for envelope in bus.history() if isinstance(envelope.event, Placed)]


async def test_publish_waits(db: str) -> None:
    """Beyond max_pending publish waits: never do more wait to be written, and in the end all are."""
    store, published = GatedStore(db), Recorder()
    bus = EventBus(store, max_pending=5)

    async def publish(number: int) -> None:
        await bus.publish(Placed(number))
        published.add(number)

    async with bus, anyio.create_task_group() as group:
        store.hold()
        group.start_soon(publish, 0)
        await store.arrived.wait_for(1)
        for number in range(1, 20):
            group.start_soon(publish, number)
            await anyio.wait_all_tasks_blocked()
        assert (await bus.stats()).pending == 5
        assert store.arrived.seen == [1]
        assert published.seen == []
        store.release()
        await published.wait_for(20)
        assert max(store.arrived.seen) <= 5
        assert sorted(await numbers(bus)) == list(range(20))


async def test_group_larger_than_max_pending() -> None:
    """A group larger than max_pending is published, alone."""
    async with EventBus(":memory:", max_pending=3) as bus:
        with anyio.fail_after(20):
            await bus.publish_many([Placed(number) for number in range(10)])
        assert await numbers(bus) == list(range(10))


@pytest.mark.parametrize("size", [10, 25])
async def test_large_groups_have_their_turn(size: int) -> None:
    """A large group is not held up for ever by publishers of single events that never stop."""
    async with EventBus(":memory:", max_pending=10) as bus, anyio.create_task_group() as group:

        async def publish() -> None:
            while True:
                await bus.publish(Placed(0))

        for _ in range(3):
            group.start_soon(publish)
        for _ in range(5):
            with anyio.fail_after(20):
                await bus.publish_many([Placed(1)] * size)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_stalled_subscription(db: str, order: Any) -> None:
    """A subscription that is stalled holds up neither publishers nor others; later it gets everything."""
    bus, quick, slow, gate = EventBus(db, durability="fast"), Recorder(), Recorder(), anyio.Event()
    bus.subscribe(Placed, name="quick")(quick.note)

    @bus.subscribe(Placed, order=order)
    async def stalled(placed: Placed) -> None:
        await gate.wait()
        slow.add(placed.number)

    async with bus:
        for start in range(0, 6000, 500):
            await bus.publish_many([Placed(start + n) for n in range(500)])
        seen = await quick.wait_for(6000)
        assert [placed.number for placed in seen] == list(range(6000))
        assert slow.seen == []
        assert (await bus.stats()).subscriptions["stalled"].lag == 6000
        gate.set()
        await slow.wait_for(6000)
        assert await bus.drain(timeout=10) == {}
        assert sorted(slow.seen) == list(range(6000))
        if order in ("type", "log"):
            assert slow.seen == list(range(6000))


async def test_stalled_threads() -> None:
    """Plain handlers that hang occupy their own subscription's threads, not those of others."""
    bus, quick, gate = EventBus(":memory:", workers=4), Recorder(), threading.Event()

    @bus.subscribe(Placed, order="none", concurrency=16)
    def stalled(placed: Placed) -> None:
        gate.wait(10)

    @bus.subscribe(Placed)
    def runs(placed: Placed) -> None:
        quick.add(placed.number)

    async with bus:
        await bus.publish_many([Placed(number) for number in range(200)])
        assert await quick.wait_for(200) == list(range(200))
        gate.set()
        assert await bus.drain(timeout=10) == {}


async def test_bytes_that_wait_are_bounded(db: str) -> None:
    """However much a stalled subscription has before it, the events kept in memory for it are bounded in bytes."""
    bus, gate, seen = EventBus(db, durability="fast"), anyio.Event(), Recorder()

    @bus.subscribe(Placed, order="key")
    async def stalled(placed: Placed) -> None:
        await gate.wait()
        seen.add(placed.number)

    async with bus:
        assert bus._running is not None
        budget = bus._running.dispatcher.budget
        for start in range(0, 60, 10):
            await bus.publish_many([Placed(start + n, "x" * 1_000_000) for n in range(10)])
            assert budget.used <= WAITING_BYTES
        gate.set()
        assert await seen.wait_for(60)
        assert await bus.drain(timeout=10) == {}
        assert sorted(seen.seen) == list(range(60))
        assert budget.used == 0


async def test_a_flood_of_publishers() -> None:
    """Three thousand publishers at once are all served."""
    bus, recorder = EventBus(":memory:", max_pending=100), Recorder()
    bus.subscribe(Placed)(recorder.note)
    async with bus:
        async with anyio.create_task_group() as group:
            for number in range(3000):
                group.start_soon(bus.publish, Placed(number))
        assert len(await recorder.wait_for(3000)) == 3000
        assert await bus.drain(timeout=20) == {}
        assert len(set(recorder.seen)) == 3000


async def test_publish_only(db: str) -> None:
    """With dispatch=False nothing is handled and nothing is missed; a list of names dispatches these."""
    bus, one, two = EventBus(db), Recorder(), Recorder()
    bus.subscribe(Placed, name="one")(one.note)
    bus.subscribe(Placed, name="two")(two.note)
    async with bus.open(dispatch=False):
        await bus.publish_many([Placed(number) for number in range(50)])
        assert {info.name: info.state for info in await bus.subscriptions()} == {
            "one": "not dispatched here",
            "two": "not dispatched here",
        }
    assert one.seen == two.seen == []
    async with bus.open(dispatch=["two"]):
        await bus.publish(Placed(50))
        await two.wait_for(51)
    async with bus.open(dispatch=[one.note]):
        await one.wait_for(51)
    assert one.seen == two.seen == [Placed(number) for number in range(51)]
