"""A subscription while it is dispatched: its lanes, its state, and how its handler is called.

publish → journal → store → *lanes* → workers → outcome. In come lanes that this instance has claimed, and the events that the
dispatcher offers to their feeds; what a lane or a worker asks of its subscription is answered here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from eventbus._circuit import Circuit
from eventbus._intake import READ_AGAIN, Budget, Feed, Intake
from eventbus._lanes import Lane
from eventbus._loose import HeldSource, LooseSource
from eventbus._model import Delivery, Draft
from eventbus._outcomes import Attempt
from eventbus._reader import report
from eventbus._side import Redriver
from eventbus._strict import StrictSource
from eventbus.errors import BusNotOpen, UndecodableEvent
from eventbus.hooks import SubscriptionPaused
from eventbus.stores.base import (
    SLOTS,
    LaneState,
    Order,
    Patterns,
    Record,
    Registration,
    Serves,
    Subscribed,
    Waiting,
    WaitingRow,
    WaitingRows,
    covers,
    lane_name,
    since_of,
    slots_of,
)

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from eventbus._dispatch import Dispatcher
    from eventbus._subscription import Subscription

_log = logging.getLogger("eventbus")

ONE_LANE = ""
"""Name of the lane of a subscription that has one for all its types."""


class Serving:
    """One subscription while it is dispatched."""

    def __init__(self, dispatcher: Dispatcher, options: Subscription, registration: Registration, stored: Subscribed) -> None:
        self._dispatcher = dispatcher
        self.options = options
        self.registration = registration
        self._takes_event = not options.takes_delivery and not options.takes_envelope
        self.stored = stored
        self.types = self._types_of(stored)
        self._patterns = Patterns(self.types)
        self.since = dict(stored.since)
        self._refused: str | None = None
        self.paused = stored.paused
        self.pauses = 0
        """How often it was paused or resumed here."""
        breaker = options.breaker
        self.circuit = None
        if breaker is not None:
            self.circuit = Circuit(self, breaker, dispatcher.environment)
        self.cannot: dict[str, float] = {}
        """Lanes that wait at an event that cannot be decoded here: its position; infinite if it did not come from the log."""
        self.nobodys: set[str] = set()
        """Lanes that no instance can run."""
        self._starts: dict[str, float] = {}
        self.lanes: dict[str, Lane] = {}
        self.claiming: set[str] = set()  # lanes that the store is asked for
        self.feeds: dict[str, Feed] = {}  # by lane for order "type", one for all lanes otherwise
        self.rewinding = 0
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
        """The types that it declares, and the subclasses of them that joined it in another program.

        The events of these must not be passed by: they are handled, or, where this program has not imported the class, the lane
        waits at them.
        """
        held = stored.since if stored.order == "type" else (*stored.types, *stored.derived)
        # Of its own some may be about to join, or wait; then what they mean of what is held is served.
        own = self.registration.types
        meant = Patterns(own)
        declared = dict.fromkeys([t for t in own if t in held] + [t for t in stored.types if meant.cover(t)])
        return (*declared, *(t for t in stored.derived if t not in declared and self._may_be_derived(t)))

    def _may_be_derived(self, type: str) -> bool:
        cls = self._dispatcher.decoder.class_of(type)
        return cls is None or issubclass(cls, self.options.classes)

    def wants(self, type: str) -> bool:
        """Whether events of this type are for it."""
        return self._patterns.cover(type)

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
        """Whether this event is for it, and was not settled before its lanes were made anew. One that is damaged is, whatever its
        type says now: rather a dead letter too many than an event that is passed by."""
        start = self.start_of(record.type) if record.fault is None else 0
        return record.position > start and not (self.stored.floors and self._settled_before(record))

    def _settled_before(self, record: Record) -> bool:
        return self.stored.settled_before(record.position, record.type, record.slot, record.key)

    @property
    def generation(self) -> int:
        """Of the stored subscription."""
        return self.stored.generation

    @property
    def waits_for(self) -> str | None:
        """Why it has no lanes: an instance of another deployment has them, or what that has left behind is in the way."""
        stored, options = self.stored, self.options
        if (stored.order, stored.concurrency) == (options.order, options.concurrency):
            return None
        return self._refused or (
            f"waits until the instances that serve it with order={stored.order!r}, concurrency={stored.concurrency} have ended; "
            f"here it is declared with order={options.order!r}, concurrency={options.concurrency}"
        )

    def lacks_types(self) -> bool:
        """Whether it is stored without a type that it declares. Lanes that hold several types may have to wait for one."""
        return self.options.order != "type" and not {*self.stored.types, *self.stored.derived} >= {*self.registration.types}

    def lacking(self, types: Iterable[str]) -> list[str]:
        """Of these types those that it declares and is stored without, and that have events for it."""
        if not self.lacks_types():
            return []
        declared, held = Patterns(self.registration.types), Patterns((*self.stored.types, *self.stored.derived))
        return [type for type in types if declared.cover(type) and not held.cover(type) and self.stored.wants(type)]

    def serves(self) -> Serves:
        """What other instances are told of how it is served here."""
        self.cannot |= {lane.name: lane.blocked_at for lane in self.lanes.values() if lane.blocked is not None}
        return Serves(self.options.order, self.options.concurrency, self.types, tuple(sorted(self.cannot)), self.stuck)

    def can_again(self, states: Iterable[LaneState], rows: Sequence[WaitingRow]) -> bool:
        """Whether others have brought any of these lanes past what could not be decoded here: then it can be run here again."""
        name, waiting = self.options.name, dict[str, int]()
        for row in rows:
            if row.subscription == name:
                waiting.setdefault(row.lane, row.waiting.position)  # the first: rows come by position
        reached = {
            each.lane: min(each.checkpoint, waiting.get(each.lane, math.inf) - 1) for each in states if each.subscription == name
        }
        passed = [lane for lane, at in self.cannot.items() if lane not in self.lanes and reached.get(lane, 0) >= at]
        for lane in passed:
            del self.cannot[lane]
        return bool(passed)

    def refuse(self, reason: str | None) -> None:
        """The store cannot have it as it is declared here, for now; with None, it can."""
        if reason not in (None, self._refused):
            _log.warning("%s: %s", self.options.name, reason)
        self._refused = reason

    def follow(self, stored: Subscribed) -> None:
        """It is stored otherwise than before: with other types, or other lanes."""
        before, self.stored = self.stored, stored
        if before.generation != stored.generation and self.waits_for is not None:
            _log.warning("%s: %s", self.options.name, self.waits_for)
        if before.floors != stored.floors:
            for feed in self.feeds.values():
                feed.settled_before = self._settled_before if stored.floors else None
        types, since = self._types_of(stored), dict(stored.since)
        if (types, since) == (self.types, self.since):
            return
        self.types, self.since = types, since
        self._patterns = Patterns(types)
        self._starts.clear()
        self._dispatcher.forget_routes()
        for lane in self.lanes.values():
            if isinstance(lane.log, LooseSource):
                lane.log.held.types = self.exact_types()
        if self.options.order != "type" and ONE_LANE in self.feeds:
            self.feeds[ONE_LANE].retype(self.exact_types())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Its lanes are being set back, or removed, in the store: give out nothing until that is done."""
        self.begin_change()
        try:
            yield
        finally:
            self.end_change()

    def begin_change(self) -> None:
        """See `changing`."""
        self.rewinding += 1
        for lane in self.lanes.values():
            lane.recall()

    def end_change(self) -> None:
        """See `changing`."""
        self.rewinding -= 1
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
        if replay is None:
            self.redriver.kick()  # it passed over what was held back
        else:
            self.redriver.changed()

    def rewound(self, after: int, states: Iterable[LaneState], rows: Sequence[WaitingRow]) -> None:
        """Its lanes have been set back, these rows are left; what they were doing does not count any more."""
        since = {name: min(start, after) for name, start in self.since.items()}
        floors = tuple(floor.down_to(after) for floor in self.stored.floors)
        self.follow(msgspec.structs.replace(self.stored, since=since, floors=floors))
        self._restart(states, rows)

    def was_set_back(self, states: Sequence[LaneState], done: Callable[[], object]) -> None:
        """Some of its lanes have been set back; they begin again when it is read what waits in them."""
        environment, which = self._dispatcher.environment, WaitingRows(self.options.name)

        def read(rows: Sequence[WaitingRow] | BaseException) -> None:
            if isinstance(rows, BaseException):
                report(f"what waits in {self.options.name!r}", rows)
                environment.timers.after(READ_AGAIN, lambda: environment.reader.ask_then(which, read))
                return
            self._restart(states, rows)
            done()

        environment.reader.ask_then(which, read)

    def _restart(self, states: Iterable[LaneState], rows: Sequence[WaitingRow]) -> None:
        waiting = by_lane(rows)
        for state in states:
            lane = self.lanes.get(state.lane)
            if lane is not None and lane.epoch < state.epoch:
                if self.circuit is not None:
                    self.circuit.forget(lane)
                intake = lane.log.intake
                intake.reset(state.checkpoint)
                lane.restart(state, *self._sources(lane, intake, state, waiting.get((self.options.name, lane.name), ())))
                intake.feed.read()
                lane.wake()
        self.redriver.begin_anew()  # what comes again with the lanes is no dead letter any more

    def lane_of(self, record: Record) -> Lane | None:
        """The lane that an event of it belongs to."""
        return self._lane_that_holds(record) if self.wants(record.type) else None

    def lane_for_redrive(self, record: Record) -> Lane | None:
        """The lane that a dead letter is redriven in: also where its type has to wait, until its own key is free, to be held."""
        wanted = (*self.types, *self.registration.types)
        return self._lane_that_holds(record) if covers(wanted, record.type) else None

    def _lane_that_holds(self, record: Record) -> Lane | None:
        return self.lanes.get(lane_name(self.options.order, self.options.concurrency, record.type, record.slot))

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
        """Ask for the lane of a type of which nothing is in the log; False if none will come of it."""
        if self.options.order != "type" or not self.wants(type):
            return False
        self._dispatcher.on_new_lane(self, type)
        return type in self.claiming

    def reads(self, lane: str) -> tuple[tuple[str, ...] | None, tuple[int, int]]:
        """The types and the slots of a lane."""
        if self.options.order == "type":
            return (lane,), (0, SLOTS)
        types = self.exact_types()
        if types is None and "*" not in self.types:
            types = tuple(t for t in self._dispatcher.known_types if self.wants(t))
        return types, slots_of(lane, self.options.concurrency) if self.options.order == "key" else (0, SLOTS)

    def add_lane(self, state: LaneState, waiting: Sequence[Waiting], budget: Budget) -> Lane:
        """Make a lane from its stored state and what waits in it; see `Dispatcher.add_lane`."""
        options, environment = self.options, self._dispatcher.environment
        lane = Lane(environment, self, state, options.concurrency if options.order == "none" else 1)
        feed = self._feed(state.lane)
        intake = Intake(feed, budget, state.checkpoint, lane.wake)
        feed.intakes[self._number(state.lane)] = intake
        lane.begin(*self._sources(lane, intake, state, waiting))
        self.lanes[state.lane] = lane
        return lane

    def _number(self, lane: str) -> int:
        return int(lane) if self.options.order == "key" else 0

    def begin_lane(self, lane: Lane, last: Mapping[str, int] | None) -> None:
        """Let a new lane run. One that has nothing to read is live at once; `last` are the last positions of all types."""
        intake = lane.log.intake
        if last is not None:
            types = [t for t in last if self.wants(t)] if intake.feed.types is None else intake.feed.types
            if all(last.get(t, 0) <= intake.taken for t in types):
                intake.taken = max(intake.taken, self._dispatcher.tail.head)
                intake.live = True
        intake.feed.read()
        lane.wake()

    def remove_lane(self, lane: Lane, budget: Budget) -> None:
        """Another instance has it."""
        del self.lanes[lane.name]
        feed = lane.log.intake.feed
        feed.intakes.pop(self._number(lane.name))
        budget.remove(lane.log.intake)
        if self.options.order == "type":
            feed.closed = True
            del self.feeds[lane.name]
        self.redriver.forget(lane)
        if self.circuit is not None:
            self.circuit.forget(lane)
            self.circuit.rested()

    def _sources(
        self, lane: Lane, intake: Intake, state: LaneState, waiting: Sequence[Waiting]
    ) -> tuple[StrictSource] | tuple[LooseSource, HeldSource]:
        if self.options.order in ("type", "log"):
            return (StrictSource(lane, intake, state),)
        loose = LooseSource(lane, intake, state, by_key=self.options.order == "key")
        loose.held = HeldSource(lane, loose, self.accepts, self.exact_types())
        loose.held.load(waiting)
        return loose, loose.held

    def _feed(self, lane: str) -> Feed:
        by_type = self.options.order == "type"
        name = lane if by_type else ONE_LANE
        if name not in self.feeds:
            types = (lane,) if by_type else self.exact_types()
            environment = self._dispatcher.environment
            lanes = self.options.concurrency if self.options.order == "key" else 1
            reader, timers, tail = environment.reader, environment.timers, self._dispatcher.tail
            feed = self.feeds[name] = Feed(lanes, types, self.start_of, reader, timers, lambda: tail.head, lambda: tail.end)
            feed.settled_before = self._settled_before if self.stored.floors else None
        return self.feeds[name]

    # -------------------------------------------------------------- what lanes and workers ask of it

    def pause(self, reason: str) -> None:
        """Give out nothing any more; it is stored elsewhere."""
        self.paused = reason
        self.pauses += 1
        _log.warning("%s is paused: %s", self.options.name, reason)
        self._dispatcher.environment.notify(SubscriptionPaused(self.options.name, reason))
        for lane in self.lanes.values():
            lane.recall()
            lane.tell_waiters()
        self.redriver.changed()
        self._dispatcher.on_pause()

    def resume(self) -> None:
        """Give out deliveries again; what waits starts at attempt 1."""
        self.paused = None
        self.pauses += 1
        if self.circuit is not None:
            self.circuit.close()
        for lane in self.lanes.values():
            lane.log.retry_now()
            lane.wake()
        self.redriver.kick()  # it passed over what is of paused lanes

    def pause_refused(self, reason: str) -> None:
        """See `Holder`."""
        if self.paused == reason:
            self.resume()

    def follow_pause(self, reason: str | None) -> None:
        """What another instance has stored."""
        if reason is not None and self.paused is None:
            self.pause(reason)
        elif reason is None and self.paused is not None:
            self.resume()

    def close(self) -> None:
        """Give out nothing any more, for good."""
        self.closed = True
        for feed in self.feeds.values():
            feed.closed = True
        for lane in self.lanes.values():
            lane.close()
        self.redriver.changed()

    def redriven(self, letter: int, due_at: float | None) -> None:
        """The store knows what became of a redriven dead letter."""
        self.redriver.ended(letter, due_at)

    def hindered(self) -> None:
        """A lane gives nothing out for now."""
        self.redriver.changed()

    def call(self, attempt: Attempt) -> object:
        """Call the handler with what it takes."""
        options, record = self.options, attempt.record
        if self._takes_event:
            return options.handler(self._dispatcher.decoder.event(record) if record.event is None else record.event)
        if record.fault is not None:
            raise UndecodableEvent(record.type, record.version, record.fault)
        decoder = self._dispatcher.decoder
        envelope = decoder.envelope(record)
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


def by_lane(rows: Iterable[WaitingRow]) -> dict[tuple[str, str], list[Waiting]]:
    """What waits in each lane, by the names of its subscription and its own."""
    lanes: dict[tuple[str, str], list[Waiting]] = {}
    for row in rows:
        lanes.setdefault((row.subscription, row.lane), []).append(row.waiting)
    return lanes


def lanes_wanted(
    order: Order, concurrency: int, types: Sequence[str], since: Mapping[str, int], known: Iterable[str]
) -> list[tuple[str, int]]:
    """Names and starts of a subscription's lanes, given the types that are in the log."""
    if order == "type":
        return [(t, since_of(since, t) or 0) for t in Patterns(types).names(known)]
    start = min((since[t] for t in types), default=0)
    return [(str(n) if order == "key" else ONE_LANE, start) for n in range(concurrency if order == "key" else 1)]
