"""Rows of the SQLite store ⇄ records: the columns, in SQL and in Python, and their checksums.

publish → journal → *store* → lanes → workers → outcome. What goes to SQLite are flat lists of values for statements of
so many rows; what comes back is one row of JSON, since each further row that is fetched costs a hand-over of the GIL,
up to 5 ms beside a busy event loop. JSON in SQLite 3.40 gives 15 digits of a float; so times travel as whole
microseconds, in which they are kept.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from eventbus.errors import StoreCorrupt
from eventbus.stores.base import (
    DeadLetterRow,
    Death,
    Floor,
    Instance,
    LaneState,
    Member,
    Order,
    Record,
    Serves,
    Subscribed,
    Waiting,
    WaitingRow,
    WaitingState,
    checksum_of,
    checksum_parts,
)

T = TypeVar("T")
R = TypeVar("R")
Parameters = Sequence[Any] | Mapping[str, Any]
Value = str | bytes | int | float | None

JSON = "application/json"


def micros(seconds: float) -> int:
    """Unix seconds as whole microseconds."""
    return round(seconds * 1e6)


def _micros(column: str) -> str:
    return f"CAST(round({column} * 1e6) AS INTEGER)"


def to_micros(seconds: float) -> float:
    """The time as it is kept: exact to the microsecond, so that it comes back as it was."""
    return round(seconds * 1e6) / 1e6


def _seconds(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def decode(raw: bytes, decoder: msgspec.json.Decoder[list[T]], what: str) -> list[T]:
    """The rows in one value of JSON. Damaged text is let through, with a mark in place of what is not UTF-8: the checksum of its
    row tells on it, and the other rows are not lost with it."""
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return decoder.decode(raw.decode(errors="replace"))
    except msgspec.DecodeError as error:
        raise StoreCorrupt(f"the rows of {what} are not what they should be: {error}") from error


# ------------------------------------------------------------------ events

EVENT_COLUMNS = "type, version, time, key, slot, headers, content_type, size, crc, data"
"""What a scheduled event and a dead letter have of an event, too: all but id and position."""

EventRow = tuple[int, str, str, int, int, str | None, int, str | None, str, int, int, str]


def event_json(position: str = "e.position", id: str = "e.id") -> str:
    """The JSON of an event `e`, as `record_of` takes it."""
    return (
        f"json_array({position}, {id}, e.type, e.version, {_micros('e.time')}, e.key, e.slot, e.headers, e.content_type, e.crc, "
        "typeof(e.data) = 'blob', CASE typeof(e.data) WHEN 'blob' THEN hex(e.data) ELSE CAST(e.data AS TEXT) END)"
    )


EVENT_ROWS = msgspec.json.Decoder(list[EventRow])


def records_of(rows: Iterable[EventRow]) -> list[Record]:
    """Records from their rows, their checksums verified."""
    seen: tuple[object, ...] = ()
    seconds, middle, end = 0.0, "", ""
    records = []
    for position, id, type, version, time, key, slot, headers, content_type, crc, is_blob, text in rows:
        data = bytes.fromhex(text) if is_blob else text.encode()
        shared = (time, type, version, headers, content_type)
        if shared != seen:  # what was published together has most of it in common
            seconds = time / 1e6
        record = Record(id, type, version, seconds, key, slot, headers, content_type, data, None, None, position)
        if shared != seen:
            seen = shared
            middle, end = checksum_parts(record, repr(seconds))
        found = checksum_of(position, record, middle, end)
        if found != crc:
            record.fault = f"its checksum is {found}, {crc} was stored with it: the row was damaged or changed"
        records.append(record)
    return records


def record_of(row: EventRow) -> Record:
    """One of them."""
    return records_of((row,))[0]


# ------------------------------------------------------------------ lanes

UPSERT_LANES = (
    "INSERT INTO lanes (subscription, lane, owner, epoch, checkpoint, done, attempt, due_at, first_failed_at, error, crc)"
)
KEEP_OWNER = (
    "ON CONFLICT (subscription, lane) DO UPDATE SET epoch = excluded.epoch, checkpoint = excluded.checkpoint, "
    "done = excluded.done, attempt = excluded.attempt, due_at = excluded.due_at, first_failed_at = excluded.first_failed_at, "
    "error = excluded.error, crc = excluded.crc"
)
NEW_OWNER = f"{KEEP_OWNER}, owner = excluded.owner"

LANE_JSON = (
    "json_array(subscription, lane, epoch, checkpoint, done, attempt, "
    f"{_micros('due_at')}, {_micros('first_failed_at')}, error, crc)"
)
LaneRow = tuple[str, str, int, int, str | None, int, int | None, int | None, str | None, int]
LANE_ROWS = msgspec.json.Decoder(list[LaneRow])
_POSITIONS = msgspec.json.Decoder(tuple[int, ...])


def _crc(row: tuple[object, ...]) -> int:
    """The checksum of a row: of its values as they stand in its JSON, without itself."""
    return zlib.crc32("|".join(map(str, row)).encode())


def _damaged(what: str, table: str, rest: str) -> StoreCorrupt:
    """The error for a row that does not match its checksum."""
    return StoreCorrupt(f"{what} does not match its checksum: its row in `{table}` was damaged, or changed by hand{rest}")


def lane_of(row: LaneRow) -> LaneState:
    """A lane from its row. Raises StoreCorrupt if its checksum does not fit: a wrong checkpoint would skip events."""
    subscription, lane, epoch, checkpoint, done, attempt, due_at, first_failed_at, error, crc = row
    if _crc(row[:-1]) != crc:
        raise _damaged(
            f"lane {lane!r} of subscription {subscription!r}",
            "lanes",
            ". With the row deleted from `lanes`, while no bus is open, the lane begins again where its subscription began, and "
            "what it had settled is delivered again",
        )
    positions = _POSITIONS.decode(done) if done else ()
    return LaneState(
        subscription, lane, epoch, checkpoint, positions, attempt, _seconds(due_at), _seconds(first_failed_at), error
    )


def lane_values(state: LaneState, owner: str | None) -> tuple[Value, ...]:
    """The values of a lane's row."""
    done = msgspec.json.encode(state.done).decode() if state.done else None
    due_at = None if state.due_at is None else micros(state.due_at)
    first = None if state.first_failed_at is None else micros(state.first_failed_at)
    key = (state.subscription, state.lane)
    crc = _crc((*key, state.epoch, state.checkpoint, done, state.attempt, due_at, first, state.error))
    times = (_seconds(due_at), _seconds(first))
    return (*key, owner, state.epoch, state.checkpoint, done, state.attempt, *times, state.error, crc)


# ------------------------------------------------------------------ waiting deliveries

UPSERT_WAITING = "INSERT INTO deliveries (subscription, position, lane, key, state, attempt, due_at, first_failed_at, error, crc)"
ON_WAITING = (
    "ON CONFLICT (subscription, position) DO UPDATE SET lane = excluded.lane, key = excluded.key, state = excluded.state, "
    "attempt = excluded.attempt, due_at = excluded.due_at, first_failed_at = excluded.first_failed_at, error = excluded.error, "
    "crc = excluded.crc"
)
WAITING_JSON = (
    "json_array(subscription, position, lane, key, state, attempt, "
    f"{_micros('due_at')}, {_micros('first_failed_at')}, error, crc)"
)
WaitingValues = tuple[str, int, str, str | None, str, int, int, int | None, str | None, int]
WAITING_ROWS = msgspec.json.Decoder(list[WaitingValues])


def waiting_of(row: WaitingValues) -> WaitingRow:
    """A waiting delivery from its row. Raises StoreCorrupt if its checksum does not fit: an event would be passed by."""
    subscription, position, lane, key, state, attempt, due_at, first_failed_at, error, crc = row
    if _crc(row[:-1]) != crc:
        raise _damaged(
            f"the waiting delivery of position {position} to subscription {subscription!r}",
            "deliveries",
            "; rewind the subscription to before it (on a bus opened with dispatch=False), or remove the row and replay the "
            "event",
        )
    state = cast("WaitingState", state)
    waiting = Waiting(position, key, attempt, due_at / 1e6, state, _seconds(first_failed_at), error)
    return WaitingRow(subscription, lane, waiting)


def waiting_values(subscription: str, lane: str, waiting: Waiting) -> tuple[Value, ...]:
    """The values of a waiting delivery's row."""
    due_at = micros(waiting.due_at)
    first = None if waiting.first_failed_at is None else micros(waiting.first_failed_at)
    begin = (subscription, waiting.position, lane, waiting.key, waiting.state, waiting.attempt)
    return (*begin, due_at / 1e6, _seconds(first), waiting.error, _crc((*begin, due_at, first, waiting.error)))


# ------------------------------------------------------------------ dead letters

DeadRow = tuple[int, str, EventRow, str, str, str, int, int, int, int, int, int | None]
DEAD_ROWS = msgspec.json.Decoder(list[DeadRow])
DEAD_JSON = (
    f"json_array(e.id, e.subscription, {event_json('e.position', 'e.event_id')}, e.error_type, e.error, e.traceback, e.attempts, "
    f"{_micros('e.first_failed_at')}, {_micros('e.last_failed_at')}, e.redriving, e.attempt, {_micros('e.due_at')})"
)


def dead_letter_of(row: DeadRow) -> DeadLetterRow:
    """A dead letter from its row; the checksum of its event is verified."""
    id, subscription, event, error_type, error, traceback, attempts, first, last, redriving, attempt, due_at = row
    death = Death(error_type, error, traceback, attempts, first / 1e6, last / 1e6)
    return DeadLetterRow(id, subscription, record_of(event), death, bool(redriving), attempt, _seconds(due_at))


# ------------------------------------------------------------------ subscriptions

SUBSCRIPTION_JSON = (
    'json_array(name, types, since, "order", concurrency, generation, paused, '
    f"{_micros('paused_at')}, {_micros('created_at')}, derived, floors, crc)"
)
SubscriptionRow = tuple[str, str, str, str, int, int, str | None, int | None, int, str, str, int]
SUBSCRIPTION_ROWS = msgspec.json.Decoder(list[SubscriptionRow])
_TYPES = msgspec.json.Decoder(tuple[str, ...])
_SINCE = msgspec.json.Decoder(dict[str, int])
_FLOORS = msgspec.json.Decoder(tuple[Floor, ...])

UPSERT_SUBSCRIPTION = (
    'INSERT INTO subscriptions (name, types, since, "order", concurrency, generation, paused, paused_at, created_at, derived, '
    "floors, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    'ON CONFLICT (name) DO UPDATE SET types = excluded.types, since = excluded.since, "order" = excluded."order", '
    "concurrency = excluded.concurrency, generation = excluded.generation, paused = excluded.paused, "
    "paused_at = excluded.paused_at, created_at = excluded.created_at, derived = excluded.derived, floors = excluded.floors, "
    "crc = excluded.crc"
)


def subscribed_of(row: SubscriptionRow) -> Subscribed:
    """A subscription from its row. Raises StoreCorrupt if its checksum does not fit: events would be passed by."""
    name, types, since, order, concurrency, generation, paused, paused_at, created_at, derived, floors, crc = row
    if _crc(row[:-1]) != crc:
        raise _damaged(
            f"subscription {name!r}",
            "subscriptions",
            "; restore a copy of the file. Without the row the subscription would begin anew",
        )
    return Subscribed(
        name,
        _TYPES.decode(types),
        _SINCE.decode(since),
        cast("Order", order),
        concurrency,
        paused,
        _seconds(paused_at),
        created_at / 1e6,
        _TYPES.decode(derived),
        generation,
        _FLOORS.decode(floors),
    )


def subscription_values(it: Subscribed) -> tuple[Value, ...]:
    """The values of a subscription's row."""
    types, since, derived, floors = (msgspec.json.encode(value).decode() for value in (it.types, it.since, it.derived, it.floors))
    paused_at = None if it.paused_at is None else micros(it.paused_at)
    begin, created_at = (it.name, types, since, it.order, it.concurrency, it.generation, it.paused), micros(it.created_at)
    crc = _crc((*begin, paused_at, created_at, derived, floors))
    return (*begin, _seconds(paused_at), created_at / 1e6, derived, floors, crc)


# ------------------------------------------------------------------ instances

MEMBER_JSON = f"json_array(id, name, host, pid, {_micros('started')}, {_micros('seen')}, json(serves), json(holds))"
MemberRow = tuple[str, str, str, int, int, int, dict[str, Serves], tuple[str, ...]]
MEMBER_ROWS = msgspec.json.Decoder(list[MemberRow])


def member_of(row: MemberRow) -> Member:
    """An instance from its row."""
    id, name, host, pid, started, seen, serves, holds = row
    return Member(Instance(id, name, host, pid, started / 1e6), seen / 1e6, serves, holds)


def single(connection: sqlite3.Connection, text: str, parameters: Parameters, type: type[T], what: str) -> T:
    """The only row of a statement. Raises StoreCorrupt if there is none, or if a value is not of the type that was stored: a
    damaged file may have any."""
    try:
        return msgspec.convert(connection.execute(text, parameters).fetchone(), type)
    except msgspec.ValidationError as error:
        raise StoreCorrupt(f"the rows of {what} are not what they should be: {error}") from error


def one(
    connection: sqlite3.Connection, text: str, parameters: Parameters, decoder: msgspec.json.Decoder[list[T]], what: str
) -> list[T]:
    """The rows of a statement that yields them as one value of JSON."""
    (raw,) = connection.execute(text, parameters).fetchone()
    return decode(raw, decoder, what)


def collect(json: str, source: str) -> str:
    """A statement that yields all rows of `source` as one value, of bytes, so that damaged text gets through."""
    return f"SELECT CAST(json_group_array({json}) AS BLOB) {source}"


def ask(
    connection: sqlite3.Connection,
    json: str,
    source: str,
    parameters: Parameters,
    decoder: msgspec.json.Decoder[list[T]],
    make: Callable[[T], R],
) -> list[R]:
    """Every row of `source`, made into what it stands for."""
    return [make(row) for row in one(connection, collect(json, source), parameters, decoder, source)]


def give_checksums(connection: sqlite3.Connection) -> None:
    """Checksums for the rows of the tables that had none in version 1, as they stand."""
    for row in one(connection, collect(SUBSCRIPTION_JSON, "FROM subscriptions"), (), SUBSCRIPTION_ROWS, "subscriptions"):
        connection.execute("UPDATE subscriptions SET crc = ? WHERE name = ?", (_crc(row[:-1]), row[0]))
    for waiting in one(connection, collect(WAITING_JSON, "FROM deliveries"), (), WAITING_ROWS, "deliveries"):
        values = (_crc(waiting[:-1]), *waiting[:2])
        connection.execute("UPDATE deliveries SET crc = ? WHERE subscription = ? AND position = ?", values)
