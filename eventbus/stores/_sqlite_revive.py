"""Taking back, in the SQLite store, what failed attempts have left behind.

publish → journal → *store* → lanes → workers → outcome. In comes a `Revive`: deliveries that failed, and were given up perhaps,
because everything failed. Out go lanes in which they are unsettled, as they were before.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from eventbus.stores._sqlite_read import lanes, owners, subscription_named
from eventbus.stores._sqlite_rows import one
from eventbus.stores._sqlite_units import write_lanes, write_waiting
from eventbus.stores.base import LaneState, Revive, Revived, Waiting

Connection = sqlite3.Connection


def revive(connection: Connection, command: Revive, now: float) -> tuple[LaneState, ...]:
    """See `Revive`."""
    name = command.subscription
    stored = subscription_named(connection, name)
    order = None if stored is None else stored.order
    own = {each.lane: each.epoch for each in owners(connection, [name]) if each.owner == command.instance}
    there = _in_log(connection, [each.position for each in command.deliveries])
    wanted = sorted(
        (each for each in command.deliveries if own.get(each.lane) == each.epoch and each.position in there), key=_place
    )
    states = {state.lane: state for state in lanes(connection, name)}
    changed = []
    for lane, group in itertools.groupby(wanted, key=lambda each: each.lane):
        deliveries = list(group)
        _forget_dead(connection, name, deliveries)
        if order in {"type", "log"}:
            changed.append(_set_back(states[lane], deliveries[0]))
        else:
            _write_rows(connection, name, states[lane], deliveries, now, by_key=order == "key")
            changed.append(msgspec.structs.replace(states[lane], epoch=states[lane].epoch + 1))
    if changed:
        write_lanes(connection, changed)
    return tuple(changed)


def _place(delivery: Revived) -> tuple[str, int]:
    return delivery.lane, delivery.position


def _in_log(connection: Connection, positions: Sequence[int]) -> set[int]:
    text = "SELECT CAST(json_group_array(position) AS BLOB) FROM events WHERE position IN (SELECT value FROM json_each(?))"
    return set(one(connection, text, (msgspec.json.encode(positions).decode(),), _POSITIONS, "events"))


_POSITIONS = msgspec.json.Decoder(list[int])


def _forget_dead(connection: Connection, name: str, deliveries: Iterable[Revived]) -> None:
    positions = msgspec.json.encode([each.position for each in deliveries]).decode()
    connection.execute(
        "DELETE FROM dead_letters WHERE subscription = ? AND position IN (SELECT value FROM json_each(?))", (name, positions)
    )


def _set_back(state: LaneState, first: Revived) -> LaneState:
    return msgspec.structs.replace(
        state,
        epoch=state.epoch + 1,
        checkpoint=min(state.checkpoint, first.position - 1),
        attempt=first.attempts,
        due_at=None,
        first_failed_at=None,
        error=None,
    )


def _write_rows(
    connection: Connection, name: str, state: LaneState, deliveries: Sequence[Revived], now: float, *, by_key: bool
) -> None:
    """Rows for what the checkpoint has passed, or what is done above it; the rest comes from the log."""
    firsts: dict[str | int, Revived] = {}
    for each in deliveries:
        if each.position <= state.checkpoint or each.position in state.done:
            firsts.setdefault(each.key if by_key and each.key is not None else each.position, each)
    rows = {}
    for hold, first in firsts.items():
        key = hold if isinstance(hold, str) else None
        if key is not None:
            of_key = (name, key, first.position)
            if connection.execute(f"SELECT 1 {_OF_KEY} AND position < ?", of_key).fetchone():
                continue  # the key waits for an earlier event, and so for this one, too
            connection.execute(f"DELETE {_OF_KEY} AND position >= ?", of_key)
        rows[name, first.position] = (state.lane, Waiting(first.position, key, first.attempts, now))
    if rows:
        write_waiting(connection, rows)


_OF_KEY = "FROM deliveries WHERE subscription = ? AND key = ?"
