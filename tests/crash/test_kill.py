"""A process that publishes and handles is killed, at random moments and at every fail point; see `checks` for what must hold."""

from __future__ import annotations

from pathlib import Path

import pytest

import eventbus
from tests.crash import at_points, campaign
from tests.crash.failpoints import POINTS, VARIABLE
from tests.crash.nursery import Nursery

pytestmark = pytest.mark.timeout(300)  # each wait has a patience of its own, and says what did not come


@pytest.mark.parametrize("number", range(8))
def test_nothing_acknowledged_is_lost_by_a_kill(nursery: Nursery, number: int) -> None:
    """What was acknowledged is in the log and settled by every subscription, in order, once; whatever moment the kill chose."""
    case = campaign.case(1, number, nursery)
    assert not case.faults, case.told()
    assert case.checked == campaign.KILLS


@pytest.mark.parametrize("number", range(at_points.CASES))
def test_nor_by_a_kill_at_a_fail_point(nursery: Nursery, number: int) -> None:
    """So it is for a kill before or after each commit, claim, WAL checkpoint, …, and when recovering from it is interrupted."""
    case = at_points.case(1, number, nursery)
    assert not case.faults, case.told()


def test_every_fail_point_has_its_turn() -> None:
    """The short form kills at all of them; nothing of them stands in the library."""
    assert [path for path in Path(eventbus.__path__[0]).rglob("*.py") if VARIABLE in path.read_text()] == []
    assert {point for number in range(at_points.CASES) for point in at_points.share(1, number)} == set(POINTS)
    assert len({point.name for point in POINTS}) == len(POINTS)
