"""Working off what is in the log, beside F: a lane that catches up, a replay, and catching up while the loop publishes.

Catching up begins just before the bus is opened on a log whose events nobody has handled, and ends when all are handled and their
acks are committed. A replay begins with its call and ends when it returns. Nobody waits for the events meanwhile, as nobody does
after a start: `drain` would hurry the acks. Whether each event came once is checked by counting.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import attrs
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus import EventBus
from eventbus.cli.bench_floor import BATCH, remove
from eventbus.cli.bench_order import Order, orders
from eventbus.cli.bench_work import Throughput
from eventbus.cli.demo_show import percentile
from tests.benchmarks.rounds import alternate, at_least, events_of, floor_at, note_of, rounds_of, run_on, throughput_data
from tests.benchmarks.table import Row, Table

EVENTS = 100_000
"""In the log."""

_PATIENCE = 120.0
"""Seconds after which what is not handled counts as lost."""


class Reader:
    """A subscription that counts, and says when it has come to so many."""

    def __init__(self, bus: EventBus, wanted: int) -> None:
        self.count = 0
        self._wanted = wanted
        self.reached = anyio.Event()
        bus.subscribe(Order, name="reader")(self._handle)

    async def _handle(self, _order: Order) -> None:
        self.count += 1
        if self.count == self._wanted:
            self.reached.set()

    async def wait(self) -> None:
        """Until it has come to so many."""
        with anyio.fail_after(_PATIENCE):
            await self.reached.wait()


async def fill(path: Path, events: int) -> None:
    """A log of so many events that the subscription "reader" has not handled."""
    bus = EventBus(path)
    Reader(bus, events)
    batch = orders(BATCH)
    async with bus.open(dispatch=False):
        for _ in range(events // BATCH):
            await bus.publish_many(batch)


async def catch_up(path: Path, events: int) -> Throughput:
    """Open, and handle all there is."""
    bus = EventBus(path)
    reader = Reader(bus, events)
    began = time.perf_counter()
    async with bus:
        await reader.wait()
        left = await bus.drain(_PATIENCE)
        seconds = time.perf_counter() - began
    assert (reader.count, left) == (events, {})
    return Throughput(events, seconds)


async def replay(path: Path, events: int) -> Throughput:
    """All there is to a subscription that has handled nothing of it and wants none of it."""
    bus = EventBus(path)
    reader = Reader(bus, events)
    async with bus:
        began = time.perf_counter()
        summary = await bus.replay(to="reader")
        seconds = time.perf_counter() - began
    assert (reader.count, summary.handled, summary.dead) == (events, events, 0)
    return Throughput(events, seconds)


def on_a_copy(loop: str, source: Path, work: Callable[[Path, int], Awaitable[Throughput]], events: int) -> Throughput:
    """Work on a copy of a log that is closed, and so is one file."""
    path = source.with_name("copy.db")
    shutil.copy(source, path)
    try:
        return run_on(loop, work, path, events)
    finally:
        remove(path)


@pytest.mark.parametrize(("what", "order"), [("catching up", 100), ("replay", 101)])
def test_idle(
    what: str, order: int, backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool
) -> None:
    """From the log, with nothing else to do."""
    events, source = events_of(EVENTS, quick=quick), tmp_path / "log.db"
    run_on("asyncio", fill, source, events)
    if what == "replay":
        run_on("asyncio", catch_up, source, events)
    work = partial(on_a_copy, backend, source, catch_up if what == "catching up" else replay, events)
    rounds = alternate(benchmark, rounds_of(quick=quick), partial(floor_at, tmp_path / "floor.db", quick=quick), work)
    data = throughput_data(rounds)
    benchmark.extra_info.update(data)
    table.add(
        Row(
            f"{what} from the log, idle, {events:,} events",
            f"{at_least(data['ratio'])} F = {data['events_per_second']:,.0f} events/s",
            goal="≥ 0.7 F",
            met=data["ratio"] >= 0.7,
            backend=backend,
            note=note_of(data, "opening the bus is included" if what == "catching up" else ""),
            data=data,
            order=order,
        )
    )


# ------------------------------------------------------------------ while the loop publishes


CLOSE = 0.1
"""A lane has caught up when its handler has been called with all that was published so many seconds ago."""


@attrs.frozen
class Chase:
    """What became of a lane that was behind.

    Attributes:
        caught_up: seconds until it had; None if it never had.
        kept_up: whether it still had when publishing ended.
        offered, published: events that were to be published in `seconds`, and that were.
        left: events that the handler had not been called with when publishing ended.
        publishing: seconds that each `publish_many` took, ascending.
    """

    seconds: float
    caught_up: float | None
    kept_up: bool
    offered: int
    published: int
    left: int
    publishing: list[float]


class Watch:
    """Looks at how far the handler has come."""

    def __init__(self, reader: Reader, publisher: Publisher, behind: int) -> None:
        self._reader, self._publisher, self._behind = reader, publisher, behind
        self._published: deque[tuple[float, int]] = deque([(-CLOSE, 0)])
        self.caught_up: float | None = None
        self.close = False
        self.published = 0
        self.left = behind

    def look(self, now: float) -> None:
        """About once in a millisecond."""
        self.published = self._publisher.published
        self._published.append((now, self.published))
        while self._published[1][0] <= now - CLOSE:
            self._published.popleft()
        called = self._reader.count - self._behind
        self.left = max(0, self.published - called)
        self.close = called >= self._published[0][1]
        if self.close and self.caught_up is None:
            self.caught_up = now


class Publisher:
    """An open loop: what is due is published by `publish_many` of `BATCH`, each in a task of its own."""

    MOST = 300
    """Batches under way; beyond, even an open loop has to wait."""

    def __init__(self, bus: EventBus, per_second: float) -> None:
        self._bus, self._per_second = bus, per_second
        self._events = orders(BATCH)
        self._under_way = 0
        self.offered = self.published = 0
        self.seconds: list[float] = []

    async def run(self, seconds: float, look: Callable[[float], None]) -> None:
        """For so long; `look` is called about once in a millisecond, with the seconds since the start."""
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            while (now := time.perf_counter() - began) < seconds:
                self.offered = int(now * self._per_second)
                while self.published + self._under_way * BATCH < self.offered and self._under_way < self.MOST:
                    self._under_way += 1
                    group.start_soon(self._publish)
                look(now)
                await anyio.sleep(0.001)
            group.cancel_scope.shield = True  # what is under way comes to its end

    async def _publish(self) -> None:
        began = time.perf_counter()
        await self._bus.publish_many(self._events)
        self.seconds.append(time.perf_counter() - began)
        self._under_way -= 1
        self.published += BATCH


async def chase(path: Path, behind: int, per_second: float, seconds: float) -> Chase:
    """Open a bus whose lane is so far behind, and publish at this rate."""
    bus = EventBus(path)
    reader, publisher = Reader(bus, 0), Publisher(bus, per_second)
    watch = Watch(reader, publisher, behind)
    async with bus:
        await publisher.run(seconds, watch.look)
        left = await bus.drain(_PATIENCE)
    assert (reader.count, left) == (behind + publisher.published, {})
    offered, publishing = int(seconds * per_second), sorted(publisher.seconds)
    return Chase(seconds, watch.caught_up, watch.close, offered, watch.published, watch.left, publishing)


def test_behind(backend: str, table: Table, tmp_path: Path, quick: bool) -> None:
    """A lane that is behind catches up although the loop goes on publishing, at half of F."""
    events, seconds, source = events_of(EVENTS, quick=quick), 3.0 if quick else 15.0, tmp_path / "log.db"
    run_on("asyncio", fill, source, events)
    floor = floor_at(tmp_path / "floor.db", quick=quick).per_second
    found = run_on(backend, chase, source, events, floor / 2, seconds)
    data = {
        "floor_events_per_second": floor,
        "published_per_second": found.published / seconds,
        "offered_per_second": found.offered / seconds,
        "caught_up_seconds": float("nan") if found.caught_up is None else found.caught_up,
        "left": float(found.left),
        "publish_p50_ms": percentile(found.publishing, 50) * 1e3,
        "publish_p99_ms": percentile(found.publishing, 99) * 1e3,
    }
    kept = found.kept_up and found.published >= 0.95 * found.offered
    when = "it does not catch up" if found.caught_up is None else f"it catches up in {found.caught_up:.1f} s"
    if found.caught_up is not None and not found.kept_up:
        when += ", and falls behind again"
    table.add(
        Row(
            f"a lane {events:,} events behind while the loop publishes at half of F, {seconds:g} s",
            f"{when}; published at {at_least(found.published / seconds / floor)} F",
            goal="it catches up",
            met=kept and found.caught_up is not None,
            backend=backend,
            note=f"publish_many of {BATCH} meanwhile: p50 {data['publish_p50_ms']:.0f} ms, p99 {data['publish_p99_ms']:.0f} ms; "
            f"{found.left:,} events were not handled when publishing ended, all were a drain later; F = {floor:,.0f}/s",
            data=data,
            order=102,
        )
    )
