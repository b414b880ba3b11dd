"""Time and ids: the only place that asks the machine for either.

Everything on the way publish → journal → store → lanes → workers → outcome that needs the time or a new id is given a `Clock`
and an `Ids`, so that a simulation can replace them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

_COUNTER_BITS = 62
_VARIANT = 0b10 << _COUNTER_BITS


class Clock(Protocol):
    """Where the bus takes the time from."""

    def time(self) -> float:
        """Unix seconds. It may jump; it dates what is stored."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start that never go back; they measure every wait."""


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        """Unix seconds, to the microsecond, so that a datetime holds them exactly."""
        return time.time_ns() // 1000 / 1_000_000

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return time.monotonic()


def to_datetime(seconds: float) -> datetime:
    """Unix seconds as an aware datetime in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


class Ids:
    """Event ids: UUID version 7 (RFC 9562), as text, strictly increasing from call to call, from any thread.

    The 48 bits of time only grow; within a millisecond the 62 random bits count up from a random start (RFC 9562, 6.2,
    method 2). Ordered ids keep inserts at the right edge of the unique index.
    """

    def __init__(self, clock: Clock, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._entropy = entropy
        self._lock = threading.Lock()
        self._millisecond = 0
        self._prefix = ""
        self._counter = 0

    def next(self) -> str:
        """The next id."""
        with self._lock:
            millisecond = int(self._clock.time() * 1000)
            if millisecond > self._millisecond:
                self._start(millisecond)
            self._counter += 1
            low = self._counter
        return f"{self._prefix}-{low >> 48:04x}-{low & 0xFFFFFFFFFFFF:012x}"

    def _start(self, millisecond: int) -> None:
        seed = int.from_bytes(self._entropy(10), "big")
        # The counter's top bit starts at 0, so that counting up never reaches the variant bits.
        self._counter = _VARIANT | (seed & ((1 << (_COUNTER_BITS - 1)) - 1))
        high = f"{millisecond:012x}"
        self._prefix = f"{high[:8]}-{high[8:]}-7{seed >> 68:03x}"
        self._millisecond = millisecond
