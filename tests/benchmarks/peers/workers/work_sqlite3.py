"""The floor: the sqlite3 module alone. One row for each event, its bytes made beforehand; no bus, no handler, no ack.

The table has the columns and indexes that a bus needs at the least: a unique event id, a position, and an index by type.
"""

import sqlite3
import time

import common

TABLE = """CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    type TEXT NOT NULL,
    time REAL NOT NULL,
    data TEXT NOT NULL
)"""
INSERT = "INSERT INTO events (id, type, time, data) VALUES (?, ?, ?, ?)"


def rows(number: int) -> list[tuple[str, str, float, str]]:
    """Rows with ids that grow, as UUIDv7 do."""
    now = time.time()
    return [(f"{i:032x}", "order.placed", now, common.to_json(common.event(i))) for i in range(number)]


def work(task: common.Task) -> dict[str, object]:
    connection = sqlite3.connect(task.folder / "floor.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {task.setting}")
    connection.execute(TABLE)
    connection.execute("CREATE INDEX events_type ON events (type, position)")
    settings = common.pragmas(connection.execute, "PRAGMA on the connection")
    at_once = common.BATCH if task.measure == "many" else 1

    def commit(some: list[tuple[str, str, float, str]]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(INSERT, some)
        connection.execute("COMMIT")

    if task.measure == "latency":
        calls = common.Calls()
        ready = rows(200_000)

        def publish(number: int) -> None:
            commit(ready[number : number + 1])
            calls.mark()

        return {
            "figures": common.latency(publish, calls, task.seconds),
            "settings": settings,
            "how": "BEGIN, INSERT, COMMIT; then a function is called",
        }

    # The time counts in which rows are inserted, not that in which they are made.
    total, spent = 0, 0.0
    while spent < task.seconds:
        connection.execute("DELETE FROM events")
        some = rows(200 * at_once)
        started = time.perf_counter()
        for first in range(0, len(some), at_once):
            commit(some[first : first + at_once])
        spent += time.perf_counter() - started
        total += len(some)
    return {
        "figures": {"events": total, "seconds": spent, "events_per_second": total / spent},
        "settings": settings,
        "how": f"executemany, {at_once} rows a commit" if at_once > 1 else "one row a commit",
    }


if __name__ == "__main__":
    common.main(work)
