"""What a circuit takes back, whom it asks for the next try, and that it closes again, whatever happens to its lanes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import Breaker, Draft, EventBus, Reject, RetryPolicy, _circuit, event
from eventbus._circuit import Circuit, State
from eventbus._running import Running
from eventbus._serving import Serving
from eventbus.errors import PublishOutcomeUnknown
from eventbus.hooks import CircuitClosed, CircuitOpened
from eventbus.stores.base import Batch, Committed, Revive
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import HookRecorder, Recorder, until

ONCE = RetryPolicy(attempts=1)
QUICK = Breaker(failures=3, first=0.01, factor=1.0)


@attrs.frozen
class Task:
    n: int


class Works:
    """A bus with one handler, that does what `does` says for an event's number: raise it, wait for it, or be done."""

    def __init__(self, db: str | SQLiteStore, *types: type, **options: Any) -> None:
        self.does: dict[int, BaseException | anyio.Event] = {}
        self.begun: Recorder = Recorder()
        self.done: Recorder = Recorder()
        self.hook = HookRecorder((CircuitOpened, CircuitClosed))
        self.bus = EventBus(db, hooks=[self.hook], lease=options.pop("lease", 10.0))
        options.setdefault("breaker", QUICK)
        options.setdefault("retry", ONCE)
        self.bus.subscribe(*(types or (Task,)), name="s", **options)(self.handle)

    async def handle(self, task: Any) -> None:
        self.begun.add(task.n)
        what = self.does.get(task.n)
        if isinstance(what, BaseException):
            raise what
        if what is not None:
            await what.wait()
        self.done.add(task.n)

    def fails(self, *numbers: int) -> None:
        self.does |= {n: ConnectionError("out") for n in numbers}

    @property
    def circuit(self) -> Circuit:
        return running(self.bus).dispatcher.servings["s"].circuit  # type: ignore[return-value]

    async def opened(self) -> None:
        """Wait until the circuit has opened."""
        await self.hook.recorder.wait_for(1)

    async def dead(self) -> list[int]:
        return sorted(letter.envelope.event.n for letter in await self.bus.dead_letters.list())  # type: ignore[attr-defined]


def running(bus: EventBus) -> Running:
    assert bus._running is not None
    return bus._running


@pytest.mark.parametrize(("order", "stays"), [("type", [0, 1]), ("log", [0, 1]), ("key", [0, 1]), ("none", [1])])
async def test_what_was_rejected_stays_dead(any_db: str, order: str, stays: list[int]) -> None:
    """A `Reject` between the failures counts as none; it is not delivered again, and neither is what lies before it in its order."""
    works = Works(any_db, order=order)
    works.fails(0, 2, 3)
    works.does[1] = Reject("no")
    async with works.bus:
        for n in range(4):
            await works.bus.publish(Task(n), key="k")
            await works.begun.wait_for(n + 1)
        await works.opened()
        works.does.clear()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == stays
    assert sorted(works.done.seen) == [n for n in range(4) if n not in stays]


async def test_what_was_redriven_is_not_taken_back(any_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead letter that is redriven in the run is the redrive's: it is delivered by it, once more, and not by the lane as well."""
    monkeypatch.setattr(_circuit, "PATIENCE", 0.01)
    works = Works(any_db, order="none")
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish_many([Task(0), Task(1)])
        assert await works.bus.drain(10) == {}
        (first, _) = await works.bus.dead_letters.list()
        works.does[0] = gate = anyio.Event()
        await works.bus.dead_letters.redrive(first.id)
        await works.begun.wait_for(3)
        await works.bus.publish(Task(2))
        await works.opened()
        await until(lambda: works.circuit.state is not State.OPENING)
        works.does = {0: gate}
        await works.done.wait_for(2)
        gate.set()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert sorted(works.done.seen) == [0, 1, 2]


async def test_a_redrive_that_is_acked_as_its_lane_is_set_back(any_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ack that comes when the store has set the lane back, and before the lane knows, is left out: the redrive is made again."""
    monkeypatch.setattr(_circuit, "PATIENCE", 0.01)
    told: list[Callable[[], object]] = []
    was_set_back = Serving.was_set_back
    monkeypatch.setattr(Serving, "was_set_back", lambda *given: told.append(lambda: was_set_back(*given)))
    works = Works(any_db, order="none", breaker=attrs.evolve(QUICK, failures=2))
    works.does[0] = Reject("no")
    works.fails(1, 2)
    async with works.bus:
        await works.bus.publish(Task(0))
        assert await works.bus.drain(10) == {}
        works.does[0] = gate = anyio.Event()
        await works.bus.dead_letters.redrive(all=True)
        await works.begun.wait_for(2)
        await works.bus.publish_many([Task(1), Task(2)])
        await until(lambda: told)
        gate.set()
        await works.done.wait_for(1)
        await running(works.bus).journal.written()
        works.does = {}
        told[0]()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert sorted(works.done.seen) == [0, 0, 1, 2]


@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_what_was_discarded_is_not_taken_back(any_db: str, order: str) -> None:
    """A dead letter that was discarded in the run is not delivered again, and neither is what lies before it in its order."""
    works = Works(any_db, order=order)
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish_many([Draft(Task(n), key="k") for n in (0, 1)])
        assert await works.bus.drain(10) == {}
        (_, second) = await works.bus.dead_letters.list()
        await works.bus.dead_letters.discard(second.id)
        await works.bus.publish(Task(2), key="k")
        await works.opened()
        works.does.clear()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == ([] if order == "none" else [0])
    assert sorted(works.done.seen) == ([0, 2] if order == "none" else [2])


class Forgetful(SQLiteStore):
    """A store that writes what is taken back, and fails before it can say so, once."""

    failed = False

    def commit(self, batch: Batch) -> Committed:
        committed = super().commit(batch)
        if not self.failed and any(isinstance(command, Revive) and command.deliveries for command in batch.commands):
            self.failed = True
            raise PublishOutcomeUnknown([])
        return committed


@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_taken_back_and_not_told(any_db: str, order: str) -> None:
    """If nobody can tell whether the store has taken back what failed, each event is handled once all the same."""
    store = Forgetful(any_db)
    works = Works(store, order=order)
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish_many([Draft(Task(n), key="k") for n in range(3)])
        await works.opened()
        await until(lambda: store.failed)
        works.does.clear()
        await works.done.wait_for(3)
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert sorted(works.done.seen) == [0, 1, 2]


async def test_what_is_rewound_is_not_taken_back(any_db: str) -> None:
    """After a rewind the events come again by themselves; what failed before it says something of the world all the same."""
    works = Works(any_db)
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish_many([Task(0), Task(1)])
        assert await works.bus.drain(10) == {}
        works.does.clear()
        await works.bus.rewind("s", after=1)
        assert await works.bus.drain(10) == {}
        assert await works.dead() == [0]
    assert works.done.seen == [1]


async def test_a_lane_that_was_elsewhere_is_not_set_back(db: str) -> None:
    """What another instance has settled meanwhile is not delivered again when a circuit opens here."""
    here = Works(db, breaker=attrs.evolve(QUICK, failures=2))
    here.fails(0, 2)
    async with here.bus:
        await here.bus.publish(Task(0))
        assert await here.bus.drain(10) == {}
        membership = running(here.bus).membership
        (lane,) = running(here.bus).dispatcher.lanes()
        membership.lose(lane)  # as if it had been elsewhere
        await until(lambda: lane not in running(here.bus).dispatcher.lanes() and bool(running(here.bus).dispatcher.lanes()))
        await here.bus.publish(Task(2))
        await here.opened()
        here.does.clear()
        assert await here.bus.drain(10) == {}
        assert await here.dead() == [0]
    assert here.done.seen == [2]


async def test_whichever_lane_has_something_is_tried(db: str) -> None:
    """A lane that waits for a newer program does not keep the others from being tried."""

    @event("task.other", version=2)
    @attrs.frozen
    class Newer:
        n: int

    async with EventBus(db) as newer:
        await newer.publish(Newer(9))

    @event("task.other", version=1)
    @attrs.frozen
    class Older:
        n: int

    works = Works(db, Older, Task)
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.rewind("s", after=0)
        await until(lambda: any(lane.blocked for lane in running(works.bus).dispatcher.lanes()))
        await works.bus.publish_many([Task(n) for n in range(4)])
        await works.opened()
        works.does.clear()
        await works.done.wait_for(4)
    assert works.done.seen == [0, 1, 2, 3]


async def test_a_rewind_during_a_try(any_db: str) -> None:
    """A try whose lane is rewound says nothing; there is another one."""
    works = Works(any_db)
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish_many([Task(n) for n in range(3)])
        await works.opened()
        works.does = {0: (gate := anyio.Event())}
        await until(lambda: works.circuit.state is State.TRYING)
        await works.bus.rewind("s", after=0)
        gate.set()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert works.done.seen[-3:] == [0, 1, 2]


async def test_what_is_under_way_may_succeed(any_db: str) -> None:
    """A handler that is at work when the circuit opens is let finish; its success closes the circuit, and counts."""
    works = Works(any_db, order="none", concurrency=8)
    works.does[9] = gate = anyio.Event()
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish(Task(9))
        await works.begun.wait_for(1)
        await works.bus.publish_many([Task(n) for n in range(3)])
        await works.opened()
        assert works.circuit.state is State.OPENING
        gate.set()
        await works.hook.recorder.wait_for(2)
        works.does.clear()
        assert await works.bus.drain(10) == {}
    assert Counter(works.done.seen)[9] == 1


async def test_what_is_under_way_for_too_long(any_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it for ever: the rest is set back, and it is delivered again."""
    monkeypatch.setattr(_circuit, "PATIENCE", 0.01)
    works = Works(any_db, order="none", concurrency=8)
    works.does[9] = gate = anyio.Event()
    works.fails(0, 1, 2)
    async with works.bus:
        await works.bus.publish(Task(9))
        await works.begun.wait_for(1)
        await works.bus.publish_many([Task(n) for n in range(3)])
        await works.opened()
        works.does.clear()
        await works.done.wait_for(3)
        gate.set()
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert set(works.done.seen) == {0, 1, 2, 9}


async def test_leaving_while_it_opens(db: str) -> None:
    """What the run has left behind is taken back also where the bus is left while something is under way."""
    works = Works(db, order="none", concurrency=8)
    works.does[9] = anyio.Event()
    works.fails(0, 1, 2)
    async with works.bus.open(stop_timeout=0.01):
        await works.bus.publish(Task(9))
        await works.begun.wait_for(1)
        await works.bus.publish_many([Task(n) for n in range(3)])
        await works.opened()
    works.does.clear()
    async with works.bus:
        assert await works.bus.drain(10) == {}
        assert await works.dead() == []
    assert sorted(works.done.seen) == [0, 1, 2, 9]


async def test_leaving_while_a_thread_goes_on(db: str) -> None:
    """So, too, where that is a thread, which cannot be made to end."""
    gate, begun, hook = threading.Event(), Recorder(), HookRecorder((CircuitOpened,))
    bus, out, done = EventBus(db, hooks=[hook]), [True], Recorder()

    @bus.subscribe(Task, name="s", order="none", concurrency=8, breaker=QUICK, retry=ONCE)
    def handle(task: Task) -> None:
        begun.add(task.n)
        if task.n == 9 and out[0]:
            gate.wait(10)
        elif out[0]:
            raise ConnectionError
        done.add(task.n)

    async with bus.open(stop_timeout=0.01):
        await bus.publish(Task(9))
        await begun.wait_for(1)
        await bus.publish_many([Task(n) for n in range(3)])
        await hook.recorder.wait_for(1)
    out[0] = False
    async with bus:
        assert await bus.drain(10) == {}
        assert await bus.dead_letters.list() == []
    gate.set()
    assert sorted(done.seen)[:4] == [0, 1, 2, 9]


async def test_errors_that_end_a_delivery_say_something_of_the_event(any_db: str) -> None:
    """What `give_up_on` names is like `Reject`: it opens no circuit."""
    works = Works(any_db, retry=RetryPolicy(attempts=5, give_up_on=(ConnectionError,)))
    works.fails(*range(10))
    async with works.bus:
        await works.bus.publish_many([Task(n) for n in range(10)])
        assert await works.bus.drain(10) == {}
        assert await works.dead() == list(range(10))
    assert works.hook.recorder.seen == []


@pytest.mark.parametrize("on_exhausted", ["dead_letter", "park", "pause"])
async def test_a_try_too_many_is_the_last_one(any_db: str, on_exhausted: str) -> None:
    """What was tried `give_up` times while the circuit was open is exhausted, however many attempts its policy allows."""
    breaker = Breaker(failures=2, first=0.001, factor=1.0, give_up=4)
    retry = RetryPolicy(attempts=None, first=60)
    works = Works(any_db, order="key", concurrency=1, retry=retry, breaker=breaker, on_exhausted=on_exhausted)
    works.fails(0, 1)
    async with works.bus:
        await works.bus.publish_many([Draft(Task(0), key="a"), Draft(Task(1), key="b")])
        left = await works.bus.drain(10)
        if on_exhausted == "pause":
            assert left == {"s": 2}
            assert (await works.bus.subscriptions())[0].reason == "ConnectionError: out"
        else:
            assert left == {}
            assert {letter.attempts for letter in await works.bus.dead_letters.list()} == {4}
            assert await works.dead() == [0, 1]


@pytest.mark.parametrize("order", ["type", "key", "none"])
async def test_a_replay_that_fails_beside_live_events(tmp_path: Path, order: str) -> None:
    """What a replay leaves behind in an outage does not stand for the live failure of the same event: that is taken back."""
    async with EventBus(path := str(tmp_path / "a.db")) as bus:
        await bus.publish_many([Task(n) for n in range(1, 9)])
    one = {} if order == "type" else {"concurrency": 1}
    works = Works(path, order=order, start="beginning", breaker=Breaker(failures=6, first=0.01, factor=1.0), **one)
    works.does[1] = first = anyio.Event()
    works.fails(*range(2, 9))
    async with works.bus as bus:
        await works.begun.wait_for(1)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: bus.replay(to="s", after=1, until=4, exclusive=True))
            await until(lambda: running(bus).replays)
            first.set()
        await works.opened()
        works.does.clear()
        assert await bus.drain(timeout=10) == {}
        assert set(works.done.seen) >= set(range(1, 9))
        assert set(await works.dead()) <= {2, 3, 4}  # of the replay, at most


async def test_a_replay_goes_on_behind_what_always_fails(tmp_path: Path) -> None:
    """Events that always fail keep a circuit from closing for a replay as little as for live events."""
    works = Works(
        str(tmp_path / "a.db"), order="none", breaker=Breaker(first=0.01, cap=0.05), retry=RetryPolicy(attempts=3, first=0.01)
    )
    async with works.bus as bus:
        await bus.publish_many([Task(n) for n in range(100)])
        assert await bus.drain(timeout=10) == {}
        works.done.seen.clear()
        works.fails(*range(20))
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: bus.replay(to="s"))
            with anyio.fail_after(10):
                while not set(works.done.seen) >= set(range(20, 100)):
                    await anyio.sleep(0.005)
            group.cancel_scope.cancel()
