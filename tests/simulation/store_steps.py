"""The SQLite store against the oracle: random batches to both, and whatever can be asked of both. A part of `tests.campaign`.

publish → journal → *store* → lanes → workers → outcome, with the journal played by a random program: groups of events with and
without keys, due or not; outcomes of every source, good, late and stale; every command; the file closed and opened in between.

    python -m tests.simulation.store_steps SEED      # one history again

A `Random` decides everything; hypothesis gives one that it can make simpler (`test_store_steps`).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from eventbus.stores.base import (
    Batch,
    Beat,
    Cancel,
    Claim,
    Command,
    Committed,
    CountDeadLetters,
    DeadLetterFilter,
    DeadLetters,
    Discard,
    Events,
    EventsAt,
    Find,
    Lag,
    LagOfRows,
    Lanes,
    LogState,
    Mark,
    Marking,
    NextDue,
    Pause,
    PositionBefore,
    Promote,
    Prune,
    Query,
    Record,
    Redrive,
    Register,
    Registration,
    Release,
    Revive,
    Revived,
    Rewind,
    Serves,
    Stand,
    Store,
    Stored,
    Subscriptions,
    Suspicions,
    Types,
    Unit,
    Unsubscribe,
    Waiting,
    WaitingRows,
    slot_of,
)
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing import conformance  # noqa: F401  # before its parts, so that their assertions are rewritten
from eventbus.testing._conformance_base import INSTANCE, NOW, OTHER, death, places_of
from tests.campaign import MEMORY, Case
from tests.simulation.disk import Disk, Lane
from tests.simulation.oracle import Oracle

STEPS = 100
"""Batches of one history."""

TYPES = ("a", "b", "b.c", "d")
PATTERNS = (*TYPES, "b.*", "*")
NAMES = ("s", "t", "u")
KEYS = (None, None, "k", "l", "ü")


class Differs(Exception):
    """The two do not say the same."""


class History:
    """One store and one oracle, from their beginning on.

    Args:
        chance: decides everything.
        directory: where the store's file is; None: in memory.
    """

    def __init__(self, chance: random.Random, directory: Path | None) -> None:
        self.chance = chance
        self._persistent = directory is not None
        self.disk = Disk()
        path = ":memory:" if directory is None else directory / "a.db"
        self._monotonic = 100.0
        self._store: Store = SQLiteStore(path, durability="fast")
        self._oracle: Store = Oracle(self.disk, shared=self._persistent)
        self._numbers = itertools.count(1)
        self._ids: list[str] = []
        self._now = NOW

    @contextlib.contextmanager
    def opened(self) -> Iterator[History]:
        """Both are open."""
        self._store.open(INSTANCE)
        self._oracle.open(INSTANCE)
        try:
            yield self
        finally:
            self._store.close()
            self._oracle.close()

    def step(self) -> None:
        """One batch, and some questions."""
        chance = self.chance
        self._now += chance.choice((0.0, 0.5, 1.0))
        if self._persistent and chance.random() < 0.05:
            self._store.close()
            self._store.open(INSTANCE)
        batch = Batch(
            self._now,
            [[self._record() for _ in range(chance.randint(0, 4))] for _ in range(chance.choice((0, 0, 1, 1, 3)))],
            [self._unit() for _ in range(chance.choice((0, 0, 1, 3, 6)))] if self.disk.lanes else [],
            [self._command() for _ in range(chance.choice((0, 0, 0, 1, 1, 2)))],
        )
        declared = [command for command in batch.commands if isinstance(command, Register)]
        if declared:
            self._declare(declared[:1])
        else:
            self._commit(batch)
        for make in chance.sample(QUESTIONS, 2):
            self._ask(make)

    def check_all(self) -> None:
        """Ask everything."""
        for make in QUESTIONS:
            self._ask(make)

    # -------------------------------------------------------------- both

    def _commit(self, batch: Batch) -> None:
        said = [_said(own, store.commit(own)) for store in (self._store, self._oracle) for own in [_copy(batch)]]
        if said[0] != said[1]:
            raise Differs(f"of {batch}\nthe store says  {said[0]}\nthe oracle says {said[1]}")

    def _declare(self, commands: Sequence[Register]) -> None:
        """Another deployment. Whatever it declares, what was settled stays so, and what was not is still to be delivered; this is
        looked at for itself, since the two stores come to it in the same way."""
        before = self._unsettled()
        self._commit(Batch(self._now, commands=commands))
        after = self._unsettled()
        for name, positions in before.items():
            if positions != after[name]:
                raise Differs(f"{commands}: unsettled in {name!r} was {sorted(positions)}, and is {sorted(after[name])}")

    def _unsettled(self) -> dict[str, set[int]]:
        """By subscription, what the store says is still to be settled."""
        lanes = {(state.subscription, state.lane): Lane(state) for state in self._store.read(Lanes())}
        rows = {(row.subscription, row.waiting.position): row for row in self._store.read(WaitingRows())}
        seen = Disk(log=self.disk.log, lanes=lanes, rows=rows)
        return {
            each.name: {at for at, event in seen.log.items() if seen.is_unsettled(each, event) or seen.is_waited_for(each, event)}
            for each in self._store.read(Subscriptions())
        }

    def _ask(self, make: Callable[[History], Query[Any]]) -> None:
        query = make(self)
        answers = [_plain(query, store.read(query)) for store in (self._store, self._oracle)]
        if answers[0] != answers[1]:
            raise Differs(f"asked {query}\nthe store says  {answers[0]}\nthe oracle says {answers[1]}")

    # -------------------------------------------------------------- events and outcomes

    def position(self) -> int:
        """One that is likely to be there."""
        return self.chance.randint(0, self.disk.head + 1)

    def _record(self) -> Record:
        chance = self.chance
        id, key = f"01890000-0000-7000-8000-{next(self._numbers):012x}", chance.choice(KEYS)
        self._ids.append(id)
        due_at = self._now + chance.randint(-1, 5) if chance.random() < 0.15 else None
        return Record(
            id,
            chance.choice(TYPES),
            chance.choice((1, 1, 1, 2)),
            self._now - chance.choice((0, 0, 3)),
            key,
            slot_of(id if key is None else key),
            chance.choice((None, '{"h":"1"}')),
            "application/json",
            chance.choice((b"{}", b'{"n":1}', b"\xff", b'"long"' * 20)),
            idempotency_key=chance.choice(("x", "y", "z")) if chance.random() < 0.2 else None,
            due_at=due_at,
        )

    def _unit(self) -> Unit:
        """An outcome that a lane might report: of its next events, of its rows, of a dead letter; now and then one that is late."""
        chance, disk = self.chance, self.disk
        lane = chance.choice(list(disk.lanes.values())).state
        position = lane.checkpoint + chance.choice((1, 1, 1, 2, 3, -1, 0))
        options: dict[str, Any] = {"checkpoint": chance.choice((position, position, lane.checkpoint))}
        rows = [row.waiting for row in disk.rows_of(lane.subscription) if row.lane == lane.lane]
        letters = [letter for letter in disk.letters.values() if letter.subscription == lane.subscription]
        source: Any = chance.choice(("log", "log", "log", "row", "redrive", "replay"))
        if source == "row" and rows:
            position = options["row"] = chance.choice(rows).position
            options["checkpoint"] = lane.checkpoint
        elif source == "redrive" and letters:
            letter = chance.choice(letters)
            options["dead_letter"], position = letter.id, letter.record.position
            options["retry"] = chance.choice((None, (2, self._now + 4)))
        elif source != "replay":
            source = "log"
        if chance.random() < 0.2:
            options["done"] = tuple(sorted({max(1, position + n) for n in chance.sample(range(6), 2)}))
        if chance.random() < 0.2:
            options |= {"attempt": 2, "due_at": self._now + 1, "first_failed_at": self._now, "error": "E: no"}
        if chance.random() < 0.25:
            key = disk.log[position].key if position in disk.log else chance.choice(KEYS)  # as the event at which the row begins
            options["rows"] = (
                Waiting(max(1, position), key, chance.randint(0, 3), self._now + 2, first_failed_at=self._now, error="E"),
            )
        if chance.random() < 0.25 and position <= disk.head:
            options["death"] = death(chance.choice(("ValueError", "app.KeyError")), last_failed_at=self._now)
        if chance.random() < 0.3 and position <= disk.head:  # nobody has handled what is not there: it would die of a conflict
            options["published"] = tuple(self._record() for _ in range(chance.randint(1, 2)))
            options["conflict"] = chance.choice((None, death("IdempotencyConflict")))
        if chance.random() < 0.05:
            options["pause"] = "E: no"
        epoch = lane.epoch - (chance.random() < 0.1)
        return Unit(lane.subscription, lane.lane, epoch, source, position, **options)

    # -------------------------------------------------------------- commands

    def _command(self) -> Command[Any]:
        chance = self.chance
        if not self.disk.subscriptions or chance.random() < 0.15:
            return Register((self._registration(),), chance.choice(("", INSTANCE.id)))
        if not self.disk.lanes or chance.random() < 0.15:
            return self._claim()
        return chance.choice(COMMANDS)(self)

    def _registration(self) -> Registration:
        chance = self.chance
        order: Any = chance.choice(("type", "key", "log", "none"))
        types = tuple(dict.fromkeys(chance.choices(PATTERNS, k=2)))
        start: Any = chance.choice(("now", "beginning", self.position(), self._now - 2))
        lanes = chance.randint(1, 3) if order in {"key", "none"} else 1
        derived = types[:1] if chance.random() < 0.2 else ()
        return Registration(chance.choice(NAMES), types, order, lanes, start, derived, dispatched=chance.random() < 0.8)

    def _claim(self) -> Claim:
        chance, lanes = self.chance, []
        generations = {}
        for known in self.disk.subscriptions.values():
            names = {"type": TYPES, "key": [str(n) for n in range(known.concurrency)]}.get(known.order, [""])
            lanes += [(known.name, name, chance.choice((0, self.position()))) for name in names if chance.random() < 0.7]
            generations[known.name] = known.generation - (chance.random() < 0.05)
        return Claim(self.instance(), tuple(lanes), generations)

    def instance(self) -> str:
        """One of two."""
        return self.chance.choice((INSTANCE.id, INSTANCE.id, OTHER.id))

    def beat(self) -> Beat:
        """Of one of two; on a file only of the one that has it open: the other is known to be dead."""
        chance = self.chance
        who = chance.choice((INSTANCE, OTHER)) if not self._persistent else INSTANCE
        self._monotonic += chance.choice((1.0, 1.0, 6.0))
        name = chance.choice(NAMES)
        known = self.disk.subscriptions.get(name)
        serves = (
            {name: Serves(known.order, known.concurrency, known.types)} if known is not None and chance.random() < 0.5 else {}
        )
        pinned = self.position() if chance.random() < 0.2 else None
        return Beat(who, self._monotonic, 10.0, serves, (), pinned, leaving=chance.random() < 0.2)

    def mark(self) -> Marking:
        """Some marks of a lane come, some go; now and then those of one who had it before."""
        chance, lane = self.chance, self.chance.choice(list(self.disk.lanes))
        epoch = self.disk.lanes[lane].state.epoch - (chance.random() < 0.2)
        begun = [Mark(chance.randint(1, 3), alone=chance.random() < 0.5) for _ in range(chance.randint(1, 3))]
        over = (chance.randint(1, 3),) if chance.random() < 0.5 else ()
        return Marking(self.instance(), *lane, epoch, tuple(begun), over, cleared=chance.random() < 0.2)

    def revive(self) -> Revive:
        """Some deliveries of a lane's past."""
        name, lane = self.chance.choice(list(self.disk.lanes))
        some = sorted({self.position() for _ in range(3)} & self.disk.log.keys())
        epoch = self.disk.lanes[name, lane].state.epoch - (self.chance.random() < 0.1)
        return Revive(self.instance(), name, tuple(Revived(lane, epoch, at, self.disk.log[at].key, at % 3) for at in some))

    def filter(self) -> DeadLetterFilter:
        """Some of the dead letters."""
        chance = self.chance
        options: dict[str, Any] = {}
        for field, values in (
            ("ids", (tuple(range(1, 6)), (1, 3))),
            ("subscription", NAMES),
            ("type", PATTERNS),
            ("error", ("ValueError", "KeyError", "app.KeyError")),
            ("since", (self._now - 1,)),
            ("until", (self._now - 1,)),
            ("redriving", (True, False)),
        ):
            if chance.random() < 0.15:
                options[field] = chance.choice(values)
        return DeadLetterFilter(**options)

    def id(self) -> str:
        """Of an event that there was, perhaps."""
        return self.chance.choice((*self._ids[-30:], "nobody"))

    def now(self) -> float:
        return self._now


def _name(history: History) -> str:
    return history.chance.choice(NAMES)


COMMANDS: Sequence[Callable[[History], Command[Any]]] = (
    History.beat,
    History.mark,
    History.revive,
    lambda h: Release(h.instance(), tuple(h.chance.sample(list(h.disk.lanes), 1))),
    lambda h: Pause(_name(h), h.chance.choice((None, "why"))),
    lambda h: Unsubscribe(_name(h)) if h.chance.random() < 0.3 else Pause(_name(h), None),
    lambda h: Rewind(_name(h), h.position()),
    lambda h: Cancel(h.id()),
    lambda h: Promote(h.now(), h.chance.choice((1, 100))),
    lambda h: Redrive(h.filter()),
    lambda h: Redrive(h.filter()),
    lambda h: Discard(h.filter()),
    lambda h: Prune(
        h.now() - 2, h.now() - h.chance.choice((0, 100)), h.chance.choice((0, h.position())), h.chance.choice((3, 999))
    ),
    lambda h: Prune(h.now() + 1, 0.0, 0, 999, h.chance.choice((None, h.position()))),
)


def _events(history: History) -> Events:
    chance = history.chance
    types = None if chance.random() < 0.4 else tuple(chance.sample(TYPES, chance.randint(0, 3)))
    key = chance.choice(("k", "l")) if types is None and chance.random() < 0.3 else None
    since = history.now() - 5 if chance.random() < 0.2 else None
    until_time = history.now() - 1 if chance.random() < 0.2 else None
    after = history.position()
    until = after + chance.randint(0, 9) if chance.random() < 0.3 else None
    return Events(after, chance.choice((1, 3, 99)), chance.choice((1, 60, 9_999)), until, types, key, since, until_time)


QUESTIONS: Sequence[Callable[[History], Query[Any]]] = (
    _events,
    lambda _: Events(0, 1_000, 1_000_000),
    lambda h: EventsAt(tuple(h.position() for _ in range(3))),
    lambda _: Types(),
    lambda _: Subscriptions(),
    lambda _: Stand(),
    lambda _: Suspicions(),
    lambda _: Lanes(),
    lambda h: Lanes(_name(h)),
    lambda _: WaitingRows(),
    lambda h: DeadLetters(h.filter(), h.chance.choice((0, 2)), h.chance.choice((None, 2))),
    lambda _: DeadLetters(DeadLetterFilter()),
    lambda _: CountDeadLetters(),
    lambda h: Find(h.id()),
    lambda h: PositionBefore(h.now() - h.chance.randint(0, 30)),
    lambda _: LogState(),
    lambda _: NextDue(),
    lambda h: Lag(
        h.position(),
        h.chance.choice((None, ("a",), ("a", "d"))),
        h.chance.choice(((0, 1024), (100, 600))),
        h.chance.choice((2, 99)),
    ),
    lambda h: LagOfRows(_name(h), h.chance.choice((None, ("a", "b")))),
)


# ------------------------------------------------------------------ what is compared


def _copy(batch: Batch) -> Batch:
    """Records learn their positions, so each store has its own."""
    groups = [[msgspec.structs.replace(record) for record in group] for group in batch.appends]
    units = [
        msgspec.structs.replace(unit, published=tuple(msgspec.structs.replace(record) for record in unit.published))
        for unit in batch.units
    ]
    return msgspec.structs.replace(batch, appends=groups, units=units)


def _line(record: Record) -> tuple[object, ...]:
    return (
        *(record.position, record.id, record.type, record.version, record.time, record.key, record.slot),
        *(record.headers, record.content_type, record.data, record.due_at, record.fault),
    )


def _said(batch: Batch, committed: Committed) -> tuple[object, ...]:
    places: list[object] = [
        (type(group), str(group)) if isinstance(group, Exception) else group for group in places_of(committed, *batch.appends)
    ]
    results = [
        # How far a step of retention has come is the store's own affair; what it removed is compared.
        None if isinstance(command, Prune) else type(result) if isinstance(result, Exception) else result
        for command, result in zip(batch.commands, committed.results, strict=True)
    ]
    return (
        *(committed.previous_head, committed.head, places, dict(committed.refused), results),
        *([_line(event) for event in committed.events], list(committed.conflicts)),
    )


def _plain(query: Query[Any], answer: Any) -> object:
    """An answer as something that can be compared: two records are not equal, only what they hold is."""
    if isinstance(query, Events):
        # How far it goes beyond its last event is its own affair, where times or bytes cut it.
        exact = query.since is None and query.until_time is None
        return [_line(record) for record in answer.records], answer.up_to if exact else 0, answer.head
    if isinstance(query, EventsAt):
        return [_line(record) for record in answer]
    if isinstance(query, Find):
        return None if answer is None else (*_line(answer), answer.idempotency_key)
    if isinstance(query, DeadLetters):
        return [(_line(row.record), msgspec.structs.replace(row, record=_NOBODY)) for row in answer]
    return answer


_NOBODY = Record("", "", 0, 0.0, None, 0, None, "", b"")


# ------------------------------------------------------------------ histories


def cases(seed: int) -> Iterator[Case]:
    """One history after another; each fourth on a file."""
    for number in itertools.count(1):
        name = f"{seed}-{number}"
        yield Case(f"{name} (python -m tests.simulation.store_steps {name})", STEPS, replay(name))


def replay(name: str) -> list[str]:
    """One history; what differed."""
    with contextlib.ExitStack() as stack:
        on_file = int(name.rpartition("-")[2]) % 4 == 0
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY))) if on_file else None
        history = stack.enter_context(History(random.Random(name), directory).opened())
        for step in range(STEPS):
            try:
                history.step()
                if step % 50 == 49:
                    history.check_all()
            except Exception as error:
                return [f"step {step}: {error!r}" if not isinstance(error, Differs) else f"step {step}: {error}"]
    return []


__all__ = ["History", "Stored", "cases", "replay"]

if __name__ == "__main__":
    found = replay(sys.argv[1])
    print("\n".join(found) or "nothing differs")
    sys.exit(bool(found))
