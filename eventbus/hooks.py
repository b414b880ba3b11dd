"""Hooks: told what happens on a bus, as frozen records.

A hook is any callable that takes one of the records below; give hooks with `EventBus(hooks=[…])`. It is called on the bus's
event loop, so it must be quick. It cannot hurt: what it raises is logged and goes no further.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

_log = logging.getLogger("eventbus")


class AttemptFailed(msgspec.Struct, frozen=True):
    """An attempt has failed. `retry_in`: seconds until the next one, or None if the delivery is given up."""

    subscription: str
    type: str
    position: int
    attempt: int
    error: BaseException
    retry_in: float | None


class SubscriptionPaused(msgspec.Struct, frozen=True):
    """A subscription gives out nothing until it is resumed."""

    subscription: str
    reason: str


class LaneBlocked(msgspec.Struct, frozen=True):
    """A lane waits for a program that can decode its next event."""

    subscription: str
    lane: str
    reason: str


class HandlerStuck(msgspec.Struct, frozen=True):
    """The thread of a plain handler has outlived its timeout; its lane waits until the thread returns."""

    subscription: str


class DispatchHalted(msgspec.Struct, frozen=True):
    """Outcomes cannot be written for now; no attempt is started until they can be."""

    error: BaseException


class CircuitOpened(msgspec.Struct, frozen=True):
    """Different events of a subscription failed one after the other: nothing more is delivered, but for one event at a time."""

    subscription: str
    reason: str


class CircuitClosed(msgspec.Struct, frozen=True):
    """An event was handled again: everything is delivered. `after`: seconds for which it was open."""

    subscription: str
    after: float


Moment = AttemptFailed | SubscriptionPaused | LaneBlocked | HandlerStuck | DispatchHalted | CircuitOpened | CircuitClosed
"""What a hook is told."""

Hook = Callable[[Moment], object]
"""Takes one moment; what it returns is ignored, what it raises is logged."""


def notify(hooks: Sequence[Hook], moment: Moment) -> None:
    """Tell all hooks."""
    for hook in hooks:
        try:
            hook(moment)
        except Exception:  # noqa: BLE001  # a hook cannot hurt
            _log.exception("the hook %r failed", hook)
