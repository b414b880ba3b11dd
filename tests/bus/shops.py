"""What the tests of several instances share: a bus with one subscription, and stores in which something can be made to happen."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import attrs
from anyio.abc import TaskStatus

from eventbus import EventBus
from eventbus._running import Running
from eventbus.errors import StoreBusy
from eventbus.stores.base import Batch, Command, Committed, Query
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import Recorder

T = TypeVar("T")


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
    assert shop.bus._running is not None
    return shop.bus._running


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
