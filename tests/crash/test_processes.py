"""Four processes on one file, killed at random moments; see `processes` and `checks` for what must hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash import processes
from tests.crash.nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Where the programs come from that are killed."""
    with Nursery() as nursery:
        yield nursery


@pytest.mark.parametrize("number", range(2))
def test_nothing_acknowledged_is_lost_by_kills_among_several(nursery: Nursery, number: int) -> None:
    """Whoever of four is killed, and however many: what was acknowledged is settled once by every subscription, in order."""
    case = processes.case(1, number, nursery)
    assert not case.faults, "\n".join(case.faults)
    assert case.checked >= processes.KILLS
