"""Waiting for the end of an event's way: `Receipt.handled` and `drain`.

publish → journal → store → lanes → workers → *outcome* → journal → store. Both wait for lanes to be clear up to a position, which
they are when everything up to it is settled and the store knows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anyio

from eventbus._elsewhere import OWN_LANE
from eventbus._lanes import MOVED, Lane
from eventbus._model import Receipt
from eventbus._outcomes import current_attempt
from eventbus.errors import HandlingFailed, UnknownEvent, WaitTimeout
from eventbus.stores.base import DeadLetterFilter, DeadLetters, Find, Lag, LagOfRows, LogState, Record

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher
    from eventbus._elsewhere import Elsewhere
    from eventbus._reader import Reader
    from eventbus._serving import Serving


class Cascade:
    """What follows from the events up to a position: those that their handlers publish, and what follows from these."""

    def __init__(self, until: int) -> None:
        self._until = until
        self._extra: set[int] = set()
        self.found: list[Record] = []

    def follow(self, records: Sequence[Record]) -> None:
        """These have come into the log."""
        for record in records:
            if record.cause and (record.cause <= self._until or record.cause in self._extra):
                self._extra.add(record.position)
                self.found.append(record)


class Waiting:
    """Waits for lanes."""

    def __init__(self, dispatcher: Dispatcher, reader: Reader, elsewhere: Elsewhere) -> None:
        self._dispatcher = dispatcher
        self._reader = reader
        self._elsewhere = elsewhere

    # -------------------------------------------------------------- one event

    async def handled(self, record: Record | None, receipt: Receipt, timeout: float | None) -> None:
        """See `Receipt.handled`. The record is at hand unless the receipt is that of a duplicate."""
        self._dispatcher.environment.loop.check()
        with anyio.move_on_after(math.inf if timeout is None else timeout) as scope:
            await self._handled(record, receipt)
        if scope.cancelled_caught:
            raise WaitTimeout(f"event {receipt.id} was not handled by every subscription within {timeout} s; the work goes on")

    async def _handled(self, record: Record | None, receipt: Receipt) -> None:
        if record is None or not record.position:
            record = await self._in_log(receipt)
        blocked = {} if record is None else await self._blocked_by(record)
        rows = await self._reader.ask(DeadLetters(DeadLetterFilter(event_id=receipt.id)))
        if rows or blocked:
            raise HandlingFailed([self._dispatcher.decoder.dead_letter(row) for row in rows], blocked)

    async def _blocked_by(self, record: Record) -> dict[str, str]:
        """Wait until an event is settled; or at once, the subscriptions that do not settle it for now, and why."""
        blocked = await self._elsewhere.settled(record, at_once=True)
        while not blocked:
            await self._dispatcher.all_lanes()
            await self._announced(record.position)
            found = await self._blocked_here(record)
            blocked = {name: reason for name, reason in found.items() if reason != MOVED}
            blocked = blocked or await self._elsewhere.settled(record)
            if all(lane.has_settled(record) for lane in self._dispatcher.lanes_of(record)):
                break  # also in those that have come here meanwhile
        if blocked:
            self._dispatcher.check_open()
        return blocked

    async def _blocked_here(self, record: Record) -> dict[str, str]:
        """The same, of the lanes that are here."""
        lanes = self._dispatcher.lanes_of(record)
        blocked = {}
        for lane in lanes:
            reason = self._deadlock(lane, record) or (None if lane.has_settled(record) else lane.hindrance_of(record))
            if reason is not None:
                blocked[lane.holder.options.name] = reason
        if not blocked:
            for lane in lanes:
                reason = await lane.wait_settled(record)
                if reason is not None:
                    return {lane.holder.options.name: reason}
        return blocked

    async def _in_log(self, receipt: Receipt) -> Record | None:
        """The stored record; of a scheduled event, once it is due. None: retention has removed it, settled by everybody."""
        event_id = receipt.id
        while True:
            waiter = self._dispatcher.environment.loop.waiter()
            self._dispatcher.promotions.setdefault(event_id, []).append(waiter)
            try:
                record = await self._reader.ask(Find(event_id))
                if record is None and receipt.position is not None:
                    return None
                if record is None:
                    raise UnknownEvent(f"the event {event_id} is not there any more: cancelled, or removed by retention")
                if record.position:
                    return record
                await waiter.wait()
                self._dispatcher.check_open()
            finally:
                waiters = self._dispatcher.promotions.get(event_id, [])
                if waiter in waiters:
                    waiters.remove(waiter)
                if not waiters:
                    self._dispatcher.promotions.pop(event_id, None)

    def _deadlock(self, lane: Lane, record: Record) -> str | None:
        attempt = current_attempt.get()
        if attempt is None or attempt.over or attempt.lane is not lane:
            return None
        if lane.concurrency > 1 and attempt.record is not record:
            return None
        return OWN_LANE

    # -------------------------------------------------------------- everything

    async def drain(self, timeout: float | None) -> Mapping[str, int]:
        """See `EventBus.drain`."""
        # What others have published need not have been noticed yet.
        stored = (await self._reader.ask(LogState())).head
        head = max(stored, self._dispatcher.tail.head)  # what comes after it is followed from here on
        cascade = Cascade(head)
        committed = self._dispatcher.environment.committed
        committed.append(cascade.follow)
        try:
            with anyio.move_on_after(math.inf if timeout is None else timeout):
                await self._drain(head, cascade)
        finally:
            committed.remove(cascade.follow)
        self._dispatcher.check_open()
        last = max([head, *(record.position for record in cascade.found)])
        return await self._left(last)

    async def _drain(self, head: int, cascade: Cascade) -> None:
        await self._announced(head)
        await self._elsewhere.looked()
        await self._dispatcher.all_lanes()
        for serving in list(self._dispatcher.servings.values()):
            await self._clear_all(serving, head)
            redriver, redriven = serving.redriver, False
            while not serving.closed and not redriver.idle and not redriver.hindered:
                if serving.paused is not None and not redriver.reading:
                    break
                self._dispatcher.check_open()
                await redriver.wait_for_change()
                redriven = True
            redriven = await self._elsewhere.redriven(serving) or redriven
            if redriven and serving.paused is None:
                await self._clear_all(serving, head)  # what was parked behind a dead letter follows it
        found = 0
        while found < len(cascade.found):
            record = cascade.found[found]
            found += 1
            await self._announced(record.position)
            await self._dispatcher.all_lanes()
            for lane in self._dispatcher.lanes_of(record):
                await self._clear(lane, record.position)
        if cascade.found:
            for serving in list(self._dispatcher.servings.values()):
                await self._elsewhere.clear(serving, cascade.found[-1].position)

    async def _announced(self, position: int) -> None:
        await self._dispatcher.tail.announced(position)
        self._dispatcher.check_open()

    async def _clear_all(self, serving: Serving, position: int) -> None:
        """Wait for all lanes of a subscription, wherever they are, also for those that move or are made anew meanwhile."""
        cleared: set[Lane] = set()
        while True:
            away = self._elsewhere.away(serving)
            for lane in [each for each in serving.lanes.values() if each not in cleared]:
                await self._clear(lane, position)
                cleared.add(lane)
            await self._elsewhere.clear(serving, position)
            joined = await self._elsewhere.joined(serving)
            if not joined and cleared >= {*serving.lanes.values()} and self._elsewhere.away(serving) <= away:
                return

    async def _clear(self, lane: Lane, position: int) -> None:
        attempt = current_attempt.get()
        if attempt is None or attempt.over or attempt.lane is not lane:
            await lane.wait_clear(position)

    async def _left(self, head: int) -> Mapping[str, int]:
        left = {name: await self._left_of(serving, head) for name, serving in list(self._dispatcher.servings.items())}
        return {name: count for name, count in left.items() if count}

    async def _left_of(self, serving: Serving, head: int) -> int:
        behind = [lane for lane in serving.lanes.values() if not lane.clear_to(head)]
        count = serving.redriver.known + await self._elsewhere.left(serving, head)
        if behind or serving.parks() or self._elsewhere.away(serving):
            count += (await self._reader.ask(LagOfRows(serving.options.name, serving.exact_types())))[0]
        for type in serving.lacking(self._dispatcher.known_types):
            after = serving.stored.settled_up_to(type)
            for name in [*serving.lanes]:
                count += (await self._reader.ask(Lag(after, (type,), serving.reads(name)[1], until=head)))[0]
        for lane in behind:
            types, slots = serving.reads(lane.name)
            lag, _ = await self._reader.ask(Lag(lane.stored, types, slots, until=head))
            count += max(0, lag - len(lane.log.done()))
        return count
