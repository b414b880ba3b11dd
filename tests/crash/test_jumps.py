"""The wall clock jumps while a bus works; see `jumps` for what must hold."""

from __future__ import annotations

import pytest

from tests.crash import jumps


@pytest.mark.parametrize("number", range(4))
def test_jumps_of_the_wall_clock(number: int) -> None:
    """By an hour or ten years, forwards and backwards: nothing is lost, nothing delivered before the clock has shown its time."""
    case = jumps.case(1, number)
    assert not case.faults, case.told()
