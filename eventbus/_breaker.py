"""When a subscription is held back because the world is bad, not the event: pure decisions.

On the way publish → journal → store → lanes → workers → *outcome* a failed attempt may mean a bad event, or a bad world: a
service that is down fails every event. Several *different* events failing one after the other mean the world. What follows from
that is in `_circuit`. This is a circuit breaker: Nygard, Release It!, 2nd edition, 2018, chapter 5.
"""

from __future__ import annotations

import math

import attrs

from eventbus.errors import ConfigurationError


def _check_count(_breaker: object, field: attrs.Attribute[int], value: object) -> None:
    if field.name == "give_up" and value is None:
        return
    least = 2 if field.name == "failures" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        none = ", or None to never give up" if field.name == "give_up" else ""
        raise ConfigurationError(f"Breaker({field.name}={value!r}): expected an int from {least}{none}")


def _check_number(_breaker: object, field: attrs.Attribute[float], value: object) -> None:
    least = 1 if field.name == "factor" else 0.001
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value < math.inf:  # type: ignore[operator]  # it is a number
        raise ConfigurationError(f"Breaker({field.name}={value!r}): expected a number from {least:g}")


@attrs.frozen
class Breaker:
    """When a subscription is held back because everything fails, and how it is tried again.

    When `failures` different events have failed, and none was handled in between, the circuit opens: nothing more is
    delivered, and the attempts of these events are taken back, as if they had not been made; where one of them had become a
    dead letter, it is none. What was rejected, redriven or discarded in between stays as it is, and so does what came before it
    in its order. Then one event is tried at a time, after `first` seconds, and after each failure `factor` times as long, at most
    `cap`. These attempts do not count either. The first that succeeds closes the circuit.

    Not counted as failures: `Reject`, `RetryAfter`, what `RetryPolicy.give_up_on` names, and events that cannot be decoded. They
    say something of the event. Nor are redrives, of which the dead letter stays. Those of a replay are counted, and it is held
    back as well; but nothing of it is taken back.

    Attributes:
        failures: different events, from 2. Below that number, a failing event is dead-lettered as ever.
        first, cap: seconds. factor: from 1.
        give_up: an event that was tried so often while the circuit was open is exhausted (see `on_exhausted`), so that it cannot
            hold up a lane for ever; None never gives up. The default takes half an hour.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    failures: int = attrs.field(default=10, validator=_check_count)
    first: float = attrs.field(default=1.0, validator=_check_number)
    factor: float = attrs.field(default=2.0, validator=_check_number)
    cap: float = attrs.field(default=60.0, validator=_check_number)
    give_up: int | None = attrs.field(default=35, validator=_check_count)


def delay_of(breaker: Breaker, failed: int) -> float:
    """Seconds until the next try, after so many that have failed since the circuit opened."""
    try:
        return min(breaker.cap, breaker.first * breaker.factor**failed)
    except OverflowError:
        return breaker.cap
