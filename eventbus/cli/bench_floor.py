"""`python -m eventbus bench`: *the floors*, what SQLite does on this disk without a bus.

Bare loops over `sqlite3` in one thread, written by hand. They insert what a bus inserts, into the table and indexes that a bus
has made: first a bus makes the file and writes a batch into it, then the loops insert copies of those rows. All rows are there
before the clock starts. WAL, synchronous=FULL, else SQLite's defaults: its WAL checkpoints, every 1,000 pages, are included.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import attrs

from eventbus import EventBus
from eventbus.cli.bench_order import KeyedOrder, Order, orders
from eventbus.cli.demo_show import percentile

BATCH = 100
"""Rows in a commit of the bare loop, and events in a `publish_many`."""

_WARM_UP = 5
"""Commits before those that count."""

Value = int | float | str | bytes | None


class BenchFailed(Exception):
    """What was measured is not what should have been: events are missing, or a setting does not hold."""


@attrs.frozen
class Floor:
    """What a bare loop does.

    Attributes:
        events: inserted, `BATCH` in a commit.
        seconds: that took.
        commits: seconds of each bare one-row commit, ascending.
    """

    events: int
    seconds: float
    commits: Sequence[float]

    @property
    def per_second(self) -> float:
        """F: events per second of bare inserts."""
        return self.events / self.seconds

    @property
    def commit(self) -> float:
        """C: seconds of a bare one-row commit, the median."""
        return percentile(self.commits, 50)

    @property
    def commit_p99(self) -> float:
        """C99: the same, the 99th percentile. Disks stall by themselves."""
        return percentile(self.commits, 99)

    @property
    def commit_max(self) -> float:
        """The longest."""
        return self.commits[-1]


def measure_floor(path: Path, *, events: int, commits: int, like: Sequence[Order | KeyedOrder] = ()) -> Floor:
    """Insert `events` copies of what a bus writes for `like`, `BATCH` a commit, then `commits` one a commit; remove the file.

    Raises:
        BenchFailed: the file does not hold what was inserted.
    """
    anyio.run(_written_by_a_bus, path, like or orders(BATCH))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        _set_up(connection)
        source = Source.of(connection)
        batches = max(1, events // BATCH)
        rows = list(source.copies(_WARM_UP + batches + -(-(_WARM_UP + commits) // BATCH)))
        _insert(connection, source.statement, rows[:_WARM_UP])
        seconds = _insert(connection, source.statement, rows[_WARM_UP : _WARM_UP + batches])
        single = [row for batch in rows[_WARM_UP + batches :] for row in batch][: _WARM_UP + commits]
        taken = _insert_singly(connection, source.statement, single)[_WARM_UP:]
        _check_count(connection, BATCH * (1 + _WARM_UP + batches) + len(single))
    finally:
        connection.close()
        remove(path)
    return Floor(batches * BATCH, seconds, sorted(taken))


def remove(path: Path) -> None:
    """Remove a database with what belongs to it."""
    for suffix in ("", "-wal", "-shm", "-lock", "-ballast", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


# ------------------------------------------------------------------ the rows


async def _written_by_a_bus(path: Path, events: Sequence[object]) -> None:
    bus = EventBus(path)
    async with bus.open(dispatch=False):
        await bus.publish_many(events)


@attrs.frozen
class Source:
    """The rows that a bus has written, and how to insert more like them.

    Attributes:
        growing: indexes of the columns that are unique; in copies they go on growing.
    """

    statement: str
    rows: Sequence[tuple[Value, ...]]
    growing: Sequence[int]

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Source:
        """Whatever columns and indexes the table `events` has."""
        columns = [(str(name), key) for _, name, _, _, _, key in connection.execute("PRAGMA table_info(events)")]
        names = [name for name, _ in columns]
        unique = {name for name, key in columns if key} | set(_unique(connection))
        statement = f"INSERT INTO events ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608
        rows = connection.execute(f"SELECT {', '.join(names)} FROM events ORDER BY position").fetchall()  # noqa: S608
        if len(rows) != BATCH:
            raise BenchFailed(f"a bus has written {len(rows)} rows for {BATCH} events")
        return cls(statement, rows, [index for index, name in enumerate(names) if name in unique])

    def copies(self, batches: int) -> Iterator[list[tuple[Value, ...]]]:
        """Batches of rows that come after those that are there."""
        for number in range(1, batches + 1):
            batch = [list(row) for row in self.rows]
            for index in self.growing:
                first, last = self.rows[0][index], self.rows[-1][index]
                for row in batch:
                    row[index] = _moved(row[index], number * (_number(last) - _number(first) + 1))
            yield [tuple(row) for row in batch]


def _unique(connection: sqlite3.Connection) -> Iterator[str]:
    """Columns with a unique index of their own."""
    for _, index, unique, *_ in connection.execute("PRAGMA index_list(events)").fetchall():
        columns = [name for _, _, name in connection.execute(f"PRAGMA index_info({index})")]
        if unique and len(columns) == 1:
            yield columns[0]


def _number(value: Value) -> int:
    """A unique value as a number that is ordered as the value is."""
    if isinstance(value, int):
        return value
    if isinstance(value, bytes):
        return int.from_bytes(value)
    if isinstance(value, str):
        return uuid.UUID(value).int
    raise BenchFailed(f"a bus has written {value!r} into a unique column; the bare loop cannot make others like it")


def _moved(value: Value, by: int) -> Value:
    """A unique value that is larger by so much."""
    number = _number(value) + by
    if isinstance(value, bytes):
        return number.to_bytes(len(value))
    return str(uuid.UUID(int=number)) if isinstance(value, str) else number


# ------------------------------------------------------------------ the loops


def _set_up(connection: sqlite3.Connection) -> None:
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    connection.execute("PRAGMA synchronous=FULL")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()
    if (mode, synchronous) != (("wal",), (2,)):
        raise BenchFailed(f"the bare loop has journal_mode={mode[0]} and synchronous={synchronous[0]}, expected wal and 2 (FULL)")


def _insert(connection: sqlite3.Connection, statement: str, batches: Sequence[Sequence[tuple[Value, ...]]]) -> float:
    """Insert batch after batch; the seconds that it took."""
    execute, executemany = connection.execute, connection.executemany
    began = time.perf_counter()
    for batch in batches:
        execute("BEGIN IMMEDIATE")
        executemany(statement, batch)
        execute("COMMIT")
    return time.perf_counter() - began


def _insert_singly(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[Value, ...]]) -> list[float]:
    """Insert row after row; the seconds that each of them took."""
    execute, clock = connection.execute, time.perf_counter
    taken = []
    for row in rows:
        began = clock()
        execute("BEGIN IMMEDIATE")
        execute(statement, row)
        execute("COMMIT")
        taken.append(clock() - began)
    return taken


def _check_count(connection: sqlite3.Connection, expected: int) -> None:
    (found,) = connection.execute("SELECT count(*) FROM events").fetchone()
    if found != expected:
        raise BenchFailed(f"the bare loop has inserted {expected:,} rows, and {found:,} are there")
