"""When a failed attempt is made again: pure decisions, without a clock, a bus or a store.

On the way publish → journal → store → lanes → workers → *outcome* this is asked once for each failed attempt. In go the
policy, the number of attempts, the error and a source of randomness; out comes the delay, or None for a dead letter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs

from eventbus.errors import ConfigurationError, Reject, RetryAfter

LONGEST = 100 * 365 * 86_400.0
"""Seconds in about 100 years. No delay is longer, so that a due time is always a date that can be stored and shown."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _between(low: float, high: float, unit: str) -> Callable[[object, attrs.Attribute[float], float], None]:
    def check(_policy: object, field: attrs.Attribute[float], value: float) -> None:
        if not (_is_number(value) and low <= value <= high):  # also refuses NaN
            raise ConfigurationError(f"RetryPolicy({field.name}={value!r}): expected {unit} from {low:,g} to {high:,g}")

    return check


def _check_attempts(_policy: object, _field: object, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigurationError(
            f"RetryPolicy(attempts={value!r}): expected how often the handler is run at most, an int from 1 "
            "(which never tries again), or None to never give up"
        )


def _check_give_up_on(_policy: object, _field: object, value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigurationError(
            f"RetryPolicy(give_up_on={value!r}): expected a tuple of exception classes, such as (ValueError,); mind the comma"
        )
    for item in value:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise ConfigurationError(f"RetryPolicy(give_up_on=…): {item!r} is not an exception class")


@attrs.frozen
class RetryPolicy:
    """How often, and after what delays, a failed delivery is tried again.

    The delay after the n-th failed attempt is `first * factor ** (n - 1)` seconds, at most `cap`, then made longer or shorter
    by chance by at most the fraction `jitter`, so that what failed together does not come back together. It is the least
    delay: an attempt may come later, never sooner. The defaults try 8 times within about 2½ minutes.

    Attributes:
        attempts: how often the handler is run at most, the first run included; None never gives up.
        first: seconds after the first failed attempt.
        factor: by which each delay is longer than the one before, from 1.
        cap: seconds, before jitter.
        jitter: from 0 to 1.
        give_up_on: exception classes that end the delivery at once, as `Reject` does.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    attempts: int | None = attrs.field(default=8, validator=_check_attempts)
    first: float = attrs.field(default=0.2, validator=_between(0, LONGEST, "seconds"))
    factor: float = attrs.field(default=3.0, validator=_between(1, 1e9, "a factor"))
    cap: float = attrs.field(default=60.0, validator=_between(0, LONGEST, "seconds"))
    jitter: float = attrs.field(default=0.1, validator=_between(0, 1, "a fraction"))
    give_up_on: tuple[type[BaseException], ...] = attrs.field(default=(), validator=_check_give_up_on)


def next_delay(policy: RetryPolicy, attempt: int, error: BaseException, random: Callable[[], float]) -> float | None:
    """Seconds until the next attempt, or None to give up.

    `RetryAfter` has its delay kept exactly, even if `give_up_on` names it, but counts as an attempt like any other failure.

    Args:
        attempt: attempts made so far, the failed one included; from 1.
        error: what the failed attempt raised.
        random: gives a number from 0 up to and without 1; asked only where the delay has jitter.
    """
    if isinstance(error, Reject):
        return None
    if policy.attempts is not None and attempt >= policy.attempts:
        return None
    if isinstance(error, RetryAfter):
        asked = _asked(error)
        return _usual(policy, attempt, random) if asked is None else asked
    if isinstance(error, policy.give_up_on):
        return None
    return _usual(policy, attempt, random)


def _asked(error: RetryAfter) -> float | None:
    """The delay asked for; None where the handler asked for nonsense, which must not stop the lane."""
    seconds: object = error.seconds
    if not isinstance(seconds, (int, float)) or math.isnan(seconds):
        return None
    return float(min(max(seconds, 0.0), LONGEST))


def _usual(policy: RetryPolicy, attempt: int, random: Callable[[], float]) -> float:
    delay = min(_grown(policy.first, policy.factor, attempt - 1), policy.cap)
    if policy.jitter:
        delay *= 1 + policy.jitter * (2 * random() - 1)
    return min(delay, LONGEST)


def _grown(first: float, factor: float, times: int) -> float:
    try:
        return first * float(factor) ** times
    except OverflowError:  # floats end at 1e308, reached after 646 attempts with the default factor
        return math.inf if first else 0.0


def seconds_until(due_at: float, since: float | None, now: float) -> float:
    """How long to wait for an attempt that is stored as due at `due_at`, where it was put off at `since` or later.

    Where the clock has been set back since then, it is no longer than the wait was from `since` on: a lane must not stand still
    for the ten years by which a clock was wrong. Without `since`, nothing has failed: it is due.
    """
    return 0.0 if since is None else max(0.0, due_at - max(now, since))
