"""A busy type: what a bus does for one subscription, whatever else it has to do or to hold. A helper of benchmarks."""

from __future__ import annotations

import time

import anyio

from eventbus import EventBus, Receipt
from eventbus.cli.bench_floor import BATCH
from eventbus.cli.bench_order import Order, orders
from eventbus.cli.bench_work import Throughput

_PATIENCE = 120.0
"""Seconds after which what is not handled counts as lost."""


class Busy:
    """One subscription in order of its type, with an async handler that counts."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._events = orders(BATCH)
        self._count = 0
        self._wanted = 0
        self._reached = anyio.Event()
        bus.subscribe(Order, name="busy")(self._handle)

    async def _handle(self, _order: Order) -> None:
        self._count += 1
        if self._count == self._wanted:
            self._reached.set()

    async def called(self, events: int) -> Throughput:
        """Publish so many, `BATCH` at a time; until the handler was called with each. The last acks are under way then."""
        began = time.perf_counter()
        await self._publish(events)
        return Throughput(events, time.perf_counter() - began)

    async def handled(self, events: int) -> Throughput:
        """The same, until the last ack is committed."""
        began = time.perf_counter()
        receipt = await self._publish(events)
        await receipt.handled(_PATIENCE)
        return Throughput(events, time.perf_counter() - began)

    async def _publish(self, events: int) -> Receipt:
        assert events >= BATCH
        assert events % BATCH == 0
        self._count, self._wanted, self._reached = 0, events, anyio.Event()
        for _ in range(events // BATCH):
            receipts = await self._bus.publish_many(self._events)
        with anyio.fail_after(_PATIENCE):
            await self._reached.wait()
        assert self._count == events, f"the handler was called {self._count:,} times for {events:,} events"
        return receipts[-1]
