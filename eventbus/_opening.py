"""`async with bus`: one run of a bus, entered and left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from eventbus.errors import BusNotOpen

if TYPE_CHECKING:
    from eventbus._running import Running

Bus = TypeVar("Bus")


class Opening(Generic[Bus]):
    """What `EventBus.open` returns: enters and leaves one run of the bus."""

    def __init__(
        self, bus: Bus, start: Callable[[], Awaitable[Running]], ended: Callable[[], object], stop_timeout: float
    ) -> None:
        self._bus = bus
        self._start = start
        self._ended = ended
        self._stop_timeout = stop_timeout
        self._running: Running | None = None

    async def __aenter__(self) -> Bus:
        self._running = await self._start()
        return self._bus

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running = self._running
        if running is None:
            raise BusNotOpen("the bus is not open")
        running.check_leaving()
        self._running = None
        try:
            await running.stop(self._stop_timeout)
        finally:
            self._ended()
            await running.end_group(kind, error, traceback)
