"""The steps of an instance among others: what fails in them stops nothing else, and who waits for lanes waits, and is told."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import anyio
import anyio.lowlevel
import pytest

from eventbus import BusNotOpen, Draft, Envelope, EventBus, LaneLost, Reject, RetryAfter, RetryPolicy
from eventbus.stores.base import Batch, Beat, Claim, Committed, Query, Release, WaitingRows
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.shops import (
    LONG,
    Counting,
    Gated,
    Held,
    Lapsing,
    Paid,
    Placed,
    Refusing,
    Shop,
    key_in,
    opened,
    publish,
    quiet_work,
    running,
    shop_of,
    stay,
    until,
)
from tests.bus.support import Recorder

T = TypeVar("T")


# ------------------------------------------------------------------ steps


async def test_one_that_leaves_gives_its_lanes_back_at_once(db: str) -> None:
    """While its last handlers run, others have those of its lanes in which nothing runs; each of the rest when its handler ends."""
    first, second, leave = Held(db, 6, count=2), Shop(db, order="key", concurrency=6, lease=LONG), anyio.Event()
    async with second.bus, anyio.create_task_group() as group:
        await group.start(stay, first.bus, leave)
        await until([first, second], 3, 3)
        *busy, free = sorted(first.lanes)
        for n, lane in enumerate(busy):
            await second.bus.publish(Placed(n), key=key_in(lane, 6))
        await first.begun.wait_for(2)
        leave.set()
        await until([second], 4)
        await second.bus.publish(Placed(2), key=key_in(free, 6))
        assert await second.seen.wait_for(1) == [2]
        for count, gate in enumerate(first.gates, start=5):
            gate.set()
            await until([second], count)
        assert await second.bus.drain(10) == {}
    assert sorted(first.seen.seen) == [0, 1]
    assert second.seen.seen == [2]


async def test_no_order_changes_under_the_last_handler_of_one_that_leaves(db: str) -> None:
    """It gives back its lanes, but another order has to wait until it is gone, also when nobody else has the old one any more."""
    old, heir, new = Held(db, 2, count=1), shop_of(db), Shop(db, order="key", concurrency=3, lease=LONG)
    leave, heir_leaves = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        await group.start(stay, old.bus, leave)
        async with new.bus:
            async with anyio.create_task_group() as heirs:
                await heirs.start(stay, heir.bus, heir_leaves)
                await until([old, heir, new], 1, 1, 0)
                (lane,) = old.lanes
                await new.bus.publish(Placed(0), key=key_in(lane, 2))
                await old.begun.wait_for(1)
                leave.set()
                with anyio.fail_after(10):
                    while not any(member.serves["stock"].cannot for member in running(heir).membership.standing.members):
                        await running(heir).membership.next_step()
                heir_leaves.set()
            for _ in range(3):
                running(new).membership.poke()
                await running(new).membership.next_step()
            assert new.lanes == set()
            old.gates[0].set()
            await until([new], 3)
            assert await new.bus.drain(10) == {}
    assert old.seen.seen == [0]
    assert new.seen.seen == []


async def test_what_the_store_refuses_stops_nothing_else(db: str) -> None:
    """A new order that cannot be stored, for keys are parked, is reported; the other subscriptions run, and the lease is renewed."""
    old, new, seen = EventBus(db), EventBus(db), Recorder()

    async def fail(_placed: Placed) -> None:
        raise Reject("no stock")

    for bus, concurrency in ((old, 4), (new, 2)):
        bus.subscribe(Placed, name="stock", order="key", concurrency=concurrency, on_exhausted="park")(fail)
        bus.subscribe(Paid, name="paid")(seen.note)
    leave = anyio.Event()
    async with anyio.create_task_group() as group, AsyncExitStack() as stack:
        await group.start(stay, old, leave)
        await old.publish(Placed(1), key=1)
        await old.drain(10)
        await stack.enter_async_context(new)
        leave.set()
        await new.publish(Paid(1))
        assert await seen.wait_for(1) == [Paid(1)]
        (info,) = [info for info in await new.subscriptions() if info.name == "stock"]
        assert info.state == "blocked"
        assert "keys are parked" in (info.reason or "")
        assert new._running is not None
        before = new._running.environment.deadline
        new._running.membership.poke()
        with anyio.fail_after(10):
            while new._running.environment.deadline == before:
                await anyio.lowlevel.checkpoint()


async def test_a_part_of_a_step_that_fails(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """An instance that cannot give lanes back takes all the same those that are free; and gives them back when it can."""
    first, second, third = Shop(db, order="key", concurrency=4), Shop(db, order="key", concurrency=4), EventBus(db)
    seen = Recorder()
    for bus in (first.bus, third):
        bus.subscribe(Paid, name="paid")(seen.note)
    store, leave = Refusing(db), anyio.Event()
    async with anyio.create_task_group() as group, AsyncExitStack() as stack:
        await group.start(stay, third, leave)
        await stack.enter_async_context(first.bus.open(store))
        await until([first], 4)
        store.refused = Release
        await stack.enter_async_context(second.bus)
        with anyio.fail_after(10):
            while "could not do all of its part" not in caplog.text:
                await running(first).membership.next_step()
        leave.set()
        await second.bus.publish(Paid(1))
        assert await seen.wait_for(1) == [Paid(1)]
        store.refused = ()
        await until([first, second], 2, 2)


async def test_who_waits_for_a_step_that_fails(db: str) -> None:
    """A step is over for those who wait for it, also if it failed."""
    shop, store = shop_of(db), Refusing(db)
    async with shop.bus.open(store):
        store.refused = Beat
        running(shop).membership.poke()
        with anyio.fail_after(10):
            await running(shop).membership.next_step()
        store.refused = ()


class Slow(Lapsing):
    """A store in which time goes by while a renewal waits for its turn."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.ahead = LONG
        self.begin = super().monotonic() - 100.0
        self.stopped_at = self.begin
        self.arrived = Recorder()
        self.gate: threading.Event | None = None

    def commit(self, batch: Batch) -> Committed:
        if self.gate is not None and any(isinstance(command, Beat) for command in batch.commands):
            self.stopped_at = self.begin + 11.0
            self.arrived.add(batch)
            self.gate.wait(10)
        return super().commit(batch)


async def test_a_lease_that_lapses_while_its_renewal_waits(db: str) -> None:
    """Lanes that have found it lapsed meanwhile go on when it is renewed."""
    shop, store = Shop(db, lease=10.0), Slow(db)
    async with shop.bus.open(store):
        of = running(shop)
        (serving,) = of.dispatcher.servings.values()
        (lane,) = of.dispatcher.lanes()
        serving.hold_back(object())  # so that an event is there, and waits
        await shop.bus.publish(Placed(1))
        store.stopped_at, store.gate = store.begin + 6.0, threading.Event()
        of.membership.poke()
        await store.arrived.wait_for(1)
        serving.hold_back(None)
        while lane.scheduled:
            await anyio.lowlevel.checkpoint()
        assert shop.seen.seen == []
        store.gate.set()
        assert await shop.seen.wait_for(1) == [1]


async def test_a_short_lease_of_one_that_is_alone(db: str) -> None:
    """Who is alone looks around seldom, but never so seldom that its lease would end before it is renewed."""
    for lease in (0.1, LONG):
        shop = Shop(db, lease=lease)
        async with shop.bus:
            assert running(shop).membership.is_alone()
            assert running(shop).journal.notice_every <= lease / 3


# ------------------------------------------------------------------ claims


async def test_a_lane_that_is_asked_for_comes_with_its_suspicion(db: str) -> None:
    """A lane whose owner has died is on probation, also if it is claimed because an event of its type has come."""
    bus, on_probation = EventBus(db), Recorder()

    @bus.subscribe("*", name="audit")
    async def audit(_envelope: Envelope) -> None:
        assert bus._running is not None
        (lane,) = bus._running.dispatcher.lanes()
        on_probation.add(lane.probation is not None)

    async with bus:
        await bus.publish(Paid(1))
        assert await on_probation.wait_for(1) == [False]
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as file:
        file.execute("UPDATE lanes SET deaths = 1")
        file.execute("DELETE FROM events")  # so that it is not known at the start that there is such a type
    async with bus:
        await bus.publish(Paid(2))
        assert await on_probation.wait_for(2) == [False, True]


class Between(SQLiteStore):
    """A store that has something done between its first claim of lanes and the look at what waits in them."""

    def __init__(self, path: str, then: Callable[[], object]) -> None:
        super().__init__(path)
        self._then: Callable[[], object] | None = then
        self._claimed = False

    def commit(self, batch: Batch) -> Committed:
        self._claimed = self._claimed or any(isinstance(command, Claim) for command in batch.commands)
        return super().commit(batch)

    def read(self, query: Query[T]) -> T:
        then = self._then
        if self._claimed and then is not None and isinstance(query, WaitingRows):
            self._then = None
            then()
        return super().read(query)


async def test_a_rewind_while_lanes_are_claimed(db: str) -> None:
    """A key that waits for a retry stays in order when its lane is rewound by another while it is being claimed."""
    bus, tried = EventBus(db), Recorder()

    @bus.subscribe(Placed, name="stock", order="key", concurrency=1, retry=RetryPolicy(first=3600, cap=3600), breaker=None)
    async def fail(placed: Placed) -> None:
        tried.add(placed.n)
        raise ValueError

    async with bus:
        await bus.publish_many([Draft(Placed(1), key="k"), Draft(Placed(2), key="k")])
        await tried.wait_for(1)

    async def rewind() -> None:
        async with EventBus(db) as desk:
            await desk.rewind("stock")
            await desk.publish(Placed(3), key="k")

    shop = Shop(db, order="key", concurrency=1)
    async with shop.bus.open(Between(db, lambda: anyio.run(rewind))):
        assert await shop.seen.wait_for(3) == [1, 2, 3]


async def test_redrives_that_wait_in_a_lane_that_goes(db: str) -> None:
    """What waits for another attempt in a lane is the next owner's, and counts no more with the one before."""
    first, second = shop_of(db), shop_of(db)
    tried = Recorder()

    async def fail(placed: Placed) -> None:
        tried.add(placed.n)
        if len(tried.seen) <= 16:
            raise Reject("no stock")
        raise RetryAfter(3600)

    for shop in (first, second):
        shop.bus = EventBus(db, lease=LONG)
        shop.bus.subscribe(Placed, name="stock", order="key", concurrency=2)(fail)

    def known(shop: Shop) -> int:
        return running(shop).dispatcher.servings["stock"].redriver.known

    async with first.bus:
        await publish(first)
        await first.bus.drain(10)
        await first.bus.dead_letters.redrive(all=True)
        await tried.wait_for(32)
        async with second.bus:
            await until([first, second], 1, 1)
            with anyio.fail_after(10):
                while known(first) + known(second) != 16 or not known(second):
                    await anyio.lowlevel.checkpoint()


# ------------------------------------------------------------------ replays among others


async def test_a_replay_when_another_has_just_left(db: str) -> None:
    """A replay has every event of its range, also where the lanes of one that has left are not all here yet."""
    first, second = Shop(db, order="key"), Shop(db, order="key")
    async with first.bus:
        async with second.bus:
            await until([first, second], 8, 8)
            await publish(first, 20)
            assert await first.bus.drain(10) == {}
            first.seen.seen.clear()
        while not running(first).membership.is_alone():
            await anyio.lowlevel.checkpoint()
        summary = await first.bus.replay(to="stock")
        assert (summary.events, summary.handled) == (20, 20)
        assert sorted(first.seen.seen) == list(range(20))


async def test_a_replay_to_a_lane_that_is_not_here(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that comes to an event whose lane is gone says so, instead of passing the event by."""
    shop = Shop(db)
    async with shop.bus:
        await publish(shop, 3)
        assert await shop.bus.drain(10) == {}
        membership = running(shop).membership
        hold = membership.hold

        async def hold_and_lose(*args: object) -> None:
            await hold(*args)  # type: ignore[arg-type]
            for lane in running(shop).dispatcher.lanes():
                membership.lose(lane)

        monkeypatch.setattr(membership, "hold", hold_and_lose)
        with pytest.raises(LaneLost) as caught:
            await shop.bus.replay()
        assert caught.value.position == 0


async def test_a_replay_to_what_this_program_cannot_run(db: str) -> None:
    """One that gets no lane of a subscription, for it does not declare all its types, says so, and does not wait for ever."""
    more, fewer = Shop(db, Placed, Paid, order="log", lease=LONG), Shop(db, Placed, order="log", lease=LONG)
    async with more.bus, fewer.bus:
        await publish(more, 3)
        with anyio.fail_after(10), pytest.raises(LaneLost):
            await fewer.bus.replay()


async def test_a_dry_run_counts_what_others_would_handle(db: str) -> None:
    """It counts all events of the range, whoever has their lanes."""
    shops = [Shop(db, order="key", concurrency=4) for _ in range(2)]
    async with opened(*shops):
        await until(shops, 2, 2)
        await publish(shops[0], 20)
        assert (await shops[0].bus.replay(to="stock", dry_run=True)).events == 20


@pytest.mark.usefixtures("no_second_look")
async def test_a_replay_that_waits_for_lanes(db: str) -> None:
    """It asks for nothing while another instance finishes what runs in them, and begins as soon as it has them."""
    store, first, second = Counting(db), shop_of(db), Gated(db)
    async with first.bus.open(store), second.bus:
        await until([first, second], 1, 1)
        await publish(first)
        await second.begun.wait_for(1)
        async with anyio.create_task_group() as group:

            async def replay() -> None:
                summary = await first.bus.replay()
                assert (summary.events, summary.handled) == (16, 16)

            group.start_soon(replay)
            with anyio.fail_after(10):
                while not all(lane.retiring for lane in running(second).dispatcher.lanes()):
                    await anyio.lowlevel.checkpoint()
            before = store.reads
            await quiet_work(first)
            assert store.reads - before < 20
            second.go_on.set()


@pytest.mark.usefixtures("no_second_look")
async def test_a_replay_that_waits_when_the_bus_closes(db: str) -> None:
    """It is told, and says so."""
    first, second = shop_of(db), Gated(db)
    async with second.bus.open(stop_timeout=0):
        async with anyio.create_task_group() as group:

            async def replay() -> None:
                with pytest.raises(BusNotOpen):
                    await first.bus.replay()

            async with first.bus:
                await until([first, second], 1, 1)
                await publish(first)
                await second.begun.wait_for(1)
                group.start_soon(replay)
                with anyio.fail_after(10):
                    while not all(lane.retiring for lane in running(second).dispatcher.lanes()):
                        await anyio.lowlevel.checkpoint()


@pytest.mark.usefixtures("no_second_look")
async def test_replays_of_two_instances(db: str) -> None:
    """The second one waits for its turn, and holds nothing up by holding everything else back meanwhile; each is complete."""
    first, second = shop_of(db), Gated(db)
    async with first.bus, second.bus:
        await until([first, second], 1, 1)
        await publish(first)
        await second.begun.wait_for(1)

        async def replay(shop: Shop) -> None:
            with anyio.fail_after(10):
                assert (await shop.bus.replay(exclusive=True)).handled == 16

        async with anyio.create_task_group() as group:
            group.start_soon(replay, first)
            while not all(lane.retiring for lane in running(second).dispatcher.lanes()):
                await anyio.lowlevel.checkpoint()
            group.start_soon(replay, second)
            while running(second).dispatcher.servings["stock"].exclusive is None:
                await anyio.lowlevel.checkpoint()
            await quiet_work(first)
            second.go_on.set()


async def test_two_replays_that_want_the_same_two_subscriptions(db: str) -> None:
    """Two instances that have one lane each and want both do not wait for each other."""
    buses = [EventBus(db, lease=LONG) for _ in range(2)]
    for bus in buses:
        for name in "ab":
            bus.subscribe(Placed, name=name, order="log")(Recorder().note)
    async with buses[0], buses[1]:
        with anyio.fail_after(10):
            while not all(bus._running and len(bus._running.dispatcher.lanes()) == 1 for bus in buses):
                await anyio.lowlevel.checkpoint()
            await buses[0].publish(Placed(1))

            async def replay(bus: EventBus) -> None:
                assert (await bus.replay()).handled == 2

            async with anyio.create_task_group() as group:
                for bus in buses:
                    group.start_soon(replay, bus)


@pytest.mark.usefixtures("no_second_look")
async def test_a_replay_is_not_interrupted_by_another(db: str) -> None:
    """Who has all lanes for a replay keeps them until it is over, whoever else wants them."""
    first, second = shop_of(db), Gated(db, replays=True)
    async with first.bus, second.bus:
        await publish(first)
        for shop in (first, second):
            assert await shop.bus.drain(10) == {}
        second.begun.seen.clear()

        async def replay(shop: Shop) -> None:
            with anyio.fail_after(10):
                assert (await shop.bus.replay()).handled == 16

        async with anyio.create_task_group() as group:
            group.start_soon(replay, second)
            await second.begun.wait_for(1)
            group.start_soon(replay, first)
            while not any("stock" in member.holds for member in running(second).membership.standing.members[:1]):
                await anyio.lowlevel.checkpoint()
            second.go_on.set()
