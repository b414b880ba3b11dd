"""The SQLite store against the oracle: the short form of that part of the campaign."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation.store_steps import STEPS, History, cases

HISTORIES = 50


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_as_the_oracle(seed: int) -> None:
    """Whatever the batches, the store says and holds what the oracle does, also when it is opened again in between."""
    assert HISTORIES * 4 * STEPS == 20_000
    faults = [f"{case.what}: {fault}" for case in itertools.islice(cases(seed), HISTORIES) for fault in case.faults]
    assert not faults, "\n".join(faults[:20])


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_as_the_oracle_made_simple(chance: random.Random, steps: int) -> None:
    """The same for short histories, of which hypothesis makes the simplest that differs."""
    with History(chance, None).opened() as history:
        for _ in range(steps):
            history.step()
        history.check_all()
