"""The program that is killed: it publishes, handles, and says so, line by line, with `os.write`, after the fact.

`nursery` forks it. Several may work on one file; each has its number, and publishers of its own. Each line is one `os.write`
to standard output, which is a file opened for appending: what was said before a kill stays said.

    R run                            the bus is open
    A event source number            the event's publish has returned
    B event subscription position attempt key   a handler has begun
    E event subscription position attempt       … and has ended well
    C event                          `receipt.handled()` has returned: every ack of it is committed
    L n                              `drain` has returned, with so much left
    K point                          a fail point was passed: it dies now
"""

from __future__ import annotations

import itertools
import os
import random
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import anyio
import anyio.lowlevel
import attrs
from anyio.abc import TaskGroup

from eventbus import Delivery, Draft, Envelope, EventBus, HandlingFailed, Receipt, Reject, RetryPolicy, event
from eventbus.stores import sqlite
from tests.crash import failpoints
from tests.crash.nursery import Task

KEYS = 7
BATCH = 5
ATTEMPTS = 3
QUICK = RetryPolicy(attempts=ATTEMPTS, first=0.005, factor=2)


@event("crash.placed", key="owner")
@attrs.frozen
class Placed:
    """What the publishers publish. source and number name it; batch is the number of its `publish_many`, or -1."""

    source: str
    number: int
    owner: str
    batch: int = -1


@event("crash.reserved", key="owner")
@attrs.frozen
class Reserved:
    """The child of a Placed."""

    source: str
    number: int
    owner: str


@event("crash.shipped")
@attrs.frozen
class Shipped:
    """The child of a Reserved."""

    source: str
    number: int


@event("crash.doomed")
@attrs.frozen
class Doomed:
    """Its handler rejects it as often as not; it is redriven until it is handled."""

    source: str
    number: int


@event("crash.hopeless")
@attrs.frozen
class Hopeless:
    """Its handler rejects it, and its dead letter is discarded."""


@event("crash.never")
@attrs.frozen
class Never:
    """It is due in an hour, and is cancelled before."""


def say(*words: object) -> None:
    """One line, in one system call. A kill may tear it, at the border of a page: it begins a line, and its last word is a stop."""
    os.write(1, f"\n{' '.join(map(str, words))} .".encode())


def luck(event_id: str, salt: str) -> int:
    """A number from 0 to 99 that is always the same for an event."""
    return zlib.crc32(f"{salt}{event_id}".encode()) % 100


def fails(delivery: Delivery) -> bool:
    """Whether a flaky handler fails: some events once, a few always."""
    number = luck(delivery.envelope.id, delivery.subscription)
    return number < 3 or (number < 15 and delivery.attempt == 1)


def begun(delivery: Delivery) -> tuple[object, ...]:
    """Say that a handler has begun; what names the attempt."""
    place = (delivery.envelope.id, delivery.subscription, delivery.envelope.position, delivery.attempt)
    say("B", *place, delivery.envelope.key)
    return place


def declare(bus: EventBus) -> None:
    """All kinds of subscriptions."""

    @bus.subscribe(Placed, name="chain")
    async def chain(placed: Placed, delivery: Delivery) -> Reserved:
        place = begun(delivery)
        await anyio.lowlevel.checkpoint()
        say("E", *place)
        return Reserved(placed.source, placed.number, placed.owner)

    @bus.subscribe(Reserved, name="link", order="key", concurrency=4, retry=QUICK)
    async def link(reserved: Reserved, delivery: Delivery) -> None:
        place = begun(delivery)
        delivery.publish(Shipped(reserved.source, reserved.number))
        if luck(delivery.envelope.id, "link") < 10 and delivery.attempt == 1:
            raise ValueError("the first attempt")
        say("E", *place)

    @bus.subscribe(Placed, name="flaky", retry=QUICK)
    async def flaky(_placed: Placed, delivery: Delivery) -> None:
        place = begun(delivery)
        if luck(delivery.envelope.id, "slow") < 20:
            await anyio.sleep(0.002)
        if fails(delivery):
            raise ValueError("flaky")
        say("E", *place)

    @bus.subscribe(Placed, name="plain")
    def plain(_placed: Placed, delivery: Delivery) -> None:
        say("E", *begun(delivery))

    @bus.subscribe(Placed, name="keyed", order="key", concurrency=4, retry=QUICK)
    async def keyed(_placed: Placed, delivery: Delivery) -> None:
        place = begun(delivery)
        await anyio.sleep(0.001 * (luck(delivery.envelope.id, "keyed") % 3))
        if fails(delivery):
            raise ValueError("keyed")
        say("E", *place)

    @bus.subscribe(Placed, Shipped, name="free", order="none", concurrency=8, retry=QUICK)
    async def free(_event: Placed | Shipped, delivery: Delivery) -> None:
        place = begun(delivery)
        await anyio.sleep(0.0005 * (luck(delivery.envelope.id, "free") % 8))
        if fails(delivery):
            raise ValueError("free")
        say("E", *place)

    @bus.subscribe("crash.*", name="audit", order="log")
    async def audit(_envelope: Envelope, delivery: Delivery) -> None:
        say("E", *begun(delivery))


def declare_rare(bus: EventBus, mode: str) -> None:
    """The subscriptions that are paused, rewound, redriven and removed."""
    chance = random.Random()

    @bus.subscribe(Doomed, name="doomed", order="none")
    async def doomed(_doomed: Doomed, delivery: Delivery) -> None:
        if not delivery.replaying and mode == "work" and chance.random() < 0.5:
            raise Reject("this time")
        say("E", *begun(delivery))

    @bus.subscribe(Hopeless, name="hopeless")
    async def hopeless(_hopeless: Hopeless) -> None:
        raise Reject("always")

    @bus.subscribe(Hopeless, name="removed")
    async def removed(_hopeless: Hopeless) -> None: ...


class Publishers:
    """The tasks of one process that publish; what each publishes is told apart by its source."""

    def __init__(self, bus: EventBus, task: Task, group: TaskGroup) -> None:
        self.bus = bus
        self.task = task
        self.group = group
        self.chance = random.Random(f"{task.seed}-{task.run}")

    def start(self) -> None:
        """Publish until killed."""
        functions = {"one": self.single, "two": self.single, "unkeyed": self.unkeyed, "batch": self.many}
        for source, function in (functions | {"later": self.later, "doomed": self.rare}).items():
            self.group.start_soon(function, f"{source}.{self.task.who}")

    async def numbers(self, source: str, seconds: float) -> AsyncIterator[int]:
        """Go on after the last that was acknowledged, with pauses."""
        for number in itertools.count(self.task.starts.get(source, 0)):
            yield number
            await anyio.sleep(self.chance.random() * seconds)

    async def single(self, source: str) -> None:
        """Publish one by one, with idempotency keys; after a kill, the one that was under way again."""
        async for number in self.numbers(source, 0.006):
            placed = Placed(source, number, f"k{number % KEYS}")
            await self.acknowledged(await self.bus.publish(placed, idempotency_key=f"{source}-{number}"), source, number)

    async def unkeyed(self, source: str) -> None:
        """… without a key."""
        async for number in self.numbers(source, 0.006):
            placed = Placed(source, number, f"k{self.chance.randrange(KEYS)}")
            await self.acknowledged(await self.bus.publish(placed), source, number)

    async def many(self, source: str) -> None:
        """Publish in batches, all or nothing."""
        async for batch in self.numbers(source, 0.02):
            drafts = [
                Draft(Placed(source, batch * BATCH + n, f"k{n % KEYS}", batch), idempotency_key=f"{source}-{batch}-{n}")
                for n in range(BATCH)
            ]
            receipts = await self.bus.publish_many(drafts)
            for receipt in receipts:
                say("A", receipt.id, source, batch)
            await self.acknowledged(receipts[-1], source, batch)

    async def later(self, source: str) -> None:
        """Publish what is due soon."""
        async for number in self.numbers(source, 0.02):
            due = timedelta(seconds=self.chance.random() * 0.02)
            placed = Placed(source, number, f"k{number % KEYS}")
            receipt = await self.bus.publish(placed, idempotency_key=f"{source}-{number}", due=due)
            say("A", receipt.id, source, number)

    async def rare(self, source: str) -> None:
        """Publish what is rejected, and do what is done now and then."""
        bus = self.bus
        if self.task.who == 0:
            await bus.unsubscribe("removed")
        await bus.resume("doomed")  # the kill may have come while it was paused
        async for number in self.numbers(source, 0.01):
            for draft in (Doomed(source, number), Hopeless()):
                receipt = await bus.publish(draft)
                say("A", receipt.id, source, number)
            match number % 5:
                case 0:
                    await bus.cancel((await bus.publish(Never(), due=timedelta(hours=1))).id)
                case 1:
                    await bus.pause("doomed")
                    await bus.resume("doomed")
                case 2:
                    await bus.dead_letters.redrive(subscription="doomed")
                case 3:
                    await bus.dead_letters.discard(subscription="hopeless")
                case _:
                    await bus.rewind("doomed", after=max(0, receipt.position or 0) // 2)
                    await bus.replay(Doomed, after=max(0, receipt.position or 0) - 50, to="doomed")

    async def acknowledged(self, receipt: Receipt, source: str, number: int) -> None:
        """Say so, and wait for every fourth to be settled, so that handlers keep up."""
        say("A", receipt.id, source, number)
        if number % 4 == 0:
            await settled(receipt)


async def settled(receipt: Receipt) -> None:
    """Wait for an event, and say when it is settled."""
    try:
        await receipt.handled()
    except HandlingFailed as error:
        if error.blocked:
            raise
    say("C", receipt.id)


async def drain(bus: EventBus) -> None:
    """Wait until nothing is left, of what is due in the next minute, and of what is redriven."""
    await bus.resume("doomed")
    soon = datetime.now(UTC) + timedelta(minutes=1)
    while (due := (await bus.stats()).next_due) is not None and due < soon:
        await anyio.sleep(0.002)
    left = sum((await bus.drain(timeout=60)).values())
    await bus.dead_letters.redrive(subscription="doomed")
    left += sum((await bus.drain(timeout=60)).values())
    say("L", left)


async def main(task: Task) -> None:
    """Work until killed, or drain and leave."""
    bus = EventBus(task.database)
    declare(bus)
    declare_rare(bus, task.mode)
    async with bus:
        say("R", task.run)
        if task.mode == "drain":
            await drain(bus)
            return
        async with anyio.create_task_group() as group:
            Publishers(bus, task, group).start()


def work(task: Task) -> None:
    """Run it, in a process of its own."""
    sqlite.WAL_PAGES = 50  # WAL checkpoints come often
    failpoints.install()
    anyio.run(main, task, backend=task.backend)
