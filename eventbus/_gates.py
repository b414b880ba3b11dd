"""Threads of ours, and how the event loop and they wait for each other.

The journal's writer and the reader are a `Worker` each, and so are those in which plain handlers run. A bus has them from its
`Loop`.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable

GIVE_WAY = 0.001
"""Seconds for which the loop gives way to a thread, at most."""


class Gate:
    """Something that one thread waits at and another opens, once for each time. A `Condition` makes a lock for each wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the one that waits, or comes next, pass; then it is closed again."""
        self._lock.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Pass when it is open; False if it was not for so long."""
        return self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX) if seconds < math.inf else -1)


class Turn:
    """How the loop gives way to a thread before it does much itself.

    A thread that is called could not begin before the loop has nothing to do, or before CPython's switch interval is over (5 ms),
    since the loop holds the GIL. When the loop waits until the thread has come, that holds the GIL for a moment, and then not
    while SQLite works; so both work at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._door = Gate()
        self._called = self._coming = self._busy = self._waited_for = self._late = False

    def call(self) -> None:
        """There is something for the thread to do; before it can take it."""
        self._called = True

    def take(self) -> None:
        """In the thread: it takes all that it was called for. It may have to wait for others before it comes."""
        with self._lock:
            self._called, self._coming = False, True

    def come(self) -> None:
        """In the thread: it begins with what it has taken."""
        with self._lock:
            self._coming, self._busy, self._late = False, True, False
            self._let_pass()

    def leave(self) -> None:
        """In the thread: it is done with it, whether or not it has come."""
        with self._lock:
            self._coming = self._busy = self._late = False
            self._let_pass()

    def _let_pass(self) -> None:
        if self._waited_for:
            self._waited_for = False
            self._door.open()

    def give_way(self) -> None:
        """On the loop: wait until the thread has come, if it was called and is not busy; at most `GIVE_WAY` seconds, and not
        again for one that is late."""
        if self._busy or self._late or not (self._called or self._coming):
            return
        with self._lock:
            if self._busy or not (self._called or self._coming):
                return
            self._waited_for = True
        passed = False
        try:
            passed = self._door.wait(GIVE_WAY)
        finally:  # a signal's handler may raise
            if not passed:
                with self._lock:
                    if self._waited_for:
                        self._waited_for, self._late = False, True
                    else:
                        self._door.wait(0)  # it has come in between


class Worker:
    """A daemon thread of ours that runs one job after another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        """Run a job after those before it. A job must not raise."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Let the thread end when the jobs before are done; does not wait."""
        self._jobs.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if it still runs after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
