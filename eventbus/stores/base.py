"""The Store protocol: what a store must do, and the records that go in and come out.

On the way publish → journal → *store* → lanes → workers → outcome this is the durable end. The journal's writer thread
hands in a `Batch` and gets a `Committed` back; the reader thread asks with a `Query` and gets records. A store is blocking
and knows neither event loops, nor classes of events, nor handlers: it sees names, numbers and bytes.

A store passes `eventbus.testing.conformance`, which says in tests what is said here in words.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, Protocol

import attrs
from typing_extensions import TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

SLOTS = 1024
"""Slots that keys are spread over. Stored with every event, so it never changes."""

Order = Literal["type", "key", "log", "none"]


# ------------------------------------------------------------------ events


@attrs.define(eq=False)
class Record:
    """An event on its way: what `publish` made of it, and where it came to lie.

    Not frozen, since the store gives it its `position` and one object goes all the way; nobody else changes it.

    Attributes:
        position: its place in the log; 0 until it is committed, and while it is scheduled.
        id: UUIDv7, as text.
        type, version: stored name and version of its class.
        time: when it was published, unix seconds to the microsecond.
        key: what `order="key"` orders by, or None.
        slot: crc32 of the key (without one: of the id) modulo `SLOTS`.
        headers: a JSON object of strings as text, or None where there are none.
        content_type, data: what the codec made of the event.
        idempotency_key: unique over stored and scheduled events for as long as it is kept.
        due_at: unix seconds; with it the event is scheduled, and enters the log when it is due.
        event: the user's object, where handlers may share it; never stored.
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
    fault: str | None = None


def checksum(record: Record, position: int | None = None) -> int:
    """crc32 over everything of a record that is stored in the log, its position included; of the one given, for a record that
    has none yet."""
    place = record.position if position is None else position
    head = (
        f"{place}|{record.id}|{record.type}|{record.version}|{record.time!r}|{record.key}|{record.headers}|{record.content_type}|"
    )
    return zlib.crc32(record.data, zlib.crc32(head.encode()))


def slot_of(key: str) -> int:
    """The slot of a key, or of the id of an event without one."""
    return zlib.crc32(key.encode()) % SLOTS


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


def since_of(since: Mapping[str, int], type: str) -> int | None:
    """Where a subscription begins for this type: the smallest start of the patterns that match it, None without one."""
    exact = since.get(type)
    starts = [start for pattern, start in since.items() if pattern.endswith("*") and type_matches(pattern, type)]
    if exact is not None:
        starts.append(exact)
    return min(starts, default=None)


# ------------------------------------------------------------------ what an attempt leaves behind


@attrs.frozen
class Waiting:
    """A row of `deliveries`: a delivery, or a key from this position on, that the lane's checkpoint has passed unsettled.

    Attributes:
        position: the first unsettled position. With a `key`, every event of that key from here up to the lane's checkpoint
            is unsettled; without one, it is this event alone.
        attempt: attempts made of the event at `position`.
        due_at: unix seconds before which it is not tried again.
        state: "retrying"; "running" where an attempt that takes long was given a row so that the checkpoint could pass it.
        first_failed_at: unix seconds of the first failed attempt, or None.
        error: type and message of the last failure, for people to read.
    """

    position: int
    key: str | None
    attempt: int
    due_at: float
    state: Literal["retrying", "running"] = "retrying"
    first_failed_at: float | None = None
    error: str | None = None


@attrs.frozen
class Death:
    """A delivery that is given up on. The store copies the event itself from the log into the dead letter."""

    error_type: str
    error: str
    traceback: str
    attempts: int
    first_failed_at: float
    last_failed_at: float


Source = Literal["log", "row", "redrive", "replay"]


@attrs.frozen
class Unit:
    """What became of a delivery: written whole or not at all, with the events that its attempt published.

    It is applied only if the lane's epoch holds *and* the delivery is still unsettled in the store. The latter means,
    by `source`:

    - "log": `position` lies above the lane's checkpoint and is not in its `done`;
    - "row": the row of `deliveries` at `row` is there;
    - "redrive": the dead letter `dead_letter` is there, and being redriven;
    - "replay": always.

    A unit of a lane that settles nothing special (no rows, deaths or events) stands for all deliveries of that lane up to
    `position`.

    Attributes:
        position: of the delivery. A unit that reports a retry names the position that is still to settle.
        checkpoint: the lane's checkpoint from now on; never below the stored one.
        done: positions above the checkpoint that are settled (order "none" only).
        attempt, due_at, first_failed_at, error: of the lane's next event, where the lane waits for it (orders "type" and
            "log"); attempt is 0 where nothing waits.
        row: position of the row of `deliveries` that this unit removes.
        rows: rows of `deliveries` that it writes, after the removal.
        death: the delivery ends as a dead letter. If it has one already (it was replayed), that one is brought up to date.
        dead_letter: id of the dead letter that is redriven. Without `death` and `retry`, the unit deletes it.
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


# ------------------------------------------------------------------ commands: the writes that are not on an event's path


@attrs.frozen
class Command(Generic[T_co]):
    """A write that is not on the path of an event. Its result stands in `Committed.results`; an `EventBusError` there
    means that this command wrote nothing (the others of the batch did)."""


@attrs.frozen
class Instance:
    """One running bus in one process."""

    id: str
    name: str
    host: str
    pid: int
    started: float


@attrs.frozen
class Registration:
    """A subscription as its program declares it.

    Attributes:
        types: exact names and patterns.
        derived: those of `types` that are there as subclasses of a class that was given.
        start: where a *new* subscription begins: "now" (the head of this transaction), "beginning", unix seconds as a float
            (with the first event at or after it), or a position as an int (with the event after it). A type that joins a
            stored subscription begins at the head.
    """

    name: str
    types: tuple[str, ...]
    order: Order
    concurrency: int
    start: str | float | int = "now"
    derived: tuple[str, ...] = ()


@attrs.frozen
class Subscribed:
    """A subscription as it is stored.

    Attributes:
        since: for each pattern it was ever registered with, the position after which it begins.
        derived: the types that ever joined it as subclasses; a program need not know them all.
        paused: the reason, or None. paused_at, created_at: unix seconds.
    """

    name: str
    types: tuple[str, ...]
    since: Mapping[str, int]
    order: Order
    concurrency: int
    paused: str | None
    paused_at: float | None
    created_at: float
    derived: tuple[str, ...] = ()


@attrs.frozen
class Register(Command["tuple[Subscribed, ...]"]):
    """Store subscriptions, or bring stored ones up to date; the result is how they stand, in the order given.

    A change of `order` or `concurrency` is applied if the subscription has nothing unsettled (its lanes are made anew,
    at the head); otherwise the result is an `InvalidSubscription` that says what to do, and nothing is registered."""

    subscriptions: tuple[Registration, ...]


@attrs.frozen
class LaneState:
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


@attrs.frozen
class Claim(Command["tuple[LaneState, ...]"]):
    """Become the owner of lanes: each gets the next epoch, which fences whoever owned it before. A lane without a row
    begins at the position given with it. The results stand in the order of `lanes`: (subscription, lane, start)."""

    instance: str
    lanes: tuple[tuple[str, str, int], ...]


@attrs.frozen
class Beat(Command[None]):
    """This instance is alive; writes its row of `instances`, or removes it with `leaving`."""

    instance: Instance
    leaving: bool = False


@attrs.frozen
class Pause(Command[None]):
    """Pause a subscription, with the reason; with None, resume it: its waiting deliveries are due now, at attempt 0.
    `UnknownSubscription` if there is none."""

    subscription: str
    reason: str | None


@attrs.frozen
class Unsubscribe(Command[None]):
    """Remove a subscription, its lanes and its waiting deliveries. Its dead letters stay. `UnknownSubscription` if there is none."""

    subscription: str


@attrs.frozen
class Rewind(Command["tuple[LaneState, ...]"]):
    """Set all checkpoints of a subscription to `after`, where they are above it: what lies after it is handled again, as
    if it were new. Its waiting deliveries and its dead letters at positions above `after` go (a dead letter only where its
    event is still in the log); each lane gets the next epoch and attempt 0. A start (`Subscribed.since`) above `after`
    comes down to it. The result is its lanes."""

    subscription: str
    after: int


@attrs.frozen
class Cancel(Command[bool]):
    """Remove a scheduled event. False if it is not there: it was delivered, cancelled before, or never scheduled. Its
    idempotency key goes with it."""

    event_id: str


@attrs.frozen
class Promote(Command["float | None"]):
    """Move the scheduled events that are due at `now` into the log, at most `limit`, in order of due time, then id; each
    keeps its id and gets `now` as its time. The result is when the next one is due (unix seconds), or None. The events
    stand in `Committed.events`."""

    now: float
    limit: int


@attrs.frozen
class DeadLetterFilter:
    """Which dead letters: all conditions must hold; None means any.

    Attributes:
        type: exact, or a pattern. error: name of the error's class. since, until: unix seconds (inclusive) of the last failure.
        redriving: whether it is being redriven.
    """

    ids: tuple[int, ...] | None = None
    event_id: str | None = None
    subscription: str | None = None
    type: str | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None
    redriving: bool | None = None


@attrs.frozen
class Redrive(Command["tuple[str, ...]"]):
    """Mark dead letters as being redriven: due now, attempt 0. Those that are already are left as they are. The result
    names the subscription of each that was marked."""

    filter: DeadLetterFilter


@attrs.frozen
class Discard(Command[int]):
    """Delete dead letters, also those being redriven. The result is how many."""

    filter: DeadLetterFilter


@attrs.frozen
class Prune(Command["int | None"]):
    """Remove events published before `before` (unix seconds) that no subscription needs, looking at no more than `limit`
    events after the position `after`. An event is needed by a subscription (a stored one, whether or not it has a handler)
    if its type matches `since` and it lies above both the start and the checkpoint of its lane, or in the reach of a
    waiting delivery; or if it lies at or above `pinned`. Idempotency keys used before `keys_before` go too. The result is the
    position to go on after, or None at the end."""

    before: float | None
    keys_before: float
    after: int
    limit: int
    pinned: int | None = None


# ------------------------------------------------------------------ the transaction


@attrs.frozen
class Batch:
    """One transaction. Applied in this order: commands, appends, units.

    Attributes:
        appends: groups of events, each of them all or nothing. Events with `due_at` are scheduled.
        units: outcomes; those of a lane stand in the order in which they happened.
        now: unix seconds, for what the store dates itself.
    """

    now: float
    appends: Sequence[Sequence[Record]] = ()
    units: Sequence[Unit] = ()
    commands: Sequence[Command[object]] = ()


@attrs.frozen
class Stored:
    """Where a published event came to lie. position is None while it is scheduled; duplicate says that its idempotency key
    was known, and that id and position are those of the first."""

    id: str
    position: int | None
    duplicate: bool = False


@attrs.frozen
class Committed:
    """What a transaction did; by the time it is returned it is durable.

    Attributes:
        previous_head, head: the log's last position before and after.
        appends: for each group its events' places, or the conflict for which it was left out whole.
        refused: for each unit that was left out, by its index, why.
        conflicts: indexes of the units whose delivery ended as a dead letter, by `Unit.conflict`.
        results: for each command its result, or the error for which it wrote nothing.
        events: all events that entered the log with it, by position: appended, published by units, promoted.
    """

    previous_head: int
    head: int
    appends: Sequence[Sequence[Stored] | Exception]
    refused: Mapping[int, Refusal]
    results: Sequence[object]
    events: Sequence[Record]
    conflicts: Sequence[int] = ()


# ------------------------------------------------------------------ queries


@attrs.frozen
class Query(Generic[T_co]):
    """A question to the store; each sees one consistent state of it."""


@attrs.frozen
class Page:
    """A stretch of the log.

    Attributes:
        records: by position.
        up_to: every matching event after the asked `after` and up to this position is in `records`. Once a page has said
            so, no event at or below it appears later.
        head: the log's last position when it was read.
    """

    records: Sequence[Record]
    up_to: int
    head: int


@attrs.frozen
class Events(Query[Page]):
    """Events after a position, at most `limit` of them and at most `max_bytes` of data (but at least one event).

    Attributes:
        until: the last position of interest, None for the head.
        types: exact names, None for all. key: only events with this key.
        since, until_time: unix seconds, inclusive.
    """

    after: int
    limit: int
    max_bytes: int
    until: int | None = None
    types: tuple[str, ...] | None = None
    key: str | None = None
    since: float | None = None
    until_time: float | None = None


@attrs.frozen
class EventsAt(Query["tuple[Record, ...]"]):
    """The events at these positions, by position; those that are gone are left out."""

    positions: tuple[int, ...]


@attrs.frozen
class Types(Query["Mapping[str, int]"]):
    """The names of the types in the log, each with the position of its last event."""


@attrs.frozen
class Subscriptions(Query["tuple[Subscribed, ...]"]):
    """All stored subscriptions, by name."""


@attrs.frozen
class Lanes(Query["tuple[LaneState, ...]"]):
    """All lanes, or those of one subscription."""

    subscription: str | None = None


@attrs.frozen
class WaitingRow:
    """A waiting delivery and the lane it belongs to."""

    subscription: str
    lane: str
    waiting: Waiting


@attrs.frozen
class WaitingRows(Query["tuple[WaitingRow, ...]"]):
    """The rows of `deliveries`, by position: of one subscription, or of all."""

    subscription: str | None = None


@attrs.frozen
class DeadLetterRow:
    """A row of `dead_letters`. `record` is its own copy of the event; attempt and due_at belong to the redrive."""

    id: int
    subscription: str
    record: Record
    death: Death
    redriving: bool
    attempt: int
    due_at: float | None


@attrs.frozen
class DeadLetters(Query["tuple[DeadLetterRow, ...]"]):
    """Dead letters with an id above `after`, by id."""

    filter: DeadLetterFilter
    after: int = 0
    limit: int | None = None


@attrs.frozen
class CountDeadLetters(Query["Mapping[str, int]"]):
    """How many dead letters each subscription has."""


@attrs.frozen
class Find(Query["Record | None"]):
    """The event with this id, in the log (position > 0) or scheduled (position 0)."""

    event_id: str


@attrs.frozen
class PositionBefore(Query[int]):
    """The last position before the first event published at or after `time` (unix seconds); the head if there is none."""

    time: float


@attrs.frozen
class Retained:
    """What the log holds. pruned_to, pruned_time: position and time of the newest event that retention has removed, 0 if none."""

    head: int
    pruned_to: int
    pruned_time: float
    events: int


@attrs.frozen
class LogState(Query[Retained]):
    """What the log holds. `events` is exact up to 10,000 and 10,001 beyond."""


@attrs.frozen
class NextDue(Query["float | None"]):
    """When the next scheduled event is due (unix seconds)."""


@attrs.frozen
class Lag(Query["tuple[int, float | None]"]):
    """How many events of these types (None: all) lie after `after` up to `until` (None: the head), in the slots
    from `slots[0]` up to and without `slots[1]`, counted up to `limit`; and the time (unix seconds) of the first."""

    after: int
    types: tuple[str, ...] | None
    slots: tuple[int, int] = (0, SLOTS)
    limit: int = 10_000
    until: int | None = None


# ------------------------------------------------------------------ the protocol


@attrs.frozen
class Features:
    """What a store can do; checked when a bus opens it.

    Attributes:
        concurrent_reads: `read` may be called from a second thread while `commit` runs in the first.
        survives_power_loss: a batch that was committed is there after the power went out.
    """

    concurrent_reads: bool
    survives_power_loss: bool


class Store(Protocol):
    """Where the log is kept. Every method blocks.

    The bus calls `open`, `commit` and `close` from one thread; `read` from the same thread, or, where the store has
    `concurrent_reads`, from one second thread. A store may be opened again after it was closed.
    """

    @property
    def address(self) -> str:
        """What a person would call this store, for messages: a path or a URL, without secrets."""

    @property
    def features(self) -> Features:
        """What this store can do."""

    def open(self, instance: Instance) -> None:
        """Make ready, creating or migrating what is not there yet.

        Raises:
            StoreInUse: another instance has it; the message says which.
            StoreTooNew, StoreUnsafe, StoreCorrupt, StoreUnavailable: it cannot be used, and why.
        """

    def close(self) -> None:
        """Let go of everything. Safe to call twice, and after `open` has failed."""

    def commit(self, batch: Batch) -> Committed:
        """Apply a batch in ONE atomic and durable transaction.

        - Positions are given in ascending order, each once for ever, also after everything was removed.
        - They become visible in order: once `read` has returned a page up to p, nothing at or below p appears later.
        - The records of the batch get their positions only when it is committed.
        - Units of a lane take effect in their order; a unit that is left out is left out whole.

        Raises:
            StoreBusy, StoreFull, StoreUnavailable: nothing of the batch was stored; it may be tried again.
            StoreLost, StoreCorrupt: nothing of it can be relied upon; the store must be closed.
            PublishOutcomeUnknown: not even a second look could tell.
        """

    def read(self, query: Query[T]) -> T:
        """Answer a query from one consistent state that holds every batch committed before the call.

        Raises:
            StoreUnavailable, StoreCorrupt: it could not be read.
        """


def headers_of(record: Record) -> Mapping[str, str]:
    """The headers of a record as a mapping."""
    return json.loads(record.headers) if record.headers else {}
