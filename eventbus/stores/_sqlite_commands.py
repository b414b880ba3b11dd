"""Commands to the SQLite store: the writes that are not on an event's way.

publish → journal → *store* → lanes → workers → outcome. In comes a `Command`, inside a savepoint of its own within the batch's
transaction; out goes its result, or an error of our tree, after which nothing of it is left.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from eventbus.errors import EventBusError, InvalidSubscription, UnknownSubscription
from eventbus.stores._sqlite_commit import HEAD
from eventbus.stores._sqlite_insert import execute_rows, insert_events
from eventbus.stores._sqlite_prune import prune
from eventbus.stores._sqlite_read import dead_letter_condition, lanes, next_due, position_before, subscriptions, waiting_rows
from eventbus.stores._sqlite_rows import EventRow, event_json, one, record_of, to_micros
from eventbus.stores._sqlite_units import FREE, write_lanes
from eventbus.stores.base import (
    Beat,
    Cancel,
    Claim,
    Command,
    Discard,
    LaneState,
    Pause,
    Promote,
    Prune,
    Record,
    Redrive,
    Register,
    Registration,
    Rewind,
    Subscribed,
    Unsubscribe,
    lane_name,
    since_of,
)

Connection = sqlite3.Connection


class Commands:
    """The commands of one transaction.

    Attributes:
        results: for each its result, or its error.
        promoted: scheduled events that entered the log, in the order of their positions.
    """

    def __init__(self, connection: Connection, now: float) -> None:
        self.results: list[object] = []
        self.promoted: list[Record] = []
        self._connection = connection
        self._now = now

    def run(self, commands: Sequence[Command[object]]) -> None:
        """Carry them out in order. An error of our tree is a result; any other ends the transaction."""
        for command in commands:
            self._connection.execute("SAVEPOINT command")
            try:
                result = _DO[type(command)](self, command)
            except EventBusError as error:
                self._connection.execute("ROLLBACK TO command")
                result = error
            self._connection.execute("RELEASE command")
            self.results.append(result)

    # -------------------------------------------------------------- subscriptions

    def register(self, command: Register) -> tuple[Subscribed, ...]:
        """See `Register`."""
        stored = {subscribed.name: subscribed for subscribed in subscriptions(self._connection)}
        head = _head(self._connection)
        standing = []
        for wanted in command.subscriptions:
            known = stored.get(wanted.name)
            subscribed = self._add(wanted, head) if known is None else self._update(known, wanted, head)
            stored[wanted.name] = subscribed
            standing.append(subscribed)
        return tuple(standing)

    def _add(self, wanted: Registration, head: int) -> Subscribed:
        start = self._start(wanted.start, head)
        since = dict.fromkeys(wanted.types, start)
        created = to_micros(self._now)
        derived = tuple(sorted(wanted.derived))
        subscribed = Subscribed(wanted.name, wanted.types, since, wanted.order, wanted.concurrency, None, None, created, derived)
        self._connection.execute(
            'INSERT INTO subscriptions (name, types, since, "order", concurrency, generation, paused, paused_at, created_at, '
            "derived) VALUES (?, ?, ?, ?, ?, 1, NULL, NULL, ?, ?)",
            (wanted.name, _json(wanted.types), _json(since), wanted.order, wanted.concurrency, created, _json(derived)),
        )
        return subscribed

    def _start(self, start: str | float, head: int) -> int:
        if start == "now":
            return head
        if start == "beginning":
            return 0
        return start if isinstance(start, int) else position_before(self._connection, float(start))

    def _update(self, known: Subscribed, wanted: Registration, head: int) -> Subscribed:
        since = dict(known.since)
        changed = (known.order, known.concurrency) != (wanted.order, wanted.concurrency)
        if changed:
            self._refuse_unsettled(known, wanted, head)
            self._connection.execute("DELETE FROM lanes WHERE subscription = ?", (known.name,))
            since = dict.fromkeys(since, head)
        for pattern in wanted.types:
            since.setdefault(pattern, head)
        derived = tuple(sorted({*known.derived, *wanted.derived}))
        subscribed = msgspec.structs.replace(
            known, types=wanted.types, since=since, order=wanted.order, concurrency=wanted.concurrency, derived=derived
        )
        if subscribed != known:
            self._connection.execute(
                'UPDATE subscriptions SET types = ?, since = ?, "order" = ?, concurrency = ?, generation = generation + ?, '
                "derived = ? WHERE name = ?",
                (_json(wanted.types), _json(since), wanted.order, wanted.concurrency, int(changed), _json(derived), known.name),
            )
        return subscribed

    def _refuse_unsettled(self, known: Subscribed, wanted: Registration, head: int) -> None:
        position = _first_unsettled(self._connection, known, head)
        if position is not None:
            raise InvalidSubscription(
                f"subscription {known.name!r} is stored with order={known.order!r}, concurrency={known.concurrency}, and "
                f"declared with order={wanted.order!r}, concurrency={wanted.concurrency}; it cannot change while events of it "
                f"are unsettled (the first at position {position}). Run it with the old options until it has caught up, use a "
                "new name, or unsubscribe it"
            )

    def pause(self, command: Pause) -> None:
        """See `Pause`."""
        resumed = command.reason is None
        self._change(
            "UPDATE subscriptions SET paused = ?, paused_at = ? WHERE name = ?",
            (command.reason, None if resumed else to_micros(self._now), command.subscription),
        )
        if resumed:
            self._connection.execute(
                "UPDATE deliveries SET attempt = 0, due_at = ? WHERE subscription = ? AND state <> 'parked'",
                (to_micros(self._now), command.subscription),
            )
            waiting = [state for state in lanes(self._connection, command.subscription) if state.attempt or state.due_at]
            write_lanes(self._connection, [_fresh(state) for state in waiting])

    def unsubscribe(self, command: Unsubscribe) -> None:
        """See `Unsubscribe`."""
        name = (command.subscription,)
        self._change("DELETE FROM subscriptions WHERE name = ?", name)
        self._connection.execute("DELETE FROM lanes WHERE subscription = ?", name)
        self._connection.execute("DELETE FROM deliveries WHERE subscription = ?", name)

    def _change(self, text: str, parameters: tuple[object, ...]) -> None:
        """A statement that changes the row of a subscription, named by its last parameter."""
        if not self._connection.execute(text, parameters).rowcount:
            known = ", ".join(repr(subscribed.name) for subscribed in subscriptions(self._connection))
            raise UnknownSubscription(f"no subscription {parameters[-1]!r} is stored; stored are: {known or 'none'}")

    # -------------------------------------------------------------- lanes

    def claim(self, command: Claim) -> tuple[LaneState, ...]:
        """See `Claim`."""
        names = {subscription for subscription, _, _ in command.lanes}
        states = [state for name in names for state in lanes(self._connection, name)]
        known = {(state.subscription, state.lane): state for state in states}
        claimed = []
        for subscription, lane, start in command.lanes:
            state = known.get((subscription, lane)) or LaneState(subscription, lane, 0, start)
            claimed.append(msgspec.structs.replace(state, epoch=state.epoch + 1))
        if claimed:
            write_lanes(self._connection, claimed, command.instance)
        return tuple(claimed)

    def rewind(self, command: Rewind) -> tuple[LaneState, ...]:
        """See `Rewind`."""
        name, after = command.subscription, command.after
        starts = next((s.since for s in subscriptions(self._connection) if s.name == name), {})
        since = {pattern: min(start, after) for pattern, start in starts.items()}
        self._change("UPDATE subscriptions SET since = ? WHERE name = ?", (_json(since), name))
        self._connection.execute("DELETE FROM deliveries WHERE subscription = ? AND position > ?", (name, after))
        self._connection.execute(
            "DELETE FROM dead_letters WHERE subscription = ? AND position > ? "
            "AND EXISTS (SELECT 1 FROM events e WHERE e.id = dead_letters.event_id)",
            (name, after),
        )
        rewound = tuple(
            msgspec.structs.replace(
                _fresh(state),
                epoch=state.epoch + 1,
                checkpoint=min(state.checkpoint, after),
                done=tuple(position for position in state.done if position <= after),
            )
            for state in lanes(self._connection, name)
        )
        if rewound:
            write_lanes(self._connection, rewound)
        return rewound

    # -------------------------------------------------------------- scheduled events

    def promote(self, command: Promote) -> float | None:
        """See `Promote`."""
        promoted = self._due(command)
        if promoted:
            insert_events(self._connection, promoted, _head(self._connection) + 1)
            ids = _json([record.id for record in promoted])
            self._connection.execute("DELETE FROM scheduled WHERE id IN (SELECT value FROM json_each(?))", (ids,))
            self._give_positions([record.idempotency_key for record in promoted if record.idempotency_key is not None])
            self.promoted += promoted
        return next_due(self._connection)

    def _give_positions(self, keys: list[str]) -> None:
        head = (
            "UPDATE idempotency SET position = (SELECT e.position FROM events e WHERE e.id = idempotency.event_id) WHERE key IN ("
        )
        execute_rows(self._connection, head, [(key,) for key in keys], ")")

    def _due(self, command: Promote) -> list[Record]:
        text = (
            f"SELECT CAST(json_group_array(json_array({event_json('0')}, e.idempotency_key)) AS BLOB) FROM ("
            "SELECT * FROM scheduled WHERE due_at <= ? ORDER BY due_at, id LIMIT ?) e"
        )
        rows = one(self._connection, text, (to_micros(command.now), command.limit), _DUE, "scheduled")
        promoted = []
        for row, key in rows:
            record = record_of(row)
            record.idempotency_key, record.time = key, to_micros(command.now)
            promoted.append(record)
        return promoted

    def cancel(self, command: Cancel) -> bool:
        """See `Cancel`."""
        text = "DELETE FROM idempotency WHERE key = (SELECT idempotency_key FROM scheduled WHERE id = ?)"
        self._connection.execute(text, (command.event_id,))
        return bool(self._connection.execute("DELETE FROM scheduled WHERE id = ?", (command.event_id,)).rowcount)

    # -------------------------------------------------------------- dead letters

    def redrive(self, command: Redrive) -> tuple[str, ...]:
        """See `Redrive`."""
        condition, values = dead_letter_condition(command.filter)
        where = f"{condition} AND e.redriving = 0"
        text = f"SELECT CAST(json_group_array(json_array(e.id, e.subscription)) AS BLOB) FROM dead_letters e WHERE {where}"
        found = sorted(one(self._connection, text, values, _MARKED, "dead_letters"))
        values["now"] = to_micros(self._now)
        text = f"UPDATE dead_letters AS e SET redriving = 1, attempt = 0, due_at = :now WHERE {where}"
        self._connection.execute(text, values)
        return tuple(subscription for _, subscription in found)

    def discard(self, command: Discard) -> int:
        """See `Discard`."""
        condition, values = dead_letter_condition(command.filter)
        values["now"] = to_micros(self._now)
        ended = f"(subscription, position) IN (SELECT e.subscription, e.position FROM dead_letters e WHERE {condition})"
        self._connection.execute(f"{FREE} due_at = :now WHERE state = 'parked' AND {ended}", values)
        return self._connection.execute(f"DELETE FROM dead_letters AS e WHERE {condition}", values).rowcount

    # -------------------------------------------------------------- the rest

    def beat(self, command: Beat) -> None:
        """See `Beat`."""
        who = command.instance
        if command.leaving:
            self._connection.execute("DELETE FROM instances WHERE id = ?", (who.id,))
            return
        # Whoever writes holds the lock file alone: the rows of others are of instances that were killed.
        self._connection.execute("DELETE FROM instances WHERE id <> ?", (who.id,))
        self._connection.execute(
            "INSERT INTO instances (id, name, host, pid, started, seen) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET seen = excluded.seen",
            (who.id, who.name, who.host, who.pid, who.started, to_micros(self._now)),
        )

    def prune(self, command: Prune) -> int | None:
        """See `Prune`."""
        return prune(self._connection, command)


_DUE = msgspec.json.Decoder(list[tuple[EventRow, str | None]])
_MARKED = msgspec.json.Decoder(list[tuple[int, str]])
_HERE = msgspec.json.Decoder(list[tuple[int, str, int]])

_DO: Mapping[type, Callable[[Commands, Any], object]] = {
    Register: Commands.register,
    Pause: Commands.pause,
    Unsubscribe: Commands.unsubscribe,
    Claim: Commands.claim,
    Rewind: Commands.rewind,
    Promote: Commands.promote,
    Cancel: Commands.cancel,
    Redrive: Commands.redrive,
    Discard: Commands.discard,
    Beat: Commands.beat,
    Prune: Commands.prune,
}


def _head(connection: Connection) -> int:
    return int(connection.execute(f"SELECT {HEAD}").fetchone()[0])


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _fresh(state: LaneState) -> LaneState:
    """A lane whose next event was never tried."""
    return msgspec.structs.replace(state, attempt=0, due_at=None, first_failed_at=None, error=None)


def _first_unsettled(connection: Connection, subscribed: Subscribed, head: int) -> int | None:
    """The first position that a subscription has still to settle."""
    rows = waiting_rows(connection, subscribed.name)
    if rows:
        return rows[0].waiting.position
    states = {state.lane: state for state in lanes(connection, subscribed.name)}
    starts = list(subscribed.since.values())
    begin = min(starts, default=head) if not states else min(*(s.checkpoint for s in states.values()), *starts)
    lane_and_since = functools.partial(lane_name, subscribed.order, subscribed.concurrency)
    text = (
        "SELECT CAST(json_group_array(json_array(position, type, slot)) AS BLOB) FROM ("
        "SELECT position, type, slot FROM events WHERE position > ? ORDER BY position LIMIT ?)"
    )
    while True:
        page = sorted(one(connection, text, (begin, _SCAN), _HERE, "events"))
        for position, type, slot in page:
            start = since_of(subscribed.since, type)
            if start is None or position <= start:
                continue
            state = states.get(lane_and_since(type, slot))
            if state is None or (position > state.checkpoint and position not in state.done):
                return position
        if len(page) < _SCAN:
            return None
        begin = page[-1][0]


_SCAN = 5_000
