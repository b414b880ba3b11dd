"""The circuit of one subscription: closed while things go, open while all fails, and then tried with one event at a time.

publish → journal → store → *lanes* → workers → *outcome*. Lanes tell it what has become of attempts; it tells them whether they
may give out another. When it opens, it lets what is under way come to its end; if nothing of that succeeds, it has the store take
back what the failures of this run have left behind (`Revive`), and the lanes begin again from there. It lives in memory: a bus
begins with closed circuits.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from eventbus._breaker import Breaker, delay_of
from eventbus._outcomes import Attempt, Failed, summary_of
from eventbus.errors import EventBusError, Reject, RetryAfter
from eventbus.hooks import CircuitClosed, CircuitOpened
from eventbus.stores.base import LaneState, Record, Revive, Revived

if TYPE_CHECKING:
    from eventbus._environment import Environment
    from eventbus._lanes import Lane
    from eventbus._subscription import Subscription

_log = logging.getLogger("eventbus")

PATIENCE = 10.0
"""Seconds for which what is under way when a circuit opens is waited for; what succeeds later than that is delivered again."""


class State(enum.Enum):
    """Where a circuit is. From each but the first a success, or `close`, leads back to the first."""

    CLOSED = "everything may be given out"
    OPENING = "what is under way comes to its end"
    SETTING_BACK = "the store takes back what has failed"
    WAITING = "until it is due"
    READY = "one attempt may be given out, by whichever lane has one first"
    TRYING = "it was"


class Verdict(enum.Enum):
    """What a failed attempt is to its event. A number instead: it does not count, and comes again after so many seconds, so that
    others have their turn."""

    COUNTS = "it was one of its attempts"
    GIVES_UP = "it was the last one"
    NOTHING = "it does not count, and is given back"


class _Entry(msgspec.Struct, frozen=True):
    """An event that has failed in this run; what it was before."""

    lane: Lane
    key: str | None
    attempts: int
    epoch: int


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

    Attributes:
        state: where it is. is_open: it is not closed.
        troubled: something has failed since the last success; while it is False, a success costs one look at it.
        reason: what failed when it opened, or None while it is closed.
        due: when it is tried next, unix seconds.
        at_rest: set unless something is to be taken back.
    """

    def __init__(self, owner: Owner, breaker: Breaker, environment: Environment) -> None:
        self.state = State.CLOSED
        self.is_open = self.troubled = False
        self.reason: str | None = None
        self.due = 0.0
        self.at_rest = environment.loop.waiter()
        self.at_rest.set()
        self._owner = owner
        self._name, self._order = owner.options.name, owner.options.order
        self._breaker = breaker
        self._environment = environment
        self._run: dict[int, _Entry | None] = {}  # by position; None: what it left behind is not to be taken back
        self._replayed: set[int] = set()  # positions whose replays failed: they count, and leave behind nothing to be taken back
        self._openings = 0  # how often it has opened or closed: who waits for something sees whether it is the same still
        self._since = 0.0
        self._failed = 0  # tries since it opened
        self._tried: Counter[int] = Counter()  # … of each event
        self._try: Attempt | None = None

    # -------------------------------------------------------------- while it is closed

    def failed(self, attempt: Attempt, outcome: Failed) -> Verdict | float:
        """An attempt has failed."""
        if self._says_of_event(outcome):
            if not attempt.replaying:  # which settles nothing
                self.forget(attempt.lane, attempt.record)
            self.released(attempt)
            return Verdict.COUNTS
        if self.is_open:
            return self._failed_again(attempt)
        if attempt.source.beside and not attempt.replaying:
            return Verdict.COUNTS  # a redrive: what fails again is a dead letter as before
        self.troubled = True
        if attempt.replaying:
            self._replayed.add(attempt.record.position)
        else:
            entry = _Entry(attempt.lane, attempt.record.key, attempt.number - 1, attempt.epoch)
            self._run.setdefault(attempt.record.position, entry)
        if self._different() < self._breaker.failures:
            return Verdict.COUNTS
        self._open(outcome.error)
        return Verdict.NOTHING

    def _says_of_event(self, outcome: Failed) -> bool:
        """Whether a failure is no sign of a bad world."""
        return outcome.final or isinstance(outcome.error, (Reject, RetryAfter, *self._owner.options.retry.give_up_on))

    def _different(self) -> int:
        """How many events have failed one after the other."""
        return len(self._run.keys() | self._replayed)

    def succeeded(self) -> None:
        """An attempt has succeeded: the world is good."""
        if self.state is State.SETTING_BACK:
            return  # too late for this one; the first try will show it
        self.troubled = False
        self._run.clear()
        self._replayed.clear()
        self.close()

    def forget(self, lane: Lane, record: Record | None = None) -> None:
        """What failed in a lane cannot be taken back any more: the lane goes, or begins anew; or this event of it was settled for
        good, or is redriven, and what it came after must not be delivered again behind it."""
        for position, entry in self._run.items():
            if entry is None or entry.lane is not lane:
                continue
            if record is None or position == record.position or self._is_before(entry, record):
                self._run[position] = None

    def _is_before(self, entry: _Entry, record: Record) -> bool:
        if self._order == "key":
            return entry.key is not None and entry.key == record.key
        return self._order != "none"

    # -------------------------------------------------------------- opening

    def _open(self, error: BaseException) -> None:
        environment = self._environment
        self.reason = f"{self._different()} different events failed one after the other, the last with {summary_of(error)}"
        self.state, self.is_open = State.OPENING, True
        self._since = environment.clock.monotonic()
        self._openings += 1
        self._failed = 0
        self._tried.clear()
        self.at_rest = environment.loop.waiter()
        _log.error("%s: the circuit opens: %s", self._name, self.reason)
        environment.notify(CircuitOpened(self._name, self.reason))
        for lane in list(self._owner.lanes.values()):
            lane.recall()
        opening = self._openings
        environment.timers.after(PATIENCE, lambda: self.hurry(opening))

    def rested(self) -> None:
        """An attempt has ended, or a lane has gone; what that means has been told."""
        if self.state is State.OPENING and not any(lane.running for lane in self._owner.lanes.values()):
            self._set_back()

    def hurry(self, opening: int | None = None) -> None:
        """Wait no more for what is under way."""
        if self.state is State.OPENING and opening in (None, self._openings):
            self._set_back()

    def _set_back(self) -> None:
        self.state = State.SETTING_BACK
        self._owner.begin_change()
        for lane in self._owner.lanes.values():
            lane.flush()
        opening, at_rest = self._openings, self.at_rest

        def done() -> None:
            at_rest.set()
            self._owner.end_change()
            if opening == self._openings:
                self._wait()

        def take_back(_none: Sequence[LaneState]) -> None:
            run, self._run = sorted(self._run.items()), {}
            self._replayed.clear()
            left = [(position, entry) for position, entry in run if entry is not None]
            revived = [Revived(each.lane.name, each.epoch, position, each.key, each.attempts) for position, each in left]
            self._submit(revived, lambda states: set_back({each.lane for _, each in left}, states))

        def set_back(lanes: Iterable[Lane], states: Sequence[LaneState]) -> None:
            there = {state.lane for state in states}
            for lane in lanes:
                if lane.name not in there and not lane.closed:
                    self._environment.fenced(lane)  # by this very command perhaps, at a first try of which nobody could tell
            self._owner.was_set_back(states, done)

        # What was settled before must not be fenced by what is set back now: that is another transaction.
        self._submit((), take_back)

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

    # -------------------------------------------------------------- while it is open

    def _wait(self) -> None:
        """Until it is tried next."""
        delay = delay_of(self._breaker, self._failed)
        self.state = State.WAITING
        self.due = self._environment.clock.time() + delay
        opening = self._openings

        def look() -> None:
            if opening == self._openings and self.state is State.WAITING:
                self._let_one()

        self._environment.timers.after(delay, look)

    def _let_one(self) -> None:
        """Let one attempt through; each time another lane is asked first."""
        self.state, self._try = State.READY, None
        lanes = list(self._owner.lanes.values())
        at = self._failed % len(lanes) if lanes else 0
        for lane in lanes[at:] + lanes[:at]:
            lane.wake()

    def gives(self, attempt: Attempt) -> None:
        """A lane gives out an attempt, while it is open."""
        self.state, self._try = State.TRYING, attempt

    def lets(self, attempt: Attempt) -> bool:
        """Whether an attempt that was given out may begin."""
        return not self.is_open or attempt is self._try

    def _failed_again(self, attempt: Attempt) -> Verdict | float:
        if attempt is not self._try:
            return Verdict.NOTHING  # it was under way when the circuit opened
        position, give_up = attempt.record.position, self._breaker.give_up
        self._tried[position] += 1
        self._failed += 1
        if give_up is not None and self._tried[position] >= give_up:
            attempt.number += self._tried[position] - 1  # for its dead letter
            self._let_one()
            return Verdict.GIVES_UP
        self._try = None
        self._wait()
        in_turn = self._order in ("key", "none") and (attempt.replaying or not attempt.source.beside)
        return 2 * delay_of(self._breaker, self._failed) if in_turn else Verdict.NOTHING

    def released(self, attempt: Attempt) -> None:
        """An attempt did not run to its end, or its end does not count. If it was the try: another one at once."""
        if attempt is self._try:
            self._let_one()

    def close(self) -> None:
        """Let everything through again."""
        if not self.is_open:
            return
        if self.state is State.OPENING:
            self.at_rest.set()  # nothing is taken back
        self.state, self.is_open, self.reason, self._try = State.CLOSED, False, None, None
        self._openings += 1
        seconds = self._environment.clock.monotonic() - self._since
        _log.warning("%s: the circuit closes again, after %.1f s", self._name, seconds)
        self._environment.notify(CircuitClosed(self._name, seconds))
        for lane in self._owner.lanes.values():
            lane.wake()
