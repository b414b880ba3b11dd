"""Retention in the SQLite store: which events may go.

publish → journal → *store* → lanes → workers → outcome. In comes a `Prune`, which looks at a bounded stretch of the log; out go
the events of it that are old and that nobody needs. What a subscription has not settled stays, whatever its age.
"""

from __future__ import annotations

import sqlite3

import msgspec

from eventbus.stores._sqlite_read import lanes, subscriptions, waiting_rows
from eventbus.stores._sqlite_rows import micros, one
from eventbus.stores.base import LaneState, Prune, Subscribed, lane_name, since_of

Connection = sqlite3.Connection
_Row = tuple[int, str, int, str | None, int]  # position, type, slot, key, time in microseconds
_ROWS = msgspec.json.Decoder(list[_Row])


def prune(connection: Connection, command: Prune) -> int | None:
    """Remove what may go of the stretch, and the keys; the position to go on after, or None at the end."""
    going_on = None if command.before is None else _prune_events(connection, command, command.before)
    if _prune_keys(connection, command) and going_on is None:
        return command.after  # more keys than one step may remove
    return going_on


def _prune_keys(connection: Connection, command: Prune) -> bool:
    """Remove old keys, and tell whether there may be more. The key of an event that is still scheduled stays."""
    text = (
        "DELETE FROM idempotency WHERE key IN "
        "(SELECT key FROM idempotency WHERE time < ? AND position IS NOT NULL ORDER BY time LIMIT ?)"
    )
    return connection.execute(text, (micros(command.keys_before) / 1e6, command.limit)).rowcount >= command.limit


def _prune_events(connection: Connection, command: Prune, before: float) -> int | None:
    text = (
        "SELECT CAST(json_group_array(json_array(position, type, slot, key, CAST(round(time * 1e6) AS INTEGER))) AS BLOB) FROM ("
        "SELECT position, type, slot, key, time FROM events WHERE position > ? ORDER BY position LIMIT ?)"
    )
    rows = sorted(one(connection, text, (command.after, command.limit), _ROWS, "events"))
    limit, pinned = micros(before), _pinned(connection, command.pinned)
    old = [row for row in rows if row[4] < limit and (pinned is None or row[0] < pinned)]
    if old:
        needs = _Needs.of(connection)
        _remove(connection, [row for row in old if not needs.needed(row)])
    if len(rows) < command.limit or (pinned is not None and rows[-1][0] >= pinned):
        return None
    last = rows[-1][0]
    if not old and not _is_older(connection, before, last):
        return None  # all that follows is young: no reason to look at it
    return last


def _pinned(connection: Connection, own: int | None) -> int | None:
    """The first position that somebody is still to read."""
    (others,) = connection.execute("SELECT min(pinned) FROM instances").fetchone()
    return min((position for position in (own, others) if position is not None), default=None)


def _is_older(connection: Connection, before: float, after: int) -> bool:
    text = "SELECT EXISTS (SELECT 1 FROM events INDEXED BY events_time WHERE time < ? AND position > ?)"
    return bool(connection.execute(text, (micros(before) / 1e6, after)).fetchone()[0])


def _remove(connection: Connection, rows: list[_Row]) -> None:
    if not rows:
        return
    positions = msgspec.json.encode([row[0] for row in rows]).decode()
    connection.execute("DELETE FROM events WHERE position IN (SELECT value FROM json_each(?))", (positions,))
    position, *_, time = rows[-1]
    connection.execute(
        "UPDATE log_state SET pruned_to = ?, pruned_time = ? WHERE pruned_to < ?", (position, time / 1e6, position)
    )


class _Needs(msgspec.Struct):
    """What the subscriptions have still to settle."""

    subscriptions: tuple[Subscribed, ...]
    lanes: dict[tuple[str, str], LaneState]
    waiting: dict[str, set[int]]  # by subscription: positions
    keys: dict[tuple[str, str], int]  # by subscription and key: the first position

    @classmethod
    def of(cls, connection: Connection) -> _Needs:
        states = {(state.subscription, state.lane): state for state in lanes(connection, None)}
        needs = cls(subscriptions(connection), states, {}, {})
        for row in waiting_rows(connection, None):  # by position, so a key's first comes first
            waiting = row.waiting
            if waiting.key is None:
                needs.waiting.setdefault(row.subscription, set()).add(waiting.position)
            else:
                needs.keys.setdefault((row.subscription, waiting.key), waiting.begins)
        return needs

    def needed(self, event: _Row) -> bool:
        return any(self._needed_by(subscribed, event) for subscribed in self.subscriptions)

    def _needed_by(self, subscribed: Subscribed, event: _Row) -> bool:
        position, type, slot, key, _ = event
        start = since_of(subscribed.since, type)
        if start is None or position <= start or subscribed.settled_before(position, type, slot, key):
            return False
        if not subscribed.holds(type):
            return True
        state = self.lanes.get((subscribed.name, lane_name(subscribed.order, subscribed.concurrency, type, slot)))
        if state is None or (position > state.checkpoint and position not in state.done):
            return True
        first = None if key is None else self.keys.get((subscribed.name, key))
        return position in self.waiting.get(subscribed.name, ()) or (first is not None and position >= first)
