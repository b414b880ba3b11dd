"""Subscriptions in the SQLite store: how they come to be stored, and how they change from one deployment to the next.

publish → journal → *store* → lanes → workers → outcome. In comes a `Register`; out goes how the subscriptions stand. One whose
order or concurrency changes begins another generation: it gets other lanes, which begin at the first unsettled event; what
the lanes before had settled above that is kept as a `Floor`, so that nothing is settled twice.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from eventbus.errors import InvalidSubscription
from eventbus.stores._sqlite_commit import BUMP, HEAD
from eventbus.stores._sqlite_members import fence, first_epoch
from eventbus.stores._sqlite_read import changes, lanes, members, position_before, subscriptions, types, waiting_rows
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
            return self._switch(subscribed, wanted)
        if known.order != "type" and not set(known.types) >= set(subscribed.types):
            fence(self._connection, known.name, self._command.instance)
        return self._without_floors(subscribed) if known.floors else subscribed

    def _without_floors(self, subscribed: Subscribed) -> Subscribed:
        """Floors say nothing more that every lane has passed, and every row, which stands for what comes after it in its key."""
        reached = [state.checkpoint for state in lanes(self._connection, subscribed.name)]
        reached += [row.waiting.position - 1 for row in waiting_rows(self._connection, subscribed.name)]
        kept = tuple(floor for floor in subscribed.floors if floor.up_to() > min(reached, default=0))
        return msgspec.structs.replace(subscribed, floors=kept)

    # -------------------------------------------------------------- another generation

    def _switch(self, known: Subscribed, wanted: Registration) -> Subscribed:
        """The lanes of a new order or concurrency, in place of those before."""
        self._refuse_parked(known, wanted)
        first = first_unsettled(self._connection, known)
        states = lanes(self._connection, known.name)
        floors: tuple[Floor, ...] = ()
        if first is not None:
            rows = waiting_rows(self._connection, known.name)
            waiting = tuple((row.waiting.begins, row.waiting.key) for row in rows)
            settled = {state.lane: (state.checkpoint, state.done) for state in states}
            floors = (*known.floors, Floor(known.order, known.concurrency, settled, waiting))
        generation = self._next_generation()
        subscribed = msgspec.structs.replace(
            known, order=wanted.order, concurrency=wanted.concurrency, generation=generation, floors=floors
        )
        self._connection.execute("DELETE FROM lanes WHERE subscription = ?", (known.name,))
        self._connection.execute("DELETE FROM deliveries WHERE subscription = ?", (known.name,))
        self._connection.execute("DELETE FROM marks WHERE subscription = ?", (known.name,))
        start = self._head if first is None else first - 1
        names = lanes_of(self._connection, subscribed)
        fresh = [LaneState(known.name, lane, first_epoch(generation), start) for lane in names]
        if fresh:
            write_lanes(self._connection, fresh)
        return subscribed

    def _refuse_parked(self, known: Subscribed, wanted: Registration) -> None:
        rows = waiting_rows(self._connection, known.name)
        parked = [row.waiting.key for row in rows if row.waiting.state == "parked"]
        if parked:
            raise InvalidSubscription(
                f"subscription {known.name!r} is stored with order={known.order!r}, concurrency={known.concurrency}, and "
                f"declared with order={wanted.order!r}, concurrency={wanted.concurrency}; it cannot change while keys are "
                f"parked ({len(parked)}, such as {parked[0]!r}). Run it with the old options, redrive or discard their dead "
                "letters, and drain it"
            )


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


def first_unsettled(connection: Connection, subscribed: Subscribed) -> int | None:
    """The first position that a subscription has still to settle."""
    rows = waiting_rows(connection, subscribed.name)
    waiting = min((row.waiting.begins for row in rows), default=None)
    states = {state.lane: state for state in lanes(connection, subscribed.name)}
    begin = min((_reached(subscribed, states, lane) for lane in lanes_of(connection, subscribed)), default=None)
    above = None if begin is None else _first_above(connection, subscribed, states, begin)
    return min((position for position in (waiting, above) if position is not None), default=None)


def _reached(subscribed: Subscribed, states: Mapping[str, LaneState], lane: str) -> int:
    if lane in states:
        return states[lane].checkpoint
    if subscribed.order == "type":
        return since_of(subscribed.since, lane) or 0
    return min(subscribed.since.values(), default=0)


def _first_above(connection: Connection, subscribed: Subscribed, states: Mapping[str, LaneState], begin: int) -> int | None:
    lane_of = functools.partial(lane_name, subscribed.order, subscribed.concurrency)
    while True:
        page = sorted(one(connection, _SCANNED, (begin, _SCAN), _HERE, "events"))
        for position, type, slot, key in page:
            start = since_of(subscribed.since, type)
            if start is None or position <= start or subscribed.settled_before(position, type, slot, key):
                continue
            state = states.get(lane_of(type, slot))
            if state is None or (position > state.checkpoint and position not in state.done):
                return position
        if len(page) < _SCAN:
            return None
        begin = page[-1][0]


_SCAN = 5_000
_SCANNED = (
    "SELECT CAST(json_group_array(json_array(position, type, slot, key)) AS BLOB) FROM ("
    "SELECT position, type, slot, key FROM events WHERE position > ? ORDER BY position LIMIT ?)"
)
_HERE = msgspec.json.Decoder(list[tuple[int, str, int, str | None]])
