"""Commands to the SQLite store: the writes that are not on an event's way.

publish → journal → *store* → lanes → workers → outcome. In comes a `Command`, inside a savepoint of its own within the batch's
transaction; out goes its result, or an error of our tree, after which nothing of it is left.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from eventbus.errors import EventBusError, UnknownSubscription
from eventbus.stores._sqlite_commit import BUMP, HEAD
from eventbus.stores._sqlite_insert import execute_rows, insert_events
from eventbus.stores._sqlite_members import Lives, beat, claim, mark, release
from eventbus.stores._sqlite_prune import prune
from eventbus.stores._sqlite_read import dead_letter_condition, lanes, next_due, subscription_named, subscriptions, waiting_rows
from eventbus.stores._sqlite_register import Registering
from eventbus.stores._sqlite_revive import revive
from eventbus.stores._sqlite_rows import EventRow, event_json, one, record_of, to_micros
from eventbus.stores._sqlite_units import free_parked, write_lanes, write_paused, write_subscription, write_waiting
from eventbus.stores.base import (
    Beat,
    Cancel,
    Claim,
    Command,
    Discard,
    LaneState,
    Marking,
    Pause,
    Promote,
    Promoted,
    Prune,
    Record,
    Redrive,
    Register,
    Release,
    Revive,
    Rewind,
    Subscribed,
    Unsubscribe,
)

Connection = sqlite3.Connection


class Commands:
    """The commands of one transaction.

    Attributes:
        results: for each its result, or its error.
        promoted: scheduled events that entered the log, in the order of their positions.
    """

    def __init__(self, connection: Connection, now: float, lives: Lives) -> None:
        self.results: list[object] = []
        self.promoted: list[Record] = []
        self._connection = connection
        self._now = now
        self._lives = lives

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
        if any(type(command) in _NOTICED for command in commands):
            self._connection.execute(BUMP)

    # -------------------------------------------------------------- instances and their lanes

    def beat(self, command: Beat) -> bool:
        """See `Beat`."""
        return beat(self._connection, command, self._now, self._lives)

    def claim(self, command: Claim) -> tuple[LaneState | None, ...]:
        """See `Claim`."""
        return claim(self._connection, command)

    def release(self, command: Release) -> None:
        """See `Release`."""
        release(self._connection, command)

    def mark(self, command: Marking) -> bool:
        """See `Marking`."""
        return mark(self._connection, command)

    # -------------------------------------------------------------- subscriptions

    def register(self, command: Register) -> tuple[Subscribed, ...]:
        """See `Register`."""
        return Registering(self._connection, command, self._now).run()

    def pause(self, command: Pause) -> None:
        """See `Pause`."""
        resumed = command.reason is None
        if not write_paused(self._connection, command.subscription, command.reason, self._now):
            raise self._unknown(command.subscription)
        if resumed:
            rows = {
                (row.subscription, row.waiting.position): (
                    row.lane,
                    msgspec.structs.replace(row.waiting, attempt=0, due_at=self._now),
                )
                for row in waiting_rows(self._connection, command.subscription)
                if row.waiting.state != "parked"
            }
            write_waiting(self._connection, rows)
            waiting = [state for state in lanes(self._connection, command.subscription) if state.attempt or state.due_at]
            write_lanes(self._connection, [_fresh(state) for state in waiting])

    def unsubscribe(self, command: Unsubscribe) -> None:
        """See `Unsubscribe`."""
        name = (command.subscription,)
        if not self._connection.execute("DELETE FROM subscriptions WHERE name = ?", name).rowcount:
            raise self._unknown(command.subscription)
        self._connection.execute("DELETE FROM lanes WHERE subscription = ?", name)
        self._connection.execute("DELETE FROM deliveries WHERE subscription = ?", name)
        self._connection.execute("DELETE FROM marks WHERE subscription = ?", name)

    def _unknown(self, name: str) -> UnknownSubscription:
        known = ", ".join(repr(subscribed.name) for subscribed in subscriptions(self._connection))
        return UnknownSubscription(f"no subscription {name!r} is stored; stored are: {known or 'none'}")

    # -------------------------------------------------------------- lanes

    def rewind(self, command: Rewind) -> tuple[LaneState, ...]:
        """See `Rewind`."""
        name, after = command.subscription, command.after
        stored = subscription_named(self._connection, name)
        if stored is None:
            raise self._unknown(name)
        since = {pattern: min(start, after) for pattern, start in stored.since.items()}
        floors = tuple(floor.down_to(after) for floor in stored.floors)
        write_subscription(self._connection, msgspec.structs.replace(stored, since=since, floors=floors))
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

    def revive(self, command: Revive) -> tuple[LaneState, ...]:
        """See `Revive`."""
        return revive(self._connection, command, self._now)

    # -------------------------------------------------------------- scheduled events

    def promote(self, command: Promote) -> Promoted:
        """See `Promote`."""
        promoted = self._due(command)
        if promoted:
            insert_events(self._connection, promoted, _head(self._connection) + 1)
            ids = _json([record.id for record in promoted])
            self._connection.execute("DELETE FROM scheduled WHERE id IN (SELECT value FROM json_each(?))", (ids,))
            self._give_positions([record.idempotency_key for record in promoted if record.idempotency_key is not None])
            self.promoted += promoted
        damaged = tuple((record.id, record.fault) for record in promoted if record.fault is not None)
        return Promoted(next_due(self._connection), damaged)

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
        ended = f"(subscription, position) IN (SELECT e.subscription, e.position FROM dead_letters e WHERE {condition})"
        free_parked(self._connection, ended, values, self._now)
        return self._connection.execute(f"DELETE FROM dead_letters AS e WHERE {condition}", values).rowcount

    # -------------------------------------------------------------- the rest

    def prune(self, command: Prune) -> int | None:
        """See `Prune`."""
        return prune(self._connection, command)


_DUE = msgspec.json.Decoder(list[tuple[EventRow, str | None]])
_MARKED = msgspec.json.Decoder(list[tuple[int, str]])

_DO: Mapping[type, Callable[[Commands, Any], object]] = {
    Register: Commands.register,
    Pause: Commands.pause,
    Unsubscribe: Commands.unsubscribe,
    Claim: Commands.claim,
    Release: Commands.release,
    Marking: Commands.mark,
    Rewind: Commands.rewind,
    Revive: Commands.revive,
    Promote: Commands.promote,
    Cancel: Commands.cancel,
    Redrive: Commands.redrive,
    Discard: Commands.discard,
    Beat: Commands.beat,
    Prune: Commands.prune,
}

_NOTICED = (Pause, Unsubscribe, Rewind, Redrive, Discard)
"""Commands that other instances are to notice."""


def _head(connection: Connection) -> int:
    return int(connection.execute(f"SELECT {HEAD}").fetchone()[0])


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _fresh(state: LaneState) -> LaneState:
    """A lane whose next event was never tried."""
    return msgspec.structs.replace(state, attempt=0, due_at=None, first_failed_at=None, error=None)
