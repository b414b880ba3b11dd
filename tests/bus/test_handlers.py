"""Handlers: what may be one, what surrounds it, and what happens when it does not behave."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

import eventbus._threads
from eventbus import (
    BusNotOpen,
    Delivery,
    Envelope,
    EventBus,
    HandlerTimeout,
    HandlingFailed,
    RetryPolicy,
    event,
)
from eventbus.hooks import HandlerStuck, Moment
from tests.bus.support import NO_RETRY, HandClock, Recorder, hold_up_first_crossing

number: ContextVar[int] = ContextVar("number", default=0)


@event("ping", key="n")
@attrs.frozen
class Ping:
    n: int = 0


@attrs.frozen
class Pong:
    n: int


@attrs.frozen
class Other:
    n: int = 0


async def dead(bus: EventBus) -> list[tuple[str, str]]:
    """Type and message of the error of each dead letter."""
    return [(letter.error_type, letter.error) for letter in await bus.dead_letters.list()]


async def until(reached: Any) -> None:
    """Wait until an async function returns true."""
    with anyio.fail_after(20):
        while not await reached():
            await anyio.lowlevel.checkpoint()


# ------------------------------------------------------------------ what may be a handler


class Shop:
    """Handlers of every shape, each of which notes what it was given."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    async def async_method(self, event: Ping) -> None:
        self.recorder.add(event)

    def method(self, event: Ping) -> None:
        self.recorder.add(event)

    async def with_delivery(self, event: Ping, delivery: Delivery) -> None:
        self.recorder.add((event, delivery.attempt, delivery.subscription, delivery.replaying, delivery.envelope.type))

    def method_with_delivery(self, event: Ping, delivery: Delivery) -> None:
        self.recorder.add((event, delivery.attempt, delivery.subscription, delivery.replaying, delivery.envelope.type))

    async def with_default(self, event: Ping, more: int = 5) -> None:
        self.recorder.add((event, more))


class Callable_:
    def __init__(self) -> None:
        self.recorder = Recorder()

    def __call__(self, event: Ping) -> None:
        self.recorder.add(event)


class AsyncCallable(Callable_):
    async def __call__(self, event: Ping) -> None:  # type: ignore[override]
        self.recorder.add(event)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("async_method", Ping(3)),
        ("method", Ping(3)),
        ("with_delivery", (Ping(3), 1, "s", False, "ping")),
        ("method_with_delivery", (Ping(3), 1, "s", False, "ping")),
        ("with_default", (Ping(3), 5)),
    ],
)
async def test_bound_methods(any_db: str, name: str, expected: object) -> None:
    """Bound methods are handlers, async or plain, with the delivery or without; a parameter with a default is left alone."""
    bus, shop = EventBus(any_db), Shop()
    method = getattr(shop, name)
    assert bus.subscribe(Ping, name="s")(method) is method
    async with bus:
        await (await bus.publish(Ping(3))).handled(timeout=20)
    assert shop.recorder.seen == [expected]


@pytest.mark.parametrize("cls", [Callable_, AsyncCallable])
async def test_callable_objects(db: str, cls: type[Callable_]) -> None:
    """An object with `__call__`, async or plain, is a handler, and so is a partial of one."""
    bus, thing, partial = EventBus(db), cls(), cls()
    bus.subscribe(Ping, name="thing")(thing)
    bus.subscribe(Ping, name="partial")(functools.partial(partial))
    async with bus:
        await (await bus.publish(Ping(3))).handled(timeout=20)
    assert thing.recorder.seen == partial.recorder.seen == [Ping(3)]


async def test_plain_handlers_run_in_threads_of_ours_and_async_ones_on_the_loop(db: str) -> None:
    """A plain function never runs on the loop's thread, an async one always does; no handler's thread is left in the end."""
    bus, seen = EventBus(db), {}

    @bus.subscribe(Ping, name="plain")
    def plain(event: Ping) -> None:
        seen["plain"] = threading.current_thread()

    @bus.subscribe(Ping, name="async")
    async def on_loop(event: Ping) -> None:
        seen["async"] = threading.current_thread()

    async with bus:
        await (await bus.publish(Ping())).handled(timeout=20)
    assert seen["async"] is threading.current_thread()
    assert seen["plain"] is not threading.current_thread()
    assert not seen["plain"].is_alive()


async def test_handlers_of_names_and_patterns_take_envelopes(db: str) -> None:
    """A handler of strings gets the envelope, undecoded, of every type that matches."""
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe("*", order="log")
    def audit(envelope: Envelope) -> None:
        recorder.add((envelope.type, envelope.event))

    async with bus:
        await bus.publish_many([Ping(1), Pong(2), Ping(3)])
        assert await bus.drain(timeout=20) == {}
    assert recorder.seen == [("ping", Ping(1)), ("Pong", Pong(2)), ("ping", Ping(3))]


# ------------------------------------------------------------------ what surrounds it


@pytest.mark.parametrize("plain", [False, True])
async def test_each_attempt_has_a_fresh_context(db: str, plain: bool) -> None:
    """What an attempt sets in context variables is seen by what it calls, and by no other attempt, nor outside."""
    bus, seen = EventBus(db), []
    number.set(7)

    def note(delivery: Delivery) -> None:
        seen.append(number.get())
        number.set(delivery.attempt)
        assert number.get() == delivery.attempt
        if delivery.attempt < 3:
            raise ValueError

    def in_thread(event: Ping, delivery: Delivery) -> None:
        note(delivery)

    async def on_loop(event: Ping, delivery: Delivery) -> None:
        await anyio.lowlevel.checkpoint()
        note(delivery)
        await anyio.lowlevel.checkpoint()
        assert number.get() == delivery.attempt

    bus.subscribe(Ping, name="s", retry=RetryPolicy(first=0.001))(in_thread if plain else on_loop)
    async with bus:
        number.set(8)
        await bus.publish_many([Ping(1), Ping(2)])
        assert await bus.drain(timeout=20) == {}
    assert seen == [7] * 6  # as it was where the bus was opened
    assert number.get() == 8


async def test_tasks_of_a_handler_share_its_context(db: str) -> None:
    """Tasks that a handler starts, and functions it runs in anyio's threads, see the context of its attempt."""
    bus, seen = EventBus(db), []

    async def child() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(number.get())

    @bus.subscribe(Ping, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        number.set(event.n)
        async with anyio.create_task_group() as group:
            group.start_soon(child)
        seen.append(await anyio.to_thread.run_sync(number.get))

    async with bus:
        await bus.publish_many([Ping(5), Ping(6)])
        assert await bus.drain(timeout=20) == {}
        assert await dead(bus) == []
    assert seen == [5, 5, 6, 6]


async def test_scopes_inside_a_handler(db: str) -> None:
    """anyio's scopes, timeouts and task groups work inside a handler; what they catch is no failure, what they raise is one."""
    bus, seen = EventBus(db), []

    @bus.subscribe(Ping, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        with anyio.move_on_after(0.001) as scope:
            await anyio.sleep_forever()
        seen.append(scope.cancelled_caught)
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            group.cancel_scope.cancel()
        if event.n == 1:
            with anyio.fail_after(0.001):
                await anyio.sleep_forever()
        if event.n == 2:
            async with anyio.create_task_group() as group:
                group.start_soon(boom)

    async def boom() -> None:
        raise ValueError("boom")

    async with bus:
        await bus.publish_many([Ping(n) for n in range(4)])
        assert await bus.drain(timeout=20) == {}
        assert [error for error, _ in await dead(bus)] == ["TimeoutError", "ExceptionGroup"]
    assert seen == [True] * 4


@pytest.fixture
def only_asyncio(anyio_backend_name: str) -> None:
    """What is written for asyncio's own tools."""
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's own tools")


@pytest.mark.usefixtures("only_asyncio")
async def test_asyncio_timeouts_and_task_groups_inside_a_handler(db: str) -> None:
    """asyncio's own timeouts, task groups and tasks work inside a handler, one attempt after the other in the same worker."""
    bus, seen = EventBus(db), []

    async def boom() -> None:
        raise ValueError("boom")

    @bus.subscribe(Ping, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.sleep(10)
        except TimeoutError:
            seen.append("timeout")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(boom())
                await asyncio.sleep(10)
        except* ValueError:
            seen.append("group")
        task = asyncio.create_task(asyncio.sleep(0, "task"))
        seen.append(await task)

    async with bus:
        await bus.publish_many([Ping(n) for n in range(3)])
        assert await bus.drain(timeout=20) == {}
        assert await dead(bus) == []
    assert seen == ["timeout", "group", "task"] * 3


async def test_a_plain_handler_may_run_a_loop_of_its_own(db: str, anyio_backend_name: str) -> None:
    """In its thread a plain handler is outside of any loop, and may run one."""
    bus, recorder = EventBus(db), Recorder()

    async def inner(n: int) -> int:
        await anyio.lowlevel.checkpoint()
        return n

    @bus.subscribe(Ping, retry=NO_RETRY)
    def handle(event: Ping) -> None:
        recorder.add(anyio.run(inner, event.n, backend=anyio_backend_name))
        recorder.add(asyncio.run(inner(event.n)))

    async with bus:
        await bus.publish(Ping(4))
        assert await bus.drain(timeout=20) == {}
        assert await dead(bus) == []
    assert recorder.seen == [4, 4]


# ------------------------------------------------------------------ timeouts


async def test_an_async_handler_is_cancelled_at_its_timeout(db: str) -> None:
    """An async handler that runs for too long is cancelled, which is a failed attempt like any other; the next event goes on."""
    bus, cancelled, done = EventBus(db), [], []

    @bus.subscribe(Ping, timeout=0.02, retry=RetryPolicy(attempts=2, first=0.001))
    async def handle(event: Ping) -> None:
        if event.n == 0:
            try:
                await anyio.sleep_forever()
            except BaseException as error:
                cancelled.append(type(error))
                raise
        done.append(event.n)

    async with bus:
        await bus.publish_many([Ping(0), Ping(1)])
        assert await bus.drain(timeout=20) == {}
        ((error_type, message),) = await dead(bus)
    assert (error_type, "0.02 s" in message, "handle" in message) == ("HandlerTimeout", True, True)
    assert issubclass(HandlerTimeout, TimeoutError)
    assert cancelled == [anyio.get_cancelled_exc_class()] * 2
    assert done == [1]


async def test_a_handler_that_swallows_its_cancellation_has_failed(db: str) -> None:
    """What a handler returns after its timeout does not count, nor does what it would publish; the bus goes on."""
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe(Ping, timeout=0.02, retry=NO_RETRY)
    async def handle(event: Ping, delivery: Delivery) -> Pong | None:
        if event.n:
            return None
        delivery.publish(Pong(1))
        try:
            await anyio.sleep_forever()
        except BaseException:  # the handler of a user who does not know better
            pass
        return Pong(2)

    bus.subscribe(Pong, name="pong")(recorder.note)
    async with bus:
        await bus.publish_many([Ping(0), Ping(1)])
        assert await bus.drain(timeout=20) == {}
        assert [error for error, _ in await dead(bus)] == ["HandlerTimeout"]
        assert (await bus.stats()).subscriptions["handle"].handled == 1
    assert recorder.seen == []


async def test_a_handler_that_raises_something_else_at_its_timeout(db: str) -> None:
    """An error raised while a handler is cancelled at its timeout is kept as the cause of the timeout."""
    bus = EventBus(db)

    @bus.subscribe(Ping, timeout=0.02, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("while leaving")

    async with bus:
        await bus.publish(Ping(0))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
    assert letter.error_type == "HandlerTimeout"
    assert "while leaving" in letter.traceback


async def test_a_timeout_of_its_own_is_not_ours(db: str) -> None:
    """A TimeoutError of the handler's own making, long before its timeout, is a failure like any other."""
    bus = EventBus(db)

    @bus.subscribe(Ping, timeout=30, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    async with bus:
        await bus.publish(Ping(0))
        assert await bus.drain(timeout=20) == {}
        assert [error for error, _ in await dead(bus)] == ["TimeoutError"]


@pytest.mark.parametrize("order", ["type", "log", "key"])
async def test_a_plain_handler_that_outlives_its_timeout(db: str, order: Any) -> None:
    """Its attempt fails at the timeout; its lane stays closed until the thread returns, reported as stuck; its result is dropped."""
    stuck, returned = Recorder(), threading.Event()
    attempts, pongs = Recorder(), Recorder()

    def hook(moment: Moment) -> None:
        if isinstance(moment, HandlerStuck):
            stuck.add(moment.subscription)

    bus = EventBus(db, hooks=[hook])

    @bus.subscribe(Ping, name="s", timeout=0.03, retry=RetryPolicy(attempts=2, first=0.0), order=order)
    def handle(event: Ping, delivery: Delivery) -> Pong | None:
        attempts.add((event.n, delivery.attempt))
        if (event.n, delivery.attempt) != (1, 1):
            return None
        delivery.publish(Pong(event.n))
        assert returned.wait(5)
        with pytest.raises(BusNotOpen, match="over"):
            delivery.publish(Pong(event.n))
        return Pong(event.n)

    bus.subscribe(Pong, name="pongs")(pongs.note)
    async with bus:
        await bus.publish(Ping(1), key="k")
        assert await stuck.wait_for(1) == ["s"]
        await bus.publish(Ping(2), key="k")
        stats = (await bus.stats()).subscriptions["s"]
        assert (stats.stuck, stats.running, stats.failed, stats.handled) == (1, 1, 1, 0)
        assert await bus.drain(timeout=0.05) == {"s": 2}
        assert attempts.seen == [(1, 1)]
        returned.set()
        assert await bus.drain(timeout=20) == {}
        stats = (await bus.stats()).subscriptions["s"]
        assert (stats.stuck, stats.running, stats.failed, stats.handled) == (0, 0, 1, 2)
    assert attempts.seen == [(1, 1), (1, 2), (2, 1)]
    assert pongs.seen == []


async def test_each_attempt_in_a_thread_has_its_own_timeout(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout counts from when an attempt begins, not from when it is on its way, nor for those that cross with it."""
    gate = hold_up_first_crossing(monkeypatch)
    monkeypatch.setattr(eventbus._threads, "QUANTUM", 1_000)
    clock, moments = HandClock(), list[Moment]()
    bus, recorder = EventBus(db, clock=clock, hooks=[moments.append]), Recorder()

    @bus.subscribe(Ping, name="s", timeout=10, retry=NO_RETRY)
    def handle(event: Ping) -> None:
        clock.advance(6)
        clock.wait_for_looks(5)
        recorder.add(event.n)

    async with bus:
        await bus.publish_many([Ping(n) for n in range(5)])
        clock.advance(60)
        await anyio.to_thread.run_sync(clock.wait_for_looks, 5)
        gate.set()
        assert await bus.drain(timeout=20) == {}
        assert await dead(bus) == []
    assert recorder.seen == list(range(5))
    assert moments == []


async def test_a_stuck_thread_holds_up_no_other_lane(db: str) -> None:
    """While one lane waits for its thread, other types of the subscription go on, and so does order "none"."""
    bus, returned, seen = EventBus(db), threading.Event(), Recorder()

    @bus.subscribe(Ping, Other, name="by type", timeout=0.02, retry=NO_RETRY)
    def by_type(event: Ping | Other) -> None:
        if isinstance(event, Ping):
            assert returned.wait(5)
        seen.add(("by type", event))

    @bus.subscribe(Ping, name="free", timeout=0.02, retry=NO_RETRY, order="none", concurrency=2)
    def free(event: Ping) -> None:
        if event.n == 0:
            assert returned.wait(5)
        seen.add(("free", event))

    async with bus:
        await bus.publish_many([Ping(0), Other(1), Ping(2), Ping(3), Other(4)])
        assert set(await seen.wait_for(4)) == {
            ("by type", Other(1)),
            ("by type", Other(4)),
            ("free", Ping(2)),
            ("free", Ping(3)),
        }
        returned.set()
        assert await bus.drain(timeout=20) == {}


async def test_a_late_result_after_many_is_dropped_and_what_was_not_begun_comes_again(db: str) -> None:
    """Of several attempts on their way through a thread, those before the stuck one stand, those behind come again, each once."""
    bus, returned, seen, acked = EventBus(db), threading.Event(), Recorder(), []

    @bus.subscribe(Ping, name="s", timeout=0.05, retry=RetryPolicy(attempts=3, first=0.0))
    def handle(event: Ping, delivery: Delivery) -> None:
        seen.add((event.n, delivery.attempt))
        if (event.n, delivery.attempt) == (3, 1):
            assert returned.wait(5)
            return
        acked.append(event.n)

    async with bus:
        await bus.publish_many([Ping(n) for n in range(10)])
        await seen.wait_for(4)

        async def is_stuck() -> bool:
            return (await bus.stats()).subscriptions["s"].stuck == 1

        await until(is_stuck)
        returned.set()
        assert await bus.drain(timeout=20) == {}
    assert acked == list(range(10))
    assert seen.seen == [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), *((n, 1) for n in range(4, 10))]


# ------------------------------------------------------------------ cancellations of its own


@pytest.mark.usefixtures("only_asyncio")
@pytest.mark.parametrize("how", ["raised", "raised late", "awaited", "itself", "itself at its end", "itself twice"])
async def test_a_cancellation_of_its_own_is_a_failed_attempt(db: str, how: str) -> None:
    """A CancelledError of a handler's own making, even of its own task, fails that attempt, and harms nothing else."""
    bus, handled = EventBus(db), []

    async def cancel_something() -> None:
        task = asyncio.current_task()
        assert task is not None
        match how:
            case "raised":
                raise asyncio.CancelledError
            case "raised late":
                await asyncio.sleep(0)
                raise asyncio.CancelledError
            case "awaited":
                other = asyncio.ensure_future(asyncio.sleep(10))
                other.cancel()
                await other
            case "itself":
                task.cancel()
                await asyncio.sleep(10)
            case "itself at its end":
                task.cancel()
            case "itself twice":
                task.cancel()
                try:
                    await asyncio.sleep(10)
                finally:
                    task.cancel()

    @bus.subscribe(Ping, retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        if event.n % 2 == 0:
            await cancel_something()
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        handled.append(event.n)

    async with bus:
        for n in range(6):
            await bus.publish(Ping(n))
        assert await bus.drain(timeout=20) == {}
        errors = await dead(bus)
        receipt = await bus.publish(Ping(7))
        await receipt.handled(timeout=20)
    if how == "itself at its end":
        errors = [error for error in errors if error[0] != "CancelledError"]
        assert errors == []
    else:
        assert [error for error, _ in errors] == ["CancelledError"] * 3
    assert [n for n in handled if n % 2] == [1, 3, 5, 7]


async def test_a_cancellation_of_its_own_scope_is_not_a_release(db: str) -> None:
    """A cancelled scope outside of which a handler raises is its failure; no attempt is made again uncounted."""
    bus, attempts = EventBus(db), []

    @bus.subscribe(Ping, retry=RetryPolicy(attempts=2, first=0.0))
    async def handle(event: Ping, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        raise ValueError

    async with bus:
        await bus.publish(Ping())
        assert await bus.drain(timeout=20) == {}
        assert [error for error, _ in await dead(bus)] == ["ValueError"]
    assert attempts == [1, 2]


# ------------------------------------------------------------------ what it returns


JUNK: list[object] = [5, "text", b"bytes", object, {"a": 1}, [Pong(1), 5], (n for n in [Pong(1)]), ValueError("returned")]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
async def test_junk_returned_is_a_failed_attempt(db: str, junk: object, plain: bool) -> None:
    """What is neither None nor an event nor a list of events is a failed attempt that says so; nothing of it is published."""
    bus, pongs = EventBus(db), Recorder()

    async def on_loop(event: Ping) -> Any:
        return junk

    def in_thread(event: Ping) -> Any:
        return junk

    bus.subscribe(Ping, name="s", retry=NO_RETRY)(in_thread if plain else on_loop)
    bus.subscribe(Pong, name="pongs")(pongs.note)
    async with bus:
        await bus.publish(Ping())
        assert await bus.drain(timeout=20) == {}
        ((error_type, message),) = await dead(bus)
    assert error_type == "TypeError"
    assert "'s' returned" in message
    assert pongs.seen == []


async def test_a_plain_function_that_returns_a_coroutine_is_told_so(db: str) -> None:
    """A plain function whose result should have been awaited fails, and leaves nothing unawaited behind."""
    bus = EventBus(db)

    async def forgotten() -> None: ...

    @bus.subscribe(Ping, retry=NO_RETRY)
    def handle(event: Ping) -> Any:
        return forgotten()

    async with bus:
        await bus.publish(Ping())
        assert await bus.drain(timeout=20) == {}
        ((_, message),) = await dead(bus)
    assert "async def" in message
    gc.collect()  # a coroutine that was never awaited would warn now


async def test_a_stop_iteration_is_a_failure(db: str) -> None:
    """`StopIteration` out of a handler is an error, not its result."""
    bus = EventBus(db)

    @bus.subscribe(Ping, name="plain", retry=NO_RETRY)
    def plain(event: Ping) -> None:
        raise StopIteration(Pong(1))

    class Odd:
        def __call__(self, event: Ping) -> Any:
            raise StopIteration(Pong(2))

    odd = Odd()
    bus.subscribe(Ping, name="odd", retry=NO_RETRY)(odd)
    async with bus:
        await bus.publish(Ping())
        assert await bus.drain(timeout=20) == {}
        assert len(await dead(bus)) == 2


# ------------------------------------------------------------------ how many at once


@pytest.mark.parametrize("plain", [False, True])
async def test_workers_bound_what_runs_at_once(db: str, plain: bool) -> None:
    """Never more than `workers` handlers run at once, and one subscription has at most half of them."""
    bus, recorder = EventBus(db, workers=6), Recorder()
    go_on, go_on_thread = anyio.Event(), threading.Event()
    lock, running, most = threading.Lock(), {"a": 0, "b": 0, "c": 0}, {"a": 0, "b": 0, "c": 0, "all": 0}

    def begin(name: str) -> None:
        with lock:
            running[name] += 1
            most[name] = max(most[name], running[name])
            most["all"] = max(most["all"], sum(running.values()))
        recorder.add(name)

    def end(name: str) -> None:
        with lock:
            running[name] -= 1

    def subscribe(name: str) -> None:
        async def on_loop(event: Ping) -> None:
            begin(name)
            await go_on.wait()
            end(name)

        def in_thread(event: Ping) -> None:
            begin(name)
            assert go_on_thread.wait(5)
            end(name)

        bus.subscribe(Ping, name=name, order="none", concurrency=20)(in_thread if plain else on_loop)

    for name in most:
        if name != "all":
            subscribe(name)
    async with bus:
        await bus.publish_many([Ping(n) for n in range(20)])
        await recorder.wait_for(6)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert len(recorder.seen) == 6
        go_on.set()
        go_on_thread.set()
        assert await bus.drain(timeout=20) == {}
    assert most["all"] == 6
    assert max(most["a"], most["b"], most["c"]) <= 3
    assert len(recorder.seen) == 60


async def test_a_stalled_subscription_leaves_half_of_the_workers_to_others(db: str) -> None:
    """However many deliveries of a subscription hang, another one is served."""
    bus, recorder = EventBus(db, workers=4), Recorder()

    @bus.subscribe(Ping, name="hangs", order="none", concurrency=100)
    async def hang(event: Ping) -> None:
        await anyio.sleep_forever()

    bus.subscribe(Ping, name="flows")(recorder.note)
    async with bus.open(stop_timeout=0):
        await bus.publish_many([Ping(n) for n in range(500)])
        assert len(await recorder.wait_for(500)) == 500
        assert (await bus.stats()).subscriptions["hangs"].running == 2


async def test_one_worker_serves_all(db: str) -> None:
    """With a single worker everything is handled all the same, one after the other."""
    bus, recorder = EventBus(db, workers=1), Recorder()
    for name in ("a", "b", "c"):

        @bus.subscribe(Ping, name=name, order="key")
        async def handle(event: Ping) -> None:
            await anyio.lowlevel.checkpoint()
            recorder.add(event.n)

    async with bus:
        await bus.publish_many([Ping(n) for n in range(50)])
        assert await bus.drain(timeout=20) == {}
    assert len(recorder.seen) == 150


async def test_waiting_inside_the_lane_that_would_have_to_handle_it_is_refused(db: str) -> None:
    """`handled` called in the very lane that it waits for raises at once instead of waiting for ever."""
    bus, errors = EventBus(db), Recorder()

    @bus.subscribe(Ping, name="s", retry=NO_RETRY)
    async def handle(event: Ping) -> None:
        if event.n == 0:
            receipt = await bus.publish(Ping(1))
            try:
                await receipt.handled(timeout=20)
            except HandlingFailed as error:
                errors.add(error.blocked)

    async with bus:
        await bus.publish(Ping(0))
        (blocked,) = await errors.wait_for(1)
        assert await bus.drain(timeout=20) == {}
    assert list(blocked) == ["s"]


async def test_watching_over_timeouts_does_not_pile_up(db: str) -> None:
    """However many handlers run for however long, a few timers watch over all of their timeouts."""
    bus, most = EventBus(db), 0

    @bus.subscribe(Ping, order="none", concurrency=16, timeout=0.05)
    async def handle(event: Ping) -> None:
        nonlocal most
        await anyio.sleep(0.001 * (1 + event.n % 30))
        assert bus._running is not None
        most = max(most, len(bus._running.timers._heap))

    async with bus:
        await bus.publish_many([Ping(n) for n in range(600)])
        assert await bus.drain(timeout=20) == {}
        assert await dead(bus) == []
    assert most < 60


async def test_what_a_bad_return_value_leaves_behind(db: str) -> None:
    """The traceback in the dead letter of a handler that returned no event tells of that alone."""
    bus = EventBus(db)

    async def handle(event: Ping) -> Any:
        return 5

    bus.subscribe(Ping, name="s", retry=NO_RETRY)(handle)
    async with bus:
        await bus.publish(Ping(1))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
    assert "returned 5" in letter.traceback
    assert "StopIteration" not in letter.traceback
