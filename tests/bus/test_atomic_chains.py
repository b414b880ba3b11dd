"""What handlers publish with their ack: both are committed, or neither."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import msgspec
import pytest

from eventbus import BusNotOpen, Delivery, Draft, EventBus, Reject, RetryPolicy
from tests.bus.support import NO_RETRY, QUICK, GatedStore, Recorder


@attrs.frozen
class Step:
    level: int
    number: int = 0


@attrs.frozen
class One:
    number: int


@attrs.frozen
class Two:
    number: int
    how: str = ""


@attrs.frozen
class Three:
    number: int


async def events(bus: EventBus, cls: type) -> list[object]:
    return [envelope.event async for envelope in bus.history(cls)]


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_returned_and_published(any_db: str, order: Any) -> None:
    """An event, a list of events or Drafts, and what Delivery.publish was given are published with the ack, in order."""
    bus, recorder = EventBus(any_db), Recorder()

    @bus.subscribe(One, order=order)
    async def one(one: One, delivery: Delivery) -> object:
        delivery.publish(Two(one.number, "a"))
        if one.number == 0:
            return Two(one.number, "b")
        delivery.publish(Two(one.number, "b"), key="k")
        return [Two(one.number, "c"), Draft(Two(one.number, "d"), key="x")]

    bus.subscribe(Two, order="log")(recorder.note)
    async with bus:
        await bus.publish(One(0))
        await recorder.wait_for(2)
        await bus.publish(One(1))
        seen = await recorder.wait_for(6)
        assert seen == [Two(0, "a"), Two(0, "b"), Two(1, "a"), Two(1, "b"), Two(1, "c"), Two(1, "d")]
        assert [envelope.key async for envelope in bus.history(Two)] == [None] * 3 + ["k", None, "x"]


async def test_plain_handlers(any_db: str) -> None:
    """A plain handler's events are published with its ack, too."""
    bus, recorder = EventBus(any_db), Recorder()

    @bus.subscribe(One)
    def one(one: One, delivery: Delivery) -> Two:
        delivery.publish(Two(one.number, "a"))
        return Two(one.number, "b")

    bus.subscribe(Two)(recorder.note)
    async with bus:
        await bus.publish_many([One(n) for n in range(100)])
        seen = await recorder.wait_for(200)
        assert seen == [Two(n, how) for n in range(100) for how in "ab"]


async def test_only_with_the_ack() -> None:
    """Until the handler is done nothing of what it publishes is stored; afterwards everything is, together with the ack."""
    bus, reached, gate = EventBus(":memory:"), anyio.Event(), anyio.Event()

    @bus.subscribe(One)
    async def one(one: One, delivery: Delivery) -> Two:
        delivery.publish(Two(1))
        reached.set()
        await gate.wait()
        return Two(2)

    async with bus:
        receipt = await bus.publish(One(1))
        await reached.wait()
        await bus.publish(Three(1))
        assert await events(bus, Two) == []
        assert (await bus.status(receipt.id))["one"] == "pending"
        gate.set()
        await receipt.handled(timeout=20)
        assert await events(bus, Two) == [Two(1), Two(2)]
        assert (await bus.status(receipt.id))["one"] == "handled"


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_failed_attempts_publish_nothing(order: Any, plain: bool) -> None:
    """What a failed attempt wanted to publish is dropped; the attempt that succeeds publishes its own."""
    bus, recorder = EventBus(":memory:"), Recorder()

    def publish(one: One, delivery: Delivery) -> Three:
        delivery.publish(Two(one.number, f"attempt {delivery.attempt}"))
        if delivery.attempt < 3:
            raise RuntimeError("again")
        return Three(one.number)

    async def publish_async(one: One, delivery: Delivery) -> Three:
        await anyio.lowlevel.checkpoint()
        return publish(one, delivery)

    handler: Callable[[One, Delivery], Any] = publish if plain else publish_async
    bus.subscribe(One, name="one", order=order, retry=QUICK)(handler)
    bus.subscribe(Three)(recorder.note)
    async with bus:
        await bus.publish_many([One(1), One(2)])
        assert sorted(await recorder.wait_for(2), key=str) == [Three(1), Three(2)]
        assert sorted(map(str, await events(bus, Two))) == [str(Two(n, "attempt 3")) for n in (1, 2)]


async def test_dead_letters_publish_nothing() -> None:
    """A delivery that is given up publishes nothing."""
    bus = EventBus(":memory:")

    @bus.subscribe(One, retry=NO_RETRY)
    async def one(one: One, delivery: Delivery) -> None:
        delivery.publish(Two(1))
        raise Reject("no")

    async with bus:
        await bus.publish(One(1))
        await bus.drain(timeout=20)
        assert len(await bus.dead_letters.list()) == 1
        assert await events(bus, Two) == []


async def test_timed_out_attempts_publish_nothing() -> None:
    """An attempt that ran out of time publishes nothing, also when its thread returns late."""
    bus, gate, late = EventBus(":memory:"), threading.Event(), Recorder()

    @bus.subscribe(One, retry=NO_RETRY, timeout=0.02)
    async def slow(one: One, delivery: Delivery) -> Two:
        delivery.publish(Two(1, "slow"))
        await anyio.sleep_forever()
        return Two(2, "slow")

    @bus.subscribe(One, retry=NO_RETRY, timeout=0.02)
    def stuck(one: One, delivery: Delivery) -> Two:
        delivery.publish(Two(1, "stuck"))
        gate.wait(10)
        try:
            delivery.publish(Two(2, "stuck"))
        except BusNotOpen:
            late.add("refused")
        return Two(3, "stuck")

    failed = Recorder()
    bus = _with_hook(bus, failed)
    async with bus:
        await bus.publish(One(1))
        await failed.wait_for(2)
        gate.set()
        await late.wait_for(1)
        await bus.drain(timeout=20)
        assert await events(bus, Two) == []
        assert sorted(letter.subscription for letter in await bus.dead_letters.list()) == ["slow", "stuck"]


def _with_hook(bus: EventBus, recorder: Recorder) -> EventBus:
    bus._settings = msgspec.structs.replace(bus._settings, hooks=(recorder.add,))
    return bus


async def test_after_the_attempt() -> None:
    """A Delivery that outlives its attempt publishes nothing, and says so."""
    bus, kept = EventBus(":memory:"), []

    @bus.subscribe(One)
    async def one(one: One, delivery: Delivery) -> None:
        kept.append(delivery)

    async with bus:
        receipt = await bus.publish(One(1))
        await receipt.handled(timeout=20)
        with pytest.raises(BusNotOpen, match="over"):
            kept[0].publish(Two(1))
        assert await events(bus, Two) == []


async def test_bus_publish_is_independent() -> None:
    """bus.publish inside a handler is stored at once, whatever becomes of the attempt."""
    bus = EventBus(":memory:")

    @bus.subscribe(One, retry=NO_RETRY)
    async def one(one: One, delivery: Delivery) -> None:
        receipt = await bus.publish(Two(1))
        assert receipt.position
        assert await events(bus, Two) == [Two(1)]
        raise Reject("no")

    async with bus:
        await bus.publish(One(1))
        await bus.drain(timeout=20)
        (letter,) = await bus.dead_letters.list()
        assert letter.error_type == "Reject"
        assert await events(bus, Two) == [Two(1)]


@pytest.mark.parametrize(
    "result", [5, "text", {"a": 1}, [Three(1), 5], [None], iter([Three(1)]), Two], ids=lambda result: type(result).__name__
)
async def test_wrong_results(result: object) -> None:
    """A handler that returns what is no event has failed: an error that names the subscription, and nothing published."""
    bus = EventBus(":memory:")

    @bus.subscribe(One, retry=NO_RETRY)
    async def one(one: One, delivery: Delivery) -> object:
        delivery.publish(Two(1))
        return result

    async with bus:
        await bus.publish(One(1))
        await bus.drain(timeout=20)
        (letter,) = await bus.dead_letters.list()
        assert letter.error_type == "TypeError"
        assert "'one' returned" in letter.error
        assert await events(bus, Two) == await events(bus, Three) == []


@pytest.mark.parametrize("result", [[], ()], ids=str)
async def test_empty_results(result: object) -> None:
    """An empty list publishes nothing, and is an ack."""
    bus = EventBus(":memory:")

    @bus.subscribe(One, retry=NO_RETRY)
    async def one(one: One) -> object:
        return result

    async with bus:
        receipt = await bus.publish(One(1))
        await receipt.handled(timeout=20)


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_conflicts_dead_letter(any_db: str, order: Any) -> None:
    """A handler that publishes with a key of other content is dead-lettered at once; none of it is stored, its lane goes on."""
    bus = EventBus(any_db)

    @bus.subscribe(One, order=order)
    async def one(one: One, delivery: Delivery) -> Two:
        delivery.publish(Three(one.number))
        if one.number == 1:
            delivery.publish(Two(1, "other"), idempotency_key="taken")
        return Two(one.number)

    async with bus:
        await bus.publish(Two(0, "first"), idempotency_key="taken")
        await bus.publish_many([One(n) for n in range(3)])
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
        assert (letter.error_type, letter.attempts, letter.envelope.event) == ("IdempotencyConflict", 1, One(1))
        assert "taken" in letter.error
        assert sorted(map(str, await events(bus, Three))) == [str(Three(0)), str(Three(2))]
        assert sorted(map(str, await events(bus, Two))) == sorted(map(str, [Two(0, "first"), Two(0), Two(2)]))


async def test_conflict_in_one_batch() -> None:
    """Two handlers that use one key for different content in the same transaction: one is stored, one is dead-lettered."""
    store, ended = GatedStore(), Recorder()
    bus = EventBus(store)

    def handler(name: str) -> None:
        @bus.subscribe(One, name=name)
        async def publish(one: One, delivery: Delivery) -> None:
            delivery.publish(Two(1, name), idempotency_key="k")
            ended.add(name)

    handler("a")
    handler("b")
    async with bus:
        await bus.publish(One(1))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
        (two,) = await events(bus, Two)
        assert isinstance(two, Two)
        assert {letter.subscription, two.how} == {"a", "b"}


async def test_drain_waits_for_chains(any_db: str) -> None:
    """drain waits for what handlers publish, and for what that leads to."""
    bus, seen = EventBus(any_db), Counter[int]()

    @bus.subscribe(Step)
    async def step(step: Step) -> list[Step]:
        seen[step.level] += 1
        return [Step(step.level - 1, n) for n in range(2)] if step.level else []

    async with bus:
        await bus.publish(Step(6))
        assert await bus.drain(timeout=10) == {}
        assert seen == {level: 2 ** (6 - level) for level in range(7)}


@pytest.mark.parametrize("stop_timeout", [0, 5])
@pytest.mark.parametrize("order", ["type", "key", "none"])
async def test_exactly_once_across_stops(db: str, order: Any, stop_timeout: float) -> None:
    """Stopped in the middle again and again, a chain of three subscriptions publishes every event exactly once."""
    count = 60
    bus, moved, attempts = EventBus(db, durability="fast"), Recorder(), Counter[object]()
    retry = RetryPolicy(attempts=None, first=0.001, cap=0.001)

    @bus.subscribe(One, order=order, retry=retry)
    async def one(one: One, delivery: Delivery) -> Two:
        attempts[one] += 1
        if one.number % 7 == 0 and attempts[one] == 1:
            raise RuntimeError("again")
        await anyio.lowlevel.checkpoint()
        return Two(one.number)

    @bus.subscribe(Two, order=order, retry=retry)
    def two(two: Two, delivery: Delivery) -> None:
        delivery.publish(Three(two.number))

    @bus.subscribe(Three, order=order)
    async def three(three: Three) -> None:
        moved.add(three)
        await anyio.lowlevel.checkpoint()

    async with bus.open(stop_timeout=stop_timeout):
        await bus.publish_many([One(n) for n in range(count)])
    for stop_at in (5, 20, 40):
        async with bus.open(stop_timeout=stop_timeout):
            await moved.wait_for(stop_at)
    async with bus:
        assert await bus.drain(timeout=10) == {}
        for cls in (Two, Three):
            found = await events(bus, cls)
            assert len(found) == count
            assert set(found) == {cls(n) for n in range(count)}
        assert set(moved.seen) == {Three(n) for n in range(count)}
        assert await bus.dead_letters.list() == []


async def test_stopped_inside_an_attempt(db: str) -> None:
    """An attempt that is released by a stop publishes nothing; the next one, after the start, publishes once."""
    bus, started, block = EventBus(db), Recorder(), True

    @bus.subscribe(One)
    async def one(one: One, delivery: Delivery) -> Three:
        delivery.publish(Two(one.number))
        started.add(delivery.attempt)
        if block:
            await anyio.sleep_forever()
        return Three(one.number)

    async with bus.open(stop_timeout=0):
        await bus.publish(One(1))
        await started.wait_for(1)
    block = False
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert started.seen == [1, 1]
        assert await events(bus, Two) == [Two(1)]
        assert await events(bus, Three) == [Three(1)]
