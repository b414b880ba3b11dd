"""Every operation of the disk fails, once and for ever, through a short program; see `io_errors`."""

from __future__ import annotations

import pytest

from tests.faults import io_errors

PARTS = 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_an_answer_holds_whatever_operation_of_the_disk_fails(part: int) -> None:
    """Acknowledged is there, refused is not, in doubt only while the disk fails; after one failure the store recovers by itself."""
    case = io_errors.case(1, 0, part, PARTS)
    assert not case.faults, case.told()
    assert case.checked > 300
