"""Which subscriptions a program dispatches: all, none (`dispatch=False`), or a list of them."""

from __future__ import annotations

import logging
from typing import Any

import attrs
import pytest

from eventbus import EventBus, UnknownSubscription
from tests.bus.support import Recorder


@attrs.frozen
class Placed:
    n: int


def a_bus(db: str, *names: str, **options: Any) -> tuple[EventBus, dict[str, Recorder]]:
    """A bus with such subscriptions, and what each of them sees."""
    bus, seen = EventBus(db), {name: Recorder() for name in names}
    for name, recorder in seen.items():
        bus.subscribe(Placed, name=name, **options)(recorder.note)
    return bus, seen


async def states(bus: EventBus) -> dict[str, str]:
    return {info.name: info.state for info in await bus.subscriptions()}


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_publishing_only_registers(db: str, order: str) -> None:
    """With dispatch=False every subscription is registered and none delivered to; the next full open delivers all."""
    bus, seen = a_bus(db, "one", "two", order=order)
    async with bus.open(dispatch=False):
        for n in range(3):
            await bus.publish(Placed(n), key=n)
        assert await states(bus) == {"one": "not dispatched here", "two": "not dispatched here"}
        stats = await bus.stats()
        assert {name: each.lag for name, each in stats.subscriptions.items()} == {"one": 3, "two": 3}
        assert await bus.drain(1) == {}
    assert not seen["one"].seen
    async with bus:
        assert await bus.drain(20) == {}
        assert await states(bus) == {"one": "running", "two": "running"}
    for recorder in seen.values():
        assert sorted(placed.n for placed in recorder.seen) == [0, 1, 2]


async def test_a_list_of_names_and_handlers(db: str) -> None:
    """A list dispatches these, named by name or by handler; the others miss nothing."""
    bus, seen = a_bus(db, "one", "two", "three")
    async with bus.open(dispatch=["one", seen["two"].note]):
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
        assert await states(bus) == {"one": "running", "three": "not dispatched here", "two": "running"}
    assert [len(recorder.seen) for recorder in seen.values()] == [1, 1, 0]
    async with bus.open(dispatch=["three"]):
        assert await bus.drain(20) == {}
    assert [len(recorder.seen) for recorder in seen.values()] == [1, 1, 1]


async def test_an_empty_list_dispatches_nothing(db: str) -> None:
    """`dispatch=[]` is the same as False."""
    bus, seen = a_bus(db, "one")
    async with bus.open(dispatch=[]):
        await bus.publish(Placed(1))
        assert await states(bus) == {"one": "not dispatched here"}
    assert not seen["one"].seen


async def test_unknown_names_are_an_error(db: str) -> None:
    """A name that is not declared is an error before anything is opened."""
    bus, _ = a_bus(db, "one")
    with pytest.raises(UnknownSubscription, match="known: 'one'"):
        bus.open(dispatch=["two"])
    with pytest.raises(UnknownSubscription):
        bus.open(dispatch=[len])
    async with bus:
        pass


async def test_one_program_publishes_and_another_handles(db: str) -> None:
    """A publishing program need not know the subscriptions; what it publishes waits for the one that does."""
    worker, seen = a_bus(db, "one")
    async with worker.open(dispatch=False):
        pass
    publisher = EventBus(db)
    async with publisher:
        await publisher.publish(Placed(1))
        assert await states(publisher) == {"one": "no handler"}
    async with worker:
        assert await worker.drain(20) == {}
    assert seen["one"].seen == [Placed(1)]


async def test_not_dispatched_is_not_reported_as_orphaned(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only a subscription without a handler is warned about, once."""
    bus, _ = a_bus(db, "one")
    with caplog.at_level(logging.WARNING, "eventbus"):
        async with bus.open(dispatch=False):
            await bus.publish(Placed(1))
    assert not caplog.records
    async with EventBus(db):
        pass
    assert ["'one'" in record.getMessage() for record in caplog.records] == [True]


async def test_retries_and_dead_letters_wait_for_who_dispatches(db: str) -> None:
    """What waits for a retry, or is redriven, is not attempted by a program that does not dispatch it."""
    from eventbus import RetryPolicy

    bus, attempts, broken = EventBus(db), Recorder(), True

    @bus.subscribe(Placed, name="h", order="none", retry=RetryPolicy(attempts=2, first=0.01, jitter=0))
    async def handler(placed: Placed) -> None:
        attempts.add(placed.n)
        if broken:
            raise ValueError("no")

    async with bus:
        await bus.publish(Placed(1))
        assert await bus.drain(20) == {}
    async with bus.open(dispatch=False):
        assert await bus.dead_letters.redrive(all=True) == 1
        assert await bus.drain(1) == {}
    assert attempts.seen == [1, 1]
    broken = False
    async with bus:
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
    assert attempts.seen == [1, 1, 1]
