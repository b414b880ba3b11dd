"""The interface of `sqlite3`, as far as the store uses it, on apsw: so that the store's own statements go through a VFS of ours.

    install("recording")        # before the store is opened; from here on `sqlite3.connect` is this

Only in a process of its own: apsw brings another SQLite than the standard library has, and two of them in one process must never
have one file open (closing a descriptor drops the locks of both). What is proved this way is proved of the store's statements and
of the file format; the SQLite that reads the files afterwards is the standard library's.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Self

import apsw

_FLAGS = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI

_KINDS: dict[int, type[sqlite3.Error]] = {
    apsw.SQLITE_INTERNAL: sqlite3.InternalError,
    apsw.SQLITE_CORRUPT: sqlite3.DatabaseError,
    apsw.SQLITE_NOTADB: sqlite3.DatabaseError,
    apsw.SQLITE_CONSTRAINT: sqlite3.IntegrityError,
    apsw.SQLITE_MISMATCH: sqlite3.IntegrityError,
    apsw.SQLITE_TOOBIG: sqlite3.DataError,
    apsw.SQLITE_MISUSE: sqlite3.InterfaceError,
}
"""As CPython has them (Modules/_sqlite/util.c); all others are OperationalError."""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        code = getattr(error, "extendedresult", apsw.SQLITE_ERROR)
        translated = _KINDS.get(code & 0xFF, sqlite3.OperationalError)(str(error))
        translated.sqlite_errorcode = code
        translated.sqlite_errorname = f"SQLITE_{type(error).__name__.removesuffix('Error').upper()}"
        raise translated from error


class Cursor:
    """A `sqlite3.Cursor`."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self.rowcount = -1

    def execute(self, text: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> Self:
        with _translated():
            self._cursor.execute(text, parameters)
        if text.lstrip()[:6].upper() in {"INSERT", "UPDATE", "DELETE", "REPLAC"}:
            self.rowcount = self._connection.changes()
        return self

    @property
    def lastrowid(self) -> int:
        return self._connection.last_insert_rowid()

    @property
    def description(self) -> Sequence[tuple[Any, ...]]:
        try:
            return tuple((name, None, None, None, None, None, None) for name, *_ in self._cursor.get_description())
        except apsw.ExecutionCompleteError:  # apsw has let go of the statement: there were no rows, and nobody needs their names
            return ()

    def fetchone(self) -> Any:
        with _translated():
            return self._cursor.fetchone()

    def fetchall(self) -> list[Any]:
        with _translated():
            return self._cursor.fetchall()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        row = self.fetchone()
        if row is None:
            raise StopIteration
        return row


class Connection:
    """A `sqlite3.Connection` with `isolation_level=None`."""

    isolation_level = None

    def __init__(self, target: str, vfs: str, timeout: float, cached_statements: int) -> None:
        own = None if target == ":memory:" else vfs
        with _translated():
            self._connection = apsw.Connection(target, flags=_FLAGS, vfs=own, statementcachesize=cached_statements)
            self._connection.set_busy_timeout(round(timeout * 1000))

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def cursor(self) -> Cursor:
        return Cursor(self._connection)

    def execute(self, text: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> Cursor:
        return self.cursor().execute(text, parameters)

    def close(self) -> None:
        """As CPython's: it raises nothing, for SQLite closes whatever the disk says; apsw raises what its VFS has raised."""
        with contextlib.suppress(apsw.Error):
            self._connection.close()


def install(vfs: str) -> None:
    """From now on `sqlite3.connect` of this process connects through apsw and the VFS of this name."""

    def connect(target: str, *, timeout: float = 5.0, cached_statements: int = 128, **_: object) -> Connection:
        return Connection(target, vfs, timeout, cached_statements)

    sqlite3.connect = connect  # type: ignore[assignment]
    sqlite3.sqlite_version = apsw.sqlite_lib_version()
    sqlite3.sqlite_version_info = tuple(map(int, sqlite3.sqlite_version.split(".")))  # type: ignore[misc, assignment]
