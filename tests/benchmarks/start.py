"""Processes that start on a log, end, or are killed: the parts of the benchmark of the start, each run in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from eventbus import EventBus
from eventbus.cli.bench_floor import BATCH
from eventbus.cli.bench_order import Order, orders

SUBSCRIPTIONS = 10
"""To one type, of which some events are waiting at the start."""

_WAITING = 10
"""Batches that are left waiting."""

_UNDER_WAY = 100
"""Batches that are published until the kill."""


class _Handler:
    """Notes when the first event came; `held`: and does not come to its end."""

    def __init__(self, *, held: bool = False) -> None:
        self.first: float | None = None
        self.called = 0
        self._held = held

    async def handle(self, _order: Order) -> None:
        if self.first is None:
            self.first = time.perf_counter()
        self.called += 1
        if self._held and self.called % BATCH == 0:
            await asyncio.Event().wait()


def _bus(path: str, handler: _Handler) -> EventBus:
    bus = EventBus(path)
    for number in range(SUBSCRIPTIONS):
        bus.subscribe(Order, name=f"start-{number}", timeout=None)(handler.handle)
    return bus


def leave_events_waiting(path: str) -> dict[str, float]:
    """Publish some events that are not dispatched, and end in order."""

    async def run() -> None:
        bus = _bus(path, _Handler())
        async with bus.open(dispatch=False):
            for _ in range(_WAITING):
                await bus.publish_many(orders(BATCH))

    asyncio.run(run())
    return {}


def die_with_events_waiting(path: str) -> None:
    """Publish and handle, then die in the middle of it: the WAL is not carried over, the lock file is not let go."""

    async def run() -> None:
        bus = _bus(path, _Handler(held=True))
        async with bus:
            for _ in range(_UNDER_WAY):
                await bus.publish_many(orders(BATCH))
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(run())


def first_delivery(path: str) -> dict[str, float]:
    """Seconds from just before `open` until it has returned, and until the first handler is called; then handle the rest."""

    async def run() -> dict[str, float]:
        handler = _Handler()
        bus = _bus(path, handler)
        began = time.perf_counter()
        async with bus:
            opened = time.perf_counter() - began
            left = await bus.drain(120)
        assert handler.first is not None, "no event was waiting"
        assert left == {}
        return {"open_seconds": opened, "first_delivery_seconds": handler.first - began, "called": float(handler.called)}

    return asyncio.run(run())
