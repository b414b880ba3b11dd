"""Headers: the user's own, and correlation and causation that follow from what is being handled."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

import anyio
import attrs
import pytest

from eventbus import Delivery, Draft, Envelope, EventBus, headers
from tests.bus.support import QUICK, Recorder


@attrs.frozen
class First:
    pass


@attrs.frozen
class Second:
    how: str = ""


@attrs.frozen
class Third:
    pass


async def by_type(bus: EventBus) -> dict[str, Envelope]:
    return {envelope.type: envelope async for envelope in bus.history()}


async def headers_of_all(bus: EventBus) -> list[Mapping[str, str]]:
    return [dict(envelope.headers) async for envelope in bus.history()]


async def test_own_headers(any_db: str) -> None:
    """A publisher's headers come to the handler and stand in history as they were."""
    bus, recorder = EventBus(any_db), Recorder()
    own = {"tenant": "ä", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "empty": "", "": "nameless"}

    @bus.subscribe(First)
    async def take(first: First, delivery: Delivery) -> None:
        recorder.add(dict(delivery.envelope.headers))

    async with bus:
        await bus.publish(First(), headers=own)
        await bus.publish(First())
        assert await recorder.wait_for(2) == [own, {}]
        assert await headers_of_all(bus) == [own, {}]


async def test_correlation_and_causation() -> None:
    """Whatever a handler publishes, in any way, is caused by the event that it handles and correlates with the chain's first."""
    bus, recorder = EventBus(":memory:"), Recorder()

    @bus.subscribe(First)
    async def first(event: First, delivery: Delivery) -> list[object]:
        delivery.publish(Second("delivery"))
        await bus.publish(Second("bus"))
        await bus.publish_many([Second("many")])
        return [Second("returned"), Draft(Second("draft"), headers={"own": "1"})]

    @bus.subscribe(Second)
    async def second(event: Second, delivery: Delivery) -> Third:
        recorder.add((event.how, dict(delivery.envelope.headers)))
        return Third()

    async with bus:
        receipt = await bus.publish(First())
        seen = dict(await recorder.wait_for(5))
        chain = {"correlation_id": receipt.id, "causation_id": receipt.id}
        assert seen == {
            "delivery": chain,
            "bus": chain,
            "many": chain,
            "returned": chain,
            "draft": {**chain, "own": "1"},
        }
        assert await bus.drain(timeout=20) == {}
        all_ = [envelope async for envelope in bus.history()]
        seconds = [envelope.id for envelope in all_ if envelope.type == "Second"]
        thirds = [envelope for envelope in all_ if envelope.type == "Third"]
        assert {envelope.headers["correlation_id"] for envelope in thirds} == {receipt.id}
        assert sorted(envelope.headers["causation_id"] for envelope in thirds) == sorted(seconds)


async def test_in_threads() -> None:
    """A plain handler's events follow from what it handles, too."""
    bus = EventBus(":memory:")

    @bus.subscribe(First)
    def first(event: First, delivery: Delivery) -> Third:
        delivery.publish(Second())
        return Third()

    async with bus:
        receipt = await bus.publish(First())
        await receipt.handled(timeout=20)
        found = await by_type(bus)
        for name in ("Second", "Third"):
            assert dict(found[name].headers) == {"correlation_id": receipt.id, "causation_id": receipt.id}


async def test_started_chain() -> None:
    """`with headers(correlation_id=…)` starts a chain that goes on through the handlers; the headers of a call go before it."""
    bus = EventBus(":memory:")

    @bus.subscribe(First)
    async def first(event: First) -> Second:
        return Second()

    async with bus:
        with headers(correlation_id="c-1", tenant="t"):
            receipt = await bus.publish(First())
            with headers(tenant="u"):
                await bus.publish(Third(), headers={"correlation_id": "c-2"})
        await receipt.handled(timeout=20)
        found = await by_type(bus)
        assert dict(found["First"].headers) == {"correlation_id": "c-1", "tenant": "t"}
        assert dict(found["Second"].headers) == {"correlation_id": "c-1", "causation_id": receipt.id}
        assert dict(found["Third"].headers) == {"correlation_id": "c-2", "tenant": "u"}
        await bus.publish(Third())
        assert dict((await by_type(bus))["Third"].headers) == {}


async def test_headers_inside_a_handler() -> None:
    """Inside a handler, `with headers` goes before what follows from the delivery; causation stays."""
    bus, recorder = EventBus(":memory:"), Recorder()

    @bus.subscribe(First, order="none", concurrency=1)
    async def first(event: First, delivery: Delivery) -> None:
        await bus.publish(Second("plain"))
        with headers(correlation_id="new"):
            await bus.publish(Second("within"))

    @bus.subscribe(Second)
    async def second(event: Second, delivery: Delivery) -> None:
        recorder.add((event.how, delivery.envelope.headers["correlation_id"], delivery.envelope.headers["causation_id"]))

    async with bus:
        receipts = [await bus.publish(First()), await bus.publish(First())]
        seen = sorted(await recorder.wait_for(4))
        assert seen == sorted([("plain", r.id, r.id) for r in receipts] + [("within", "new", r.id) for r in receipts])


@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_where_the_bus_was_opened(plain: bool) -> None:
    """Headers in force where the bus was opened do not get into what handlers publish."""
    bus = EventBus(":memory:")

    async def first(event: First) -> Second:
        return Second()

    def first_plain(event: First) -> Second:
        return Second()

    if plain:
        bus.subscribe(First)(first_plain)
    else:
        bus.subscribe(First)(first)
    with headers(correlation_id="opened", tenant="t"):
        async with bus:
            with headers(correlation_id="c-1"):
                receipt = await bus.publish(First(), headers={"tenant": "u"})
            await receipt.handled(timeout=20)
            found = await by_type(bus)
            assert dict(found["Second"].headers) == {"correlation_id": "c-1", "causation_id": receipt.id}


async def test_same_in_every_attempt() -> None:
    """Each attempt has a fresh context: causation is the same whichever attempt publishes."""
    bus, mine = EventBus(":memory:"), ContextVar("mine", default="outside")

    @bus.subscribe(First, retry=QUICK)
    async def first(event: First, delivery: Delivery) -> Second:
        assert mine.get() == "outside"
        mine.set("inside")
        await anyio.lowlevel.checkpoint()
        with headers(spoilt="yes"):
            if delivery.attempt < 3:
                raise RuntimeError("again")
        return Second()

    async with bus:
        receipt = await bus.publish(First())
        await receipt.handled(timeout=20)
        found = await by_type(bus)
        assert dict(found["Second"].headers) == {"correlation_id": receipt.id, "causation_id": receipt.id}


async def test_concurrent_publishers() -> None:
    """Headers of one task do not get into the events of another."""
    async with EventBus(":memory:") as bus:

        async def publish(name: str) -> None:
            with headers(who=name):
                for _ in range(5):
                    await bus.publish(Second(name))

        async with anyio.create_task_group() as group:
            for n in range(10):
                group.start_soon(publish, str(n))
        events = [envelope async for envelope in bus.history()]
        assert len(events) == 50
        for envelope in events:
            assert isinstance(envelope.event, Second)
            assert envelope.headers["who"] == envelope.event.how
