"""A bare sqlite3 loop on a log that is there: what inserting into this file costs without a bus. The log is left as it was."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from eventbus.cli.bench_floor import BATCH, Source
from eventbus.cli.bench_order import KEYS
from eventbus.cli.bench_work import Throughput

_WARM_UP = 10
"""Batches before those that count."""


def insert_more(path: Path, batches: int) -> Throughput:
    """Insert copies of the newest `KEYS` events of a closed file, so many times `BATCH`, one batch in a commit; then remove them."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (head,) = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        source = _newest(connection)
        rows = [row for part in source.copies(-(-(_WARM_UP + batches) * BATCH // KEYS)) for row in part]
        began = 0.0
        for number in range(_WARM_UP + batches):
            batch = rows[number * BATCH : (number + 1) * BATCH]
            if number == _WARM_UP:
                began = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(source.statement, batch)
            connection.execute("COMMIT")
        seconds = time.perf_counter() - began
        _take_back(connection, head)
    return Throughput(batches * BATCH, seconds)


def _newest(connection: sqlite3.Connection) -> Source:
    """Whatever columns the table `events` has; those that grow are the position and the id. As many events as there are keys in turn."""
    names = [str(name) for _, name, *_ in connection.execute("PRAGMA table_info(events)")]
    rows = connection.execute(f"SELECT {', '.join(names)} FROM events ORDER BY position DESC LIMIT {KEYS}").fetchall()
    statement = f"INSERT INTO events ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    return Source(statement, rows[::-1], [names.index("position"), names.index("id")])


def _take_back(connection: sqlite3.Connection, head: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM events WHERE position > ?", (head,))
    connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'events'", (head,))
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
