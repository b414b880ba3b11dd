"""The simulated store: the oracle, with what a disk does to one: slow, failing, and gone in the middle.

publish → journal → *store* → lanes → workers → outcome. It sees every transaction that takes place, so it is also what the truth
is read from: `Truth` is told of it.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import attrs

from eventbus.errors import (
    EventBusError,
    PublishOutcomeUnknown,
    StoreBusy,
    StoreCorrupt,
    StoreFull,
    StoreLost,
    StoreUnavailable,
)
from eventbus.stores.base import Batch, Committed, Instance, Query
from tests.simulation.clockwork import Scheduler
from tests.simulation.disk import Disk
from tests.simulation.oracle import Oracle

T = TypeVar("T")

_DEFINITE = (StoreBusy, StoreFull, StoreUnavailable)
_FATAL = (StoreLost, StoreCorrupt)


@attrs.define
class Weather:
    """How likely what is, for each call; all 0 when the world is good."""

    slow: float = 0.0
    refuses: float = 0.0
    unknown: float = 0.0
    fatal: float = 0.0
    blind: float = 0.0
    crash: float = 0.0


class Truth(Protocol):
    """Who is told what has really happened."""

    def took_place(self, batch: Batch, committed: Committed) -> None:
        """A transaction is durable; nobody else knows yet."""


class FaultyStore(Oracle):
    """An oracle in this weather."""

    def __init__(self, disk: Disk, scheduler: Scheduler, weather: Weather, truth: Truth) -> None:
        super().__init__(disk, shared=True, monotonic=lambda: scheduler.now)
        self._scheduler = scheduler
        self._weather = weather
        self._truth = truth
        self._ended = False

    def _happens(self, likelihood: float) -> bool:
        return self._scheduler.random.random() < likelihood

    def _take_time(self) -> None:
        random, slow = self._scheduler.random, self._happens(self._weather.slow)
        self._scheduler.sleep(random.random() * (0.7 if slow else 0.002))

    def _maybe_crash(self) -> None:
        if self._happens(self._weather.crash):
            self._scheduler.crash()

    def open(self, instance: Instance) -> None:
        """Open, or refuse."""
        if self._happens(self._weather.refuses):
            raise StoreUnavailable("the weather")
        super().open(instance)

    def commit(self, batch: Batch) -> Committed:
        """Before it takes place, it may be refused; after that, the answer may be lost."""
        if self._ended:
            raise StoreLost("the weather, still")
        self._take_time()
        self._maybe_crash()
        weather, random = self._weather, self._scheduler.random
        if self._happens(weather.refuses):
            raise random.choice(_DEFINITE)("the weather")
        fatal, unknown = self._happens(weather.fatal), self._happens(weather.unknown)
        if not fatal and (not unknown or random.random() < 0.5):
            committed = super().commit(batch)
            self._truth.took_place(batch, committed)
        self._maybe_crash()
        if fatal:
            self._ended = True
            raise random.choice(_FATAL)("the weather")
        if unknown:
            raise PublishOutcomeUnknown([record.id for group in batch.appends for record in group])
        self._take_time()
        self._maybe_crash()
        return committed

    def read(self, query: Query[T]) -> T:
        """Read, a little earlier or later."""
        self._take_time()
        if self._happens(self._weather.blind):
            error: EventBusError = StoreUnavailable("the weather")
            raise error
        answer = super().read(query)
        self._take_time()
        return answer
