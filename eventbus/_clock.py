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
from time import monotonic
from typing import Protocol


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

    monotonic = staticmethod(monotonic)  # asked for with each event: a function of ours around it would double its time


def to_datetime(seconds: float) -> datetime:
    """Unix seconds as an aware datetime in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def shown(seconds: float) -> datetime:
    """The same of a time that is stored: its row may be damaged, and whoever looks at it is to see the rest."""
    try:
        return to_datetime(seconds)
    except (ValueError, OverflowError, OSError):
        return datetime.max.replace(tzinfo=UTC) if seconds > 0 else datetime.min.replace(tzinfo=UTC)


_SEED = 10
"""Random bytes for each millisecond."""
_SEEDS = 100


class Ids:
    """Event ids: UUID version 7 (RFC 9562), as text, strictly increasing from call to call, from any thread.

    The 48 bits of time only grow. Of the 74 random bits the last 48 count up within a millisecond (RFC 9562, 6.2, method 2),
    so that most of an id's text is made once a millisecond. Ordered ids keep inserts at the right edge of the unique index.
    """

    def __init__(self, clock: Clock, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._entropy = entropy
        self._lock = threading.Lock()
        self._millisecond = 0
        self._head = ""
        self._counter = 0
        self._random = b""

    def next(self) -> str:
        """The next id."""
        head, counter = self._reserve(1)
        return head + counter.to_bytes(6, "big").hex()

    def take(self, count: int) -> list[str]:
        """The next `count` ids, of one instant."""
        head, first = self._reserve(count)
        return [head + counter.to_bytes(6, "big").hex() for counter in range(first, first + count)]

    def _reserve(self, count: int) -> tuple[str, int]:
        """What the next ids begin with, and the number of the first of them."""
        with self._lock:
            millisecond = int(self._clock.time() * 1000)
            if millisecond > self._millisecond:
                self._start(millisecond)
            first = self._counter + 1
            self._counter += count
            return self._head, first

    def _start(self, millisecond: int) -> None:
        if len(self._random) < _SEED:
            # Many at once: a call gives up the GIL, and a busy program would have to wait to get it back.
            self._random = self._entropy(_SEEDS * _SEED)
        time, seed, self._random = f"{millisecond:012x}", self._random[:_SEED], self._random[_SEED:]
        random = int.from_bytes(seed[:4], "big")
        # The counter's top bit starts at 0, so that it never reaches the bits before it.
        self._counter = int.from_bytes(seed[4:], "big") >> 1
        self._head = f"{time[:8]}-{time[8:]}-7{random >> 20:03x}-{0x8000 | (random & 0x3FFF):04x}-"
        self._millisecond = millisecond
