"""How many statements a commit and a page take, whatever their size: each is a hand-over of the GIL, up to 5 ms beside a busy loop.

Counted as the tests of the default run count them, which fail if it changes (`tests/store/test_sqlite_commit.py`,
`test_steps_of_a_commit` and `test_steps_of_a_query`): what SQLite is told to run, by its trace. A page is one row of one statement.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from eventbus.stores.base import Batch, Claim, Events, LaneState, Record, Register, Registration, Unit, slot_of
from eventbus.stores.sqlite import SQLiteStore
from tests.benchmarks.big_log import INSTANCE
from tests.benchmarks.table import Row, Table

SIZES = (1, 2, 100, 512)


def test_steps(table: Table, tmp_path: Path) -> None:
    """The number of statements does not depend on the number of events."""
    store = SQLiteStore(tmp_path / "steps.db")
    store.open(INSTANCE)
    try:
        assert store._writer is not None
        assert store._reader is not None
        claim = Claim(INSTANCE.id, (("s", "t", 0),))
        lanes = cast("list[LaneState]", store.commit(Batch(time.time(), commands=[_register(), claim])).results[1])
        appends = {_count(store._writer, partial(_commit, store, size)) for size in SIZES}
        with_acks = {_count(store._writer, partial(_commit, store, size, epoch=lanes[0].epoch)) for size in SIZES}
        pages = {_count(store._reader, partial(store.read, Events(0, size, 10**9))) for size in SIZES}
    finally:
        store.close()
    constant = all(len(found) == 1 for found in (appends, with_acks, pages))
    append, acked, page = max(appends), max(with_acks), max(pages)
    table.add(
        Row(
            "sqlite3 steps per commit and per page",
            f"commit {append} statements, with acks {acked}; page {page}; " + ("constant" if constant else "NOT constant"),
            goal="constant, counted by a test",
            met=constant,
            backend="",
            note=f"for {', '.join(map(str, SIZES))} events; counted in the default run by tests/store/test_sqlite_commit.py",
            data={
                "commit_statements": float(append),
                "commit_with_acks_statements": float(acked),
                "page_statements": float(page),
            },
            order=180,
        )
    )


def _register() -> Register:
    return Register((Registration("s", ("t",), "type", 1, "beginning"),))


def _commit(store: SQLiteStore, size: int, *, epoch: int | None = None) -> None:
    number = time.perf_counter_ns()
    ids = [f"01900000-0000-7000-8000-{number + at:012x}"[:36] for at in range(size)]
    records = [Record(id, "t", 1, time.time(), None, slot_of(id), None, "application/json", b"{}") for id in ids]
    head = store.read(Events(0, 1, 1)).head
    units = [] if epoch is None else [Unit("s", "t", epoch, "log", head, head)]
    committed = store.commit(Batch(time.time(), appends=[records], units=units))
    assert not committed.refused
    assert committed.head == head + size


def _count(connection: sqlite3.Connection, work: Callable[[], object]) -> int:
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    work()
    connection.set_trace_callback(None)
    return len([text for text in statements if not text.startswith("PRAGMA wal_checkpoint")])
