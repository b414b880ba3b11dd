"""Whether the tables of a file hold together: what no checksum of a row tells.

publish → journal → *store* → lanes → workers → outcome. In comes a connection to tables of the version that this code knows; out
goes nothing, or in words what a damaged disk, or a hand, has done to them. Above all to the number from which positions go on:
were one given twice, its event would lie below the checkpoints of lanes, and nobody would ever handle it.
"""

from __future__ import annotations

import sqlite3

from eventbus.errors import StoreCorrupt
from eventbus.stores._sqlite_commit import HEAD
from eventbus.stores._sqlite_rows import single
from eventbus.stores._sqlite_schema import OURS

_NUMBERS = (
    f"SELECT {HEAD}, max(coalesce((SELECT max(position) FROM events), 0), pruned_to), "
    "changes, coalesce((SELECT max(generation) FROM subscriptions), 0) FROM log_state"
)


def refuse_unsound(connection: sqlite3.Connection, address: str) -> None:
    """Raise StoreCorrupt, in words, if the tables do not hold together."""
    found = unsound(connection)
    if found is not None:
        raise StoreCorrupt(f"{address}: {found}")


def unsound(connection: sqlite3.Connection) -> str | None:
    """What does not hold together, and what to do about it; None if nothing was found. However long the log is, it costs
    the same.

    Raises:
        StoreCorrupt: what is asked cannot be read. sqlite3.Error: so, too.
    """
    tables = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
    there = {name for name, sql in tables if str(sql).startswith(f"CREATE TABLE {name} (")}  # sqlite_sequence goes by that name
    missing = sorted(set(OURS) - there)
    if missing:
        return f"the file is damaged: the table {missing[0]} is gone; restore a copy of the file"
    head, reached, changes, generation = single(connection, _NUMBERS, (), tuple[int, int, int, int], "log_state")
    if head < reached:
        script = f"DELETE FROM sqlite_sequence WHERE name = 'events'; INSERT INTO sqlite_sequence VALUES ('events', {reached})"
        return (
            f"the file is damaged: the log's last position is {head} by sqlite_sequence, but {reached} was given to an event. "
            "Positions would be given twice, and their events never handled. Restore a copy of the file; or keep one, and with "
            f"no bus open execute: {script}"
        )
    if changes < generation:
        return (
            f"the file is damaged: log_state.changes is {changes}, but generation {generation} of a subscription was counted by "
            "it. Restore a copy of the file; or keep one, and with no bus open execute: "
            f"UPDATE log_state SET changes = {generation}"
        )
    return None
