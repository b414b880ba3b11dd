"""Every error that eventbus raises.

    EventBusError
    ├── ConfigurationError            a wrong option, class or name; found when it is registered, before anything runs
    │   ├── InvalidEventType          a class that cannot be an event, or two classes with one name
    │   └── InvalidSubscription       a handler or an option of `subscribe` that cannot work
    ├── NotSupported                  asked for something that this version does not do
    ├── BusNotOpen                    the bus is not open, or is closing
    ├── WrongLoop                     called from another thread or event loop than the bus was opened on
    ├── InvalidEvent                  this event cannot be stored as it is; names the type and the field
    ├── IdempotencyConflict           the idempotency key was used before, for other content
    ├── PublishOutcomeUnknown         the disk failed in a way that leaves open whether the events are stored
    ├── HandlingFailed                an event was not handled by every subscription
    ├── WaitTimeout                   what was waited for did not happen in time (also a TimeoutError)
    ├── UnknownEvent                  no event with this id
    ├── UnknownSubscription           no subscription with this name
    ├── UndecodableEvent              stored bytes that cannot be made into the event's class
    │   └── UnknownEventType          no class for this stored name, or a newer version than the class
    ├── ProcessDied                   an event ended the process again and again; stands in dead letters
    ├── HandlerTimeout                an attempt ran longer than its subscription's timeout
    ├── LaneLost                      a replay had not all of its lanes any more
    ├── RangeNotRetained              a replay or rewind reaches back to events that retention has removed
    ├── StoreError                    the store refused or failed
    │   ├── StoreInUse                another process does not let go of the file, or has this id
    │   ├── StoreBusy                 another connection holds the write lock; nothing was stored
    │   ├── StoreFull                 no room left; nothing was stored
    │   ├── StoreUnavailable          an I/O error; nothing was stored
    │   ├── StoreLost                 the file was removed or replaced while it was open
    │   ├── StoreCorrupt              stored data does not match its checksum, or does not hold together
    │   ├── StoreTooNew               written by a newer version of eventbus
    │   └── StoreUnsafe               a setting or file system on which durability cannot be kept
    ├── Reject                        raised by a handler: dead-letter this delivery now
    └── RetryAfter                    raised by a handler: deliver again after so many seconds

Foreign exceptions are wrapped, with the cause kept in `__cause__`. Each error carries its data as attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eventbus._model import DeadLetter


class EventBusError(Exception):
    """The base of every error of this package."""


class ConfigurationError(EventBusError):
    """A wrong option, class or name, found when it is registered."""


class InvalidEventType(ConfigurationError):
    """A class that cannot be an event, or a second class for a name that is taken."""


class InvalidSubscription(ConfigurationError):
    """A handler or an option of `subscribe` that cannot work."""


class NotSupported(EventBusError):
    """Something that this version of eventbus does not do; the message says what to use instead."""


class BusNotOpen(EventBusError):
    """The bus is not open, or is closing: nothing was stored."""


class WrongLoop(EventBusError):
    """Called from another thread or event loop than the one the bus was opened on: nothing was stored."""


class InvalidEvent(EventBusError, ValueError):
    """An event that cannot be stored as it is. Nothing was stored; other publishers are not affected.

    Attributes:
        type: the event type's stored name.
        field: path to the value, such as `lines[2].price`; "" if the fault is not in one field.
        reason: what is wrong with it.
    """

    def __init__(self, type: str, field: str, reason: str) -> None:
        super().__init__(type, field, reason)
        self.type = type
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        place = f"{self.type}.{self.field}" if self.field else self.type
        return f"{place}: {self.reason}"


class IdempotencyConflict(EventBusError):
    """The idempotency key was used before, for an event with other content. Nothing was stored.

    Attributes:
        key: the idempotency key.
        event_id: id of the event that was stored with it first.
    """

    def __init__(self, key: str, event_id: str) -> None:
        super().__init__(key, event_id)
        self.key = key
        self.event_id = event_id

    def __str__(self) -> str:
        return (
            f"idempotency key {self.key!r} already belongs to event {self.event_id}, whose type, key or content is another; "
            "use a new key for a new event"
        )


class PublishOutcomeUnknown(EventBusError):
    """The disk failed and it could not be found out whether the events are stored.

    Publish them again with their idempotency keys: then they are stored once, whatever happened.

    Attributes:
        event_ids: ids that the events have if they are stored.
    """

    def __init__(self, event_ids: Sequence[str]) -> None:
        super().__init__(tuple(event_ids))
        self.event_ids = tuple(event_ids)

    def __str__(self) -> str:
        if not self.event_ids:
            return "the disk failed, and it could not be found out whether what was asked for was written"
        return f"it is not known whether {len(self.event_ids)} event(s) are stored: {', '.join(self.event_ids[:5])}"


class HandlingFailed(EventBusError):
    """An event was not handled by every subscription that it was published for.

    Attributes:
        dead_letters: the dead letters of this event.
        blocked: names of subscriptions that will not handle it for now, each with the reason (paused, no handler,
            called from inside the lane that would have to handle it, …).
    """

    def __init__(self, dead_letters: Sequence[DeadLetter] = (), blocked: Mapping[str, str] | None = None) -> None:
        super().__init__(tuple(dead_letters), dict(blocked or {}))
        self.dead_letters = tuple(dead_letters)
        self.blocked = dict(blocked or {})

    def __str__(self) -> str:
        dead = [f"dead-lettered by {d.subscription!r}: {d.error_type}: {d.error}" for d in self.dead_letters]
        return "; ".join(dead + [f"not handled by {name!r}: {why}" for name, why in self.blocked.items()])


class WaitTimeout(EventBusError, TimeoutError):
    """What was waited for did not happen within the timeout. Nothing is lost by it: the work goes on."""


class LaneLost(EventBusError):
    """A lane that a replay needs is not here, or not as it was: the lease of this instance had ended, its subscription was
    rewound elsewhere, or this program cannot run it. `replay(after=…)` goes on.

    Attributes:
        position: up to here everything was delivered.
    """

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position

    def __str__(self) -> str:
        return (
            "a lane that the replay needs is not here, or not as it was: the lease of this instance had ended, its subscription "
            f"was rewound elsewhere, or this program cannot run it; replay(after={self.position}) goes on"
        )


class UnknownEvent(EventBusError, LookupError):
    """No event, scheduled event or dead letter has this id (it may have been removed by retention)."""


class UnknownSubscription(EventBusError, LookupError):
    """No subscription has this name."""


class UndecodableEvent(EventBusError):
    """Stored bytes that cannot be made into the event's class.

    Attributes:
        type: the stored name. version: the stored version. reason: what is wrong.
    """

    def __init__(self, type: str, version: int, reason: str) -> None:
        super().__init__(type, version, reason)
        self.type = type
        self.version = version
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot decode {self.type!r} version {self.version}: {self.reason}"


class UnknownEventType(UndecodableEvent):
    """No class is registered for this stored name, or its class is older than the stored version."""


class HandlerTimeout(EventBusError, TimeoutError):
    """An attempt ran longer than its subscription's `timeout`; it counts as a failed attempt."""


class ProcessDied(EventBusError):
    """The process died whenever this event was handled; why it was given up. Raised by nobody: it stands in dead letters."""


class RangeNotRetained(EventBusError):
    """The range reaches back to events that retention has removed."""


class StoreError(EventBusError):
    """The store refused or failed. Unless a subclass says otherwise, nothing was stored."""


class StoreInUse(StoreError):
    """Another process has held the file's lock for too long while it was being opened, or an instance of this id is alive. That
    others have the file open is none."""


class StoreBusy(StoreError):
    """Another connection held the write lock for too long; nothing was stored."""


class StoreFull(StoreError):
    """No room left on the device; nothing was stored."""


class StoreUnavailable(StoreError):
    """An I/O error; nothing was stored."""


class StoreLost(StoreError):
    """The database file was removed or replaced while it was open: what is written now would be lost."""


class StoreCorrupt(StoreError):
    """Stored data does not match its checksum, or the file is not a database."""


class StoreTooNew(StoreError):
    """The file was written by a newer version of eventbus."""


class StoreUnsafe(StoreError):
    """A setting or a file system on which the promises of durability cannot be kept."""


class Reject(EventBusError):
    """Raise it in a handler to dead-letter the delivery now, without further attempts."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryAfter(EventBusError):
    """Raise it in a handler to get the delivery again after `seconds`. It counts as an attempt."""

    def __init__(self, seconds: float | timedelta) -> None:
        super().__init__(seconds)
        self.seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds

    def __str__(self) -> str:
        return f"asked to be retried after {self.seconds} s"
