"""Commands: the writes of a store that are not on an event's way.

publish → journal → *store* → lanes → workers → outcome. They go through the journal like everything that is written, and are
carried out before the events and the outcomes of their transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

import msgspec
from typing_extensions import TypeVar

from eventbus.stores.records import LaneState, Order

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
    """

    name: str
    types: tuple[str, ...]
    order: Order
    concurrency: int
    start: str | float | int = "now"
    derived: tuple[str, ...] = ()


class Subscribed(msgspec.Struct, frozen=True):
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


class Register(Command[tuple[Subscribed, ...]], frozen=True):
    """Store subscriptions, or bring stored ones up to date; the result is how they stand, in the order given.

    A change of `order` or `concurrency` is applied if the subscription has nothing unsettled (its lanes are made anew,
    at the head); otherwise the result is an `InvalidSubscription` that says what to do, and nothing is registered."""

    subscriptions: tuple[Registration, ...]


class Claim(Command[tuple[LaneState, ...]], frozen=True):
    """Become the owner of lanes: each gets the next epoch, which fences whoever owned it before. A lane without a row
    begins at the position given with it. The results stand in the order of `lanes`: (subscription, lane, start)."""

    instance: str
    lanes: tuple[tuple[str, str, int], ...]


class Beat(Command[None], frozen=True):
    """This instance is alive; writes its row of `instances`, or removes it with `leaving`."""

    instance: Instance
    leaving: bool = False


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


class Promote(Command[float | None], frozen=True):
    """Move the scheduled events that are due at `now` into the log, at most `limit`, in order of due time, then id; each
    keeps its id and gets `now` as its time. The result is when the next one is due (unix seconds), or None. The events
    stand in `Committed.events`."""

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
    waiting delivery; or if it lies at or above `pinned`. Idempotency keys used before `keys_before` go too. The result is the
    position to go on after, or None at the end."""

    before: float | None
    keys_before: float
    after: int
    limit: int
    pinned: int | None = None
