"""`python -m eventbus bench`: *the work*, what is asked of a bus, through its public API alone.

Each function here opens a bus on a new store, warms it up, and runs for as many events as it is told (or a few more).
The clock stops when everything is handled: the acks of all events are committed. Then each handler must have been called once for
each event, and `drain` have left nothing, or `BenchFailed` is raised. Handlers do nothing but count. On asyncio and trio.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence

import anyio
import anyio.lowlevel
import attrs

from eventbus import EventBus
from eventbus.cli.bench_floor import BATCH, BenchFailed
from eventbus.cli.bench_order import KEYS, KeyedOrder, Order, OrderPaid, keyed_orders, orders, paid
from eventbus.cli.demo_show import percentile
from eventbus.stores.base import Store

Where = str | os.PathLike[str] | Store

SLEEP = 0.001
"""Seconds that a sleeping handler sleeps."""

AT_ONCE = 16
"""Sleeping handlers at once; the default of `concurrency`."""

_WARM_UP = 10 * BATCH
"""Events before those that count."""

_PATIENCE = 120.0
"""Seconds after which what is not handled counts as lost."""


@attrs.frozen
class Throughput:
    """So many events, published and handled by every subscription, in so many seconds."""

    events: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Events per second."""
        return self.events / self.seconds


@attrs.frozen
class Singles:
    """Events that were published one at a time, each timed. All times are of `time.perf_counter`; one entry for each event.

    Attributes:
        tasks: that published.
        began, returned: when `publish` was called, and had returned.
        positions: of the events in the log.
        called: when the handler was called; by position, unlike the others.
    """

    throughput: Throughput
    tasks: int
    began: Sequence[float]
    returned: Sequence[float]
    positions: Sequence[int]
    called: Sequence[float]

    @property
    def events(self) -> int:
        """How many."""
        return self.throughput.events

    @property
    def seconds(self) -> float:
        """That all of it took."""
        return self.throughput.seconds

    @property
    def per_second(self) -> float:
        """Events per second."""
        return self.throughput.per_second

    def publishing(self, percent: int) -> float:
        """Seconds from the call of `publish` until it had returned."""
        return percentile(sorted(after - before for before, after in zip(self.began, self.returned, strict=True)), percent)

    def calling(self, percent: int) -> float:
        """Seconds from the call of `publish` until the handler was called."""
        return percentile(sorted(after - before for before, after in zip(self.by_position(), self.called, strict=True)), percent)

    def by_position(self) -> list[float]:
        """When `publish` was called, in the order of the log."""
        return [began for _, began in sorted(zip(self.positions, self.began, strict=True))]


class Tally:
    """A handler that counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def clear(self) -> None:
        """What came before does not count."""
        self.count = 0

    async def handle(self, _event: object) -> None:
        """Count."""
        self.count += 1

    def handle_in_thread(self, _event: object) -> None:
        """Count. One lane runs one handler at a time, so no count is lost."""
        self.count += 1

    async def handle_asleep(self, _event: object) -> None:
        """Sleep, then count."""
        await anyio.sleep(SLEEP)
        self.count += 1

    async def pay(self, order: Order) -> OrderPaid:
        """Count, and publish what follows."""
        self.count += 1
        return paid(order)


class Clocked(Tally):
    """A handler that counts, and notes when it was called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.called = array("d")

    def clear(self) -> None:
        """What came before does not count."""
        super().clear()
        self.called = array("d")

    async def handle(self, _event: object) -> None:
        """Note the time."""
        self.called.append(time.perf_counter())
        self.count += 1


# ------------------------------------------------------------------ publish_many


async def publish_many(store: Where, events: int, *, subscriptions: int = 1) -> Throughput:
    """`publish_many` of `BATCH`, awaited one after another; each event for so many subscriptions with an async handler."""
    bus = EventBus(store)
    tallies = [Tally(f"s{number}") for number in range(subscriptions)]
    for tally in tallies:
        bus.subscribe(Order, name=tally.name)(tally.handle)
    return await _batches(bus, orders(BATCH), events, tallies)


async def plain_handler(store: Where, events: int) -> Throughput:
    """The same with one handler that is a plain function, run in a thread."""
    bus, tally = EventBus(store), Tally("plain")
    bus.subscribe(Order, name=tally.name)(tally.handle_in_thread)
    return await _batches(bus, orders(BATCH), events, [tally])


async def key_order(store: Where, events: int) -> Throughput:
    """The same in order per key, over `KEYS` keys."""
    bus, tally = EventBus(store), Tally("keyed")
    bus.subscribe(KeyedOrder, name=tally.name, order="key")(tally.handle)
    return await _batches(bus, keyed_orders(KEYS), events, [tally])


async def sleeping_handlers(store: Where, events: int) -> Throughput:
    """The same in no order: `AT_ONCE` handlers at once, each of which sleeps for `SLEEP`."""
    bus, tally = EventBus(store), Tally("asleep")
    bus.subscribe(Order, name=tally.name, order="none", concurrency=AT_ONCE)(tally.handle_asleep)
    return await _batches(bus, orders(BATCH), events, [tally])


async def bare_sleepers(events: int) -> Throughput:
    """What sleeping handlers can do at most: as many tasks, without a bus, each of which sleeps again and again."""
    tally = Tally("bare")

    async def sleep(times: int) -> None:
        for _ in range(times):
            await tally.handle_asleep(None)

    each = -(-events // AT_ONCE)
    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(AT_ONCE):
            group.start_soon(sleep, each)
    seconds = time.perf_counter() - began
    check({"bare": tally.count}, each * AT_ONCE)
    return Throughput(each * AT_ONCE, seconds)


async def chains(store: Where, events: int) -> Throughput:
    """A handler that returns one event, and a second subscription that handles it. Counted in chains."""
    bus, first, second = EventBus(store), Tally("pay"), Tally("ship")
    bus.subscribe(Order, name=first.name)(first.pay)
    bus.subscribe(OrderPaid, name=second.name)(second.handle)
    return await _batches(bus, orders(BATCH), events, [first, second])


async def _batches(bus: EventBus, examples: Sequence[object], events: int, tallies: Sequence[Tally]) -> Throughput:
    batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]

    async def publish(number: int, start: Start) -> int:
        rounds = -(-number // BATCH)
        start()
        for each in range(rounds):
            await bus.publish_many(batches[each % len(batches)])
        return rounds * BATCH

    async with bus:
        return await _timed(bus, publish, events, tallies)


# ------------------------------------------------------------------ publish


async def many_tasks(store: Where, events: int, *, tasks: int = 100) -> Singles:
    """So many tasks, each of which publishes one event after another; one async handler. Starting the tasks is not counted."""
    bus, clocked, log = EventBus(store), Clocked("s"), _Log()
    bus.subscribe(Order, name=clocked.name)(clocked.handle)
    examples = orders(BATCH)

    async def publish(number: int, start: Start) -> int:
        each = -(-number // tasks)
        gate = anyio.Event()
        log.clear()
        async with anyio.create_task_group() as group:
            for task in range(tasks):
                group.start_soon(_publish_singly, bus, examples[task % BATCH], each, log, gate)
            await anyio.wait_all_tasks_blocked()
            start()
            gate.set()
        return each * tasks

    async with bus:
        throughput = await _timed(bus, publish, events, [clocked])
    return log.with_handler(throughput, tasks, clocked)


async def _publish_singly(bus: EventBus, order: Order, number: int, log: _Log, gate: anyio.Event) -> None:
    await gate.wait()
    for _ in range(number):
        await log.publish(bus, order)


async def one_task(store: Where, events: int) -> Singles:
    """One task that publishes an event, waits until the handler was called, and publishes the next."""
    bus, clocked, log = EventBus(store), Clocked("s"), _Log()
    bus.subscribe(Order, name=clocked.name)(clocked.handle)
    (order,) = orders(1)

    async def publish(number: int, start: Start) -> int:
        log.clear()
        start()
        for each in range(1, number + 1):
            await log.publish(bus, order)
            await _called(clocked, each)
        return number

    async with bus:
        throughput = await _timed(bus, publish, events, [clocked], warm_up=BATCH // 2)
    return log.with_handler(throughput, 1, clocked)


async def _called(clocked: Clocked, times: int) -> None:
    until = time.monotonic() + _PATIENCE
    while clocked.count < times:
        await anyio.lowlevel.checkpoint()
        if time.monotonic() > until:
            raise BenchFailed(f"the handler was not called within {_PATIENCE:g} s after its event was published")


class _Log:
    """When events were published, and where they came to lie. Arrays, which the garbage collector need not go through."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._began, self._returned, self._positions = array("d"), array("d"), array("q")

    async def publish(self, bus: EventBus, order: Order) -> None:
        clock = time.perf_counter
        began = clock()
        receipt = await bus.publish(order)
        self._returned.append(clock())
        self._began.append(began)
        self._positions.append(receipt.position or 0)

    def with_handler(self, throughput: Throughput, tasks: int, clocked: Clocked) -> Singles:
        return Singles(throughput, tasks, self._began, self._returned, self._positions, clocked.called)


# ------------------------------------------------------------------ warm up, run, check


Start = Callable[[], None]
"""Starts the clock, when all is prepared."""


async def _timed(
    bus: EventBus,
    publish: Callable[[int, Start], Awaitable[int]],
    events: int,
    tallies: Sequence[Tally],
    warm_up: int = _WARM_UP,
) -> Throughput:
    """Publish until everything is handled; `publish` returns how many events that were, at least as many as it was told."""
    await _handled(bus, await publish(min(events, warm_up), lambda: None), tallies)
    for tally in tallies:
        tally.clear()
    began = 0.0

    def start() -> None:
        nonlocal began
        began = time.perf_counter()

    published = await publish(events, start)
    await _handled(bus, published, tallies)
    return Throughput(published, time.perf_counter() - began)


async def _handled(bus: EventBus, published: int, tallies: Sequence[Tally]) -> None:
    left = await bus.drain(_PATIENCE)
    check({tally.name: tally.count for tally in tallies}, published, left)


def check(counts: Mapping[str, int], published: int, left: Mapping[str, int] | None = None) -> None:
    """Every handler was called once for each event, and nothing is left.

    Raises:
        BenchFailed: which was not.
    """
    if left:
        raise BenchFailed(f"not everything is handled after a drain; left: {dict(left)}")
    wrong = {name: count for name, count in counts.items() if count != published}
    if wrong:
        raise BenchFailed(f"{published:,} events were published, and handlers were called for another number: {wrong}")
