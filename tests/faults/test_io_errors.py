"""Operations of the disk fail, once or for ever, through two short programs; see `io_errors`."""

from __future__ import annotations

import pytest

from tests.faults import io_errors


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(2))
def test_an_answer_holds_whatever_operation_of_the_disk_fails(number: int) -> None:
    """Acknowledged is there, refused is not, in doubt only while the disk fails; after one failure the store recovers by itself."""
    case = io_errors.case(1, number, every=5)
    assert not case.faults, case.told()
    assert case.checked > 100
