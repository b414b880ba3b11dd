"""Opening and leaving: what a restart delivers, how a stop ends what runs, and what is left of the bus afterwards."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from eventbus import (
    BusNotOpen,
    ConfigurationError,
    Delivery,
    EventBus,
    RetryPolicy,
    StoreUnavailable,
)
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import QUICK, Recorder, threads_of_the_bus


@attrs.frozen
class Placed:
    n: int


def handles_on(path: str) -> list[str]:
    """What this process holds open of a database: the file itself, its WAL, its lock file."""
    targets = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(handle.readlink()))
        except OSError:
            continue  # the handle of the listing itself
    return [target for target in targets if target.startswith(path)]


def assert_gone(path: str) -> None:
    assert not threads_of_the_bus()
    assert not handles_on(path)


# ------------------------------------------------------------------ opening


async def test_nothing_happens_before_open(db: str) -> None:
    """Before it is opened a bus has no file and no thread, and says what to do."""
    bus = EventBus(db)
    bus.subscribe(Placed, name="h")(Recorder().note)
    assert not Path(db).exists()
    assert_gone(db)
    with pytest.raises(BusNotOpen, match="async with"):
        await bus.publish(Placed(1))


async def test_one_bus_can_be_opened_again_and_again(any_db: str) -> None:
    """The same object works in a second and a third `async with`."""
    recorder = Recorder()
    bus = EventBus(any_db)
    bus.subscribe(Placed, name="h")(recorder.note)
    for n in range(3):
        async with bus:
            await (await bus.publish(Placed(n))).handled(20)
        with pytest.raises(BusNotOpen):
            await bus.publish(Placed(99))
    assert recorder.seen == [Placed(0), Placed(1), Placed(2)]
    assert_gone(db_of(any_db))


def db_of(address: str) -> str:
    return "/nowhere" if address == ":memory:" else address


async def test_a_bus_is_open_once(db: str) -> None:
    """Opening an open bus is an error that leaves the open one alone."""
    bus = EventBus(db)
    async with bus:
        with pytest.raises(ConfigurationError, match="open already"):
            async with bus:
                pass
        await bus.publish(Placed(1))
    assert_gone(db)


async def test_the_store_may_be_named_at_open(db: str) -> None:
    """`open(path)` overrides the store given to EventBus."""
    bus = EventBus(None)
    with pytest.raises(ConfigurationError, match="no store"):
        async with bus.open():
            pass
    async with bus.open(db):
        await bus.publish(Placed(1))
    assert Path(db).exists()


async def test_a_failed_open_leaves_nothing(db: str) -> None:
    """If the store cannot be opened, no thread and no handle is left, and the bus can be opened later."""
    Path(db).write_bytes(b"this is no database" * 1000)
    bus = EventBus(db)
    with pytest.raises((StoreUnavailable, Exception)) as caught:
        async with bus:
            pass
    assert type(caught.value).__module__ == "eventbus.errors"
    assert_gone(db)
    Path(db).unlink()
    async with bus:
        await bus.publish(Placed(1))
    assert_gone(db)


async def test_a_store_that_cannot_be_closed_leaves_no_thread(db: str) -> None:
    """If closing the store fails, that error comes out, the threads are ended, and the bus can be opened again."""

    class Stubborn(SQLiteStore):
        def close(self) -> None:
            super().close()
            if broken:
                raise StoreUnavailable("closing failed")

    broken = True
    bus = EventBus(Stubborn(db))
    with pytest.raises(StoreUnavailable, match="closing failed"):
        async with bus:
            await bus.publish(Placed(1))
    assert_gone(db)
    broken = False
    async with bus:
        await bus.publish(Placed(2))
    assert_gone(db)


async def test_cancelled_while_opening_leaves_nothing(db: str) -> None:
    """A cancellation that is there before the bus is open ends the opening, and nothing is left of it."""
    bus = EventBus(db)
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with bus:
            await checkpoint()
    assert scope.cancelled_caught
    assert_gone(db)
    async with bus:
        await bus.publish(Placed(1))


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_a_restart_delivers_what_was_not_settled_and_only_that(db: str, order: str) -> None:
    """After leaving in the middle, the next start goes on with the first event that was not settled."""
    handled, second = Recorder(), Recorder()
    gate = anyio.Event()

    first = EventBus(db)

    @first.subscribe(Placed, name="h", order=order, concurrency=1 if order in ("key", "none") else None)  # type: ignore[arg-type]
    async def slow(placed: Placed) -> None:
        if placed.n == 5:
            gate.set()
            await anyio.sleep_forever()
        handled.add(placed.n)

    async with first.open(stop_timeout=0.01):
        await first.publish_many([Placed(n) for n in range(10)])
        await gate.wait()
    assert handled.seen == [0, 1, 2, 3, 4]

    again = EventBus(db)

    @again.subscribe(Placed, name="h", order=order, concurrency=1 if order in ("key", "none") else None)  # type: ignore[arg-type]
    async def quick(placed: Placed) -> None:
        second.add(placed.n)

    async with again:
        assert await again.drain(20) == {}
    assert second.seen == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("order", ["type", "key", "log", "none"])
async def test_a_release_is_not_counted(db: str, order: str) -> None:
    """An attempt that the stop has cancelled has the same number after the restart; a failed one before it was counted."""
    attempts, running = Recorder(), anyio.Event()
    hang = True
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", order=order, retry=QUICK)  # type: ignore[arg-type]
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        attempts.add(delivery.attempt)
        if delivery.attempt == 1:
            raise ValueError("first")
        if hang:
            running.set()
            await anyio.sleep_forever()

    async with bus.open(stop_timeout=0.0):
        await bus.publish(Placed(1), key="a")
        await running.wait()
    assert attempts.seen == [1, 2]
    hang = False
    async with bus:
        assert await bus.drain(20) == {}
    assert attempts.seen == [1, 2, 2]


async def test_the_due_time_of_a_retry_survives_a_restart(db: str) -> None:
    """A restart neither skips the wait for a retry nor forgets the attempts."""
    attempts = Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(attempts=3, first=3600, jitter=0))
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        attempts.add(delivery.attempt)
        raise ValueError("no")

    async with bus:
        await bus.publish(Placed(1))
        await attempts.wait_for(1)
    async with bus:
        assert await bus.drain(0.1) == {"h": 1}
        assert (await bus.stats()).subscriptions["h"].retrying == 1
    assert attempts.seen == [1]


# ------------------------------------------------------------------ leaving


async def test_leaving_lets_a_running_attempt_finish(db: str) -> None:
    """Within stop_timeout a running attempt ends as it would have, and is settled."""
    running, done = anyio.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> None:
        running.set()
        await anyio.sleep(0.05)
        done.add(placed.n)

    async with bus:
        await bus.publish(Placed(1))
        await running.wait()
    assert done.seen == [1]
    async with bus:
        await bus.drain(20)
    assert done.seen == [1]
    assert_gone(db)


async def test_what_a_finishing_handler_publishes_is_stored(db: str) -> None:
    """While the bus is leaving, the attempts that it lets finish may still publish, with their ack and beside it."""

    @attrs.frozen
    class Child:
        n: int

    running, seen = anyio.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="parent")
    async def parent(_placed: Placed) -> Child:
        running.set()
        await anyio.sleep(0.02)
        await bus.publish(Child(1))
        return Child(2)

    bus.subscribe(Child, name="child")(seen.note)
    async with bus:
        await bus.publish(Placed(1))
        await running.wait()
    async with bus:
        assert await bus.drain(20) == {}
    assert seen.seen == [Child(1), Child(2)]


@pytest.mark.parametrize("kind", ["async", "plain"])
@pytest.mark.parametrize("order", ["type", "key", "none"])
async def test_leaving_never_works_off_a_backlog(db: str, kind: str, order: str) -> None:
    """When leaving begins no further attempt is started, however much waits and however long stop_timeout is."""
    running, seen = Recorder(), Recorder()
    leaving = threading.Event()
    bus = EventBus(db)

    def plain(placed: Placed) -> None:
        running.add(placed.n)
        leaving.wait(5)
        seen.add(placed.n)

    async def asynchronous(placed: Placed) -> None:
        running.add(placed.n)
        await anyio.sleep(0.05)
        seen.add(placed.n)

    options = {} if order == "type" else {"concurrency": 1}
    bus.subscribe(Placed, name="h", order=order, **options)(plain if kind == "plain" else asynchronous)  # type: ignore[arg-type]
    async with bus.open(stop_timeout=30):
        await bus.publish_many([Placed(n) for n in range(50)])
        await running.wait_for(1)
        threading.Timer(0.05, leaving.set).start()
    assert seen.seen == [0]
    assert running.seen == [0]


async def test_an_exception_in_the_body_comes_out_as_it_is(db: str) -> None:
    """It is not wrapped in an ExceptionGroup, and the bus is closed."""
    error = LookupError("the body's own")
    with pytest.raises(LookupError) as caught:
        async with EventBus(db) as bus:
            await bus.publish(Placed(1))
            raise error
    assert caught.value is error
    assert_gone(db)


async def test_an_exception_group_in_the_body_comes_out_as_it_is(db: str) -> None:
    """A group of the user's own is not wrapped either."""
    group = ExceptionGroup("mine", [LookupError()])
    with pytest.raises(ExceptionGroup) as caught:
        async with EventBus(db):
            raise group
    assert caught.value is group


async def test_cancelling_the_scope_around_the_bus(db: str) -> None:
    """A cancellation from around the bus ends it; what runs is let finish, what was acknowledged is there after."""
    running, seen = anyio.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> None:
        running.set()
        await anyio.sleep(0.03)
        seen.add(placed.n)

    with anyio.CancelScope() as scope:
        async with bus:
            await bus.publish_many([Placed(n) for n in range(3)])
            await running.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert seen.seen == [0]
    assert_gone(db)
    async with bus:
        await bus.drain(20)
    assert seen.seen == [0, 1, 2]


async def test_a_deadline_around_the_bus(db: str) -> None:
    """`fail_after` around the bus raises TimeoutError, and the bus is closed."""
    with pytest.raises(TimeoutError), anyio.fail_after(0.05):
        async with EventBus(db):
            await anyio.sleep_forever()
    assert_gone(db)


async def test_cancelling_the_task_of_the_bus_in_a_task_group(db: str) -> None:
    """A task group that is cancelled takes the bus with it, in order."""
    opened = anyio.Event()

    async def serve() -> None:
        async with EventBus(db) as bus:
            await bus.publish(Placed(1))
            opened.set()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(serve)
        await opened.wait()
        group.cancel_scope.cancel()
    assert_gone(db)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelling_the_task_by_asyncio(db: str, times: int) -> None:
    """`Task.cancel()`, and again while it is leaving: the attempts still finish, and nothing is left behind."""
    running, seen = asyncio.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> None:
        running.set()
        await asyncio.sleep(0.1)
        seen.add(placed.n)

    async def serve() -> None:
        async with bus:
            await bus.publish_many([Placed(n) for n in range(3)])
            await asyncio.sleep(3600)

    task = asyncio.create_task(serve())
    await running.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert seen.seen == [0]
    assert_gone(db)
    async with bus:
        await bus.drain(20)
    assert seen.seen == [0, 1, 2]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_timeout_around_the_bus(db: str) -> None:
    """`asyncio.timeout` works around the bus: its own accounting of cancellations is not disturbed."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), EventBus(db):
            await asyncio.sleep(3600)
    assert_gone(db)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancelled_publish_is_decided_before_the_bus_is_gone(db: str) -> None:
    """A publish that is cancelled after it was queued is stored whole or not at all, and the bus goes on."""
    seen = Recorder()
    bus = EventBus(db)
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        for n in range(20):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(bus.publish, Placed(n))
                    for _ in range(n % 4):
                        await checkpoint()
                    scope.cancel()
        assert await bus.drain(20) == {}
        stored = [envelope.event async for envelope in bus.history()]
    assert seen.seen == stored


# ------------------------------------------------------------------ a handler that ends the program


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["async", "waiting", "plain"])
async def test_a_handler_that_exits_stops_the_bus(db: str, error: type[BaseException], kind: str) -> None:
    """SystemExit and KeyboardInterrupt in a handler: the attempt is stored as failed, and they come out of `async with`."""
    attempts, closing = Recorder(), False
    bus = EventBus(db)

    def plain(_placed: Placed, delivery: Delivery) -> None:
        attempts.add(delivery.attempt)
        if delivery.attempt == 1:
            raise error(7)

    async def asynchronous(placed: Placed, delivery: Delivery) -> None:
        if kind == "waiting":
            await anyio.sleep(0.001)
        plain(placed, delivery)

    bus.subscribe(Placed, name="h", retry=QUICK)(plain if kind == "plain" else asynchronous)
    with pytest.raises(error) as caught:
        async with bus:
            try:
                await bus.publish(Placed(1))
                await anyio.sleep_forever()
            finally:
                closing = True
    assert caught.value.args == (7,)
    assert closing
    assert attempts.seen == [1]
    assert_gone(db)
    async with bus:
        assert await bus.drain(20) == {}
    assert attempts.seen == [1, 2]


async def test_a_handlers_exit_is_raised_even_if_the_body_ends_otherwise(db: str) -> None:
    """A body that answers its cancellation with an error of its own does not hide the handler's SystemExit."""
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", retry=QUICK)
    async def handler(_placed: Placed) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        async with bus:
            await bus.publish(Placed(1))
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError("while leaving")
    assert caught.value.code == 3
    assert_gone(db)


async def test_what_is_asked_while_it_closes_is_no_error(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """Other instances that come and go while a bus closes make it ask the store once more; that it cannot is nobody's concern."""
    bus = EventBus(db)
    bus.subscribe("*", name="s")(Recorder().note)
    async with bus:
        running = bus._running
        assert running is not None
    (serving,) = running.dispatcher.servings.values()
    serving.redriver.kick()
    running.dispatcher.look_for_types()
    with running.elsewhere._watching():
        running.elsewhere.noticed()
    assert not caplog.records


# ------------------------------------------------------------------ threads that will not end


async def test_a_thread_that_will_not_end_is_named_and_left_behind(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """Leaving does not wait for a plain handler beyond stop_timeout: it names it, and the delivery comes again, uncounted."""
    running, let_go, attempts = Recorder(), threading.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="endless")
    def handler(_placed: Placed, delivery: Delivery) -> None:
        attempts.add(delivery.attempt)
        running.add(threading.current_thread())
        let_go.wait(10)

    with caplog.at_level(logging.WARNING, "eventbus"):
        async with bus.open(stop_timeout=0.05):
            await bus.publish(Placed(1))
            await running.wait_for(1)
            began = anyio.current_time()
        assert anyio.current_time() - began < 2
    assert any("endless" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
    assert not handles_on(db)
    assert len(threads_of_the_bus()) == 1, "only the handler's own thread may be left"
    let_go.set()
    running.seen[0].join(5)
    assert_gone(db)
    async with bus:
        assert await bus.drain(20) == {}
    assert attempts.seen == [1, 1]


def test_a_thread_that_will_not_end_does_not_hold_up_the_exit(db: str) -> None:
    """The process ends although a handler's thread sleeps for an hour."""
    program = """
        import anyio, sys, time
        import attrs
        from eventbus import EventBus

        @attrs.frozen
        class Placed:
            n: int

        bus = EventBus(sys.argv[1])

        @bus.subscribe(Placed)
        def endless(placed: Placed) -> None:
            print("running", flush=True)
            time.sleep(3600)

        async def main():
            async with bus.open(stop_timeout=0.1):
                await bus.publish(Placed(1))
                await anyio.sleep(0.1)

        anyio.run(main, backend=sys.argv[2])
    """
    for backend in ("asyncio", "trio"):
        command = [sys.executable, "-c", textwrap.dedent(program), f"{db}-{backend}", backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "running\n"
        assert "endless" in done.stderr


async def test_a_handler_that_ignores_its_cancellation_is_named(db: str, caplog: pytest.LogCaptureFixture) -> None:
    """An async handler that goes on after it was cancelled is waited for, and named."""
    running, seen = anyio.Event(), Recorder()
    bus = EventBus(db)

    @bus.subscribe(Placed, name="stubborn")
    async def handler(_placed: Placed) -> None:
        running.set()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1.2)
        seen.add("end")

    with caplog.at_level(logging.WARNING, "eventbus"):
        async with bus.open(stop_timeout=0.0):
            await bus.publish(Placed(1))
            await running.wait()
    assert seen.seen == ["end"]
    assert any("stubborn" in record.getMessage() for record in caplog.records)
    assert_gone(db)


# ------------------------------------------------------------------ those who wait while it closes


@pytest.mark.parametrize("waiter", ["drain", "handled", "scheduled", "replay", "paced replay", "redrive"])
async def test_nobody_waits_for_ever_on_a_bus_that_closes(db: str, waiter: str) -> None:
    """Whoever waits in another task when the bus is closed is told so: BusNotOpen."""
    from datetime import timedelta

    running, outcome = anyio.Event(), Recorder()
    bus = EventBus(db)
    hang = waiter not in ("paced replay", "replay", "redrive")

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(attempts=1))
    async def handler(_placed: Placed) -> None:
        running.set()
        if waiter == "redrive" and not hang:
            raise ValueError("dead")
        if hang:
            await anyio.sleep_forever()

    async def wait(act: Callable[[], Awaitable[object]]) -> None:
        try:
            outcome.add(await act())
        except BaseException as error:
            outcome.add(error)
            if not isinstance(error, Exception):
                raise

    async with anyio.create_task_group() as group:
        async with bus.open(stop_timeout=0.0):
            receipt = await bus.publish(Placed(1), due=timedelta(hours=1) if waiter == "scheduled" else None)
            if waiter != "scheduled":
                await running.wait()
            if not hang:
                await bus.drain(20)
            hang = True
            if waiter == "redrive":
                await bus.dead_letters.redrive(all=True)
            running = anyio.Event()
            acts: dict[str, Callable[[], Awaitable[object]]] = {
                "drain": bus.drain,
                "handled": receipt.handled,
                "scheduled": receipt.handled,
                "replay": bus.replay,
                "paced replay": lambda: bus.replay(rate=0.001),
                "redrive": bus.drain,
            }
            group.start_soon(wait, acts[waiter])
            if waiter in ("replay", "redrive"):
                await running.wait()
            await anyio.sleep(0.02)  # let the waiter come to wait: nothing tells when it does
            assert not outcome.seen
        with anyio.move_on_after(5) as scope:
            await outcome.wait_for(1)
        group.cancel_scope.cancel()
    assert not scope.cancelled_caught
    assert isinstance(outcome.seen[0], BusNotOpen), outcome.seen


# ------------------------------------------------------------------ Ctrl-C

INTERRUPTED = """
import sys, threading, os, time
import anyio, attrs
from eventbus import EventBus

@attrs.frozen
class Placed:
    n: int

bus = EventBus(sys.argv[1])
busy = sys.argv[3] == "busy"

@bus.subscribe(Placed)
async def handler(placed: Placed) -> None:
    os.write(1, b"handling\\n")
    if busy:
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            pass
    else:
        await anyio.sleep(0.05)
    os.write(1, b"handled\\n")

async def main() -> None:
    async with bus:
        for n in range(1000):
            receipt = await bus.publish(Placed(n))
            os.write(1, b"stored %d\\n" % n)
            await anyio.sleep(0.005)

if sys.argv[2] == "asyncio":
    import asyncio
    run = asyncio.run
else:
    import trio
    run = trio.run
try:
    run(main) if sys.argv[2] == "trio" else run(main())
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
left = [t.name for t in threading.enumerate() if t.name.startswith("eventbus")]
handles = []
for fd in os.listdir("/proc/self/fd"):
    try:
        handles.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
os.write(1, f"left {left} {[h for h in handles if h.startswith(sys.argv[1])]}\\n".encode())
"""


@pytest.mark.parametrize("load", ["busy", "waiting"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c(db: str, backend: str, load: str) -> None:
    """Ctrl-C ends the program in order: KeyboardInterrupt comes out, nothing is left, what was acknowledged is stored."""
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, db, backend, load], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        said: list[str] = []
        while said.count("handled") < 2:
            said.append(program.stdout.readline().strip())
            assert said[-1], program.communicate()
        program.send_signal(signal.SIGINT)
        rest, errors = program.communicate(timeout=15)
    finally:
        program.kill()
        program.wait()
    said += rest.split("\n")
    assert said[-3:] == ["interrupted", "left [] []", ""], (said[-10:], errors)
    assert program.returncode == 0, errors
    assert "Traceback" not in errors, errors

    stored = max(int(line.split()[1]) for line in said if line.startswith("stored "))

    async def numbers() -> list[int]:
        async with EventBus(db) as bus:
            bus.subscribe  # noqa: B018  # a bus without subscriptions reads the log all the same
            return [int(envelope.data.decode().split(":")[1].strip("} ")) async for envelope in bus.history()]

    assert anyio.run(numbers)[: stored + 1] == list(range(stored + 1))


TWICE = """
import asyncio, os, sys, threading, time
import attrs
from eventbus import EventBus

@attrs.frozen
class Placed:
    n: int

bus = EventBus(sys.argv[1])

@bus.subscribe(Placed)
async def handler(placed: Placed) -> None:
    os.write(1, b"handling\\n")
    await asyncio.sleep(3600)

async def main() -> None:
    async with bus:
        await bus.publish(Placed(1))
        await asyncio.sleep(3600)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    os.write(1, b"interrupted\\n")
"""


def test_ctrl_c_twice(db: str) -> None:
    """A second Ctrl-C, while the bus lets a handler finish, ends the program at once; the delivery comes again."""
    program = subprocess.Popen([sys.executable, "-c", TWICE, db], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "handling\n"
        program.send_signal(signal.SIGINT)
        time.sleep(0.2)  # the first has ended the body; the bus waits for its handler
        program.send_signal(signal.SIGINT)
        rest, errors = program.communicate(timeout=5)
    finally:
        program.kill()
        program.wait()
    assert rest == "interrupted\n", errors

    seen = Recorder()
    bus = EventBus(db)
    bus.subscribe(Placed, name="handler")(seen.note)

    async def again() -> None:
        async with bus:
            assert await bus.drain(20) == {}

    anyio.run(again)
    assert seen.seen == [Placed(1)]


class Service:
    """As users write them: it has a bus, handles its events, and keeps its receipts."""

    def __init__(self) -> None:
        self.bus = EventBus(":memory:")
        self.bus.subscribe(Placed, name="s")(self.handle)
        self.receipts: list[object] = []

    async def handle(self, event: Placed) -> None:
        """Nothing to do."""

    async def run(self) -> None:
        """Open, publish, close."""
        async with self.bus:
            self.receipts.append(await self.bus.publish(Placed(1)))
            await self.bus.drain(timeout=20)


async def test_a_closed_bus_is_collected() -> None:
    """Whoever keeps receipts and a bus in one object leaves nothing behind."""
    service = Service()
    await service.run()
    gone = weakref.ref(service)
    del service
    gc.collect()
    assert gone() is None
