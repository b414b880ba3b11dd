"""The SQLite store: the log in one file.

publish → journal → *store* → lanes → workers → outcome. In come batches, one transaction each, from the journal's thread, and
queries from the reader's; out go what became durable, and pages of the log. Here are opening, closing and what happens when
the disk fails; the rest stands in:

- `_sqlite_locks`: whose turn it is to write, and who lives; `_sqlite_file`: file systems, deleted files; `_sqlite_wal`: what a
  damaged WAL would lose; `_sqlite_ballast`: room for a disk that is full;
- `_sqlite_connection`: settings, transactions, errors; `_sqlite_schema`: the tables; `_sqlite_sound`: whether they hold together;
  `_sqlite_rows`: their rows as records;
- `_sqlite_commit`, `_sqlite_insert`, `_sqlite_units`: the way of an event; `_sqlite_commands`, `_sqlite_register`,
  `_sqlite_members`, `_sqlite_prune`: the other writes; `_sqlite_read`: reading.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import msgspec

from eventbus.errors import (
    ConfigurationError,
    PublishOutcomeUnknown,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreInUse,
    StoreLost,
    StoreUnavailable,
)
from eventbus.stores._sqlite_ballast import BYTES, MARGIN, Ballast
from eventbus.stores._sqlite_commands import Commands
from eventbus.stores._sqlite_commit import HEAD, Entering, append_after, look, only_appended
from eventbus.stores._sqlite_connection import (
    BUSY_TIMEOUT,
    MEMORY,
    Transaction,
    check_library,
    connect,
    is_io_error,
    store_error,
    transaction,
    wal_checkpoint,
)
from eventbus.stores._sqlite_file import Identity, prepare_file
from eventbus.stores._sqlite_locks import LockFile
from eventbus.stores._sqlite_members import Lives
from eventbus.stores._sqlite_read import answer
from eventbus.stores._sqlite_rows import lane_values
from eventbus.stores._sqlite_schema import migrate
from eventbus.stores._sqlite_sound import refuse_unsound
from eventbus.stores._sqlite_units import Outcomes
from eventbus.stores._sqlite_wal import refuse_cut_off
from eventbus.stores.base import Batch, Committed, Features, Instance, Notice, Query, Record

T = TypeVar("T")

WAL_PAGES = 1_000
"""Pages in the WAL after which it is carried over into the database."""
SHORT_WAL_PAGES = 50
"""… while the disk is full."""

_EVENTS_PER_PAGE = 4
_PAGES_PER_COMMIT = 6
_PAGE_BYTES = 4_096


class _Decided(msgspec.Struct):
    """A transaction that is written and only needs its COMMIT.

    Attributes:
        committed: what to return once it is durable.
        scheduled: the events that wait for their time if it takes place.
        trace: a statement and its values that find a row if, and only if, it took place; None if nothing was written.
        weight: the pages it has written, roughly.
    """

    committed: Committed
    scheduled: Sequence[Record]
    trace: tuple[str, tuple[object, ...]] | None
    weight: float


class SQLiteStore:
    """The log in one SQLite file, for any number of processes of one machine.

    Args:
        path: of the database file; it is created when the store is opened. `":memory:"` keeps nothing.
        durability: "full": what is committed survives a loss of power. "fast": it survives the end of the process; a loss
            of power may take the last commits, never the middle of one.

    Times are kept to the microsecond.
    """

    def __init__(self, path: str | os.PathLike[str], *, durability: Literal["full", "fast"] = "full") -> None:
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ConfigurationError(f"{path!r} is no path for a database; give the path of a file, or ':memory:'")
        if durability not in {"full", "fast"}:
            raise ConfigurationError(f"durability is {durability!r}; it must be 'full' or 'fast'")
        self._address = text
        self._memory = text == MEMORY
        self._full = durability == "full"
        self._path = MEMORY
        self._opened = False
        self._lock: LockFile | None = None
        self._identity: Identity | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        # The writer closes and opens the reader's connection after an I/O error; never while a query runs on it, and those that
        # come meanwhile wait.
        self._reading = threading.RLock()
        self._suspect = False
        self._ballast: Ballast | None = None
        self._short = False  # the ballast was removed, or could not be made
        self._instance = ""
        self._others: list[str] = []  # instances that were alive when we looked last
        self._data_version = -1
        self._changes = -1
        self._head: int | None = None  # of the log, after our last transaction; None if it has to be looked up
        self._frames = 0.0
        self._frames_per_weight = 1.0

    @property
    def address(self) -> str:
        """The path as it was given."""
        return self._address

    @property
    def features(self) -> Features:
        """What this store can do: depends on whether there is a file, and on the durability asked for."""
        on_disk = not self._memory
        return Features(concurrent_reads=on_disk, survives_power_loss=self._full and on_disk, shared=on_disk, begins=True)

    # -------------------------------------------------------------- open and close

    def open(self, instance: Instance) -> None:
        """See `Store.open`."""
        if self._opened:
            raise StoreUnavailable(f"{self._address} is open already; close it first")
        check_library()
        try:
            with self._translated():
                if not self._memory:
                    self._path = os.path.realpath(self._address)
                    prepare_file(self._path)
                    self._lock = LockFile(self._path)
                self._instance = instance.id
                with self._turn(self._in_use):
                    self._connect_with_room()
                    if self._lock is not None:  # only now, or those who start at the same time would take each other for one
                        self._lock.live(instance.id)  # that has opened it, and who refuses it, too
            self._suspect = False
            self._opened = True
        except BaseException:
            self.close()
            raise

    def _connect_with_room(self) -> None:
        """Connect, on a disk that is full with the help of the ballast."""
        if self._memory:
            self._connect()
            return
        ballast = self._ballast = Ballast(self._path)
        self._short = not ballast.make()
        try:
            self._connect()
        except sqlite3.Error:
            if ballast.has_room(MARGIN) or not ballast.is_there():
                raise
            self._disconnect()
            ballast.free()
            self._short = True
            self._connect()

    def _connect(self) -> None:
        if self._full and self._lock is not None and self._lock.is_alone():
            refuse_cut_off(self._path)  # now SQLite would recover
        writer = self._writer = connect(self._path, full=self._full)
        migrate(writer, self._address)
        refuse_unsound(writer, self._address)
        if not self._memory:
            self._identity = Identity(self._path)
            self._reader = connect(self._path, full=self._full, reader=True)
        self._frames = 0.0
        self._data_version = -1

    def close(self) -> None:
        """See `Store.close`."""
        writer, lock = self._writer, self._lock
        self._opened = False
        if lock is not None and lock.forked:
            _abandoned.extend((writer, self._reader))
            self._writer = self._reader = self._lock = None
            return
        try:
            # Without the turn, a WAL checkpoint could meet with another's write; then the last one to close makes it.
            with contextlib.suppress(StoreBusy), contextlib.nullcontext() if writer is None else self._turn(self._busy):
                if writer is not None and not self._memory and not self._suspect and self._identity is not None:
                    with contextlib.suppress(sqlite3.Error, StoreLost):
                        self._identity.check()  # or it would carry a WAL over into somebody else's file
                        self._close_reader()
                        wal_checkpoint(writer, "PASSIVE" if self._others else "TRUNCATE")
                self._disconnect()
        finally:
            self._disconnect()
            if lock is not None:
                lock.close()
            self._lock = None

    def _close_reader(self) -> None:
        with self._reading:
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()

    def _disconnect(self) -> None:
        try:
            self._close_reader()
        finally:
            writer, self._writer, self._identity = self._writer, None, None
            if writer is not None:
                writer.close()

    @contextlib.contextmanager
    def _turn(self, refused: Callable[[], StoreError]) -> Iterator[None]:
        """The turn to write, among the processes that have the file open."""
        if self._lock is None:
            yield
            return
        with self._lock.turn(BUSY_TIMEOUT / 1000, refused):
            yield

    def _busy(self) -> StoreBusy:
        return StoreBusy(
            f"{self._address}: another process has held its turn to write for {BUSY_TIMEOUT / 1000:g} s; it may be stopped, "
            "or its disk hangs. Nothing was stored"
        )

    def _in_use(self) -> StoreInUse:
        return StoreInUse(
            f"{self._address} is in use by another process that has not let go of {self._path}-lock for "
            f"{BUSY_TIMEOUT / 1000:g} s; it may be stopped, or an eventbus before 0.1 that wants the file for itself"
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise store_error(error, self._address) from error
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: UnicodeDecodeError) -> StoreCorrupt:
        return StoreCorrupt(f"{self._address}: the database file is damaged; restore it, or see SQLite's .recover ({error})")

    def _check_open(self) -> None:
        if not self._opened:
            raise StoreUnavailable(f"{self._address} is not open")
        if self._lock is not None and self._lock.forked:
            raise StoreUnavailable(f"{self._address} was opened by the parent of this process; make a store of your own here")

    def _connected(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        self._check_open()
        if connection is None:
            raise StoreUnavailable(f"{self._address} could not be opened again after an I/O error; it is tried at each commit")
        return connection

    # -------------------------------------------------------------- write

    def commit(self, batch: Batch) -> Committed:
        """See `Store.commit`."""
        self._check_open()
        with self._turn(self._busy):
            return self._commit(batch) if self._ballast is None else self._commit_with_room(batch, self._ballast)

    def _commit_with_room(self, batch: Batch, ballast: Ballast) -> Committed:
        """Commit a batch; when no room is left, in that of the ballast, without its events. See docs/decisions/0018."""
        if self._short or (self._others and not ballast.is_there()):
            self._short = not ballast.make()
        if self._short:
            return self._commit_without_events(batch)
        try:
            return self._commit(batch)
        except StoreFull:
            if not batch.units and not batch.commands:
                raise
        ballast.free()
        self._short = True
        with contextlib.suppress(sqlite3.Error):
            self._carry_over(self._connected(self._writer))  # the WAL begins anew, and grows no more
        return self._commit_without_events(batch)

    def _commit_without_events(self, batch: Batch) -> Committed:
        if any(batch.appends) and not batch.units and not batch.commands:
            raise self._no_room()
        committed = self._commit(msgspec.structs.replace(batch, appends=()))
        refused = [self._no_room() if group else None for group in batch.appends]
        return msgspec.structs.replace(committed, appends=refused, full=self._no_room())

    def _no_room(self) -> StoreFull:
        return StoreFull(
            f"{self._address}: no room is left for events; what there is is kept for the outcomes of handlers. Nothing was "
            f"stored. Free {(BYTES + MARGIN) // 1_048_576} MiB, and it goes on by itself"
        )

    def _commit(self, batch: Batch) -> Committed:
        if self._suspect:
            self._reopen()
        writer = self._connected(self._writer)
        head, self._head = self._head, None
        decided: _Decided | None = None
        state = Transaction()
        try:
            if self._frames > (SHORT_WAL_PAGES if self._short else WAL_PAGES):
                batch.begins()
                self._carry_over(writer)
            decided = _appended(batch, head)
            state.committing = decided is not None  # the whole transaction is one statement
            if decided is None or not append_after(writer, decided.committed.previous_head, decided.committed.events):
                decided = None
                with transaction(writer) as state:
                    decided = _decide(writer, batch, self._lives)
        except sqlite3.Error as error:
            if decided is None or not state.committing or not is_io_error(error):
                # Before COMMIT nothing can have been stored. The connection may be in any state after an I/O error.
                self._suspect = self._suspect or is_io_error(error) or writer.in_transaction
                raise store_error(error, self._address) from error
            self._find_out(decided, error)
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error
        except (OverflowError, UnicodeError) as error:  # what SQLite cannot take as a value
            raise StoreError(f"{self._address}: a value cannot be stored: {error}; nothing of the batch was") from error
        if self._identity is not None:
            self._identity.check()
        for position, record in enumerate(decided.committed.events, decided.committed.head - len(decided.committed.events) + 1):
            record.position = position
        self._head = decided.committed.head
        self._frames += decided.weight * self._frames_per_weight
        return decided.committed

    def _carry_over(self, writer: sqlite3.Connection) -> None:
        """A WAL checkpoint. PASSIVE, so that it waits for nobody: a reader that stays open makes it end early.

        Python has no way to ask how long the WAL is without doing one; so the pages are estimated from what was written,
        and the estimate learns from each WAL checkpoint.
        """
        _, frames = wal_checkpoint(writer, "PASSIVE")
        estimate = max(1.0, self._frames) / self._frames_per_weight
        self._frames_per_weight = min(4.0, max(0.25, frames / estimate))
        self._frames = 0.0

    def _find_out(self, decided: _Decided, error: sqlite3.Error) -> None:
        """The disk failed during COMMIT: return if the transaction took place, raise if it did not, or if nobody can tell.

        Everything is closed, so that SQLite reads the WAL anew as it would after a crash, and the WAL carried over, so that
        what is found is on disk and not only in the memory of this process.
        """
        self._suspect = True
        try:
            self._reopen()
            writer = self._connected(self._writer)
            stored = decided.trace is None or writer.execute(*decided.trace).fetchone() is not None
        except (sqlite3.Error, StoreError) as failure:
            records = (*decided.committed.events, *decided.scheduled)
            raise PublishOutcomeUnknown([record.id for record in records]) from failure
        if not stored:
            raise store_error(error, self._address) from error

    def _reopen(self) -> None:
        """Open the connections anew after an I/O error. The lock file stays held."""
        self._check_open()
        self._suspect = True
        if self._identity is not None:
            self._identity.check()  # a file that lies there instead must not be taken for it
        with self._reading, self._translated():
            with contextlib.suppress(sqlite3.Error):
                self._disconnect()
            self._connect()
            if self._writer is not None and not self._memory and not wal_checkpoint(self._writer, "FULL")[0]:
                raise StoreUnavailable(f"{self._address}: the WAL could not be carried over into the database")
        self._suspect = False

    # -------------------------------------------------------------- others

    monotonic = staticmethod(time.monotonic)
    """See `Store.monotonic`: CLOCK_MONOTONIC, which all processes of one start of a machine share. Asked before each event."""

    def notice(self) -> Notice | None:
        """See `Store.notice`."""
        writer = self._writer
        self._check_open()
        if writer is None or self._suspect or self._memory:
            return None  # the next commit opens it again
        if self._identity is not None:
            self._identity.check()  # who only reads, or waits, is to know as well
        died = any(self._lives(other) is False for other in self._others)
        with self._translated():
            (version,) = writer.execute("PRAGMA data_version").fetchone()
            if version == self._data_version and not died:
                return None
            head, changes = writer.execute(f"SELECT {HEAD}, changes FROM log_state").fetchone()
            if changes != self._changes:
                self._others = [id for (id,) in writer.execute("SELECT id FROM instances") if id != self._instance]
        self._data_version, self._changes = version, changes
        return Notice(head, changes, died)

    def _lives(self, instance: str) -> bool | None:
        return None if self._lock is None else self._lock.lives(instance)

    # -------------------------------------------------------------- read

    def read(self, query: Query[T]) -> T:
        """See `Store.read`."""
        self._check_open()  # before the lock, which a thread may have held when this process was forked
        with self._reading, self._translated():
            return answer(self._connected(self._writer if self._memory else self._reader), query)


_abandoned: list[object] = []
"""Connections of a parent process: to close them in the child could touch the parent's files."""


def _decide(connection: sqlite3.Connection, batch: Batch, lives: Lives) -> _Decided:
    """Apply a batch inside its transaction. In order: commands, appends, units."""
    commands = Commands(connection, batch.now, lives)
    previous = None
    if batch.commands:
        batch.begins()
        (previous,) = connection.execute(f"SELECT {HEAD}").fetchone()
        commands.run(batch.commands)
    found = look(connection, batch)
    entering = Entering(found.head, found.keys)
    appends = [entering.admit(group) for group in batch.appends]
    outcomes = Outcomes(found, entering, batch.now)
    outcomes.decide(batch.units)
    batch.begins()
    entering.write(connection, batch.now)
    outcomes.write(connection)
    events = commands.promoted + entering.events
    committed = Committed(
        found.head if previous is None else previous,
        entering.head,
        appends,
        outcomes.refused,
        commands.results,
        events,
        outcomes.conflicts,
    )
    return _Decided(committed, entering.scheduled, _trace(connection, batch, entering, outcomes), _weight(events))


def _appended(batch: Batch, head: int | None) -> _Decided | None:
    """What becomes of a batch that only appends events after a head that is known; None of any other."""
    if head is None:
        return None
    records = only_appended(batch)
    if records is None:
        return None
    batch.begins()
    last = head + len(records)
    committed = Committed(head, last, [None] * len(batch.appends), {}, (), records)
    return _Decided(committed, (), _trace_of(records[-1], last), _weight(records))


def _weight(events: Sequence[Record]) -> float:
    size = sum([len(record.data) for record in events])
    return _PAGES_PER_COMMIT + len(events) / _EVENTS_PER_PAGE + size / _PAGE_BYTES


def _trace_of(event: Record, position: int) -> tuple[str, tuple[object, ...]]:
    return "SELECT 1 FROM events WHERE id = ? AND position = ?", (event.id, position)


def _trace(
    connection: sqlite3.Connection, batch: Batch, entering: Entering, outcomes: Outcomes
) -> tuple[str, tuple[object, ...]] | None:
    """How to tell later whether this transaction took place. One row is enough: it is atomic."""
    if entering.events:
        return _trace_of(entering.events[-1], entering.head)
    if entering.scheduled:
        return "SELECT 1 FROM scheduled WHERE id = ?", (entering.scheduled[-1].id,)
    if outcomes.lanes:
        key, state = next(iter(outcomes.lanes.items()))
        text = "SELECT 1 FROM lanes WHERE subscription = ? AND lane = ? AND crc = ?"
        return text, (*key, lane_values(state, None)[-1])
    if not batch.commands and not outcomes.touched:
        return None
    token = secrets.token_hex(16)
    connection.execute("UPDATE log_state SET last_write = ?", (token,))
    return "SELECT 1 FROM log_state WHERE last_write = ?", (token,)
