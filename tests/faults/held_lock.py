"""Somebody's own tool holds the write lock now and then, in a random course of things; and the bus that the tests of it share.

A case is a bus with a subscription and a tool (`locker`), a process of its own, that takes the write lock, lets it go, is stopped
and killed. What is published while the lock is free, or becomes free in time, must be acknowledged; what is published while it is
held, refused. In the end exactly what was acknowledged was handled, once, in order.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
from collections.abc import Iterator

import anyio
import attrs
import pytest

from eventbus import Delivery, EventBus, StoreBusy
from eventbus.stores import _sqlite_connection, sqlite
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, Recorder
from tests.campaign import Case
from tests.faults.locker import Locker

STEPS = 12
"""In a case."""


@attrs.frozen
class Placed:
    n: int
    text: str = ""


class Watched(SQLiteStore):
    """A store that tells what comes to it.

    Attributes:
        arrived: notes each transaction as it begins. refused: … each that was refused, since the lock was held.
        under_way: whether there is one.
    """

    under_way = False

    def __init__(self, path: str) -> None:
        super().__init__(path, durability="fast")
        self.arrived = Recorder()
        self.refused = Recorder()

    def commit(self, batch: Batch) -> Committed:
        self.under_way = True
        self.arrived.add(batch)
        try:
            return super().commit(batch)
        except StoreBusy as error:
            self.refused.add((batch, error))
            raise
        finally:
            self.under_way = False

    async def wait_until_under_way(self) -> None:
        """Wait until a transaction has come; with the lock held, it waits there, be it that of a publish or one before it."""
        arrived = len(self.arrived.seen)
        if not self.under_way:
            await self.arrived.wait_for(arrived + 1)


class Shop:
    """A bus on a watched store, with one subscription that notes what it handles: each number, and which attempt it was."""

    def __init__(self, db: str, lease: float = 10.0) -> None:
        self.store = Watched(db)
        self.bus = EventBus(self.store, lease=lease)
        self.seen = Recorder()
        self.gate = anyio.Event()
        self.gate.set()
        self.bus.subscribe(Placed, name="stock", retry=NO_RETRY)(self.handle)

    async def handle(self, event: Placed, delivery: Delivery) -> None:
        self.seen.add((event.n, delivery.attempt))
        await self.gate.wait()

    async def in_order(self, count: int) -> None:
        """So many events are there, each was handled once, at its first attempt, and none is a dead letter."""
        assert await self.wrong(list(range(count))) == []

    async def wrong(self, acknowledged: list[int]) -> list[str]:
        """What is wrong, if these are the events that are there."""
        left = await self.bus.drain(10)
        stored = [envelope.event async for envelope in self.bus.history(Placed)]
        dead = await self.bus.dead_letters.list()
        found = {
            "left": (left, {}),
            "stored": ([event.n for event in stored if isinstance(event, Placed)], acknowledged),
            "handled": (self.seen.seen, [(n, 1) for n in acknowledged]),
            "dead": (dead, []),
        }
        return [f"{what}: {there}; it should be {due}" for what, (there, due) in found.items() if there != due]


@contextlib.contextmanager
def waiting_for(milliseconds: int) -> Iterator[None]:
    """Let the store wait only so long for a lock."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (sqlite, _sqlite_connection):
            patch.setattr(module, "BUSY_TIMEOUT", milliseconds)
        yield


# ------------------------------------------------------------------ cases


@attrs.define
class Course:
    """One course of things.

    Attributes:
        held: whether the tool holds the lock. times: how often it took it.
    """

    shop: Shop
    db: str
    chance: random.Random
    tool: Locker
    held: bool = False
    stopped: bool = False
    times: int = 0
    published: int = 0
    acknowledged: list[int] = attrs.field(factory=list)
    faults: list[str] = attrs.field(factory=list)

    async def all(self) -> None:
        async with self.shop.bus:
            for _ in range(STEPS):
                await self.step(self.chance.choice(("take", "take", "publish", "publish", "let go", "stop", "kill")))
            self.let_go()
            self.faults += await self.shop.wrong(self.acknowledged)

    async def step(self, what: str) -> None:
        if what == "take" and not self.held:
            self.tool.ask("write")
            self.held = True
            self.times += 1
        elif what == "publish":
            await self.publish()
        elif what == "stop" and self.held and not self.stopped:
            self.tool.stop()
            self.stopped = True
        elif what == "kill":
            self.kill()
        elif what == "let go" and self.held:
            if self.chance.random() < 0.5:
                await self.publish_and_let_go()
            else:
                self.let_go()

    def let_go(self) -> None:
        if self.stopped:
            self.tool.go_on()
        if self.held:
            self.tool.ask("end")
        self.held = self.stopped = False

    def kill(self) -> None:
        self.tool.kill()
        self.tool = Locker(self.db)
        self.held = self.stopped = False

    async def publish(self) -> None:
        self.published += 1
        number, was_held = self.published, self.held
        try:
            await self.shop.bus.publish(Placed(number))
        except StoreBusy:
            if not was_held:
                self.faults.append(f"{number} was refused, though nobody held the lock")
        else:
            self.acknowledged.append(number)
            if was_held and self.held:
                self.faults.append(f"{number} was acknowledged, though the lock was held")

    async def publish_and_let_go(self) -> None:
        """It may be refused before the lock is free, or not; it says which."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.publish)
            await self.shop.store.wait_until_under_way()
            if self.chance.random() < 0.3:
                self.kill()
            else:
                self.let_go()


def case(seed: int, number: int) -> Case:
    """One course of things."""
    name, backend = f"{seed}-{number}", ("asyncio", "trio")[number % 2]
    with tempfile.TemporaryDirectory(prefix="eventbus-lock-") as folder, waiting_for(100):
        db = f"{folder}/bus.db"
        course = Course(Shop(db), db, random.Random(name), Locker(db))
        try:
            anyio.run(course.all, backend=backend)
        finally:
            course.tool.kill()
    return Case(f"{name}, {backend}", course.times, course.faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`. What is counted is how often the lock was held."""
    for number in itertools.count():
        yield case(seed, number)
