"""`handled` and `drain` while other instances have the lanes: they wait, are told, and ask for nothing meanwhile."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from eventbus import Envelope, EventBus, HandlingFailed, Receipt, Reject, RetryPolicy, WaitTimeout
from tests.bus.shops import (
    LONG,
    Counting,
    Gated,
    Paid,
    Placed,
    Shop,
    key_in,
    opened,
    publish,
    quiet_work,
    running,
    running_of,
    shop_of,
    until,
)
from tests.bus.support import Recorder


def told_nothing(monkeypatch: pytest.MonkeyPatch, *buses: EventBus) -> None:
    """From here on these instances learn nothing of each other: they do not look how all stand when others have written."""
    for bus in buses:
        monkeypatch.setattr(running_of(bus).membership, "noticed", lambda _notice: None)


async def until_waiting(bus: EventBus) -> None:
    """Wait until somebody waits for what other instances have in hand."""
    with anyio.fail_after(10):
        while not running_of(bus).elsewhere._waits:
            await anyio.lowlevel.checkpoint()


async def expect_paused(receipt: Receipt) -> None:
    with pytest.raises(HandlingFailed, match="paused"):
        await receipt.handled(10)


@pytest.mark.usefixtures("no_second_look")
async def test_handled_while_another_tries_again(db: str) -> None:
    """`handled` asks for nothing while an event waits for its next attempt elsewhere."""
    store, desk, seen, worker = Counting(db), EventBus(db, lease=LONG), Recorder(), EventBus(db, lease=LONG)

    @worker.subscribe(Placed, name="stock", order="key", breaker=None, retry=RetryPolicy(first=60.0))
    async def fail(placed: Placed) -> None:
        seen.add(placed.n)
        raise ValueError

    async with worker, desk.open(store):
        receipt = await desk.publish(Placed(1), key=1)
        await seen.wait_for(1)
        await worker.drain(0)
        async with anyio.create_task_group() as group:
            group.start_soon(receipt.handled)
            await until_waiting(desk)
            before = store.reads
            for n in range(100):
                await desk.publish(Paid(n))
            assert store.reads - before < 50
            group.cancel_scope.cancel()


async def test_handled_when_it_is_paused_here(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a lane of another instance is told at once of a pause from here, whatever the other writes."""
    desk, worker = EventBus(db, lease=LONG), Gated(db)
    async with worker.bus, desk:
        receipt = await desk.publish(Placed(1))
        await worker.begun.wait_for(1)
        told_nothing(monkeypatch, worker.bus, desk)
        async with anyio.create_task_group() as group:
            group.start_soon(expect_paused, receipt)
            await until_waiting(desk)
            await desk.pause("stock")
        worker.go_on.set()


async def test_handled_when_it_is_paused_here_for_all_lanes(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where this instance has lanes of the subscription, too."""
    first, second = shop_of(db), Gated(db)
    async with opened(first, second):
        await until([first, second], 1, 1)
        told_nothing(monkeypatch, first.bus, second.bus)
        (lane,) = second.lanes
        receipt = await first.bus.publish(Placed(1), key=key_in(lane, 2))
        await second.begun.wait_for(1)
        async with anyio.create_task_group() as group:
            group.start_soon(expect_paused, receipt)
            await until_waiting(first.bus)
            await first.bus.pause("stock")
        second.go_on.set()


async def test_handled_when_a_handler_here_pauses(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription that one of its own lanes pauses is paused for who waits for a lane of it elsewhere."""
    first, second = Shop(db), Gated(db)
    first.bus = EventBus(db, lease=LONG)

    @first.bus.subscribe(Placed, name="stock", order="key", concurrency=2, retry=RetryPolicy(attempts=1), on_exhausted="pause")
    async def fail(_placed: Placed) -> None:
        raise ValueError("no stock")

    async with opened(first, second):
        await until([first, second], 1, 1)
        told_nothing(monkeypatch, first.bus, second.bus)
        (here,), (there,) = first.lanes, second.lanes
        receipt = await first.bus.publish(Placed(1), key=key_in(there, 2))
        await second.begun.wait_for(1)
        async with anyio.create_task_group() as group:
            group.start_soon(expect_paused, receipt)
            await until_waiting(first.bus)
            await first.bus.publish(Placed(2), key=key_in(here, 2))
        second.go_on.set()


async def test_handled_after_a_pause_and_a_resume(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was paused and resumed from here is known to be so here at once."""
    desk, worker = EventBus(db, lease=LONG), Gated(db)
    async with worker.bus, desk:
        told_nothing(monkeypatch, worker.bus, desk)
        receipt = await desk.publish(Placed(1))
        await worker.begun.wait_for(1)
        for _ in range(3):
            await desk.pause("stock")
            await expect_paused(receipt)
            await desk.resume("stock")
            with pytest.raises(WaitTimeout):
                await receipt.handled(0)
        worker.go_on.set()
        await receipt.handled(10)


async def test_handled_when_it_is_unsubscribed_here(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription of another instance that is removed from here is not waited for any more."""
    desk, worker = EventBus(db, lease=LONG), Gated(db)
    async with worker.bus, desk:
        receipt = await desk.publish(Placed(1))
        await worker.begun.wait_for(1)
        told_nothing(monkeypatch, worker.bus, desk)
        async with anyio.create_task_group() as group:
            group.start_soon(receipt.handled, 10)
            await until_waiting(desk)
            await desk.unsubscribe("stock")
        worker.go_on.set()


@pytest.mark.usefixtures("no_second_look")
async def test_drain_while_another_is_busy(db: str) -> None:
    """`drain` asks for nothing while an attempt runs elsewhere, and ends with it."""
    store, first, second = Counting(db), shop_of(db), Gated(db)
    async with first.bus.open(store), second.bus:
        await until([first, second], 1, 1)
        await publish(first)
        await second.begun.wait_for(1)
        async with anyio.create_task_group() as group:

            async def drain() -> None:
                assert await first.bus.drain(10) == {}
                assert sorted(first.seen.seen + second.seen.seen) == list(range(16))

            group.start_soon(drain)
            await until_waiting(first.bus)
            before = store.reads
            await quiet_work(first)
            assert store.reads - before < 50
            second.go_on.set()


async def test_drain_of_a_type_that_another_has_just_published(db: str) -> None:
    """`drain` waits for the lane of a type of which nothing was known here."""
    bus, desk, seen = EventBus(db, lease=LONG), EventBus(db, lease=LONG), Recorder()

    @bus.subscribe("*", name="audit")
    async def audit(envelope: Envelope) -> None:
        seen.add(envelope.type)

    async with bus, desk:
        await bus.drain(10)
        await desk.publish(Paid(1))
        assert await bus.drain(10) == {}
        assert seen.seen == ["Paid"]


async def test_drain_waits_for_redrives_elsewhere(db: str) -> None:
    """A dead letter that is redriven in the lane of another instance is waited for."""
    shops = [Gated(db) for _ in range(2)]
    broken, order = True, list[str]()

    async def handle(placed: Placed) -> None:
        if broken:
            raise Reject("no stock")

    async def slow(placed: Placed) -> None:
        if broken:
            raise Reject("no stock")
        await shops[1].go_on.wait()

    for shop, handler in zip(shops, (handle, slow), strict=True):
        shop.bus = EventBus(db, lease=LONG)
        shop.bus.subscribe(Placed, name="stock", order="key", concurrency=2)(handler)
    async with opened(*shops):
        await until(shops, 1, 1)
        await publish(shops[0])
        assert await shops[0].bus.drain(10) == {}
        broken = False
        async with anyio.create_task_group() as group:

            async def drain() -> None:
                assert await shops[0].bus.drain(10) == {}
                order.append("drained")
                assert await shops[0].bus.dead_letters.list() == []

            assert await shops[0].bus.dead_letters.redrive(all=True) == 16
            group.start_soon(drain)
            while not running(shops[0]).elsewhere._waits and not order:
                await anyio.lowlevel.checkpoint()
            order.append("let go")
            shops[1].go_on.set()
    assert order == ["let go", "drained"]


async def test_drain_does_not_wait_for_what_is_parked_elsewhere(db: str) -> None:
    """Keys that are parked in the lanes of another instance, or here while others have lanes too, are left."""
    shops = [Shop(db, order="key", concurrency=2) for _ in range(2)]

    async def fail(_placed: Placed) -> None:
        raise Reject("no stock")

    for shop in shops:
        shop.bus = EventBus(db)
        shop.bus.subscribe(Placed, name="stock", order="key", concurrency=2, on_exhausted="park")(fail)
    async with opened(*shops):
        await until(shops, 1, 1)
        await publish(shops[0])
        await publish(shops[0])
        with anyio.fail_after(10):
            for shop in shops:
                assert await shop.bus.drain() == {"stock": 16}
