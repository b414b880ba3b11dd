"""The circuit of one subscription: closed while things go, open while all fails, and then tried with one event at a time.

publish → journal → store → *lanes* → workers → *outcome*. Lanes tell it of attempts that have succeeded and failed; it tells them
whether they may give out another. When it opens, it has the store take back what the failures of this run have left behind
(`Revive`), and the lanes begin again from there. It lives in memory: a bus begins with closed circuits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from eventbus._breaker import Breaker, delay_of
from eventbus._outcomes import Attempt, Failed, summary_of
from eventbus.errors import EventBusError, Reject, RetryAfter
from eventbus.hooks import CircuitClosed, CircuitOpened
from eventbus.stores.base import LaneState, Revive, Revived

if TYPE_CHECKING:
    from eventbus._lanes import Environment, Lane
    from eventbus._subscription import Subscription

_log = logging.getLogger("eventbus")

Key = tuple[str, int]
"""An event: its lane, and its position."""


class _Entry(msgspec.Struct, frozen=True):
    """An event that has failed in this run; what it was before."""

    key: str | None
    attempts: int


class Owner(Protocol):
    """The subscription."""

    options: Subscription
    lanes: dict[str, Lane]

    def begin_change(self) -> None:
        """Its lanes are being set back: give out nothing until `end_change`."""

    def end_change(self) -> None:
        """See there."""

    def was_set_back(self, states: Sequence[LaneState], done: Callable[[], object]) -> None:
        """These lanes were; have them begin again, and call `done` then."""


class Circuit:
    """One subscription's.

    Args:
        in_turn: events of a lane may be tried in turn, since they need not be handled in order.

    Attributes:
        troubled: something has failed since the last success; while it is False, a success costs one look at it.
        reason: what failed when it opened, or None while it is closed.
    """

    def __init__(self, owner: Owner, breaker: Breaker, environment: Environment, *, in_turn: bool) -> None:
        self.troubled = False
        self.reason: str | None = None
        self.due = 0.0
        """When it is tried next, unix seconds."""
        self.at_rest = environment.loop.waiter()
        """Set unless the store is taking something back."""
        self.at_rest.set()
        self._owner = owner
        self._name = owner.options.name
        self._in_turn = in_turn
        self._breaker = breaker
        self._environment = environment
        self._run: dict[Key, _Entry] = {}
        self._tried: Counter[Key] = Counter()
        self._failed = 0  # tries since it opened
        self._opening = 0  # which time it opened
        self._since = 0.0
        self._ready = False  # one attempt may be given out
        self._try: Attempt | None = None  # … and is
        self._turn: list[Lane] = []  # lanes that are asked for it, one after the other

    @property
    def is_open(self) -> bool:
        """Whether it lets nothing through, but for one attempt at a time."""
        return self.reason is not None

    # -------------------------------------------------------------- while it is closed

    def failed(self, attempt: Attempt, outcome: Failed) -> float | None:
        """An attempt has failed. None: it counts. Otherwise it does not, and is given back; or it comes again after so many
        seconds, if there are any, so that others have their turn."""
        own = outcome.final or isinstance(outcome.error, Reject | RetryAfter)  # it says something of the event
        if own or (attempt.source.beside and not self.is_open):
            self._lapse(attempt)
            return None
        if self.is_open:
            return self._failed_again(attempt)
        self.troubled = True
        key = (attempt.lane.name, attempt.record.position)
        self._run.setdefault(key, _Entry(attempt.record.key, attempt.number - 1))
        if len(self._run) < self._breaker.failures:
            return None
        self._open(outcome.error)
        return 0.0

    def succeeded(self) -> None:
        """An attempt has succeeded: the world is good."""
        self.troubled = False
        self._run.clear()
        if self.is_open:
            self.close()

    # -------------------------------------------------------------- opening

    def _open(self, error: BaseException) -> None:
        environment = self._environment
        self.reason = f"{len(self._run)} different events failed one after the other, the last with {summary_of(error)}"
        self._since = environment.clock.monotonic()
        self._opening += 1
        self._failed = 0
        self._tried.clear()
        _log.error("%s: the circuit opens: %s", self._name, self.reason)
        environment.notify(CircuitOpened(self._name, self.reason))
        self._owner.begin_change()
        self.at_rest = environment.loop.waiter()
        opening, entries = self._opening, dict(self._run)
        self._run.clear()
        for lane in self._owner.lanes.values():
            lane.flush()
        # What was settled before must not be fenced by what is set back now: that is another transaction.
        self._submit((), lambda _none: self._set_back(opening, entries))

    def _set_back(self, opening: int, entries: dict[Key, _Entry]) -> None:
        by_key = sorted(entries.items(), key=lambda item: item[0][1])
        revived = [Revived(lane, position, entry.key, entry.attempts) for (lane, position), entry in by_key]
        self._submit(revived, lambda states: self._owner.was_set_back(states, lambda: self._was_set_back(opening)))

    def _submit(self, revived: Sequence[Revived], then: Callable[[Sequence[LaneState]], object]) -> None:
        def decided(result: tuple[LaneState, ...] | Exception) -> None:
            if isinstance(result, Exception):
                _log.error("%s: what has failed could not be set back: %s", self._name, result)
                result = ()
            then(result)

        try:
            self._environment.journal.submit(Revive(self._environment.instance, self._name, tuple(revived)), decided)
        except EventBusError as error:
            decided(error)

    def _was_set_back(self, opening: int) -> None:
        self.at_rest.set()
        self._owner.end_change()
        if self.is_open and opening == self._opening:
            self._wait()

    # -------------------------------------------------------------- while it is open

    def _wait(self) -> None:
        delay = delay_of(self._breaker, self._failed)
        self.due = self._environment.clock.time() + delay
        opening = self._opening
        self._environment.timers.after(delay, lambda: self._look(opening))

    def _look(self, opening: int) -> None:
        """Let one attempt through."""
        if self.is_open and opening == self._opening and not self._ready and self._try is None:
            self._ready = True
            lanes = list(self._owner.lanes.values())
            at = self._failed % len(lanes) if lanes else 0
            self._turn = lanes[at:] + lanes[:at]
            self._ask_next()

    def _ask_next(self) -> None:
        if self._turn:
            self._turn[0].wake()
        else:
            for lane in self._owner.lanes.values():  # nothing is there: whoever has something first
                lane.wake()

    def lets(self, lane: Lane) -> bool:
        """Whether a lane may give out an attempt."""
        return not self.is_open or (self._ready and (not self._turn or self._turn[0] is lane))

    def given_out(self, lane: Lane, attempt: Attempt | None) -> None:
        """What a lane gave out after all, while it is open."""
        if attempt is not None:
            self._try, self._ready, self._turn = attempt, False, []
        elif self._turn and self._turn[0] is lane:
            self._turn.pop(0)
            self._ask_next()

    def _failed_again(self, attempt: Attempt) -> float | None:
        if attempt is not self._try:
            return 0.0  # it was under way when the circuit opened
        key = (attempt.lane.name, attempt.record.position)
        self._tried[key] += 1
        self._failed += 1
        self._try = None
        give_up = self._breaker.give_up
        if give_up is not None and self._tried[key] >= give_up:
            self._look(self._opening)
            return None
        self._wait()
        in_turn = self._in_turn and not attempt.source.beside
        return 2 * delay_of(self._breaker, self._failed) if in_turn else 0.0

    def _lapse(self, attempt: Attempt) -> None:
        """The try said nothing of the world: another one at once."""
        if attempt is self._try:
            self._try = None
            self._look(self._opening)

    def released(self, attempt: Attempt) -> None:
        """An attempt did not run to its end."""
        self._lapse(attempt)

    def close(self) -> None:
        """Let everything through again."""
        if not self.is_open:
            return
        self.reason, self._ready, self._try, self._turn = None, False, None, []
        seconds = self._environment.clock.monotonic() - self._since
        _log.warning("%s: the circuit closes again, after %.1f s", self._name, seconds)
        self._environment.notify(CircuitClosed(self._name, seconds))
        for lane in self._owner.lanes.values():
            lane.wake()
