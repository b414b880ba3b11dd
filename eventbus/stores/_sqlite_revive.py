"""Taking back, in the SQLite store, what failed attempts have left behind.

publish → journal → *store* → lanes → workers → outcome. In comes a `Revive`: deliveries that failed, and were given up perhaps,
because everything failed. Out go lanes in which they are unsettled, as they were before.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Container, Iterable, Sequence

import msgspec

from eventbus.stores._sqlite_read import lanes, owners, subscription_named
from eventbus.stores._sqlite_rows import collect, one
from eventbus.stores._sqlite_units import write_lanes, write_waiting
from eventbus.stores.base import LaneState, Order, Revive, Revived, Waiting

Connection = sqlite3.Connection


def revive(connection: Connection, command: Revive, now: float) -> tuple[LaneState, ...]:
    """See `Revive`."""
    name = command.subscription
    stored = subscription_named(connection, name)
    order = None if stored is None else stored.order
    own = {each.lane: each.epoch for each in owners(connection, [name]) if each.owner == command.instance}
    there = _chosen(connection, _IN_LOG, command.deliveries)
    dead = _chosen(connection, _DEAD, command.deliveries, name)
    wanted = sorted((each for each in command.deliveries if own.get(each.lane) == each.epoch), key=_place)
    states = {state.lane: state for state in lanes(connection, name)}
    result, changed = [], []
    for lane, group in itertools.groupby(wanted, key=lambda each: each.lane):
        state, of_lane = states[lane], [each for each in group if each.position in there]
        deliveries = _unsettled(connection, name, order, state, of_lane, dead)
        if deliveries:
            _forget_dead(connection, name, deliveries)
            if order in {"type", "log"}:
                state = _set_back(state, deliveries[0])
            else:
                _write_rows(connection, name, state, deliveries, now, by_key=order == "key")
                state = msgspec.structs.replace(state, epoch=state.epoch + 1)
            changed.append(state)
        result.append(state)
    if changed:
        write_lanes(connection, changed)
    return tuple(result)


def _place(delivery: Revived) -> tuple[str, int]:
    return delivery.lane, delivery.position


def _positions(deliveries: Iterable[Revived]) -> str:
    return msgspec.json.encode([each.position for each in deliveries]).decode()


def _chosen(connection: Connection, source: str, deliveries: Iterable[Revived], *of: str) -> set[int]:
    return set(one(connection, collect("position", source), (*of, _positions(deliveries)), _POSITIONS, source))


_POSITIONS = msgspec.json.Decoder(list[int])
_THESE = "position IN (SELECT value FROM json_each(?))"
_IN_LOG = f"FROM events WHERE {_THESE}"
_DEAD = f"FROM dead_letters WHERE subscription = ? AND {_THESE}"


def _forget_dead(connection: Connection, name: str, deliveries: Iterable[Revived]) -> None:
    connection.execute(f"DELETE {_DEAD}", (name, _positions(deliveries)))


def _unsettled(
    connection: Connection, name: str, order: Order | None, state: LaneState, deliveries: Sequence[Revived], dead: Container[int]
) -> list[Revived]:
    """Those of a lane's deliveries, in order, that nobody has settled meanwhile, nor one that must come after it."""
    left: dict[str | int, list[Revived]] = {}
    for each in deliveries:
        key = each.key if order == "key" else None
        hold: str | int = "" if order in {"type", "log"} else each.position if key is None else key
        passed = each.position <= state.checkpoint or each.position in state.done
        if passed and each.position not in dead and not _waits(connection, name, key, each.position):
            left.pop(hold, None)
        else:
            left.setdefault(hold, []).append(each)
    return sorted(itertools.chain.from_iterable(left.values()), key=_place)


def _waits(connection: Connection, name: str, key: str | None, position: int) -> bool:
    """Whether a row says that it is unsettled; see `Waiting.begins`."""
    if key is None:
        found = connection.execute("SELECT 1 FROM deliveries WHERE subscription = ? AND position = ?", (name, position))
    else:
        begins = "position + (state IN ('parked', 'freed'))"
        found = connection.execute(f"SELECT 1 {_OF_KEY} AND {begins} <= ?", (name, key, position))
    return found.fetchone() is not None


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
