"""A connection to SQLite on which durability can be kept, and the transaction that every write goes through.

publish → journal → *store* → lanes → workers → outcome. In comes a path; out comes a connection whose settings were read
back, or `StoreUnsafe`. Errors of sqlite3 become errors of our tree here. The reasons for the settings stand in
docs/decisions; in short: SQLite's defaults are made for other uses, and some builds change them silently.
"""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
import sys
from collections.abc import Iterator

import msgspec

from eventbus.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreUnavailable, StoreUnsafe

MEMORY = ":memory:"

OLDEST = (3, 37, 0)
"""The first SQLite with STRICT tables."""

BUSY_TIMEOUT = 5_000
"""Milliseconds to wait for a write lock that a user's own connection holds."""

JOURNAL_SIZE_LIMIT = 16 * 1_048_576
"""Bytes the WAL file may keep on disk after it has grown for a reader that stayed open."""

STATEMENTS = 512
"""Prepared statements that a connection keeps: an INSERT has a text for each of some 50 numbers of rows."""


def check_library() -> None:
    """Refuse a SQLite that is too old or built without threads."""
    if sqlite3.sqlite_version_info < OLDEST:
        raise StoreUnsafe(f"SQLite {sqlite3.sqlite_version} is too old; {'.'.join(map(str, OLDEST))} or newer is needed")
    if sqlite3.threadsafety == 0:
        raise StoreUnsafe("this SQLite was built without support for threads (SQLITE_THREADSAFE=0)")


def connect(path: str, *, full: bool, reader: bool = False) -> sqlite3.Connection:
    """Connect to a file that exists, or to `:memory:`, with our settings; each is read back.

    Args:
        full: a commit survives a loss of power (`synchronous=FULL`).
        reader: writes are refused by SQLite.
    """
    target = path if path == MEMORY else f"{pathlib.Path(path).as_uri()}?mode=rw"
    connection = sqlite3.connect(
        target,
        uri=path != MEMORY,
        timeout=BUSY_TIMEOUT / 1000,
        isolation_level=None,
        check_same_thread=False,  # opened, used and closed by threads of the bus, one at a time
        cached_statements=STATEMENTS,
    )
    try:
        # The first statement that looks at the file: here SQLite notices that it is none of its own.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        for name, value in _settings(memory=path == MEMORY, full=full, reader=reader).items():
            _set(connection, name, value)
    except BaseException:
        connection.close()
        raise
    return connection


def _settings(*, memory: bool, full: bool, reader: bool) -> dict[str, int | str]:
    settings: dict[str, int | str] = {
        "busy_timeout": BUSY_TIMEOUT,
        "journal_mode": "memory" if memory else "wal",
        "synchronous": 2 if full else 1,
        "mmap_size": 0,
        "trusted_schema": 0,
        "foreign_keys": 1,
        "journal_size_limit": JOURNAL_SIZE_LIMIT,
        "wal_autocheckpoint": 0,  # only the writer does WAL checkpoints, between its transactions
    }
    if sys.platform == "darwin":
        settings |= {"fullfsync": 1, "checkpoint_fullfsync": 1}
    if memory:
        for without_file in ("mmap_size", "journal_size_limit", "wal_autocheckpoint"):
            del settings[without_file]
    if reader:
        settings["query_only"] = 1  # the last: journal_mode is a write
    return settings


def _set(connection: sqlite3.Connection, name: str, value: int | str) -> None:
    connection.execute(f"PRAGMA {name} = {value}").fetchall()
    row = connection.execute(f"PRAGMA {name}").fetchone()
    found = row[0] if row else None
    if found != value:
        raise StoreUnsafe(
            f"SQLite {sqlite3.sqlite_version} did not take the setting {name} = {value}: it says {found!r}; "
            "another connection, the file system or the way it was built forbids it"
        )


class Transaction(msgspec.Struct):
    """How far a transaction has come.

    Attributes:
        committing: COMMIT was begun, so after an I/O error it is not known whether it took place.
    """

    committing: bool = False


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[Transaction]:
    """A write transaction: committed at the end of the block, rolled back on any exception.

    IMMEDIATE, since a transaction that reads first and then writes fails at once with SQLITE_BUSY_SNAPSHOT if somebody else
    has written in between, whatever the timeout is.
    """
    state = Transaction()
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield state
        state.committing = True
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # on some errors SQLite has rolled back by itself
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def wal_checkpoint(connection: sqlite3.Connection, mode: str) -> tuple[bool, int]:
    """Carry the WAL over into the database. Returns whether all of it was, and how many frames the WAL had."""
    busy, frames, done = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    return not busy and frames == done, frames


def is_io_error(error: BaseException) -> bool:
    """Whether the disk failed, so that a COMMIT may or may not have taken place."""
    return _primary(error) == sqlite3.SQLITE_IOERR


def _primary(error: BaseException) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


_DAMAGED = (
    "the database file is damaged, or the disk could not read it; `python -m eventbus doctor` tells which. Restore it, or see "
    "SQLite's .recover"
)
_KINDS: dict[int | None, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_FULL: (StoreFull, "no room is left for it; free some, what was refused may be tried again"),
    sqlite3.SQLITE_BUSY: (StoreBusy, "another connection has held the write lock for too long; look for an open transaction"),
    sqlite3.SQLITE_LOCKED: (StoreBusy, "another connection has held a lock for too long; look for an open transaction"),
    sqlite3.SQLITE_CORRUPT: (StoreCorrupt, _DAMAGED),
    sqlite3.SQLITE_NOTADB: (StoreCorrupt, "the file is not an SQLite database"),
    sqlite3.SQLITE_READONLY: (StoreUnavailable, "the file or its directory cannot be written"),
    sqlite3.SQLITE_CANTOPEN: (StoreUnavailable, "the file cannot be opened"),
    sqlite3.SQLITE_IOERR: (StoreUnavailable, "the disk failed"),
}


def store_error(error: sqlite3.Error, address: str) -> StoreError:
    """The error of our tree for one of sqlite3."""
    kind, meaning = _KINDS.get(_primary(error), (StoreUnavailable, "SQLite refused it"))
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHMSIZE:
        kind, meaning = _KINDS[sqlite3.SQLITE_FULL]  # the -shm file could not be made longer
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return kind(f"{address}: {meaning} ({name}: {error})")
