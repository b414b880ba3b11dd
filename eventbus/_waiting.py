"""Waiting for the end of an event's way: `Receipt.handled` and `drain`.

publish → journal → store → lanes → workers → *outcome* → journal → store. Both wait for lanes to be clear up to a position, which
they are when everything up to it is settled and the store knows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio

from eventbus._lanes import Cascade, Lane
from eventbus._model import DeliveryStatus, Receipt
from eventbus._outcomes import current_attempt
from eventbus.errors import HandlingFailed, UnknownEvent, WaitTimeout
from eventbus.stores.base import DeadLetterFilter, DeadLetters, Find, Lag, LagOfRows, Record, since_of

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher, Serving
    from eventbus._reader import Reader
    from eventbus._status import Status


class Waiting:
    """Waits for lanes."""

    def __init__(self, dispatcher: Dispatcher, reader: Reader, status: Status) -> None:
        self._dispatcher = dispatcher
        self._reader = reader
        self._status = status

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
        blocked = await self._blocked_elsewhere(record)
        await self._dispatcher.all_lanes()
        lanes = self._dispatcher.lanes_of(record)
        for lane in lanes:
            reason = self._deadlock(lane, record) or (None if lane.has_settled(record) else lane.hindrance_of(record))
            if reason is not None:
                blocked[lane.holder.options.name] = reason
        if not blocked:
            for lane in lanes:
                reason = await lane.wait_settled(record)
                if reason is not None:
                    blocked[lane.holder.options.name] = reason
                    break
        if blocked:
            self._dispatcher.check_open()
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

    async def _blocked_elsewhere(self, record: Record) -> dict[str, str]:
        """Subscriptions that are not dispatched here and have not handled it."""
        others = {
            name: reason
            for name, (stored, reason) in self._dispatcher.others.items()
            if (since := since_of(stored.since, record.type)) is not None and since < record.position
        }
        if not others:
            return {}
        done = (DeliveryStatus.HANDLED, DeliveryStatus.DEAD)
        try:
            statuses = await self._status.of(record.id)
        except UnknownEvent:
            return {}  # retention has removed it: everybody had settled it
        return {name: reason for name, reason in others.items() if statuses.get(name) not in done}

    def _deadlock(self, lane: Lane, record: Record) -> str | None:
        attempt = current_attempt.get()
        if attempt is None or attempt.over or attempt.lane is not lane:
            return None
        if lane.concurrency > 1 and attempt.record is not record:
            return None
        return "called from inside the lane that would have to handle it"

    # -------------------------------------------------------------- everything

    async def drain(self, timeout: float | None) -> Mapping[str, int]:
        """See `EventBus.drain`."""
        head = self._dispatcher.head
        cascade = Cascade(head)
        cascades = self._dispatcher.environment.cascades
        cascades.append(cascade)
        try:
            with anyio.move_on_after(math.inf if timeout is None else timeout):
                await self._drain(head, cascade)
        finally:
            cascades.remove(cascade)
        self._dispatcher.check_open()
        last = max([head, *(record.position for record in cascade.found)])
        return await self._left(last)

    async def _drain(self, head: int, cascade: Cascade) -> None:
        await self._dispatcher.all_lanes()
        for serving in list(self._dispatcher.servings.values()):
            await self._clear_all(serving, head)
            redriven = False
            while serving.paused is None and not serving.closed and not serving.redriver.idle and not serving.redriver.hindered:
                self._dispatcher.check_open()
                await serving.redriver.wait_for_change()
                redriven = True
            if redriven:
                await self._clear_all(serving, head)  # what was parked behind a dead letter follows it
        found = 0
        while found < len(cascade.found):
            record = cascade.found[found]
            found += 1
            await self._dispatcher.all_lanes()
            for lane in self._dispatcher.lanes_of(record):
                await self._clear(lane, record.position)

    async def _clear_all(self, serving: Serving, head: int) -> None:
        for lane in list(serving.lanes.values()):
            await self._clear(lane, head)

    async def _clear(self, lane: Lane, position: int) -> None:
        attempt = current_attempt.get()
        if attempt is None or attempt.over or attempt.lane is not lane:
            await lane.wait_clear(position)

    async def _left(self, head: int) -> Mapping[str, int]:
        left: dict[str, int] = {}
        for name, serving in self._dispatcher.servings.items():
            count = 0
            if serving.parks() or not all(lane.clear_to(head) for lane in serving.lanes.values()):
                count = await self._count(serving, head)
            count += serving.redriver.known
            if count:
                left[name] = count
        return left

    async def _count(self, serving: Serving, head: int) -> int:
        count, _ = await self._reader.ask(LagOfRows(serving.options.name, serving.exact_types()))
        for lane in serving.lanes.values():
            if not lane.clear_to(head):
                types, slots = serving.reads(lane)
                lag, _ = await self._reader.ask(Lag(lane.stored, types, slots, until=head))
                count += max(0, lag - len(lane.log.done()))
        return count
