"""localqueue's event bus: pydantic events, a durable queue for each subscription, its own consumer loop (`bus.run`)."""

import asyncio
import contextlib
from datetime import datetime
from decimal import Decimal
from uuid import UUID

import common
from localqueue import DurabilityMode, SimpleQueue
from localqueue.bus import BaseEvent, EventBus

SETTINGS = {
    # name: (durability, deliveries of one subscription at once)
    "default": (DurabilityMode.RELAXED, 1),
    "concurrent": (DurabilityMode.RELAXED, 20),
    "durable": (DurabilityMode.DURABLE, 20),
}

POLL = 0.1
"""Seconds that its consumer sleeps when it has found nothing; there is no option for it."""


class OrderPlaced(BaseEvent):
    event_name = "order.placed"

    order_id: UUID
    customer: str
    total: Decimal
    quantity: int
    placed_at: datetime
    note: str | None


def event(number: int) -> OrderPlaced:
    return OrderPlaced(**common.fields(number))


def settings_of(task: common.Task, durability: DurabilityMode) -> dict[str, object]:
    """It says so itself: the connection is inside its extension, with a SQLite of its own."""
    with SimpleQueue(str(task.folder), durability=durability) as queue:
        found = queue.diagnostics()
    return {
        "journal_mode": found.journal_mode,
        "synchronous": common.SYNCHRONOUS[found.synchronous],
        "busy_timeout_ms": found.busy_timeout_ms,
        "sqlite": found.sqlite_version,
        "how_we_know": "PRAGMA, by SimpleQueue.diagnostics() with the same durability",
    }


class Deliveries:
    """Asks for what is not acked yet; by the library itself, since a second SQLite in one process would break its locks."""

    def __init__(self, task: common.Task, durability: DurabilityMode) -> None:
        names = [f"__bus__:default:handler-{number}" for number in range(task.subscribers)]  # documented
        self._queues = [SimpleQueue(str(task.folder), name=name, durability=durability) for name in names]

    def open(self) -> int:
        """Deliveries that wait or run."""
        found = [queue.stats() for queue in self._queues]
        return sum(stats["ready"] + stats["processing"] for stats in found)

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


async def run(task: common.Task) -> dict[str, object]:
    durability, concurrency = SETTINGS[task.setting]
    calls = common.Calls()
    bus = EventBus(str(task.folder), durability=durability, concurrency=concurrency)
    settings = settings_of(task, durability)
    for number in range(task.subscribers):

        @bus.handler(OrderPlaced, subscription=f"handler-{number}")
        async def handler(event: OrderPlaced) -> None:
            calls.mark()

    deliveries = Deliveries(task, durability)
    consumer = asyncio.create_task(bus.run())
    try:
        if task.measure == "latency":
            figures = await common.latency_in_loop(lambda i: bus.dispatch_async(event(i)), calls, task.seconds, POLL)
            return {
                "figures": figures,
                "settings": settings,
                "how": "await bus.dispatch_async(event); its consumer polls each 100 ms",
            }
        loop = asyncio.get_running_loop()
        at_once = 1 if task.measure == "one" else common.BATCH

        async def publish_all(number: int) -> None:
            limit = task.limit()
            for first in range(0, number, at_once):
                if at_once == 1:
                    await bus.dispatch_async(event(first))
                else:
                    await bus.ingest([event(i) for i in range(first, first + at_once)], batch_size=at_once)
                while first + at_once - calls.count() // task.subscribers >= common.BACKLOG:
                    limit.check(lambda: f"{calls.count()} of {number} handled")
                    await asyncio.sleep(0.001)
            while calls.count() < number * task.subscribers:
                limit.check(lambda: f"{calls.count()} of {number} handled")
                await asyncio.sleep(0.001)
            while deliveries.open():
                limit.check(lambda: "not all acked")
                await asyncio.sleep(0.005)

        def in_loop(number: int) -> None:
            calls.clear()
            asyncio.run_coroutine_threadsafe(publish_all(number), loop).result()

        figures = await asyncio.to_thread(common.throughput, in_loop, task.seconds, at_once)
        how = "await bus.dispatch_async(event)" if at_once == 1 else f"await bus.ingest({at_once} events)"
        return {"figures": figures, "settings": settings, "how": how}
    finally:
        consumer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await consumer
        deliveries.close()
        bus.close()


if __name__ == "__main__":
    common.main(lambda task: asyncio.run(run(task)))
