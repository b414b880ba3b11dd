"""Files as the first version of the tables left them, for the migration to the second."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

from eventbus.stores import _sqlite_schema as schema


def make_first_version(path: Path, *rows: str) -> None:
    """A file of the first version. rows: statements that fill it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in (*schema._FIRST, *rows):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("CREATE TABLE _sqlite_migrations (migration_set TEXT, name TEXT, applied_at TEXT)")
        connection.execute("INSERT INTO _sqlite_migrations VALUES ('eventbus', '0001_first', '')")


def to_first_version(path: Path) -> None:
    """Take from a file of today, with all that it holds, what the second version has brought."""
    added = [re.match(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", statement) for statement in schema._SHARED]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        for column in filter(None, added):
            connection.execute("ALTER TABLE {} DROP COLUMN {}".format(*column.groups()))
        connection.execute("DROP TABLE marks")
        connection.execute("DELETE FROM _sqlite_migrations WHERE name <> '0001_first'")
        connection.execute("PRAGMA user_version = 1")
        connection.execute("COMMIT")
