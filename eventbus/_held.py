"""A row of `deliveries` in memory: what is held by it, and how far that has been read.

publish → journal → store → *lanes* → workers → outcome. `_loose` makes one for each row of its lane, and works it off.
"""

from __future__ import annotations

import msgspec

from eventbus.stores.base import Record

Hold = str | int
"""What a row stands for: a key, or the position of a single event."""


class Held(msgspec.Struct, eq=False):
    """A row of `deliveries`, and how far its events have been read.

    Attributes:
        row: the position that the row stands at in the store.
        up_to: the last position that is known to be held by it.
        backlog: events to deliver, read for it; complete up to `read_to`.
        active: its backlog was read, or is being read, and it is being worked off.
        parked: the event at `row` is a dead letter, and what comes after it waits for the end of that.
        after: the event at `row` is settled, by a dead letter: what is held comes after it.
    """

    hold: Hold
    row: int
    up_to: int
    attempts: int = 0
    first_failed_at: float | None = None
    backlog: list[Record] = []  # short, and an empty deque takes 700 bytes more
    read_to: int = 0
    active: bool = False
    reading: bool = False
    running: bool = False
    parked: bool = False
    after: bool = False

    @property
    def begins(self) -> int:
        """The first position that may be held by it."""
        return self.row + self.after

    @property
    def key(self) -> str | None:
        """The key, or None for a single event."""
        return self.hold if isinstance(self.hold, str) else None
