"""Memory does not grow with what waits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults.stalled import ROOM

EVENTS = 1_000_000


@pytest.mark.timeout(150)
def test_a_million_events_against_a_stalled_handler(db: str) -> None:
    """A million events wait for a handler that is stalled, in little memory; others get theirs meanwhile, and it gets all after."""
    command = [sys.executable, "-m", "tests.faults.stalled", db, str(EVENTS), "asyncio"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout)
    all_of_them = [EVENTS, EVENTS * (EVENTS - 1) // 2]
    assert said["held"] == [0, 0]
    assert said["lag"] == 10_000  # the most that is counted
    assert said["flowing"] == said["stalled"] == all_of_them
    assert said["left"] == {}
    assert said["grown"] < ROOM
