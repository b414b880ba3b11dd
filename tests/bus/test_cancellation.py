"""A publish that is cancelled: either it is not stored, or its end is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import attrs
import pytest

from eventbus import EventBus
from tests.bus.support import GatedStore, Recorder

only_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@attrs.frozen
class Placed:
    order: str


async def orders(bus: EventBus) -> list[str]:
    return [str(envelope.event.order) async for envelope in bus.history() if isinstance(envelope.event, Placed)]


class Publisher:
    """A task that publishes, and how that ended."""

    def __init__(self, bus: EventBus) -> None:
        self.bus = bus
        self.ended = Recorder()
        self.scope = anyio.CancelScope()

    async def publish(self, *orders: str) -> None:
        try:
            with self.scope:
                await self.bus.publish_many([Placed(order) for order in orders])
                self.ended.add("published")
            if self.scope.cancelled_caught:
                self.ended.add("cancelled")
        except asyncio.CancelledError:
            self.ended.add("task cancelled")
            raise


async def test_before_it_is_queued() -> None:
    """A publish in a scope that is cancelled already stores nothing."""
    async with EventBus(":memory:") as bus:
        for publish in (lambda: bus.publish(Placed("a")), lambda: bus.publish_many([Placed("b"), Placed("c")])):
            call: Callable[[], Awaitable[object]] = publish
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        await bus.publish(Placed("d"))
        assert await orders(bus) == ["d"]


async def test_after_it_is_queued(db: str) -> None:
    """A publish that is cancelled while it is being written is decided first: it is stored, then the cancellation is raised."""
    store = GatedStore(db)
    bus = EventBus(store)
    async with bus, anyio.create_task_group() as group:
        writing, queued = Publisher(bus), Publisher(bus)
        store.hold()
        group.start_soon(writing.publish, "a")
        await store.arrived.wait_for(1)
        group.start_soon(queued.publish, "b", "c")
        await anyio.wait_all_tasks_blocked()
        writing.scope.cancel()
        queued.scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert writing.ended.seen == queued.ended.seen == []
        store.release()
        assert await writing.ended.wait_for(1) == ["cancelled"]
        assert await queued.ended.wait_for(1) == ["cancelled"]
        assert await orders(bus) == ["a", "b", "c"]


async def test_cancelled_is_delivered() -> None:
    """An event whose publisher was cancelled after it was queued is delivered like any other."""
    store, recorder = GatedStore(), Recorder()
    bus = EventBus(store)
    bus.subscribe(Placed)(recorder.note)
    async with bus, anyio.create_task_group() as group:
        publisher = Publisher(bus)
        store.hold()
        group.start_soon(publisher.publish, "a")
        await store.arrived.wait_for(1)
        publisher.scope.cancel()
        store.release()
        assert await recorder.wait_for(1) == [Placed("a")]


async def test_waiting_for_room(db: str) -> None:
    """A publish that waits for room (max_pending) ends at once when it is cancelled, stores nothing, and gives way to others."""
    store = GatedStore(db)
    bus = EventBus(store, max_pending=2)
    async with bus, anyio.create_task_group() as group:
        first, large, small = Publisher(bus), Publisher(bus), Publisher(bus)
        store.hold()
        group.start_soon(first.publish, "a")
        await store.arrived.wait_for(1)
        group.start_soon(large.publish, "b", "c")  # has no room, and keeps its place
        await anyio.wait_all_tasks_blocked()
        group.start_soon(small.publish, "d")  # would fit, and does not overtake
        await anyio.wait_all_tasks_blocked()
        large.scope.cancel()
        assert await large.ended.wait_for(1) == ["cancelled"]
        store.release()
        assert await small.ended.wait_for(1) == ["published"]
        assert await orders(bus) == ["a", "d"]


async def test_no_room_is_lost() -> None:
    """However many publishers are cancelled while they wait, the room stays whole."""
    store = GatedStore()
    bus = EventBus(store, max_pending=3)
    async with bus:
        for _ in range(10):
            store.hold()
            arrived = len(store.arrived.seen)
            async with anyio.create_task_group() as group:
                for n in range(3):
                    group.start_soon(bus.publish, Placed(f"{n}"))
                await store.arrived.wait_for(arrived + 1)
                waiting = [Publisher(bus) for _ in range(5)]
                for publisher in waiting:
                    group.start_soon(publisher.publish, "x", "y")
                await anyio.wait_all_tasks_blocked()
                store.release()
                for publisher in waiting:
                    publisher.scope.cancel()
        with anyio.fail_after(20):
            await bus.publish_many([Placed("last")] * 3)
            await bus.publish_many([Placed("last")] * 7)
        assert (await bus.stats()).pending == 0


async def test_bus_outlives_it() -> None:
    """After cancellations at any moment, what publish returned is stored, and the bus goes on."""
    async with EventBus(":memory:") as bus:
        returned: list[str] = []

        async def publish(order: str, scope: anyio.CancelScope) -> None:
            with scope:
                await bus.publish(Placed(order))
                returned.append(order)

        async with anyio.create_task_group() as group:
            for n in range(200):
                scope = anyio.CancelScope()
                group.start_soon(publish, str(n), scope)
                for _ in range(n % 5):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
        found = await orders(bus)
        assert len(found) == len(set(found))
        assert set(returned) <= set(found)
        await bus.publish(Placed("last"))


async def test_timeouts() -> None:
    """anyio's timeouts work on publish: over in time when there is no room, decided when it is written already."""
    store = GatedStore()
    bus = EventBus(store, max_pending=1)
    async with bus, anyio.create_task_group() as group:
        first = Publisher(bus)
        store.hold()
        group.start_soon(first.publish, "a")
        await store.arrived.wait_for(1)
        with pytest.raises(TimeoutError), anyio.fail_after(0.02):
            await bus.publish(Placed("b"))
        store.release()
        await first.ended.wait_for(1)
        assert await orders(bus) == ["a"]


# ------------------------------------------------------------------ Task.cancel


@only_asyncio
async def test_native_before_it_is_queued() -> None:
    """asyncio: a task that is cancelled before it runs stores nothing."""
    async with EventBus(":memory:") as bus:
        task = asyncio.create_task(bus.publish(Placed("a")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await orders(bus) == []


@only_asyncio
async def test_native_after_it_is_queued(db: str) -> None:
    """asyncio: Task.cancel, also again and again, waits until the publish is decided, and is then raised."""
    store = GatedStore(db)
    bus = EventBus(store)
    async with bus:
        writing, queued = Publisher(bus), Publisher(bus)
        store.hold()
        tasks = [asyncio.create_task(writing.publish("a"))]
        await store.arrived.wait_for(1)
        tasks.append(asyncio.create_task(queued.publish("b")))
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            for task in tasks:
                task.cancel()
            await anyio.wait_all_tasks_blocked()
            assert not any(task.done() for task in tasks)
        store.release()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert await orders(bus) == ["a", "b"]


@only_asyncio
async def test_native_waiting_for_room(db: str) -> None:
    """asyncio: Task.cancel while publish waits for room: at once, and nothing is stored."""
    store = GatedStore(db)
    bus = EventBus(store, max_pending=1)
    async with bus:
        first, second, third = Publisher(bus), Publisher(bus), Publisher(bus)
        store.hold()
        tasks = [asyncio.create_task(first.publish("a"))]
        await store.arrived.wait_for(1)
        tasks += [asyncio.create_task(second.publish("b")), asyncio.create_task(third.publish("c"))]
        await anyio.wait_all_tasks_blocked()
        tasks[1].cancel()
        assert await second.ended.wait_for(1) == ["task cancelled"]
        store.release()
        await third.ended.wait_for(1)
        assert await orders(bus) == ["a", "c"]


@only_asyncio
async def test_native_as_room_is_given(db: str) -> None:
    """asyncio: a publish that is cancelled just when it was given room, before it could run, stores nothing and gives it back."""
    store = GatedStore(db)
    bus = EventBus(store, max_pending=1)
    async with bus:
        second = Publisher(bus)
        tasks: list[asyncio.Task[None]] = []

        async def first() -> None:
            await bus.publish(Placed("a"))
            tasks[1].cancel()  # its turn has come in the same step of the loop

        store.hold()
        tasks.append(asyncio.create_task(first()))
        await store.arrived.wait_for(1)
        tasks.append(asyncio.create_task(second.publish("b")))
        await anyio.wait_all_tasks_blocked()
        store.release()
        await asyncio.wait(tasks)
        assert second.ended.seen == ["task cancelled"]
        with anyio.fail_after(20):
            await bus.publish(Placed("c"))
            assert (await bus.stats()).pending == 0
        assert await orders(bus) == ["a", "c"]


@only_asyncio
async def test_native_timeout_and_wait_for() -> None:
    """asyncio.timeout and wait_for around a publish raise TimeoutError once it is decided, and leave the task uncancelled."""
    store = GatedStore()
    bus = EventBus(store)
    async with bus:
        for limit in ("timeout", "wait_for"):
            store.hold()
            asyncio.get_running_loop().call_later(0.05, store.release)
            with pytest.raises(TimeoutError):
                if limit == "timeout":
                    async with asyncio.timeout(0.01):
                        await bus.publish(Placed(limit))
                else:
                    await asyncio.wait_for(bus.publish(Placed(limit)), 0.01)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
        assert await orders(bus) == ["timeout", "wait_for"]


@only_asyncio
async def test_native_task_group() -> None:
    """asyncio.TaskGroup: a sibling's error cancels publishers; what they had queued is stored, the group's error comes out."""
    store = GatedStore()
    bus = EventBus(store)

    async def fail() -> None:
        await store.arrived.wait_for(1)
        asyncio.get_running_loop().call_later(0.02, store.release)
        raise RuntimeError("sibling")

    async with bus:
        store.hold()
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(bus.publish(Placed("a")))
                group.create_task(fail())
        assert [str(error) for error in caught.value.exceptions] == ["sibling"]
        assert await orders(bus) == ["a"]


async def test_cancelled_in_a_handler() -> None:
    """bus.publish in a handler that runs into its timeout is decided as well, and the attempt counts as failed."""
    store, failed = GatedStore(), Recorder()
    bus = EventBus(store, hooks=[failed.add])

    @attrs.frozen
    class Start:
        pass

    @bus.subscribe(Start, timeout=0.05)
    async def start(event: Start) -> None:
        if not failed.seen:
            store.hold()
            await bus.publish(Placed("a"))

    async with bus:
        await bus.publish(Start())
        await store.arrived.wait_for(2)
        await anyio.sleep(0.1)  # past the timeout: the attempt may not end before the publish is decided
        assert failed.seen == []
        store.release()
        await failed.wait_for(1)
        await bus.drain(timeout=20)
        assert await orders(bus) == ["a"]
