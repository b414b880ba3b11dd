"""Several buses on one file: they share the lanes out, each event is settled once, and whoever goes leaves nothing undone.

Here they live in one process, which is the same to them; `tests/crash` does it with processes that are killed and stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import (
    Delivery,
    DeliveryStatus,
    Draft,
    EventBus,
    HandlingFailed,
    LaneLost,
    Receipt,
    Reject,
    RetryPolicy,
    _membership,
    event,
)
from eventbus._membership import NOBODY
from eventbus._sharing import share
from eventbus.stores.base import Batch, Beat, Claim, Committed, Events, Lanes, Query, Record
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.shops import Lapsing, Paid, Placed, Shop, opened, running, until
from tests.bus.support import Recorder


@event("shop.paid")
@attrs.frozen
class ShopPaid:
    n: int


@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_each_event_is_settled_once(db: str, order: str) -> None:
    """Whoever publishes it, an event is handled by one of them, once."""
    shops = [Shop(db, order=order) for _ in range(3)]
    async with opened(*shops):
        for n in range(60):
            await shops[n % 3].bus.publish(Placed(n), key=n % 7)
        for shop in shops:
            assert await shop.bus.drain(10) == {}
        assert sorted(n for shop in shops for n in shop.seen.seen) == list(range(60))


async def test_a_key_stays_in_order(db: str) -> None:
    """Events of a key are handled in order while instances come and go."""
    handled: list[tuple[int, int]] = []

    class Keyed(Shop):
        async def handle(self, event: Placed | Paid) -> None:
            handled.append((event.n % 5, event.n))

    shops = [Keyed(db, order="key", concurrency=8) for _ in range(3)]
    async with shops[0].bus:
        for n in range(50):
            await shops[0].bus.publish(Placed(n), key=n % 5)
        async with shops[1].bus:
            for n in range(50, 100):
                await shops[n % 2].bus.publish(Placed(n), key=n % 5)
            async with shops[2].bus:
                for n in range(100, 150):
                    await shops[n % 3].bus.publish(Placed(n), key=n % 5)
        assert await shops[0].bus.drain(10) == {}
    assert sorted(n for _, n in handled) == list(range(150))
    for key in range(5):
        assert [n for k, n in handled if k == key] == list(range(key, 150, 5))


async def test_lanes_are_shared_out(db: str) -> None:
    """One that joins gets its share, one that leaves gives it back; all of them together have every lane once."""
    shops = [Shop(db, order="key", concurrency=12) for _ in range(3)]
    async with shops[0].bus:
        await until(shops[:1], 12)
        async with shops[1].bus:
            await until(shops[:2], 6, 6)
            async with shops[2].bus:
                await until(shops, 4, 4, 4)
                assert sorted(lane for shop in shops for lane in shop.lanes) == sorted(map(str, range(12)))
            await until(shops[:2], 6, 6)
        await until(shops[:1], 12)


async def test_lanes_are_shared_out_anew_only_when_something_has_changed(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each renewal of a lease looks how all stand; with thousands of lanes to compute who should have which takes long."""
    shared = Recorder()

    def share_and_tell(*args: Any) -> Any:
        shared.add(args)
        return share(*args)

    monkeypatch.setattr(_membership, "share", share_and_tell)
    shop = Shop(db, order="key", concurrency=4)
    async with shop.bus:
        await until([shop], 4)
        membership = running(shop).membership
        with anyio.fail_after(10):
            seen = 0
            while len(shared.seen) > seen:  # until it has seen what it did itself when it was opened
                seen = len(shared.seen)
                membership.poke()
                await membership.next_step()
        other = Shop(db, order="key", concurrency=4)
        async with other.bus:
            await until([shop, other], 2, 2)
            await shop.bus.publish(Placed(1), key="a")
            await other.bus.publish(Paid(2), key="b")
            assert await shop.bus.drain(10) == {}
        await until([shop], 4)


async def test_a_type_that_another_publishes_has_a_lane(db: str) -> None:
    """Nothing but the log has changed: who subscribes to all types is to know of a lane more."""
    shop, publisher = Shop(db), EventBus(db)
    shop.bus.subscribe("shop.*", name="all")(Recorder().note)
    async with shop.bus, publisher.open(dispatch=False):
        membership = running(shop).membership
        assert "shop.paid" not in membership._wanted["all"]
        await publisher.publish(ShopPaid(1))
        with anyio.fail_after(10):
            while "shop.paid" not in membership._wanted["all"]:
                membership.poke()
                await membership.next_step()


async def test_what_others_publish_is_read_once_for_all_lanes(db: str) -> None:
    """However many subscriptions there are, a commit of another instance is one question to the store; each gets its own of it."""
    pages = Recorder()

    class Noting(SQLiteStore):
        def read(self, query: Query[Any]) -> Any:
            if isinstance(query, Events):
                pages.add(query)
            return super().read(query)

    bus, publisher = EventBus(Noting(db)), EventBus(db)
    placed, paid, both = Recorder(), Recorder(), Recorder()
    for number in range(10):
        bus.subscribe(Placed, name=f"placed-{number}")(placed.note)
        bus.subscribe(Paid, name=f"paid-{number}")(paid.note)
    bus.subscribe(Placed, Paid, name="both", order="log")(both.note)
    async with bus, publisher.open(dispatch=False):
        before = len(pages.seen)
        events = [Placed(1), Paid(2), Placed(3)]
        await publisher.publish_many(events)
        await both.wait_for(3)
        assert both.seen == events
        assert sorted(e.n for e in await placed.wait_for(20)) == [1] * 10 + [3] * 10
        assert [e.n for e in await paid.wait_for(10)] == [2] * 10
        assert len(pages.seen) - before < 5


async def test_subscriptions_of_one_lane_are_shared_out(db: str) -> None:
    """Several subscriptions of one lane each do not all stay where they were first."""
    buses = [EventBus(db) for _ in range(2)]
    for bus in buses:
        for number in range(4):
            bus.subscribe(Placed, name=f"s{number}", order="log")(Recorder().note)
    async with buses[0], buses[1]:
        with anyio.fail_after(10):
            while [len(bus._running.dispatcher.lanes()) for bus in buses if bus._running] != [2, 2]:
                assert buses[0]._running is not None
                await buses[0]._running.membership.next_step()


async def test_a_running_attempt_ends_before_its_lane_goes(db: str) -> None:
    """A lane goes to one that joins only when what runs in it has ended: no event runs twice at once, none out of order."""
    begun, go_on = anyio.Event(), anyio.Event()
    first, second = EventBus(db), EventBus(db)
    other = Recorder()

    @first.subscribe(Placed, name="a", order="log")
    async def slow(_placed: Placed) -> None:
        begun.set()
        await go_on.wait()

    first.subscribe(Placed, name="b", order="log")(Recorder().note)
    second.subscribe(Placed, name="a", order="log")(other.note)
    second.subscribe(Placed, name="b", order="log")(other.note)
    async with first:
        for n in range(3):
            await first.publish(Placed(n))
        await begun.wait()
        async with second:
            assert second._running is not None
            for _ in range(3):
                second._running.membership.poke()
                await second._running.membership.next_step()
            go_on.set()
            assert await second.drain(10) == {}


async def test_handled_covers_what_others_run(db: str) -> None:
    """`receipt.handled` and `drain` wait for lanes that another instance has."""
    publisher, worker = EventBus(db), Shop(db)
    gate = anyio.Event()

    async def slow(event: Placed | Paid) -> None:
        await gate.wait()
        worker.seen.add(event.n)

    worker.bus = EventBus(db)
    worker.bus.subscribe(Placed, name="stock")(slow)
    async with worker.bus, publisher:
        receipt = await publisher.publish(Placed(1))
        async with anyio.create_task_group() as group:
            group.start_soon(receipt.handled, 10)
            while not publisher._running.elsewhere._waits:  # type: ignore[union-attr]
                await anyio.lowlevel.checkpoint()
            assert worker.seen.seen == []
            gate.set()
        assert worker.seen.seen == [1]
        assert (await publisher.status(receipt.id))["stock"] == DeliveryStatus.HANDLED


async def test_handled_where_nobody_has_a_handler(db: str) -> None:
    """A subscription that no instance serves makes `handled` raise at once, also when another instance is there."""
    async with Shop(db).bus:
        pass
    idle, publisher = EventBus(db), EventBus(db)
    async with idle, publisher:
        receipt = await publisher.publish(Placed(1))
        with pytest.raises(HandlingFailed) as caught:
            await receipt.handled(10)
        assert caught.value.blocked == {"stock": "no handler"}


async def test_dead_letters_of_others(db: str) -> None:
    """A dead letter that another instance made is told by `handled`, and a redrive from here runs there."""
    publisher, worker = EventBus(db), EventBus(db)
    seen, broken = Recorder(), True

    @worker.subscribe(Placed, name="stock")
    async def handler(placed: Placed) -> None:
        if broken:
            raise Reject("no stock")
        seen.add(placed.n)

    async with worker, publisher:
        receipt = await publisher.publish(Placed(1))
        with pytest.raises(HandlingFailed, match="no stock"):
            await receipt.handled(10)
        broken = False
        assert await publisher.dead_letters.redrive(subscription="stock") == 1
        assert await seen.wait_for(1) == [1]


async def test_pause_and_resume_from_another(db: str) -> None:
    """A pause holds in every instance, and so does a resume."""
    shop, desk = Shop(db), EventBus(db)
    async with shop.bus, desk:
        await desk.pause("stock")
        with anyio.fail_after(10):
            while running(shop).dispatcher.servings["stock"].paused is None:
                await running(shop).membership.next_step()
        receipt = await desk.publish(Placed(1))
        with pytest.raises(HandlingFailed, match="paused"):
            await receipt.handled(10)
        assert shop.seen.seen == []
        await desk.resume("stock")
        assert await shop.seen.wait_for(1) == [1]


async def test_rewind_from_another(db: str) -> None:
    """A rewind by one instance has the lanes of another begin again."""
    shop, desk = Shop(db), EventBus(db)
    async with shop.bus, desk:
        for n in range(3):
            await desk.publish(Placed(n))
        await shop.seen.wait_for(3)
        assert await shop.bus.drain(10) == {}
        await desk.rewind("stock")
        assert await shop.seen.wait_for(6) == [0, 1, 2, 0, 1, 2]


async def test_unsubscribe_from_another(db: str) -> None:
    """A subscription that another instance removes is delivered to no more."""
    shop, desk = Shop(db), EventBus(db)
    async with shop.bus, desk:
        await desk.unsubscribe("stock")
        with anyio.fail_after(10):
            while running(shop).dispatcher.servings:
                await running(shop).membership.next_step()
        await (await desk.publish(Placed(1))).handled(10)
        assert shop.seen.seen == []


async def test_scheduled_events_outlive_who_published_them(db: str) -> None:
    """An event with `due` is delivered by who is there when its time comes."""
    shop, desk = Shop(db), EventBus(db)
    async with shop.bus:
        async with desk:
            await desk.publish(Placed(1), due=timedelta(milliseconds=50))
        assert await shop.seen.wait_for(1) == [1]


async def test_a_new_type_from_another(db: str) -> None:
    """A type that only another instance publishes reaches a subscription by pattern."""
    seen, worker, desk = Recorder(), EventBus(db), EventBus(db)

    @worker.subscribe("*", name="audit")
    async def audit(envelope: Any) -> None:
        seen.add(envelope.type)

    async with worker, desk:
        await desk.publish(Placed(1))
        await desk.publish(Paid(2))
        assert sorted(await seen.wait_for(2)) == ["Paid", "Placed"]


async def test_lanes_go_to_those_that_know_the_type(db: str) -> None:
    """A program that does not declare a type, as one of an older deployment, does not get its lane, nor passes its events by."""
    for order in ("type", "key"):
        old, new = Shop(f"{db}-{order}", Placed, order=order), Shop(f"{db}-{order}", Placed, Paid, order=order)
        async with old.bus, new.bus:
            for n in range(10):
                await old.bus.publish(Placed(n), key=n)
                await new.bus.publish(Paid(100 + n), key=n)
            assert await new.bus.drain(10) == {}
            assert {n for n in new.seen.seen if n >= 100} == set(range(100, 110))
            assert not {n for n in old.seen.seen if n >= 100}
            # One that was under way when the lanes were fenced may come twice.
            assert set(old.seen.seen + new.seen.seen) == {*range(10), *range(100, 110)}


@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_instances_that_declare_different_types(db: str, order: str) -> None:
    """Where one program declares more types for a subscription than another, both agree on who has which lane, and all is handled."""
    more, fewer = Shop(db, Placed, Paid, order=order), Shop(db, Paid, order=order)
    async with more.bus:
        await more.bus.publish(Placed(0))
        await more.bus.publish(Paid(1))
        assert await more.bus.drain(10) == {}
        async with fewer.bus:
            for n in range(2, 20, 2):
                await fewer.bus.publish(Placed(n), key=n)
                await more.bus.publish(Paid(n + 1), key=n)
            with anyio.fail_after(10):
                while {*more.seen.seen, *fewer.seen.seen} != set(range(20)):
                    await anyio.lowlevel.checkpoint()
            assert not more.lanes & fewer.lanes
            assert not any(n % 2 == 0 for n in fewer.seen.seen)
            for shop in (more, fewer):
                running(shop).membership.poke()
                await running(shop).membership.next_step()
            assert running(more).membership._shares == running(fewer).membership._shares


async def test_what_one_cannot_decode_another_does(db: str) -> None:
    """A lane with an event of a version that one program does not know goes to one that does."""

    @event("shop.placed", version=1)
    @attrs.frozen
    class Old:
        n: int

    @event("shop.placed", version=2)
    @attrs.frozen
    class New:
        n: int

    seen: Recorder = Recorder()
    old, new = EventBus(db), EventBus(db)
    old.subscribe(Old, name="stock")(seen.note)

    @new.subscribe(New, name="stock")
    async def handler(placed: New) -> None:
        seen.add(placed)

    async with old:
        async with new.open(dispatch=False):
            await new.publish(New(1))
        with anyio.fail_after(10):
            while not any(lane.blocked for lane in old._running.dispatcher.lanes()):  # type: ignore[union-attr]
                await anyio.lowlevel.checkpoint()
        async with new:
            assert await seen.wait_for(1) == [New(1)]
            assert await new.drain(10) == {}


async def test_another_order_waits_for_those_with_the_old_one(db: str) -> None:
    """In a rolling deployment, the new order waits until the last instance with the old one has gone; nothing is handled twice."""
    old, new = Shop(db, order="type"), Shop(db, order="key", concurrency=4)
    async with new.bus:
        pass
    async with old.bus:
        async with new.bus:
            for n in range(10):
                await new.bus.publish(Placed(n), key=n)
            assert await new.bus.drain(10) == {}
            assert (old.seen.seen, new.seen.seen) == (list(range(10)), [])
            (info,) = await new.bus.subscriptions()
            assert info.state == "blocked"
            assert "order='type'" in (info.reason or "")
    async with old.bus, new.bus:
        await old.bus.publish(Placed(10))
        assert await old.bus.drain(10) == {}
    async with new.bus:
        await new.bus.publish(Placed(11), key=1)
        assert await new.bus.drain(10) == {}
        await until([new], 4)
    assert (sorted(old.seen.seen), new.seen.seen) == (list(range(11)), [11])


async def test_replay_has_the_lanes_whole(db: str) -> None:
    """A replay runs in the instance that asked for it, in all lanes, which are shared out again afterwards."""
    shops = [Shop(db, order="key", concurrency=4) for _ in range(2)]
    async with opened(*shops):
        await until(shops, 2, 2)
        for n in range(20):
            await shops[0].bus.publish(Placed(n), key=n)
        for shop in shops:
            assert await shop.bus.drain(10) == {}
            shop.seen.seen.clear()
        summary = await shops[0].bus.replay(to="stock")
        assert (summary.events, summary.handled) == (20, 20)
        assert (sorted(shops[0].seen.seen), shops[1].seen.seen) == (list(range(20)), [])
        await until(shops, 2, 2)


async def test_a_lease_that_has_ended(db: str) -> None:
    """An instance that does not renew its lease loses its lanes; what it writes afterwards is refused, and the event comes to another
    instance. When it is back, it takes part again."""
    begun, go_on = anyio.Event(), anyio.Event()
    handled: list[str] = []
    hung, other = EventBus(db), EventBus(db)

    @hung.subscribe(Placed, name="stock", retry=RetryPolicy(attempts=1))
    async def slow(_placed: Placed, delivery: Delivery) -> Paid:
        begun.set()
        await go_on.wait()
        handled.append("hung")
        return Paid(1)

    @other.subscribe(Placed, name="stock", retry=RetryPolicy(attempts=1))
    async def quick(_placed: Placed) -> Paid:
        handled.append("other")
        return Paid(2)

    store, ahead = Lapsing(db), Lapsing(db)
    async with hung.open(store):
        await hung.publish(Placed(1))
        await begun.wait()
        store.stopped_at = store.monotonic()  # it renews nothing, and does not notice that time goes by
        ahead.ahead = 60.0
        async with other.open(ahead):
            assert ahead._lock is not None
            with anyio.fail_after(10):
                while handled != ["other"]:
                    await anyio.lowlevel.checkpoint()
            assert await other.drain(10) == {}
            go_on.set()
            assert await other.drain(10) == {}
        store.stopped_at = None
        hung._running.membership.poke()  # type: ignore[union-attr]
        await hung._running.membership.next_step()  # type: ignore[union-attr]
        assert await hung.drain(10) == {}
        paid = [envelope.event async for envelope in hung.history(Paid)]
    assert paid == [Paid(2)]
    assert handled == ["other", "hung"]


async def test_who_has_lost_its_lease_starts_nothing(db: str) -> None:
    """From the end of its lease on, an instance starts no further event, until it has renewed it."""
    shop = Shop(db)
    store = Lapsing(db)
    async with shop.bus.open(store):
        await shop.bus.publish(Placed(1))
        assert await shop.bus.drain(10) == {}
        environment = running(shop).environment
        environment.deadline = store.monotonic()
        await shop.bus.publish(Placed(2))
        assert shop.seen.seen == [1]
        running(shop).membership.poke()
        assert await shop.seen.wait_for(2) == [1, 2]


async def test_a_replay_that_loses_a_lane(db: str) -> None:
    """A replay whose lane goes to another instance says so, and from where to go on."""
    begun = anyio.Event()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="stock")
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        if delivery.replaying:
            begun.set()
            await anyio.sleep_forever()

    async with bus.open(stop_timeout=0):
        await bus.publish(Placed(1))
        assert await bus.drain(10) == {}
        async with anyio.create_task_group() as group:

            async def replay() -> None:
                with pytest.raises(LaneLost) as caught:
                    await bus.replay()
                assert caught.value.position == 0

            group.start_soon(replay)
            await begun.wait()
            assert bus._running is not None
            (lane,) = bus._running.dispatcher.lanes()
            bus._running.membership.lose(lane)


async def test_who_leaves_and_comes_back(db: str) -> None:
    """Leaving gives the lanes back at once: the next one to open has them."""
    first, second = Shop(db, order="key", concurrency=4), Shop(db, order="key", concurrency=4)
    async with first.bus:
        assert len(first.lanes) == 4
    async with second.bus:
        assert len(second.lanes) == 4
    async with first.bus:
        states = await running(first).reader.ask(Lanes("stock"))
        assert {state.epoch % 2**32 for state in states} == {3}


async def test_drafts_from_both(db: str) -> None:
    """An idempotency key counts for all instances."""
    first, second = EventBus(db), EventBus(db)
    async with first, second:
        one = await first.publish(Placed(1), idempotency_key="k")
        (two,) = await second.publish_many([Draft(Placed(1), idempotency_key="k")])
        assert (two.id, two.duplicate) == (one.id, True)


class Interrupted(SQLiteStore):
    """A store that has something done before it claims lanes for the first time."""

    def __init__(self, path: str, before_claim: Callable[[], object]) -> None:
        super().__init__(path)
        self._before_claim: Callable[[], object] | None = before_claim

    def commit(self, batch: Batch) -> Committed:
        before = self._before_claim
        if before is not None and any(isinstance(command, Claim) for command in batch.commands):
            self._before_claim = None
            before()
        return super().commit(batch)


@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_what_is_published_while_lanes_are_claimed(db: str, order: str) -> None:
    """An event that another instance publishes between this one's look at the log and its claim is handled."""

    async def publish() -> None:
        async with EventBus(db) as desk:
            await desk.publish(Placed(1))

    shop = Shop(db, order=order)
    async with shop.bus.open(Interrupted(db, lambda: anyio.run(publish))):
        await shop.bus.publish(Placed(2))
        seen = await shop.seen.wait_for(2)
        assert (seen if order in {"type", "log"} else sorted(seen)) == [1, 2]


async def test_instances_that_serve_different_subscriptions(db: str) -> None:
    """All agree on whose a lane is, also those that do not serve what the others have besides: it is always somebody's."""
    first, second, seen = EventBus(db), EventBus(db), Recorder()
    first.subscribe(Placed, name="a", order="log")(Recorder().note)
    for bus in (first, second):
        bus.subscribe(Placed, name="b", order="log")(seen.note)
    async with first, second:
        with anyio.fail_after(10):
            while [len(bus._running.dispatcher.lanes()) for bus in (first, second) if bus._running] != [1, 1]:
                assert first._running is not None
                await first._running.membership.next_step()
        await first.publish(Placed(1))
        assert await seen.wait_for(1) == [Placed(1)]


async def test_an_instance_that_was_taken_for_dead_has_its_handlers_still(db: str) -> None:
    """One that the others have removed, its lease having ended, does not say of its own subscription that nobody handles it."""
    shop = Shop(db)
    async with shop.bus:
        receipt = await shop.bus.publish(Placed(1))
        await receipt.handled(10)
        of, record = running(shop), receipt._record
        assert isinstance(record, Record)
        of.membership.standing = NOBODY
        assert of.elsewhere._hindrance(of.dispatcher.servings["stock"].stored, record) is None


async def test_a_lane_that_is_rewound_while_it_is_to_go_to_another(db: str) -> None:
    """One that gives a lane up, for it was rewound elsewhere, before it could hand it over, does not keep it from the other."""
    begun, never = anyio.Event(), anyio.Event()
    first, second, desk, seen = EventBus(db), EventBus(db), EventBus(db), Recorder()
    for bus in (first, second):
        bus.subscribe(Placed, name="a", order="log")(Recorder().note)

    @first.subscribe(Placed, name="b", order="log")
    async def slow(_placed: Placed) -> None:
        begun.set()
        await never.wait()

    second.subscribe(Placed, name="b", order="log")(seen.note)
    async with desk, first.open(stop_timeout=0):
        await desk.publish(Placed(1))
        await begun.wait()
        async with second:
            while not any(lane.retiring for lane in first._running.dispatcher.lanes()):  # type: ignore[union-attr]
                await anyio.lowlevel.checkpoint()
            await desk.rewind("b")
            assert await seen.wait_for(1) == [Placed(1)]


@pytest.mark.parametrize("lapses", [False, True])
async def test_a_lane_that_is_lost_and_taken_anew_while_it_runs(db: str, lapses: bool) -> None:
    """What runs in it comes to its end before its events come again: no two attempts run at once in a strict lane."""
    first, desk, began, ended, go_on = Shop(db, order="log"), EventBus(db), Recorder(), Recorder(), anyio.Event()
    first.bus = EventBus(db)

    @first.bus.subscribe(Placed, name="stock", order="log")
    async def stock(placed: Placed) -> None:
        began.add(len(ended.seen))
        await go_on.wait()
        ended.add(placed.n)

    async with first.bus, desk:
        await desk.publish(Placed(1))
        await began.wait_for(1)
        membership, (lane,) = running(first).membership, running(first).dispatcher.lanes()
        with anyio.fail_after(10):
            if lapses:
                await running(first).journal.command(Beat(membership._instance, leaving=True))  # as another says of it
                membership.poke()
            else:
                await desk.rewind("stock")
            while not lane.closed:
                await anyio.lowlevel.checkpoint()
            for _ in range(3):
                membership.poke()
                await membership.next_step()
        go_on.set()
        assert await first.bus.drain(10) == {}
        assert began.seen == list(range(len(ended.seen)))  # each began when all before it had ended
        assert lapses or len(ended.seen) == 2


async def test_who_waits_inside_a_lane_that_was_lost(db: str) -> None:
    """A handler waits for nothing that comes only when it has ended, as where the lane is still there: `drain` leaves it out,
    and `handled` says so."""
    bus, desk, ended, go_on = EventBus(db), EventBus(db), Recorder(), anyio.Event()
    receipts: list[Receipt] = []

    @bus.subscribe(Placed, name="stock", order="log")
    async def stock(_placed: Placed) -> None:
        await go_on.wait()
        if not ended.seen:
            await bus.drain()
            with pytest.raises(HandlingFailed, match="called from inside the lane"):
                await receipts[0].handled()
        ended.add("an attempt")

    async with bus.open(stop_timeout=0), desk:
        receipts.append(await bus.publish(Placed(1)))
        (lane,) = bus._running.dispatcher.lanes()  # type: ignore[union-attr]
        with anyio.fail_after(10):
            while not lane.running:
                await anyio.lowlevel.checkpoint()
            await desk.rewind("stock")
            while not lane.closed:
                await anyio.lowlevel.checkpoint()
        go_on.set()
        assert await ended.wait_for(2, timeout=20)
        assert await bus.drain(10) == {}


async def test_handled_while_lanes_move(db: str) -> None:
    """An event is not taken for settled because its lane was here when the others were looked at, and is not any more."""
    worker, audit, publisher = Shop(db), Recorder(), EventBus(db)
    gates, attempts = [anyio.Event(), anyio.Event()], Recorder()

    @publisher.subscribe(Placed, name="stock")
    async def stock(placed: Placed) -> None:
        attempts.add(placed)
        await gates[len(attempts.seen) - 1].wait()

    worker.bus = EventBus(db)
    worker.bus.subscribe(Placed, name="audit")(audit.note)
    async with worker.bus, publisher.open(stop_timeout=0):
        receipt = await publisher.publish(Placed(1))
        await audit.wait_for(1)
        of, record = publisher._running, receipt._record
        assert of is not None
        assert isinstance(record, Record)
        look = of.status.of

        async def move_meanwhile(event_id: str) -> dict[str, DeliveryStatus]:
            of.status.of = look  # type: ignore[method-assign]
            while (found := await look(event_id))["audit"] != DeliveryStatus.HANDLED:
                await anyio.lowlevel.checkpoint()
            (lane,) = of.dispatcher.lanes()
            await worker.bus.rewind("stock")
            while not lane.closed:
                await anyio.lowlevel.checkpoint()
            gates[0].set()
            return found

        of.status.of = move_meanwhile  # type: ignore[method-assign]
        assert await of.elsewhere.settled(record) == {}
        assert [lane.has_settled(record) for lane in of.dispatcher.lanes_of(record)] == [False]
        gates[1].set()
