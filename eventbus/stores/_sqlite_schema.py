"""The tables of the SQLite store: what they look like, and how a file comes to have them.

publish → journal → *store* → lanes → workers → outcome. In comes an open connection; out goes the same connection on a file
that has our tables in the version that this code knows, or an error. The tables are meant to be read by people, with any
SQLite tool: times are unix seconds, JSON is kept as text. Don't write to them while a bus has the file open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eventbus.errors import StoreTooNew, StoreUnavailable
from eventbus.stores._sqlite_connection import transaction
from eventbus.stores._sqlite_rows import give_checksums

if TYPE_CHECKING:
    import sqlite3

    from sqlite_utils import Database, Migrations

APPLICATION_ID = 0x45764273
"""`EvBs`: written into the header of our files, so that `file` and we can tell them from others."""

VERSION = 2
"""Of the tables, in the header (`PRAGMA user_version`). One more with each migration."""

_COLUMNS_OF_EVENT = """
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    time REAL NOT NULL, -- unix seconds
    key TEXT,
    slot INTEGER NOT NULL,
    headers TEXT, -- JSON
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL, -- of data, in bytes
    crc INTEGER NOT NULL,
    data ANY NOT NULL -- TEXT where it is JSON, else a BLOB
"""

# `size` and `crc` stand before `data`, so that they are read without walking the pages of long data.
_FIRST = (
    f"""CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,{_COLUMNS_OF_EVENT}) STRICT""",
    "CREATE INDEX events_type ON events (type, position)",
    "CREATE INDEX events_key ON events (key, position) WHERE key IS NOT NULL",
    "CREATE INDEX events_time ON events (time)",
    f"""CREATE TABLE scheduled (
    id TEXT NOT NULL PRIMARY KEY,
    due_at REAL NOT NULL,
    idempotency_key TEXT,{_COLUMNS_OF_EVENT}) STRICT""",
    "CREATE INDEX scheduled_due ON scheduled (due_at, id)",
    """CREATE TABLE idempotency (
    key TEXT NOT NULL PRIMARY KEY,
    event_id TEXT NOT NULL,
    position INTEGER, -- NULL while the event is scheduled
    digest BLOB NOT NULL,
    time REAL NOT NULL
) STRICT, WITHOUT ROWID""",
    "CREATE INDEX idempotency_time ON idempotency (time)",
    """CREATE TABLE subscriptions (
    name TEXT NOT NULL PRIMARY KEY,
    types TEXT NOT NULL, -- JSON: names and patterns
    since TEXT NOT NULL, -- JSON: pattern to the position after which it begins
    derived TEXT NOT NULL, -- JSON: types that joined it as subclasses
    "order" TEXT NOT NULL,
    concurrency INTEGER NOT NULL,
    generation INTEGER NOT NULL, -- one more with each change of order or concurrency
    paused TEXT, -- the reason
    paused_at REAL,
    created_at REAL NOT NULL
) STRICT, WITHOUT ROWID""",
    """CREATE TABLE instances (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started REAL NOT NULL,
    seen REAL NOT NULL
) STRICT, WITHOUT ROWID""",
    """CREATE TABLE lanes (
    subscription TEXT NOT NULL,
    lane TEXT NOT NULL,
    owner TEXT, -- id of an instance
    epoch INTEGER NOT NULL,
    checkpoint INTEGER NOT NULL, -- up to here everything is settled, or has a row in deliveries
    done TEXT, -- JSON: positions above the checkpoint that are settled
    attempt INTEGER NOT NULL,
    due_at REAL,
    first_failed_at REAL,
    error TEXT,
    crc INTEGER NOT NULL,
    PRIMARY KEY (subscription, lane)
) STRICT, WITHOUT ROWID""",
    """CREATE TABLE deliveries (
    subscription TEXT NOT NULL,
    position INTEGER NOT NULL,
    lane TEXT NOT NULL,
    key TEXT,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    due_at REAL NOT NULL,
    first_failed_at REAL,
    error TEXT,
    PRIMARY KEY (subscription, position)
) STRICT, WITHOUT ROWID""",
    f"""CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription TEXT NOT NULL,
    event_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    error_type TEXT NOT NULL,
    error TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    first_failed_at REAL NOT NULL,
    last_failed_at REAL NOT NULL,
    redriving INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0, -- of the redrive
    due_at REAL, -- of the redrive
    traceback TEXT NOT NULL,{_COLUMNS_OF_EVENT},
    UNIQUE (subscription, event_id)
) STRICT""",
    "CREATE INDEX dead_letters_event ON dead_letters (event_id)",
    """CREATE TABLE log_state (
    one INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    pruned_to INTEGER NOT NULL, -- position of the newest event that retention has removed
    pruned_time REAL NOT NULL,
    last_write TEXT -- names the last transaction that left no other trace to know it by
) STRICT""",
    "INSERT INTO log_state VALUES (1, 0, 0, NULL)",
)

_SHARED = (
    "ALTER TABLE instances ADD COLUMN boot TEXT NOT NULL DEFAULT ''",  # which start of the machine it runs in
    "ALTER TABLE instances ADD COLUMN deadline REAL NOT NULL DEFAULT 0",  # end of its lease, by CLOCK_MONOTONIC
    "ALTER TABLE instances ADD COLUMN serves TEXT NOT NULL DEFAULT '{}'",  # JSON: the subscriptions that it runs, and how
    "ALTER TABLE instances ADD COLUMN holds TEXT NOT NULL DEFAULT '[]'",  # JSON: those that it wants whole
    "ALTER TABLE instances ADD COLUMN pinned INTEGER",  # from this position on nothing is to be removed
    "ALTER TABLE lanes ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0",  # of owners, since it was last known to be innocent
    """CREATE TABLE marks (
    subscription TEXT NOT NULL,
    position INTEGER NOT NULL,
    lane TEXT NOT NULL,
    instance TEXT, -- that is handling it; NULL: it has died
    alone INTEGER NOT NULL, -- nothing else runs in that process
    suspect INTEGER NOT NULL, -- it was being handled when a process died
    deaths INTEGER NOT NULL, -- … alone
    PRIMARY KEY (subscription, position)
) STRICT, WITHOUT ROWID""",
    "ALTER TABLE subscriptions ADD COLUMN floors TEXT NOT NULL DEFAULT '[]'",  # JSON: what earlier generations had settled
    "ALTER TABLE log_state ADD COLUMN changes INTEGER NOT NULL DEFAULT 1",  # one more with each change that all are to notice
    "ALTER TABLE subscriptions ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE deliveries ADD COLUMN crc INTEGER NOT NULL DEFAULT 0",
    # Generations come from that counter from now on, so that none comes twice, and epochs begin anew with each.
    "UPDATE log_state SET changes = 1 + coalesce((SELECT max(generation) FROM subscriptions), 0)",
)

OURS = (
    "events",
    "scheduled",
    "idempotency",
    "subscriptions",
    "instances",
    "lanes",
    "marks",
    "deliveries",
    "dead_letters",
    "log_state",
)
"""The tables of this version."""


def _migrations() -> Migrations:
    """Built where it is needed: importing sqlite-utils takes 0.2 s."""
    from sqlite_utils import Migrations  # noqa: PLC0415

    migrations = Migrations("eventbus")

    @migrations(name="0001_first")
    def first(db: Database) -> None:
        for statement in _FIRST:
            db.execute(statement)

    @migrations(name="0002_several_processes")
    def shared(db: Database) -> None:
        for statement in _SHARED:
            db.execute(statement)
        give_checksums(db.conn)

    return migrations


def version_of(connection: sqlite3.Connection, address: str) -> int:
    """Version of our tables in this file; 0 if there are none yet and may be.

    Raises:
        StoreTooNew: the file was written by newer code.
        StoreUnavailable: the file belongs to another program.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == APPLICATION_ID:
        if version > VERSION:
            raise StoreTooNew(
                f"{address} has tables in version {version}, this eventbus knows up to {VERSION}: "
                "it was written by a newer eventbus; upgrade this program's"
            )
        return int(version)
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
    taken = sorted(names.intersection(OURS))
    if application or version or taken:
        found = f"it has its own {', '.join(taken)}" if taken else f"application_id {application}, user_version {version}"
        raise StoreUnavailable(f"{address} is a database of another program ({found}); give the bus a file of its own")
    return 0


def migrate(connection: sqlite3.Connection, address: str) -> None:
    """Bring the tables up to date, in one transaction. Costs two pragmas where they are."""
    if version_of(connection, address) == VERSION:
        return
    with transaction(connection):
        # Again, inside: another process may have been first.
        if version_of(connection, address) == VERSION:
            return
        from sqlite_utils import Database  # noqa: PLC0415  # see `_migrations`

        # Inside our transaction its `atomic()` makes savepoints and commits nothing.
        _migrations().apply(Database(connection, recursive_triggers=False, execute_plugins=False))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
