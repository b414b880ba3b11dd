"""A web process and a worker process on one file; the worker is killed, and another one goes on.

    python examples/two_processes.py [FILE]

The web process publishes and handles nothing (`dispatch=False`); it still waits until the worker has handled what it published.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs

from eventbus import EventBus, HandlingFailed, Receipt, event


@event("shop.placed", key="order_id")
@attrs.frozen
class Placed:
    order_id: str


def make_bus(path: str) -> EventBus:
    """Both processes declare the same; what each dispatches is said when it opens."""
    bus = EventBus(path)

    @bus.subscribe(Placed, name="mailer", order="key")
    async def mail(_placed: Placed) -> None:
        await asyncio.sleep(0.02)

    return bus


async def worker(path: str) -> None:
    async with make_bus(path):
        await asyncio.sleep(3600)


def start_worker(path: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, path, "worker"])  # noqa: S603  # this very file


async def until_handled(receipt: Receipt) -> None:
    """Wait for it, also while no worker is there: then `handled` says so at once."""
    while True:
        try:
            await receipt.handled(timeout=30)
        except HandlingFailed as error:
            if not error.blocked:
                raise
            await asyncio.sleep(0.02)
        else:
            return


async def web(path: str) -> None:
    first = start_worker(path)
    second = None
    try:
        async with make_bus(path).open(dispatch=False) as bus:
            await until_handled(await bus.publish(Placed("o-0")))
            print("handled by a worker: o-0")
            receipts = await bus.publish_many([Placed(f"o-{n}") for n in range(1, 101)])
            first.kill()
            first.wait()
            second = start_worker(path)
            for receipt in receipts:
                await until_handled(receipt)
            print("killed, started again, and handled: o-1 to o-100")
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait()


if __name__ == "__main__":
    if sys.argv[2:] == ["worker"]:
        asyncio.run(worker(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(web(sys.argv[1] if len(sys.argv) > 1 else str(Path(folder) / "shop.db")))
