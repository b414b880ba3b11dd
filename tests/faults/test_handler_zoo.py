"""A zoo of handlers: what they do, what becomes of the event, and that everybody else goes on.

Every animal is fed the first of three events; its keeper, the bus, must deliver the other two to it, all three to its neighbour,
leave in order, and know after a restart what was settled. Animals that end the process live in `test_deadly_handlers`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import Delivery, EventBus, RetryPolicy
from tests.bus.support import Recorder, threads_of_the_bus

TWICE = RetryPolicy(attempts=2, first=0.001)


@attrs.frozen
class Fed:
    n: int


@attrs.frozen
class Born:
    n: int


@attrs.define
class Toy:
    parts: list[str]


class Zoo:
    """A bus with the animal and its neighbour."""

    def __init__(self, db: str, animal: Callable[..., Any], **options: Any) -> None:
        self.db = db
        self.bus = EventBus(db)
        self.attempts: list[int] = []
        self.tame = Recorder()
        self.neighbour = Recorder()
        self.opening = self.bus.open()
        self._animal = animal
        handler = self._wait_and_meet if asyncio.iscoroutinefunction(animal) else self._meet
        self.bus.subscribe(Fed, name="animal", **({"retry": TWICE} | options))(handler)
        self.bus.subscribe(Fed, name="neighbour")(self._note)

    def _meet(self, fed: Fed, delivery: Delivery) -> Any:
        if fed.n:
            self.tame.add(fed.n)
            return None
        self.attempts.append(delivery.attempt)
        return self._animal(delivery)

    async def _wait_and_meet(self, fed: Fed, delivery: Delivery) -> Any:
        return await result if isinstance(result := self._meet(fed, delivery), Awaitable) else result

    async def _note(self, fed: Fed) -> None:
        self.neighbour.add(fed.n)

    async def visit(self) -> list[tuple[str, int]]:
        """Feed it; returns error and attempts of each dead letter, after having looked that all else went on."""
        self.opening = self.bus.open(stop_timeout=2.0)
        async with self.opening:
            await self.bus.publish_many([Fed(0), Fed(1), Fed(2)])
            assert await self.bus.drain(timeout=10) == {}
            letters = [(letter.error_type, letter.attempts) for letter in await self.bus.dead_letters.list()]
            assert sorted(self.tame.seen) == [1, 2]
            assert sorted(self.neighbour.seen) == [0, 1, 2]
        assert threads_of_the_bus() == []
        made = list(self.attempts)
        async with self.bus:
            assert await self.bus.drain(timeout=10) == {}
        assert self.attempts == made
        assert len(self.tame.seen) == 2
        assert len(self.neighbour.seen) == 3
        return letters


# ------------------------------------------------------------------ those that raise


class Silent(Exception):
    """Can be neither shown nor printed."""

    def __str__(self) -> str:
        raise RuntimeError("no message")

    def __repr__(self) -> str:
        raise RuntimeError("no representation")


class Exiting(Exception):
    """Asking for its message ends the program."""

    def __str__(self) -> str:
        raise SystemExit(1)

    __repr__ = __str__


class Unsigned(Exception):
    """Looking at its notes fails."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__notes__":
            raise RuntimeError("no notes")
        return super().__getattribute__(name)


class Own(BaseException):
    """None of Python's."""


def recursion(delivery: Delivery) -> int:
    return 1 + recursion(delivery)


def circular() -> BaseException:
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    first.__context__, second.__context__ = second, first
    return first


def deep_group(depth: int) -> BaseException:
    group: Exception = ValueError("the innermost")
    for _ in range(depth):
        group = ExceptionGroup("in it", [group])
    return group


def long_chain(length: int) -> BaseException:
    last: BaseException = ValueError("the first")
    for n in range(length):
        error = ValueError(str(n))
        error.__cause__, last = last, error
    return last


ERRORS: dict[str, Callable[[], BaseException]] = {
    "Own": Own,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "StopIteration": lambda: StopIteration(Born(1)),
    "StopAsyncIteration": StopAsyncIteration,
    "MemoryError": MemoryError,
    "RecursionError": RecursionError,
    "Silent": Silent,
    "Exiting": Exiting,
    "Unsigned": Unsigned,
    "a huge message": lambda: ValueError("x" * 10_000_000),
    "a group": lambda: ExceptionGroup("two", [ValueError("a"), ExceptionGroup("in it", [KeyError("b")])]),
    "a group of no exceptions": lambda: BaseExceptionGroup("two", [GeneratorExit(), ValueError("a")]),
    "a group of exits": lambda: BaseExceptionGroup("one", [SystemExit(1)]),
    "a deep group": lambda: deep_group(2_000),
    "a circle of causes": circular,
    "a long chain of causes": lambda: long_chain(20_000),
}


@pytest.mark.parametrize("kind", ["async", "waiting", "plain"])
@pytest.mark.parametrize("name", ERRORS)
async def test_whatever_it_raises_is_a_failed_attempt(db: str, name: str, kind: str) -> None:
    """Any exception is a failed attempt, tried again and dead-lettered by its name; only exits end the bus."""
    error = ERRORS[name]()
    expected = "RuntimeError" if isinstance(error, StopIteration) and kind != "plain" else type(error).__name__

    def plain(_delivery: Delivery) -> NoReturn:
        raise error

    async def at_once(_delivery: Delivery) -> NoReturn:
        raise error

    async def waiting(_delivery: Delivery) -> NoReturn:
        await anyio.lowlevel.checkpoint()
        raise error

    zoo = Zoo(db, {"async": at_once, "waiting": waiting, "plain": plain}[kind])
    assert await zoo.visit() == [(expected, 2)]
    assert zoo.attempts == [1, 2]


@pytest.mark.parametrize("plain", [False, True])
async def test_recursion_without_end(db: str, plain: bool) -> None:
    """A handler that calls itself for ever fails; its thread, and the loop, go on."""

    async def asynchronous(delivery: Delivery) -> int:
        return recursion(delivery)

    assert await Zoo(db, recursion if plain else asynchronous).visit() == [("RecursionError", 2)]


# ------------------------------------------------------------------ those that hang


async def test_one_that_hangs(db: str) -> None:
    """An async handler that never ends is cancelled at its timeout, each time."""

    async def hang(_delivery: Delivery) -> None:
        await anyio.sleep_forever()

    assert await Zoo(db, hang, timeout=0.02).visit() == [("HandlerTimeout", 2)]


async def test_one_whose_thread_hangs(db: str) -> None:
    """A plain handler that does not end has failed at its timeout; its lane goes on when the thread returns, others before."""
    gate = threading.Event()

    def hang(delivery: Delivery) -> None:
        if delivery.attempt == 1:
            assert gate.wait(10)

    zoo = Zoo(db, hang, timeout=0.02)
    async with anyio.create_task_group() as group:

        async def let_go() -> None:
            await zoo.neighbour.wait_for(3)
            while (await zoo.bus.stats()).subscriptions["animal"].stuck != 1:
                await anyio.lowlevel.checkpoint()
            assert zoo.tame.seen == []
            gate.set()

        group.start_soon(let_go)
        assert await zoo.visit() == []
    assert zoo.attempts == [1, 2]


async def test_one_that_swallows_its_cancellation(db: str) -> None:
    """However often a handler goes on after it was cancelled: it has failed, others go on, and so does its lane when it ends."""
    swallowed = 0

    async def stubborn(_delivery: Delivery) -> Born:
        nonlocal swallowed
        for _ in range(20):
            try:
                await anyio.sleep_forever()
            except BaseException as error:
                swallowed += isinstance(error, anyio.get_cancelled_exc_class())
        return Born(1)

    zoo = Zoo(db, stubborn, timeout=0.02, retry=RetryPolicy(attempts=1))
    assert await zoo.visit() == [("HandlerTimeout", 1)]
    assert swallowed == 20


async def test_one_that_blocks_the_loop(db: str) -> None:
    """A handler that holds the loop up, longer than its timeout, delays everybody and harms nobody."""

    async def block(_delivery: Delivery) -> None:
        time.sleep(0.05)  # noqa: ASYNC251  # that is what it does

    assert await Zoo(db, block, timeout=0.01).visit() == []


# ------------------------------------------------------------------ those that meddle with the loop


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("how", ["itself", "itself, later", "the others"])
async def test_one_that_cancels_tasks(db: str, how: str) -> None:
    """Cancelling its own task, or every other one of the bus, fails at most its own attempt; the bus does not lose its tasks."""

    async def cancel(_delivery: Delivery) -> None:
        own = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("eventbus") and (task is own) == (how != "the others"):
                task.cancel()
        if how != "itself":
            await asyncio.sleep(0)
        if how == "the others":
            raise ValueError("again")

    zoo = Zoo(db, cancel)
    letters = await zoo.visit()
    assert letters == {"itself": [], "itself, later": [("CancelledError", 2)], "the others": [("ValueError", 2)]}[how]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_that_swallows_a_cancellation_of_its_task_and_hangs(db: str) -> None:
    """It is cancelled at its timeout, as any other; the bus does not lose a worker, and its body is not cancelled."""

    async def swallow(_delivery: Delivery) -> None:
        own = asyncio.current_task()
        assert own is not None
        asyncio.get_running_loop().call_soon(own.cancel)
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            await anyio.sleep_forever()

    assert await Zoo(db, swallow, timeout=0.02).visit() == [("HandlerTimeout", 2)]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_program_that_cancels_all_its_tasks(db: str, times: int) -> None:
    """What many programs do at SIGTERM, also while the bus is being left: it is left in order, and nothing is lost."""
    running, seen, handled = anyio.Event(), Recorder(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Fed, name="busy", retry=TWICE)
    async def busy(fed: Fed) -> None:
        if not running.is_set():
            running.set()
            await anyio.sleep_forever()
        handled.add(fed.n)

    bus.subscribe(Fed, name="neighbour")(seen.note)

    def cancel_all() -> None:
        for task in () if program.done() else asyncio.all_tasks():
            if task is program or task.get_name().startswith("eventbus"):
                task.cancel()

    async def run() -> None:
        async with bus.open(stop_timeout=0.2):
            await bus.publish_many([Fed(0), Fed(1)])
            await running.wait()
            for number in range(times):
                asyncio.get_running_loop().call_later(number * 0.005, cancel_all)
            await anyio.sleep_forever()

    program = asyncio.create_task(run())
    await asyncio.wait([program], timeout=10)
    assert program.cancelled()
    assert threads_of_the_bus() == []
    async with bus:
        assert await bus.drain(timeout=10) == {}
        assert await bus.dead_letters.list() == []
    assert handled.seen == [0, 1]
    assert sorted({fed.n for fed in seen.seen}) == [0, 1]


async def test_one_that_cancels_the_scope_of_its_own(db: str) -> None:
    """A scope of its own that it cancels is its own affair."""

    async def cancel(_delivery: Delivery) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            group.cancel_scope.cancel()

    assert await Zoo(db, cancel).visit() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_that_closes_the_loop(db: str) -> None:
    """Python does not let the loop be closed while it runs; that is a failed attempt."""

    async def close(_delivery: Delivery) -> None:
        asyncio.get_running_loop().close()

    assert await Zoo(db, close).visit() == [("RuntimeError", 2)]


async def test_a_plain_one_that_runs_a_loop_of_its_own(db: str) -> None:
    """`asyncio.run` works in a plain handler; the bus, which belongs to another loop, says so."""

    def run(delivery: Delivery) -> None:
        asyncio.run(asyncio.sleep(0))
        asyncio.run(zoo.bus.publish(Born(1)))

    zoo = Zoo(db, run)
    assert await zoo.visit() == [("WrongLoop", 2)]


# ------------------------------------------------------------------ those that meddle with the bus


async def test_one_that_leaves_the_bus(db: str) -> None:
    """A handler that leaves the bus would wait for itself: it is told so at once."""

    async def leave(_delivery: Delivery) -> None:
        await zoo.opening.__aexit__(None, None, None)

    zoo = Zoo(db, leave)
    assert await zoo.visit() == [("ConfigurationError", 2)]


async def test_one_that_opens_the_bus(db: str) -> None:
    """Opening the open bus is an error that harms nobody."""

    async def enter(_delivery: Delivery) -> None:
        async with zoo.bus.open():
            pass

    zoo = Zoo(db, enter)
    assert await zoo.visit() == [("ConfigurationError", 2)]


async def test_one_that_drains_inside_its_own_lane(db: str) -> None:
    """Draining inside a handler waits for everything but the handler's own lane."""

    async def drain(_delivery: Delivery) -> None:
        assert set(await zoo.bus.drain(timeout=5)) <= {"animal"}

    zoo = Zoo(db, drain)
    assert await zoo.visit() == []


async def test_one_that_waits_for_itself(db: str) -> None:
    """Waiting for an event that only its own lane can handle fails at once."""

    async def wait(_delivery: Delivery) -> None:
        receipt = await zoo.bus.publish(Fed(3))
        await receipt.handled()

    zoo = Zoo(db, wait, retry=RetryPolicy(attempts=1))
    async with zoo.bus:
        await zoo.bus.publish(Fed(0))
        assert await zoo.bus.drain(timeout=5) == {}
        (letter,) = await zoo.bus.dead_letters.list()
        assert letter.error_type == "HandlingFailed"
    assert zoo.tame.seen == [3]


@pytest.mark.parametrize("plain", [False, True])
async def test_one_that_publishes(db: str, plain: bool) -> None:
    """What an attempt publishes through its delivery counts only with its ack; what it publishes on the bus counts at once."""
    born = Recorder()

    def fail_first(delivery: Delivery) -> None:
        delivery.publish(Born(delivery.attempt))
        if delivery.attempt == 1:
            raise ValueError("after it has published")

    async def asynchronous(delivery: Delivery) -> None:
        await zoo.bus.publish(Born(10 + delivery.attempt))
        fail_first(delivery)

    zoo = Zoo(db, fail_first if plain else asynchronous)
    zoo.bus.subscribe(Born, name="born")(born.note)
    assert await zoo.visit() == []
    assert sorted(each.n for each in born.seen) == ([2] if plain else [2, 11, 12])


# ------------------------------------------------------------------ those with threads


@pytest.mark.parametrize("plain", [False, True])
async def test_one_that_starts_threads(db: str, plain: bool) -> None:
    """Threads that a handler starts and leaves alone are its own affair; what they publish too late is refused, not lost in silence."""
    started: list[threading.Thread] = []
    over, errors = threading.Event(), Recorder()

    def start(delivery: Delivery) -> None:
        def late() -> None:
            assert over.wait(10)
            try:
                delivery.publish(Born(1))
            except Exception as error:
                errors.add(type(error).__name__)

        for _ in range(5):
            thread = threading.Thread(target=late)
            thread.start()
            started.append(thread)

    async def asynchronous(delivery: Delivery) -> None:
        start(delivery)

    zoo = Zoo(db, start if plain else asynchronous)
    assert await zoo.visit() == []
    over.set()
    for thread in started:
        thread.join(10)
    assert len(errors.seen) == 5


# ------------------------------------------------------------------ what they do to the event


@pytest.mark.parametrize("plain", [False, True])
async def test_one_that_mutates_the_event(db: str, plain: bool) -> None:
    """What a handler does to an event is seen by no other subscription, and not by its own next attempt."""
    bus, seen = EventBus(db), Recorder()

    def break_it(toy: Toy, delivery: Delivery) -> None:
        seen.add(("animal", list(toy.parts)))
        toy.parts.clear()
        if delivery.attempt == 1:
            raise ValueError("broken")

    async def asynchronous(toy: Toy, delivery: Delivery) -> None:
        break_it(toy, delivery)

    async def look(toy: Toy) -> None:
        seen.add(("neighbour", list(toy.parts)))

    bus.subscribe(Toy, name="animal", retry=TWICE)(break_it if plain else asynchronous)
    bus.subscribe(Toy, name="neighbour")(look)
    async with bus:
        toy = Toy(["wheel"])
        await bus.publish(toy)
        assert await bus.drain(timeout=5) == {}
        await bus.replay()
    whole = ["wheel"]
    assert sorted(seen.seen) == [("animal", whole)] * 4 + [("neighbour", whole)] * 2
    assert toy.parts == whole
