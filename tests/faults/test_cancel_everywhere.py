"""Cancellation at every await: of publish, drain, replay, opening, leaving, `handled`.

Whoever steps a coroutine by hand sees every point at which it waits. A run is stepped through once to count them; then it is made
again for each of them, and cancelled there: by a cancel scope around it (asyncio and trio), and by `Task.cancel` (asyncio).
After each: what was acknowledged is handled, nothing is left over, and the bus can be opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import BusNotOpen, EventBus, Reject
from eventbus._loop import Waiter
from eventbus._membership import Membership
from eventbus._running import Running
from eventbus.stores.base import Stand
from tests.bus.support import GatedStore, Recorder, threads_of_the_bus

MOST = 200
"""Awaits in one run, more than which would be a run without end."""


@attrs.frozen
class Placed:
    n: int


class Stepped:
    """A coroutine that is watched while it runs: it counts how often it waits, and cancels it the n-th time.

    Attributes:
        waits: how often it has.
        hit: it was cancelled while it waited.
    """

    def __init__(self, nth: int, cancel: Callable[[], object]) -> None:
        self.waits = 0
        self.hit = False
        self._nth = nth
        self._cancel = cancel

    @types.coroutine
    def run(self, coroutine: Coroutine[Any, Any, object]) -> Generator[Any, Any, object]:
        """Await it."""
        step: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            try:
                yielded = step(value)
            except StopIteration as stop:
                return stop.value
            self.waits += 1
            assert self.waits < MOST
            if self.waits == self._nth:
                self.hit = True
                self._cancel()
            try:
                step, value = coroutine.send, (yield yielded)
            except BaseException as error:
                step, value = coroutine.throw, error


async def cancel_by_scope(call: Callable[[], Coroutine[Any, Any, object]], nth: int) -> tuple[bool, bool]:
    """Make a call, and cancel the scope around it at its n-th await; whether there was one, and whether it then returned."""
    returned = False
    with anyio.CancelScope() as scope:
        stepped = Stepped(nth, scope.cancel)
        await stepped.run(call())
        returned = True
    return stepped.hit, returned


async def cancel_by_task(call: Callable[[], Coroutine[Any, Any, object]], nth: int) -> tuple[bool, bool]:
    """The same with `Task.cancel`."""
    stepped = Stepped(nth, lambda: task.cancel())

    async def run() -> None:
        await stepped.run(call())

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return stepped.hit, not task.cancelled()


Cancel = Callable[[Callable[[], Coroutine[Any, Any, object]], int], Awaitable[tuple[bool, bool]]]


@pytest.fixture(params=["scope", "task"])
def cancel(request: pytest.FixtureRequest, anyio_backend_name: str) -> Cancel:
    """How a call is cancelled."""
    if request.param == "task" and anyio_backend_name != "asyncio":
        pytest.skip("trio cancels scopes only")
    return cancel_by_scope if request.param == "scope" else cancel_by_task


class Shop:
    """A bus on a file, with one subscription for each order."""

    def __init__(self, db: str) -> None:
        self.db = db
        self.handled: dict[str, list[int]] = {}

    def bus(self) -> EventBus:
        """A new bus."""
        bus = EventBus(GatedStore(self.db))

        def subscribe(order: Any) -> None:
            async def note(placed: Placed) -> None:
                self.handled.setdefault(order, []).append(placed.n)

            bus.subscribe(Placed, name=order, order=order)(note)

        for order in ("type", "key", "log", "none"):
            subscribe(order)

        @bus.subscribe(Placed, name="plain")
        def plain(placed: Placed) -> None:
            self.handled.setdefault("plain", []).append(placed.n)

        return bus

    def assert_closed(self) -> None:
        """No thread of ours and no handle on the file is left."""
        assert threads_of_the_bus() == []
        assert not [each for each in Path("/proc/self/fd").iterdir() if os.path.realpath(each).startswith(self.db)]

    async def stored(self, bus: EventBus) -> list[int]:
        """What is in the log."""
        events = [envelope.event async for envelope in bus.history(Placed)]
        return [event.n for event in events if isinstance(event, Placed)]

    async def assert_whole(self, acknowledged: set[int]) -> None:
        """After another start: what was acknowledged is in the log once, and what is in the log was handled by everybody."""
        self.assert_closed()
        async with (bus := self.bus()):
            assert await bus.drain(timeout=5) == {}
            stored = await self.stored(bus)
        self.assert_closed()
        assert len(stored) == len(set(stored))
        assert acknowledged <= set(stored)
        for order, seen in self.handled.items():
            assert sorted(seen) == sorted(stored), order


# ------------------------------------------------------------------ publish


@pytest.mark.parametrize("many", [False, True])
async def test_publish(db: str, cancel: Cancel, many: bool) -> None:
    """Cancelled before its first wait nothing is stored; at any later one it is stored whole, and then the cancellation is raised."""
    shop = Shop(db)
    acknowledged: set[int] = set()
    async with (bus := shop.bus()):
        for nth in range(1, MOST):
            first = nth * 10

            async def publish(first: int = first) -> None:
                if many:
                    await bus.publish_many([Placed(first), Placed(first + 1)])
                else:
                    await bus.publish(Placed(first))

            hit, returned = await cancel(publish, nth)
            stored = [n for n in await shop.stored(bus) if n >= first]
            if returned or hit:
                assert stored == ([first, first + 1] if many else [first])
                acknowledged.update(stored)
            if not hit:
                break
        assert nth > 1
        assert returned
    await shop.assert_whole(acknowledged)


@pytest.mark.parametrize("many", [False, True])
async def test_publish_that_waits_for_room(db: str, cancel: Cancel, many: bool) -> None:
    """Cancelled while it waits for room it is not stored; cancelled after, it is; and the room is whole."""
    shop = Shop(db)
    store = GatedStore(db)
    outcomes: list[tuple[int, bool]] = []
    bus = EventBus(store, max_pending=2)
    async with bus:
        for nth in range(1, MOST):
            first = nth * 10
            arrived = len(store.arrived.seen)

            async def publish(first: int = first) -> None:
                await bus.publish_many([Placed(first + n) for n in range(1 + many)])

            async def let_go(arrived: int = arrived) -> None:
                await store.arrived.wait_for(arrived + 1)
                await anyio.wait_all_tasks_blocked()
                store.release()

            store.hold()
            async with anyio.create_task_group() as group:
                group.start_soon(bus.publish_many, [Placed(-first), Placed(-first - 1)])
                group.start_soon(let_go)
                await store.arrived.wait_for(arrived + 1)
                hit, returned = await cancel(publish, nth)
            stored = [n for n in await shop.stored(bus) if n >= first]
            assert len(stored) in (0, 1 + many)
            assert stored or not returned
            outcomes.append((nth, bool(stored)))
            with anyio.fail_after(5):
                await bus.publish_many([Placed(first + 5), Placed(first + 6)])  # all of the room
            if not hit:
                break
    assert [stored for _, stored in outcomes] == [False, *[True] * (len(outcomes) - 1)]
    assert len(outcomes) > 2


# ------------------------------------------------------------------ waiting


async def test_waiting(db: str, cancel: Cancel) -> None:
    """`drain`, `handled`, `replay` and `history` may be cancelled at any wait: the work goes on, and so does the bus."""
    shop = Shop(db)
    counts = {}
    async with (bus := shop.bus()):
        acknowledged: set[int] = set()
        receipt = await bus.publish(Placed(0))

        async def drain() -> None:
            await bus.publish_many([Placed(number), Placed(number + 1)])
            await bus.drain()

        async def handled() -> None:
            await (await bus.publish(Placed(number))).handled()

        async def history() -> None:
            assert len(await shop.stored(bus)) > 1

        async def statuses() -> None:
            await bus.stats()
            await bus.status(receipt.id)
            await bus.subscriptions()
            await bus.dead_letters.list()

        number = 0
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [drain, handled, history, statuses]
        for call in calls:
            for nth in range(1, MOST):
                number += 10
                hit, _ = await cancel(call, nth)
                if not hit:
                    break
            counts[call.__name__] = nth - 1
        assert await bus.drain(timeout=5) == {}
        acknowledged.update(await shop.stored(bus))
        running = bus._running
        assert running is not None
        assert running.environment.committed == []
        assert running.dispatcher.promotions == {}
    assert min(counts.values()) > 0
    await shop.assert_whole(acknowledged)


async def test_replay(db: str, cancel: Cancel) -> None:
    """A replay that is cancelled, wherever it is, stops; live events go on, retention is not held back, the next one is whole."""
    replayed: list[int] = []
    bus = EventBus(GatedStore(db))

    async def progress(_summary: object) -> None:
        await anyio.lowlevel.checkpoint()

    @bus.subscribe(Placed, name="replayed")
    async def note(placed: Placed) -> None:
        await anyio.lowlevel.checkpoint()
        replayed.append(placed.n)

    async with bus:
        await bus.publish_many([Placed(n) for n in range(5)])
        assert await bus.drain(timeout=5) == {}
        for nth in range(1, MOST):
            hit, _ = await cancel(lambda: bus.replay(progress=progress), nth)
            if not hit:
                break
            replayed.clear()
            assert (await bus.replay()).handled == 5
            assert sorted(set(replayed)) == list(range(5))
        assert nth > 2
        running = bus._running
        assert running is not None
        assert running.replays == set()
        assert running.dispatcher.pins == []


async def test_what_changes_a_subscription(db: str, cancel: Cancel) -> None:
    """`pause`, `resume`, `redrive` and `unsubscribe` are carried out to their end, wherever they are cancelled; `rewind`, too, once
    it has looked up where to."""
    bus, handled, failing = EventBus(GatedStore(db)), list[int](), [True]

    @bus.subscribe(Placed, name="till")
    async def till(placed: Placed) -> None:
        if failing[0] and placed.n < 0:
            raise Reject("as planned")
        handled.append(placed.n)

    outcomes: list[bool] = []
    async with bus:
        for nth in range(1, MOST):
            hits: list[bool] = []

            async def check(call: Callable[[], Coroutine[Any, Any, object]], nth: int = nth, hits: list[bool] = hits) -> None:
                hit, returned = await cancel(call, nth)
                assert returned or hit
                hits.append(hit)

            failing[0] = True
            first = (await bus.publish(Placed(-nth))).position or 0
            await bus.publish(Placed(nth))
            assert await bus.drain(timeout=5) == {}
            assert [letter.envelope.position for letter in await bus.dead_letters.list()] == [first]
            failing[0] = False
            handled.clear()
            await check(lambda: bus.pause("till"))
            assert (await bus.stats()).subscriptions["till"].state == "paused"
            await check(lambda first=first: bus.rewind("till", after=first))  # type: ignore[misc]
            await check(lambda: bus.dead_letters.redrive(all=True))
            assert handled == []
            await check(lambda: bus.resume("till"))
            assert (await bus.stats()).subscriptions["till"].state == "running"
            assert await bus.drain(timeout=5) == {}
            outcomes.append(sorted(handled) == [-nth, nth])
            assert outcomes[-1] or (handled == [-nth] and hits[1])
            if not any(hits):
                break
    assert outcomes == [False, *[True] * (len(outcomes) - 1)]
    assert len(outcomes) > 2
    for nth in range(1, MOST):
        async with (bus := Shop(db).bus()):
            hit, _ = await cancel(lambda bus=bus: bus.unsubscribe("plain"), nth)  # type: ignore[misc]
            assert "plain" not in {each.name for each in await bus.subscriptions()}
        if not hit:
            break
    assert nth > 1


# ------------------------------------------------------------------ opening and leaving


async def test_from_opening_to_leaving(db: str, cancel: Cancel) -> None:
    """Wherever a program is cancelled between opening and having left, it leaves in order: nothing is open or lost, and it can open again."""
    shop = Shop(db)
    acknowledged: set[int] = set()
    for nth in range(1, MOST):
        bus = shop.bus()

        async def live(bus: EventBus = bus, first: int = nth * 10) -> None:
            async with bus:
                await bus.publish_many([Placed(first), Placed(first + 1)])
                acknowledged.update((first, first + 1))
                await bus.publish(Placed(first + 2))
                acknowledged.add(first + 2)

        hit, _ = await cancel(live, nth)
        shop.assert_closed()
        async with bus:
            await bus.publish(Placed(nth * 10 + 3))
            acknowledged.add(nth * 10 + 3)
        shop.assert_closed()
        if not hit:
            break
    assert nth > 8
    await shop.assert_whole(acknowledged)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_task_that_leaves(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio: when a program cancels every task there is, also the bus's own that leaves, wherever it is, it leaves in order."""
    shop, stop = Shop(db), Running._stop
    acknowledged: set[int] = set()
    for nth in range(1, MOST):
        stepped = Stepped(nth, lambda: current_task().cancel())

        async def stop_and_be_cancelled(running: Running, timeout: float, stepped: Stepped = stepped) -> None:
            await stepped.run(stop(running, timeout))

        monkeypatch.setattr(Running, "_stop", stop_and_be_cancelled)
        try:
            async with shop.bus() as bus:
                await bus.publish_many([Placed(nth * 10), Placed(nth * 10 + 1)])
                acknowledged.update((nth * 10, nth * 10 + 1))
        except asyncio.CancelledError:
            assert stepped.hit
        shop.assert_closed()
        if not stepped.hit:
            break
    assert nth > 3
    monkeypatch.undo()
    await shop.assert_whole(acknowledged)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_task_that_leaves_beside_another(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio: wherever it is cancelled it signs off, so that the others do not take this instance for dead."""
    shop, stop, other = Shop(db), Running._stop, EventBus(db)
    async with other:
        for nth in range(1, MOST):
            stepped = Stepped(nth, lambda: current_task().cancel())

            async def stop_and_be_cancelled(running: Running, timeout: float, stepped: Stepped = stepped) -> None:
                await stepped.run(stop(running, timeout))

            with monkeypatch.context() as patch:
                patch.setattr(Running, "_stop", stop_and_be_cancelled)
                with contextlib.suppress(asyncio.CancelledError):
                    async with shop.bus() as bus:
                        await bus.publish(Placed(nth))
            standing = await other._open().reader.ask(Stand())
            assert [member.instance.id for member in standing.members] == [other._open().instance.id], nth
            if not stepped.hit:
                break
        assert nth > 3


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tasks_that_have_not_begun(db: str) -> None:
    """asyncio: a task of the bus that is cancelled before its first step begins all the same, whichever it is."""
    shop, loop, unborn = Shop(db), asyncio.get_running_loop(), Recorder()

    def create(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        if asyncio.current_task() is not None:  # else it is begun anew
            task.cancel()
            unborn.add(task)
        return task

    async def live() -> None:
        async with (bus := shop.bus()):
            await bus.publish_many([Placed(1), Placed(2)])
            assert await bus.drain() == {}
            await bus.pause("log")
            await bus.rewind("log", after=0)
            await bus.resume("log")
            await bus.unsubscribe("plain")
            await bus.publish(Placed(3))

    program = asyncio.create_task(live())
    loop.set_task_factory(create)
    try:
        await asyncio.wait([program], timeout=10)
    finally:
        loop.set_task_factory(None)
    program.result()
    assert len(unborn.seen) > 10
    shop.assert_closed()
    assert shop.handled.pop("log")[-3:] == [1, 2, 3]
    assert shop.handled.pop("plain") == [1, 2]
    assert all(sorted(seen) == [1, 2, 3] for seen in shop.handled.values())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 2, 5])
async def test_the_task_that_leaves_and_again(db: str, times: int) -> None:
    """asyncio: cancelled as often as anybody likes, the task that leaves cancels the handlers at the stop timeout, and goes on."""
    bus, began, cancelled = EventBus(db), anyio.Event(), anyio.Event()

    @bus.subscribe(Placed, name="till")
    async def till(_placed: Placed) -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    def cancel(left: int) -> None:
        for task in asyncio.all_tasks():
            if "_to_the_end" in task.get_name():
                task.cancel()
        if left > 1:
            asyncio.get_running_loop().call_soon(cancel, left - 1)

    async def run() -> None:
        async with bus.open(stop_timeout=0.05):
            await bus.publish(Placed(1))
            await began.wait()
            asyncio.get_running_loop().call_later(0.01, cancel, times)

    program = asyncio.create_task(run())
    await asyncio.wait([program], timeout=10)
    assert program.done()
    assert cancelled.is_set()
    assert threads_of_the_bus() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_waits_while_the_task_that_leaves_is_cancelled(db: str) -> None:
    """asyncio: whoever waits for work outside of the bus's body is told that the bus is closed, also when that task is cancelled."""
    bus, began = EventBus(db), anyio.Event()

    @bus.subscribe(Placed, name="till")
    async def till(_placed: Placed) -> None:
        began.set()
        await anyio.sleep_forever()

    def cancel() -> None:
        for task in asyncio.all_tasks():
            if "_to_the_end" in task.get_name():
                task.cancel()

    async with bus.open(stop_timeout=0):
        await bus.publish(Placed(1))
        await began.wait()
        drain = asyncio.create_task(bus.drain())
        assert bus._running is not None
        circuit = bus._running.dispatcher.servings["till"].circuit
        assert circuit is not None
        circuit.at_rest = Cancelling(bus._running.loop.waiter(), cancel)  # as while what it sets back is not written
    done, _ = await asyncio.wait([drain], timeout=10)
    assert done
    with pytest.raises(BusNotOpen):
        drain.result()


class Cancelling:
    """A waiter that does something when it is waited for."""

    def __init__(self, waiter: Waiter, action: Callable[[], object]) -> None:
        self._waiter = waiter
        self._action = action
        self.done = False

    def set(self) -> None:
        self._waiter.set()

    async def wait(self) -> None:
        asyncio.get_running_loop().call_soon(self._action)
        await self._waiter.wait()

    wait_decided = wait


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_step_among_other_instances(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio: a step that is cancelled, wherever it is, is taken again, to its end: the lease goes on being renewed."""
    step, cuts, taken = Membership.step, [0], Recorder()

    async def step_and_be_cancelled(membership: Membership) -> None:
        stepped = Stepped(cuts.pop() if cuts else 0, lambda: current_task().cancel())
        await stepped.run(step(membership))
        taken.add(stepped.waits)

    async with EventBus(db, lease=1_000) as bus:
        assert bus._running is not None
        monkeypatch.setattr(Membership, "step", step_and_be_cancelled)
        bus._running.membership.poke()
        (waits,) = await taken.wait_for(1)
        assert waits > 2
        for nth in range(1, waits + 1):
            cuts.append(nth)
            bus._running.membership.poke()
            await taken.wait_for(1 + nth)
            assert len(taken.seen) == 1 + nth


def current_task() -> asyncio.Task[Any]:
    """The running task."""
    task = asyncio.current_task()
    assert task is not None
    return task
