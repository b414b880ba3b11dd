"""The end of the log as it is announced: in order and without gaps, whoever has committed it.

publish → journal → store → *lanes* → workers → outcome. What this instance commits is at hand, and is offered to the feeds by
reference. What others have committed before it is read first, once for all lanes that are up to date; what is committed here
meanwhile waits. Lanes that are behind read for themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from eventbus._intake import PAGE, PAGE_BYTES, bytes_of, place_anew
from eventbus._reader import report
from eventbus.stores.base import Committed, Events, Page, Record

if TYPE_CHECKING:
    from eventbus._intake import Feed
    from eventbus._loop import Loop, Waiter
    from eventbus._reader import Reader

WAITING_BYTES = 4 * 1_048_576
"""Of what is committed here while what others have committed before it is read, so much is kept in memory."""
MOST_TYPES = 50
"""With more of them all types are read: for so many a store looks through the log in any case."""


class Tail:
    """Announces the log from where it ended when the bus was opened.

    Args:
        feeds: returns those that there are.
        offer: takes events that are next in the log, for those feeds that want them.
    """

    def __init__(
        self,
        reader: Reader,
        loop: Loop,
        feeds: Callable[[], Iterable[Feed]],
        offer: Callable[[Sequence[Record]], object],
    ) -> None:
        self._reader = reader
        self._loop = loop
        self._feeds = feeds
        self._offer = offer
        self.head = 0
        """Everything up to here was announced."""
        self.end = 0
        """The log is known to go on to here."""
        self._own: deque[Committed] = deque()  # what was committed here after something that is still to be read
        self._room = WAITING_BYTES
        self._dropped = 0  # up to here some of that did not find room, and is read
        self._reading = self._closed = False
        self._waiters: list[tuple[int, Waiter]] = []

    def begin(self, head: int) -> None:
        """The log ends here."""
        self.head = self.end = head

    def committed(self, committed: Committed) -> None:
        """This instance has committed something, with events or without."""
        if committed.previous_head == self.head:
            self._announce(committed.events, committed.head)
            return
        if committed.events:
            self._own.append(committed)
            self._room -= bytes_of(committed.events)
            if self._room < 0:
                self._own.clear()
                self._room, self._dropped = WAITING_BYTES, committed.head
        self.extend(committed.head)

    def extend(self, end: int) -> None:
        """The log goes on to here."""
        self.end = max(self.end, end)
        self._go_on()

    async def announced(self, position: int) -> None:
        """Wait until everything up to a position was announced, or the bus is closing."""
        if self.head < position and not self._closed:
            waits = (position, self._loop.waiter())
            self._waiters.append(waits)
            try:
                await waits[1].wait()
            finally:
                if waits in self._waiters:
                    self._waiters.remove(waits)

    def close(self) -> None:
        """Nothing more comes of it: those who wait are told."""
        self._closed = True
        for _, waiter in self._waiters:
            waiter.set()

    def _go_on(self) -> None:
        """Announce what has its turn, until something must be read."""
        while not self._reading:
            if self._own and self._own[0].previous_head <= self.head:
                own = self._own.popleft()
                self._room += bytes_of(own.events)
                self._announce([record for record in own.events if record.position > self.head], own.head)
            elif self.head < self.end:
                # Of what was dropped here, nobody may have a lane for a type yet: it must come by to be asked for.
                types = None if self.head < self._dropped else self._wanted()
                self._read(self._own[0].previous_head if self._own else self.end, types)
            else:
                return

    def _announce(self, records: Sequence[Record], up_to: int) -> None:
        self.head = max(self.head, up_to)
        self.end = max(self.end, up_to)
        if records:
            self._offer(records)
        if self._waiters:
            for _, waiter in [each for each in self._waiters if each[0] <= self.head]:
                waiter.set()
            self._waiters = [each for each in self._waiters if each[0] > self.head]

    def _wanted(self) -> tuple[str, ...] | None:
        """The types that lanes want which are up to date; None for all."""
        wanted: set[str] = set()
        for feed in self._feeds():
            if feed.is_live():
                if feed.types is None:
                    return None
                wanted.update(feed.types)
                if len(wanted) > MOST_TYPES:
                    return None
        return tuple(wanted)

    def _read(self, until: int, types: tuple[str, ...] | None) -> None:
        if types == ():
            self._passed(until, Page((), until, until), ())
            return
        self._reading = True
        query = Events(self.head, PAGE, PAGE_BYTES, until=until, types=types)
        self._reader.ask_then(query, partial(self._on_page, until, types))

    def _on_page(self, until: int, types: tuple[str, ...] | None, page: Page | BaseException) -> None:
        self._reading = False
        if isinstance(page, BaseException):
            report("the log", page)
        if isinstance(page, BaseException) or page.up_to <= self.head:
            self._leave_to_feeds(until)
        else:
            self._passed(until, page, types)
        self._go_on()

    def _leave_to_feeds(self, until: int) -> None:
        """Each feed reads for itself up to here, and those that can go on without the others."""
        for feed in self._feeds():
            feed.fall_behind(self.head)
        self._announce((), until)

    def _passed(self, until: int, page: Page, types: tuple[str, ...] | None) -> None:
        """Announce a page of these types, unless one of them is missing by now."""
        wanted = frozenset(types or ())
        lacking = [] if types is None else [feed for feed in self._feeds() if not feed.is_within(wanted)]
        if any(feed.is_live() for feed in lacking):
            # Since the page was asked for, a lane has come, has come up to date, or wants another type.
            self._read(until, None)
            return
        for feed in lacking:
            feed.miss()
        if any(record.fault is not None for record in page.records):
            # Its type may be what is damaged. Whose it is only the index says, so each feed asks for its own.
            self._leave_to_feeds(page.up_to)
            return
        for record in page.records:
            place_anew(record)
        self._announce(page.records, page.up_to)
