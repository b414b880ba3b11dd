"""How a lane comes by the events of the log: handed over while it is live, read in pages while it is behind.

publish → journal → store → *lanes* → workers → outcome. A `Feed` belongs to a subscription, or to one type of it; its `Intake`s
belong to one lane each. Committed events are offered to the feeds by reference. An intake that is full takes no more and is
behind: it reads pages from the store until it has reached the head, and turns live in one step on the loop, so that no event
is handed to it twice and none is left out: it drops what lies at or below the position that it has taken.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from eventbus._reader import report
from eventbus.stores.base import Events, Page, Record, lane_of_slot, slot_of

if TYPE_CHECKING:
    from eventbus._reader import Reader
    from eventbus._timers import Timers

QUEUE = 4_000
"""Events that may wait in one lane; more than a thousand publishers at once put into a single commit."""
PAGE = 2_000
"""Events in a page: each costs the reader's thread some waits for the GIL."""
PAGE_BYTES = 1_048_576
RECORD_OVERHEAD = 600
"""Bytes that a waiting event takes beside its data, roughly."""
READ_AGAIN = 0.5
"""Seconds after which a page that could not be read is asked for again."""
MEANWHILE_BYTES = 4 * 1_048_576
"""What is announced while a page is under way is kept up to here; if it is more, it is read."""


def bytes_of(records: Sequence[Record]) -> int:
    """What events take in memory, roughly."""
    return sum([len(record.data) for record in records]) + RECORD_OVERHEAD * len(records)


def place_anew(record: Record) -> None:
    """Compute the slot of an event that was read: what is stored of it has no checksum."""
    record.slot = slot_of(record.id if record.key is None else record.key)


class Budget:
    """Bounds the bytes that wait in all lanes of a bus together.

    When it is exceeded, the lane that was served least recently forgets what waits in it and falls behind; it reads that
    again later. So stalled lanes hold little memory, and busy ones keep theirs. No lane may hold more than half of it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0
        """Bytes that wait."""
        self._by_use: OrderedDict[Intake, None] = OrderedDict()

    def has_room(self, intake: Intake, size: int = 1) -> bool:
        """Whether an intake may hold so much more."""
        return intake.bytes + size <= self._limit // 2

    def add(self, intake: Intake, size: int) -> None:
        """An event has come to wait in an intake."""
        self.used += size
        self._by_use[intake] = None
        while self.used > self._limit and len(self._by_use) > 1:
            oldest = next(iter(self._by_use))
            if oldest is intake:
                self._by_use.move_to_end(intake)
            else:
                del self._by_use[oldest]
                oldest.forget()

    def remove(self, intake: Intake) -> None:
        """An intake is there no more."""
        intake.forget()
        self._by_use.pop(intake, None)

    def touch(self, intake: Intake) -> None:
        """A lane is being served."""
        if intake in self._by_use:
            self._by_use.move_to_end(intake)


class Intake:
    """What waits for one lane, in order of position."""

    def __init__(self, feed: Feed, budget: Budget, taken: int, wake: Callable[[], object]) -> None:
        self.feed = feed
        self.taken = taken
        """Everything of this lane up to here has been given to it."""
        self.live = False
        self.bytes = 0
        self.forgotten = 0
        self.dozes = False
        """It has forgotten what waited, and nobody has asked for it since: nothing is read for it, or lanes that nobody serves
        would make each other forget what was read for them, without end."""
        self._queue: deque[Record] = deque()
        self._budget = budget
        self._wake = wake

    def __len__(self) -> int:
        return len(self._queue)

    def has_room(self) -> bool:
        """Whether it may be given another event."""
        return len(self._queue) < QUEUE and self._budget.has_room(self)

    def offer(self, records: Sequence[Record]) -> bool:
        """Take events that come after all taken so far, as many as there is room for; False if some were left."""
        size = bytes_of(records)
        if len(self._queue) + len(records) > QUEUE or not self._budget.has_room(self, size):
            return self._offer_singly(records)
        self._take_in(records, size)
        return True

    def _offer_singly(self, records: Sequence[Record]) -> bool:
        for record in records:
            if not self.has_room():
                return False
            self._take_in((record,), len(record.data) + RECORD_OVERHEAD)
        return True

    def _take_in(self, records: Sequence[Record], size: int) -> None:
        self.taken = records[-1].position
        self._queue.extend(records)
        self._grow(size)
        self._wake()

    def pop(self) -> Record | None:
        """The next event, or None: then more is on its way, or there is none."""
        queue = self._queue
        if not self.live:
            self.dozes = False
            if not self.feed.page and len(queue) < PAGE:
                self.feed.read()
        if not queue:
            return None
        record = queue.popleft()
        size = len(record.data) + RECORD_OVERHEAD
        self.bytes -= size
        self._budget.used -= size
        return record

    def put_back(self, record: Record) -> None:
        """Undo the last `pop`."""
        self._queue.appendleft(record)
        self._grow(len(record.data) + RECORD_OVERHEAD)

    def reach(self) -> int:
        """Everything of this lane up to here has been given to it, or never was in the log."""
        return max(self.taken, self.feed.head()) if self.live else self.taken

    def first(self) -> int | None:
        """The position of what waits first."""
        return self._queue[0].position if self._queue else None

    def moved(self) -> None:
        """It has come further without an event."""
        self._wake()

    def touch(self) -> None:
        """The lane is being served."""
        self._budget.touch(self)

    def forget(self) -> None:
        """Drop what waits; it is read again later."""
        if self._queue:
            self.taken = self._queue[0].position - 1  # a bound below the first event that is dropped
            self._queue.clear()
            self._budget.used -= self.bytes
            self.bytes = 0
            self.live = False
            self.dozes = True
            self.forgotten += 1
            self._wake()

    def reset(self, taken: int) -> None:
        """Begin again after another position."""
        self.forget()
        self.taken = taken
        self.live = self.dozes = False
        self.forgotten += 1

    def _grow(self, size: int) -> None:
        self.bytes += size
        self._budget.add(self, size)


class Feed:
    """Feeds the lanes of one subscription that share their pages, or the lane of one type.

    Args:
        lanes: how many there are; those of other instances have no intake here.
        types: exact names of the types to read, None for all of them.
        start_of: the position after which events of a type are for this feed; infinite where they are not.
        head: the last position that was announced. end: how far the log is known to go. Nothing is read beyond it: what is
            committed here is told of together with the types that join by it.
    """

    def __init__(
        self,
        lanes: int,
        types: tuple[str, ...] | None,
        start_of: Callable[[str], float],
        reader: Reader,
        timers: Timers,
        head: Callable[[], int],
        end: Callable[[], int],
    ) -> None:
        self._lanes = lanes
        self.types = types
        self._start_of = start_of
        self._reader = reader
        self._timers = timers
        self.head = head
        self._end = end
        self.page = 0
        """Number of the page that is being read; 0: none."""
        self._pages = 0
        # What was announced while the page was under way: with it a lane whose page has reached the head of then is at the head
        # of now. None: it was too much, or not all of it was announced.
        self._meanwhile: list[tuple[str, Sequence[Record]]] | None = None
        self._room = 0
        self.intakes: dict[int, Intake] = {}
        """By the number of the lane."""
        self.settled_before: Callable[[Record], bool] | None = None
        """Whether an event of the past was settled before the lanes were made anew; None where none was."""
        self.closed = False

    def of(self, record: Record) -> Intake | None:
        """The intake of the lane that an event belongs to; None if another instance has it."""
        return self.intakes.get(0 if self._lanes == 1 else lane_of_slot(record.slot, self._lanes))

    def offer(self, type: str, records: Sequence[Record]) -> None:
        """Events of one type are next in the log."""
        if self.page and self._meanwhile is not None:
            self._meanwhile.append((type, records))
            self._room -= bytes_of(records)
            if self._room < 0:
                self._meanwhile = None
        if self._lanes == 1:
            for only in self.intakes.values():
                self._offer(only, type, records)
            return
        by_intake: dict[Intake, list[Record]] = {}
        for record in records:
            intake = self.of(record)
            if intake is not None:
                by_intake.setdefault(intake, []).append(record)
        for intake, some in by_intake.items():
            self._offer(intake, type, some)

    def _offer(self, intake: Intake, type: str, records: Sequence[Record]) -> None:
        if not intake.live:
            return
        after = max(intake.taken, self._start_of(type))
        if records[0].position <= after:
            records = [record for record in records if record.position > after]
        if self.settled_before is not None:
            records = [record for record in records if not self.settled_before(record)]
        if records and not intake.offer(records):
            intake.live = False

    def is_live(self) -> bool:
        """Whether a lane of it has been given all that was announced."""
        return not self.closed and any(intake.live for intake in self.intakes.values())

    def is_within(self, types: frozenset[str]) -> bool:
        """Whether it wants no type but these."""
        return self.types is not None and types.issuperset(self.types)

    def miss(self) -> None:
        """Events of its types are passed by while its lanes are behind: a page that is under way does not bring them up."""
        self._meanwhile = None

    def fall_behind(self, after: int) -> None:
        """What comes after this position is not offered to its lanes, which had been given all up to there: they read it."""
        for intake in self.intakes.values():
            if intake.live:
                intake.taken, intake.live, intake.dozes = max(intake.taken, after), False, False
        self._meanwhile = None
        self.read()

    def retype(self, types: tuple[str, ...] | None) -> None:
        """Read other types from now on; a page that is under way does not count, for it may lack the new ones."""
        self.types = types
        self.page = 0
        self.read()

    def read(self) -> None:
        """Read the next page for the lanes that are behind and have room."""
        if self.page or self.closed:
            return
        behind = [i for i in self.intakes.values() if not i.live and not i.dozes and len(i) < PAGE and i.has_room()]
        if behind:
            after, until = min(intake.taken for intake in behind), self._end()
            self._meanwhile, self._room = [], MEANWHILE_BYTES
            self._pages += 1
            self.page = self._pages
            query = Events(after, PAGE, PAGE_BYTES, until=until, types=self.types)
            asked = {intake: intake.forgotten for intake in self.intakes.values()}
            self._reader.ask_then(query, functools.partial(self._on_page, self.page, query, asked))

    def _on_page(self, number: int, query: Events, asked: Mapping[Intake, int], page: Page | BaseException) -> None:
        if number != self.page or self.closed:
            return
        self.page = 0
        if isinstance(page, BaseException):
            report("the log", page)
            self._timers.after(READ_AGAIN, self.read)
            return
        # An intake takes part if the page begins at or before the place that it has reached.
        reaches_head = page.up_to >= self.head() or (page.up_to == query.until and self._meanwhile is not None)
        behind: dict[Intake, list[Record]] = {
            i: [] for i in self.intakes.values() if not i.live and i.taken >= query.after and i.forgotten == asked.get(i)
        }
        self._sort(page.records, behind)
        for intake, records in behind.items():
            # What is offered to one lane may make another forget what it has.
            if intake.forgotten == asked[intake] and (not records or intake.offer(records)):
                intake.taken = max(intake.taken, page.up_to)
                intake.live = reaches_head
        for type, some in (self._meanwhile or ()) if reaches_head else ():
            self.offer(type, some)
        for intake in behind:
            intake.moved()
        self._meanwhile = None
        self.read()

    def _sort(self, records: Sequence[Record], behind: dict[Intake, list[Record]]) -> None:
        """Give the records of a page to the intakes that take part and want them."""
        settled = self.settled_before
        seen, start_of_seen = "", 0.0
        for record in records:
            if record.type != seen:
                seen, start_of_seen = record.type, self._start_of(record.type)
            if self._lanes > 1 and record.fault is None:  # a damaged record may have another key
                place_anew(record)
            intake = self.of(record)
            start = start_of_seen if record.fault is None else 0  # its type may be what is damaged
            if intake is None or intake not in behind or record.position <= max(intake.taken, start):
                continue
            if settled is None or not settled(record):
                behind[intake].append(record)


def runs_by_type(records: Sequence[Record]) -> Iterator[tuple[str, Sequence[Record]]]:
    """Records in their order, cut where the type changes."""
    start = 0
    for end in range(1, len(records) + 1):
        if end == len(records) or records[end].type != records[start].type:
            yield records[start].type, records if end - start == len(records) else records[start:end]
            start = end
