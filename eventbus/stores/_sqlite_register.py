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
    covers,
    lane_name,
    since_of,
    type_matches,
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
        stored, given = (known.order, known.concurrency), (wanted.order, wanted.concurrency)
        is_served = stored in [(each.order, each.concurrency) for each in served]
        dispatched = wanted.dispatched and (given == stored or not is_served)  # or it waits until those have gone
        since = dict(known.since)
        for pattern in wanted.types:
            since.setdefault(pattern, self._head)
        subscribed = msgspec.structs.replace(
            known,
            types=_together(wanted.types, served, known) if dispatched else known.types,
            since=since,
            derived=tuple(sorted({*known.derived, *wanted.derived})),
        )
        if dispatched and given != stored:
            return self._switch(known, msgspec.structs.replace(subscribed, order=wanted.order, concurrency=wanted.concurrency))
        return self._without_floors(subscribed if known.order == "type" else self._change_types(known, subscribed))

    def _change_types(self, known: Subscribed, subscribed: Subscribed) -> Subscribed:
        """Lanes that hold several types hold others from now on."""
        held, now = _held(known), _held(subscribed)
        if not now >= held:  # what is settled of the types that leave is to be known when they come back
            subscribed = msgspec.structs.replace(subscribed, floors=(*subscribed.floors, self._floor(known)))
        late = self._late(known, subscribed) if now - held else {}
        if late and self._parked(known):
            subscribed = _without(subscribed, known, late)
            now = _held(subscribed)
        elif late and self._passed_by(subscribed, late):
            return self._switch(known, subscribed)
        if held != now:
            # Of types that nobody has known there are no events yet: this instance knows them before there are.
            is_new = now >= held and not known.since.keys() & (now - held)
            fence(self._connection, known.name, self._command.instance if is_new else "")
        return subscribed

    def _late(self, known: Subscribed, subscribed: Subscribed) -> dict[str, int]:
        """Types that its lanes have not held, and of which there are events to be delivered now; with where these begin."""
        joined = {
            type: last for type, last in types(self._connection).items() if subscribed.holds(type) and not known.holds(type)
        }
        begins = {type: _begin(subscribed, type) for type in joined}
        return {type: begins[type] for type, last in joined.items() if last > begins[type]}

    def _passed_by(self, subscribed: Subscribed, late: Mapping[str, int]) -> bool:
        """Whether its lanes have passed any of these."""
        reached = max((max(state.checkpoint, *state.done, 0) for state in lanes(self._connection, subscribed.name)), default=0)
        firsts = [_first_of(self._connection, subscribed, type, begin) for type, begin in late.items()]
        return any(first is not None and first <= reached for first in firsts)

    def _without_floors(self, subscribed: Subscribed) -> Subscribed:
        """Floors say nothing more that every lane has passed, and every row, which stands for what comes after it in its key; but
        those of types that the lanes do not hold do."""
        if not subscribed.floors:
            return subscribed
        reached = [state.checkpoint for state in lanes(self._connection, subscribed.name)]
        reached += [row.waiting.position - 1 for row in waiting_rows(self._connection, subscribed.name)]
        kept = tuple(
            floor
            for floor in subscribed.floors
            if floor.up_to() > min(reached, default=0) or (subscribed.order != "type" and not _held(subscribed) >= {*floor.types})
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


def _held(subscribed: Subscribed) -> set[str]:
    """The patterns that its lanes hold."""
    return {*subscribed.types, *subscribed.derived}


def _without(subscribed: Subscribed, known: Subscribed, late: Collection[str]) -> Subscribed:
    """Without the patterns that bring these types: they have to wait until its lanes can begin anew. What was held, and such a
    pattern means, stays."""
    held = _held(known)
    waiting = [each for each in _held(subscribed) - held if any(type_matches(each, type) for type in late)]
    types = [each for each in subscribed.types if each not in waiting]
    types += [each for each in known.types if each not in types and covers(waiting, each)]
    return msgspec.structs.replace(
        subscribed, types=tuple(types), derived=tuple(each for each in subscribed.derived if each not in waiting)
    )


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
    """The types given, and those of the stored ones that another instance serves; as they are stored, where that is the same."""
    elsewhere = {pattern for serves in served for pattern in serves.types}
    together = (*types, *(pattern for pattern in known.types if pattern in elsewhere and pattern not in types))
    return known.types if {*known.types} == {*together} else together


def first_unsettled(connection: Connection, known: Subscribed, wanted: Subscribed) -> int | None:
    """The first position that is still to be settled of what is wanted now, by the lanes that are known."""
    rows = waiting_rows(connection, known.name)
    waiting = min((row.waiting.begins for row in rows), default=None)
    states = {state.lane: state for state in lanes(connection, known.name)}
    begins = [_reached(known, states, lane) for lane in lanes_of(connection, known)]
    firsts = [waiting, _first_above(connection, known, wanted, states, min(begins)) if begins else None]
    joined = [type for type in types(connection) if wanted.holds(type) and wanted.wants(type) and not known.holds(type)]
    firsts += [_first_of(connection, wanted, type, _begin(wanted, type)) for type in joined]
    return min((position for position in firsts if position is not None), default=None)


def _first_of(connection: Connection, subscribed: Subscribed, type: str, begin: int) -> int | None:
    """The first event of a type that no lanes have held which is to be delivered."""
    for position, _, slot, key in _scan(connection, begin, type):
        if not subscribed.settled_before(position, type, slot, key):
            return position
    return None


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
        if not known.holds(type) or start is None or position <= start or wanted.settled_before(position, type, slot, key):
            continue
        state = states.get(lane_of(type, slot))
        if state is None or (position > state.checkpoint and position not in state.done):
            return position
    return None


def _scan(connection: Connection, after: int, type: str | None = None) -> Iterator[_Place]:
    """Events in order, page by page."""
    only = "" if type is None else "INDEXED BY events_type WHERE type = :type AND"
    text = (
        "SELECT CAST(json_group_array(json_array(position, type, slot, key)) AS BLOB) FROM (SELECT position, type, slot, key "
        f"FROM events {only or 'WHERE'} position > :after ORDER BY position LIMIT {_SCAN})"
    )
    while True:
        page = sorted(one(connection, text, {"after": after, "type": type}, _HERE, "events"))
        yield from page
        if len(page) < _SCAN:
            return
        after = page[-1][0]


_SCAN = 5_000
_Place = tuple[int, str, int, str | None]
_HERE = msgspec.json.Decoder(list[_Place])
