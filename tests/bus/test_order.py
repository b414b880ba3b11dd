"""Order: in each of the four modes, under failures, across restarts, and where lanes change between live and behind."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventbus._intake
import eventbus._loose
import eventbus._running
from eventbus import Delivery, Draft, Envelope, EventBus, Reject, RetryPolicy, event
from eventbus.stores.base import Order
from tests.bus.support import Recorder, hold_up_first_crossing

SOON = RetryPolicy(attempts=20, first=0.002, factor=1.0, jitter=1.0)
"""Retries at once, at random moments, for longer than any of these tests makes something fail."""


@event("number", key="key")
@attrs.frozen
class Number:
    key: str
    n: int


@event("letter", key="key")
@attrs.frozen
class Letter:
    key: str
    n: int


@attrs.frozen
class Run:
    """One run of a handler, written down when it begins."""

    position: int
    attempt: int
    type: str
    key: str | None


def run_of(delivery: Delivery) -> Run:
    envelope = delivery.envelope
    return Run(envelope.position, delivery.attempt, envelope.type, envelope.key)


def check_serial(runs: Iterable[Run], positions: Iterable[int]) -> None:
    """Every position has its turn, in order, with all of its attempts before the next one begins."""
    order: list[int] = []
    attempts: dict[int, list[int]] = defaultdict(list)
    for run in runs:
        if not order or order[-1] != run.position:
            order.append(run.position)
        attempts[run.position].append(run.attempt)
    assert order == sorted(positions)
    for position, made in attempts.items():
        assert made == list(range(1, len(made) + 1)), f"attempts at {position}"


def firsts(runs: Iterable[Run]) -> list[int]:
    return [run.position for run in runs if run.attempt == 1]


def grouped(runs: Iterable[Run], by: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[by(run)].append(run)
    return groups


class Flaky:
    """A handler that fails for some events, at times, and writes down each of its runs."""

    def __init__(self, share: float, seed: int = 1) -> None:
        self.runs: list[Run] = []
        self._share = share
        self._random = random.Random(seed)

    def __call__(self, event: object, delivery: Delivery) -> None:
        self.runs.append(run_of(delivery))
        if self._random.random() < self._share:
            raise ValueError("at times")


def subscribe(bus: EventBus, name: str, handler: Flaky, order: Order, **options: Any) -> None:
    @bus.subscribe(Number, Letter, name=name, order=order, retry=SOON, **options)
    async def handle(event: Number | Letter, delivery: Delivery) -> None:
        handler(event, delivery)


def some_events(count: int, keys: int) -> list[Number | Letter]:
    return [(Number if n % 3 else Letter)(f"k{n % keys}", n) for n in range(count)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues and pages so small that every lane falls behind again and again."""
    monkeypatch.setattr(eventbus._intake, "QUEUE", 3)
    monkeypatch.setattr(eventbus._intake, "PAGE", 5)


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the bytes of about six events in all lanes together, so that lanes make each other forget what waits."""
    monkeypatch.setattr(eventbus._running, "WAITING_BYTES", 4_000)
    monkeypatch.setattr(eventbus._intake, "PAGE", 8)


@pytest.fixture(params=["roomy", "tiny", "cramped"])
def room(request: pytest.FixtureRequest) -> str:
    """How much may wait in lanes: as always, few events, or few bytes."""
    if request.param != "roomy":
        request.getfixturevalue(request.param)
    return str(request.param)


def read(db: str, question: str) -> Any:
    """The one value that the tables answer with."""
    connection = sqlite3.connect(db)
    try:
        (value,) = connection.execute(question).fetchone()
        return value
    finally:
        connection.close()


async def publish_from_several_tasks(bus: EventBus, events: list[Number | Letter], tasks: int = 4) -> None:
    async def publish(share: list[Number | Letter]) -> None:
        for n in range(0, len(share), 7):
            if n % 2:
                await bus.publish(share[n])
                await bus.publish_many(share[n + 1 : n + 7])
            else:
                await bus.publish_many(share[n : n + 7])

    async with anyio.create_task_group() as group:
        for task in range(tasks):
            group.start_soon(publish, events[task::tasks])


# ------------------------------------------------------------------ the four modes


@pytest.mark.usefixtures("room")
async def test_order_type_is_strict_for_each_type(db: str) -> None:
    """In order "type" an event is begun when the one before it of its type is settled, also while others retry."""
    bus, flaky = EventBus(db), Flaky(0.2)
    subscribe(bus, "s", flaky, "type")
    async with bus:
        await publish_from_several_tasks(bus, some_events(200, 7))
        assert await bus.drain(timeout=10) == {}
        log = [e async for e in bus.history()]
    runs = grouped(flaky.runs, lambda run: run.type)
    for type_name in ("number", "letter"):
        check_serial(runs[type_name], [e.position for e in log if e.type == type_name])


@pytest.mark.usefixtures("room")
async def test_order_log_is_strict_over_all_types(db: str) -> None:
    """In order "log" an event is begun when the one before it, of whatever type, is settled."""
    bus, flaky = EventBus(db), Flaky(0.2)
    subscribe(bus, "s", flaky, "log")
    async with bus:
        await publish_from_several_tasks(bus, some_events(150, 7))
        assert await bus.drain(timeout=10) == {}
        log = [e async for e in bus.history()]
    check_serial(flaky.runs, [e.position for e in log])


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("keys", [1, 7, 1_000])
async def test_order_key_is_strict_for_each_key(db: str, keys: int) -> None:
    """In order "key" an event is begun when the one before it of its key is settled, at any number of keys."""
    bus, flaky = EventBus(db), Flaky(0.15)
    subscribe(bus, "s", flaky, "key")
    async with bus:
        await publish_from_several_tasks(bus, some_events(150 if keys < 1_000 else 2_000, keys))
        assert await bus.drain(timeout=20) == {}
        log = [e async for e in bus.history()]
    runs = grouped(flaky.runs, lambda run: run.key)
    for key in {e.key for e in log}:
        check_serial(runs[key], [e.position for e in log if e.key == key])


@pytest.mark.usefixtures("room")
async def test_first_deliveries_of_a_lane_are_in_position_order_while_others_retry(db: str) -> None:
    """First deliveries come in position order in a lane of order "key" and "none", whatever is being tried again."""
    bus, by_key, free = EventBus(db), Flaky(0.15), Flaky(0.15)
    subscribe(bus, "one lane", by_key, "key", concurrency=1)
    subscribe(bus, "free", free, "none", concurrency=1)
    async with bus:
        # Each key once, for an event behind a failed one of its key has its first delivery when that is settled.
        await publish_from_several_tasks(bus, some_events(150, 1_000))
        assert await bus.drain(timeout=10) == {}
    for flaky in (by_key, free):
        assert len(firsts(flaky.runs)) == 150
        assert firsts(flaky.runs) == sorted(firsts(flaky.runs))


async def test_order_none_runs_up_to_concurrency_at_once(db: str) -> None:
    """In order "none" `concurrency` deliveries run at once, and never more."""
    bus, recorder = EventBus(db), Recorder()
    running, most, go_on = 0, 0, anyio.Event()

    @bus.subscribe(Number, order="none", concurrency=5)
    async def handle(event: Number) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        recorder.add(event.n)
        await go_on.wait()
        await anyio.lowlevel.checkpoint()
        running -= 1

    async with bus:
        await bus.publish_many([Number("a", n) for n in range(40)])
        await recorder.wait_for(5)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert len(recorder.seen) == 5
        go_on.set()
        assert await bus.drain(timeout=20) == {}
    assert most == 5
    assert sorted(recorder.seen) == list(range(40))


async def test_order_none_with_threads_runs_up_to_concurrency_at_once(db: str) -> None:
    """Plain handlers in order "none" run `concurrency` at once: a slow one holds up none of the others."""
    bus, recorder = EventBus(db), Recorder()
    others_done = threading.Event()

    @bus.subscribe(Number, order="none", concurrency=3)
    def handle(event: Number) -> None:
        if event.n < 2:
            assert others_done.wait(5)
        recorder.add(event.n)

    async with bus:
        await bus.publish_many([Number("a", n) for n in range(60)])
        await recorder.wait_for(58, timeout=20)
        assert set(recorder.seen) == set(range(2, 60))
        others_done.set()
        assert await bus.drain(timeout=20) == {}


async def test_lanes_of_keys_run_beside_each_other(db: str) -> None:
    """In order "key" as many keys as there are lanes may be handled at once, each of them by one delivery."""
    bus, recorder = EventBus(db), Recorder()
    running: set[str] = set()
    go_on = anyio.Event()

    @bus.subscribe(Number, order="key", concurrency=4)
    async def handle(event: Number) -> None:
        assert event.key not in running
        running.add(event.key)
        recorder.add(len(running))
        await go_on.wait()
        running.remove(event.key)

    async with bus:
        await bus.publish_many([Number(f"k{n % 50}", n) for n in range(200)])
        assert max(await recorder.wait_for(4)) == 4
        go_on.set()
        assert await bus.drain(timeout=20) == {}
        assert (await bus.dead_letters.list()) == []


# ------------------------------------------------------------------ what one thing does to another


@pytest.mark.usefixtures("room")
async def test_a_stalled_lane_loses_nothing_while_others_are_busy(db: str) -> None:
    """A lane that stands still falls behind, and finds everything in order when it goes on."""
    bus = EventBus(db)
    stalled, go_on = Flaky(0.0), anyio.Event()
    busy = Flaky(0.0)
    subscribe(bus, "busy", busy, "log")

    @bus.subscribe("*", name="stalled", order="log")
    async def handle(envelope: Envelope, delivery: Delivery) -> None:
        await go_on.wait()
        stalled(envelope, delivery)

    async with bus:
        receipts = [await bus.publish(each) for each in some_events(100, 7)]
        while len(busy.runs) < 100:
            await anyio.lowlevel.checkpoint()
        go_on.set()
        receipts += await bus.publish_many(some_events(50, 7))
        assert await bus.drain(timeout=10) == {}
    assert firsts(stalled.runs) == firsts(busy.runs) == [r.position for r in receipts]


async def test_an_event_that_takes_long_does_not_stop_the_checkpoint(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order "none" one slow event holds up neither the others nor the checkpoint; after a stop it is delivered again."""
    monkeypatch.setattr(eventbus._loose, "WINDOW", 10)
    slow_once = True

    def make(recorder: Recorder) -> EventBus:
        bus = EventBus(db)

        @bus.subscribe(Number, name="s", order="none", concurrency=3)
        async def handle(event: Number) -> None:
            if event.n == 0 and slow_once:
                await anyio.sleep_forever()
            recorder.add(event.n)

        return bus

    first, second = Recorder(), Recorder()
    bus = make(first)
    async with bus.open(stop_timeout=0):
        receipts = await bus.publish_many([Number("a", n) for n in range(50)])
        assert await first.wait_for(49) == list(range(1, 50))
        await receipts[-1].handled(timeout=20)
        assert read(db, "SELECT checkpoint FROM lanes") >= 30
    slow_once = False
    async with make(second):
        assert await second.wait_for(1) == [0]
        await anyio.lowlevel.checkpoint()
    assert second.seen == [0]


async def test_what_has_a_row_and_is_given_back_comes_again(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that has not come to its thread when the subscription is paused comes again, also where it blocked the window."""
    monkeypatch.setattr(eventbus._loose, "WINDOW", 2)
    gate = hold_up_first_crossing(monkeypatch)
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe(Number, order="none", concurrency=3)
    def handle(event: Number) -> None:
        recorder.add(event.n)

    async with bus:
        await bus.publish_many([Number("a", n) for n in range(20)])
        assert len(await recorder.wait_for(19)) == 19
        await bus.pause(handle)
        gate.set()
        await bus.resume(handle)
        assert await bus.drain(timeout=20) == {}
    assert sorted(recorder.seen) == list(range(20))


async def test_what_is_given_back_is_not_passed_by_the_checkpoint(db: str) -> None:
    """An attempt that is released at the stop comes again, although a later one of its lane was settled after it."""
    seen: list[tuple[int, int]] = []

    def make(*, block: bool) -> EventBus:
        bus = EventBus(db)
        started, released = anyio.Event(), anyio.Event()

        @bus.subscribe(Number, name="s", order="none", concurrency=2)
        async def handle(event: Number, delivery: Delivery) -> None:
            if block and event.n == 0:
                started.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    released.set()
            elif block:
                with anyio.CancelScope(shield=True):
                    await started.wait()
                    both.set()
                    await released.wait()
                    await anyio.lowlevel.checkpoint()
                    await anyio.lowlevel.checkpoint()
            seen.append((event.n, delivery.attempt))

        return bus

    both = anyio.Event()
    bus = make(block=True)
    async with bus.open(stop_timeout=0):
        await bus.publish_many([Number("a", 0), Number("b", 1)])
        await both.wait()
    assert seen == [(1, 1)]
    async with make(block=False) as bus:
        assert await bus.drain(timeout=20) == {}
    assert seen == [(1, 1), (0, 1)]


async def test_what_is_done_above_the_checkpoint_is_stored(db: str) -> None:
    """Once `handled` has returned, an event does not come again after a restart, also one behind another that takes long."""
    seen: list[int] = []

    def make() -> EventBus:
        bus = EventBus(db)

        @bus.subscribe(Number, name="s", order="none", concurrency=2)
        async def handle(event: Number) -> None:
            if event.n == 0 and block:
                await anyio.sleep_forever()
            seen.append(event.n)

        return bus

    block = True
    bus = make()
    async with bus.open(stop_timeout=0):
        await bus.publish(Number("a", 0))
        receipt = await bus.publish(Number("b", 1))
        await receipt.handled(timeout=20)
        assert str(receipt.position) in read(db, "SELECT done FROM lanes")
    block = False
    async with make() as bus:
        assert await bus.drain(timeout=20) == {}
    assert seen == [1, 0]


# ------------------------------------------------------------------ restarts


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("order", ["type", "log", "key", "none"])
async def test_order_holds_across_restarts(db: str, order: Order) -> None:
    """However often the bus is stopped, each event is settled once, in the order of its lane, its attempts counted on."""
    flaky = Flaky(0.2, seed=7)
    events = some_events(120, 7)
    for round in range(6):
        bus = EventBus(db)
        subscribe(bus, "s", flaky, order)
        async with bus.open(stop_timeout=0):
            before = len(flaky.runs)
            await bus.publish_many(events[round * 20 : (round + 1) * 20])
            while len(flaky.runs) < before + 5:
                await anyio.lowlevel.checkpoint()
    bus = EventBus(db)
    subscribe(bus, "s", flaky, order)
    async with bus:
        assert await bus.drain(timeout=10) == {}
        log = [e async for e in bus.history()]
    by: Callable[[Run], Any] = {
        "type": lambda run: run.type,
        "log": lambda _run: None,
        "key": lambda run: run.key,
        "none": lambda run: run.position,
    }[order]
    for runs in grouped(flaky.runs, by).values():
        check_serial(runs, {run.position for run in runs})
    assert {run.position for run in flaky.runs} == {e.position for e in log}


# ------------------------------------------------------------------ random programs


@attrs.frozen
class Program:
    """What is published (batches of keys), how events fail, and how little may wait in lanes."""

    batches: list[list[int]]
    failures: list[int]  # of event n: failures[n % len]; 9: rejected
    stops: set[int]
    queue: int
    page: int
    bytes: int
    window: int
    held: int


PROGRAMS = st.builds(
    Program,
    batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=8),
    failures=st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 9]), min_size=1, max_size=17),
    stops=st.sets(st.integers(0, 7), max_size=2),
    queue=st.integers(1, 6),
    page=st.integers(2, 9),
    bytes=st.sampled_from([700, 2_000, 5_000, 1_000_000]),
    window=st.integers(1, 8),
    held=st.integers(1, 4),
)
ORDERS: dict[str, Order] = {"by type": "type", "by log": "log", "by key": "key", "free": "none", "one lane": "key"}


class Checked:
    """Handlers in all modes that fail as a program says, and what they did."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.runs: dict[str, list[Run]] = defaultdict(list)
        self.acked: dict[str, list[int]] = defaultdict(list)

    def bus(self, path: str) -> EventBus:
        bus = EventBus(path)
        retry = RetryPolicy(attempts=5, first=0.001, factor=1.0, jitter=1.0)
        for name, order in ORDERS.items():
            many = {"one lane": 1, "by key": 3, "free": 3}.get(name)
            bus.subscribe(Number, Letter, name=name, order=order, concurrency=many, retry=retry)(self.handler(name))
        return bus

    def handler(self, name: str) -> Any:
        async def handle(event: Number | Letter, delivery: Delivery) -> None:
            self.runs[name].append(run_of(delivery))
            failures = self.program.failures[event.n % len(self.program.failures)]
            if failures == 9:
                raise Reject("by the program")
            if delivery.attempt <= failures:
                raise ValueError("by the program")
            self.acked[name].append(delivery.envelope.position)

        return handle

    def check(self, log: list[Envelope], dead: dict[str, set[int]]) -> None:
        positions = {e.position for e in log}
        for name, order in ORDERS.items():
            runs, acked = self.runs[name], self.acked[name]
            assert sorted([*acked, *dead[name]]) == sorted(positions), f"{name}: each is settled once"
            by: Callable[[Run], Any] = {
                "type": lambda run: run.type,
                "log": lambda _run: None,
                "key": lambda run: run.key,
                "none": lambda run: run.position,
            }[order]
            for group in grouped(runs, by).values():
                check_serial(group, {run.position for run in group})
            assert {run.position for run in runs} == positions


@given(PROGRAMS)
@settings(deadline=None, max_examples=12)
async def test_random_programs_keep_order_and_settle_once(program: Program) -> None:
    """Whatever is published, fails, stops and falls behind: every subscription settles each event once, in its order."""
    checked, count = Checked(program), 0
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as directory:
        patch.setattr(eventbus._intake, "QUEUE", program.queue)
        patch.setattr(eventbus._intake, "PAGE", program.page)
        patch.setattr(eventbus._running, "WAITING_BYTES", program.bytes)
        patch.setattr(eventbus._loose, "WINDOW", program.window)
        patch.setattr(eventbus._loose, "HELD", program.held)
        path = str(Path(directory) / "bus.db")
        opening = checked.bus(path).open(stop_timeout=0)
        bus = await opening.__aenter__()
        for number, batch in enumerate(program.batches):
            kinds = [Number if key % 2 else Letter for key in batch]
            drafts = [Draft(kind(f"k{key}", count + i)) for i, (kind, key) in enumerate(zip(kinds, batch, strict=True))]
            count += len(batch)
            await bus.publish_many(drafts)
            if number in program.stops:
                await opening.__aexit__(None, None, None)
                opening = checked.bus(path).open(stop_timeout=0)
                bus = await opening.__aenter__()
        try:
            assert await bus.drain(timeout=20) == {}
            log = [e async for e in bus.history()]
            letters = await bus.dead_letters.list()
        finally:
            await opening.__aexit__(None, None, None)
    dead: dict[str, set[int]] = defaultdict(set)
    for letter in letters:
        assert letter.envelope.position not in dead[letter.subscription]
        dead[letter.subscription].add(letter.envelope.position)
    checked.check(log, dead)
