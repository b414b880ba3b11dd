"""Attempts and their outcomes, as data.

publish → journal → store → lanes → workers → *outcome*. A lane gives out an `Attempt`; a worker gives back an `Outcome`; a source
of the lane turns it into what the store is told. Nothing here does anything but say what happened.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import msgspec

from eventbus.errors import IdempotencyConflict
from eventbus.stores.base import Death, Record

if TYPE_CHECKING:
    from eventbus._clock import Clock
    from eventbus._lanes import Lane
    from eventbus._sources import Source

_TRACEBACK = 16_000
_FRAMES = 50
"""Innermost frames of a traceback that are kept; a thousand of them, of a recursion, take 40 ms to format."""
_MESSAGE = 2_000


class Attempt(msgspec.Struct, eq=False):
    """One run of a handler, from the lane that gave it to the outcome.

    Attributes:
        number: counted from 1.
        item: what the source knows this delivery by, where the record does not say it.
        outbox: events that the attempt wants published with its ack; None while there are none.
        over: its outcome stands; whatever it still does is too late.
        epoch: the lane's, when it was given out.
    """

    lane: Lane
    source: Source
    record: Record
    number: int
    item: object = None
    replaying: bool = False
    outbox: list[Record] | None = None
    over: bool = False
    epoch: int = 0


current_attempt: ContextVar[Attempt | None] = ContextVar("eventbus_current_attempt", default=None)
"""The attempt that runs in this context."""


class Acked(msgspec.Struct, frozen=True):
    """The handler is done; what it published is committed with the ack."""

    published: Sequence[Record] = ()


class Failed(msgspec.Struct, frozen=True):
    """The attempt failed. `final`: another one cannot do better."""

    error: BaseException
    final: bool = False


class Released(msgspec.Struct, frozen=True):
    """Given back uncounted: the bus is stopping."""


class Undeliverable(msgspec.Struct, frozen=True):
    """This program has no class for the event, or an older one: the lane waits for a program that has."""

    reason: str


Outcome = Acked | Failed | Released | Undeliverable
ACKED = Acked()
RELEASED = Released()


class Failure(msgspec.Struct, eq=False):
    """What a source is told of a failed attempt: when to try again (seconds from now), or None to give up."""

    attempt: Attempt
    error: BaseException
    delay: float | None
    final: bool
    now: float


def death_of(failure: Failure, attempts: int, first_failed_at: float | None) -> Death:
    """How a delivery ends, for its dead letter."""
    error = failure.error
    return Death(
        type(error).__name__,
        _message_of(error)[:_MESSAGE],
        _traceback_of(error)[-_TRACEBACK:],
        attempts,
        failure.now if first_failed_at is None else first_failed_at,
        failure.now,
    )


def conflict_of(attempt: Attempt, published: Sequence[Record], clock: Clock) -> Death | None:
    """How a delivery ends if an idempotency key that it publishes with turns out to be taken."""
    keys = [record.idempotency_key for record in published if record.idempotency_key is not None]
    if not keys:
        return None
    now = clock.time()
    message = f"one of the idempotency keys {keys} that it published with belongs to an event of other content"
    return Death(IdempotencyConflict.__name__, message, "", attempt.number, now, now)


def summary_of(error: BaseException) -> str:
    """An error in one line, for people who look into the tables."""
    return f"{type(error).__name__}: {_message_of(error)}"[:_MESSAGE]


def _message_of(error: BaseException) -> str:
    """The error's message, as text that can be stored; errors are made by users, and may fail at that, too."""
    try:
        return _printable(str(error))
    except BaseException as second:  # noqa: BLE001  # whatever it is: the worker must go on
        return f"(its message cannot be made: {type(second).__name__})"


def _traceback_of(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error, limit=-_FRAMES))
    except BaseException as second:  # noqa: BLE001  # see `_message_of`; where it was raised can be told all the same
        where = "".join(traceback.format_tb(error.__traceback__, limit=-_FRAMES))
        text = f"{where}{summary_of(error)}\n(the rest cannot be shown: {type(second).__name__})\n"
    return _printable(text)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
