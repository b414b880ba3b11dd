"""eventbus, measured in the same way as its peers: one publisher task, an `async def` handler that does nothing."""

import asyncio
import gc
import sqlite3

import common

from eventbus import EventBus


def settings_of(folder: object) -> dict[str, object]:
    """Ask the connections of the open bus. It does not hand them out, so the interpreter is asked for them."""
    found = []
    for connection in gc.get_objects():
        if type(connection) is sqlite3.Connection:
            try:
                if connection.execute("PRAGMA database_list").fetchone()[2].startswith(str(folder)):
                    asked = common.pragmas(connection.execute, "PRAGMA on the connections of the open bus")
                    reads_only = connection.execute("PRAGMA query_only").fetchone()[0]
                    found.append((reads_only, asked))
            except sqlite3.Error:
                continue
    return min(found, key=lambda one: one[0])[1]  # the one that writes


async def run(task: common.Task) -> dict[str, object]:
    calls = common.Calls()
    bus = EventBus(task.folder / "bus.db", durability=task.setting)
    for number in range(task.subscribers):

        @bus.subscribe(common.OrderPlaced, name=f"handler-{number}")
        async def handler(event: common.OrderPlaced) -> None:
            calls.mark()

    async with bus:
        settings = settings_of(task.folder)
        if task.measure == "latency":
            figures = await common.latency_in_loop(lambda i: bus.publish(common.event(i)), calls, task.seconds)
            return {"figures": figures, "settings": settings, "how": "await bus.publish(event)"}

        loop = asyncio.get_running_loop()
        at_once = 1 if task.measure == "one" else common.BATCH

        async def publish_all(number: int) -> None:
            for first in range(0, number, at_once):
                if at_once == 1:
                    await bus.publish(common.event(first))
                else:
                    await bus.publish_many([common.event(i) for i in range(first, first + at_once)])
            await bus.drain()

        def in_loop(number: int) -> None:
            calls.clear()
            asyncio.run_coroutine_threadsafe(publish_all(number), loop).result()
            if calls.count() != number * task.subscribers:
                raise common.Late(f"{calls.count()} calls for {number} events")

        figures = await asyncio.to_thread(common.throughput, in_loop, task.seconds, at_once)
        how = "await bus.publish(event)" if at_once == 1 else f"await bus.publish_many({at_once} events)"
        return {"figures": figures, "settings": settings, "how": how + "; then bus.drain()"}


if __name__ == "__main__":
    common.main(lambda task: asyncio.run(run(task)))
