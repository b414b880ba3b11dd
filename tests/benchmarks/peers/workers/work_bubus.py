"""bubus: pydantic events on an asyncio loop, in memory. `dispatch` queues an event, awaiting the event waits for its handlers."""

import asyncio
import os
from datetime import datetime
from decimal import Decimal
from uuid import UUID

import common

os.environ.setdefault("BUBUS_LOGGING_LEVEL", "WARNING")

from bubus import BaseEvent, EventBus

AT_ONCE = 50
"""Dispatched before they are awaited: with the default history, it refuses an event when 100 are pending, and counts each twice."""


class OrderPlaced(BaseEvent):
    order_id: UUID
    customer: str
    total: Decimal
    quantity: int
    placed_at: datetime
    note: str | None


def event(number: int) -> OrderPlaced:
    return OrderPlaced(**common.fields(number))


NOT_STORED = {
    "journal_mode": "none",
    "synchronous": "none",
    "how_we_know": "its source: events are in memory; with wal_path, JSON is appended to a file when an event is completed, not synced",
}


async def run(task: common.Task) -> dict[str, object]:
    options: dict[str, object] = {}
    if task.setting != "default":
        options["max_history_size"] = 1  # it looks through its history several times for each event
    if task.setting == "wal":
        options["wal_path"] = task.folder / "events.jsonl"
    bus = EventBus(**options)
    try:
        return await measured(task, bus)
    finally:
        await bus.stop()


async def measured(task: common.Task, bus: EventBus) -> dict[str, object]:
    calls = common.Calls()
    for number in range(task.subscribers):

        async def handler(event: OrderPlaced) -> None:
            calls.mark()

        handler.__name__ = handler.__qualname__ = f"handler_{number}"
        bus.on(OrderPlaced, handler)

    if task.measure == "latency":

        async def publish(number: int) -> None:
            bus.dispatch(event(number))

        figures = await common.latency_in_loop(publish, calls, task.seconds)
        return {"figures": figures, "settings": NOT_STORED, "how": "bus.dispatch(event)"}

    loop = asyncio.get_running_loop()
    at_once = 1 if task.measure == "one" else AT_ONCE

    async def publish_all(number: int) -> None:
        for first in range(0, number, at_once):
            if at_once == 1:
                await bus.dispatch(event(first))
            else:
                for one in [bus.dispatch(event(i)) for i in range(first, first + at_once)]:
                    await one

    def in_loop(number: int) -> None:
        calls.clear()
        asyncio.run_coroutine_threadsafe(publish_all(number), loop).result()
        if calls.count() != number * task.subscribers:
            raise common.Late(f"{calls.count()} calls for {number} events")

    figures = await asyncio.to_thread(common.throughput, in_loop, task.seconds, at_once)
    how = "await bus.dispatch(event)" if at_once == 1 else f"bus.dispatch × {at_once}, then await each"
    return {"figures": figures, "settings": NOT_STORED, "how": how}


if __name__ == "__main__":
    common.main(lambda task: asyncio.run(run(task)))
