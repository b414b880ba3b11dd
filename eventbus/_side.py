"""Redrives and replays as sources of a lane: they take turns with the log, each in its own order.

publish → journal → store → *lanes* → workers → outcome. What fails here is tried again out of line: the others of the source go
on. An ack of a redrive deletes the dead letter, in one unit with what the attempt published; an ack of a replay writes nothing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from eventbus._lanes import Lane
from eventbus._outcomes import Attempt, Failure, conflict_of, death_of
from eventbus.stores.base import DeadLetterFilter, DeadLetterRow, DeadLetters, Record, WaitingRow, WaitingRows

if TYPE_CHECKING:
    from eventbus._lanes import Environment
    from eventbus._loop import Waiter
    from eventbus._subscription import Subscription

_log = logging.getLogger("eventbus")

_PAGE = 100
KNOWN = 1_000
"""Redriven dead letters that are in memory at once."""


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
    due_at: float | None = None
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

    def add(self, items: Sequence[Item]) -> None:
        """Deliver items after those before them, or when they are due."""
        if self not in self._lane.sources:
            self._lane.sources.append(self)
        for item in items:
            if item.due_at is None:
                self._items.append(item)
            else:
                self._wait(item)
        self._lane.wake()

    def take(self) -> Attempt | None:
        """The next item: one that is due again, or the next in order."""
        monotonic = self._lane.environment.clock.monotonic
        while True:
            if self._waiting and self._waiting[0][0] <= monotonic():
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
        """It waits for another attempt, or it is over."""
        item, attempt = self._item(failure.attempt), failure.attempt
        if failure.delay is None:
            before = 0 if item.letter is None else item.letter.death.attempts
            first = item.first_failed_at if item.letter is None else item.letter.death.first_failed_at
            self._send(item, death=death_of(failure, before + attempt.number, first))
            self._over(item, acked=False)
            return
        item.attempts = attempt.number
        item.first_failed_at = failure.now if item.first_failed_at is None else item.first_failed_at
        item.due_at = failure.now + failure.delay
        if item.letter is not None:
            self._send(item, counts=False, retry=(item.attempts, item.due_at))
        self._running -= 1
        self._wait(item)

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

    def _wait(self, item: Item) -> None:
        environment = self._lane.environment
        delay = max(0.0, (item.due_at or 0.0) - environment.clock.time())
        due = environment.clock.monotonic() + delay
        heapq.heappush(self._waiting, (due, next(self._tie), item))
        environment.timers.at(due, self._lane.wake)

    def _go_if_empty(self) -> None:
        if not self._items and not self._waiting and not self._running and self in self._lane.sources:
            self._lane.sources.remove(self)


class Parking(Protocol):
    """The subscription, as the redriver sees it."""

    options: Subscription

    def lane_of(self, record: Record) -> Lane | None:
        """The lane that an event of it belongs to."""

    def parks(self) -> bool:
        """Whether a key of it is parked."""

    def free(self, rows: Sequence[WaitingRow]) -> None:
        """The store has freed what was parked in these rows."""


class Redriver:
    """Brings a subscription's dead letters that are being redriven to its lanes, a bounded number at a time, and tells the
    lanes which keys the store has freed."""

    def __init__(self, serving: Parking, environment: Environment, want_lane: Callable[[str], bool]) -> None:
        self._serving = serving
        self._subscription = serving.options.name
        self._environment = environment
        self._want_lane = want_lane  # asks for the lane of a type, after which comes a `kick`; False if there will be none
        self._lane_is_coming = False
        self._sources: dict[Lane, SideSource] = {}
        self._known: set[int] = set()
        self._after = 0
        self._reading = False
        self._looking = False  # for freed keys
        self._looks = 0
        self._ended: set[int] = set()  # … since the reading began: its answer may still have them
        self._again = False
        self._waiters: list[Waiter] = []

    @property
    def known(self) -> int:
        """How many are being delivered."""
        return len(self._known)

    @property
    def idle(self) -> bool:
        """Whether all of them have been settled."""
        return not self._reading and not self._looking and not self._known and not self._lane_is_coming

    @property
    def hindered(self) -> bool:
        """Whether all that is left waits in lanes that give nothing out."""
        busy = [lane for lane, source in self._sources.items() if source in lane.sources]
        return not self._reading and not self._looking and bool(busy) and all(lane.gives_nothing() for lane in busy)

    async def wait_for_change(self) -> None:
        """Wait until it may have become idle, or something else has changed."""
        waiter = self._environment.loop.waiter()
        self._waiters.append(waiter)
        await waiter.wait()

    def changed(self) -> None:
        """Something that they wait for may have changed."""
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
            self._after = 0
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
            _log.error("the keys that were freed could not be read: %s", rows)
            self._environment.timers.after(1.0, self.kick)
            return
        self._serving.free(rows)
        self.changed()

    def _read(self) -> None:
        self._reading = True
        self._ended.clear()
        which = DeadLetterFilter(subscription=self._subscription, redriving=True)
        self._environment.reader.ask_then(DeadLetters(which, self._after, _PAGE), self._on_rows)

    def _on_rows(self, rows: tuple[DeadLetterRow, ...] | BaseException) -> None:
        self._reading = False
        if isinstance(rows, BaseException):
            _log.error("the dead letters being redriven could not be read: %s", rows)
            self._environment.timers.after(1.0, self.kick)
            return
        for row in rows:
            self._after = row.id
            if row.id not in self._known and row.id not in self._ended:
                self._deliver(row)
        more = len(rows) == _PAGE
        if self._again:
            self._again = False
            self.kick()
        elif more and len(self._known) < KNOWN:
            self._read()
        elif not more:
            self._after = 0
        self.changed()

    def _deliver(self, row: DeadLetterRow) -> None:
        lane = self._serving.lane_of(row.record)
        if lane is None and self._want_lane(row.record.type):
            self._lane_is_coming = True
            return
        if lane is None:
            _log.warning("%s: no lane for the dead letter %d of type %r", self._subscription, row.id, row.record.type)
            return
        self._known.add(row.id)
        source = self._sources.get(lane)
        if source is None:
            source = self._sources[lane] = SideSource(lane)
        due_at = row.due_at if row.attempt else None
        source.add([Item(row.record, attempts=row.attempt, due_at=due_at, letter=row)])

    def ended(self, letter: int) -> None:
        """The store knows what became of one; before that, it would be read and delivered again."""
        self._known.discard(letter)
        if self._reading:
            self._ended.add(letter)
        if self._after and not self._reading and len(self._known) < KNOWN // 2:
            self._read()
        elif self.idle:
            self.changed()
