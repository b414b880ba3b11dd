"""What the next commit takes: an outcome stands for another one only where nobody waits to be told of that one."""

from __future__ import annotations

from eventbus._pending import Pending
from eventbus.stores.base import Refusal, Unit


class OneLane:
    """A lane that is told nothing here."""

    def confirmed(self, unit: Unit, serial: int, refusal: Refusal | None, *, conflict: bool) -> None:
        """What became of a unit."""


def unit(checkpoint: int, epoch: int = 1) -> Unit:
    return Unit("stock", "", epoch, "log", checkpoint, checkpoint)


def test_a_checkpoint_that_moves_on_stands_for_the_one_before() -> None:
    """Of a lane's plain outcomes only the last is written."""
    pending, lane = Pending(), OneLane()
    for n in (1, 2, 3):
        pending.add(lane, unit(n), n)
    assert pending.units == [(lane, unit(3), 3)]


def test_a_lane_that_was_lost_does_not_stand_for_the_one_taken_anew() -> None:
    """Both are of one name, and the store refuses the old one's outcomes: those of the new one are written all the same."""
    pending, lost, new = Pending(), OneLane(), OneLane()
    pending.add(new, unit(1, epoch=2), 1)
    pending.add(lost, unit(1, epoch=1), 1)
    pending.add(new, unit(2, epoch=2), 2)
    assert pending.units == [(new, unit(2, epoch=2), 2), (lost, unit(1, epoch=1), 1)]


def test_a_lane_that_was_set_back_does_not_stand_for_itself_before() -> None:
    """What it settled in the epoch before, and what is refused with it, is told apart from what comes then."""
    pending, lane = Pending(), OneLane()
    pending.add(lane, unit(5, epoch=1), 5)
    pending.add(lane, unit(1, epoch=2), 6)
    assert [each.epoch for _, each, _ in pending.units] == [1, 2]
