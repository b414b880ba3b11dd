"""A commit whose outcomes are given up, since nothing that the store says can be relied upon: none that comes later stands for them."""

from __future__ import annotations

import threading

import anyio.to_thread
import attrs
import pytest

from eventbus import EventBus, EventBusError, StoreCorrupt
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY


@attrs.frozen
class Noted:
    n: int


@attrs.frozen
class Done:
    n: int


class Fails(SQLiteStore):
    """Its first commit of outcomes fails, when later ones wait to be written; those after it would do."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(path)
        self.error: Exception | None = error
        self.begun, self.later = threading.Event(), threading.Event()

    def commit(self, batch: Batch) -> Committed:
        """Fail once."""
        error, self.error = (self.error, None) if batch.units else (None, self.error)
        if error is not None:
            self.begun.set()
            self.later.wait(5)
            raise error
        return super().commit(batch)


@pytest.mark.parametrize("error", [StoreCorrupt("a page is damaged"), ZeroDivisionError("a fault of the store's")])
async def test_no_later_outcome_stands_for_one_that_was_given_up(db: str, error: Exception) -> None:
    """The bus stops, and what was not written is delivered again: what each attempt has published is there once."""
    store = Fails(db, error)

    async def handle(event: Noted) -> Done:
        if event.n == 1:
            await anyio.to_thread.run_sync(store.begun.wait)
        elif event.n == 3:  # the outcomes before this one have been handed in
            store.later.set()
        return Done(event.n)

    bus = EventBus(store)
    bus.subscribe(Noted, name="note", retry=NO_RETRY)(handle)
    with pytest.raises((EventBusError, ExceptionGroup)):
        async with bus:
            await bus.publish_many([Noted(n) for n in range(5)])
            await bus.drain(5)
    again = EventBus(db)
    again.subscribe(Noted, name="note", retry=NO_RETRY)(handle)
    async with again:
        assert await again.drain(5) == {}
        assert sorted([envelope.event.n async for envelope in again.history(Done)]) == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
