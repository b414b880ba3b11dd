"""What the behaviour tests share: something to write down what handlers saw, and to wait for it without sleeping.

recorder = Recorder()
bus.subscribe(Placed)(recorder.note)        # or call recorder.add(x) in a handler of your own, from any thread
async with bus:
    await bus.publish(Placed("o-1"))
    assert await recorder.wait_for(1) == [Placed("o-1")]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from eventbus import RetryPolicy
from eventbus._clock import SystemClock
from eventbus._loop import current_loop
from eventbus._threads import Crossing
from eventbus.errors import StoreBusy
from eventbus.stores.base import Batch, Committed, Register
from eventbus.stores.sqlite import SQLiteStore

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


async def until(reached: Callable[[], object]) -> None:
    """Wait until this is so."""
    with anyio.fail_after(10):
        while not reached():
            await anyio.lowlevel.checkpoint()


class HookRecorder:
    """A hook that writes down moments of some kinds."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.recorder = Recorder()
        self._kinds = kinds

    def __call__(self, moment: object) -> None:
        if isinstance(moment, self._kinds):
            self.recorder.add(moment)


class GatedStore(SQLiteStore):
    """A SQLite store whose commits of published events can be held up.

    Attributes:
        arrived: notes the number of events of each such commit, as it arrives, also while it is held.
    """

    def __init__(self, path: str = ":memory:") -> None:
        super().__init__(path, durability="fast")
        self.arrived = Recorder()
        self._gate = threading.Event()
        self._gate.set()

    def hold(self) -> None:
        """Hold up commits that append events, until `release`."""
        self._gate.clear()

    def release(self) -> None:
        """Let commits go on."""
        self._gate.set()

    def commit(self, batch: Batch) -> Committed:
        """Commit, when the gate is open."""
        if batch.appends:
            self.arrived.add(sum(len(group) for group in batch.appends))
            self._gate.wait(10)
        return super().commit(batch)


class RefusingStore(SQLiteStore):
    """A SQLite store in memory that refuses a number of transactions that register subscriptions, as busy.

    Attributes:
        registered: notes each registration that was committed.
    """

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.registered = Recorder()
        self._refusals = 0

    def refuse(self, count: int) -> None:
        """Refuse as many from now on."""
        self._refusals = count

    def commit(self, batch: Batch) -> Committed:
        """Commit, or refuse."""
        registers = [command for command in batch.commands if isinstance(command, Register)]
        if registers and self._refusals:
            self._refusals -= 1
            raise StoreBusy("refused by the test")
        committed = super().commit(batch)
        for command in registers:
            self.registered.add(command)
        return committed


class MovableClock:
    """The machine's clock, of which the time of day can be moved on. What is measured is not."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._offset = 0.0

    def move(self, by: timedelta) -> None:
        """Move the time of day on."""
        self._offset += by.total_seconds()

    def time(self) -> float:
        """The machine's time of day, moved."""
        return self._clock.time() + self._offset

    def monotonic(self) -> float:
        """The machine's."""
        return self._clock.monotonic()


class Hurrying:
    """A clock that goes `pace` times as fast as the machine's: what is due in an hour is due soon."""

    def __init__(self, pace: float) -> None:
        self._real = SystemClock()
        self._pace = pace
        self._start = self._real.time(), self._real.monotonic()

    def time(self) -> float:
        return self._start[0] + self.monotonic()

    def monotonic(self) -> float:
        return (self._real.monotonic() - self._start[1]) * self._pace


class Later:
    """The machine's clock, so many seconds ahead: a restart with it is one after that time."""

    def __init__(self, seconds: float) -> None:
        self._real = SystemClock()
        self._seconds = seconds

    def time(self) -> float:
        return self._real.time() + self._seconds

    def monotonic(self) -> float:
        return self._real.monotonic()


class HandClock:
    """A clock that goes only when it is told to, and counts how often it is looked at."""

    def __init__(self) -> None:
        self.looks = 0
        self._now = 1_000.0

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def time(self) -> float:
        return 1_700_000_000.0 + self._now

    def monotonic(self) -> float:
        self.looks += 1
        return self._now

    def wait_for_looks(self, count: int) -> None:
        """Block a handler's thread until the bus has looked at the clock so often that it knows the time."""
        seen = self.looks + count
        while self.looks < seen:
            time.sleep(0.001)


def threads_of_the_bus() -> list[str]:
    """Threads of ours that run. Not a count of all: the test runner's own come and go."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eventbus")]


def hold_up_first_crossing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The next time that a plain handler is to be run, its thread does not come to it before the event is set."""
    gate, held_up, run = threading.Event(), threading.Event(), Crossing.run

    def late(crossing: Crossing) -> None:
        if not held_up.is_set():
            held_up.set()
            assert gate.wait(5)
        run(crossing)

    monkeypatch.setattr(Crossing, "run", late)
    return gate
