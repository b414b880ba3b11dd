"""The faults of `tests.planted` can still be planted."""

from __future__ import annotations

import pytest

from tests.planted import PLANTS, ROOT, Plant


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_can_be_planted(plant: Plant) -> None:
    """The text that it replaces stands in its file, once, and the tests that should find it are there."""
    for change in plant.changes:
        assert (ROOT / change.file).read_text().count(change.old) == 1, change.file
        assert change.old != change.new
    assert [test for test in plant.tests if not (ROOT / test).exists()] == []
