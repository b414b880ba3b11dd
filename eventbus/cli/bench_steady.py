"""`python -m eventbus bench`: *a steady load*, events that come when they come, whether or not the bus keeps up.

An open loop: event n is due n / rate seconds after the start. Each millisecond, what has come due is published by one
`publish_many` in a task of its own, which nobody waits for. Times are taken from when an event was due, so a stall counts for
every event that came during it (no "coordinated omission").
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

import anyio
import anyio.abc
import attrs

from eventbus import EventBus
from eventbus.cli.bench_floor import BATCH, BenchFailed
from eventbus.cli.bench_order import Order, numbered, orders
from eventbus.cli.bench_work import Where
from eventbus.cli.demo_show import percentile

_TICK = 0.001
"""Seconds between two looks at what is due."""

_WARM_UP = 10
"""Batches before those that count."""

_PATIENCE = 120.0
"""Seconds after which what is not handled counts as lost."""


@attrs.frozen
class Steady:
    """What a steady load did.

    Attributes:
        events, seconds: published, until all was handled.
        late: seconds from when an event was due until a handler was called with it; ascending, over all subscriptions.
        cores: of CPU that the process used, the making of the events included.
    """

    events: int
    seconds: float
    late: Sequence[float]
    cores: float

    def lateness(self, percent: int) -> float:
        """Seconds from when an event was due until a handler was called."""
        return percentile(self.late, percent)


class _Handler:
    """Notes how late each event comes, and that it comes."""

    def __init__(self, events: int, rate: float) -> None:
        self.began = 0.0
        self.late = array("d")
        self.times = bytearray(events)
        self._rate = rate

    async def handle(self, order: Order) -> None:
        if self.began:
            self.late.append(time.perf_counter() - self.began - order.number / self._rate)
            self.times[order.number] += 1


async def steady(
    store: Where, *, rate: float = 10_000, seconds: float = 60, subscriptions: int = 3, singly: bool = False
) -> Steady:
    """Publish at this rate for so long. `singly`: each event by `publish` in a task of its own.

    Raises:
        BenchFailed: an event was not handled once by each subscription.
    """
    events = int(rate * seconds)
    bus = EventBus(store)
    handlers = [_Handler(events, rate) for _ in range(subscriptions)]
    for number, handler in enumerate(handlers):
        bus.subscribe(Order, name=f"s{number}")(handler.handle)
    async with bus:
        for _ in range(_WARM_UP):
            await bus.publish_many(orders(BATCH))
        await bus.drain()
        cpu, began = time.process_time(), time.perf_counter()
        for handler in handlers:
            handler.began = began
        await _arrive(bus, events, rate, began, singly=singly)
        left = await bus.drain(_PATIENCE)
        taken, cpu = time.perf_counter() - began, time.process_time() - cpu
    _check(handlers, left)
    return Steady(events, taken, sorted(late for handler in handlers for late in handler.late), cpu / taken)


async def _arrive(bus: EventBus, events: int, rate: float, began: float, *, singly: bool) -> None:
    examples = orders(1_000)
    most = 1 if singly else BATCH
    come = 0
    async with anyio.create_task_group() as group:
        while come < events:
            due = min(events, int((time.perf_counter() - began) * rate) + 1)
            for first in range(come, due, most):
                batch = [numbered(examples[n % len(examples)], n) for n in range(first, min(first + most, due))]
                _publish(group, bus, batch, singly=singly)
            come = max(come, due)
            await anyio.sleep(max(_TICK, began + come / rate - time.perf_counter()))


def _publish(group: anyio.abc.TaskGroup, bus: EventBus, batch: Sequence[Order], *, singly: bool) -> None:
    if singly:
        group.start_soon(bus.publish, batch[0])
    else:
        group.start_soon(bus.publish_many, batch)


def _check(handlers: Sequence[_Handler], left: object) -> None:
    for number, handler in enumerate(handlers):
        events = len(handler.times)
        once = handler.times.count(1)
        if left or once != events:
            raise BenchFailed(
                f"subscription s{number} was called once for {once:,} of {events:,} events, "
                f"never for {handler.times.count(0):,}; left after a drain: {left}"
            )
