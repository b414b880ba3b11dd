"""What a bus does beside the events: put scheduled ones into the log when they are due, and prune.

publish → journal → store → lanes → workers → outcome: a scheduled event enters this way at the journal, when its time has come.
Each of these is one small command of the journal, so that none holds up anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from eventbus.errors import BusNotOpen, EventBusError
from eventbus.stores.base import NextDue, Promote, Prune

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher
    from eventbus._journal import Journal
    from eventbus._options import Keeping
    from eventbus._reader import Reader

_log = logging.getLogger("eventbus")

_PROMOTE = 500
_PRUNE = 500
_PRUNE_PAUSE = 0.05
_RETRY = 1.0


class Upkeep:
    """Two loops that run as long as the bus is open."""

    def __init__(self, dispatcher: Dispatcher, journal: Journal, reader: Reader, keeping: Keeping) -> None:
        self._dispatcher = dispatcher
        self._environment = dispatcher.environment
        self._journal = journal
        self._reader = reader
        self._keeping = keeping
        self._due = math.inf  # unix seconds; what is scheduled while the store is asked counts as well
        self._changed = self._environment.loop.waiter()

    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """What to run, each until cancelled."""
        return [self._promote, self._prune]

    def scheduled(self, due_at: float) -> None:
        """An event has been scheduled, or may have been."""
        if due_at < self._due:
            self._due = due_at
            self._changed.set()

    def look(self) -> None:
        """Others may have scheduled something, or have died with it."""
        self._changed.set()

    async def _promote(self) -> None:
        while True:
            self._changed, self._due = self._environment.loop.waiter(), math.inf
            try:
                self._next_is(await self._reader.ask(NextDue()))
                while self._due <= (now := self._environment.clock.time()):
                    self._due = math.inf
                    promoted = await self._journal.command(Promote(now, _PROMOTE))
                    for id, fault in promoted.damaged:
                        _log.error(
                            "scheduled event %s has come into the log damaged (%s); if its type is what is damaged, those who "
                            "subscribe to what it was do not get it: see `bus.history`",
                            id,
                            fault,
                        )
                    self._next_is(promoted.next_due)
                # At most a minute, so that a jump of the wall clock is noticed.
                delay = min(60.0, self._due - self._environment.clock.time())
            except BusNotOpen:
                return
            except EventBusError as error:
                _log.error("scheduled events could not be delivered, trying again: %s", error)
                delay = _RETRY
            self._environment.timers.after(max(0.0, delay), self._changed.set)
            await self._changed.wait()

    def _next_is(self, due: float | None) -> None:
        if due is not None:
            self._due = min(self._due, due)

    async def _prune(self) -> None:
        while True:
            try:
                await self.prune()
            except BusNotOpen:
                return
            except EventBusError as error:
                _log.error("retention could not be applied, trying again later: %s", error)
            await self._environment.sleep(self._keeping.prune_every)

    async def prune(self) -> None:
        """Remove what retention allows to remove, in small steps."""
        now, after = self._environment.clock.time(), 0
        keeping = self._keeping
        before = None if keeping.retention is None else now - keeping.retention
        while True:
            pinned = min(self._dispatcher.pins, default=None)
            command = Prune(before, now - keeping.dedup_for, after, _PRUNE, pinned)
            go_on = await self._journal.command(command)
            if go_on is None:
                return
            after = go_on
            await self._environment.sleep(_PRUNE_PAUSE)
