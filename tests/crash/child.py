"""The program that is killed: it publishes, handles, and says so, line by line, with `os.write`, after the fact.

    python -m tests.crash.child DATABASE SEED RUN BACKEND work|drain START…

Each line is one `os.write` to standard output, which is a file opened for appending: what was said before a kill stays said.

    R run                            the bus is open
    A event                          the event's publish has returned
    B event subscription position attempt key   a handler has begun
    E event subscription position attempt       … and has ended well
    C event                          `receipt.handled()` has returned: every ack of it is committed
    L n                              `drain` has returned, with so much left
"""

from __future__ import annotations

import os
import random
import sys
import zlib

import anyio
import anyio.lowlevel
import attrs
from anyio.abc import TaskGroup

from eventbus import Delivery, Draft, Envelope, EventBus, HandlingFailed, Receipt, RetryPolicy, event

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


def say(*words: object) -> None:
    """One line, in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


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


async def single(bus: EventBus, group: TaskGroup, source: str, start: int, chance: random.Random) -> None:
    """Publish one by one, with idempotency keys; after a kill, the one that was under way again."""
    for number in range(start, 1_000_000):
        placed = Placed(source, number, f"k{chance.randrange(KEYS)}" if source == "unkeyed" else f"k{number % KEYS}")
        receipt = await bus.publish(placed, idempotency_key=None if source == "unkeyed" else f"{source}-{number}")
        say("A", receipt.id, source, number)
        if number % 4 == 0:
            group.start_soon(settled, receipt)
        await anyio.sleep(chance.random() * 0.006)


async def settled(receipt: Receipt) -> None:
    """Wait for an event, and say when it is settled."""
    try:
        await receipt.handled()
    except HandlingFailed as error:
        if error.blocked:
            raise
    say("C", receipt.id)


async def many(bus: EventBus, source: str, start: int, chance: random.Random) -> None:
    """Publish in batches, all or nothing."""
    for batch in range(start, 1_000_000):
        drafts = [
            Draft(Placed(source, batch * BATCH + n, f"k{n % KEYS}", batch), idempotency_key=f"{source}-{batch}-{n}")
            for n in range(BATCH)
        ]
        for receipt in await bus.publish_many(drafts):
            say("A", receipt.id, source, batch)
        await anyio.sleep(chance.random() * 0.02)


async def main(path: str, seed: str, run: str, mode: str, starts: dict[str, int]) -> None:
    """Work until killed, or drain and leave."""
    bus = EventBus(path)
    declare(bus)
    chance = random.Random(f"{seed}-{run}")
    async with bus:
        say("R", run)
        if mode == "drain":
            left = await bus.drain(timeout=60)
            say("L", sum(left.values()))
            return
        async with anyio.create_task_group() as group:
            for source in ("one", "two", "unkeyed"):
                group.start_soon(single, bus, group, source, starts[source], chance)
            group.start_soon(many, bus, "batch", starts["batch"], chance)


if __name__ == "__main__":
    _, path, seed, run, backend, mode, *numbers = sys.argv
    starts = dict(zip(("one", "two", "unkeyed", "batch"), map(int, numbers), strict=True))
    anyio.run(main, path, seed, run, mode, starts, backend=backend)
