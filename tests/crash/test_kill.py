"""A process that publishes and handles is killed with SIGKILL at random moments; see `campaign` for what is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.campaign import campaign


@pytest.mark.parametrize(("seed", "backend"), [("a", "asyncio"), ("b", "trio"), ("c", "asyncio")])
def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path, seed: str, backend: str) -> None:
    """What was acknowledged is in the log and settled by every subscription, in order, once; whatever moment the kill chose."""
    round_ = campaign(tmp_path, seed, 8, backend)
    assert not round_.faults, "\n".join(round_.faults)
    assert round_.kills == 8
