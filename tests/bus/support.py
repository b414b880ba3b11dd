"""What the behaviour tests share: something to write down what handlers saw, and to wait for it without sleeping.

    recorder = Recorder()
    bus.subscribe(Placed)(recorder.note)        # or call recorder.add(x) in a handler of your own, from any thread
    async with bus:
        await bus.publish(Placed("o-1"))
        assert await recorder.wait_for(1) == [Placed("o-1")]
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio

from eventbus import RetryPolicy
from eventbus._loop import current_loop

NO_RETRY = RetryPolicy(attempts=1)
"""Dead-letter at the first failure."""

QUICK = RetryPolicy(attempts=4, first=0.01, factor=1.0, jitter=0.0)
"""Four attempts, 10 ms apart."""


class Recorder:
    """A list of what was seen, in order, that can be waited for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Callable[[], object]]] = []

    async def note(self, thing: Any) -> None:
        """Write it down; an async handler."""
        self.add(thing)

    def add(self, thing: Any) -> None:
        """Write it down; from any thread."""
        with self._lock:
            self.seen.append(thing)
            ready = [wake for count, wake in self._waiting if count <= len(self.seen)]
            self._waiting = [each for each in self._waiting if each[0] > len(self.seen)]
        for wake in ready:
            wake()

    async def wait_for(self, count: int, timeout: float = 10) -> list[Any]:
        """Wait until `count` things have been seen; returns all that were, of which there may be more.

        Raises TimeoutError, with what was seen, after `timeout` seconds.
        """
        loop, event = current_loop(), anyio.Event()
        with self._lock:
            if len(self.seen) < count:
                self._waiting.append((count, lambda: loop.post(event.set)))
            else:
                event.set()
        with anyio.move_on_after(timeout):
            await event.wait()
        if not event.is_set():
            raise TimeoutError(f"waited {timeout} s for {count} things, saw {len(self.seen)}: {self.seen[:20]!r}")
        return list(self.seen)
