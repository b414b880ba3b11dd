"""Commands: the writes of a store that are not on an event's way.

publish → journal → *store* → lanes → workers → outcome. They go through the journal like everything that is written, and are
carried out before the events and the outcomes of their transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

import msgspec
from typing_extensions import TypeVar

from eventbus.stores.records import Floor, LaneState, Order, covers, since_of

T_co = TypeVar("T_co", covariant=True)


class Command(msgspec.Struct, Generic[T_co], frozen=True):
    """A write that is not on the path of an event. Its result stands in `Committed.results`; an `EventBusError` there
    means that this command wrote nothing (the others of the batch did)."""


class Instance(msgspec.Struct, frozen=True):
    """One running bus in one process."""

    id: str
    name: str
    host: str
    pid: int
    started: float


class Registration(msgspec.Struct, frozen=True):
    """A subscription as its program declares it.

    Attributes:
        types: exact names and patterns.
        derived: those of `types` that are there as subclasses of a class that was given.
        start: where a *new* subscription begins: "now" (the head of this transaction), "beginning", unix seconds as a float
            (with the first event at or after it), or a position as an int (with the event after it). A type that joins a
            stored subscription begins at the head.
        dispatched: whether this instance runs it; one that does not leaves order and concurrency of a stored one as they are.
    """

    name: str
    types: tuple[str, ...]
    order: Order
    concurrency: int
    start: str | float | int = "now"
    derived: tuple[str, ...] = ()
    dispatched: bool = True


class Subscribed(msgspec.Struct, frozen=True):
    """A subscription as it is stored.

    Attributes:
        types: the patterns that are served.
        since: for each pattern it was ever registered with, the position after which it begins.
        derived: the types that ever joined it as subclasses; a program need not know them all.
        paused: the reason, or None. paused_at, created_at: unix seconds.
        generation: another with each change of order or concurrency; never one that a subscription of this name had before.
        floors: what was settled by lanes of earlier, above the checkpoints of those of now, or of types that these do not hold.
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
    generation: int = 0
    floors: tuple[Floor, ...] = ()

    def wants(self, type: str) -> bool:
        """Whether it is to have the events of this type that come after where it begins."""
        return since_of(self.since, type) is not None

    def holds(self, type: str) -> bool:
        """Whether a lane that has passed an event of this type has settled it. Where lanes hold several types they pass by those
        that no instance serves, or served when it was passed: these are unsettled, if they are not too old (`since`)."""
        return self.order == "type" or covers((*self.types, *self.derived), type)

    def settled_up_to(self, type: str) -> int:
        """All events of a type up to here were settled by lanes of earlier, or come before it begins; some above may be."""
        return max([since_of(self.since, type) or 0, *(floor.below(type) for floor in self.floors)])

    def settled_before(self, position: int, type: str, slot: int, key: str | None) -> bool:
        """Whether an event was settled by lanes of earlier: before the order, or the types that they hold, were others."""
        return any(floor.settles(position, type, slot, key) for floor in self.floors)


class Register(Command[tuple[Subscribed, ...]], frozen=True):
    """Store subscriptions, or bring stored ones up to date; the result is how they stand, in the order given.

    - A change of `order` or `concurrency` begins another generation. While an instance that is alive serves the stored one
      (`Serves`), it stays; the result says so, and the command is to be given again when that has gone. The lanes of the new
      generation begin at the first event that is unsettled; what the old one had settled above that becomes a `Floor`.
    - A type that joins a subscription whose lanes hold several types (all orders but "type") fences its lanes: who owns them
      may not know it, and would pass it by. If they have passed events of it already, it begins another generation; while keys
      are parked it cannot, and the type is not among `types` yet: the command is to be given again.
    - Types that an instance that is alive serves, and that are not given, stay. One that is registered without being dispatched
      has events from now on; they wait for an instance that serves it.
    """

    subscriptions: tuple[Registration, ...]
    instance: str = ""


class Claim(Command[tuple[LaneState | None, ...]], frozen=True):
    """Become the owner of lanes: each gets the next epoch, which fences whoever owned it before. A lane without a row
    begins at the position given with it. The results stand in the order of `lanes`: (subscription, lane, start). None: another
    instance that is alive owns it, or the subscription is in another generation than the one given."""

    instance: str
    lanes: tuple[tuple[str, str, int], ...]
    generations: Mapping[str, int] = {}


class Release(Command[None], frozen=True):
    """Own these lanes no more: (subscription, lane). Those that this instance does not own are left as they are."""

    instance: str
    lanes: tuple[tuple[str, str], ...]


class Serves(msgspec.Struct, frozen=True):
    """How an instance serves a subscription.

    Attributes:
        types: what it declares: names and patterns.
        cannot: lanes in which it has met an event that it cannot decode.
        stuck: threads of its handlers that have outlived their timeout; for people who look from outside.
    """

    order: Order
    concurrency: int
    types: tuple[str, ...]
    cannot: tuple[str, ...] = ()
    stuck: int = 0


class Beat(Command[bool], frozen=True):
    """This instance is alive for the next `lease` seconds; or, with `leaving`, it ends, and its lanes are free.

    Other instances that are not alive any more are removed: those of another start of the machine, those whose lease has ended,
    and those of which the store knows that they have died. The result is whether this one was known until now; if not, it is
    new, or the others have taken it for dead, and its lanes with it.

    Attributes:
        monotonic: the time, by `Store.monotonic`.
        serves: the subscriptions that it runs. holds: those of them that it wants whole, for a replay.
        pinned: nothing from this position on is to be removed by retention, for it is being read.
    """

    instance: Instance
    monotonic: float = 0.0
    lease: float = 10.0
    serves: Mapping[str, Serves] = {}
    holds: tuple[str, ...] = ()
    pinned: int | None = None
    leaving: bool = False


class Mark(msgspec.Struct, frozen=True):
    """An attempt that is about to run in a lane on probation. alone: nothing else runs in the process meanwhile."""

    position: int
    alone: bool = False


class Marking(Command[bool], frozen=True):
    """A lane whose owner has died is on probation: note what an instance begins in it, and what is over. The result is False if
    this was left out, whole, because the lane is in another epoch, as with a `Unit`: then it may be another's.

    What an instance has begun when it is found dead (see `Beat`) is suspected from then on; if it was alone, it is charged
    with the death as well. See `Suspicions`. An instance that leaves takes its marks along, but for what was suspected before;
    and so does one whose lease has ended while the store knows that its process lives, stopped perhaps or hanging, and one of
    another start of the machine: neither has died of an event. Nor is anybody's death charged to what had been begun in a lane
    before it was claimed.

    Attributes:
        begun: marks that are added. over: positions whose marks are removed. cleared: the lane is not on probation any more; its
            marks go.
    """

    instance: str
    subscription: str
    lane: str
    epoch: int
    begun: tuple[Mark, ...] = ()
    over: tuple[int, ...] = ()
    cleared: bool = False


class Revived(msgspec.Struct, frozen=True):
    """A delivery that is as it was: unsettled, after so many attempts, due now. `epoch`: its lane's, when it failed."""

    lane: str
    epoch: int
    position: int
    key: str | None
    attempts: int


class Revive(Command[tuple[LaneState, ...]], frozen=True):
    """Take back what failed attempts have left behind: dead letters of these deliveries are deleted, and each is unsettled again.

    - In orders "type" and "log" the lane's checkpoint goes back before the first of them, so nothing behind it may have been
      handled.
    - In order "key" there is one row for each key, at its first position, so none of the key behind it may have been.
    - In order "none" there is a row for each.

    Lanes that the instance does not own in that epoch are left alone. So are deliveries whose event is not in the log any more,
    and those that were settled meanwhile, by a discard: what the lane is past, and has neither a dead letter nor a row that holds
    it (`Waiting.begins`); and with them what came before them, in the lane or, in order "key", the key.
    Each lane that is changed gets the next epoch. The result is how the lanes stand that are the instance's in that epoch, those
    that were not changed as well; one that is missing was another's, or was set back before.
    """

    instance: str
    subscription: str
    deliveries: tuple[Revived, ...]


class Pause(Command[None], frozen=True):
    """Pause a subscription, with the reason; with None, resume it: its waiting deliveries are due now, at attempt 0; what is
    parked stays so.
    `UnknownSubscription` if there is none."""

    subscription: str
    reason: str | None


class Unsubscribe(Command[None], frozen=True):
    """Remove a subscription, its lanes and its waiting deliveries. Its dead letters stay.

    `UnknownSubscription` if there is none.
    """

    subscription: str


class Rewind(Command[tuple[LaneState, ...]], frozen=True):
    """Set all checkpoints of a subscription to `after`, where they are above it: what lies after it is handled again, as
    if it were new. Its waiting deliveries and its dead letters at positions above `after` go (a dead letter only where its
    event is still in the log); each lane gets the next epoch and attempt 0. A start (`Subscribed.since`) above `after`
    comes down to it. The result is its lanes."""

    subscription: str
    after: int


class Cancel(Command[bool], frozen=True):
    """Remove a scheduled event. False if it is not there: it was delivered, cancelled before, or never scheduled. Its
    idempotency key goes with it."""

    event_id: str


class Promoted(msgspec.Struct, frozen=True):
    """What a `Promote` has found.

    Attributes:
        next_due: when the next scheduled event is due (unix seconds), or None.
        damaged: of the events that it moved, those that did not match their checksums: id, and what is wrong.
    """

    next_due: float | None
    damaged: tuple[tuple[str, str], ...] = ()


class Promote(Command[Promoted], frozen=True):
    """Move the scheduled events that are due at `now` into the log, at most `limit`, in order of due time, then id; each
    keeps its id and gets `now` as its time. The events stand in `Committed.events`. One that is damaged is moved as it is, and
    never delivered as good; where its type is what is damaged, the subscriptions to what it was do not see it."""

    now: float
    limit: int


class DeadLetterFilter(msgspec.Struct, frozen=True):
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


class Redrive(Command[tuple[str, ...]], frozen=True):
    """Mark dead letters as being redriven: due now, attempt 0. Those that are already are left as they are. The result
    names the subscription of each that was marked."""

    filter: DeadLetterFilter


class Discard(Command[int], frozen=True):
    """Delete dead letters, also those being redriven. The result is how many. Rows of `deliveries` that are parked behind one
    of them are freed: due now, at attempt 0."""

    filter: DeadLetterFilter


class Prune(Command[int | None], frozen=True):
    """Remove events published before `before` (unix seconds) that no subscription needs, looking at no more than `limit`
    events after the position `after`. An event is needed by a subscription (a stored one, whether or not it has a handler)
    if its type matches `since` and it lies above both the start and the checkpoint of its lane, or in the reach of a
    waiting delivery; or if it lies at or above `pinned`, or what an instance has pinned (`Beat`). Idempotency keys used before
    `keys_before` go too. The result is the position to go on after, or None at the end."""

    before: float | None
    keys_before: float
    after: int
    limit: int
    pinned: int | None = None
