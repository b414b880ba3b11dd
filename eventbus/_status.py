"""How things stand: of one event, of every subscription, of the bus. Answered from the store, beside the way of the events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from eventbus._clock import shown
from eventbus._model import DeliveryStatus, Stats, SubscriptionInfo, SubscriptionState, SubscriptionStats
from eventbus._serving import lanes_wanted
from eventbus.errors import UnknownEvent
from eventbus.stores.base import (
    SLOTS,
    CountDeadLetters,
    DeadLetterFilter,
    DeadLetters,
    Find,
    Lag,
    LagOfRows,
    Lanes,
    LaneState,
    LogState,
    NextDue,
    Patterns,
    Record,
    Subscribed,
    Subscriptions,
    WaitingRow,
    WaitingRows,
    lane_name,
    since_of,
    slots_of,
)

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher
    from eventbus._journal import Journal
    from eventbus._reader import Reader

MOST = 10_000
"""Lag is counted up to this."""


class Status:
    """Answers questions about how things stand."""

    def __init__(self, dispatcher: Dispatcher, journal: Journal, reader: Reader) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._reader = reader

    # -------------------------------------------------------------- one event

    async def of(self, event_id: str) -> dict[str, DeliveryStatus]:
        """See `EventBus.status`."""
        record = await self._reader.ask(Find(event_id))
        if record is None:
            raise UnknownEvent(f"no event {event_id!r} is stored or scheduled here")
        dead = {row.subscription: row for row in await self._reader.ask(DeadLetters(DeadLetterFilter(event_id=event_id)))}
        statuses = {}
        for stored in await self._reader.ask(Subscriptions()):
            since = since_of(stored.since, record.type)
            if since is None or (record.position and record.position <= since):
                continue
            if stored.name in dead:
                redriving = dead[stored.name].redriving
                statuses[stored.name] = DeliveryStatus.RETRYING if redriving else DeliveryStatus.DEAD
            else:
                statuses[stored.name] = await self._with(stored, record)
        return statuses

    async def _with(self, stored: Subscribed, record: Record) -> DeliveryStatus:
        if not record.position:
            return DeliveryStatus.PENDING
        if stored.settled_before(record.position, record.type, record.slot, record.key):
            return DeliveryStatus.HANDLED
        name = lane_name(stored.order, stored.concurrency, record.type, record.slot)
        lane = next((s for s in await self._reader.ask(Lanes(stored.name)) if s.lane == name), None)
        if lane is None or not stored.holds(record.type):
            return DeliveryStatus.PENDING
        for row in await self._reader.ask(WaitingRows(stored.name)):
            if _holds(row, lane, record):
                if row.waiting.state == "parked":
                    return DeliveryStatus.PARKED
                at_it = row.waiting.position == record.position and row.waiting.attempt > 0
                return DeliveryStatus.RETRYING if at_it else DeliveryStatus.PENDING
        if record.position <= lane.checkpoint or record.position in lane.done:
            return DeliveryStatus.HANDLED
        if lane.attempt and await self._is_next(stored, lane, record):
            return DeliveryStatus.RETRYING
        return DeliveryStatus.PENDING

    async def _is_next(self, stored: Subscribed, lane: LaneState, record: Record) -> bool:
        types = (lane.lane,) if stored.order == "type" else self._types_of(stored)
        before, _ = await self._reader.ask(Lag(lane.checkpoint, types, until=record.position))
        return before == 1

    def _types_of(self, stored: Subscribed) -> tuple[str, ...] | None:
        return types_of(stored, self._dispatcher.known_types)

    # -------------------------------------------------------------- all of it

    async def subscriptions(self) -> list[SubscriptionInfo]:
        """See `EventBus.subscriptions`."""
        infos = []
        for stored in await self._reader.ask(Subscriptions()):
            state, reason = self._state(stored)
            created = shown(stored.created_at)
            infos.append(SubscriptionInfo(stored.name, stored.types, stored.order, stored.concurrency, state, reason, created))
        return infos

    async def stats(self) -> Stats:
        """See `EventBus.stats`."""
        log = await self._reader.ask(LogState())
        next_due = await self._reader.ask(NextDue())
        dead = await self._reader.ask(CountDeadLetters())
        lanes: defaultdict[str, list[LaneState]] = defaultdict(list)
        for lane in await self._reader.ask(Lanes()):
            lanes[lane.subscription].append(lane)
        rows: defaultdict[str, list[WaitingRow]] = defaultdict(list)
        for row in await self._reader.ask(WaitingRows()):
            rows[row.subscription].append(row)
        stats = {}
        for stored in await self._reader.ask(Subscriptions()):
            stats[stored.name] = await self._of_subscription(stored, lanes[stored.name], rows[stored.name], dead)
        return Stats(
            log.head,
            log.events,
            self._dispatcher.published,
            self._journal.size,
            None if next_due is None else shown(next_due),
            stats,
        )

    async def _of_subscription(
        self, stored: Subscribed, lanes: Sequence[LaneState], rows: Sequence[WaitingRow], dead: Mapping[str, int]
    ) -> SubscriptionStats:
        state, reason = self._state(stored)
        lag, oldest = await self._lag(stored, lanes, bool(rows))
        serving = self._dispatcher.servings.get(stored.name)
        now = self._dispatcher.environment.clock.time()
        return SubscriptionStats(
            state,
            reason,
            lag,
            0.0 if oldest is None else max(0.0, now - oldest),
            sum(1 for row in rows if row.waiting.state != "parked") + sum(1 for lane in lanes if lane.attempt),
            sum(1 for row in rows if row.waiting.state == "parked"),
            dead.get(stored.name, 0),
            0 if serving is None else sum(lane.running for lane in serving.lanes.values()),
            0 if serving is None else serving.stuck,
            0 if serving is None else serving.handled,
            0 if serving is None else serving.failed,
        )

    async def _lag(self, stored: Subscribed, lanes: Sequence[LaneState], has_rows: bool) -> tuple[int, float | None]:
        """What lies above the checkpoints, and what they have passed unsettled."""
        count, times = 0, list[float | None]()
        if has_rows:
            held, first = await self._reader.ask(LagOfRows(stored.name, self._types_of(stored), MOST))
            count, times = held, [first]
        for lane in (*lanes, *self._unclaimed(stored, {lane.lane for lane in lanes})):
            behind, first = await self._lag_of(stored, lane, None)
            if behind:
                count += behind
                times.append(first)
        return min(count, MOST), min((time for time in times if time is not None), default=None)

    async def _lag_of(self, stored: Subscribed, lane: LaneState, until: int | None) -> tuple[int, float | None]:
        behind, first = await self._reader.ask(lag_of(stored, lane, self._dispatcher.known_types, until))
        return max(0, behind - len(lane.done)), first

    async def behind(self, stored: Subscribed, until: int, lanes: Collection[str]) -> int:
        """How many deliveries up to a position lie above the checkpoints of some lanes, unsettled."""
        claimed, count = await self._reader.ask(Lanes(stored.name)), 0
        for lane in (*claimed, *self._unclaimed(stored, {lane.lane for lane in claimed})):
            if lane.lane in lanes:
                count += (await self._lag_of(stored, lane, until))[0]
        return count

    def _unclaimed(self, stored: Subscribed, claimed: Collection[str]) -> list[LaneState]:
        return unclaimed(stored, claimed, self._dispatcher.known_types)

    def _state(self, stored: Subscribed) -> tuple[SubscriptionState, str | None]:
        serving = self._dispatcher.servings.get(stored.name)
        if stored.paused is not None:
            return "paused", stored.paused
        if serving is None:
            dispatched = self._dispatcher.others.get(stored.name, (stored, "no handler"))[1]
            return ("not dispatched here", None) if dispatched == "not dispatched here" else ("no handler", None)
        if serving.circuit is not None and serving.circuit.is_open:
            return "circuit open", f"{serving.circuit.reason}; tried again at {shown(serving.circuit.due):%H:%M:%S} UTC"
        if serving.waits_for is not None:
            return "blocked", serving.waits_for
        blocked = next((lane.blocked for lane in serving.lanes.values() if lane.blocked is not None), None)
        if blocked is None and serving.nobodys:
            blocked = (
                f"no instance can run {len(serving.nobodys)} of its lanes: {', '.join(sorted(map(repr, serving.nobodys))[:3])}"
            )
        return ("running", None) if blocked is None else ("blocked", blocked)


def _holds(row: WaitingRow, lane: LaneState, record: Record) -> bool:
    """Whether a row of `deliveries` stands for this event."""
    waiting = row.waiting
    if waiting.key is None:
        return waiting.position == record.position
    return waiting.key == record.key and waiting.begins <= record.position <= lane.checkpoint


# ------------------------------------------------------------------ of a stored subscription, with or without a bus


def types_of(stored: Subscribed, known: Collection[str]) -> tuple[str, ...] | None:
    """Exact types of a stored subscription, given those in the log; None for all."""
    if "*" in stored.types:
        return None
    return tuple(Patterns(stored.since).names(known))


def lag_of(stored: Subscribed, lane: LaneState, known: Collection[str], until: int | None = None) -> Lag:
    """The question what lies above a lane's checkpoint."""
    slots = slots_of(lane.lane, stored.concurrency) if stored.order == "key" else (0, SLOTS)
    types = (lane.lane,) if stored.order == "type" else types_of(stored, known)
    return Lag(lane.checkpoint, types, slots, MOST, until)


def unclaimed(stored: Subscribed, claimed: Collection[str], known: Collection[str]) -> list[LaneState]:
    """Lanes that nobody has run yet: they stand where they will begin."""
    wanted = lanes_wanted(stored.order, stored.concurrency, tuple(stored.since), stored.since, known)
    return [LaneState(stored.name, lane, 0, start) for lane, start in wanted if lane not in claimed]
