"""The Store protocol: what a store must do, and the records that go in and come out.

On the way publish → journal → *store* → lanes → workers → outcome this is the durable end. The journal's writer thread
hands in a `Batch` and gets a `Committed` back; the reader thread asks with a `Query` and gets records. A store is blocking
and knows neither event loops, nor classes of events, nor handlers: it sees names, numbers and bytes.

A store passes `eventbus.testing.conformance`, which says in tests what is said here in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from eventbus.stores.commands import (
    Beat,
    Cancel,
    Claim,
    Command,
    DeadLetterFilter,
    Discard,
    Instance,
    Mark,
    Marking,
    Pause,
    Promote,
    Promoted,
    Prune,
    Redrive,
    Register,
    Registration,
    Release,
    Revive,
    Revived,
    Rewind,
    Serves,
    Subscribed,
    Unsubscribe,
)
from eventbus.stores.queries import (
    CountDeadLetters,
    DeadLetterRow,
    DeadLetters,
    Events,
    EventsAt,
    Find,
    Lag,
    LagOfRows,
    LaneOwner,
    Lanes,
    LogState,
    Member,
    NextDue,
    Page,
    PositionBefore,
    Query,
    Retained,
    Stand,
    Standing,
    Subscriptions,
    Suspect,
    Suspicion,
    Suspicions,
    Types,
    WaitingRow,
    WaitingRows,
)
from eventbus.stores.records import (
    LARGEST,
    SLOTS,
    Death,
    Floor,
    LaneState,
    Order,
    Patterns,
    Record,
    Refusal,
    Source,
    Unit,
    Waiting,
    WaitingState,
    checksum,
    checksum_of,
    checksum_parts,
    covers,
    headers_of,
    lane_name,
    lane_of_slot,
    since_of,
    slot_of,
    slots_of,
    storable,
    type_matches,
)

if TYPE_CHECKING:
    from eventbus.errors import StoreFull

__all__ = [
    "LARGEST",
    "SLOTS",
    "Batch",
    "Beat",
    "Cancel",
    "Claim",
    "Command",
    "Committed",
    "CountDeadLetters",
    "DeadLetterFilter",
    "DeadLetterRow",
    "DeadLetters",
    "Death",
    "Discard",
    "Events",
    "EventsAt",
    "Features",
    "Find",
    "Floor",
    "Instance",
    "Lag",
    "LagOfRows",
    "LaneOwner",
    "LaneState",
    "Lanes",
    "LogState",
    "Mark",
    "Marking",
    "Member",
    "NextDue",
    "Notice",
    "Order",
    "Page",
    "Patterns",
    "Pause",
    "PositionBefore",
    "Promote",
    "Promoted",
    "Prune",
    "Query",
    "Record",
    "Redrive",
    "Refusal",
    "Register",
    "Registration",
    "Release",
    "Retained",
    "Revive",
    "Revived",
    "Rewind",
    "Serves",
    "Source",
    "Stand",
    "Standing",
    "Store",
    "Stored",
    "Subscribed",
    "Subscriptions",
    "Suspect",
    "Suspicion",
    "Suspicions",
    "Types",
    "Unit",
    "Unsubscribe",
    "Waiting",
    "WaitingRow",
    "WaitingRows",
    "WaitingState",
    "checksum",
    "checksum_of",
    "checksum_parts",
    "covers",
    "headers_of",
    "lane_name",
    "lane_of_slot",
    "since_of",
    "slot_of",
    "slots_of",
    "storable",
    "type_matches",
]

T = TypeVar("T")


# ------------------------------------------------------------------ the transaction


def _nothing() -> None:
    pass


class Batch(msgspec.Struct, frozen=True):
    """One transaction. Applied in this order: commands, appends, units.

    Attributes:
        appends: groups of events, each of them all or nothing. Events with `due_at` are scheduled.
        units: outcomes; those of a lane stand in the order in which they happened.
        now: unix seconds, for what the store dates itself.
        begins: called by stores whose `Features.begins` says so, when they hold their locks and have looked at what they have to
            know, before they run commands or write; again is the same as once. A matter of speed: the loop may stand still until
            then, at most a millisecond.
    """

    now: float
    appends: Sequence[Sequence[Record]] = ()
    units: Sequence[Unit] = ()
    commands: Sequence[Command[object]] = ()
    begins: Callable[[], object] = _nothing


class Stored(msgspec.Struct, frozen=True):
    """Where a published event came to lie. position is None while it is scheduled; duplicate says that its idempotency key
    was known, and that id and position are those of the first."""

    id: str
    position: int | None
    duplicate: bool = False


class Committed(msgspec.Struct, frozen=True):
    """What a transaction did; by the time it is returned it is durable.

    Attributes:
        previous_head, head: the log's last position before and after.
        appends: for each group its events' places, or the error for which it was left out whole (a conflict, no room); None where
            all of the group has simply entered the log, so that its records say where they lie.
        refused: for each unit that was left out, by its index, why.
        conflicts: indexes of the units whose delivery ended as a dead letter, by `Unit.conflict`.
        results: for each command its result, or the error for which it wrote nothing.
        events: all events that entered the log with it, by position: appended, published by units, promoted.
    """

    previous_head: int
    head: int
    appends: Sequence[Sequence[Stored] | Exception | None]
    refused: Mapping[int, Refusal]
    results: Sequence[object]
    events: Sequence[Record]
    conflicts: Sequence[int] = ()
    full: StoreFull | None = None


# ------------------------------------------------------------------ the protocol


class Features(msgspec.Struct, frozen=True):
    """What a store can do; checked when a bus opens it.

    Attributes:
        concurrent_reads: `read` may be called from a second thread while `commit` runs in the first.
        survives_power_loss: a batch that was committed is there after the power went out.
        shared: several instances may have it open at once.
        begins: it calls `Batch.begins`.
    """

    concurrent_reads: bool
    survives_power_loss: bool
    shared: bool = False
    begins: bool = False


class Notice(msgspec.Struct, frozen=True):
    """What others have done to a store.

    Attributes:
        head: the log's last position. changes: see `Standing`.
        died: an instance that was alive at the last `Beat` of this one is not any more.
    """

    head: int
    changes: int
    died: bool = False


class Store(Protocol):
    """Where the log is kept. Every method blocks.

    The bus calls `open`, `commit`, `notice` and `close` from one thread; `read` from the same thread, or, where the store has
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
            StoreInUse: another has it for itself and does not let go.
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

    def monotonic(self) -> float:
        """The time by which leases are measured: seconds of a clock that only goes forward and that all instances share. From any
        thread; within microseconds."""

    def notice(self) -> Notice | None:
        """What others have done since the last call; None where nothing was, which must cost no more than microseconds, since it
        is asked for fifty times a second. Called only where the store is `shared`.

        Raises:
            StoreUnavailable: it could not be read. StoreLost, StoreCorrupt: nothing of it can be relied upon.
        """

    def read(self, query: Query[T]) -> T:
        """Answer a query from one consistent state that holds every batch committed before the call.

        Raises:
            StoreUnavailable, StoreCorrupt: it could not be read.
        """
