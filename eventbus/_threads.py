"""Plain handlers: a lane's attempts cross into a thread, several at once, and their outcomes come back one by one.

publish → journal → store → lanes → *workers* → outcome. Crossing between the loop and a thread costs more than most handlers,
so a lane crosses once a quantum. A thread cannot be cancelled: when an attempt outlives its timeout, the crossing is abandoned;
the attempt has failed, what did not run yet is given back, and the lane stays closed until the thread returns.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING

from eventbus._attempts import run_plain, timed_out
from eventbus._lanes import Lane
from eventbus._outcomes import RELEASED, Acked, Attempt, Failed, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eventbus._clock import Clock
    from eventbus._gates import Worker
    from eventbus._loop import Loop, Waiter

_log = logging.getLogger("eventbus")

QUANTUM = 0.010
"""Seconds after which a crossing starts no further attempt."""


class Threads:
    """Daemon threads for plain handlers, made when they are needed and used again."""

    def __init__(self, name: str, make: Callable[[str], Worker]) -> None:
        self._name = name
        self._make = make
        self._idle: list[Worker] = []
        self._made = 0

    def get(self) -> Worker:
        """A thread that has nothing to do."""
        if self._idle:
            return self._idle.pop()
        self._made += 1
        return self._make(f"{self._name}-handler-{self._made}")

    def put(self, thread: Worker) -> None:
        """It has nothing to do again."""
        self._idle.append(thread)

    def stop(self) -> None:
        """End the idle ones."""
        while self._idle:
            thread = self._idle.pop()
            thread.stop()
            thread.join()


class Crossing:
    """Some attempts of one lane on their way through a thread."""

    def __init__(self, lane: Lane, attempts: Sequence[Attempt], clock: Clock, loop: Loop, context: Context) -> None:
        self._lane = lane
        self._epoch = lane.epoch
        self._attempts = deque(attempts)
        self._clock = clock
        self._loop = loop
        self._context = context
        self._lock = threading.Lock()
        self._abandoned = False
        self._current: Attempt | None = None
        self._results: deque[tuple[Attempt, Outcome]] = deque()
        self._posted = False
        self.started: float | None = None
        """When the attempt that runs began (monotonic); None while none runs."""
        self.finished: Waiter = loop.waiter()
        self.on_exit: Callable[[BaseException], object] = lambda _error: None

    # -------------------------------------------------------------- in the thread

    def run(self) -> None:
        """Run the attempts in order, until one fails or the quantum is over."""
        end = self._clock.monotonic() + QUANTUM
        while (attempt := self._next(end)) is not None:
            outcome = run_plain(attempt, self._context)
            self._results.append((attempt, outcome))
            self.started = None
            if not self._posted:
                self._posted = True
                self._post(self._settle)
            if not isinstance(outcome, Acked):
                break
        self._post(self._finish)

    def _next(self, end: float) -> Attempt | None:
        now = self._clock.monotonic()
        with self._lock:
            if self._abandoned or not self._attempts or (self._current is not None and (now >= end or self._must_wait())):
                return None
            self._current = self._attempts.popleft()
            self.started = now
            return self._current

    def _must_wait(self) -> bool:
        """Whether the lane has been paused, halted or rewound since the crossing began."""
        lane = self._lane
        return lane.is_held_up() or lane.epoch != self._epoch

    def _post(self, function: Callable[[], object]) -> None:
        try:
            self._loop.post(function)
        except RuntimeError:
            _log.debug("the event loop is gone; the outcome of a handler is dropped")

    # -------------------------------------------------------------- on the loop

    def _settle(self) -> None:
        self._posted = False
        while self._results:
            attempt, outcome = self._results.popleft()
            if not isinstance(outcome, Acked):
                self.give_back_rest()
            self._settle_one(attempt, outcome)
            if isinstance(outcome, Failed) and isinstance(outcome.error, (SystemExit, KeyboardInterrupt)):
                self.on_exit(outcome.error)
        self._lane.flush()

    def _settle_one(self, attempt: Attempt, outcome: Outcome) -> None:
        if not attempt.over:
            # The crossing as a whole counts as one that runs; `settle` takes one away.
            self._lane.running += 1
            self._lane.settle(attempt, outcome)

    def give_back_rest(self) -> None:
        """Start no further attempt."""
        with self._lock:
            rest = list(self._attempts)
            self._attempts.clear()
        for attempt in reversed(rest):
            self._lane.give_back(attempt)

    def _finish(self) -> None:
        self._settle()
        self.give_back_rest()
        self._lane.running -= 1
        self._lane.rested()
        self._lane.tell_waiters()
        self.finished.set()

    def expire(self, began_before: float) -> bool:
        """If the attempt that runs began by then, wait no more for it: it has failed by its timeout."""
        with self._lock:
            if self.started is None or self.started > began_before:
                return False
            self._abandoned = True
        self._leave(release=False)
        return True

    def abandon(self) -> None:
        """Wait no more: the bus stops, and the attempt that runs is released."""
        with self._lock:
            self._abandoned = True
        self._leave(release=True)

    def _leave(self, *, release: bool) -> None:
        current = self._current
        self._settle()
        self.give_back_rest()
        if current is not None and not current.over:
            self._settle_one(current, RELEASED if release else Failed(timed_out(current)))
            self._lane.flush()
