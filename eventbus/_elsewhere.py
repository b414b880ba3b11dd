"""Waiting for what other instances have in hand: lanes that are theirs, subscriptions that are not dispatched here.

publish → journal → store → lanes → workers → *outcome*, in another process. All that is known of it here is what it writes:
whenever others have written, and somebody waits, the lanes are read once, for all who do.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from eventbus._model import DeliveryStatus
from eventbus._outcomes import current_attempt
from eventbus._reader import report
from eventbus.errors import UnknownEvent
from eventbus.stores.base import (
    DeadLetterFilter,
    DeadLetters,
    Lanes,
    LaneState,
    Record,
    Subscribed,
    WaitingRows,
    covers,
    lane_name,
    since_of,
)

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher
    from eventbus._loop import Waiter
    from eventbus._membership import Membership
    from eventbus._reader import Reader
    from eventbus._serving import Serving
    from eventbus._status import Status

LaneStates = Mapping[tuple[str, str], LaneState]
_DONE = (DeliveryStatus.HANDLED, DeliveryStatus.DEAD)
_PAGE = 100
OWN_LANE = "called from inside the lane that would have to handle it"
"""Why nothing comes of an event while who waits for it does."""
PATIENCE = 0.1
"""Seconds after which who waits for all of a subscription looks again, whatever has happened."""


class _Wait(msgspec.Struct, eq=False):
    """Someone who waits until others have written something with which `reached` is true of the lanes as they are stored."""

    waiter: Waiter
    reached: Callable[[LaneStates], bool] = lambda _states: True


class Elsewhere:
    """What other instances have in hand."""

    def __init__(self, dispatcher: Dispatcher, membership: Membership, reader: Reader, status: Status) -> None:
        self._dispatcher = dispatcher
        self._membership = membership
        self._reader = reader
        self._status = status
        self._waits: list[_Wait] = []
        self._reading = self._again = False

    # -------------------------------------------------------------- when others have written

    def noticed(self) -> None:
        """Others have written to the store."""
        if not self._waits:
            return
        if self._reading:
            self._again = True
            return
        self._reading, self._again = True, False
        self._reader.ask_then(Lanes(), self._on_lanes)

    def _on_lanes(self, lanes: tuple[LaneState, ...] | BaseException) -> None:
        self._reading = False
        if isinstance(lanes, BaseException):
            report("how far other instances are", lanes)
            self.stepped()  # those who wait ask for themselves, and raise what is wrong
            return
        states = {(state.subscription, state.lane): state for state in lanes}
        for wait in self._waits:
            if wait.reached(states):
                wait.waiter.set()
        if self._again:
            self.noticed()

    def stepped(self) -> None:
        """Instances may have come or gone, lanes may have moved, subscriptions may have been paused."""
        for wait in self._waits:
            wait.waiter.set()

    @contextmanager
    def _watching(self) -> Iterator[_Wait]:
        """Someone looks how things stand, and may wait then: what is written from the beginning of the look on ends the wait."""
        wait = _Wait(self._dispatcher.environment.loop.waiter())
        self._waits.append(wait)
        try:
            yield wait
        finally:
            self._waits.remove(wait)

    # -------------------------------------------------------------- one event

    async def settled(self, record: Record, *, at_once: bool = False) -> dict[str, str]:
        """Wait until all subscriptions whose lane is not here have settled an event; or at once, those that do not settle it for
        now, and why. With `at_once`, no waiting in any case."""
        while True:
            with self._watching() as wait:
                wanted = self._wanted_by(record)
                if not wanted:
                    return {}
                try:
                    statuses = await self._status.of(record.id)
                except UnknownEvent:
                    return {}  # retention has removed it: everybody had settled it
                left = [name for name in wanted if statuses.get(name) not in _DONE]
                hopeless = {name: reason for name in left if (reason := self._hindrance(wanted[name], record)) is not None}
                if hopeless or at_once:
                    return hopeless
                if not left:
                    if self._wanted_by(record).keys() <= wanted.keys():
                        return {}
                    continue  # a lane that was here has gone meanwhile
                keys = [(name, _lane_of(wanted[name], record)) for name in left]
                wait.reached = partial(_some_have_passed, keys, record.position)
                await wait.waiter.wait()
                self._dispatcher.check_open()

    def _wanted_by(self, record: Record) -> dict[str, Subscribed]:
        """The subscriptions that an event is for, but for those that have its lane here."""
        wanted = {}
        for stored in self._stored():
            since = since_of(stored.since, record.type)
            serving = self._dispatcher.servings.get(stored.name)
            if since is None or since >= record.position or (serving is not None and serving.lane_of(record) is not None):
                continue
            if not stored.settled_before(record.position, record.type, record.slot, record.key):
                wanted[stored.name] = stored
        return wanted

    def _stored(self) -> list[Subscribed]:
        """The subscriptions as far as they are known here."""
        here = [serving.stored for serving in self._dispatcher.servings.values()]
        return [*here, *(stored for stored, _ in self._dispatcher.others.values())]

    def _hindrance(self, stored: Subscribed, record: Record) -> str | None:
        """Why nothing comes of an event for now, if so."""
        name = stored.name
        serving = self._dispatcher.servings.get(name)
        paused = stored.paused if serving is None else serving.paused
        if paused is not None:
            return f"paused: {paused}"
        served = [m.serves[name] for m in self._membership.standing.members if name in m.serves]
        if not served and serving is None:
            return self._dispatcher.others.get(name, (stored, "no handler"))[1]
        is_served = not served or record.type in stored.derived or any(covers(each.types, record.type) for each in served)
        if not stored.holds(record.type) or not is_served:
            return f"no instance serves {record.type!r} for it"
        lane = _lane_of(stored, record)
        if _is_callers(name, lane):
            return OWN_LANE
        # Where it is served here and by nobody, the others have taken this instance for dead; it is about to be back.
        if served and all(lane in serves.cannot for serves in served):
            return "no instance can decode an event of its lane"
        if serving is not None and serving.waits_for is not None and not self._membership.serves_elsewhere(name):
            return serving.waits_for
        return None

    # -------------------------------------------------------------- everything of a subscription

    async def clear(self, serving: Serving, position: int) -> None:
        """Wait until the lanes of a subscription that are not here have settled all up to a position, or have come here, or
        nobody runs them. What is parked is not waited for."""
        await self._none(serving, lambda away: self._are_behind(serving, position, away))

    async def redriven(self, serving: Serving) -> bool:
        """Wait until all that is redriven in the lanes that are not here is settled, as `clear`. False if there was nothing."""
        return await self._none(serving, lambda away: self._redriven(serving, away, 1))

    async def looked(self) -> None:
        """Learn what others have changed by now: types that they have published first need lanes here."""
        if not self._membership.knows_all():
            await self._membership.look(self._dispatcher.check_open)

    async def joined(self, serving: Serving) -> bool:
        """Wait for types of it that could not join it while keys were parked, now that none is. False if there was none."""
        if not serving.lacks_types() or serving.closed or serving.waits_for is not None:
            return False
        rows = await self._reader.ask(WaitingRows(serving.options.name))
        if any(row.waiting.state == "parked" for row in rows):
            return False
        await self._membership.look(self._dispatcher.check_open)
        return True

    async def _none(self, serving: Serving, some: Callable[[Collection[str]], Awaitable[object]]) -> bool:
        """Wait until there is none left in the lanes that are not here. False if there was none."""
        waited = False
        while serving.paused is None and not serving.closed:
            with self._watching() as wait:
                away = {lane for lane in self.away(serving) if not _is_callers(serving.options.name, lane)}
                if not away or not await some(away):
                    break
                if serving.waits_for is not None and not self._membership.serves_elsewhere(serving.options.name):
                    break
                with anyio.move_on_after(PATIENCE):  # it may be paused here
                    await wait.waiter.wait()
                self._dispatcher.check_open()
                waited = True
        return waited

    async def _are_behind(self, serving: Serving, position: int, away: Collection[str]) -> bool:
        rows = [row for row in await self._reader.ask(WaitingRows(serving.options.name)) if row.lane in away]
        if any(row.waiting.state != "parked" and row.waiting.begins <= position for row in rows):
            return True
        return await self._status.behind(serving.stored, position, away) > 0

    async def _redriven(self, serving: Serving, away: Collection[str], most: float = math.inf) -> int:
        """How many dead letters are being redriven in these lanes; counted up to `most`."""
        which, count, after = DeadLetterFilter(subscription=serving.options.name, redriving=True), 0, 0
        while True:
            rows = await self._reader.ask(DeadLetters(which, after, _PAGE))
            count += sum(_lane_of(serving.stored, row.record) in away for row in rows)
            if count >= most or len(rows) < _PAGE:
                return count
            after = rows[-1].id

    def away(self, serving: Serving) -> set[str]:
        """The lanes that are not here, and that an instance can run."""
        name = serving.options.name
        meant: Collection[str] = self._membership.meant_for.get(name, ())
        if serving.waits_for is not None:
            meant = [each.lane for each in self._membership.standing.lanes if each.subscription == name]
        return {*meant} - serving.lanes.keys()

    async def left(self, serving: Serving, position: int) -> int:
        """How many deliveries up to a position are not settled in the lanes that are not here; without those that have rows."""
        away = (self.away(serving) | serving.nobodys) - serving.lanes.keys()
        if not away:
            return 0
        return await self._redriven(serving, away) + await self._status.behind(serving.stored, position, away)


def _is_callers(subscription: str, lane: str) -> bool:
    """Whether this is called from inside a lane that was lost meanwhile; it is not taken anew before the caller has ended."""
    attempt = current_attempt.get()
    if attempt is None or attempt.over or not attempt.lane.moved:
        return False
    return (attempt.lane.holder.options.name, attempt.lane.name) == (subscription, lane)


def _lane_of(stored: Subscribed, record: Record) -> str:
    return lane_name(stored.order, stored.concurrency, record.type, record.slot)


def _some_have_passed(keys: Sequence[tuple[str, str]], position: int, states: LaneStates) -> bool:
    return any(_has_passed(states.get(key), position) for key in keys)


def _has_passed(state: LaneState | None, position: int) -> bool:
    return state is not None and (position <= state.checkpoint or position in state.done)
