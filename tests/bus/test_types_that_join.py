"""Types that join a subscription, leave it and come back, in one process or another: nothing is lost by it, nothing settled twice."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import anyio
import attrs
import pytest

from eventbus import DeliveryStatus, EventBus, HandlingFailed, event
from tests.bus.shops import LONG, Paid, Placed, Shop, running, stay
from tests.bus.support import NO_RETRY, Recorder, until

ORDERS = pytest.mark.parametrize("order", ["type", "log", "key", "none"])
LEASE = 1.0


def shop_of(path: Path, *types: type, order: Any) -> Shop:
    """One program, whose bus has one subscription."""
    return Shop(str(path), *types, order=order, lease=LEASE)


async def state_of(shop: Shop) -> tuple[str, int]:
    """As its stats say: the state, and the lag."""
    stats = (await shop.bus.stats()).subscriptions["stock"]
    return stats.state, stats.lag


@ORDERS
async def test_of_a_program_that_only_publishes(tmp_path: Path, order: str) -> None:
    """A type that a program which does not dispatch declares has events from then on: they wait, whatever the running one does
    meanwhile, for a program that serves it, and are told to be pending until then."""
    path = tmp_path / "a.db"
    old, web, new = (shop_of(path, *types, order=order) for types in ((Placed,), (Placed, Paid), (Placed, Paid)))
    async with old.bus:
        await old.bus.publish(Placed(0), key="k")
        async with web.bus.open(dispatch=False) as bus:
            receipts = await bus.publish_many([Paid(1), Paid(2)])
            await (await bus.publish(Placed(3), key="k")).handled(timeout=10)
            assert await bus.status(receipts[0].id) == {"stock": DeliveryStatus.PENDING}
            if order != "type":
                with pytest.raises(HandlingFailed) as caught:
                    await receipts[0].handled(timeout=10)
                assert "no instance serves" in caught.value.blocked["stock"]
    assert old.seen.seen == [0, 3]
    async with new.bus as bus:
        assert await bus.drain(timeout=10) == {}
        assert await bus.status(receipts[0].id) == {"stock": DeliveryStatus.HANDLED}
    assert sorted(new.seen.seen) == [1, 2]


@ORDERS
async def test_that_comes_back(tmp_path: Path, order: str) -> None:
    """A type that a deployment leaves out is delivered when it is there again: what came meanwhile, and nothing twice."""
    path = tmp_path / "a.db"
    shops = [shop_of(path, *types, order=order) for types in ((Placed, Paid), (Placed,), (Placed, Paid))]
    for n, shop in enumerate(shops):
        async with shop.bus as bus:
            await bus.publish_many([Paid(2 * n), Placed(2 * n + 1)])
            assert await bus.drain(timeout=10) == {}
    assert [sorted(shop.seen.seen) for shop in shops] == [[0, 1], [3], [2, 4, 5]]


@ORDERS
async def test_of_a_canary_that_is_rolled_back(tmp_path: Path, order: str) -> None:
    """When the only program that served a type has gone, the others run the lanes again, and nobody need start anew."""
    path = tmp_path / "a.db"
    old, canary, later = (shop_of(path, *types, order=order) for types in ((Placed,), (Placed, Paid), (Placed, Paid)))
    async with old.bus as bus:
        async with canary.bus:
            await (await canary.bus.publish(Paid(0))).handled(timeout=10)
        receipt = await bus.publish(Placed(1), key="k")
        await bus.publish(Paid(2))
        await receipt.handled(timeout=10)
        assert canary.seen.seen == [0]
        assert set(old.seen.seen) == {1}  # twice, where it was begun before it was seen that the canary had had the lane
    async with later.bus as bus:
        assert await bus.drain(timeout=10) == {}
    assert later.seen.seen == [2]


Looks = Literal["nobody looks", "the other looks first"]


def base_and(name: str) -> tuple[type, type]:
    """A class, and a subclass of it that is made later."""
    base = event(f"join.{name}")(attrs.make_class("Base", {"n": attrs.field(type=int)}, frozen=True))
    return base, event(f"join.{name}.sub")(attrs.frozen(type("Sub", (base,), {"__module__": __name__})))


@pytest.mark.parametrize("looks", ["nobody looks", "the other looks first"])
@ORDERS
async def test_a_subclass_that_another_program_publishes(
    tmp_path: Path, order: str, looks: Looks, request: pytest.FixtureRequest
) -> None:
    """An event of a subclass that joins in one program is passed by in none: where it is not known, its lane waits; where it was
    looked at, in the history say, it is handled."""
    path = tmp_path / "a.db"
    base, sub = base_and(str(abs(hash(request.node.name))))
    one, other = shop_of(path, base, order=order), shop_of(path, base, order=order)
    async with other.bus:
        await other.bus.publish(base(0), key="k")
        async with one.bus:
            if looks == "the other looks first":
                assert [each async for each in other.bus.history(sub)] == []
            receipt = await one.bus.publish(sub(1), key="k")
            await receipt.handled(timeout=10)
            assert await other.bus.drain(timeout=10) == {}
    assert sorted({*one.seen.seen, *other.seen.seen}) == [0, 1]


@attrs.frozen
class Root:
    """Of which the tests below make subclasses, which other tests must not find."""

    n: int


@pytest.mark.parametrize("publishes", [False, True], ids=["drains", "publishes and drains"])
@ORDERS
async def test_a_subclass_that_one_who_only_publishes_brings(
    db: str, order: str, publishes: bool, request: pytest.FixtureRequest
) -> None:
    """It has its lane where it is known, and who drains there waits for it, though nothing was told of it yet."""
    shop, web = shop_of(Path(db), Root, order=order), shop_of(Path(db), Root, order=order)
    async with shop.bus as bus, web.bus.open(dispatch=False) as desk:
        await desk.publish(Root(0))
        assert await bus.drain(10) == {}
        late = event(f"join.{request.node.name}")(attrs.frozen(type("Late", (Root,), {"__module__": __name__})))
        assert [each async for each in bus.history(late)] == []
        await desk.publish(late(1))
        if publishes:
            await bus.publish(Root(2))
        assert await bus.drain(10) == {}
        assert {*shop.seen.seen} == ({0, 1, 2} if publishes else {0, 1})  # what was under way as it joined may come again


@pytest.mark.parametrize("published", ["during the step", "after it"])
async def test_a_subclass_that_comes_up_during_a_step(
    db: str, published: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A type that joins while an instance looks how all stand, and is not among what it has said to serve, gets its lane with the
    next step; who drains meanwhile waits for it."""
    shop, joined, go_on = Shop(db, Root, lease=LONG), anyio.Event(), anyio.Event()
    async with shop.bus as bus:
        membership, (serving,) = running(shop).membership, running(shop).dispatcher.servings.values()
        name = f"join.{request.node.name}"
        late = event(name)(attrs.frozen(type("Late", (Root,), {"__module__": __name__})))
        renew = membership.renew

        async def renew_and_join() -> None:
            await renew()
            if not joined.is_set():
                await bus.publish(late(0), due=timedelta(hours=1))
                assert name in serving.types
                joined.set()
                await go_on.wait()

        monkeypatch.setattr(membership, "renew", renew_and_join)
        membership.poke()
        await joined.wait()
        if published == "during the step":
            await bus.publish(late(1))
            go_on.set()
        else:
            go_on.set()
            await membership.next_step()
            await bus.publish(late(1))
        assert await bus.drain(timeout=10) == {}
        assert shop.seen.seen == [1]


async def test_a_subscription_that_was_removed_elsewhere(tmp_path: Path) -> None:
    """It does not come back with the next subclass."""
    base, sub = base_and("removed")
    one, other = shop_of(tmp_path / "a.db", base, order="log"), EventBus(tmp_path / "a.db")
    async with one.bus, other:
        await other.unsubscribe("stock")
        await until(lambda: not running(one).dispatcher.servings)
        await one.bus.publish(sub(1))
        await one.bus.publish(base(2))
        assert await other.subscriptions() == []


@event("join.versioned", version=1)
@attrs.frozen
class First:
    n: int


@event("join.versioned", version=2)
@attrs.frozen
class Second:
    n: int


async def test_a_lane_that_could_not_be_run(tmp_path: Path) -> None:
    """A lane that has waited at an event which cannot be decoded here is run again once a newer program has handled that; until
    then it is told that nobody can run it."""
    old, new = shop_of(tmp_path / "a.db", First, order="log"), shop_of(tmp_path / "a.db", Second, order="log")
    publisher = EventBus(tmp_path / "a.db")
    async with old.bus as bus:
        async with publisher:
            await publisher.publish(Second(0))
        await until(lambda: any(lane.blocked for lane in running(old).dispatcher.lanes()))
        assert (await state_of(old))[0] == "blocked"
        await bus.publish(First(1))
        assert sum((await bus.drain(timeout=10)).values()) == 2
        async with new.bus:
            await (await new.bus.publish(Second(2))).handled(timeout=10)
            assert new.lanes
        await until(lambda: old.lanes)
        await (await bus.publish(First(3))).handled(timeout=10)
        assert await state_of(old) == ("running", 0)
    assert (new.seen.seen, old.seen.seen) == ([0, 1, 2], [3])


async def test_with_another_order_when_the_old_program_has_left(tmp_path: Path) -> None:
    """A deployment that changes the order and adds a type waits for the program before it, and begins when that has gone."""
    path = tmp_path / "a.db"
    old, new = shop_of(path, Placed, order="key"), shop_of(path, Placed, Paid, order="log")
    leave = anyio.Event()
    async with anyio.create_task_group() as tasks:
        await tasks.start(stay, old.bus, leave)
        async with new.bus:
            assert (await state_of(new))[0] == "blocked"
            leave.set()
            with anyio.fail_after(10):
                while await new.bus.drain(10) or not new.lanes:
                    await running(new).membership.next_step()
            await (await new.bus.publish(Paid(1), key="k")).handled(timeout=10)
    assert new.seen.seen == [1]


@pytest.mark.parametrize("freed", ["discard", "redrive"])
async def test_that_waits_for_a_parked_key(tmp_path: Path, freed: str) -> None:
    """It joins when the key is free, also if nobody else is there to tell of it; `drain` waits for it then."""
    path = str(tmp_path / "a.db")
    options: Any = {"name": "stock", "order": "key", "on_exhausted": "park", "retry": NO_RETRY}
    old, web, new = (EventBus(path, lease=LEASE) for _ in range(3))
    seen = Recorder()

    @old.subscribe(Placed, **options)
    async def fails(_event: Placed) -> None:
        raise ValueError("no")

    web.subscribe(Placed, Paid, **options)(Recorder().note)
    new.subscribe(Placed, Paid, **options)(seen.note)
    async with old:
        await old.publish(Placed(1), key="k")
        assert await old.drain(10) == {}
    async with web.open(dispatch=False):
        await web.publish(Paid(2), key="another")
    async with new as bus:
        assert await bus.drain(10) == {"stock": 1}
        await (bus.dead_letters.discard if freed == "discard" else bus.dead_letters.redrive)(all=True)
        assert await bus.drain(10) == {}
        expected = [Paid(2)] if freed == "discard" else [Placed(1), Paid(2)]
        assert sorted(seen.seen, key=lambda each: each.n) == expected
