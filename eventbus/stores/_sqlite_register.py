"""Subscriptions in the SQLite store: how they come to be stored, and how they change from one deployment to the next.

publish → journal → *store* → lanes → workers → outcome. In comes a `Register`; out goes how the subscriptions stand. One whose
order or concurrency changes begins another generation: it gets other lanes, which begin at the first unsettled event; what
the lanes before had settled above that is kept as a `Floor`, so that nothing is settled twice.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from eventbus.errors import InvalidSubscription
from eventbus.stores._sqlite_commit import BUMP, HEAD
from eventbus.stores._sqlite_members import fence, first_epoch
from eventbus.stores._sqlite_read import LAST, changes, lanes, members, position_before, subscriptions, types, waiting_rows
from eventbus.stores._sqlite_rows import one, to_micros
from eventbus.stores._sqlite_units import write_lanes, write_subscription
from eventbus.stores.base import (
    Floor,
    LaneState,
    Member,
    Register,
    Registration,
    Serves,
    Subscribed,
    lane_name,
    since_of,
)

Connection = sqlite3.Connection


class Registering:
    """One `Register` in its transaction."""

    def __init__(self, connection: Connection, command: Register, now: float) -> None:
        self._connection = connection
        self._command = command
        self._now = now
        (self._head,) = connection.execute(f"SELECT {HEAD}").fetchone()
        self._others: list[Member] = [m for m in members(connection) if m.instance.id != command.instance]

    def run(self) -> tuple[Subscribed, ...]:
        """Store them all."""
        stored = {subscribed.name: subscribed for subscribed in subscriptions(self._connection)}
        standing = []
        for wanted in self._command.subscriptions:
            known = stored.get(wanted.name)
            subscribed = self._add(wanted) if known is None else self._update(known, wanted)
            if subscribed != known:
                write_subscription(self._connection, subscribed)
                self._connection.execute(BUMP)
            stored[wanted.name] = subscribed
            standing.append(subscribed)
        return tuple(standing)

    def _add(self, wanted: Registration) -> Subscribed:
        since = dict.fromkeys(wanted.types, self._start(wanted.start))
        derived = tuple(sorted(wanted.derived))
        created, generation = to_micros(self._now), self._next_generation()
        return Subscribed(
            wanted.name, wanted.types, since, wanted.order, wanted.concurrency, None, None, created, derived, generation
        )

    def _start(self, start: str | float) -> int:
        if start == "now":
            return int(self._head)
        if start == "beginning":
            return 0
        return start if isinstance(start, int) else position_before(self._connection, float(start))

    def _next_generation(self) -> int:
        return changes(self._connection) + 1  # what is stored with it makes it so

    def _update(self, known: Subscribed, wanted: Registration) -> Subscribed:
        served = [m.serves[known.name] for m in self._others if known.name in m.serves]
        since = dict(known.since)
        for pattern in wanted.types:
            since.setdefault(pattern, self._head)
        subscribed = msgspec.structs.replace(
            known,
            types=_together(wanted.types, served, known) if wanted.dispatched else known.types,
            since=since,
            derived=tuple(sorted({*known.derived, *wanted.derived})),
        )
        stored, given = (known.order, known.concurrency), (wanted.order, wanted.concurrency)
        if wanted.dispatched and given != stored and stored not in [(each.order, each.concurrency) for each in served]:
            return self._switch(known, msgspec.structs.replace(subscribed, order=wanted.order, concurrency=wanted.concurrency))
        if known.order == "type":
            return self._without_floors(subscribed)
        held, now = ({*each.types, *each.derived} for each in (known, subscribed))
        if not now >= held:  # what is settled of the types that leave is to be known when they come back
            subscribed = msgspec.structs.replace(subscribed, floors=(*subscribed.floors, self._floor(known)))
        if self._passed_by(known, subscribed):
            if not self._parked(known):
                return self._switch(known, subscribed)
            subscribed = _within(subscribed, held)
            now = {*subscribed.types, *subscribed.derived}
        if not held >= now:
            fence(self._connection, known.name, self._command.instance)
        return self._without_floors(subscribed)

    def _passed_by(self, known: Subscribed, subscribed: Subscribed) -> bool:
        """Whether its lanes have passed events that they did not hold, and that are to be delivered now."""
        reached = max((max(state.checkpoint, *state.done, 0) for state in lanes(self._connection, known.name)), default=0)
        joined = [type for type in types(self._connection) if subscribed.holds(type) and not known.holds(type)]
        return any(
            not subscribed.settled_before(position, type, slot, key)
            for type in joined
            for position, _, slot, key in _scan(self._connection, _begin(subscribed, type), reached, type)
        )

    def _without_floors(self, subscribed: Subscribed) -> Subscribed:
        """Floors say nothing more that every lane has passed, and every row, which stands for what comes after it in its key; but
        those of types that the lanes do not hold do."""
        if not subscribed.floors:
            return subscribed
        reached = [state.checkpoint for state in lanes(self._connection, subscribed.name)]
        reached += [row.waiting.position - 1 for row in waiting_rows(self._connection, subscribed.name)]
        held = {*subscribed.types, *subscribed.derived}
        kept = tuple(
            floor
            for floor in subscribed.floors
            if floor.up_to() > min(reached, default=0) or (subscribed.order != "type" and not held >= {*floor.types})
        )
        return msgspec.structs.replace(subscribed, floors=kept)

    # -------------------------------------------------------------- another generation

    def _switch(self, known: Subscribed, wanted: Subscribed) -> Subscribed:
        """The lanes of a new order or concurrency, or of more types, in place of those before."""
        self._refuse_parked(known, wanted)
        first = first_unsettled(self._connection, known, wanted)
        floors = (*wanted.floors, self._floor(known))
        generation = self._next_generation()
        subscribed = msgspec.structs.replace(wanted, generation=generation, floors=floors)
        self._connection.execute("DELETE FROM lanes WHERE subscription = ?", (known.name,))
        self._connection.execute("DELETE FROM deliveries WHERE subscription = ?", (known.name,))
        self._connection.execute("DELETE FROM marks WHERE subscription = ?", (known.name,))
        start = self._head if first is None else first - 1
        names = lanes_of(self._connection, subscribed)
        fresh = [LaneState(known.name, lane, first_epoch(generation), start) for lane in names]
        if fresh:
            write_lanes(self._connection, fresh)
        return self._without_floors(subscribed)

    def _floor(self, known: Subscribed) -> Floor:
        """What its lanes have settled."""
        rows = waiting_rows(self._connection, known.name)
        waiting = tuple((row.waiting.begins, row.waiting.key) for row in rows)
        settled = {state.lane: (state.checkpoint, state.done) for state in lanes(self._connection, known.name)}
        held = tuple(sorted(known.since)) if known.order == "type" else (*known.types, *known.derived)
        return Floor(known.order, known.concurrency, settled, waiting, held)

    def _parked(self, known: Subscribed) -> list[str | None]:
        """The keys that are parked; their rows cannot be taken over by other lanes."""
        return [row.waiting.key for row in waiting_rows(self._connection, known.name, "parked")]

    def _refuse_parked(self, known: Subscribed, wanted: Subscribed) -> None:
        parked = self._parked(known)
        if parked:
            raise InvalidSubscription(
                f"subscription {known.name!r} is stored with {_shown(known)}, and declared with {_shown(wanted)}; it cannot "
                f"change while keys are parked ({len(parked)}, such as {parked[0]!r}). Run it with the old options, redrive or "
                "discard their dead letters, and drain it"
            )


def _within(subscribed: Subscribed, held: Collection[str]) -> Subscribed:
    """With none but types that its lanes have held: others have to wait until it can have lanes that begin anew."""
    types, derived = (tuple(each for each in some if each in held) for some in (subscribed.types, subscribed.derived))
    return msgspec.structs.replace(subscribed, types=types, derived=derived)


def _shown(subscribed: Subscribed) -> str:
    return f"order={subscribed.order!r}, concurrency={subscribed.concurrency}, types={', '.join(subscribed.types)}"


def lanes_of(connection: Connection, subscribed: Subscribed) -> Iterable[str]:
    """Names of the lanes of a subscription; of order "type": those of which something is in the log."""
    if subscribed.order == "key":
        return [str(number) for number in range(subscribed.concurrency)]
    if subscribed.order != "type":
        return [""]
    return [type for type in types(connection) if since_of(subscribed.since, type) is not None]


def _together(types: tuple[str, ...], served: Iterable[Serves], known: Subscribed) -> tuple[str, ...]:
    """The types given, and those of the stored ones that another instance serves."""
    elsewhere = {pattern for serves in served for pattern in serves.types}
    return (*types, *(pattern for pattern in known.types if pattern in elsewhere and pattern not in types))


def first_unsettled(connection: Connection, known: Subscribed, wanted: Subscribed) -> int | None:
    """The first position that is still to be settled of what is wanted now, by the lanes that are known."""
    rows = waiting_rows(connection, known.name)
    waiting = min((row.waiting.begins for row in rows), default=None)
    states = {state.lane: state for state in lanes(connection, known.name)}
    begins = [_reached(known, states, lane) for lane in lanes_of(connection, known)]
    begins += [_begin(wanted, type) for type in types(connection) if wanted.wants(type) and not known.holds(type)]
    above = _first_above(connection, known, wanted, states, min(begins)) if begins else None
    return min((position for position in (waiting, above) if position is not None), default=None)


def _begin(subscribed: Subscribed, type: str) -> int:
    """Up to here all of a type is settled, or not for it."""
    return max(since_of(subscribed.since, type) or 0, *(floor.below(type) for floor in subscribed.floors), 0)


def _reached(subscribed: Subscribed, states: Mapping[str, LaneState], lane: str) -> int:
    if lane in states:
        return states[lane].checkpoint
    if subscribed.order == "type":
        return since_of(subscribed.since, lane) or 0
    return min(subscribed.since.values(), default=0)


def _first_above(
    connection: Connection, known: Subscribed, wanted: Subscribed, states: Mapping[str, LaneState], begin: int
) -> int | None:
    lane_of = functools.partial(lane_name, known.order, known.concurrency)
    for position, type, slot, key in _scan(connection, begin):
        start = since_of(wanted.since, type)
        if start is None or position <= start or wanted.settled_before(position, type, slot, key):
            continue
        state = states.get(lane_of(type, slot))
        if not known.holds(type) or state is None or (position > state.checkpoint and position not in state.done):
            return position
    return None


def _scan(connection: Connection, after: int, until: int | None = None, type: str | None = None) -> Iterator[_Place]:
    """Events in order, page by page."""
    only = "" if type is None else "INDEXED BY events_type WHERE type = :type AND"
    text = (
        "SELECT CAST(json_group_array(json_array(position, type, slot, key)) AS BLOB) FROM (SELECT position, type, slot, key "
        f"FROM events {only or 'WHERE'} position > :after AND position <= :until ORDER BY position LIMIT {_SCAN})"
    )
    while True:
        values = {"after": after, "until": LAST if until is None else until, "type": type}
        page = sorted(one(connection, text, values, _HERE, "events"))
        yield from page
        if len(page) < _SCAN:
            return
        after = page[-1][0]


_SCAN = 5_000
_Place = tuple[int, str, int, str | None]
_HERE = msgspec.json.Decoder(list[_Place])
