"""A program with a handler that ends it, or hangs it; run by `test_deadly_handlers`.

    python -m tests.faults.deadly DATABASE KIND BACKEND

It says `A n` when an event is acknowledged, and `N n` when the neighbour has had it, each with one `os.write`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import anyio

from eventbus import Delivery, EventBus
from tests.faults.test_handler_zoo import Fed


def say(*words: object) -> None:
    """One line, in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def exit_now(_delivery: Delivery) -> None:
    """Ends the process without a word."""
    os._exit(3)


def kill(_delivery: Delivery) -> None:
    """… by a signal."""
    os.kill(os.getpid(), signal.SIGKILL)


def abort(_delivery: Delivery) -> None:
    """… as a crash in C does."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def exit_in_thread(_delivery: Delivery) -> None:
    """… from a thread that it has started."""
    thread = threading.Thread(target=os._exit, args=(3,))
    thread.start()
    thread.join()


async def stop_loop(_delivery: Delivery) -> None:
    """Stops the event loop under everybody, itself included."""
    asyncio.get_running_loop().stop()
    await anyio.sleep_forever()


async def swallow(_delivery: Delivery) -> None:
    """Goes on for ever, however often it is cancelled."""
    while True:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)


KINDS: dict[str, Callable[[Delivery], Any]] = {
    "exit": exit_now,
    "kill": kill,
    "abort": abort,
    "exit in a thread": exit_in_thread,
    "stop the loop": stop_loop,
    "swallow": swallow,
}


async def main(path: str, kind: str) -> None:
    """Feed the deadly handler with the last of three events; leave the bus, if that can be."""
    bus = EventBus(path)
    deadly = KINDS[kind]

    async def animal(fed: Fed, delivery: Delivery) -> None:
        if fed.n == 2:
            await neighbour_has.wait()
            result = deadly(delivery)
            if result is not None:
                await result

    async def neighbour(fed: Fed) -> None:
        say("N", fed.n)
        if fed.n == 2:
            neighbour_has.set()

    bus.subscribe(Fed, name="animal", timeout=None)(animal)
    bus.subscribe(Fed, name="neighbour")(neighbour)
    neighbour_has = anyio.Event()
    async with bus.open(stop_timeout=0.0):
        for n in range(3):
            await bus.publish(Fed(n))
            say("A", n)
        await neighbour_has.wait()
        if kind != "swallow":
            await anyio.sleep_forever()
        await anyio.wait_all_tasks_blocked()


if __name__ == "__main__":
    _, path, kind, backend = sys.argv
    anyio.run(main, path, kind, backend=backend)
