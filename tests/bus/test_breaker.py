"""The breaker: when everything fails, a subscription is held back, and nothing is given up for it."""

from __future__ import annotations

from typing import Any

import anyio
import attrs
import pytest

from eventbus import Breaker, ConfigurationError, Draft, EventBus, InvalidSubscription, Reject, RetryAfter, RetryPolicy
from eventbus.hooks import CircuitClosed, CircuitOpened
from eventbus.stores.base import Order, Revive
from tests.bus.shops import Refusing
from tests.bus.support import HookRecorder, Recorder

ORDERS: list[Order] = ["type", "log", "key", "none"]
QUICK = Breaker(failures=3, first=0.01, factor=1.5, cap=0.05)
ONCE = RetryPolicy(attempts=1)


@attrs.frozen
class Task:
    n: int


class World:
    """A service that handlers need; while it is out, they all fail."""

    def __init__(self) -> None:
        self.out = True
        self.poison: set[int] = set()
        self.tried: list[int] = []
        self.done: Recorder = Recorder()

    def call(self, n: int) -> None:
        self.tried.append(n)
        if self.out or n in self.poison:
            raise ConnectionError("out")
        self.done.add(n)


def bus_in(
    world: World, db: str, order: Order, *, plain: bool, retry: RetryPolicy, **options: Any
) -> tuple[EventBus, HookRecorder]:
    hook = HookRecorder((CircuitOpened, CircuitClosed))
    bus = EventBus(db, hooks=[hook])

    def handle(task: Task) -> None:
        world.call(task.n)

    async def handle_async(task: Task) -> None:
        world.call(task.n)

    options.setdefault("breaker", QUICK)
    bus.subscribe(Task, name="s", order=order, retry=retry, **options)(handle if plain else handle_async)
    return bus, hook


@pytest.mark.parametrize("retry", [ONCE, RetryPolicy(attempts=3, first=0.001)], ids=["once", "thrice"])
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("order", ORDERS)
async def test_an_outage_costs_nothing(any_db: str, order: Order, plain: bool, retry: RetryPolicy) -> None:
    """While a service is out, 200 events are published; when it is back, all of them are handled, in order, and none is dead."""
    world = World()
    bus, hook = bus_in(world, any_db, order, plain=plain, retry=retry)
    async with bus:
        await bus.publish_many([Draft(Task(n), key=n % 7) for n in range(200)])
        await hook.recorder.wait_for(1)
        (info,) = await bus.subscriptions()
        assert (info.state, "ConnectionError: out" in (info.reason or "")) == ("circuit open", True)
        world.out = False
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
        assert (await bus.subscriptions())[0].state == "running"
        assert {type(moment) for moment in hook.recorder.seen} == {CircuitOpened, CircuitClosed}
    assert sorted(world.done.seen) == list(range(200))
    if order in ("type", "log"):
        assert world.done.seen == list(range(200))
    if order == "key":
        for key in range(7):
            assert [n for n in world.done.seen if n % 7 == key] == list(range(key, 200, 7))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("order", ORDERS)
async def test_a_replay_waits_for_the_end_of_an_outage(any_db: str, order: Order, exclusive: bool) -> None:
    """While everything that is replayed fails, nothing of it is given up, and nothing that was settled is unsettled by it."""
    world, summaries = World(), Recorder()
    retry = RetryPolicy(attempts=2, first=0.2, factor=1.0, jitter=0.0)
    bus, hook = bus_in(world, any_db, order, plain=False, retry=retry)

    async def replay() -> None:
        summaries.add(await bus.replay(exclusive=exclusive))

    async with bus:
        world.out = False
        await bus.publish_many([Draft(Task(n), key=str(n % 3)) for n in range(30)])
        assert await bus.drain(10) == {}
        world.out = True
        async with anyio.create_task_group() as group:
            group.start_soon(replay)
            assert isinstance((await hook.recorder.wait_for(1))[0], CircuitOpened)
            world.out = False
        (summary,) = summaries.seen
        assert (summary.handled, summary.dead) == (30, 0)
        assert await bus.drain(10) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(world.done.seen) == sorted([*range(30), *range(30)])


@pytest.mark.parametrize("order", ORDERS)
async def test_attempts_of_an_outage_do_not_count(any_db: str, order: Order) -> None:
    """Whoever failed in the run that opened the circuit begins at the attempt that it had before; and so while it is open."""
    world = World()
    bus, hook = bus_in(world, any_db, order, plain=False, retry=RetryPolicy(attempts=2, first=0.001))
    async with bus:
        await bus.publish_many([Draft(Task(n), key=n) for n in range(6)])
        await hook.recorder.wait_for(1)
        world.out = False
        world.poison = {0}
        assert await bus.drain(timeout=20) == {}
        letters = await bus.dead_letters.list()
        assert [(letter.envelope.position, letter.attempts) for letter in letters] in ([(1, 35)], [(1, 2)])
    assert sorted(world.done.seen) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ORDERS)
async def test_one_bad_event_is_dead_lettered_as_ever(any_db: str, order: Order) -> None:
    """Fewer different events than the breaker asks for do not open it, however often they fail."""
    world = World()
    world.out, world.poison = False, {1, 2}
    bus, hook = bus_in(world, any_db, order, plain=False, retry=RetryPolicy(attempts=4, first=0.001))
    async with bus:
        await bus.publish_many([Draft(Task(n), key=n) for n in range(4)])
        assert await bus.drain(timeout=20) == {}
        assert sorted(letter.envelope.position for letter in await bus.dead_letters.list()) == [2, 3]
    assert hook.recorder.seen == []
    assert sorted(world.done.seen) == [0, 3]


@pytest.mark.parametrize("order", ORDERS)
async def test_a_bad_event_does_not_hold_up_for_ever(any_db: str, order: Order) -> None:
    """Events that are bad themselves, more of them than the breaker asks for, are given up in the end, and the rest is handled."""
    world = World()
    world.out, world.poison = False, {0, 1, 2, 3, 4}
    breaker = Breaker(failures=3, first=0.001, factor=1.0, cap=0.001, give_up=3)
    bus, hook = bus_in(world, any_db, order, plain=False, retry=ONCE, breaker=breaker)
    async with bus:
        await bus.publish_many([Draft(Task(n), key=n) for n in range(10)])
        assert await bus.drain(timeout=20) == {}
        dead = {letter.envelope.position - 1 for letter in await bus.dead_letters.list()}
    assert dead == world.poison
    assert sorted(world.done.seen) == [5, 6, 7, 8, 9]
    assert order == "key" or CircuitOpened in {type(moment) for moment in hook.recorder.seen}  # others succeed in between there


@pytest.mark.parametrize("error", [Reject("no"), RetryAfter(0.001)])
async def test_what_says_something_of_the_event_does_not_count(any_db: str, error: Exception) -> None:
    """`Reject` and `RetryAfter` open no circuit."""
    hook = HookRecorder((CircuitOpened,))
    bus = EventBus(any_db, hooks=[hook])

    @bus.subscribe(Task, name="s", breaker=QUICK, retry=RetryPolicy(attempts=2))
    async def handle(_task: Task) -> None:
        raise error

    async with bus:
        await bus.publish_many([Task(n) for n in range(10)])
        assert await bus.drain(timeout=20) == {}
        assert len(await bus.dead_letters.list()) == 10
    assert hook.recorder.seen == []


async def test_without_a_breaker(any_db: str) -> None:
    """With `breaker=None` every event is given up after its attempts."""
    world = World()
    bus, hook = bus_in(world, any_db, "type", plain=False, retry=ONCE, breaker=None)
    async with bus:
        await bus.publish_many([Task(n) for n in range(30)])
        assert await bus.drain(timeout=20) == {}
        assert len(await bus.dead_letters.list()) == 30
    assert hook.recorder.seen == []


async def test_a_circuit_is_closed_after_a_restart(db: str) -> None:
    """A bus begins with closed circuits, and what was taken back is in the store."""
    world = World()
    slow = Breaker(failures=3, first=3600)
    bus, hook = bus_in(world, db, "type", plain=False, retry=ONCE, breaker=slow)
    async with bus:
        await bus.publish_many([Task(n) for n in range(5)])
        await hook.recorder.wait_for(1)
    world.out = False
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert world.done.seen == [0, 1, 2, 3, 4]


async def test_leaving_while_nothing_can_be_taken_back(db: str) -> None:
    """Leaving does not wait for ever for what the store cannot take back; the next start delivers it again."""
    world, store = World(), Refusing(db)
    bus, hook = bus_in(world, db, "type", plain=False, retry=ONCE)
    store.refused = Revive
    async with bus.open(store, stop_timeout=0):
        await bus.publish_many([Task(n) for n in range(3)])
        await hook.recorder.wait_for(1)
    world.out = False
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert world.done.seen == [0, 1, 2]


async def test_resume_closes_a_circuit(db: str) -> None:
    """An operator who knows better need not wait for the next try."""
    world = World()
    bus, hook = bus_in(world, db, "type", plain=False, retry=ONCE, breaker=Breaker(failures=3, first=3600))
    async with bus:
        await bus.publish_many([Task(n) for n in range(5)])
        await hook.recorder.wait_for(1)
        world.out = False
        await bus.resume("s")
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(world.done.seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "options", [{"failures": 1}, {"failures": True}, {"first": 0}, {"factor": 0.5}, {"cap": float("inf")}, {"give_up": 0}]
)
def test_a_breaker_that_cannot_work(options: dict[str, Any]) -> None:
    """Values that cannot work are refused, by name."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Breaker(**options)


def test_what_is_no_breaker() -> None:
    """`breaker=` takes a Breaker or None."""
    with pytest.raises(InvalidSubscription, match="breaker=3"):
        EventBus(None).subscribe(Task, name="s", breaker=3)(lambda task: None)  # type: ignore[arg-type]
