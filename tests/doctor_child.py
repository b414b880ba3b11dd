"""A program that uses a bus, for `test_doctor`: it says `ready` and then does, or does not do, what its mode says.

python -m tests.doctor_child PATH MODE
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from typing import Any

import anyio
import anyio.lowlevel
import attrs

from eventbus import EventBus, Reject, RetryPolicy, event

NEVER = threading.Event()


@event("doctor.placed", key="n")
@attrs.frozen
class Placed:
    n: int


@event("doctor.placed", version=2, key="n")
@attrs.frozen
class PlacedLater:
    n: int
    more: str = ""


def ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


async def waits(bus: EventBus) -> None:
    """A bus that runs, and does its work until it is killed."""
    bus.subscribe(Placed, name="stock")(_nothing)
    async with bus:
        await bus.publish_many([Placed(n) for n in range(20)])
        await bus.drain()
        ready()
        await anyio.sleep_forever()


async def _nothing(_placed: Placed) -> None:
    pass


async def idles(bus: EventBus) -> None:
    """A bus that runs and has no handler."""
    async with bus:
        ready()
        await anyio.sleep_forever()


async def hangs(bus: EventBus) -> None:
    """A bus whose event loop hangs."""
    bus.subscribe(Placed, name="stock")(_nothing)
    async with bus:
        ready()
        while True:
            time.sleep(60)  # noqa: ASYNC251


async def is_slow(bus: EventBus) -> None:
    """A bus whose handler takes for ever, while other events wait."""
    begun = anyio.Event()

    @bus.subscribe(Placed, name="stock", timeout=None)
    async def slow(_placed: Placed) -> None:
        begun.set()
        await anyio.sleep_forever()

    async with bus:
        await bus.publish_many([Placed(n) for n in range(3)])
        await begun.wait()
        ready()
        await anyio.sleep_forever()


async def is_stuck(bus: EventBus) -> None:
    """A bus with a handler in a thread that has outlived its timeout."""

    @bus.subscribe(Placed, name="stock", timeout=0.05)
    def never(_placed: Placed) -> None:
        NEVER.wait()

    async with bus:
        await bus.publish(Placed(1))
        ready()
        await anyio.sleep_forever()


async def is_old(bus: EventBus) -> None:
    """A bus that does not know the version of the event that waits."""
    bus.subscribe(Placed, name="stock")(_nothing)
    async with bus:
        ready()
        await anyio.sleep_forever()


async def fails(bus: EventBus) -> None:
    """Not killed: leaves two dead letters, and one delivery that waits for its next attempt."""

    @bus.subscribe(Placed, name="mailer")
    async def refuse(placed: Placed) -> None:
        raise Reject(f"no address {placed.n}")

    tried = anyio.Event()

    @bus.subscribe(Placed, name="stock", retry=RetryPolicy(attempts=9, first=3600, cap=3600))
    async def fail(_placed: Placed) -> None:
        tried.set()
        raise OSError("the shelf is gone")

    async with bus:
        await bus.publish_many([Placed(1), Placed(2)])
        await tried.wait()
        while (await bus.stats()).subscriptions["mailer"].dead < 2:
            await anyio.lowlevel.checkpoint()


async def publishes(bus: EventBus) -> None:
    """Not killed: publishes three events."""
    bus.subscribe(Placed, name="stock")(_nothing)
    async with bus.open(dispatch=False):
        await bus.publish_many([Placed(n) for n in range(3)])


async def publishes_later(bus: EventBus) -> None:
    """Not killed: publishes an event of a later version."""
    bus.subscribe(PlacedLater, name="stock")(_nothing)  # type: ignore[arg-type]
    async with bus.open(dispatch=False):
        await bus.publish(PlacedLater(1))


async def schedules(bus: EventBus) -> None:
    """Not killed: an event that is due long ago, and has not come into the log."""
    from datetime import UTC, datetime, timedelta

    async with bus:
        await bus.publish(Placed(1), due=datetime.now(UTC) + timedelta(days=1))


async def pauses(bus: EventBus) -> None:
    """Not killed: a paused subscription."""
    bus.subscribe(Placed, name="stock")(_nothing)
    async with bus:
        await bus.pause("stock")


def holds(path: str) -> None:
    """Another program, in the middle of a write."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    ready()
    NEVER.wait()


def reads(path: str) -> None:
    """Another program that has the file open."""
    connection = sqlite3.connect(path)
    connection.execute("SELECT count(*) FROM events").fetchone()
    ready()
    NEVER.wait()


def main(path: str, mode: str, lease: float) -> None:
    here: dict[str, Any] = globals()
    if mode in {"holds", "reads"}:
        here[mode](path)
    else:
        anyio.run(here[mode], EventBus(path, name="shop", lease=lease))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 10.0)
