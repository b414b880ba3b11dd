"""The whole bus in a simulated world: the short form of that part of the campaign."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests.simulation.bus import cases

RUNS = 250


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_programs(seed: int) -> None:
    """Whatever handlers, publishers, the store and crashes do: nothing acknowledged is lost, and all is as promised."""
    faults = [f"{case.what}: {fault}" for case in itertools.islice(cases(seed), RUNS) for fault in case.faults]
    assert not faults, "\n".join(faults[:20])


def test_a_seed_replays_exactly() -> None:
    """A run can be had again, to the last line of its trace."""
    command = [sys.executable, "-m", "tests.simulation.bus", "1-5"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    traces = [subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout for _ in range(2)]
    assert traces[0] == traces[1]
    assert len(traces[0].splitlines()) > 100
