"""Jumps of the wall clock, by an hour, by ten years, forwards and backwards, while a bus works and over its restarts.

    python -m tests.campaign --only "wall-clock jumps"

The clock is given to the bus; only its time of day jumps (`MovableClock`), as a machine's does. What goes by the time of day is
what was given as one: when a scheduled event is due, what retention keeps. Everything else is measured: retries, timeouts,
leases. So after a jump forwards a scheduled event is delivered as soon as the clock shows its time, after one backwards as much
later; it is never delivered while the clock has not shown its time, and everything else is handled as if nothing had been.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import anyio
import attrs

from eventbus import Delivery, EventBus, RetryPolicy, event
from tests.bus.support import MovableClock
from tests.campaign import Case

JUMPS = 8
"""In one case."""
YEARS = timedelta(days=3_653)
BY = [sign * by for sign in (1, -1) for by in (timedelta(hours=1), YEARS, timedelta(seconds=5))]
LEASE = 0.3
"""A jump is noticed at the renewal of a lease at the latest: three times in it."""


@event("jumps.tick", key="key")
@attrs.frozen
class Tick:
    """An event, by its number; `due` is when it is to be delivered by the clock, or 0."""

    n: int
    key: str
    due: float = 0.0


@attrs.define
class _Run:
    chance: random.Random
    clock: MovableClock
    path: Path
    latest: float = 0.0
    handled: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    ids: list[str] = attrs.field(factory=list)
    dues: dict[int, float] = attrs.field(factory=dict)
    faults: list[str] = attrs.field(factory=list)
    count: Iterator[int] = attrs.field(factory=itertools.count)

    def jump(self) -> None:
        self.look()  # an event may have become due since the last look, and be on its way
        self.clock.move(self.chance.choice(BY))
        self.look()

    def look(self) -> None:
        """The latest time that the clock has shown is this one, or one before."""
        self.latest = max(self.latest, self.clock.time())

    def bus(self) -> EventBus:
        bus = EventBus(self.path, clock=self.clock, lease=LEASE, retention=timedelta(days=30))
        retry = RetryPolicy(attempts=3, first=0.01, jitter=0.0)
        for order in ("type", "key", "none", "log"):

            @bus.subscribe(Tick, name=order, order=order, retry=retry)
            async def handler(tick: Tick, delivery: Delivery) -> None:
                self.look()
                if tick.due > self.latest:
                    self.faults.append(f"{delivery.subscription} was given {tick} while the clock had shown {self.latest}")
                if tick.n % 5 == 0 and delivery.attempt == 1:
                    raise ValueError("the first attempt")
                self.handled[delivery.subscription, tick.n] += 1

        return bus

    async def publish(self, bus: EventBus) -> None:
        for _ in range(self.chance.randrange(1, 8)):
            n = next(self.count)
            receipt = await bus.publish(Tick(n, f"k{n % 3}"))
            if self.ids and receipt.id <= self.ids[-1]:
                self.faults.append(f"the id {receipt.id} came after {self.ids[-1]}")
            self.ids.append(receipt.id)
            self.dues[n] = -math.inf
        due = self.clock.time() + self.chance.choice((0.02, 1800.0, YEARS.total_seconds() / 2))
        n = next(self.count)
        await bus.publish(Tick(n, f"k{n % 3}", due), due=timedelta(seconds=due - self.clock.time()))
        self.dues[n] = due

    async def main(self) -> None:
        self.look()
        left = JUMPS
        while left:
            bus = self.bus()
            async with bus.open(stop_timeout=0.0):
                self.ids.clear()  # they grow from call to call of one bus
                for _ in range(min(left, self.chance.randrange(1, 4))):
                    await self.publish(bus)
                    self.jump()
                    left -= 1
                    await self.publish(bus)
                    ages = [each.lag_seconds for each in (await bus.stats()).subscriptions.values()]
                    if min(ages) < 0:
                        self.faults.append(f"an age is negative: {ages}")
                    await anyio.sleep(self.chance.random() * 0.05)
        async with self.bus() as bus:
            await self.all_are_handled(bus)
            now, handled = self.clock.time(), self.handled.copy()
        async with self.bus() as bus:
            await bus.drain(20)
        again = [place for place, count in self.handled.items() if self.dues[place[1]] <= now and count != handled[place]]
        if again:
            self.faults.append(f"handled again after a drain and a restart: {again}")

    async def all_are_handled(self, bus: EventBus) -> None:
        """What is due by the clock, or was, is handled: at least once, for a restart may come before what was handled is stored."""
        with anyio.move_on_after(20):
            while (due := (await bus.stats()).next_due) is not None and due.timestamp() <= self.clock.time():
                await anyio.sleep(0.01)
        if left := await bus.drain(20):
            self.faults.append(f"drain left {left}")
        now = self.clock.time()
        for n, due_at in self.dues.items():
            counts = {order: self.handled[order, n] for order in ("type", "key", "none", "log")}
            if due_at <= now and min(counts.values()) < 1:
                self.faults.append(f"{n}, due at {due_at}, was not handled by all at {now}: {counts}")


def case(seed: int, number: int) -> Case:
    """One database, some jumps, some restarts."""
    what, backend = f"jumps {seed}-{number}", ("asyncio", "trio")[number % 2]
    with tempfile.TemporaryDirectory(prefix="eventbus-jumps-") as folder:
        run = _Run(random.Random(what), MovableClock(), Path(folder) / "jumps.db")
        anyio.run(run.main, backend=backend)
    return Case(f"{what}, {backend}", JUMPS, run.faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    for number in itertools.count():
        yield case(seed, number)
