"""What a lane has around it: the subscription that it belongs to, and what all lanes of a bus have in common.

publish → journal → store → *lanes* → workers → outcome. Lanes know the rest of the bus by these two only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from eventbus.stores.base import Record

if TYPE_CHECKING:
    from eventbus._circuit import Circuit
    from eventbus._clock import Clock
    from eventbus._journal import Journal
    from eventbus._lanes import Lane
    from eventbus._loop import Loop
    from eventbus._outcomes import Attempt
    from eventbus._probation import Solo
    from eventbus._reader import Reader
    from eventbus._subscription import Subscription
    from eventbus._timers import Timers
    from eventbus.hooks import Moment


class Holder(Protocol):
    """The subscription that a lane belongs to.

    Attributes:
        paused: the reason, or None. circuit: its breaker's, or None.
        rewinding: above 0 while its lanes are being set back, so that their units may be refused.
        exclusive: the replay that holds everything else back, or None.
        stuck: threads that have outlived their timeout. workers: how many serve it. delayed: lanes that wait for one of them.
        handled, failed: attempts that have ended so.
    """

    options: Subscription
    paused: str | None
    circuit: Circuit | None
    rewinding: int
    exclusive: object
    stuck: int
    workers: int
    delayed: list[Lane]
    handled: int
    failed: int

    def pause(self, reason: str) -> None:
        """Stop giving out deliveries; the lane has stored the reason."""

    def pause_refused(self, reason: str) -> None:
        """This pause was not stored, for the outcome that it belongs to was left out."""

    def redriven(self, letter: int, due_at: float | None) -> None:
        """The store knows what became of a redriven dead letter: `due_at` if it is to be tried again."""

    def hindered(self) -> None:
        """A lane gives nothing out for now."""

    def call(self, attempt: Attempt) -> object:
        """Call the handler with what it takes. From any thread.

        Raises:
            UnknownEventType, UndecodableEvent: the event cannot be decoded.
            BaseException: whatever the handler raises.
        """

    def published(self, attempt: Attempt, result: object) -> Sequence[Record]:
        """What the attempt publishes: its outbox, and the events that the handler returned. From any thread."""


class Environment(msgspec.Struct, eq=False):
    """What lanes are given of the world, and have in common.

    Attributes:
        halted: outcomes cannot be written for now, or never again: start no further attempt.
        instance: id of this one. lease_clock: the store's; see `Store.monotonic`. deadline: the end of this instance's lease by
            it: from then on the lanes may be another's.
        committed: told of all events that enter the log. solo: which lane must be alone; see `_probation`.
    """

    clock: Clock
    timers: Timers
    loop: Loop
    journal: Journal
    reader: Reader
    random: Callable[[], float]
    schedule: Callable[[Lane], object]
    notify: Callable[[Moment], object]
    lease_clock: Callable[[], float]
    instance: str
    committed: list[Callable[[Sequence[Record]], object]] = []
    scheduled: Callable[[float], object] = lambda _due_at: None
    fenced: Callable[[Lane], object] = lambda lane: lane.move()
    halted: bool = False
    deadline: float = math.inf
    solo: Solo | None = None

    async def sleep(self, seconds: float) -> None:
        """Sleep by the clock that was given."""
        waiter = self.loop.waiter()
        self.timers.after(seconds, waiter.set)
        await waiter.wait()
