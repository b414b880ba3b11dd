"""The SQLite store against a model of dicts and lists, with batches that nobody thought of."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventbus.stores.base import (
    Batch,
    Cancel,
    Claim,
    Command,
    Committed,
    Events,
    Find,
    Lanes,
    LogState,
    Promote,
    Prune,
    Record,
    Refusal,
    Register,
    Registration,
    Stored,
    Unit,
)
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing._conformance_base import INSTANCE, NOW, places_of, record

TYPES = ("a", "b", "c")


@attrs.define
class Draw:
    """An event to be, before it has an id."""

    type: str
    data: bytes
    key: str | None
    idempotency_key: str | None
    due: int | None

    def record(self) -> Record:
        due_at = None if self.due is None else NOW + self.due
        return record(self.type, key=self.key, data=self.data, idempotency_key=self.idempotency_key, due_at=due_at)


@attrs.define
class Step:
    """A batch to be. `acks` are positions, with what the attempt publishes; None for a lane of a former owner."""

    groups: list[list[Draw]]
    acks: list[tuple[int, list[Draw], bool]]
    promote: int | None
    cancel: int | None
    claim: bool
    prune: bool
    reopen: bool


draws = st.builds(
    Draw,
    st.sampled_from(TYPES),
    st.sampled_from([b"{}", b'{"n":1}', b"\xff"]),
    st.sampled_from([None, "k", "l"]),
    st.sampled_from([None, None, None, "x", "y"]),
    st.sampled_from([None, None, None, 1, 2]),
)
groups = st.lists(draws, max_size=4)
acks = st.tuples(st.integers(1, 12), st.lists(draws, max_size=2), st.booleans())
rarely = st.sampled_from([False, False, False, True])
steps = st.builds(
    Step,
    st.lists(groups, max_size=3),
    st.lists(acks, max_size=3),
    st.none() | st.integers(0, 3),
    st.none() | st.integers(0, 5),
    rarely,
    rarely,
    rarely,
)


@attrs.define
class Model:
    """What the store should hold."""

    head: int = 0
    log: list[Record] = attrs.field(factory=list)
    scheduled: dict[str, Record] = attrs.field(factory=dict)
    keys: dict[str, tuple[Record, int | None]] = attrs.field(factory=dict)
    checkpoint: int = 0
    epoch: int = 1

    def enter(self, event: Record) -> int:
        self.head += 1
        self.log.append(msgspec.structs.replace(event, position=self.head, due_at=None))
        return self.head

    def admit(self, group: Sequence[Record]) -> list[Stored] | None:
        kept = attrs.evolve(self, log=list(self.log), scheduled=dict(self.scheduled), keys=dict(self.keys))
        stored = []
        for event in group:
            known = self.keys.get(event.idempotency_key or "")
            if known is not None:
                if _content(known[0]) != _content(event):
                    self.head, self.log, self.scheduled, self.keys = kept.head, kept.log, kept.scheduled, kept.keys
                    return None
                stored.append(Stored(known[0].id, known[1], duplicate=True))
                continue
            position = self.enter(event) if event.due_at is None else None
            if position is None:
                self.scheduled[event.id] = event
            if event.idempotency_key:
                self.keys[event.idempotency_key] = (event, position)
            stored.append(Stored(event.id, position))
        return stored

    def promote(self, now: float) -> None:
        due = sorted((e for e in self.scheduled.values() if (e.due_at or 0) <= now), key=lambda e: (e.due_at, e.id))
        for event in due:
            del self.scheduled[event.id]
            position = self.enter(msgspec.structs.replace(event, time=now))
            if event.idempotency_key:
                self.keys[event.idempotency_key] = (event, position)

    def cancel(self, id: str) -> None:
        event = self.scheduled.pop(id, None)
        if event is not None and event.idempotency_key:
            del self.keys[event.idempotency_key]

    def settle(self, unit: Unit) -> Refusal | None:
        if unit.epoch != self.epoch:
            return "fenced"
        if unit.position <= self.checkpoint:
            return "settled"
        self.admit(unit.published)
        self.checkpoint = unit.position
        return None

    def prune(self) -> None:
        self.log = [event for event in self.log if event.type == "a" and event.position > self.checkpoint]


def _content(event: Record) -> tuple[object, ...]:
    return event.type, event.version, event.key, event.content_type, event.data


def _line(event: Record) -> tuple[object, ...]:
    return event.position, event.id, event.type, event.time, event.key, event.data, event.fault


def run(store: SQLiteStore, model: Model, step: Step, known: list[str]) -> None:
    """Do a step to both and compare what they say."""
    commands: list[Command[object]] = []
    if step.cancel is not None and step.cancel < len(known):
        commands.append(Cancel(known[step.cancel]))
        model.cancel(known[step.cancel])
    if step.promote is not None:
        commands.append(Promote(NOW + step.promote, 100))
        model.promote(NOW + step.promote)
    if step.claim:
        commands.append(Claim(INSTANCE.id, (("s", "a", 0),)))
        model.epoch += 1
    before = model.epoch - 1
    appends = [[draw.record() for draw in group] for group in step.groups]
    known += [event.id for group in appends for event in group if event.due_at is not None]
    units = [
        Unit("s", "a", model.epoch if own else before, "log", at, at, published=tuple(draw.record() for draw in published))
        for at, published, own in step.acks
    ]
    previous = model.head if step.promote is None else None
    committed = store.commit(Batch(NOW, appends, units, commands))
    expected = [model.admit(group) for group in appends]
    refused = {i: why for i, unit in enumerate(units) if (why := model.settle(unit))}
    _compare(committed, places_of(committed, *appends), expected, refused, previous, model)


def _compare(
    committed: Committed,
    places: list[list[Stored] | Exception],
    expected: list[list[Stored] | None],
    refused: dict[int, Refusal],
    previous: int | None,
    model: Model,
) -> None:
    assert [None if isinstance(group, Exception) else group for group in places] == expected
    assert committed.refused == refused
    assert committed.head == model.head
    assert previous is None or committed.previous_head == previous
    entered = [_line(event) for event in model.log if event.position > committed.previous_head]
    assert [_line(event) for event in committed.events] == entered


def check(store: SQLiteStore, model: Model) -> None:
    """Read all there is."""
    page = store.read(Events(0, 1_000, 1_000_000))
    assert [_line(event) for event in page.records] == [_line(event) for event in model.log]
    assert page.head == page.up_to == store.read(LogState()).head == model.head
    found: list[Record] = []
    after = 0
    while after < model.head:  # in small pages, so that they are cut everywhere
        some = store.read(Events(after, 2, 9, types=("a", "c")))
        found += some.records
        after = some.up_to
    assert [_line(event) for event in found] == [_line(event) for event in model.log if event.type != "b"]
    (lane,) = store.read(Lanes())
    assert (lane.checkpoint, lane.epoch) == (model.checkpoint, model.epoch)
    for event in model.scheduled.values():
        there = store.read(Find(event.id))
        assert there is not None
        assert (there.due_at, there.position) == (event.due_at, 0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_as_the_model(in_memory: bool) -> None:
    """Whatever the batches, the store says and holds what a plain model does, also when it is opened again in between."""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(steps, min_size=1, max_size=8))
    def as_the_model(plan: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = SQLiteStore(":memory:" if in_memory else Path(directory) / "a.db", durability="fast")
            store.open(INSTANCE)
            try:
                _run_all(store, plan, in_memory)
            finally:
                store.close()

    as_the_model()


def _run_all(store: SQLiteStore, plan: list[Step], in_memory: bool) -> None:
    register = Register((Registration("s", ("a",), "type", 1, "beginning"),))
    store.commit(Batch(NOW, commands=[register, Claim(INSTANCE.id, (("s", "a", 0),))]))
    (lane,) = store.read(Lanes())
    model, known = Model(epoch=lane.epoch), list[str]()
    for step in plan:
        run(store, model, step, known)
        if step.prune:
            store.commit(Batch(NOW, commands=[Prune(NOW + 99, 0.0, 0, 1_000)]))
            model.prune()
        if step.reopen and not in_memory:
            store.close()
            store.open(INSTANCE)
        check(store, model)
