"""What is decided after a failed attempt."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus._retry import LONGEST, RetryPolicy, next_delay
from eventbus.errors import ConfigurationError, EventBusError, Reject, RetryAfter

attempts = st.integers(1, 10_000)
randoms = st.floats(0, 1, exclude_max=True)
policies = st.builds(
    RetryPolicy,
    attempts=st.none() | st.integers(1, 20_000),
    first=st.floats(0, 1e6),
    factor=st.floats(1, 1e6),
    cap=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
)


def middle() -> float:
    """A random number that makes jitter vanish."""
    return 0.5


def delay(policy: RetryPolicy, attempt: int, error: BaseException | None = None, random: float = 0.5) -> float | None:
    return next_delay(policy, attempt, error or ValueError("down"), lambda: random)


def test_the_defaults_try_eight_times_with_growing_delays() -> None:
    """The documented defaults: 0.2 s, three times as long each time, at most a minute, dead after the eighth attempt."""
    delays = [delay(RetryPolicy(), attempt) for attempt in range(1, 9)]
    assert delays[:-1] == pytest.approx([0.2, 0.6, 1.8, 5.4, 16.2, 48.6, 60.0])
    assert delays[-1] is None


@given(policies, attempts, randoms)
def test_a_delay_is_never_negative_and_never_longer_than_cap_and_jitter(policy: RetryPolicy, attempt: int, random: float) -> None:
    """Whatever the policy, the attempt and the luck, a delay lies between 0 and the cap made longer by the jitter."""
    seconds = delay(policy, attempt, random=random)
    assert seconds is None or 0 <= seconds <= policy.cap * (1 + policy.jitter) * (1 + 1e-9)


@given(policies, attempts, randoms)
def test_a_delivery_is_given_up_exactly_when_its_attempts_are_used_up(policy: RetryPolicy, attempt: int, random: float) -> None:
    """An ordinary error is retried as long as attempts are left, and no longer."""
    used_up = policy.attempts is not None and attempt >= policy.attempts
    assert (delay(policy, attempt, random=random) is None) == used_up


@given(policies, attempts)
def test_delays_do_not_shrink(policy: RetryPolicy, attempt: int) -> None:
    """Without jitter, each delay is at least as long as the one before."""
    before, after = delay(policy, attempt), delay(policy, attempt + 1)
    assert before is None or after is None or after >= before


@given(policies, attempts, randoms)
def test_jitter_stays_within_its_fraction(policy: RetryPolicy, attempt: int, random: float) -> None:
    """Jitter moves a delay by at most its fraction, either way."""
    plain, moved = delay(policy, attempt), delay(policy, attempt, random=random)
    if plain is not None and moved is not None:
        assert abs(moved - plain) <= plain * policy.jitter + 1e-9


def test_jitter_reaches_both_ends() -> None:
    """The lowest random number gives the shortest delay, the highest almost the longest."""
    policy = RetryPolicy(first=10, jitter=0.5)
    assert delay(policy, 1, random=0.0) == pytest.approx(5)
    assert delay(policy, 1, random=math.nextafter(1, 0)) == pytest.approx(15)


def test_without_jitter_no_randomness_is_asked_for() -> None:
    """A policy without jitter is deterministic: a simulation that records random numbers sees none."""

    def never() -> float:
        raise AssertionError

    assert next_delay(RetryPolicy(jitter=0), 1, ValueError(), never) == 0.2


@pytest.mark.parametrize("factor", [1.0, 3, 3.0, 1e9])
def test_the_ten_thousandth_attempt_does_not_overflow(factor: float) -> None:
    """A policy that never gives up goes on for ever, at its cap."""
    policy = RetryPolicy(attempts=None, first=1, factor=factor, cap=60, jitter=0)
    assert delay(policy, 10_000) == (1 if factor == 1 else 60)
    assert delay(RetryPolicy(attempts=None, first=0, factor=factor), 10_000) == 0


@given(policies, attempts, st.floats(0, 1e6), randoms)
def test_retry_after_is_kept_exactly(policy: RetryPolicy, attempt: int, seconds: float, random: float) -> None:
    """`RetryAfter` overrides the policy's delay, cap and jitter, but not its number of attempts."""
    used_up = policy.attempts is not None and attempt >= policy.attempts
    assert delay(policy, attempt, RetryAfter(seconds), random) == (None if used_up else seconds)


def test_retry_after_is_stronger_than_give_up_on() -> None:
    """A handler that asks for another attempt gets it, even if its policy gives up on every exception."""
    assert delay(RetryPolicy(give_up_on=(Exception,)), 1, RetryAfter(5)) == 5


@pytest.mark.parametrize(
    ("asked", "got"), [(-1, 0.0), (math.inf, LONGEST), (1e300, LONGEST), (math.nan, 0.2), ("soon", 0.2), (None, 0.2)]
)
def test_a_nonsensical_retry_after_does_no_harm(asked: Any, got: float) -> None:
    """A delay that is no delay becomes the nearest one, or the policy's: it never stops the lane."""
    assert delay(RetryPolicy(), 1, RetryAfter(asked)) == pytest.approx(got)


@given(policies, attempts)
def test_reject_gives_up_at_once(policy: RetryPolicy, attempt: int) -> None:
    """`Reject` ends a delivery whatever the policy says."""
    assert delay(policy, attempt, Reject("no such customer")) is None


def test_give_up_on_ends_a_delivery_at_once() -> None:
    """An exception of a class in `give_up_on`, or of a subclass, is not retried; others are."""
    policy = RetryPolicy(attempts=None, give_up_on=(LookupError, TypeError))
    assert delay(policy, 1, KeyError("x")) is None
    assert delay(policy, 1, TypeError("x")) is None
    assert delay(policy, 1, ValueError("x")) is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attempts": 0}, "attempts=0"),
        ({"attempts": -1}, "an int from 1"),
        ({"attempts": 2.0}, "None to never give up"),
        ({"attempts": True}, "attempts=True"),
        ({"first": -0.1}, "first=-0.1"),
        ({"first": math.nan}, "first=nan"),
        ({"first": "1"}, "expected seconds"),
        ({"factor": 0.5}, "from 1"),
        ({"factor": math.inf}, "factor=inf"),
        ({"cap": -1}, "cap=-1"),
        ({"cap": math.inf}, "cap=inf"),
        ({"cap": None}, "cap=None"),
        ({"jitter": 1.5}, "from 0 to 1"),
        ({"jitter": True}, "jitter=True"),
        ({"give_up_on": ValueError}, "mind the comma"),
        ({"give_up_on": (ValueError("x"),)}, "not an exception class"),
        ({"give_up_on": (int,)}, "not an exception class"),
    ],
)
def test_a_wrong_policy_is_refused_with_what_was_expected(options: dict[str, Any], text: str) -> None:
    """A policy that cannot work is an error where it is written, of the package's own tree, and says what to write."""
    with pytest.raises(ConfigurationError, match=text) as caught:
        RetryPolicy(**options)
    assert isinstance(caught.value, EventBusError)
