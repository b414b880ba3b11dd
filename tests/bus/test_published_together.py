"""What the handlers of one lane publish is committed together; each of their deliveries stands for itself all the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Draft, EventBus, Reject
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, until


@attrs.frozen(kw_only=True)
class Asked:
    number: int


@attrs.frozen(kw_only=True)
class Answered:
    number: int
    text: str = "yes"


EVENTS = 120
TAKEN = 77
"""The key of this one belongs to an event of other content."""


def kind_of(number: int) -> str:
    """What the handler does with an event: every fifth is refused, some publish with a key, one of these in vain."""
    if number == TAKEN:
        return "conflict"
    return "refused" if number % 5 == 3 else "keyed" if number % 7 == 0 else "silent" if number % 11 == 0 else "answered"


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
async def test_what_fails_among_them(any_db: str, order: Any, waits: bool) -> None:
    """Beside deliveries that fail, that publish nothing, or whose keys are taken, each answer is published once, in its order."""
    bus: EventBus = EventBus(any_db)
    calls: Counter[int] = Counter()

    @bus.subscribe(Asked, order=order, retry=NO_RETRY)
    async def answer(asked: Asked) -> object:
        calls[asked.number] += 1
        if waits:
            await anyio.lowlevel.checkpoint()
        kind = kind_of(asked.number)
        if kind == "refused":
            raise Reject("no")
        if kind in {"keyed", "conflict"}:
            return Draft(Answered(number=asked.number), idempotency_key=f"k{asked.number}")
        return None if kind == "silent" else [Answered(number=asked.number), Answered(number=asked.number, text="really")]

    async with bus:
        await bus.publish(Answered(number=-1, text="first"), idempotency_key=f"k{TAKEN}")
        await bus.publish_many([Draft(Asked(number=number), key=f"{number % 10}") for number in range(EVENTS)])
        assert await bus.drain(10) == {}
        answers = [envelope.event async for envelope in bus.history(Answered)][1:]
        dead = [letter.envelope.event.number for letter in await bus.dead_letters.list()]  # type: ignore[attr-defined]
    numbers = [number for number in range(EVENTS) if kind_of(number) in {"answered", "keyed"}]
    wanted = Counter({n: 2 if kind_of(n) == "answered" else 1 for n in numbers})
    assert Counter(each.number for each in answers) == wanted  # type: ignore[attr-defined]
    assert sorted(dead) == [number for number in range(EVENTS) if kind_of(number) in {"refused", "conflict"}]
    assert set(calls.values()) == {1}
    if order in {"type", "log"}:
        assert [each.number for each in answers] == sorted(each.number for each in answers)  # type: ignore[attr-defined]


class Counting(SQLiteStore):
    """A store that counts its transactions with outcomes, and the units in them."""

    transactions = units = 0

    def commit(self, batch: Batch) -> Committed:
        self.transactions += bool(batch.units)
        self.units += len(batch.units)
        return super().commit(batch)


async def test_they_share_a_unit(db: str) -> None:
    """A hundred handlers that publish cost a few units, not a hundred."""
    store = Counting(db)
    bus = EventBus(store)

    @bus.subscribe(Asked)
    async def answer(asked: Asked) -> Answered:
        return Answered(number=asked.number)

    async with bus:
        await bus.publish_many([Asked(number=number) for number in range(100)])
        assert await bus.drain(10) == {}
        assert len([envelope async for envelope in bus.history(Answered)]) == 100
    assert store.units < 50


async def test_a_drain_hurries_nothing_that_still_runs(db: str) -> None:
    """While handlers that wait are drained, their outcomes share transactions: before, each was one of its own."""
    store = Counting(db)
    bus = EventBus(store)

    @bus.subscribe(Asked, order="none")
    async def wait(_asked: Asked) -> None:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()

    async with bus:
        await bus.publish_many([Asked(number=number) for number in range(400)])
        assert await bus.drain(10) == {}
    assert store.transactions < 100


async def test_a_rewind_meanwhile(db: str) -> None:
    """What was settled before a rewind stays so below its position, also where it was to be sent a moment later."""
    bus = EventBus(db)
    calls: Counter[int] = Counter()
    gate = anyio.Event()

    @bus.subscribe(Asked, order="none")
    async def handle(asked: Asked) -> None:
        calls[asked.number] += 1
        await anyio.lowlevel.checkpoint()
        if asked.number == 1:
            await gate.wait()

    async with bus:
        loop = bus._open().dispatcher.environment.loop
        loop.soon = lambda function: None  # type: ignore[method-assign]  # a moment that does not come
        await bus.publish_many([Asked(number=0), Asked(number=1)])
        await until(lambda: calls[1])
        await until(lambda: bus._open().dispatcher.lanes()[0].running == 1)
        await bus.rewind("handle", after=1)
        gate.set()
        await until(lambda: calls[1] == 2)
        assert await bus.drain(10) == {}
    assert calls == {0: 1, 1: 2}
