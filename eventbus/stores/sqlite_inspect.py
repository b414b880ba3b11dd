"""The SQLite store as one who only looks sees it: `python -m eventbus doctor`.

Beside the way publish → journal → *store* → lanes → workers → outcome. In comes the path of a file that a bus may have open, or
have been killed with; out come its rows, and what of them is damaged. Nothing is changed: the connection is read-only, nothing is
locked that a bus waits for, and the database file is opened by SQLite alone.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from eventbus.errors import StoreCorrupt, StoreError, StoreUnavailable
from eventbus.stores._sqlite_connection import BUSY_TIMEOUT, OLDEST, STATEMENTS, store_error
from eventbus.stores._sqlite_file import NETWORK_FILE_SYSTEMS, file_system_of
from eventbus.stores._sqlite_locks import flock_of, is_locked, lives_in
from eventbus.stores._sqlite_members import boot
from eventbus.stores._sqlite_read import answer
from eventbus.stores._sqlite_rows import (
    EVENT_ROWS,
    LANE_JSON,
    LANE_ROWS,
    SUBSCRIPTION_JSON,
    SUBSCRIPTION_ROWS,
    WAITING_JSON,
    WAITING_ROWS,
    ask,
    event_json,
    lane_of,
    record_of,
    subscribed_of,
    waiting_of,
)
from eventbus.stores._sqlite_schema import APPLICATION_ID, VERSION, version_of
from eventbus.stores._sqlite_sound import unsound
from eventbus.stores._sqlite_wal import refuse_cut_off
from eventbus.stores.base import DeadLetterFilter, DeadLetterRow, DeadLetters, Events, EventsAt, Query, Record

try:
    import fcntl
except ImportError:  # no POSIX locks there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "APPLICATION_ID",
    "NETWORK_FILE_SYSTEMS",
    "OLDEST",
    "VERSION",
    "Damage",
    "Inspection",
    "Lease",
    "boot",
    "file_system_of",
    "loses_commits",
]

T = TypeVar("T")
R = TypeVar("R", bound=Sequence[object])

PAGE = 500
"""Rows that are checked at once; between them a WAL checkpoint can go on."""

_PAGE_BYTES = 16 * 1_048_576
_OPENED = 128  # a byte of -shm that every connection of a file in WAL mode locks


def loses_commits(version: tuple[int, ...]) -> bool:
    """Whether this SQLite can lose commits when a WAL checkpoint overlaps another connection's write."""
    fixed = {(3, 44): 6, (3, 50): 7}  # in these lines sooner than in 3.51.3
    if version[:2] in fixed and version[2] >= fixed[version[0], version[1]]:
        return False
    return (3, 7, 0) <= version[:3] <= (3, 51, 2)


class Damage(msgspec.Struct, frozen=True):
    """A row that is not what was written. where: the row, in words. what: what is wrong with it."""

    table: str
    where: str
    what: str


class Lease(msgspec.Struct, frozen=True):
    """Until when an instance counts as alive.

    Attributes:
        boot: the start of the machine that it runs in. left: seconds to the end of its lease, below 0 afterwards; it says nothing
            in another start of the machine.
        lives: whether it holds its lock; None where this cannot be told.
    """

    boot: str
    left: float
    lives: bool | None


class Inspection:
    """A look at a database file.

    Attributes:
        version: of its tables; 0 if there are none.
        quiet: nobody had it open when it was opened. Then it is read without locks, and `undisturbed` tells afterwards whether
            what was read can be trusted.
        cut_off: why a bus would refuse its WAL, see docs/decisions/0017; None if it would not, or if somebody has it open.

    Raises:
        StoreUnavailable: there is no file, it cannot be read, or it is another program's. StoreCorrupt: it is no database.
        StoreTooNew: its tables are newer than this code.
    """

    def __init__(self, path: str, *, quiet: bool = True) -> None:
        self.path = path
        _check(path)
        self._before = _marks(path)
        self._mode = _quiet_mode(path) if quiet else None
        self.quiet = self._mode is not None
        self.cut_off = _cut_off(path) if self.quiet or not os.path.exists(f"{path}-shm") else None
        self._lock = _open_lock(path)
        try:
            self._connection = sqlite3.connect(
                f"{pathlib.Path(path).as_uri()}?mode=ro{self._mode or ''}",
                uri=True,
                timeout=BUSY_TIMEOUT / 1000,
                isolation_level=None,
                cached_statements=STATEMENTS,
            )
        except sqlite3.Error as error:
            self._close_lock()
            raise store_error(error, path) from error
        try:
            self._connection.execute("PRAGMA query_only = 1")
            self._connection.execute("PRAGMA trusted_schema = 0")
            self.version = version_of(self._connection, path)
        except sqlite3.Error as error:
            self.close()
            raise store_error(error, path) from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Close it. Safe to call twice."""
        self._connection.close()
        self._close_lock()

    def _close_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def undisturbed(self) -> bool:
        """Whether a quiet look was right: nobody has opened or changed the file since. Ask when it is closed."""
        return _quiet_mode(self.path) == self._mode and _marks(self.path) == self._before

    @property
    def has_lock(self) -> bool:
        """Whether `<db>-lock` was there."""
        return self._lock is not None

    # -------------------------------------------------------------- questions

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is asked inside is answered from one state of the file. Not for long: meanwhile the WAL cannot be carried over."""
        self._translated(lambda: self._connection.execute("BEGIN"))
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def ask(self, query: Query[T]) -> T:
        """Answer a query of the Store protocol. Raises StoreError."""
        return self._translated(lambda: answer(self._connection, query))

    def value(self, statement: str, *values: object) -> object:
        """The first value of a SELECT or PRAGMA; None where there is no row. Raises StoreError."""
        row = self._translated(lambda: self._connection.execute(statement, values).fetchone())
        return None if row is None else row[0]

    def column(self, statement: str, *values: object) -> list[object]:
        """The first value of each row. Raises StoreError."""
        return self._translated(lambda: [row[0] for row in self._connection.execute(statement, values)])

    def _translated(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except sqlite3.Error as error:
            raise store_error(error, self.path) from error

    def count(self, table: str, limit: int) -> int:
        """The rows of a table, counted up to `limit`."""
        return int(str(self.value(f"SELECT count(*) FROM (SELECT 1 FROM {table} LIMIT ?)", limit)))

    def leases(self, monotonic: float) -> dict[str, Lease]:
        """The leases of all instances by their ids."""
        rows = self._translated(lambda: self._connection.execute("SELECT id, boot, deadline FROM instances").fetchall())
        return {id: Lease(started_in, deadline - monotonic, self._lives(id)) for id, started_in, deadline in rows}

    def _lives(self, instance: str) -> bool | None:
        return None if self._lock is None else lives_in(self._lock, instance)

    # -------------------------------------------------------------- damage

    def structure(self, *, full: bool) -> list[str]:
        """What SQLite finds wrong with the file (`quick_check`; `full`: `integrity_check`), at most 100 things."""
        found = self.column("PRAGMA integrity_check(100)" if full else "PRAGMA quick_check(100)")
        return [str(each) for each in found if each != "ok"]

    def unsound(self) -> str | None:
        """What does not hold together in tables of the current version, for which no bus opens the file; None if all does.

        Raises:
            StoreError: it cannot be read.
        """
        return self._translated(lambda: unsound(self._connection))

    def damaged_events(self, newest: int | None) -> tuple[int, list[Damage]]:
        """The newest events, or all: how many were looked at, and which do not match their checksums."""
        first = 0 if newest is None else self.value("SELECT position FROM events ORDER BY position DESC LIMIT 1 OFFSET ?", newest)
        after, seen, found = int(str(first or 0)), 0, list[Damage]()
        while True:
            positions = [int(str(each)) for each in self.column(_AFTER, after, PAGE)]
            if not positions:
                return seen, found
            seen += len(positions)
            found += self._damaged_of(positions)
            after = positions[-1]

    def _damaged_of(self, positions: list[int]) -> Iterator[Damage]:
        try:
            after = positions[0] - 1
            records: list[Record] = []
            while after < positions[-1]:
                page = self.ask(Events(after, PAGE, _PAGE_BYTES, until=positions[-1]))
                records += page.records
                if page.up_to <= after:  # the log ends before: sqlite_sequence is damaged, see `unsound`
                    break
                after = page.up_to
        except StoreError:
            for position in positions:  # one of them cannot be read at all: which?
                yield from self._damaged_one(position)
            return
        yield from (Damage("events", f"position {r.position}", r.fault) for r in records if r.fault is not None)

    def _damaged_one(self, position: int) -> Iterator[Damage]:
        try:
            faults = [record.fault for record in self.ask(EventsAt((position,)))]
        except StoreError as error:
            faults = [str(error)]
        yield from (Damage("events", f"position {position}", fault) for fault in faults if fault is not None)

    def damaged_lanes(self) -> tuple[int, list[Damage]]:
        """All lanes: how many, and which do not match their checksums."""
        return self._damaged_rows("lanes", LANE_JSON, LANE_ROWS, lane_of, "subscription {0!r}, lane {1!r}")

    def damaged_subscriptions(self) -> tuple[int, list[Damage]]:
        """All subscriptions: how many, and which do not match their checksums."""
        return self._damaged_rows("subscriptions", SUBSCRIPTION_JSON, SUBSCRIPTION_ROWS, subscribed_of, "subscription {0!r}")

    def damaged_deliveries(self) -> tuple[int, list[Damage]]:
        """All waiting deliveries: how many, and which do not match their checksums."""
        return self._damaged_rows("deliveries", WAITING_JSON, WAITING_ROWS, waiting_of, "subscription {0!r}, position {1}")

    def _damaged_rows(
        self, table: str, json: str, decoder: msgspec.json.Decoder[list[R]], make: Callable[[R], object], where: str
    ) -> tuple[int, list[Damage]]:
        rows = self._translated(lambda: ask(self._connection, json, f"FROM {table}", (), decoder, lambda row: row))
        found = []
        for row in rows:
            try:
                make(row)
            except StoreCorrupt as error:
                found.append(Damage(table, where.format(*row), str(error)))
        return len(rows), found

    def damaged_dead_letters(self) -> tuple[int, list[Damage]]:
        """All dead letters: how many, and which have a copy of their event that does not match its checksum."""
        seen, after, found = 0, 0, list[Damage]()
        while True:
            rows: tuple[DeadLetterRow, ...] = self.ask(DeadLetters(DeadLetterFilter(), after, PAGE))
            if not rows:
                return seen, found
            found += (Damage("dead_letters", f"id {row.id}", row.record.fault) for row in rows if row.record.fault is not None)
            seen, after = seen + len(rows), rows[-1].id

    def damaged_scheduled(self) -> tuple[int, list[Damage]]:
        """All scheduled events: how many, and which do not match their checksums."""
        seen, after, found = 0, "", list[Damage]()
        while True:
            records = self._translated(
                lambda after=after: ask(self._connection, event_json("0"), _SCHEDULED, (after, PAGE), EVENT_ROWS, record_of)  # type: ignore[misc]
            )
            if not records:
                return seen, found
            found += (Damage("scheduled", f"id {r.id}", r.fault) for r in records if r.fault is not None)
            seen, after = seen + len(records), max(record.id for record in records)


_AFTER = "SELECT position FROM events WHERE position > ? ORDER BY position LIMIT ?"
_SCHEDULED = "FROM (SELECT * FROM scheduled WHERE id > ? ORDER BY id LIMIT ?) e"


# ------------------------------------------------------------------ how to open it


def _check(path: str) -> None:
    """Raise StoreUnavailable, in words, where there is nothing to be read."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        folder = os.path.dirname(path)
        what = "there is no such file" if os.path.isdir(folder) else f"there is no directory {folder}"
        raise StoreUnavailable(f"{path}: {what}; give the path that the bus has") from None
    except OSError as error:
        raise StoreUnavailable(
            f"{path} cannot be looked at: {error.strerror}; run this as the user that the bus runs as"
        ) from error
    if kind != stat.S_IFREG:
        what = "a directory" if kind == stat.S_IFDIR else "no file"
        raise StoreUnavailable(f"{path} is {what}; give the path of the database file that the bus has")
    if not os.access(path, os.R_OK):
        raise StoreUnavailable(f"{path} may not be read by this user; run this as the user that the bus runs as")


def _marks(path: str) -> tuple[int, ...]:
    """What changes when somebody writes to the database or its WAL."""
    files = [os.stat(each) for each in (path, f"{path}-wal") if os.path.exists(each)]
    return tuple(mark for there in files for mark in (there.st_ino, there.st_size, there.st_mtime_ns))


def _quiet_mode(path: str) -> str | None:
    """How to read a file that nobody has open, without a trace; None if somebody has, or it cannot be told.

    Opened in the usual way, SQLite would make -wal and -shm and leave them, or write -shm anew.
    """
    wal, shm = (os.path.exists(f"{path}{suffix}") and os.stat(f"{path}{suffix}").st_size for suffix in ("-wal", "-shm"))
    if shm and _is_open(path):
        return None
    if not wal:
        return "&immutable=1" if not shm or hasattr(fcntl, "F_OFD_GETLK") else None
    return "&readonly_shm=1" if shm and hasattr(fcntl, "F_OFD_GETLK") else None


def _cut_off(path: str) -> str | None:
    """Why a bus would refuse the WAL of a file that nobody has open."""
    before = _marks(path)
    try:
        refuse_cut_off(path)
    except StoreCorrupt as error:
        return str(error) if _marks(path) == before else None
    return None


def _is_open(path: str) -> bool:
    """Whether a connection of another process has the file open. Not to be called while one of this process has it with locks."""
    if not hasattr(fcntl, "F_OFD_GETLK"):
        return True
    try:
        descriptor = os.open(f"{path}-shm", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return True
    try:
        return is_locked(descriptor, flock_of(fcntl.F_WRLCK, _OPENED))
    finally:
        os.close(descriptor)


def _open_lock(path: str) -> int | None:
    """The lock file, only to ask who holds what; None where there is none."""
    try:
        return os.open(f"{path}-lock", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
