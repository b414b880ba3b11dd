"""The power goes at every operation of a few programs; see `power_loss`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import power_loss
from tests.faults.recorder import Recorder


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    """The process in which the programs run."""
    with Recorder() as recorder:
        yield recorder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [1, 2])
def test_what_was_acknowledged_survives_a_loss_of_power(recorder: Recorder, number: int) -> None:
    """Whatever part of what was not synced is on the disk: one of the states that may be there, whole; never a refusal."""
    case = power_loss.case(1, number, recorder)
    assert not case.faults, case.told()
    assert case.checked > 2_500
