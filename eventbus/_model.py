"""The records that users meet: frozen, with no behaviour but what a name says.

On the way publish → journal → store → lanes → workers → outcome these are what goes in (`Draft`), what comes back
(`Receipt`), what a handler sees (`Envelope`, `Delivery`), and what a person asks for afterwards (`DeadLetter`, `Stats`, …).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Literal, Protocol

import attrs
import msgspec


@attrs.frozen
class Draft:
    """An event with the options of `publish`, for `publish_many`, `Delivery.publish` and what a handler returns.

    Attributes:
        event: the event.
        key: what `order="key"` orders by; None takes the key named by `@event`.
        idempotency_key: 1–255 characters; the same key again gives the first receipt.
        headers: the user's own headers, str to str.
        due: an aware datetime or a timedelta from now, before which it is not delivered.
    """

    event: object
    key: object = attrs.field(default=None, kw_only=True)
    idempotency_key: str | None = attrs.field(default=None, kw_only=True)
    headers: Mapping[str, str] | None = attrs.field(default=None, kw_only=True)
    due: datetime | timedelta | None = attrs.field(default=None, kw_only=True)


@attrs.frozen
class Envelope:
    """An event as it is stored.

    Attributes:
        position: its place in the log. Positions grow; they may have gaps; compare them, never subtract them.
        id: UUIDv7, as text.
        type, version: stored name and version of its class.
        time: when it was published (for one with `due`: when it became due), UTC.
        key: what `order="key"` orders by, or None.
        headers: correlation_id, causation_id, and the user's own.
        content_type, data: what the codec made of the event, undecoded.
    """

    position: int
    id: str
    type: str
    version: int
    time: datetime
    key: str | None
    headers: Mapping[str, str]
    content_type: str
    data: bytes = attrs.field(repr=False)
    _decode: Callable[[Envelope], object] = attrs.field(repr=False, eq=False)

    @property
    def event(self) -> object:
        """The event, decoded anew at each access.

        Raises:
            UnknownEventType: no class is registered for this type and version.
            UndecodableEvent: the bytes do not fit the class.
        """
        return self._decode(self)


class Receipt(msgspec.Struct, frozen=True, eq=False, weakref=True):
    """What `publish` returns: the event is on disk.

    Attributes:
        id: UUIDv7, as text; strictly increasing within one open bus.
        position: its place in the log; None while it is scheduled (`due`).
        duplicate: its idempotency key was known: id and position are those of the event stored first, and nothing was
            stored now.
    """

    id: str
    position: int | None
    duplicate: bool
    _handled: Callable[[Any, Receipt, float | None], Awaitable[None]]
    _record: object

    def __repr__(self) -> str:
        return f"Receipt(id={self.id!r}, position={self.position!r}, duplicate={self.duplicate!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Receipt):
            return NotImplemented
        return (self.id, self.position, self.duplicate) == (other.id, other.position, other.duplicate)

    def __hash__(self) -> int:
        return hash((self.id, self.position, self.duplicate))

    async def handled(self, timeout: float | None = None) -> None:
        """Wait until every subscription that existed at its position has handled the event, and the acks are committed.

        A scheduled event is waited for until it is due and handled.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            HandlingFailed: a subscription has dead-lettered it; or, at once, a subscription will not handle it for now: it is
                paused, has a handler in no process that is alive, or waits for the very handler that calls this.
            WaitTimeout: it took longer than `timeout` (also a `TimeoutError`). The work goes on.
        """
        await self._handled(self._record, self, timeout)


class Publisher(Protocol):
    """What a delivery needs of the bus: to encode an event that is committed with the ack."""

    def __call__(
        self,
        event: object,
        *,
        key: object = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | timedelta | None = None,
    ) -> None:
        """See `Delivery.publish`."""


@attrs.frozen
class Delivery:
    """One event for one subscription, as its handler sees it.

    Attributes:
        envelope: the event as stored.
        attempt: which run of the handler this is, from 1.
        subscription: the name of the subscription.
        replaying: this is history, delivered by `bus.replay`.
    """

    envelope: Envelope
    attempt: int
    subscription: str
    replaying: bool
    _publish: Publisher = attrs.field(repr=False, eq=False)

    def publish(
        self,
        event: object,
        *,
        key: object = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | timedelta | None = None,
    ) -> None:
        """Publish an event together with this delivery's ack: both are committed, or neither.

        It is encoded now, so a bad event fails this attempt. If the attempt fails, or `replaying` is true, it is dropped.

        Raises:
            InvalidEvent: it cannot be stored as it is.
            BusNotOpen: the attempt is over.
        """
        self._publish(event, key=key, idempotency_key=idempotency_key, headers=headers, due=due)


class DeliveryStatus(str, Enum):
    """How an event stands with one subscription. Compares equal to its value."""

    PENDING = "pending"
    RETRYING = "retrying"
    PARKED = "parked"
    HANDLED = "handled"
    DEAD = "dead"

    __str__ = str.__str__


@attrs.frozen
class DeadLetter:
    """A delivery given up on, with its own copy of the event.

    Attributes:
        id: for `get`, `redrive` and `discard`.
        subscription: the name of the subscription.
        envelope: the event; its own copy, which retention does not remove.
        error_type, error, traceback: of the last attempt; the traceback is cut to 16,000 characters.
        attempts: attempts made in all.
        first_failed_at, last_failed_at: UTC.
        redriving: it is being delivered again.
    """

    id: int
    subscription: str
    envelope: Envelope
    error_type: str
    error: str
    traceback: str = attrs.field(repr=False)
    attempts: int
    first_failed_at: datetime
    last_failed_at: datetime
    redriving: bool


@attrs.frozen
class ReplaySummary:
    """What a replay has done.

    Attributes:
        position: everything of the range up to here was delivered; `replay(after=position)` resumes.
        events: events of the range, delivered to at least one subscription.
        handled: deliveries that ended with an ack.
        dead: deliveries that ended as dead letters.
        dry_run: nothing was delivered; `events` counts what would be.
    """

    position: int
    events: int
    handled: int
    dead: int
    dry_run: bool = False


SubscriptionState = Literal["running", "paused", "no handler", "not dispatched here", "blocked", "circuit open"]


@attrs.frozen
class SubscriptionInfo:
    """A stored subscription.

    Attributes:
        types: the names and patterns it is for.
        order, concurrency: its options.
        state: "running"; "paused"; "no handler" (stored, but this program does not register it); "not dispatched here" (the
            bus was opened without it); "blocked" (this program cannot decode an event it waits for).
        reason: why it is paused or blocked, or None.
        created_at: UTC.
    """

    name: str
    types: tuple[str, ...]
    order: str
    concurrency: int
    state: SubscriptionState
    reason: str | None
    created_at: datetime


@attrs.frozen
class SubscriptionStats:
    """How a subscription stands.

    Attributes:
        state, reason: see `SubscriptionInfo`.
        lag: events not settled yet, counted up to 10,000. lag_seconds: age of the oldest of them, 0.0 without one.
        retrying: deliveries that wait for another attempt. parked: keys that wait behind a dead letter; the events of them are
            part of `lag`. dead: its dead letters.
        running: attempts running now. stuck: threads of handlers that have outlived their timeout.
        handled, failed: attempts since the bus was opened that ended with an ack, or did not.
    """

    state: SubscriptionState
    reason: str | None
    lag: int
    lag_seconds: float
    retrying: int
    parked: int
    dead: int
    running: int
    stuck: int
    handled: int
    failed: int


@attrs.frozen
class Stats:
    """How the bus stands.

    Attributes:
        head: position of the last event in the log.
        events: events in the log, exact up to 10,000 and 10,001 beyond.
        published: events stored since the bus was opened, by callers and by handlers.
        pending: events that wait to be written.
        next_due: when the next scheduled event is due, or None.
        subscriptions: by name; those without a handler as well.
    """

    head: int
    events: int
    published: int
    pending: int
    next_due: datetime | None
    subscriptions: Mapping[str, SubscriptionStats]
