"""What the tests of several instances share: a bus with one subscription, and stores in which something can be made to happen."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import attrs
from anyio.abc import TaskStatus

from eventbus import Delivery, EventBus
from eventbus._running import Running
from eventbus.errors import StoreBusy
from eventbus.stores.base import Batch, Command, Committed, Query, lane_of_slot, slot_of
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import Recorder

T = TypeVar("T")

LONG = 1_000.0
"""A lease that is not renewed while a test runs, so that no step is taken but for a reason."""


@attrs.frozen
class Placed:
    n: int


@attrs.frozen
class Paid:
    n: int


class Shop:
    """A bus with one subscription, and what it has handled."""

    def __init__(self, db: str, *types: type, **options: Any) -> None:
        self.bus = EventBus(db, lease=options.pop("lease", 10.0))
        self.seen: Recorder = Recorder()
        self.bus.subscribe(*(types or (Placed,)), name="stock", **options)(self.handle)  # type: ignore[arg-type]

    async def handle(self, event: Placed | Paid) -> None:
        self.seen.add(event.n)

    @property
    def lanes(self) -> set[str]:
        running = self.bus._running
        return set() if running is None else {lane.name for lane in running.dispatcher.servings["stock"].lanes.values()}


@contextlib.asynccontextmanager
async def opened(*shops: Shop) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for shop in shops:
            await stack.enter_async_context(shop.bus)
        yield


def running(shop: Shop) -> Running:
    return running_of(shop.bus)


def running_of(bus: EventBus) -> Running:
    assert bus._running is not None
    return bus._running


async def stay(bus: EventBus, leave: anyio.Event, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
    """Keep a bus open in a task of its own, so that it can leave before those that were opened after it."""
    async with bus:
        task_status.started()
        await leave.wait()


async def until(shops: Sequence[Shop], *sizes: int) -> None:
    """Wait until the shops have so many lanes."""
    with anyio.fail_after(10):
        while [len(shop.lanes) for shop in shops] != list(sizes):
            await anyio.lowlevel.checkpoint()


class Lapsing(SQLiteStore):
    """A store whose clock for leases stands still for its bus and can be moved on: as for a process that was stopped."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.ahead = 0.0
        self.stopped_at: float | None = None

    def monotonic(self) -> float:
        now = super().monotonic() + self.ahead
        return now if self.stopped_at is None else min(now, self.stopped_at)


class Counting(SQLiteStore):
    """A store that counts what it is asked."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads = 0

    def read(self, query: Query[T]) -> T:
        self.reads += 1
        return super().read(query)


class Refusing(SQLiteStore):
    """A store that is busy whenever commands of some kind are to be carried out; none to begin with."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.refused: type[Command[Any]] | tuple[()] = ()

    def commit(self, batch: Batch) -> Committed:
        if any(isinstance(command, self.refused) for command in batch.commands):
            raise StoreBusy("refused by the test")
        return super().commit(batch)


class Gated(Shop):
    """A shop whose handler waits until it is let go on: always, or in replays alone."""

    def __init__(self, db: str, *, replays: bool = False) -> None:
        super().__init__(db, order="key", concurrency=2, lease=LONG)
        self.begun = Recorder()
        self.go_on = anyio.Event()
        self._replays = replays
        self.bus = EventBus(db, lease=LONG)
        self.bus.subscribe(Placed, name="stock", order="key", concurrency=2)(self.wait)

    async def wait(self, event: Placed, delivery: Delivery) -> None:
        self.begun.add(event.n)
        if delivery.replaying or not self._replays:
            await self.go_on.wait()
        self.seen.add(event.n)


class Held(Shop):
    """A shop whose handler waits, for each event that has a gate, until that is opened."""

    def __init__(self, db: str, concurrency: int, count: int) -> None:
        super().__init__(db, order="key", concurrency=concurrency, lease=LONG)
        self.begun = Recorder()
        self.gates = [anyio.Event() for _ in range(count)]

    async def handle(self, event: Placed | Paid) -> None:
        self.begun.add(event.n)
        await self.gates[event.n].wait()
        self.seen.add(event.n)


def key_in(lane: str, lanes: int) -> str:
    """A key of which the events are in this lane."""
    return next(key for key in map(str, itertools.count()) if str(lane_of_slot(slot_of(key), lanes)) == lane)


def shop_of(db: str) -> Shop:
    return Shop(db, order="key", concurrency=2, lease=LONG)


async def publish(shop: Shop, count: int = 16) -> None:
    for n in range(count):
        await shop.bus.publish(Placed(n), key=n)


async def quiet_work(shop: Shop) -> None:
    """Work that asks the store for nothing, and takes longer than hundreds of questions."""
    for n in range(100):
        await shop.bus.publish(Paid(n))
