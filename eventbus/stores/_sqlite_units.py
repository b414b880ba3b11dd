"""Outcomes in the SQLite store: which units of a batch still hold, and what they change.

publish → journal → *store* → lanes → workers → *outcome*. In come the units of a batch, in order, and what the store said about
them before; each is checked against what the units before it have made of that. Out go a few statements: one for all lanes,
one for the waiting deliveries that go, one for those that come, and more only where dead letters are touched.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from eventbus.errors import IdempotencyConflict
from eventbus.stores._sqlite_commit import BUMP, Entering, Found, LaneKey
from eventbus.stores._sqlite_insert import execute_rows
from eventbus.stores._sqlite_read import subscription_named
from eventbus.stores._sqlite_rows import (
    EVENT_COLUMNS,
    KEEP_OWNER,
    NEW_OWNER,
    ON_WAITING,
    UPSERT_LANES,
    UPSERT_SUBSCRIPTION,
    UPSERT_WAITING,
    WAITING_JSON,
    WAITING_ROWS,
    Value,
    ask,
    lane_values,
    subscription_values,
    to_micros,
    waiting_of,
    waiting_values,
)
from eventbus.stores.base import Death, LaneState, Refusal, Subscribed, Unit, Waiting

_Kind = Literal["died", "died again", "handled", "retried"]


class Outcomes:
    """The units of one transaction.

    Attributes:
        refused: for each unit that was left out, by its index, why.
        conflicts: indexes of the units that ended by `Unit.conflict`.
        lanes: how the lanes that change will stand.
    """

    def __init__(self, found: Found, entering: Entering, now: float) -> None:
        self.refused: dict[int, Refusal] = {}
        self.conflicts: list[int] = []
        self.lanes: dict[LaneKey, LaneState] = {}
        self._found = found
        self._entering = entering
        self._now = now
        self._gone: set[tuple[str, int]] = set()
        self._waiting: dict[tuple[str, int], tuple[str, Waiting]] = {}
        self._freed: set[tuple[str, int]] = set()
        self._letters: list[tuple[_Kind, tuple[Value, ...]]] = []
        self._paused: dict[str, str] = {}

    @property
    def touched(self) -> bool:
        """Whether there is anything to write, beside what enters the log."""
        return bool(self.lanes or self._gone or self._waiting or self._letters or self._paused)

    # -------------------------------------------------------------- decide

    def decide(self, units: Sequence[Unit]) -> None:
        """Take in the units that hold, and note why others do not."""
        for index, unit in enumerate(units):
            lane = self._found.lanes.get((unit.subscription, unit.lane))
            if lane is None or lane.epoch != unit.epoch:
                self.refused[index] = "fenced"
            elif self._is_settled(unit, lane):
                self.refused[index] = "settled"
            else:
                self._apply(index, unit, lane)

    def _is_settled(self, unit: Unit, lane: LaneState) -> bool:
        if unit.source == "log":
            return unit.position <= lane.checkpoint or unit.position in lane.done
        if unit.source == "row":
            return (unit.subscription, unit.row) not in self._found.rows
        return unit.source == "redrive" and unit.dead_letter not in self._found.redriven

    def _apply(self, index: int, unit: Unit, lane: LaneState) -> None:
        death = unit.death
        if unit.published:
            admitted = self._entering.admit(unit.published)
            if isinstance(admitted, IdempotencyConflict):
                self.conflicts.append(index)
                death = unit.conflict or self._death_by(admitted)
        self._move(unit, lane)
        if unit.row is not None or unit.rows:
            self._change_rows(unit)
        if death is not None or unit.dead_letter is not None:
            self._change_dead_letter(unit, death)
        if unit.pause is not None:
            self._paused[unit.subscription] = unit.pause

    def _death_by(self, conflict: IdempotencyConflict) -> Death:
        return Death("IdempotencyConflict", str(conflict), "", 1, self._now, self._now)

    def _move(self, unit: Unit, lane: LaneState) -> None:
        """The lane stands as the unit says; but what was settled stays so, also if the unit was written before, and comes again
        since nobody could tell. One that did not come from the log or a row says nothing about what waits there."""
        if unit.checkpoint <= lane.checkpoint and unit.source in {"redrive", "replay"}:
            return
        checkpoint = max(unit.checkpoint, lane.checkpoint)
        done = sorted({*unit.done, *lane.done}) if unit.done or lane.done else ()
        moved = LaneState(
            unit.subscription,
            unit.lane,
            unit.epoch,
            checkpoint,
            tuple([position for position in done if position > checkpoint]),
            unit.attempt,
            unit.due_at,
            unit.first_failed_at,
            unit.error,
        )
        if moved != lane:
            key = (unit.subscription, unit.lane)
            self._found.lanes[key] = self.lanes[key] = moved

    def _change_rows(self, unit: Unit) -> None:
        rows = self._found.rows
        if unit.row is not None:
            key = (unit.subscription, unit.row)
            rows.discard(key)
            self._gone.add(key)
            self._waiting.pop(key, None)
        for waiting in unit.rows:
            key = (unit.subscription, waiting.position)
            rows.add(key)
            self._gone.discard(key)
            self._waiting[key] = (unit.lane, waiting)

    def _change_dead_letter(self, unit: Unit, death: Death | None) -> None:
        if unit.dead_letter is None:
            if death is not None:
                self._letters.append(("died", (unit.subscription, unit.position, *_values(death))))
        elif death is not None:
            self._found.redriven.discard(unit.dead_letter)
            self._letters.append(("died again", (*_values(death), unit.dead_letter)))
        elif unit.retry is not None:
            attempts, due_at = unit.retry
            self._letters.append(("retried", (attempts, to_micros(due_at), unit.dead_letter)))
        else:
            self._found.redriven.discard(unit.dead_letter)
            self._letters.append(("handled", (unit.dead_letter,)))
            self._freed.add((unit.subscription, unit.position))

    # -------------------------------------------------------------- write

    def write(self, connection: sqlite3.Connection) -> None:
        """Write what the units that hold have changed. The events that they published are in the log already."""
        if self.lanes:
            write_lanes(connection, list(self.lanes.values()))
        if self._gone:
            _remove_rows(connection, self._gone)
        if self._waiting:
            write_waiting(connection, self._waiting)
        # In order, since one dead letter may be deleted and come anew in one batch; what comes in a row is one statement.
        for kind, group in itertools.groupby(self._letters, key=lambda letter: letter[0]):
            _WRITE_LETTERS[kind](connection, [values for _, values in group])
        if self._freed:
            _free_rows(connection, self._freed, self._now)
        for name, reason in self._paused.items():
            write_paused(connection, name, reason, self._now)
        if self._paused:
            connection.execute(BUMP)


def write_lanes(connection: sqlite3.Connection, lanes: Sequence[LaneState], owner: str | None = None) -> None:
    """Write lanes; each keeps its owner, unless one is given."""
    rows = [lane_values(state, owner) for state in lanes]
    execute_rows(connection, UPSERT_LANES, rows, KEEP_OWNER if owner is None else NEW_OWNER)


def write_waiting(connection: sqlite3.Connection, rows: Mapping[tuple[str, int], tuple[str, Waiting]]) -> None:
    values = [waiting_values(subscription, lane, waiting) for (subscription, _), (lane, waiting) in rows.items()]
    execute_rows(connection, UPSERT_WAITING, values, ON_WAITING)


def _remove_rows(connection: sqlite3.Connection, keys: Iterable[tuple[str, int]]) -> None:
    # By subscription: for `(subscription, position) IN (VALUES …)` SQLite scans the table.
    head = "DELETE FROM deliveries WHERE subscription = ? AND position IN ("
    for name, group in itertools.groupby(sorted(keys), key=lambda key: key[0]):
        execute_rows(connection, head, [(position,) for _, position in group], ")", first=(name,))


def free_parked(connection: sqlite3.Connection, of: str, values: Mapping[str, object], now: float) -> None:
    """Free the parked rows, of which dead letters are gone, or going: `of` is the condition that says which."""
    source = f"FROM deliveries WHERE state = 'parked' AND {of}"
    rows = ask(connection, WAITING_JSON, source, values, WAITING_ROWS, waiting_of)
    freed = {
        (row.subscription, row.waiting.position): (row.lane, Waiting(row.waiting.position, row.waiting.key, 0, now, "freed"))
        for row in rows
    }
    write_waiting(connection, freed)


def _free_rows(connection: sqlite3.Connection, keys: Iterable[tuple[str, int]], now: float) -> None:
    of = "subscription = :name AND position IN (SELECT value FROM json_each(:positions))"
    for name, group in itertools.groupby(sorted(keys), key=lambda key: key[0]):
        positions = msgspec.json.encode([position for _, position in group]).decode()
        free_parked(connection, of, {"name": name, "positions": positions}, now)


# ------------------------------------------------------------------ subscriptions


def write_subscription(connection: sqlite3.Connection, subscribed: Subscribed) -> None:
    """Write the row of a subscription as a whole."""
    connection.execute(UPSERT_SUBSCRIPTION, subscription_values(subscribed))


def write_paused(connection: sqlite3.Connection, name: str, reason: str | None, now: float) -> bool:
    """Pause a subscription, or, without a reason, resume it; whether it is stored."""
    stored = subscription_named(connection, name)
    if stored is not None:
        since = None if reason is None else now
        write_subscription(connection, msgspec.structs.replace(stored, paused=reason, paused_at=since))
    return stored is not None


# ------------------------------------------------------------------ dead letters

_DEATH = "error_type, error, traceback, attempts, first_failed_at, last_failed_at"

_INSERT_DEAD = "WITH died (subscription, position, error_type, error, traceback, attempts, first_failed_at, last_failed_at) AS ("
_FROM_LOG = (
    f") INSERT INTO dead_letters (subscription, event_id, position, {_DEATH}, {EVENT_COLUMNS}) "
    f"SELECT d.subscription, e.id, d.position, d.{_DEATH.replace(', ', ', d.')}, e.{EVENT_COLUMNS.replace(', ', ', e.')} "
    "FROM died d CROSS JOIN events e ON e.position = d.position WHERE true "
    "ON CONFLICT (subscription, event_id) DO UPDATE SET error_type = excluded.error_type, error = excluded.error, "
    "traceback = excluded.traceback, attempts = excluded.attempts, last_failed_at = excluded.last_failed_at"
)


def _values(death: Death) -> tuple[Value, ...]:
    return (
        *(death.error_type, death.error, death.traceback, death.attempts),
        *(to_micros(death.first_failed_at), to_micros(death.last_failed_at)),
    )


def _write_died(connection: sqlite3.Connection, deaths: Sequence[tuple[Value, ...]]) -> None:
    execute_rows(connection, _INSERT_DEAD, deaths, _FROM_LOG)


def _write_died_again(connection: sqlite3.Connection, deaths: Sequence[tuple[Value, ...]]) -> None:
    for death in deaths:
        connection.execute(
            "UPDATE dead_letters SET error_type = ?, error = ?, traceback = ?, attempts = ?, first_failed_at = ?, "
            "last_failed_at = ?, redriving = 0, attempt = 0, due_at = NULL WHERE id = ?",
            death,
        )


def _write_handled(connection: sqlite3.Connection, ids: Sequence[tuple[Value, ...]]) -> None:
    execute_rows(connection, "DELETE FROM dead_letters WHERE id IN (", ids, ")")


def _write_retried(connection: sqlite3.Connection, retries: Sequence[tuple[Value, ...]]) -> None:
    for retry in retries:
        connection.execute("UPDATE dead_letters SET attempt = ?, due_at = ? WHERE id = ?", retry)


_WRITE_LETTERS = {
    "died": _write_died,
    "died again": _write_died_again,
    "handled": _write_handled,
    "retried": _write_retried,
}
