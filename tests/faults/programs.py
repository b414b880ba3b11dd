"""Random programs for a store: batches such as a bus makes, and digests of what a database holds after them.

A program looks at a store to find out what it could do next: which lanes there are, what waits, what is dead. The same seed
and the same answers give the same batches.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from eventbus.stores.base import (
    Batch,
    Beat,
    Cancel,
    Claim,
    Command,
    DeadLetterFilter,
    DeadLetters,
    Death,
    Discard,
    Events,
    Instance,
    Lanes,
    LaneState,
    LogState,
    Pause,
    Promote,
    Prune,
    Record,
    Redrive,
    Register,
    Registration,
    Rewind,
    Store,
    Unit,
    Waiting,
    WaitingRows,
    slot_of,
)

NOW = 1_700_000_000.0
INSTANCE = Instance("01890000-0000-7000-8000-00000000f001", "power", "localhost", 4711, NOW)
TYPES = ("a", "b", "c")
LANES = (("typed", "a", 0), ("typed", "b", 0), ("typed", "c", 0), ("keyed", "0", 0), ("keyed", "1", 0), ("loose", "", 0))

_DEATH = Death("ValueError", "no stock", "Traceback …", 3, NOW, NOW + 5)

# ------------------------------------------------------------------ contents

_TABLES = (
    "events",
    "scheduled",
    "idempotency",
    "subscriptions",
    "instances",
    "lanes",
    "marks",
    "deliveries",
    "dead_letters",
    "log_state",
    "sqlite_sequence",
)


def contents(connection: Any) -> dict[str, list[tuple[Any, ...]]]:
    """All that the tables hold, but for the time at which a migration was applied."""
    found = {table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for table in _TABLES}
    found["sqlite_master"] = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    return found


def digest(connection: Any) -> bytes:
    """The same, for comparing."""
    return hashlib.blake2b(repr(contents(connection)).encode(), digest_size=16).digest()


# ------------------------------------------------------------------ programs


class Program:
    """Batch after batch.

    Args:
        name: goes into the ids of its events, so that two programs on one file do not share any.
    """

    def __init__(self, chance: random.Random, name: int = 0) -> None:
        self._chance = chance
        self._name = name
        self._made = self._batches = 0
        self._time = NOW

    def first(self) -> Batch:
        """Subscriptions, and lanes for them."""
        registrations = (
            Registration("typed", ("a", "b"), "type", 1, "beginning"),
            Registration("keyed", ("*",), "key", 2, "beginning"),
            Registration("loose", ("b", "c"), "none", 16, "beginning"),
        )
        commands: list[Command[Any]] = [Beat(INSTANCE, 100.0), Register(registrations, INSTANCE.id), Claim(INSTANCE.id, LANES)]
        return Batch(self._now(), commands=commands)

    def batch(self, view: Store) -> Batch:
        """The next one. Now and then all is settled, and then pruned: the log is empty, and positions go on."""
        self._batches += 1
        if self._batches % 5 == 4:
            return Batch(self._now(), units=self._all_settled(view))
        if self._batches % 5 == 0:
            return Batch(self._now(), commands=[Prune(self._time + 1, 0.0, 0, 500)])
        kind = self._chance.choice(["append"] * 4 + ["settle"] * 3 + ["mixed"] * 3 + ["command"] * 2)
        appends = self._groups() if kind in {"append", "mixed"} else []
        units = self._units(view) if kind in {"settle", "mixed"} else []
        commands = self._commands(view) if kind == "command" or (kind == "mixed" and self._chance.random() < 0.3) else []
        return Batch(self._now(), appends, units, commands)

    def append(self, count: int = 1) -> Batch:
        """One that only appends."""
        return Batch(self._now(), [[self._record(keyed=False) for _ in range(count)]])

    def _now(self) -> float:
        self._time += 1.0
        return self._time

    def _record(self, *, keyed: bool = True) -> Record:
        chance = self._chance
        self._made += 1
        id = f"0189{self._name:04x}-0000-7000-8000-{self._made:012x}"
        key = chance.choice([None, "k", "l", "m"])
        size = chance.choice([1, 20, 20, 300, 300, 2_000, 9_000])
        data = b'{"n":"' + chance.randbytes(size).hex().encode()[:size] + b'"}'
        record = Record(id, chance.choice(TYPES), 1, self._time, key, slot_of(key or id), None, "application/json", data)
        if keyed and chance.random() < 0.15:
            record.idempotency_key = f"{self._name}-{chance.randrange(8)}"
        if keyed and chance.random() < 0.15:
            record.due_at = self._time + chance.randrange(20)
        return record

    def _groups(self) -> list[list[Record]]:
        keyed = self._chance.random() < 0.4
        counts = [self._chance.choice([1, 1, 2, 5]) for _ in range(self._chance.randint(1, 3))]
        return [[self._record(keyed=keyed) for _ in range(count)] for count in counts]

    # -------------------------------------------------------------- outcomes

    def _units(self, view: Store) -> list[Unit]:
        units: list[Unit] = []
        for lane in view.read(Lanes()):
            if self._chance.random() < 0.6:
                units += self._units_of(view, lane)
        return units

    def _all_settled(self, view: Store) -> list[Unit]:
        head, units = view.read(LogState()).head, []
        for lane in view.read(Lanes()):
            rows = [row.waiting for row in view.read(WaitingRows(lane.subscription)) if row.lane == lane.lane]
            units += [self._unit(lane, "row", row.position, row=row.position, checkpoint=lane.checkpoint) for row in rows]
            units.append(self._unit(lane, "log", head, checkpoint=head))
        return units

    def _units_of(self, view: Store, lane: LaneState) -> list[Unit]:
        chance = self._chance
        published = tuple(self._record() for _ in range(chance.choice([0, 0, 0, 1, 2])))
        common: dict[str, Any] = {"checkpoint": lane.checkpoint, "published": published}
        source = chance.choice(["log", "log", "log", "row", "redrive", "fenced"])
        if source == "row":
            rows = [row.waiting for row in view.read(WaitingRows(lane.subscription)) if row.lane == lane.lane]
            waiting = chance.choice(rows) if rows else None
            if waiting is not None:
                common["death"] = chance.choice([None, _DEATH])
                return [self._unit(lane, "row", waiting.position, row=waiting.position, **common)]
        if source == "redrive":
            letters = view.read(DeadLetters(DeadLetterFilter(subscription=lane.subscription, redriving=True)))
            if letters:
                letter = chance.choice(letters)
                end: dict[str, Any] = chance.choice([{}, {"death": _DEATH}, {"retry": (2, self._time + 3)}])
                return [self._unit(lane, "redrive", letter.record.position, dead_letter=letter.id, **common, **end)]
        events = view.read(Events(lane.checkpoint, 4, 100_000)).records
        if not events:
            return []
        event = chance.choice(events)
        epoch = lane.epoch - 1 if source == "fenced" else lane.epoch
        return [self._unit(lane, "log", event.position, epoch=epoch, **common | self._end(event, lane))]

    def _end(self, event: Record, lane: LaneState) -> dict[str, Any]:
        """How an attempt at an event from the log ends."""
        end = self._chance.choice(["ack", "ack", "dead", "wait", "pause"])
        if end == "dead":
            return {"checkpoint": event.position, "death": _DEATH}
        if end == "wait" and lane.subscription == "typed":
            return {"attempt": lane.attempt + 1, "due_at": self._time + 2, "first_failed_at": NOW, "error": "no", "published": ()}
        if end == "wait":
            key = event.key if lane.subscription == "keyed" else None
            row = Waiting(event.position, key, 1, self._time + 2, "retrying", NOW, "no")
            return {"checkpoint": event.position, "rows": (row,), "published": ()}
        if end == "pause" and self._chance.random() < 0.2:
            return {"checkpoint": event.position, "pause": "by the program"}
        return {"checkpoint": event.position}

    def _unit(self, lane: LaneState, source: Any, position: int, *, epoch: int | None = None, **rest: Any) -> Unit:
        return Unit(lane.subscription, lane.lane, lane.epoch if epoch is None else epoch, source, position, **rest)

    # -------------------------------------------------------------- commands

    def _commands(self, view: Store) -> list[Command[Any]]:
        chance, all_dead = self._chance, DeadLetterFilter()
        subscription = chance.choice(["typed", "keyed", "loose"])
        letters = [letter.id for letter in view.read(DeadLetters(all_dead))][:2]
        made = f"0189{self._name:04x}-0000-7000-8000-{chance.randint(1, self._made + 1):012x}"
        choices: Sequence[Command[Any]] = (
            Promote(self._time, 3),
            Promote(self._time, 3),
            Redrive(all_dead),
            Redrive(all_dead),
            Prune(self._time + 1, self._time - 9, 0, 50),
            Prune(self._time + 1, self._time - 9, 0, 50),
            Discard(DeadLetterFilter(ids=tuple(letters))),
            Cancel(made),
            Pause(subscription, chance.choice([None, "by hand"])),
            Claim(INSTANCE.id, LANES[:2]),
            Rewind(subscription, 3),
            Beat(INSTANCE, 100.0 + self._time - NOW),
            Register((Registration("typed", ("a", "b", chance.choice(TYPES)), "type", 1),), INSTANCE.id),
        )
        return chance.sample(choices, chance.choice([1, 1, 2]))
