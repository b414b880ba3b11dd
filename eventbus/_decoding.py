"""From a record back to what a handler takes: the event, or its envelope.

publish → journal → store → lanes → *workers* → outcome. In comes a record from the log; out comes an object of the user's class:
one for all handlers where the class is deeply immutable, otherwise each has its own copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from eventbus._clock import shown
from eventbus._model import DeadLetter, Envelope
from eventbus.errors import EventBusError, UndecodableEvent, UnknownEventType
from eventbus.stores.base import DeadLetterRow, Record, headers_of

if TYPE_CHECKING:
    from eventbus._codec import Codec
    from eventbus._events import EventType, Registry


class Decoder:
    """Makes events and envelopes of records. May be used from any thread."""

    def __init__(self, registry: Registry, codec: Codec) -> None:
        self._registry = registry
        self._codec = codec

    def class_of(self, type: str) -> type | None:
        """The class of events of this type; None where this program has imported none."""
        kind = self._registry.by_name(type)
        return None if kind is None else kind.cls

    def event(self, record: Record) -> object:
        """The event of a record.

        Raises:
            UnknownEventType: no class for it, or an older one.
            UndecodableEvent: the bytes are damaged, or do not fit the class.
        """
        if record.event is not None:
            return record.event
        kind = self._registry.by_name(record.type)
        event = self._decode(record, kind)
        if kind is not None and kind.shared:
            record.event = event
        return event

    def envelope(self, record: Record) -> Envelope:
        """The envelope of a record. Of a damaged one its `event` raises, and its headers are left out if they are the damage."""
        return Envelope(
            record.position,
            record.id,
            record.type,
            record.version,
            shown(record.time),
            record.key,
            _headers(record),
            record.content_type,
            record.data,
            lambda _envelope: self._decode(record, self._registry.by_name(record.type)),
        )

    def dead_letter(self, row: DeadLetterRow) -> DeadLetter:
        """A row of `dead_letters` as users see it."""
        death = row.death
        return DeadLetter(
            row.id,
            row.subscription,
            self.envelope(row.record),
            death.error_type,
            death.error,
            death.traceback,
            death.attempts,
            shown(death.first_failed_at),
            shown(death.last_failed_at),
            row.redriving,
        )

    def _decode(self, record: Record, kind: EventType | None) -> object:
        type, version = record.type, record.version
        if record.fault is not None:
            raise UndecodableEvent(type, version, record.fault)
        if kind is None:
            raise UnknownEventType(type, version, "no class is registered for it; import the module that defines it")
        if version > kind.version:
            found = f"the class here, {kind.cls.__qualname__}, is version {kind.version}; a newer program wrote it"
            raise UnknownEventType(type, version, found)
        if record.content_type != self._codec.content_type:
            found = f"its content type is {record.content_type!r}, the codec's is {self._codec.content_type!r}"
            raise UndecodableEvent(type, version, found)
        try:
            return self._codec.decode(record.data, kind.cls)
        except EventBusError:
            raise
        except Exception as error:
            raise UndecodableEvent(type, version, f"{error!s:.500}") from error


def _headers(record: Record) -> Mapping[str, str]:
    try:
        return headers_of(record)
    except ValueError:
        if record.fault is None:
            raise
        return {}
