"""A disk that fails: what was acknowledged is kept, what was refused is not there, and it is not left open without need."""

from __future__ import annotations

import pytest

from tests.faults import failing_disk
from tests.faults.failing_disk import RUNS, compiler

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="a library that makes calls fail is compiled; there is no C compiler"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("number", range(4))
def test_calls_that_fail(number: int) -> None:
    """Whichever read, write, sync or truncate fails, once, a few times or for ever: nothing acknowledged is lost, nothing refused is stored."""
    case = failing_disk.case(1, number)
    assert not case.faults, case.told()
    assert case.checked == RUNS
