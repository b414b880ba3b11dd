"""The dispatcher: which lanes there are, and which of them an event is for.

publish → journal → store → *lanes* → workers → outcome. The journal announces what it has committed; the dispatcher offers it to
the feeds of every subscription that wants its type. A `Serving` is one subscription while it is dispatched: its lanes, its
state, and how its handler is called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eventbus._intake import Budget, Feed, Intake, runs_by_type
from eventbus._lanes import Environment, Lane
from eventbus._loose import HeldSource, LooseSource
from eventbus._model import Delivery, Draft
from eventbus._outcomes import Attempt
from eventbus._side import Redriver
from eventbus._strict import StrictSource
from eventbus.errors import BusNotOpen, EventBusError, UndecodableEvent
from eventbus.hooks import DispatchHalted, SubscriptionPaused
from eventbus.stores.base import (
    SLOTS,
    Committed,
    LaneState,
    Order,
    Record,
    Subscribed,
    WaitingRow,
    since_of,
    slots_of,
    type_matches,
)

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from eventbus._decoding import Decoder
    from eventbus._encoding import Encoder
    from eventbus._loop import Waiter
    from eventbus._subscription import Subscription

_log = logging.getLogger("eventbus")

ONE_LANE = ""
"""Name of the lane of a subscription that has one for all its types."""


class Serving:
    """One subscription while it is dispatched."""

    def __init__(self, dispatcher: Dispatcher, options: Subscription, stored: Subscribed) -> None:
        self._dispatcher = dispatcher
        self.options = options
        self._takes_event = not options.takes_delivery and not options.takes_envelope
        self.types = self._types_of(stored)
        self.since = dict(stored.since)
        self.paused = stored.paused
        self.created_at = stored.created_at
        self._starts: dict[str, float] = {}
        self.lanes: dict[str, Lane] = {}
        self.claiming: set[str] = set()  # lanes that the store is asked for
        self.feeds: dict[str, Feed] = {}  # by lane for order "type", one for all lanes otherwise
        self.rewinding = False
        self.exclusive: object = None
        self.closed = False
        self.stuck = 0
        self.workers = 0
        self.delayed: list[Lane] = []
        self.handled = 0
        self.failed = 0
        self.redriver = Redriver(self, dispatcher.environment, self._want_lane)

    # -------------------------------------------------------------- types and lanes

    def _types_of(self, stored: Subscribed) -> tuple[str, ...]:
        """The types that it declares, and the subclasses of them that another program knew and this one has not imported.

        The events of these must not be passed by, so the lane waits at them.
        """
        knows = self._dispatcher.decoder.knows
        return (*stored.types, *(t for t in stored.derived if t not in stored.types and not knows(t)))

    def wants(self, type: str) -> bool:
        """Whether events of this type are for it."""
        return any(type_matches(pattern, type) for pattern in self.types)

    def exact_types(self) -> tuple[str, ...] | None:
        """The types to read from the log; None: all, and choose among them."""
        return None if any(pattern.endswith("*") for pattern in self.types) else self.types

    def start_of(self, type: str) -> float:
        """The position after which events of this type are for it; infinite where they are not."""
        start = self._starts.get(type)
        if start is None:
            since = since_of(self.since, type) if self.wants(type) else None
            start = self._starts[type] = math.inf if since is None else since
        return start

    def accepts(self, record: Record) -> bool:
        """Whether this event is for it."""
        return record.position > self.start_of(record.type)

    def retype(self, stored: Subscribed) -> None:
        """A type has joined it."""
        self.types, self.since = self._types_of(stored), dict(stored.since)
        self._starts.clear()
        for lane in self.lanes.values():
            if isinstance(lane.log, LooseSource):
                lane.log.held.types = self.exact_types()
        if self.options.order != "type":
            self.feeds[ONE_LANE].retype(self.exact_types())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Its lanes are being set back, or removed, in the store: give out nothing until that is done."""
        self.rewinding = True
        for lane in self.lanes.values():
            lane.recall()
        try:
            yield
        finally:
            self.rewinding = False
            for lane in self.lanes.values():
                lane.wake()

    def hold_back(self, replay: object) -> None:
        """Give out nothing but what belongs to this replay; with None, everything again. Nothing of it is stored."""
        self.exclusive = replay
        for lane in self.lanes.values():
            if replay is not None:
                lane.recall()
            lane.tell_waiters()
            lane.wake()
        self.redriver.changed()

    def rewound(self, after: int, states: Iterable[LaneState], rows: Sequence[WaitingRow]) -> None:
        """Its lanes have been set back, these rows are left; what they were doing does not count any more."""
        for name in self.since:
            self.since[name] = min(self.since[name], after)
        self._starts.clear()
        for state in states:
            lane = self.lanes.get(state.lane)
            if lane is not None:
                intake = lane.log.intake
                intake.reset(state.checkpoint)
                lane.restart(state, *self._sources(lane, intake, state, rows))
                intake.feed.read()
        self.redriver.kick()  # a redrive whose outcome was left out with the others is made again

    def lane_of(self, record: Record) -> Lane | None:
        """The lane that an event of it belongs to."""
        if self.options.order == "type":
            return self.lanes.get(record.type)
        if not self.wants(record.type):
            return None
        return next(lane for lane in self.lanes.values() if lane.log.intake is self.feeds[ONE_LANE].of(record))

    def parks(self) -> bool:
        """Whether a key of it is parked."""
        return any(lane.log.parked for lane in self.lanes.values())

    def free(self, rows: Sequence[WaitingRow]) -> None:
        """The store has freed what was parked in these rows."""
        for row in rows:
            lane = self.lanes.get(row.lane)
            if lane is not None:
                lane.log.free(row.waiting.position)

    def _want_lane(self, type: str) -> bool:
        """Ask for the lane of a type of which nothing is in the log; False if it is not for this subscription."""
        if not self.wants(type):
            return False
        self._dispatcher.on_new_lane(self, type)
        return True

    def reads(self, lane: Lane) -> tuple[tuple[str, ...] | None, tuple[int, int]]:
        """The types and the slots of a lane."""
        if self.options.order == "type":
            return (lane.name,), (0, SLOTS)
        types = self.exact_types()
        if types is None and "*" not in self.types:
            types = tuple(t for t in self._dispatcher.known_types if self.wants(t))
        return types, slots_of(lane.name, len(self.lanes)) if self.options.order == "key" else (0, SLOTS)

    def lanes_wanted(self, known: Iterable[str]) -> list[tuple[str, int]]:
        """Names and starts of its lanes, given the types that are in the log."""
        return lanes_wanted(self.options.order, self.options.concurrency, self.types, self.since, known)

    def add_lane(self, state: LaneState, rows: Sequence[WaitingRow], budget: Budget) -> Lane:
        """Make a lane from its stored state."""
        options, environment = self.options, self._dispatcher.environment
        lane = Lane(environment, self, state, options.concurrency if options.order == "none" else 1)
        feed = self._feed(state.lane)
        intake = Intake(feed, budget, state.checkpoint, lane.wake)
        feed.intakes.append(intake)
        lane.begin(*self._sources(lane, intake, state, rows))
        self.lanes[state.lane] = lane
        return lane

    def _sources(
        self, lane: Lane, intake: Intake, state: LaneState, rows: Sequence[WaitingRow]
    ) -> tuple[StrictSource] | tuple[LooseSource, HeldSource]:
        if self.options.order in ("type", "log"):
            return (StrictSource(lane, intake, state),)
        loose = LooseSource(lane, intake, state, by_key=self.options.order == "key")
        loose.held = HeldSource(lane, loose, self.accepts, self.exact_types())
        loose.held.load(row.waiting for row in rows if row.lane == state.lane)
        return loose, loose.held

    def _feed(self, lane: str) -> Feed:
        by_type = self.options.order == "type"
        name = lane if by_type else ONE_LANE
        if name not in self.feeds:
            types = (lane,) if by_type else self.exact_types()
            environment = self._dispatcher.environment
            self.feeds[name] = Feed(types, self.start_of, environment.reader, environment.timers, self._dispatcher.get_head)
        return self.feeds[name]

    # -------------------------------------------------------------- what lanes and workers ask of it

    def pause(self, reason: str) -> None:
        """Give out nothing any more; it is stored elsewhere."""
        self.paused = reason
        _log.warning("%s is paused: %s", self.options.name, reason)
        self._dispatcher.environment.notify(SubscriptionPaused(self.options.name, reason))
        for lane in self.lanes.values():
            lane.recall()
            lane.tell_waiters()
        self.redriver.changed()

    def resume(self) -> None:
        """Give out deliveries again; what waits starts at attempt 1."""
        self.paused = None
        for lane in self.lanes.values():
            lane.log.retry_now()
            lane.wake()

    def close(self) -> None:
        """Give out nothing any more, for good."""
        self.closed = True
        for feed in self.feeds.values():
            feed.closed = True
        for lane in self.lanes.values():
            lane.close()
        self.redriver.changed()

    def redriven(self, letter: int) -> None:
        """The store knows what became of a redriven dead letter."""
        self.redriver.ended(letter)

    def hindered(self) -> None:
        """A lane gives nothing out for now."""
        self.redriver.changed()

    def call(self, attempt: Attempt) -> object:
        """Call the handler with what it takes."""
        options, record = self.options, attempt.record
        if self._takes_event and record.event is not None:
            return options.handler(record.event)
        if record.fault is not None:
            raise UndecodableEvent(record.type, record.version, record.fault)
        decoder = self._dispatcher.decoder
        envelope = None if self._takes_event else decoder.envelope(record)
        event = envelope if options.takes_envelope else decoder.event(record)
        return options.handler(event) if not options.takes_delivery else options.handler(event, self._delivery(attempt, envelope))

    def _delivery(self, attempt: Attempt, envelope: object) -> Delivery:
        encoder = self._dispatcher.encoder

        def publish(
            event: object,
            *,
            key: object = None,
            idempotency_key: str | None = None,
            headers: Mapping[str, str] | None = None,
            due: datetime | timedelta | None = None,
        ) -> None:
            if attempt.over:
                raise BusNotOpen("this attempt is over; Delivery.publish belongs inside the handler")
            record = encoder.record(event, key=key, idempotency_key=idempotency_key, headers=headers, due=due)
            if attempt.outbox is None:
                attempt.outbox = []
            attempt.outbox.append(record)

        return Delivery(envelope, attempt.number, self.options.name, attempt.replaying, publish)  # type: ignore[arg-type]

    def published(self, attempt: Attempt, result: object) -> Sequence[Record]:
        """What the attempt publishes: its outbox, and the events that the handler returned."""
        encoder, outbox = self._dispatcher.encoder, attempt.outbox or []
        if result is None:
            return outbox
        returned: Sequence[object] = result if isinstance(result, (list, tuple)) else (result,)
        for item in returned:
            event = item.event if isinstance(item, Draft) else item
            if not encoder.is_event(event):
                raise TypeError(
                    f"the handler of {self.options.name!r} returned {event!r:.80}; "
                    "return None, an event, or a list of events or Drafts"
                )
        return [*outbox, *encoder.records(returned)]


def lanes_wanted(
    order: Order, concurrency: int, types: Sequence[str], since: Mapping[str, int], known: Iterable[str]
) -> list[tuple[str, int]]:
    """Names and starts of a subscription's lanes, given the types that are in the log."""
    if order == "type":
        exact = [t for t in types if not t.endswith("*")]
        exact += [t for t in known if t not in exact and any(type_matches(pattern, t) for pattern in types)]
        return [(t, since_of(since, t) or 0) for t in exact]
    start = min((since[t] for t in types), default=0)
    return [(str(n) if order == "key" else ONE_LANE, start) for n in range(concurrency if order == "key" else 1)]


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
        self.head = 0
        self.published = 0
        self.leaving = False
        self.crash: EventBusError | None = None
        self.on_crash: Callable[[EventBusError], object] = lambda _error: None
        self.on_new_lane: Callable[[Serving, str], object] = lambda _serving, _type: None
        self.on_foreign: Callable[[], object] = lambda: None
        self.closing = False
        self.pins: list[int] = []
        self.promotions: dict[str, list[Waiter]] = {}
        self._routes: dict[str, tuple[Feed, ...]] = {}
        self._await_lanes: list[Waiter] = []

    def get_head(self) -> int:
        """The last position that was announced."""
        return self.head

    # -------------------------------------------------------------- what the journal tells

    def announce(self, committed: Committed) -> None:
        """Offer what has become durable to the lanes that it is for."""
        for cascade in self.environment.cascades:
            cascade.follow(committed.events)
        if committed.previous_head != self.head:
            # Somebody else has written: read what lies between.
            self.head = committed.head
            self.published += len(committed.events)
            self.on_foreign()
            self.fall_behind()
            return
        self.head = committed.head
        self.published += len(committed.events)
        for type, records in runs_by_type(committed.events):
            feeds = self._routes.get(type)
            for feed in self._route(type) if feeds is None else feeds:
                feed.offer(type, records)
        if self.promotions:
            self.tell_promoted(record.id for record in committed.events)

    def tell_promoted(self, event_ids: Iterable[str]) -> None:
        """Scheduled events are in the log, or are cancelled."""
        for event_id in event_ids:
            for waiter in self.promotions.pop(event_id, ()):
                waiter.set()

    def fall_behind(self) -> None:
        """Have every lane read from the log."""
        for serving in self.servings.values():
            for feed in serving.feeds.values():
                feed.fall_behind()
        self._tell_promotions()

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

    def add_lane(self, serving: Serving, state: LaneState, rows: Sequence[WaitingRow] = ()) -> Lane:
        """A lane has been claimed."""
        self._routes.clear()
        return serving.add_lane(state, rows, self.budget)

    def lanes_changed(self) -> None:
        """A lane that the store was asked for is there, or will not be."""
        waiters, self._await_lanes = self._await_lanes, []
        for waiter in waiters:
            waiter.set()

    async def all_lanes(self) -> None:
        """Wait until the lanes that the store is asked for are there."""
        while any(serving.claiming for serving in self.servings.values()):
            waiter = self.environment.loop.waiter()
            self._await_lanes.append(waiter)
            await waiter.wait()
            self.check_open()

    def retype(self, stored: Subscribed) -> None:
        """A type has joined a subscription."""
        serving = self.servings.get(stored.name)
        if serving is not None:
            serving.retype(stored)
            self.forget_routes()
        elif stored.name in self.others:
            self.others[stored.name] = (stored, self.others[stored.name][1])

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
                feeds.append(serving.feeds[ONE_LANE])
            elif type in serving.feeds:
                feeds.append(serving.feeds[type])
            else:
                self.on_new_lane(serving, type)
        self.known_types.add(type)
        self._routes[type] = tuple(feeds)
        return self._routes[type]
