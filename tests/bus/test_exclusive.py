"""Exclusive replays: everything else of their subscriptions is held back, and goes on from the log when they are over."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest

from eventbus import BusNotOpen, ConfigurationError, Delivery, EventBus, HandlingFailed, ReplaySummary, UnknownSubscription
from eventbus._intake import QUEUE
from tests.bus.support import NO_RETRY, Recorder


@attrs.frozen
class Placed:
    n: int


ORDERS: dict[str, dict[str, Any]] = {
    "type": {"order": "type"},
    "key": {"order": "key", "concurrency": 4},
    "log": {"order": "log"},
    "none": {"order": "none", "concurrency": 4},
}


class Gate:
    """A handler that waits in replays until it is let go on, and notes what it was given."""

    def __init__(self) -> None:
        self.seen = Recorder()
        self.open = anyio.Event()
        self.error: Exception | None = None

    async def __call__(self, placed: Placed, delivery: Delivery) -> None:
        self.seen.add((placed.n, delivery.replaying))
        if delivery.replaying:
            await self.open.wait()
        if self.error is not None:
            raise self.error


def bus_with(order: str = "type", db: str = ":memory:", **options: Any) -> tuple[EventBus, Gate, Recorder]:
    """A bus with two subscriptions: "h", which waits in replays, and "other", which allows none."""
    bus, gate, other = EventBus(db), Gate(), Recorder()
    bus.subscribe(Placed, name="h", **ORDERS[order], **options)(gate)
    bus.subscribe(Placed, name="other", replay=False)(other.note)
    return bus, gate, other


async def replay(bus: EventBus, options: dict[str, Any] | None = None) -> None:
    await bus.replay(exclusive=True, **(options or {}))


@pytest.mark.parametrize("order", list(ORDERS))
async def test_held_back(order: str) -> None:
    """An exclusive replay holds live events of its subscriptions back, not those of others; then they follow, all of them."""
    bus, gate, other = bus_with(order)
    async with bus:
        await bus.publish_many([Placed(n) for n in range(3)])
        await bus.drain(20)
        gate.seen.seen.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus)
            await gate.seen.wait_for(1)
            await bus.publish_many([Placed(n) for n in range(3, 6)])
            await other.wait_for(6)
            gate.open.set()
        await bus.drain(20)
    assert sorted(gate.seen.seen[:3]) == [(n, True) for n in range(3)]
    assert sorted(gate.seen.seen[3:]) == [(n, False) for n in range(3, 6)]


async def test_plain_handler() -> None:
    """Events that a plain handler was given and has not begun are taken back, and come after the replay."""
    seen, begun, go_on = Recorder(), threading.Event(), threading.Event()
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h")
    def handler(placed: Placed, delivery: Delivery) -> None:
        if placed.n == 1 and not delivery.replaying:
            begun.set()
            assert go_on.wait(5)
        seen.add((placed.n, delivery.replaying))

    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        first = (await bus.publish_many([Placed(n) for n in range(1, 5)]))[0]
        await anyio.to_thread.run_sync(begun.wait)
        serving = bus._open().dispatcher.servings["h"]
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus, {"until": first.position})
            while serving.exclusive is None:
                await anyio.lowlevel.checkpoint()
            go_on.set()
        await bus.drain(20)
    assert seen.seen == [(0, False), (1, False), (0, True), (1, True), (2, False), (3, False), (4, False)]


@pytest.mark.parametrize("end", ["cancel", "fail", "remove"])
async def test_however_it_ends(end: str) -> None:
    """When an exclusive replay is cancelled, fails, or loses a subscription, live events of the others go on."""
    bus, gate, _ = bus_with()
    after = Recorder()
    bus.subscribe(Placed, name="third")(after.note)

    def progress(_summary: ReplaySummary) -> None:
        if end == "fail":
            raise LookupError

    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        gate.seen.seen.clear()
        after.seen.clear()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(replay, bus, {"progress": progress})
                await gate.seen.wait_for(1)
                await bus.publish(Placed(1))
                if end == "remove":
                    await bus.unsubscribe("h")
                elif end == "cancel":
                    group.cancel_scope.cancel()
                gate.open.set()
        except* (LookupError, UnknownSubscription):
            assert end != "cancel"
        gate.open.set()  # the end of the replay may have cut the group short
        await bus.drain(20)
    assert after.seen == [Placed(0), Placed(1)]
    assert end == "remove" or gate.seen.seen == [(0, True), (1, False)]


async def test_redrives_and_other_replays() -> None:
    """Redrives and other replays of the subscription wait for the end of an exclusive one."""
    bus, gate, _ = bus_with(retry=NO_RETRY)
    async with bus:
        gate.error = ValueError()
        await bus.publish(Placed(0))
        await bus.drain(20)
        gate.error = None
        await bus.publish(Placed(1))
        await bus.drain(20)
        gate.seen.seen.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus, {"after": 1})
            await gate.seen.wait_for(1)
            await bus.dead_letters.redrive(all=True)
            assert await bus.drain(20) == {"h": 1}
            group.start_soon(lambda: bus.replay(until=1))
            await anyio.wait_all_tasks_blocked()
            assert gate.seen.seen == [(1, True)]
            gate.open.set()
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(gate.seen.seen[1:]) == [(0, False), (0, True)]


async def test_those_who_wait() -> None:
    """While a subscription is held back, `handled` says so at once and `drain` leaves its events, also inside the replay."""
    bus, gate, _ = bus_with()
    inside = list[Any]()

    async def ask(_summary: ReplaySummary) -> None:
        inside.append(await bus.drain())

    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus, {"progress": ask})
            await gate.seen.wait_for(2)
            receipt = await bus.publish(Placed(1))
            with pytest.raises(HandlingFailed) as caught:
                await receipt.handled()
            assert await bus.drain() == {"h": 1}
            gate.open.set()
        await receipt.handled(20)
    assert caught.value.blocked == {"h": "held back by an exclusive replay"}
    assert inside == [{"h": 1}]


async def test_one_at_a_time() -> None:
    """A second exclusive replay to the same subscription is refused while the first runs; a dry run holds nothing back."""
    bus, gate, _ = bus_with()
    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus)
            await gate.seen.wait_for(2)
            with pytest.raises(ConfigurationError, match="'h'"):
                await bus.replay(exclusive=True)
            assert (await bus.replay(exclusive=True, dry_run=True)).events == 1
            gate.open.set()
        assert (await bus.replay(exclusive=True)).handled == 1


async def test_stop(tmp_path: Path) -> None:
    """If the bus stops during an exclusive replay, what was held back is delivered at the next start."""
    db = str(tmp_path / "shop.db")
    bus, gate, _ = bus_with(db=db)
    with pytest.raises(ExceptionGroup) as ended:
        async with anyio.create_task_group() as group, bus.open(stop_timeout=0):
            await bus.publish(Placed(0))
            await bus.drain(20)
            group.start_soon(replay, bus)
            await gate.seen.wait_for(2)
            await bus.publish_many([Placed(1), Placed(2)])
    assert ended.group_contains(BusNotOpen)
    bus, gate, _ = bus_with(db=db)
    async with bus:
        await bus.drain(20)
    assert gate.seen.seen == [(1, False), (2, False)]


async def test_memory() -> None:
    """What is held back is in the log, not in memory: more than a lane may hold comes afterwards, in order."""
    bus, gate, _ = bus_with()
    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        gate.seen.seen.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(replay, bus)
            await gate.seen.wait_for(1)
            for start in range(1, 6_001, 500):
                await bus.publish_many([Placed(n) for n in range(start, start + 500)])
            (lane,) = bus._open().dispatcher.servings["h"].lanes.values()
            assert len(lane.log.intake) <= QUEUE
            gate.open.set()
        await bus.drain(30)
    assert gate.seen.seen == [(0, True), *((n, False) for n in range(1, 6_001))]
