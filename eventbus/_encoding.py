"""The first step of an event's way: from the user's object to a `Record`.

*publish* → journal → store → lanes → workers → outcome. In come an event and the options of `publish`; out comes a record that
is ready to be stored, with its id, headers and bytes. All that can be wrong with an event is found here, in the caller, before
anything is queued: one bad event cannot fail those of others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from eventbus._clock import to_datetime
from eventbus._codec import Codec, Fault
from eventbus._events import is_event_class
from eventbus._model import Draft
from eventbus._outcomes import current_attempt
from eventbus.errors import EventBusError, InvalidEvent
from eventbus.stores.base import Record, headers_of, slot_of, storable

if TYPE_CHECKING:
    from eventbus._clock import Clock, Ids
    from eventbus._events import EventType, Registry
    from eventbus._outcomes import Attempt

_MAX_KEY = 255
_MAX_HEADERS_BYTES = 16_384

_added: ContextVar[Mapping[str, str]] = ContextVar("eventbus_headers", default={})  # noqa: B039  # never mutated


@contextmanager
def headers(**values: str) -> Iterator[None]:
    """Give headers to all events that are published in the block, such as a correlation_id that starts a chain.

    Values are strings. They are taken over those that follow from the delivery being handled, and under those of the call.
    """
    token = _added.set({**_added.get(), **values})
    try:
        yield
    finally:
        _added.reset(token)


def handler_context() -> Context:
    """A copy of the caller's context for handlers to run in, without its headers: theirs follow from what they handle."""
    context = copy_context()
    context.run(_added.set, {})
    return context


class Encoder:
    """Makes records. May be used from any thread."""

    def __init__(self, registry: Registry, codec: Codec, ids: Ids, clock: Clock, max_event_bytes: int) -> None:
        self._registry = registry
        self._encode = codec.encode
        self._content_type = codec.content_type
        self._ids = ids
        self._clock = clock
        self._max_bytes = max_event_bytes
        self._met: dict[type, EventType] = {}
        self._meeting = threading.Lock()
        self.on_new_type: Callable[[EventType], object] = lambda _kind: None
        """Called with each type before its first record is returned; one call at a time."""

    def is_event(self, thing: object) -> bool:
        """Whether this could be published."""
        return is_event_class(type(thing))

    def record(
        self,
        event: object,
        *,
        key: object = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | timedelta | None = None,
    ) -> Record:
        """A record that is ready to be stored.

        Raises:
            InvalidEvent: the event, or an option, cannot be stored as it is.
            InvalidEventType: the event's class cannot be an event.
        """
        return self._record(
            event,
            self._ids.next(),
            self._clock.time(),
            current_attempt.get(),
            _added.get(),
            key,
            idempotency_key,
            headers,
            due,
        )

    def records(self, drafts: Sequence[object]) -> list[Record]:
        """Records of `Draft`s, or of bare events, published at one time; raises as `record`."""
        ids, now, parent, added = self._ids.take(len(drafts)), self._clock.time(), current_attempt.get(), _added.get()
        records = []
        for id, draft in zip(ids, drafts, strict=True):
            if isinstance(draft, Draft):
                options = (draft.key, draft.idempotency_key, draft.headers, draft.due)
                records.append(self._record(draft.event, id, now, parent, added, *options))
            else:
                records.append(self._record(draft, id, now, parent, added))
        return records

    def _record(
        self,
        event: object,
        id: str,
        now: float,
        parent: Attempt | None,
        added: Mapping[str, str],
        key: object = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | timedelta | None = None,
    ) -> Record:
        """Every event comes this way; what most of them do not have costs no more than a look."""
        cls = type(event)
        kind = self._met.get(cls) or self._meet(cls)
        try:
            data = self._encode(event)
        except Fault as fault:
            raise InvalidEvent(kind.name, fault.field, fault.reason) from fault.__cause__
        except EventBusError:
            raise
        except Exception as error:
            raise InvalidEvent(kind.name, "", f"the codec failed: {type(error).__name__}: {error}") from error
        if len(data) > self._max_bytes:
            raise self._too_large(kind, data)
        if key is None and kind.key_field is not None:
            key = getattr(event, kind.key_field)
        text_key = None if key is None else _key(key, kind)
        return Record(
            id,
            kind.name,
            kind.version,
            now,
            text_key,
            slot_of(text_key or id),
            _headers(parent, added, headers, kind) if parent is not None or added or headers else None,
            self._content_type,
            data,
            None if idempotency_key is None else _idempotency_key(idempotency_key, kind),
            None if due is None else _due(due, now, kind),
            0,
            event if kind.shared else None,
            0 if parent is None else parent.record.position,
        )

    def _meet(self, cls: type) -> EventType:
        kind = self._registry.of(cls)
        with self._meeting:  # another thread may go on only when the type has been told of
            if cls not in self._met:
                self.on_new_type(kind)
                self._met[cls] = kind
        return kind

    def _too_large(self, kind: EventType, data: bytes) -> InvalidEvent:
        return InvalidEvent(
            kind.name,
            "",
            f"takes {len(data):,} bytes; the limit is {self._max_bytes:,} (max_event_bytes). "
            "Keep the bulk elsewhere and publish where it is",
        )


def _key(key: object, kind: EventType) -> str:
    try:
        text = str(key)
    except Exception as error:
        raise InvalidEvent(kind.name, "key", f"str() of the {type(key).__name__} given raised {error!r:.80}") from error
    if not 0 < len(text) <= _MAX_KEY or not storable(text):
        raise InvalidEvent(kind.name, "key", f"{text[:40]!r} is no key: 1 to {_MAX_KEY} characters of valid text")
    return text


def _idempotency_key(key: object, kind: EventType) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY or not storable(key):
        raise InvalidEvent(kind.name, "idempotency_key", f"must be a str of 1 to {_MAX_KEY} characters, not {str(key)[:40]!r}")
    return key


def _due(due: object, now: float, kind: EventType) -> float:
    try:
        if isinstance(due, timedelta):
            return to_datetime(now + due.total_seconds()).timestamp()
        if isinstance(due, datetime) and due.utcoffset() is not None:
            return to_datetime(due.timestamp()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidEvent(kind.name, "due", f"{due!r:.80} leads out of the calendar") from error
    raise InvalidEvent(kind.name, "due", f"must be an aware datetime or a timedelta, not {due!r:.80}")


def _headers(parent: Attempt | None, added: Mapping[str, str], own: Mapping[str, str] | None, kind: EventType) -> str | None:
    if own is not None and not isinstance(own, Mapping):
        raise InvalidEvent(kind.name, "headers", f"must be a mapping of text to text, not {own!r:.80}")
    values: dict[str, str] = {}
    if parent is not None:
        cause = parent.record
        values["correlation_id"] = headers_of(cause).get("correlation_id", cause.id)
        values["causation_id"] = cause.id
    of_users = {**added, **(own or {})}
    values.update(of_users)
    for name, value in of_users.items():
        if not isinstance(name, str) or not isinstance(value, str) or not storable(name + value):
            raise InvalidEvent(kind.name, f"headers[{name!r}]", f"headers are text for text, not {value!r:.80}")
    text = msgspec.json.encode(values).decode()
    if len(text) > _MAX_HEADERS_BYTES:
        raise InvalidEvent(kind.name, "headers", f"take {len(text):,} characters; the limit is {_MAX_HEADERS_BYTES:,}")
    return text
