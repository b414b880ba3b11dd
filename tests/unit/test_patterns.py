"""Patterns of type names: asked about one type as about many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus._serving import lanes_wanted
from eventbus.stores.base import Patterns, covers

NAMES = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map(".".join)
PATTERNS = st.lists(st.one_of(NAMES, NAMES.map(lambda name: f"{name}.*"), st.just("*")), max_size=4)


@given(PATTERNS, st.one_of(NAMES, NAMES.map(lambda name: f"{name}.*")))
def test_patterns_made_ready_cover_what_they_cover(patterns: list[str], asked: str) -> None:
    """A type, and a pattern."""
    assert Patterns(patterns).cover(asked) == covers(patterns, asked)


@given(PATTERNS, st.lists(NAMES, unique=True))
def test_the_types_that_patterns_mean(patterns: list[str], known: list[str]) -> None:
    """Each once: the names among the patterns, whether they are known or not, and what is known and matches."""
    names = Patterns(patterns).names(known)
    assert len(names) == len(set(names))
    assert set(names) == {each for each in patterns if not each.endswith("*")} | {
        each for each in known if covers(patterns, each)
    }


class _Counted:
    """The types of a log, and how often somebody has gone through them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return (f"t{number}" for number in range(self.count))


@pytest.mark.parametrize(("types", "times"), [(("t1", "t2"), 0), (("t1", "x.*"), 1), (("*",), 1)])
def test_a_subscription_to_names_does_not_go_through_the_types_of_the_log(types: tuple[str, ...], times: int) -> None:
    """With a thousand subscriptions and a thousand types that was a million questions, in one go on the loop."""
    known = _Counted(10)
    lanes_wanted("type", 1, types, dict.fromkeys(types, 0), known)
    assert known.times == times
