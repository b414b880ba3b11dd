"""A million events while one handler is stalled, under a limit on memory; run by `test_memory`.

    python -m tests.faults.stalled DATABASE EVENTS BACKEND

Prints, as JSON, what was handled when, and how the resident memory grew.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import anyio
import attrs

from eventbus import EventBus

ROOM = 64 * 1024 * 1024
"""Bytes of address space that the bus may take beside what the program has when it is open."""
BATCH = 500


@attrs.frozen
class Tick:
    n: int


def _size(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


async def main(path: str, events: int) -> None:
    """Publish; then let the stalled handler go, and wait for the rest."""
    bus = EventBus(path, durability="fast")
    go_on = anyio.Event()
    stalled: list[int] = [0, 0]
    flowing: list[int] = [0, 0]

    @bus.subscribe(Tick, name="stalled", timeout=None)
    async def wait(tick: Tick) -> None:
        if not go_on.is_set():
            await go_on.wait()
        stalled[0] += 1
        stalled[1] += tick.n

    @bus.subscribe(Tick, name="flows")
    async def flow(tick: Tick) -> None:
        flowing[0] += 1
        flowing[1] += tick.n

    async with bus:
        limit = _size("VmSize") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = _size("VmRSS")
        for first in range(0, events, BATCH):
            await bus.publish_many([Tick(n) for n in range(first, first + BATCH)])
        lag = await bus.stats()
        while flowing[0] < events:
            await anyio.sleep(0.01)
        held = list(stalled)
        go_on.set()
        left = await bus.drain()
    grown = _size("VmHWM") - before
    stats = lag.subscriptions["stalled"]
    said = {"flowing": flowing, "held": held, "stalled": stalled, "left": dict(left), "grown": grown, "lag": stats.lag}
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    _, path, events, backend = sys.argv
    anyio.run(main, path, int(events), backend=backend)
