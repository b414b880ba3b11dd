"""Queries: what a store can be asked.

publish → journal → *store* → *lanes* → workers → outcome. Lanes that are behind read pages of the log; everything else here
serves replay, history, dead letters and status.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic

import msgspec
from typing_extensions import TypeVar

from eventbus.stores.commands import DeadLetterFilter, Instance, Serves, Subscribed
from eventbus.stores.records import SLOTS, Death, LaneState, Record, Waiting, WaitingState

T_co = TypeVar("T_co", covariant=True)


class Query(msgspec.Struct, Generic[T_co], frozen=True):
    """A question to the store; each sees one consistent state of it."""


class Page(msgspec.Struct, frozen=True):
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


class Events(Query[Page], frozen=True):
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


class EventsAt(Query[tuple[Record, ...]], frozen=True):
    """The events at these positions, by position; those that are gone are left out."""

    positions: tuple[int, ...]


class Types(Query[Mapping[str, int]], frozen=True):
    """The names of the types in the log, each with the position of its last event."""


class Subscriptions(Query[tuple[Subscribed, ...]], frozen=True):
    """All stored subscriptions, by name."""


class Member(msgspec.Struct, frozen=True):
    """An instance as it is stored. seen: unix seconds of its last `Beat`; the rest as there."""

    instance: Instance
    seen: float
    serves: Mapping[str, Serves] = {}
    holds: tuple[str, ...] = ()


class LaneOwner(msgspec.Struct, frozen=True):
    """Whose a lane is: the id of an instance, which need not be alive, or None."""

    subscription: str
    lane: str
    owner: str | None
    epoch: int


class Standing(msgspec.Struct, frozen=True):
    """Who is there, and who owns what.

    Attributes:
        changes: one more with each change that is not the way of an event: of instances, subscriptions, owners given up, pauses,
            redrives.
        members: the instances that were alive at the last `Beat`, by id.
        subscriptions: by name. lanes: by subscription and name.
    """

    changes: int
    members: tuple[Member, ...]
    subscriptions: tuple[Subscribed, ...]
    lanes: tuple[LaneOwner, ...]


class Stand(Query[Standing], frozen=True):
    """How the instances stand."""


class Suspect(msgspec.Struct, frozen=True):
    """A delivery that was being handled when a process died. deaths: how often it was alone."""

    position: int
    deaths: int


class Suspicion(msgspec.Struct, frozen=True):
    """A lane on probation. deaths: how many of its owners have died since it was cleared."""

    subscription: str
    lane: str
    deaths: int
    marks: tuple[Suspect, ...] = ()


class Suspicions(Query[tuple[Suspicion, ...]], frozen=True):
    """All lanes on probation, by subscription and name."""


class Lanes(Query[tuple[LaneState, ...]], frozen=True):
    """All lanes, or those of one subscription."""

    subscription: str | None = None


class WaitingRow(msgspec.Struct, frozen=True):
    """A waiting delivery and the lane it belongs to."""

    subscription: str
    lane: str
    waiting: Waiting


class WaitingRows(Query[tuple[WaitingRow, ...]], frozen=True):
    """The rows of `deliveries`, by position: of one subscription, or of all; in one state, or in any."""

    subscription: str | None = None
    state: WaitingState | None = None


class DeadLetterRow(msgspec.Struct, frozen=True):
    """A row of `dead_letters`. `record` is its own copy of the event; attempt and due_at belong to the redrive."""

    id: int
    subscription: str
    record: Record
    death: Death
    redriving: bool
    attempt: int
    due_at: float | None


class DeadLetters(Query[tuple[DeadLetterRow, ...]], frozen=True):
    """Dead letters with an id above `after`, by id."""

    filter: DeadLetterFilter
    after: int = 0
    limit: int | None = None


class CountDeadLetters(Query[Mapping[str, int]], frozen=True):
    """How many dead letters each subscription has."""


class Find(Query[Record | None], frozen=True):
    """The event with this id, in the log (position > 0) or scheduled (position 0)."""

    event_id: str


class PositionBefore(Query[int], frozen=True):
    """The last position before the first event published at or after `time` (unix seconds); the head if there is none."""

    time: float


class Retained(msgspec.Struct, frozen=True):
    """What the log holds. pruned_to, pruned_time: position and time of the newest event that retention has removed, 0 if none."""

    head: int
    pruned_to: int
    pruned_time: float
    events: int


class LogState(Query[Retained], frozen=True):
    """What the log holds. `events` is exact up to 10,000 and 10,001 beyond."""


class NextDue(Query[float | None], frozen=True):
    """When the next scheduled event is due (unix seconds)."""


class Lag(Query[tuple[int, float | None]], frozen=True):
    """How many events of these types (None: all) lie after `after` up to `until` (None: the head), in the slots
    from `slots[0]` up to and without `slots[1]`, counted up to `limit`; and the time (unix seconds) of the first."""

    after: int
    types: tuple[str, ...] | None
    slots: tuple[int, int] = (0, SLOTS)
    limit: int = 10_000
    until: int | None = None


class LagOfRows(Query[tuple[int, float | None]], frozen=True):
    """How many events the waiting deliveries of a subscription stand for, counted up to `limit`, and the time (unix seconds)
    of the oldest of them. A row without a key is one event; one with a key stands for the events of that key, of these types
    (None: all), from its position (`Waiting.begins`) up to its lane's checkpoint."""

    subscription: str
    types: tuple[str, ...] | None
    limit: int = 10_000
