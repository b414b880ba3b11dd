"""Redrives and replays as sources of a lane: they take turns with the log, each in its own order.

publish → journal → store → *lanes* → workers → outcome. What fails here is tried again out of line: the others of the source go
on. An ack of a redrive deletes the dead letter, in one unit with what the attempt published; an ack of a replay writes nothing.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from eventbus._lanes import Lane
from eventbus._outcomes import Attempt, Failure, conflict_of, death_of
from eventbus._reader import report
from eventbus._retry import seconds_until
from eventbus.stores.base import DeadLetterFilter, DeadLetterRow, DeadLetters, Record, WaitingRow, WaitingRows

if TYPE_CHECKING:
    from eventbus._circuit import Circuit
    from eventbus._environment import Environment
    from eventbus._loop import Waiter
    from eventbus._subscription import Subscription

_PAGE = 100
_AGAIN = 1.0
"""Seconds after which what could not be read is asked for again."""
KNOWN = 1_000
"""Redriven dead letters that are in memory at once, beside those of lanes that give nothing out for now."""


class Item(msgspec.Struct, eq=False):
    """One event to deliver beside the log.

    Attributes:
        attempts: made so far. letter: the dead letter that it is, or None.
        wanted: asked before it is given out. ended: told when the handler is done with it: True acked, False dead.
    """

    record: Record
    ended: Callable[[bool], object] = lambda _acked: None
    wanted: Callable[[], bool] = lambda: True
    attempts: int = 0
    first_failed_at: float | None = None
    letter: DeadLetterRow | None = None


class SideSource:
    """Items of one lane; part of the lane's sources while it has any.

    Args:
        replay: what the items belong to; None for redrives.
    """

    beside = True

    def __init__(self, lane: Lane, replay: object = None) -> None:
        self._lane = lane
        self.replay = replay
        self._items: deque[Item] = deque()
        self._waiting: list[tuple[float, int, Item]] = []  # monotonic
        self._tie = itertools.count()
        self._running = 0

    def __len__(self) -> int:
        return len(self._items) + len(self._waiting) + self._running

    def add(self, items: Sequence[Item]) -> None:
        """Deliver items after those before them."""
        if self not in self._lane.sources:
            self._lane.sources.append(self)
        self._items.extend(items)
        self._lane.wake()

    def is_idle(self) -> bool:
        """Whether it has no items."""
        return not len(self)

    def drop(self) -> list[int]:
        """Deliver nothing more of what is next in order; returns which dead letters these are."""
        dropped = [item.letter.id for item in self._items if item.letter is not None]
        self._items.clear()
        self._go_if_empty()
        return dropped

    def take(self) -> Attempt | None:
        """The next item: one that is due again, or the next in order. While the circuit is open, the latter first: what always
        fails must not keep it open."""
        monotonic, circuit = self._lane.environment.clock.monotonic, self._lane.holder.circuit
        is_open = circuit is not None and circuit.is_open
        while True:
            if self._waiting and self._waiting[0][0] <= monotonic() and not (is_open and self._items):
                item = heapq.heappop(self._waiting)[2]
            elif self._items:
                item = self._items.popleft()
            else:
                self._go_if_empty()
                return None
            if item.wanted():
                self._running += 1
                replaying = item.letter is None
                return Attempt(self._lane, self, item.record, item.attempts + 1, item=item, replaying=replaying)

    def acked(self, attempt: Attempt, published: Sequence[Record]) -> None:
        """It is over."""
        item = self._item(attempt)
        if item.letter is not None:
            conflict = conflict_of(attempt, published, self._lane.environment.clock)
            self._send(item, published=tuple(published), conflict=conflict)
        self._over(item, acked=True)

    def failed(self, failure: Failure) -> None:
        """It waits for another attempt, or it is over. A dead letter waits in the store: see `Redriver`."""
        item, attempt = self._item(failure.attempt), failure.attempt
        if failure.delay is None:
            before = 0 if item.letter is None else item.letter.death.attempts
            first = item.first_failed_at if item.letter is None else item.letter.death.first_failed_at
            self._send(item, death=death_of(failure, before + attempt.number, first))
            self._over(item, acked=False)
            return
        self._running -= 1
        if item.letter is not None:
            self._send(item, counts=False, retry=(attempt.number, failure.now + failure.delay))
            self._go_if_empty()
            return
        item.attempts = attempt.number
        item.first_failed_at = failure.now if item.first_failed_at is None else item.first_failed_at
        self._wait(item, failure.now + failure.delay)

    def given_back(self, attempt: Attempt) -> None:
        """It is next again."""
        self._running -= 1
        self._items.appendleft(self._item(attempt))

    def _item(self, attempt: Attempt) -> Item:
        assert isinstance(attempt.item, Item)
        return attempt.item

    def _send(self, item: Item, *, counts: bool = True, **parts: Any) -> None:
        letter, position = item.letter, item.record.position
        self._lane.flush()
        if letter is None:
            self._lane.send("replay", position, counts=counts, **parts)
        else:
            self._lane.send("redrive", position, counts=counts, dead_letter=letter.id, **parts)

    def _over(self, item: Item, *, acked: bool) -> None:
        self._running -= 1
        self._go_if_empty()
        item.ended(acked)

    def _wait(self, item: Item, due_at: float) -> None:
        environment = self._lane.environment
        due = environment.clock.monotonic() + max(0.0, due_at - environment.clock.time())
        heapq.heappush(self._waiting, (due, next(self._tie), item))
        environment.timers.at(due, self._lane.wake)

    def _go_if_empty(self) -> None:
        if not self._items and not self._waiting and not self._running and self in self._lane.sources:
            self._lane.sources.remove(self)


class Parking(Protocol):
    """The subscription, as the redriver sees it."""

    options: Subscription
    circuit: Circuit | None

    def lane_for_redrive(self, record: Record) -> Lane | None:
        """The lane that an event of it belongs to."""

    def parks(self) -> bool:
        """Whether a key of it is parked."""

    def free(self, rows: Sequence[WaitingRow]) -> None:
        """The store has freed what was parked in these rows."""


class Redriver:
    """Brings a subscription's dead letters that are being redriven to its lanes, a bounded number at a time, and tells the
    lanes which keys the store has freed.

    Those that cannot be redriven now hide none of those behind them: what waits for another attempt is read again when it is due;
    what is of a lane that gives nothing out, from the start, when that may have changed.
    """

    def __init__(self, serving: Parking, environment: Environment, want_lane: Callable[[str], bool]) -> None:
        self._serving = serving
        self._subscription = serving.options.name
        self._environment = environment
        self._want_lane = want_lane  # asks for the lane of a type, after which comes a `kick`; False if there will be none
        self._lane_is_coming = False
        self._sources: dict[Lane, SideSource] = {}
        self._known: dict[int, Lane | None] = {}
        self._later: dict[int, float] = {}  # those that wait for another attempt; monotonic
        self._skipped = 0  # … that were read, and are of lanes that give nothing out
        self._after = 0
        self._reading = False
        self._reads = 0  # how often it began anew: an answer to what was asked before does not count
        self._looking = False  # for freed keys
        self._looks = 0
        self._ended: set[int] = set()  # … since the reading began: its answer may still have them
        self._again = False
        self._waiters: list[Waiter] = []

    @property
    def known(self) -> int:
        """How many are being delivered, or wait."""
        return len(self._known) + len(self._later) + self._skipped

    @property
    def reading(self) -> bool:
        """Whether there may be some that are not known yet."""
        return self._reading

    @property
    def idle(self) -> bool:
        """Whether all of them have been settled."""
        return not self._reading and not self._looking and not self.known and not self._lane_is_coming

    @property
    def hindered(self) -> bool:
        """Whether all that is left waits in lanes that give nothing out."""
        if self._reading or self._looking or self._later or not (self._known or self._skipped):
            return False
        return all(lane is not None and lane.gives_nothing() for lane in self._known.values())

    def _has_room(self, most: int) -> bool:
        """Whether fewer than so many are in lanes that may give them out."""
        return sum(len(source) for lane, source in self._sources.items() if not lane.gives_nothing()) < most

    async def wait_for_change(self) -> None:
        """Wait until it may have become idle, or something else has changed."""
        waiter = self._environment.loop.waiter()
        self._waiters.append(waiter)
        await waiter.wait()

    def changed(self) -> None:
        """Something that they wait for may have changed."""
        self._read_on()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set()

    def kick(self) -> None:
        """There may be new ones, or a new lane, or freed keys: look from the start."""
        self._lane_is_coming = False
        if self._serving.parks():
            self._look_for_freed()
        if self._reading:
            self._again = True
        else:
            self._after = self._skipped = 0
            self._read()

    def forget(self, lane: Lane) -> None:
        """Another instance has this lane, and delivers what is redriven in it."""
        self._sources.pop(lane, None)
        self._known = {letter: its for letter, its in self._known.items() if its is not lane}
        self._later.clear()  # which of them are of this lane is not known: all are read again
        self.kick()
        self.changed()

    def begin_anew(self) -> None:
        """Dead letters may be gone: of what has not begun, what is still in the store is delivered."""
        dropped = {letter for source in self._sources.values() for letter in source.drop()}
        self._known = {letter: its for letter, its in self._known.items() if its is not None and letter not in dropped}
        self._later.clear()
        self._reads += 1
        self._reading = self._again = False
        self.kick()
        self.changed()

    def _read_on(self) -> None:
        """Go on where the last page ended, if there is room again."""
        if self._after and not self._reading and self._has_room(KNOWN // 2):
            self._read()

    def _look_for_freed(self) -> None:
        # Always anew: an answer that is under way may have been given before what there is to be seen.
        self._looks += 1
        number = self._looks
        self._looking = True
        query = WaitingRows(self._subscription, "freed")
        self._environment.reader.ask_then(query, lambda answer: self._on_freed(number, answer))

    def _on_freed(self, number: int, rows: tuple[WaitingRow, ...] | BaseException) -> None:
        if number != self._looks:
            return
        self._looking = False
        if isinstance(rows, BaseException):
            report("the keys that were freed", rows)
            self._environment.timers.after(_AGAIN, self.kick)
            return
        self._serving.free(rows)
        self.changed()

    def _read(self) -> None:
        self._reading = True
        self._ended.clear()
        which = DeadLetterFilter(subscription=self._subscription, redriving=True)
        self._environment.reader.ask_then(DeadLetters(which, self._after, _PAGE), functools.partial(self._on_rows, self._reads))

    def _on_rows(self, number: int, rows: tuple[DeadLetterRow, ...] | BaseException) -> None:
        if number != self._reads:
            return
        self._reading = False
        if isinstance(rows, BaseException):
            report("the dead letters being redriven", rows)
            self._environment.timers.after(_AGAIN, self.kick)
            return
        for row in rows:
            self._after = row.id
            if row.id not in self._known and row.id not in self._ended and row.id not in self._later:
                self._deliver(row)
        more = len(rows) == _PAGE
        if self._again:
            self._again = False
            self.kick()
        elif not more:
            self._after = 0
        elif self._has_room(KNOWN):
            self._read()
        self.changed()

    def _deliver(self, row: DeadLetterRow, *, due: bool = False) -> None:
        lane = self._serving.lane_for_redrive(row.record)
        if lane is None and self._want_lane(row.record.type):
            self._lane_is_coming = True
            return
        if lane is None:
            return  # another instance has it, or will have
        if row.attempt and row.due_at is not None and not due:
            seconds = seconds_until(row.due_at, row.death.last_failed_at, self._environment.clock.time())
            if seconds:
                self._wait(row.id, seconds)
                return
        if lane.gives_nothing():
            self._skipped += 1
            return
        if self._serving.circuit is not None:
            self._serving.circuit.forget(lane, row.record)
        self._known[row.id] = lane
        source = self._sources.get(lane)
        if source is None:
            source = self._sources[lane] = SideSource(lane)
        source.add([Item(row.record, attempts=row.attempt, letter=row)])

    def ended(self, letter: int, due_at: float | None) -> None:
        """The store knows what became of one; before that, it would be read and delivered again.

        Args:
            due_at: when it is to be tried again, or None.
        """
        self._known.pop(letter, None)
        if due_at is not None:
            self._wait(letter, due_at - self._environment.clock.time())
        elif self._reading:
            self._ended.add(letter)
        if self.idle or self.hindered:
            self.changed()
        else:
            self._read_on()

    # -------------------------------------------------------------- those that wait for another attempt

    def _wait(self, letter: int, seconds: float) -> None:
        due_at = self._environment.clock.monotonic() + max(0.0, seconds)
        self._later[letter] = due_at
        self._environment.timers.at(due_at, self._look_for_due)

    def _look_for_due(self) -> None:
        now = self._environment.clock.monotonic()
        due = [letter for letter, due_at in self._later.items() if due_at <= now]
        for start in range(0, len(due), _PAGE):
            ids = tuple(due[start : start + _PAGE])
            for letter in ids:
                del self._later[letter]
            self._known.update(dict.fromkeys(ids))
            which = DeadLetterFilter(ids=ids, subscription=self._subscription, redriving=True)
            self._environment.reader.ask_then(DeadLetters(which, 0, _PAGE), functools.partial(self._on_due, self._reads, ids))

    def _on_due(self, number: int, ids: Sequence[int], rows: tuple[DeadLetterRow, ...] | BaseException) -> None:
        if number != self._reads:
            return
        for letter in ids:
            self._known.pop(letter, None)
        if isinstance(rows, BaseException):
            report("the dead letters being redriven", rows)
            for letter in ids:
                self._wait(letter, _AGAIN)
            return
        for row in rows:
            self._deliver(row, due=True)
        self.changed()
