"""Records → rows of the SQLite store: statements that write many rows in one step.

publish → journal → *store* → lanes → workers → outcome. In come records and the positions that they get, or rows as tuples;
out goes one statement for up to `ROWS` of them, since each step of a statement may cost a wait for the GIL. What takes long
here is binding values to a statement, so what rows have in common is bound once.
"""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from eventbus.stores._sqlite_rows import EVENT_COLUMNS, JSON, Value, to_micros
from eventbus.stores.base import Record, checksum, checksum_of, checksum_parts

ROWS = 512
"""The most rows in one statement."""

_STATEMENT_BYTES = 4 * 1_048_576
"""The most data in one statement, roughly: it keeps what was bound to it last."""


# ------------------------------------------------------------------ statements of many rows


@functools.lru_cache(maxsize=512)
def _text(head: str, width: int, room: int, tail: str) -> str:
    row = f"({', '.join('?' * width)})"
    return f"{head} (VALUES {', '.join([row] * room)}) WHERE column1 IS NOT NULL {tail}"


def _room(rows: int) -> int:
    """The next larger number of rows that has a text: exact up to 16, then in steps of at most an eighth."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def _execute(
    connection: sqlite3.Connection, head: str, width: int, values: list[Value], tail: str, last: tuple[Value, ...]
) -> int:
    """`head <rows> tail` for rows of `width` values each, one behind the other; returns how many rows were written.

    A statement keeps its bytecode, 1.3 KB a row, and the values bound last. With one for every number of rows that came to
    170 MB for small events. So there are some 50 sizes of each; what is left over is filled up with rows that begin with NULL,
    which the WHERE drops: at most an eighth, 5 % of the time.
    """
    before = head.count("?")
    rows = (len(values) - before) // width
    values += [None, *[0] * (width - 1)] * (_room(rows) - rows)
    values += last
    return connection.execute(_text(head, width, _room(rows), tail), values).rowcount


def execute_rows(
    connection: sqlite3.Connection, head: str, rows: Sequence[tuple[Value, ...]], tail: str = "", first: tuple[Value, ...] = ()
) -> None:
    """`head <rows> tail`, in one statement for up to `ROWS` rows; the first value of a row must not be NULL.

    Args:
        first: values that `head` has before the rows.
    """
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        values = [*first, *itertools.chain.from_iterable(some)]
        _execute(connection, f"{head} SELECT * FROM", len(some[0]), values, tail, ())


# ------------------------------------------------------------------ events


def fit_in_one(records: Sequence[Record]) -> bool:
    """Whether one statement can insert so many events with so much data."""
    return len(records) <= ROWS and sum([len(record.data) for record in records]) <= _STATEMENT_BYTES


def insert_events(connection: sqlite3.Connection, records: Sequence[Record], first: int) -> None:
    """Write events at positions that follow upon each other, from the one given, in as few statements as there may be."""
    for some in _pieces(records):
        insert_together(connection, some, first)
        first += len(some)


def insert_together(
    connection: sqlite3.Connection, records: Sequence[Record], first: int, tail: str = "", last: tuple[Value, ...] = ()
) -> int:
    """Write events that `fit_in_one` statement, from the position given on; returns how many were written.

    A record's time becomes exact to the microsecond. What all records share, as those of most batches do, is bound once: to
    bind a value takes longer than to copy it in SQLite, and to bind NULL three times as long as a text.

    Args:
        tail, last: what comes behind the rows, and the values in it.
    """
    shape = _shape_of(records)
    head, width = _head(shape)
    return _execute(connection, head, width, _values(records, first, shape), tail, last)


class _Shape(msgspec.Struct, frozen=True):
    """What is bound for each row, beside what always is.

    Attributes:
        alike: they have the same type, version and content type, and no faults; these are bound once.
        keyed: some have a key. headed: their headers differ; where they do not, they are bound once.
    """

    alike: bool
    keyed: bool
    headed: bool


def _shape_of(records: Sequence[Record]) -> _Shape:
    first = records[0]
    type, version, content_type, headers = first.type, first.version, first.content_type, first.headers
    alike, keyed, headed = True, False, False
    for record in records:
        if record.type != type or record.version != version or record.content_type != content_type or record.fault is not None:
            alike = False
        if record.key is not None:
            keyed = True
        if record.headers != headers:
            headed = True
    return _Shape(alike, keyed, headed)


_OWN = ["time", "slot", "size", "crc", "data", "id", "position"]
_KIND = ["type", "version", "content_type"]


def _columns(shape: _Shape) -> tuple[list[str], list[str]]:
    """The columns that are bound once, and those that are bound for each row; in the order of `_values`."""
    once = [*(_KIND if shape.alike else ()), *(() if shape.headed else ("headers",))]
    texts = [*(("key",) if shape.keyed else ()), *(("headers",) if shape.headed else ())]
    return once, [*_OWN, *texts, *(() if shape.alike else _KIND)]


@functools.lru_cache(maxsize=16)
def _head(shape: _Shape) -> tuple[str, int]:
    """What comes before the rows, and how many values each has."""
    once, each = _columns(shape)
    # To bind NULL takes three times as long as a text, and neither a key nor headers are ever empty.
    values = [f"nullif(column{at}, '')" if name in {"key", "headers"} else f"column{at}" for at, name in enumerate(each, 1)]
    names = ", ".join([*once, *each])
    return f"INSERT INTO events ({names}) SELECT {', '.join(['?'] * len(once) + values)} FROM", len(each)


def _values(records: Sequence[Record], first: int, shape: _Shape) -> list[Value]:
    """What they share, then the values of each; in the order of `_columns`."""
    sample, alike, keyed, headed = records[0], shape.alike, shape.keyed, shape.headed
    values: list[Value] = [sample.type, sample.version, sample.content_type] if alike else []
    if not headed:
        values.append(sample.headers)
    seen, time, middle, end = None, 0.0, "", ""
    for position, record in enumerate(records, first):
        if record.time != seen or headed or not alike:  # what is published together has one time
            seen = time = to_micros(record.time)
            record.time = time
            middle, end = checksum_parts(record, repr(time))
        data, crc = record.data, checksum_of(position, record, middle, end)
        if not alike and record.fault is not None:
            crc ^= _DAMAGED
        value = _text_of(data) if record.content_type == JSON else data
        values += (time, record.slot, len(data), crc, value, record.id, position)
        if keyed:
            values.append(record.key or "")
        if headed:
            values.append(record.headers or "")
        if not alike:
            values += (record.type, record.version, record.content_type)
    return values


_DAMAGED = 0xFFFFFFFF
"""What was damaged stays so, also where it is written anew: its checksum does not fit."""


def _event_values(record: Record, position: int) -> tuple[Value, ...]:
    """The values of `EVENT_COLUMNS`."""
    record.time = to_micros(record.time)
    crc = checksum(record, position)
    if record.fault is not None:
        crc ^= _DAMAGED
    return (
        record.type,
        record.version,
        record.time,
        record.key,
        record.slot,
        record.headers,
        record.content_type,
        len(record.data),
        crc,
        _text_of(record.data) if record.content_type == JSON else record.data,
    )


def _text_of(data: bytes) -> str | bytes:
    """JSON is stored as text, for people and for SQL; anything else, and what only claims to be JSON, as it is."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def insert_scheduled(connection: sqlite3.Connection, records: Sequence[Record]) -> None:
    """Write events that wait for their time."""
    head = f"INSERT INTO scheduled ({EVENT_COLUMNS}, id, due_at, idempotency_key)"
    for some in _pieces(records):
        rows: list[tuple[Value, ...]] = []
        for record in some:
            due_at = record.due_at = to_micros(record.due_at or 0.0)
            rows.append((*_event_values(record, 0), record.id, due_at, record.idempotency_key))
        execute_rows(connection, head, rows)


def _pieces(records: Sequence[Record]) -> Iterable[Sequence[Record]]:
    """Cut so that each piece fits in one statement."""
    if fit_in_one(records):
        return [records] if records else []
    pieces: list[list[Record]] = [[]]
    room = _STATEMENT_BYTES
    for record in records:
        size = len(record.data)
        if (size > room and pieces[-1]) or len(pieces[-1]) == ROWS:
            pieces.append([])
            room = _STATEMENT_BYTES
        pieces[-1].append(record)
        room -= size
    return pieces
