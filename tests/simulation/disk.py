"""What the oracle keeps: the whole of a store as dicts, and nothing clever.

publish → journal → *store* → lanes → workers → outcome. A crash of the program leaves a `Disk` as it is; an `Oracle` opened on it
goes on from there.
"""

from __future__ import annotations

import attrs
import msgspec

from eventbus.stores.base import (
    DeadLetterFilter,
    DeadLetterRow,
    LaneState,
    Member,
    Record,
    Subscribed,
    Waiting,
    WaitingRow,
    lane_name,
    since_of,
    type_matches,
)

LaneKey = tuple[str, str]


@attrs.define
class Lane:
    """A lane: how it stands, whose it is, how many of its owners have died since it was cleared."""

    state: LaneState
    owner: str | None = None
    deaths: int = 0


@attrs.define
class Key:
    """An idempotency key that is taken, and the event it belongs to."""

    event: Record
    position: int | None
    used_at: float


@attrs.define
class Present:
    """An instance: as it says of itself, and until when it counts as alive."""

    member: Member
    deadline: float
    pinned: int | None


@attrs.define
class Marked:
    """An attempt that somebody has begun in a lane on probation, alone perhaps; `by` is None once that has died."""

    lane: str
    by: str | None = None
    alone: bool = False
    suspect: bool = False
    deaths: int = 0


@attrs.define
class Disk:
    """All that is stored.

    Attributes:
        log: events by position, which is also their order here.
        last_letter: the largest id that a dead letter was given.
        connected: instances that have it open; what a lock file tells a real store.
    """

    head: int = 0
    log: dict[int, Record] = attrs.field(factory=dict)
    scheduled: dict[str, Record] = attrs.field(factory=dict)
    keys: dict[str, Key] = attrs.field(factory=dict)
    subscriptions: dict[str, Subscribed] = attrs.field(factory=dict)
    lanes: dict[LaneKey, Lane] = attrs.field(factory=dict)
    rows: dict[tuple[str, int], WaitingRow] = attrs.field(factory=dict)
    letters: dict[int, DeadLetterRow] = attrs.field(factory=dict)
    last_letter: int = 0
    present: dict[str, Present] = attrs.field(factory=dict)
    marks: dict[tuple[str, int], Marked] = attrs.field(factory=dict)
    changes: int = 1
    pruned_to: int = 0
    pruned_time: float = 0.0
    connected: set[str] = attrs.field(factory=set)

    def lanes_of(self, subscription: str) -> list[Lane]:
        """A subscription's lanes, by name."""
        return [lane for key, lane in sorted(self.lanes.items()) if key[0] == subscription]

    def marks_of(self, subscription: str, lane: str) -> list[tuple[str, int]]:
        """Where the marks of a lane are."""
        return [place for place, marked in self.marks.items() if (place[0], marked.lane) == (subscription, lane)]

    def marks_by(self, instances: set[str]) -> list[tuple[str, int]]:
        """Where the marks of some instances are."""
        return [place for place, marked in self.marks.items() if marked.by in instances]

    def rows_of(self, subscription: str | None) -> list[WaitingRow]:
        """A subscription's waiting deliveries, or all, by position."""
        rows = [row for key, row in self.rows.items() if subscription in {None, key[0]}]
        return sorted(rows, key=lambda row: (row.waiting.position, row.subscription))

    def letters_like(self, wanted: DeadLetterFilter) -> list[DeadLetterRow]:
        """The dead letters of a filter, by id."""
        return [letter for _, letter in sorted(self.letters.items()) if _is_like(letter, wanted)]

    def types(self) -> dict[str, int]:
        """The types in the log, each with its last position."""
        return {event.type: position for position, event in self.log.items()}

    def is_unsettled(self, subscribed: Subscribed, event: Record) -> bool:
        """Whether a subscription has still to settle an event, by its lanes; waiting deliveries are not looked at."""
        at = event.position
        start = since_of(subscribed.since, event.type)
        if start is None or at <= start or subscribed.settled_before(at, event.type, event.slot, event.key):
            return False
        name = lane_name(subscribed.order, subscribed.concurrency, event.type, event.slot)
        lane = self.lanes.get((subscribed.name, name))
        return lane is None or not subscribed.holds(event.type) or (at > lane.state.checkpoint and at not in lane.state.done)

    def is_waited_for(self, subscribed: Subscribed, event: Record) -> bool:
        """Whether an event is in the reach of a waiting delivery."""
        start = since_of(subscribed.since, event.type)
        if (
            start is None
            or event.position <= start
            or subscribed.settled_before(event.position, event.type, event.slot, event.key)
        ):
            return False
        return any(
            row.waiting.position == event.position
            if row.waiting.key is None
            else (row.waiting.key == event.key and row.waiting.begins <= event.position)
            for row in self.rows_of(subscribed.name)
        )

    def free(self, subscription: str, position: int, now: float) -> None:
        """The dead letter that a key is parked behind is gone."""
        row = self.rows.get((subscription, position))
        if row is not None and row.waiting.state == "parked":
            waiting = Waiting(position, row.waiting.key, 0, now, "freed")
            self.rows[subscription, position] = msgspec.structs.replace(row, waiting=waiting)

    def forget(self, subscription: str) -> None:
        """Remove the lanes of a subscription, and what waits in them."""
        for lane in [key for key in self.lanes if key[0] == subscription]:
            del self.lanes[lane]
        for row in [key for key in self.rows if key[0] == subscription]:
            del self.rows[row]
        for mark in [key for key in self.marks if key[0] == subscription]:
            del self.marks[mark]


def anew(state: LaneState, **changes: object) -> LaneState:
    """A lane whose next event was never tried."""
    untried = {"attempt": 0, "due_at": None, "first_failed_at": None, "error": None}
    return msgspec.structs.replace(state, **{**untried, **changes})


def _is_like(letter: DeadLetterRow, wanted: DeadLetterFilter) -> bool:
    error = letter.death.error_type
    return (
        (wanted.ids is None or letter.id in wanted.ids)
        and wanted.event_id in {None, letter.record.id}
        and wanted.subscription in {None, letter.subscription}
        and (wanted.type is None or type_matches(wanted.type, letter.record.type))
        and (wanted.error is None or error == wanted.error or error.endswith(f".{wanted.error}"))
        and (wanted.since is None or letter.death.last_failed_at >= wanted.since)
        and (wanted.until is None or letter.death.last_failed_at <= wanted.until)
        and wanted.redriving in {None, letter.redriving}
    )
