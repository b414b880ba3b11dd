"""The oracle: a store of dicts that does what `eventbus.stores.base` says, as plainly as it can be said.

publish → journal → *store* → lanes → workers → outcome. It is what the SQLite store is compared with, batch for batch, and the
store of the simulation. It passes the conformance suite, which shows that the words of the protocol are enough to write a store
by. Commands stand in `oracle_commands`, queries in `oracle_queries`.

Nothing here needs a rollback: whatever can be refused is looked at before anything is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from eventbus.errors import EventBusError, IdempotencyConflict, StoreUnavailable
from eventbus.stores.base import (
    Batch,
    Committed,
    DeadLetterRow,
    Death,
    Discard,
    Features,
    Instance,
    LaneState,
    Notice,
    Pause,
    Query,
    Record,
    Redrive,
    Refusal,
    Rewind,
    Stored,
    Unit,
    Unsubscribe,
    WaitingRow,
)
from tests.simulation.disk import Disk, Key
from tests.simulation.oracle_commands import carry_out
from tests.simulation.oracle_queries import answer

T = TypeVar("T")


class Oracle:
    """A store on a `Disk`.

    Args:
        shared: whether others may have it open as well.
        monotonic: the time by which leases are measured.
    """

    def __init__(self, disk: Disk, *, shared: bool = False, monotonic: Callable[[], float] = lambda: 0.0) -> None:
        self.disk = disk
        self._lock = threading.Lock()
        self.monotonic = monotonic
        self._shared = shared
        self._instance: str | None = None
        self._seen: object = None

    @property
    def address(self) -> str:
        """What it is called."""
        return "the oracle"

    @property
    def features(self) -> Features:
        """What it can do."""
        return Features(concurrent_reads=True, survives_power_loss=False, shared=self._shared)

    def open(self, instance: Instance) -> None:
        """Begin."""
        self._instance = instance.id
        self.disk.connected.add(instance.id)

    def close(self) -> None:
        """End; also by a crash."""
        self.disk.connected.discard(self._instance or "")
        self._instance = None

    def lives(self, instance: str) -> bool | None:
        """Whether an instance has the store open; None where that cannot be told."""
        return instance in self.disk.connected if self._shared else None

    def notice(self) -> Notice | None:
        """What others have done since the last call."""
        disk = self.disk
        died = any(self.lives(id) is False for id in disk.present if id != self._instance)
        seen = disk.head, disk.changes
        if seen == self._seen and not died:
            return None
        self._seen = seen
        return Notice(disk.head, disk.changes, died)

    def read(self, query: Query[T]) -> T:
        """Answer."""
        if self._instance is None:
            raise StoreUnavailable("the oracle is not open")
        with self._lock:
            return answer(self.disk, query)

    def commit(self, batch: Batch) -> Committed:
        """Commands, then appends, then units."""
        if self._instance is None:
            raise StoreUnavailable("the oracle is not open")
        with self._lock:
            return Transaction(self.disk, batch.now, self.lives).run(batch)


class Transaction:
    """One batch on its way into the disk."""

    def __init__(self, disk: Disk, now: float, lives: Callable[[str], bool | None]) -> None:
        self._disk = disk
        self._now = now
        self._lives = lives
        self._events: list[Record] = []

    def run(self, batch: Batch) -> Committed:
        """Apply it."""
        previous = self._disk.head
        results = [self._command(command) for command in batch.commands]
        if any(isinstance(command, Pause | Unsubscribe | Rewind | Redrive | Discard) for command in batch.commands):
            self._disk.changes += 1
        appends = [self._admit(group) for group in batch.appends]
        refused: dict[int, Refusal] = {}
        conflicts: list[int] = []
        for index, unit in enumerate(batch.units):
            refusal = self._refusal(unit)
            if refusal is not None:
                refused[index] = refusal
            elif self._settle(unit) is not None:
                conflicts.append(index)
        if any(unit.pause is not None for index, unit in enumerate(batch.units) if index not in refused):
            self._disk.changes += 1
        return Committed(previous, self._disk.head, appends, refused, results, self._events, conflicts)

    def _command(self, command: object) -> object:
        try:
            return carry_out(self._disk, command, self._now, self._lives, self._enter)
        except EventBusError as error:
            return error

    # -------------------------------------------------------------- what enters the log

    def _enter(self, record: Record) -> int:
        disk = self._disk
        disk.head += 1
        record.position = disk.head
        disk.log[disk.head] = msgspec.structs.replace(record, event=None, idempotency_key=None, due_at=None, cause=0)
        self._events.append(record)
        return disk.head

    def _admit(self, group: Sequence[Record]) -> list[Stored] | IdempotencyConflict:
        conflict = self._conflict(group)
        return [self._store(record) for record in group] if conflict is None else conflict

    def _conflict(self, group: Sequence[Record]) -> IdempotencyConflict | None:
        used = {key: known.event for key, known in self._disk.keys.items()}
        for record in group:
            if record.idempotency_key is not None:
                first = used.setdefault(record.idempotency_key, record)
                if _content(first) != _content(record):
                    return IdempotencyConflict(record.idempotency_key, first.id)
        return None

    def _store(self, record: Record) -> Stored:
        keys = self._disk.keys
        if record.idempotency_key in keys:
            known = keys[record.idempotency_key]
            return Stored(known.event.id, known.position, duplicate=True)
        position = None
        if record.due_at is None:
            position = self._enter(record)
        else:
            self._disk.scheduled[record.id] = msgspec.structs.replace(record, event=None, cause=0)
        if record.idempotency_key is not None:
            keys[record.idempotency_key] = Key(record, position, self._now)
        return Stored(record.id, position)

    # -------------------------------------------------------------- units

    def _refusal(self, unit: Unit) -> Refusal | None:
        lane = self._disk.lanes.get((unit.subscription, unit.lane))
        if lane is None or lane.state.epoch != unit.epoch:
            return "fenced"
        return "settled" if self._is_settled(unit, lane.state) else None

    def _is_settled(self, unit: Unit, lane: LaneState) -> bool:
        if unit.source == "log":
            return unit.position <= lane.checkpoint or unit.position in lane.done
        if unit.source == "row":
            return (unit.subscription, unit.row) not in self._disk.rows
        if unit.source == "redrive":
            letter = self._disk.letters.get(unit.dead_letter or 0)
            return letter is None or not letter.redriving
        return False

    def _settle(self, unit: Unit) -> IdempotencyConflict | None:
        admitted = self._admit(unit.published)
        conflict = admitted if isinstance(admitted, IdempotencyConflict) else None
        death = unit.death
        if conflict is not None:
            death = unit.conflict or Death("IdempotencyConflict", str(conflict), "", 1, self._now, self._now)
        self._move(unit)
        if unit.row is not None:
            self._disk.rows.pop((unit.subscription, unit.row), None)
        for waiting in unit.rows:
            self._disk.rows[unit.subscription, waiting.position] = WaitingRow(unit.subscription, unit.lane, waiting)
        if unit.dead_letter is not None:
            self._redriven(unit, self._disk.letters[unit.dead_letter], death)
        elif death is not None:
            self._died(unit, death)
        if unit.pause is not None and unit.subscription in self._disk.subscriptions:
            known = self._disk.subscriptions[unit.subscription]
            changed = msgspec.structs.replace(known, paused=unit.pause, paused_at=self._now)
            self._disk.subscriptions[unit.subscription] = changed
        return conflict

    def _move(self, unit: Unit) -> None:
        lane = self._disk.lanes[unit.subscription, unit.lane]
        if unit.source in {"redrive", "replay"} and unit.checkpoint <= lane.state.checkpoint:
            return  # it says nothing about what waits in the lane
        checkpoint = max(unit.checkpoint, lane.state.checkpoint)
        lane.state = msgspec.structs.replace(
            lane.state,
            checkpoint=checkpoint,
            done=tuple(position for position in sorted({*unit.done, *lane.state.done}) if position > checkpoint),
            attempt=unit.attempt,
            due_at=unit.due_at,
            first_failed_at=unit.first_failed_at,
            error=unit.error,
        )

    def _died(self, unit: Unit, death: Death) -> None:
        disk = self._disk
        event = disk.log.get(unit.position)
        if event is None:
            return
        disk.last_letter += 1  # also where it is not needed: ids need not be without gaps, and SQLite's are like that
        for letter in disk.letters.values():
            if (letter.subscription, letter.record.id) == (unit.subscription, event.id):
                known = msgspec.structs.replace(death, first_failed_at=letter.death.first_failed_at)
                disk.letters[letter.id] = msgspec.structs.replace(letter, death=known)
                return
        disk.letters[disk.last_letter] = DeadLetterRow(
            disk.last_letter, unit.subscription, event, death, redriving=False, attempt=0, due_at=None
        )

    def _redriven(self, unit: Unit, letter: DeadLetterRow, death: Death | None) -> None:
        changed: DeadLetterRow | None = None
        if death is not None:
            changed = msgspec.structs.replace(letter, death=death, redriving=False, attempt=0, due_at=None)
        elif unit.retry is not None:
            changed = msgspec.structs.replace(letter, attempt=unit.retry[0], due_at=unit.retry[1])
        if changed is None:
            del self._disk.letters[letter.id]
            self._disk.free(unit.subscription, unit.position, self._now)
        else:
            self._disk.letters[letter.id] = changed


def _content(record: Record) -> tuple[object, ...]:
    return record.type, record.version, record.key, record.content_type, record.data
