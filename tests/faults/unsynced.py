"""A program whose disk cannot be synced for a while: run with `failing_sync.c` preloaded, by `test_failing_sync`.

python -m tests.faults.unsynced DATABASE BACKEND     # exits with 0 if all went as it must
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import attrs
import pytest

from eventbus import EventBus, PublishOutcomeUnknown, StoreUnavailable
from tests.bus.support import NO_RETRY, Recorder

BROKEN = Path(os.environ.get("FAILING_SYNC", ""))
"""While this file is there, syncs fail."""


@attrs.frozen
class Placed:
    n: int


@attrs.frozen
class Sent:
    n: int


async def main(db: str) -> None:
    bus, seen, gate = EventBus(db), Recorder(), anyio.Event()

    @bus.subscribe(Placed, name="stock", retry=NO_RETRY)
    async def handle(event: Placed) -> Sent:
        seen.add(event.n)
        if event.n == 1:
            await gate.wait()
        return Sent(event.n)

    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(10)
        await bus.publish(Placed(1))
        await seen.wait_for(2)
        BROKEN.touch()
        gate.set()  # its outcome comes to a disk that is broken
        with pytest.raises((PublishOutcomeUnknown, StoreUnavailable)):
            await bus.publish(Placed(2), idempotency_key="two")
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await bus.publish(Placed(99))
        BROKEN.unlink()
        await bus.publish(Placed(2), idempotency_key="two")
        await bus.publish(Placed(3))
        assert await bus.drain(10) == {}
        stored = [envelope.event async for envelope in bus.history(Placed)]
        assert stored == [Placed(0), Placed(1), Placed(2), Placed(3)]
        assert seen.seen == [0, 1, 2, 3]
        assert [envelope.event async for envelope in bus.history(Sent)] == [Sent(n) for n in seen.seen]
        assert await bus.dead_letters.list() == []


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], backend=sys.argv[2])
