"""eventbus: an embeddable, durable, in-process event bus.

    bus = EventBus("shop.db")

    @bus.subscribe(OrderCreated)
    async def reserve(order: OrderCreated) -> None: ...

    async with bus:
        await bus.publish(OrderCreated("o-1"))

Every event is on disk before it is dispatched, and delivered at least once to every subscription.
"""

from eventbus._breaker import Breaker
from eventbus._bus import EventBus
from eventbus._clock import Clock
from eventbus._codec import Codec, Fault, JSONCodec
from eventbus._encoding import headers
from eventbus._events import event
from eventbus._model import (
    DeadLetter,
    Delivery,
    DeliveryStatus,
    Draft,
    Envelope,
    Receipt,
    ReplaySummary,
    Stats,
    SubscriptionInfo,
    SubscriptionStats,
)
from eventbus._retry import RetryPolicy
from eventbus.errors import (
    BusNotOpen,
    ConfigurationError,
    EventBusError,
    HandlerTimeout,
    HandlingFailed,
    IdempotencyConflict,
    InvalidEvent,
    InvalidEventType,
    InvalidSubscription,
    LaneLost,
    NotSupported,
    ProcessDied,
    PublishOutcomeUnknown,
    RangeNotRetained,
    Reject,
    RetryAfter,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreInUse,
    StoreLost,
    StoreTooNew,
    StoreUnavailable,
    StoreUnsafe,
    UndecodableEvent,
    UnknownEvent,
    UnknownEventType,
    UnknownSubscription,
    WaitTimeout,
    WrongLoop,
)

__all__ = [
    "Breaker",
    "BusNotOpen",
    "Clock",
    "Codec",
    "ConfigurationError",
    "DeadLetter",
    "Delivery",
    "DeliveryStatus",
    "Draft",
    "Envelope",
    "EventBus",
    "EventBusError",
    "Fault",
    "HandlerTimeout",
    "HandlingFailed",
    "IdempotencyConflict",
    "InvalidEvent",
    "InvalidEventType",
    "InvalidSubscription",
    "JSONCodec",
    "LaneLost",
    "NotSupported",
    "ProcessDied",
    "PublishOutcomeUnknown",
    "RangeNotRetained",
    "Receipt",
    "Reject",
    "ReplaySummary",
    "RetryAfter",
    "RetryPolicy",
    "Stats",
    "StoreBusy",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreInUse",
    "StoreLost",
    "StoreTooNew",
    "StoreUnavailable",
    "StoreUnsafe",
    "SubscriptionInfo",
    "SubscriptionStats",
    "UndecodableEvent",
    "UnknownEvent",
    "UnknownEventType",
    "UnknownSubscription",
    "WaitTimeout",
    "WrongLoop",
    "event",
    "headers",
]
