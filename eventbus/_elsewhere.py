"""Waiting for what other instances have in hand: lanes that are theirs, subscriptions that are not dispatched here.

publish → journal → store → lanes → workers → *outcome*, in another process. All that is known of it here is what it writes:
whenever others have written, and somebody waits, the lanes are read once, for all who do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from eventbus._model import DeliveryStatus
from eventbus.errors import UnknownEvent
from eventbus.stores.base import (
    Lanes,
    LaneState,
    Record,
    Subscribed,
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

_log = logging.getLogger("eventbus")

LaneStates = Mapping[tuple[str, str], LaneState]
_DONE = (DeliveryStatus.HANDLED, DeliveryStatus.DEAD)


class _Wait(msgspec.Struct, eq=False):
    """Someone who waits until `reached` may be true of the lanes as they are stored."""

    reached: Callable[[LaneStates], bool]
    waiter: Waiter


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
            _log.error("it could not be read how far other instances are: %s", lanes)
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

    async def _wait(self, reached: Callable[[LaneStates], bool]) -> None:
        wait = _Wait(reached, self._dispatcher.environment.loop.waiter())
        self._waits.append(wait)
        try:
            self.noticed()  # it may have been so before
            await wait.waiter.wait()
        finally:
            self._waits.remove(wait)
        self._dispatcher.check_open()

    # -------------------------------------------------------------- one event

    async def settled(self, record: Record, *, at_once: bool = False) -> dict[str, str]:
        """Wait until all subscriptions whose lane is not here have settled an event; or at once, those that do not settle it for
        now, and why. With `at_once`, no waiting in any case."""
        while True:
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
            await self._wait(lambda states, keys=keys: any(_has_passed(states.get(key), record.position) for key in keys))  # type: ignore[misc]

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
        if stored.paused is not None:
            return f"paused: {stored.paused}"
        serving = self._dispatcher.servings.get(name)
        served = [m.serves[name] for m in self._membership.standing.members if name in m.serves]
        if not served and serving is None:
            return self._dispatcher.others.get(name, (stored, "no handler"))[1]
        lane = _lane_of(stored, record)
        # Where it is served here and by nobody, the others have taken this instance for dead; it is about to be back.
        if served and all(lane in serves.cannot for serves in served):
            return "no instance can decode an event of its lane"
        if serving is not None and serving.waits_for is not None and not self._membership.serves_elsewhere(name):
            return serving.waits_for
        return None

    # -------------------------------------------------------------- everything of a subscription

    async def clear(self, serving: Serving, position: int) -> None:
        """Wait until the lanes of a subscription that are not here have settled all up to a position, or have come here, or
        nobody runs them."""
        while serving.paused is None and not serving.closed and await self.left(serving, position):
            if serving.waits_for is not None and not self._membership.serves_elsewhere(serving.options.name):
                return
            await self._wait(lambda _states: True)

    async def left(self, serving: Serving, position: int) -> int:
        """How many deliveries up to a position are not settled in lanes that are not here; those of the rows of `deliveries` are
        counted with them."""
        away = self._membership.lanes_of(serving.options.name) - serving.lanes.keys()
        return await self._status.unsettled(serving.stored, position, away) if away else 0


def _lane_of(stored: Subscribed, record: Record) -> str:
    return lane_name(stored.order, stored.concurrency, record.type, record.slot)


def _has_passed(state: LaneState | None, position: int) -> bool:
    return state is not None and (position <= state.checkpoint or position in state.done)
