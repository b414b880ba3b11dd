"""Things to do later: one heap and one sleeping task for the whole bus.

Retries that become due, timeouts of attempts, scheduled events and upkeep all wait here, measured by the clock's monotonic
seconds, so a jump of the wall clock moves none of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import anyio

from eventbus._clock import Clock, SystemClock
from eventbus._loop import Loop

LOOK = 0.01
"""Seconds, by the machine, after which a clock that was given is looked at again: it may go at its own pace, or by hand."""


class Timers:
    """Calls functions on the loop when their time has come. Not for things that are usually called off: it forgets nothing."""

    def __init__(self, clock: Clock, loop: Loop) -> None:
        self._clock = clock
        self._loop = loop
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._tie = itertools.count()
        self._wake = loop.waiter()
        self._longest = math.inf if isinstance(clock, SystemClock) else LOOK

    def at(self, monotonic: float, function: Callable[[], object]) -> None:
        """Call a function once the monotonic clock shows `monotonic`. The function must not raise."""
        earliest = self._heap[0][0] if self._heap else math.inf
        heapq.heappush(self._heap, (monotonic, next(self._tie), function))
        if monotonic < earliest:
            self._wake.set()

    def after(self, seconds: float, function: Callable[[], object]) -> None:
        """Call a function after so many seconds."""
        self.at(self._clock.monotonic() + seconds, function)

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            now = self._clock.monotonic()
            while self._heap and self._heap[0][0] <= now:
                heapq.heappop(self._heap)[2]()
            delay = self._heap[0][0] - self._clock.monotonic() if self._heap else math.inf
            if delay > 0:
                with anyio.move_on_after(min(delay, self._longest)):
                    await self._wake.wait()
            self._wake = self._loop.waiter()
