"""Handlers that end their process, or do not let it end: nothing acknowledged is lost with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eventbus import Delivery, EventBus
from tests.faults.deadly import KINDS
from tests.faults.test_handler_zoo import Fed


def run_until_dead(db: str, kind: str, backend: str) -> list[str]:
    """Run the program; what it has said."""
    command = [sys.executable, "-m", "tests.faults.deadly", db, kind, backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        if kind == "swallow":
            assert program.stderr is not None
            assert any("does not end although it is cancelled" in line for line in program.stderr)
            assert program.poll() is None
            program.kill()
        out, errors = program.communicate(timeout=30)
    assert program.returncode != 0, errors
    return out.split("\n")


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_lost_with_the_process(db: str, anyio_backend_name: str, kind: str) -> None:
    """Others had their events meanwhile; after the next start the deadly one is delivered again, and nothing is lost."""
    if kind == "stop the loop" and anyio_backend_name == "trio":
        pytest.skip("trio's loop cannot be stopped")
    said = run_until_dead(db, kind, anyio_backend_name)
    acknowledged = {int(line[2:]) for line in said if line.startswith("A")}
    assert {line for line in said if line.startswith("N")} == {"N 0", "N 1", "N 2"}
    assert acknowledged >= {0, 1}

    bus, attempts, neighbour = EventBus(db), [], []

    @bus.subscribe(Fed, name="animal")
    async def tame(fed: Fed, delivery: Delivery) -> None:
        attempts.append((fed.n, delivery.attempt))

    @bus.subscribe(Fed, name="neighbour")
    async def note(fed: Fed) -> None:
        neighbour.append(fed.n)

    async with bus:
        assert await bus.drain(timeout=5) == {}
        stored = [envelope.position async for envelope in bus.history()]
        assert await bus.dead_letters.list() == []
    assert len(stored) == 3
    # asyncio.run cancels every task when its loop was stopped, which the handler cannot be told from one that cancels itself.
    assert attempts[-1] == (2, 2 if kind == "stop the loop" else 1)
    assert len(attempts) == len(set(attempts))
    assert neighbour == sorted(set(neighbour))
