"""The dispatcher: which subscriptions are dispatched, and which of their lanes an event is for.

publish → journal → store → *lanes* → workers → outcome. The journal announces what it has committed; the dispatcher offers it to
the feeds of every subscription that wants its type, in the log's order, together with what others have committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from eventbus._environment import Environment
from eventbus._intake import READ_AGAIN, Budget, Feed, runs_by_type
from eventbus._lanes import Lane
from eventbus._probation import Probation
from eventbus._reader import report
from eventbus._serving import ONE_LANE, Serving
from eventbus._tail import Tail
from eventbus.errors import BusNotOpen, EventBusError
from eventbus.hooks import DispatchHalted
from eventbus.stores.base import Committed, LaneState, Notice, Record, Subscribed, Suspicion, Types, Waiting

if TYPE_CHECKING:
    from eventbus._decoding import Decoder
    from eventbus._encoding import Encoder
    from eventbus._loop import Waiter

_log = logging.getLogger("eventbus")


class Dispatcher:
    """All subscriptions that are dispatched, and the way of an event to them."""

    def __init__(self, environment: Environment, decoder: Decoder, encoder: Encoder, budget: Budget) -> None:
        self.environment = environment
        self.decoder = decoder
        self.encoder = encoder
        self.budget = budget
        self.servings: dict[str, Serving] = {}
        self.others: dict[str, tuple[Subscribed, str]] = {}
        """Stored subscriptions that are not dispatched here, and why."""
        self.known_types: set[str] = set()
        self.heard = 0
        """How often it was found that others have published."""
        self.tail = Tail(environment.reader, environment.loop, self._feeds, self._offer)
        self.published = 0
        self.leaving = False
        self.crash: EventBusError | None = None
        self.on_crash: Callable[[EventBusError], object] = lambda _error: None
        self.on_new_lane: Callable[[Serving, str], object] = lambda _serving, _type: None
        self.on_notice: Callable[[Notice], object] = lambda _notice: None
        self.on_renewal_due: Callable[[], object] = lambda: None
        self.on_lane_lost: Callable[[], object] = lambda: None
        self.on_pause: Callable[[], object] = lambda: None
        self.declared: set[str] = set()
        """Names of the subscriptions of this program, dispatched or not."""
        self.closing = False
        self.pins: list[int] = []
        self.promotions: dict[str, list[Waiter]] = {}
        self._routes: dict[str, tuple[Feed, ...]] = {}
        self._await_lanes: list[Waiter] = []

    # -------------------------------------------------------------- what the journal tells

    def announce(self, committed: Committed) -> None:
        """Offer what has become durable to the lanes that it is for."""
        for follow in self.environment.committed:
            follow(committed.events)
        self.published += len(committed.events)
        if committed.previous_head > self.tail.end:
            self._others_published()
        self.tail.committed(committed)
        if self.promotions:
            self.tell_promoted(record.id for record in committed.events)

    def _offer(self, records: Sequence[Record]) -> None:
        for type, run in runs_by_type(records):
            feeds = self._routes.get(type)
            for feed in self._route(type) if feeds is None else feeds:
                feed.offer(type, run)

    def _feeds(self) -> Iterator[Feed]:
        for serving in self.servings.values():
            yield from serving.feeds.values()

    def noticed(self, notice: Notice) -> None:
        """Others have written: events, or anything else."""
        if notice.head > self.tail.end:
            self._others_published()
            self.tail.extend(notice.head)
        self.on_notice(notice)

    def renewal_due(self) -> None:
        """The lease must be renewed."""
        self.on_renewal_due()

    def _others_published(self) -> None:
        """There may be types for which a lane is wanted, and events that somebody here has scheduled."""
        self.heard += 1
        if any(serving.options.order == "type" and serving.exact_types() is None for serving in self.servings.values()):
            self.look_for_types()
        self._tell_promotions()

    def look_for_types(self) -> None:
        """Ask for the types in the log, and for lanes for those that are new."""
        self.environment.reader.ask_then(Types(), self._on_types)

    def _on_types(self, known: Mapping[str, int] | BaseException) -> None:
        if isinstance(known, BaseException):
            report("the types in the log", known)
            self.environment.timers.after(READ_AGAIN, self.look_for_types)
            return
        for type in known.keys() - self.known_types:
            self.known_types.add(type)
            for serving in self.servings.values():
                if serving.options.order == "type" and serving.wants(type):
                    self.on_new_lane(serving, type)

    def tell_promoted(self, event_ids: Iterable[str]) -> None:
        """Scheduled events are in the log, or are cancelled."""
        for event_id in event_ids:
            for waiter in self.promotions.pop(event_id, ()):
                waiter.set()

    def _tell_promotions(self) -> None:
        for waiters in self.promotions.values():
            for waiter in waiters:
                waiter.set()

    def halt(self, error: EventBusError) -> None:
        """Outcomes cannot be written: start no further attempt, or handlers would run for nothing, again and again."""
        self._halt()
        self.environment.notify(DispatchHalted(error))

    def proceed(self) -> None:
        """Outcomes can be written again."""
        self.environment.halted = self.leaving
        self.wake_all()

    def crashed(self, error: EventBusError, *, told: bool) -> None:
        """The journal has stopped for good."""
        self.environment.halted = True
        self.crash = error
        for serving in self.servings.values():
            serving.close()
        if not told:
            self.on_crash(error)

    def leave(self) -> None:
        """The bus is to end: start no further attempt; those that run come to their end."""
        self.leaving = True
        self._halt()

    def _halt(self) -> None:
        self.environment.halted = True
        for lane in self.lanes():
            lane.recall()

    def close(self) -> None:
        """Give out nothing any more, for good; those who wait for something are told."""
        self.closing = True
        for serving in self.servings.values():
            serving.close()
        self.tail.close()
        self._tell_promotions()
        self.lanes_changed()

    def check_open(self) -> None:
        """Raise `BusNotOpen` if what is waited for can come no more."""
        if self.closing:
            raise BusNotOpen("the bus was closed meanwhile; what was waited for goes on when it is opened again")

    # -------------------------------------------------------------- lanes

    def wake_all(self) -> None:
        """Have every lane look for something to do."""
        for lane in self.lanes():
            lane.wake()

    def lanes(self) -> list[Lane]:
        """All lanes."""
        return [lane for serving in self.servings.values() for lane in serving.lanes.values()]

    def lanes_of(self, record: Record) -> list[Lane]:
        """The lanes that an event belongs to."""
        wanted = [s.lane_of(record) for s in self.servings.values() if s.accepts(record)]
        return [lane for lane in wanted if lane is not None]

    def add_lane(
        self,
        serving: Serving,
        state: LaneState,
        waiting: Sequence[Waiting] = (),
        last: Mapping[str, int] | None = None,
        suspicion: Suspicion | None = None,
    ) -> None:
        """A lane has been claimed; see `Serving.begin_lane`. With a suspicion it is on probation."""
        self._routes.clear()
        lane = serving.add_lane(state, waiting, self.budget)
        if suspicion is not None and self.environment.solo is not None:
            Probation(lane, suspicion, self.environment, self.environment.solo)
        serving.begin_lane(lane, last)

    def drop_lane(self, lane: Lane) -> None:
        """Another instance has it."""
        serving = self.servings.get(lane.holder.options.name)
        if serving is not None and serving.lanes.get(lane.name) is lane:
            serving.remove_lane(lane, self.budget)
        self._routes.clear()
        self.on_lane_lost()

    def lanes_changed(self) -> None:
        """A lane that the store was asked for is there, or will not be."""
        waiters, self._await_lanes = self._await_lanes, []
        for waiter in waiters:
            waiter.set()

    async def written(self) -> None:
        """Wait until what was settled before the call is written."""
        for lane in self.lanes():
            lane.flush()
        await self.environment.journal.written()

    async def all_lanes(self) -> None:
        """Wait until the lanes that the store is asked for are there."""
        while any(serving.claiming for serving in self.servings.values()):
            waiter = self.environment.loop.waiter()
            self._await_lanes.append(waiter)
            await waiter.wait()
            self.check_open()

    def follow(self, stored: Subscribed) -> None:
        """A subscription is stored otherwise than before."""
        if stored.name in self.servings:
            self.servings[stored.name].follow(stored)
        elif stored.name in self.others:
            self.others[stored.name] = (stored, self.others[stored.name][1])

    def set_pause(self, name: str, reason: str | None) -> None:
        """A pause or, with None, a resume from here is stored."""
        serving = self.servings.get(name)
        if serving is None:
            if name in self.others:
                stored, why = self.others[name]
                self.others[name] = (msgspec.structs.replace(stored, paused=reason), why)
        elif reason is None:
            serving.resume()
        elif serving.paused != reason:  # a step may have seen it first
            serving.pause(reason)

    def note_others(self, stored: Iterable[Subscribed]) -> None:
        """Remember the stored subscriptions that are not dispatched here, and report those without a handler, once."""
        known = set(self.others)
        self.others.clear()
        for each in stored:
            if each.name in self.servings:
                continue
            reason = "not dispatched here" if each.name in self.declared else "no handler"
            self.others[each.name] = (each, reason)
            if reason == "no handler" and each.name not in known:
                _log.warning(
                    "the stored subscription %r has no handler in this program; its events wait. "
                    "Import the module that registers it, or remove it with `await bus.unsubscribe(%r)`",
                    each.name,
                    each.name,
                )

    def remove(self, serving: Serving) -> None:
        """A subscription is there no more."""
        serving.close()
        self.servings.pop(serving.options.name, None)
        self.forget_routes()
        self.lanes_changed()

    def forget_routes(self) -> None:
        """Subscriptions or their types have changed."""
        self._routes.clear()

    def _route(self, type: str) -> tuple[Feed, ...]:
        feeds = []
        for serving in self.servings.values():
            if not serving.wants(type):
                continue
            if serving.options.order != "type":
                feeds += [serving.feeds[ONE_LANE]] if ONE_LANE in serving.feeds else []
            elif type in serving.feeds:
                feeds.append(serving.feeds[type])
            else:
                self.on_new_lane(serving, type)
        self.known_types.add(type)
        self._routes[type] = tuple(feeds)
        return self._routes[type]
