"""One transaction of the SQLite store, inside its BEGIN IMMEDIATE: look, decide, write.

publish → journal → *store* → lanes → workers → outcome. In comes a batch; one SELECT brings all that has to be known to decide
it, as one row; what is decided in Python goes out in few statements of many rows. Each statement that a thread of ours
runs may cost 5 ms of waiting for the GIL beside a busy event loop: so their number does not depend on the size of the batch
(up to 512 events), and what has nothing to do is left out. A batch that only appends is a single statement, and that is
its whole transaction.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from eventbus.errors import IdempotencyConflict
from eventbus.stores._sqlite_insert import execute_rows, fit_in_one, insert_events, insert_scheduled, insert_together
from eventbus.stores._sqlite_rows import LANE_JSON, LaneRow, Value, decode, lane_of, to_micros
from eventbus.stores.base import Batch, LaneState, Record, Stored

LaneKey = tuple[str, str]

HEAD = "coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0)"
"""The log's last position, also when all was removed: AUTOINCREMENT remembers it."""

BUMP = "UPDATE log_state SET changes = changes + 1"
"""All instances are to look at what has changed; see `Standing.changes`."""


class Known(msgspec.Struct, frozen=True):
    """An idempotency key that is taken."""

    event_id: str
    position: int | None
    digest: str


class Found(msgspec.Struct):
    """What the store says about a batch before it is applied.

    Attributes:
        keys: the idempotency keys of the batch that are known.
        lanes: the lanes that its units name.
        rows: (subscription, position) of the waiting deliveries that its units come from.
        redriven: ids of the dead letters being redriven that its units come from.
    """

    head: int
    keys: dict[str, Known]
    lanes: dict[LaneKey, LaneState]
    rows: set[tuple[str, int]]
    redriven: set[int]


# ------------------------------------------------------------------ look


def look(connection: sqlite3.Connection, batch: Batch) -> Found:
    """Ask for all that decides this batch, in one statement of one row (in more where it names thousands of things)."""
    keys = list({r.idempotency_key for r in _records(batch) if r.idempotency_key is not None})
    lanes = list({(unit.subscription, unit.lane) for unit in batch.units})
    rows = list({(unit.subscription, unit.row) for unit in batch.units if unit.row is not None})
    letters = list({unit.dead_letter for unit in batch.units if unit.dead_letter is not None})
    found = Found(0, {}, {}, set(), set())
    for start in range(0, max(1, len(keys), len(lanes), len(rows), len(letters)), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        _look_at(connection, found, keys[part], lanes[part], rows[part], letters[part])
    return found


def _look_at(
    connection: sqlite3.Connection,
    found: Found,
    keys: list[str],
    lanes: list[LaneKey],
    rows: list[tuple[str, int]],
    letters: list[int],
) -> None:
    text = _look_text(_slots(len(keys)), _slots(len(lanes)), _slots(len(rows)), _slots(len(letters)))
    parameters: list[Value] = [*_padded(keys), *_padded_pairs(lanes), *_padded_pairs(rows), *_padded(letters)]
    found.head, *answers = connection.execute(text, parameters).fetchone()
    if keys:
        for key, id, position, digest in decode(answers[0], _KEYS, "idempotency"):
            found.keys[key] = Known(id, position, digest)
    if lanes:
        for row in decode(answers[1], _LANES, "lanes"):
            found.lanes[row[0], row[1]] = lane_of(row)
    if rows:
        found.rows.update(decode(answers[2], _ROWS, "deliveries"))
    if letters:
        found.redriven.update(decode(answers[3], _LETTERS, "dead_letters"))


_AT_ONCE = 4_096
"""Things of each kind to ask for at once: a statement may have 32,766 values."""


def _records(batch: Batch) -> Iterable[Record]:
    for group in batch.appends:
        yield from group
    for unit in batch.units:
        yield from unit.published


_KEYS = msgspec.json.Decoder(list[tuple[str, str, int | None, str]])
_LANES = msgspec.json.Decoder(list[LaneRow])
_ROWS = msgspec.json.Decoder(list[tuple[str, int]])
_LETTERS = msgspec.json.Decoder(list[int])


def _slots(count: int) -> int:
    """Room for `count` values, in powers of two: few texts to prepare, whatever the batches look like."""
    return 0 if not count else 1 << (count - 1).bit_length()


def _padded(values: Sequence[str | int]) -> list[Value]:
    found: list[Value] = list(values)
    return found + [None] * (_slots(len(found)) - len(found))


def _padded_pairs(pairs: Sequence[tuple[str, str | int]]) -> list[Value]:
    flat: list[Value] = [value for pair in pairs for value in pair]
    return flat + [None] * (2 * (_slots(len(pairs)) - len(pairs)))


@functools.lru_cache(maxsize=256)
def _look_text(keys: int, lanes: int, rows: int, letters: int) -> str:
    parts = [HEAD]
    row_of_key = "json_array(key, event_id, position, hex(digest))"
    parts.append(_collected(row_of_key, f"idempotency WHERE key IN ({', '.join('?' * keys)})", keys))
    parts.append(_collected(LANE_JSON, _joined("lanes", "lane", lanes), lanes))
    parts.append(_collected("json_array(subscription, position)", _joined("deliveries", "position", rows), rows))
    parts.append(_collected("id", f"dead_letters WHERE redriving AND id IN ({', '.join('?' * letters)})", letters))
    return f"SELECT {', '.join(parts)}"


def _joined(table: str, column: str, wanted: int) -> str:
    """The rows for pairs of values; a CROSS JOIN, since for `(a, b) IN (VALUES …)` SQLite may scan the table."""
    pairs = ", ".join(["(?, ?)"] * wanted)
    return f"(VALUES {pairs}) wanted CROSS JOIN {table} ON subscription = wanted.column1 AND {column} = wanted.column2"


def _collected(json: str, source: str, wanted: int) -> str:
    return f"(SELECT CAST(json_group_array({json}) AS BLOB) FROM {source})" if wanted else "NULL"


# ------------------------------------------------------------------ decide: what enters the log


def digest_of(record: Record) -> str:
    """What an idempotency key stands for: the event's type, key and content, as 16 bytes in hexadecimal."""
    parts = (record.type, str(record.version), record.key, record.content_type)
    head = "".join("-" if part is None else f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(head.encode() + b"|" + record.data, digest_size=16).hexdigest().upper()


class Entering:
    """What enters the log, or waits for its time, with one transaction; gives out the positions.

    Attributes:
        head: the last position given out.
        events: records in the order of their positions, which follow upon each other from the head before; they become theirs
            when the transaction is committed.
    """

    def __init__(self, head: int, keys: dict[str, Known]) -> None:
        self.head = head
        self.events: list[Record] = []
        self.scheduled: list[Record] = []
        self._first = head + 1
        self._keys = keys
        self._new_keys: dict[str, Record] = {}

    def admit(self, records: Sequence[Record]) -> list[Stored] | IdempotencyConflict | None:
        """Take a group in whole, or nothing of it; see `Committed.appends`."""
        for record in records:
            if record.idempotency_key is not None or record.due_at is not None:
                return self._admit_with_keys(records)
        self.events.extend(records)
        self.head += len(records)
        return None

    def _admit_with_keys(self, records: Sequence[Record]) -> list[Stored] | IdempotencyConflict:
        conflict = self._conflict(records)
        return [self._enter(record) for record in records] if conflict is None else conflict

    def _conflict(self, records: Sequence[Record]) -> IdempotencyConflict | None:
        fresh: dict[str, Known] = {}
        for record in records:
            key = record.idempotency_key
            if key is None:
                continue
            digest = digest_of(record)
            known = self._keys.get(key) or fresh.setdefault(key, Known(record.id, None, digest))
            if known.digest != digest:
                return IdempotencyConflict(key, known.event_id)
        return None

    def _enter(self, record: Record) -> Stored:
        key = record.idempotency_key
        known = None if key is None else self._keys.get(key)
        if known is not None:
            return Stored(known.event_id, known.position, duplicate=True)
        position = None
        if record.due_at is None:
            self.head += 1
            position = self.head
            self.events.append(record)
        else:
            self.scheduled.append(record)
        if key is not None:
            self._keys[key] = Known(record.id, position, digest_of(record))
            self._new_keys[key] = record
        return Stored(record.id, position)

    # -------------------------------------------------------------- write

    def write(self, connection: sqlite3.Connection, now: float) -> None:
        """Insert it all."""
        insert_events(connection, self.events, self._first)
        insert_scheduled(connection, self.scheduled)
        if self._new_keys:
            time = to_micros(now)
            known = [(key, self._keys[key]) for key in self._new_keys]
            rows = [(key, k.event_id, k.position, bytes.fromhex(k.digest), time) for key, k in known]
            execute_rows(connection, "INSERT INTO idempotency (key, event_id, position, digest, time)", rows)


def only_appended(batch: Batch) -> list[Record] | None:
    """The events of a batch that does no more than append them, and does so in one statement; None of any other batch."""
    if batch.units or batch.commands:
        return None
    records = list(itertools.chain.from_iterable(batch.appends))
    if not records or not fit_in_one(records):
        return None
    for record in records:
        if record.idempotency_key is not None or record.due_at is not None:
            return None
    return records


def append_after(connection: sqlite3.Connection, head: int, records: Sequence[Record]) -> bool:
    """Write events after the head of the log, in a transaction that is this one statement.

    If the head is not the one given, since another connection has written, nothing is written; False then.
    """
    at_head = "AND (SELECT seq FROM sqlite_sequence WHERE name = 'events') IS ?"
    return bool(insert_together(connection, records, head + 1, at_head, (head or None,)))
