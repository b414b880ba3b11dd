"""The records of a store: an event on its way, what an attempt leaves behind, where a lane stands.

publish → journal → *store* → lanes → workers → outcome. A `Record` goes all the way; a `Unit` is how an outcome comes back to the
store. Beside them stand the few rules that every store and the bus must share: slots, lanes, patterns, checksums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal
from zlib import crc32

import msgspec

LARGEST = 2**63 - 1
"""The largest position, and the largest integer that a store can hold."""

SLOTS = 1024
"""Slots that keys are spread over. Stored with every event, so it never changes."""

Order = Literal["type", "key", "log", "none"]


# ------------------------------------------------------------------ events


class Record(msgspec.Struct, eq=False, gc=False):
    """An event on its way: what `publish` made of it, and where it came to lie.

    Not frozen, since the store gives it its `position` and one object goes all the way; nobody else changes it. A Struct, since
    that is made in a third of the time; the garbage collector may pass it by, for nothing in it refers back to it.

    Attributes:
        position: its place in the log; 0 until it is committed, and while it is scheduled.
        id: UUIDv7, as text.
        type, version: stored name and version of its class.
        time: when it was published, unix seconds to the microsecond.
        key: what `order="key"` orders by, not empty, or None.
        slot: crc32 of the key (without one: of the id) modulo `SLOTS`.
        headers: a JSON object of strings as text, or None where there are none; never empty.
        content_type, data: what the codec made of the event.
        idempotency_key: unique over stored and scheduled events for as long as it is kept.
        due_at: unix seconds; with it the event is scheduled, and enters the log when it is due.
        event: the user's object, where handlers may share it; never stored.
        cause: position of the event whose handler published it, 0 where that is not known; never stored.
        fault: what was found wrong with it on reading (its checksum), or None.
    """

    id: str
    type: str
    version: int
    time: float
    key: str | None
    slot: int
    headers: str | None
    content_type: str
    data: bytes
    idempotency_key: str | None = None
    due_at: float | None = None
    position: int = 0
    event: object = None
    cause: int = 0
    fault: str | None = None


def checksum(record: Record, position: int | None = None) -> int:
    """crc32 over everything of a record that is stored in the log, its position included; of the one given, for a record that
    has none yet."""
    place = record.position if position is None else position
    return checksum_of(place, record, *checksum_parts(record, repr(record.time)))


def checksum_parts(record: Record, time: str) -> tuple[str, str]:
    """What records that were published together share of what their checksums are over, given the `repr` of their time."""
    return f"|{record.type}|{record.version}|{time}|", f"|{record.headers}|{record.content_type}|"


def checksum_of(position: int, record: Record, middle: str, end: str) -> int:
    """The checksum of a record at a position, put together from its own and from the parts that it shares."""
    return crc32(record.data, crc32(f"{position}|{record.id}{middle}{record.key}{end}".encode()))


def slot_of(key: str) -> int:
    """The slot of a key, or of the id of an event without one."""
    return crc32(key.encode()) % SLOTS


def lane_of_slot(slot: int, lanes: int) -> int:
    """Which of `lanes` equal ranges of slots holds this slot."""
    return slot * lanes // SLOTS


def lane_name(order: Order, concurrency: int, type: str, slot: int) -> str:
    """The lane of an event, as stores and the bus name it: the type's name for order "type", the number of the range of slots for
    "key", and "" for the one lane of "log" and "none"."""
    if order == "type":
        return type
    return str(lane_of_slot(slot, concurrency)) if order == "key" else ""


def slots_of(lane: str, lanes: int) -> tuple[int, int]:
    """The range of slots of a lane that is named by its number: from the first up to and without the second."""
    number = int(lane)
    return -(-number * SLOTS // lanes), -(-(number + 1) * SLOTS // lanes)


def type_matches(pattern: str, type: str) -> bool:
    """Whether a type name is meant by a pattern: a name, `"prefix.*"`, or `"*"`."""
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return type.startswith(pattern[:-1])
    return pattern == type


def covers(patterns: Iterable[str], pattern: str) -> bool:
    """Whether a type, or all types that a pattern means, are meant by these."""
    return any(type_matches(each, pattern) for each in patterns)


class Patterns:
    """Patterns, made ready to be asked about many types: each answer takes as long, however many there are."""

    __slots__ = ("_exact", "_prefixes")

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact = dict.fromkeys(patterns)
        self._prefixes = tuple([each[:-1] for each in self._exact if each == "*" or each.endswith(".*")])

    def cover(self, pattern: str) -> bool:
        """As `covers`."""
        return pattern in self._exact or pattern.startswith(self._prefixes)

    def names(self, known: Iterable[str]) -> list[str]:
        """The types that they mean, given those that are known: the names among them, and what matches the others."""
        exact = [each for each in self._exact if not each.endswith("*")]
        if not self._prefixes:
            return exact
        return exact + [type for type in known if type not in self._exact and type.startswith(self._prefixes)]


def since_of(since: Mapping[str, int], type: str) -> int | None:
    """Where a subscription begins for this type: the smallest start of the patterns that match it, None without one."""
    exact = since.get(type)
    starts = [start for pattern, start in since.items() if pattern.endswith("*") and type_matches(pattern, type)]
    if exact is not None:
        starts.append(exact)
    return min(starts, default=None)


def storable(text: str) -> bool:
    """Whether every store can hold this text: valid Unicode, no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def headers_of(record: Record) -> Mapping[str, str]:
    """The headers of a record as a mapping."""
    return msgspec.json.decode(record.headers, type=dict[str, str]) if record.headers else {}


# ------------------------------------------------------------------ what an attempt leaves behind


WaitingState = Literal["retrying", "running", "parked", "freed"]


class Waiting(msgspec.Struct, frozen=True):
    """A row of `deliveries`: a delivery, or a key from this position on, that the lane's checkpoint has passed unsettled.

    Attributes:
        position: the first unsettled position. With a `key`, every event of that key from here up to the lane's checkpoint
            is unsettled; without one, it is this event alone.
        attempt: attempts made of the event at `position`.
        due_at: unix seconds before which it is not tried again.
        state: "retrying"; "running" where an attempt that takes long was given a row so that the checkpoint could pass it.
            "parked": the event at `position` is a dead letter, and those of its key *after* it wait for the end of that.
            "freed": so it was, and the dead letter is gone: those after it are due.
        first_failed_at: unix seconds of the first failed attempt, or None.
        error: type and message of the last failure, for people to read.
    """

    position: int
    key: str | None
    attempt: int
    due_at: float
    state: WaitingState = "retrying"
    first_failed_at: float | None = None
    error: str | None = None

    @property
    def begins(self) -> int:
        """The first position that is unsettled for all that this row says."""
        return self.position + (self.state in ("parked", "freed"))


class Death(msgspec.Struct, frozen=True):
    """A delivery that is given up on. The store copies the event itself from the log into the dead letter."""

    error_type: str
    error: str
    traceback: str
    attempts: int
    first_failed_at: float
    last_failed_at: float


Source = Literal["log", "row", "redrive", "replay"]


class Unit(msgspec.Struct, frozen=True):
    """What became of a delivery: written whole or not at all, with the events that its attempt published.

    It is applied only if the lane's epoch holds *and* the delivery is still unsettled in the store. The latter means,
    by `source`:

    - "log": `position` lies above the lane's checkpoint and is not in its `done`;
    - "row": the row of `deliveries` at `row` is there;
    - "redrive": the dead letter `dead_letter` is there, and being redriven;
    - "replay": always.

    A unit of a lane that settles nothing special (no rows and no deaths) stands for all deliveries of that lane that it says are
    settled, up to `position`, and for all that these have published.

    Attributes:
        position: of the delivery. A unit that reports a retry names the position that is still to settle.
        checkpoint: the lane's checkpoint from now on; never below the stored one.
        done: positions above the checkpoint that are settled (orders "key" and "none").
        attempt, due_at, first_failed_at, error: of the lane's next event, where the lane waits for it (orders "type" and
            "log"); attempt is 0 where nothing waits.
        row: position of the row of `deliveries` that this unit removes.
        rows: rows of `deliveries` that it writes, after the removal.
        death: the delivery ends as a dead letter. If it has one already (it was replayed), that one is brought up to date.
        dead_letter: id of the dead letter that is redriven. Without `death` and `retry`, the unit deletes it, and a row
            that is parked at `position` is freed: due now, at attempt 0.
        retry: the redriven dead letter is tried again: its attempts so far and when it is due.
        pause: the reason for which the subscription is paused from now on.
        published: events that become part of the log with this unit. One with an idempotency key that is known is left out.
        conflict: how the delivery ends if the key of a published event belongs to other content: as a dead letter, without any
            of its published events. The unit then counts as applied, and is reported in `Committed.conflicts`.
    """

    subscription: str
    lane: str
    epoch: int
    source: Source
    position: int
    checkpoint: int
    done: tuple[int, ...] = ()
    attempt: int = 0
    due_at: float | None = None
    first_failed_at: float | None = None
    error: str | None = None
    row: int | None = None
    rows: tuple[Waiting, ...] = ()
    death: Death | None = None
    dead_letter: int | None = None
    retry: tuple[int, float] | None = None
    pause: str | None = None
    published: tuple[Record, ...] = ()
    conflict: Death | None = None


Refusal = Literal["fenced", "settled"]
"""Why a unit was left out: the lane's epoch is another now; the delivery was settled before."""


class Floor(msgspec.Struct, frozen=True):
    """What a subscription had settled when its order or concurrency changed: its lanes of then, and what waited in them. Events
    that it says are settled are passed by.

    Attributes:
        lanes: by name: the checkpoint, and the positions above it that were settled.
        waiting: what the rows of `deliveries` of then said is unsettled: where it begins, and the key; see `Waiting`.
        types: the patterns that those lanes held; of others they say nothing.
    """

    order: Order
    concurrency: int
    lanes: Mapping[str, tuple[int, tuple[int, ...]]]
    waiting: tuple[tuple[int, str | None], ...] = ()
    types: tuple[str, ...] = ("*",)

    def settles(self, position: int, type: str, slot: int, key: str | None) -> bool:
        """Whether an event was settled."""
        if not covers(self.types, type):
            return False
        checkpoint, done = self.lanes.get(lane_name(self.order, self.concurrency, type, slot), (0, ()))
        if position > checkpoint and position not in done:
            return False
        return not any(position == at if of is None else (position >= at and key == of) for at, of in self.waiting)

    def below(self, type: str) -> int:
        """All events of a type up to here were settled."""
        if not covers(self.types, type):
            return 0
        lanes = [self.lanes.get(type, (0, ()))] if self.order == "type" else [*self.lanes.values()]
        if self.order == "key" and len(lanes) < self.concurrency:
            return 0  # some have not begun
        return max(0, min([*(checkpoint for checkpoint, _ in lanes), *(at - 1 for at, _ in self.waiting)], default=0))

    def down_to(self, position: int) -> Floor:
        """What of it lies at or below a position."""
        lanes = {
            lane: (min(checkpoint, position), tuple(each for each in done if each <= position))
            for lane, (checkpoint, done) in self.lanes.items()
        }
        waiting = tuple((at, key) for at, key in self.waiting if at <= position)
        return Floor(self.order, self.concurrency, lanes, waiting, self.types)

    def up_to(self) -> int:
        """Nothing above this was settled."""
        return max((max(checkpoint, *done, 0) for checkpoint, done in self.lanes.values()), default=0)


class LaneState(msgspec.Struct, frozen=True):
    """A row of `lanes`. See `Unit` for the fields."""

    subscription: str
    lane: str
    epoch: int
    checkpoint: int
    done: tuple[int, ...] = ()
    attempt: int = 0
    due_at: float | None = None
    first_failed_at: float | None = None
    error: str | None = None
