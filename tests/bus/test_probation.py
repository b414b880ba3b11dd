"""Lanes on probation, together with what else may hold them up. That it finds the killer is shown in `tests/crash`."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from eventbus import Breaker, EventBus, RetryPolicy, _probation
from eventbus._outcomes import Attempt
from eventbus.hooks import CircuitOpened
from eventbus.stores.base import Batch, Committed, Instance, Marking, Order, Rewind, Suspicion, Suspicions
from eventbus.stores.queries import Suspect
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import HookRecorder, Recorder


@attrs.frozen
class Task:
    n: int


class Suspicious(SQLiteStore):
    """A store whose lanes are all suspected, as after the death of their owner."""

    def __init__(self, db: str, lane: str, *suspects: Suspect) -> None:
        super().__init__(db, durability="fast")
        self._suspicion = Suspicion("s", lane, 1, suspects)
        self.markings = 0
        self.ahead = 0.0

    def monotonic(self) -> float:
        """The machine's clock, which may have gone on while the process did not."""
        return super().monotonic() + self.ahead

    def read(self, query: Any) -> Any:
        """What is suspected is made up, the rest is read."""
        return (self._suspicion,) if isinstance(query, Suspicions) else super().read(query)

    def commit(self, batch: Batch) -> Committed:
        """Commit, and count marks."""
        self.markings += sum(isinstance(command, Marking) for command in batch.commands)
        return super().commit(batch)


async def test_who_is_convicted_last_ends_the_probation(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event after it is delivered all the same."""
    monkeypatch.setattr(_probation, "AHEAD", 1)
    done = Recorder()
    bus = EventBus(Suspicious(db, "Task", Suspect(1, _probation.CHARGES)))

    @bus.subscribe(Task, name="s")
    async def handle(task: Task) -> None:
        done.add(task.n)

    async with bus.open(dispatch=False):
        await bus.publish_many([Task(n) for n in range(5)])
    async with bus:
        assert await bus.drain(10) == {}
        assert len(await bus.dead_letters.list()) == 1
    assert done.seen == [1, 2, 3, 4]


@pytest.mark.parametrize("order", ["log", "none"])
async def test_an_open_circuit(db: str, order: Order) -> None:
    """The try of a lane on probation is marked once, runs, and closes the circuit when it succeeds."""
    out, done, hook = [True], Recorder(), HookRecorder((CircuitOpened,))
    once, breaker = RetryPolicy(attempts=1), Breaker(failures=2, first=0.01, factor=1)
    store = Suspicious(db, "")
    bus = EventBus(store, hooks=[hook])

    @bus.subscribe(Task, name="s", order=order, retry=once, breaker=breaker)
    async def handle(task: Task) -> None:
        if out[0]:
            raise ConnectionError
        done.add(task.n)

    async with bus:
        await bus.publish_many([Task(n) for n in range(5)])
        await hook.recorder.wait_for(1)
        out[0] = False
        assert await bus.drain(10) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(done.seen) == list(range(5))
    assert store.markings < 50


async def test_a_lease_that_lapses_before_what_is_marked_begins(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane goes on as soon as the lease is renewed."""
    store, done = Suspicious(db, ""), Recorder()
    tell = _probation.Probation._marked

    def tell_and_lapse(probation: _probation.Probation, attempt: Attempt, *, marked: bool) -> None:
        tell(probation, attempt, marked=marked)
        store.ahead = 20.0

    monkeypatch.setattr(_probation.Probation, "_marked", tell_and_lapse)
    bus = EventBus(store, lease=10.0)
    bus.subscribe(Task, name="s", order="log")(done.note)
    async with bus.open(dispatch=False):
        await bus.publish_many([Task(n) for n in range(3)])
    async with bus:
        assert len(await done.wait_for(3)) == 3
    assert store.ahead


class Fenced(Suspicious):
    """A store whose lanes are set back by another instance right before something is marked for the first time."""

    def commit(self, batch: Batch) -> Committed:
        """Set back, once, and commit."""
        if not self.markings and any(isinstance(command, Marking) for command in batch.commands):
            other = SQLiteStore(self._address)
            other.open(Instance("other", "other", "here", 1, 0.0))
            other.commit(Batch(now=0.0, appends=[], units=[], commands=[Rewind("s", 0)]))
            other.close()
        return super().commit(batch)


async def test_what_cannot_be_marked_does_not_begin(db: str) -> None:
    """A lane that another has meanwhile, or that was set back elsewhere, begins nothing: each event is handled once."""
    done = Recorder()
    bus = EventBus(Fenced(db, ""))
    bus.subscribe(Task, name="s", order="log")(done.note)
    async with bus.open(dispatch=False):
        await bus.publish_many([Task(n) for n in range(3)])
    async with bus:
        assert await bus.drain(10) == {}
    assert done.seen == [Task(n) for n in range(3)]
