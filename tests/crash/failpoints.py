"""Fail points: named places in the library at which a process kills itself, when the environment names one.

    EVENTBUS_FAIL_POINT="claim: after, 2"    # the second time that a claim was carried out

Nothing of it stands in the library: the program that is to be killed calls `install`, which wraps functions of ours, and only
there. A function that is gone is an error, and so is, for those who wait for the kill, a point that is never passed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, Literal

import attrs

from eventbus import _dispatch, _journal
from eventbus.stores import (
    _sqlite_commands,
    _sqlite_commit,
    _sqlite_file,
    _sqlite_locks,
    _sqlite_schema,
    _sqlite_units,
    base,
    sqlite,
)

VARIABLE = "EVENTBUS_FAIL_POINT"

When = Literal["fresh", "start", "work", "end"]
"""The run in which a point is passed: on a file that is not there yet, at each start, at work, in the end."""

COMMIT_FAILS_EVERY = 25
"""Where the points of an I/O error are wanted: every so many transactions COMMIT takes place and says that the disk failed."""


@attrs.frozen
class Place:
    """A function of ours: a point before it and one after it.

    Attributes:
        owner: the module, class or dict that it is called through. attribute: its name there.
        most: how often it is passed within a second or two, at least.
        named: what is said of one call beside `name`, by its arguments; calls of which nothing is said are passed over.
    """

    name: str
    owner: Any
    attribute: Any
    when: When = "work"
    most: int = 8
    named: Callable[..., str | None] = lambda *_arguments: ""


def _command(kind: type, name: str, when: When = "work", most: int = 2) -> Place:
    return Place(name, _sqlite_commands._DO, kind, when, most)


def _in_mode(mode: str) -> Callable[..., str | None]:
    return lambda _connection, asked: "" if asked == mode else None


def _leaving(*, leaving: bool) -> Callable[..., str | None]:
    return lambda _commands, command: "" if command.leaving is leaving else None


_FILE = _sqlite_file
_LOCKS = _sqlite_locks
PLACES = (
    Place("create the file", sqlite, "prepare_file", "fresh", 1),
    Place("migrate", sqlite, "migrate", "fresh", 1),
    Place("say that it lives", _LOCKS.LockFile, "live", "start", 1),
    Place("connect", sqlite, "connect", "start", 2),
    Place("open the store", sqlite.SQLiteStore, "open", "start", 1),
    _command(base.Register, "register", "start", 1),
    _command(base.Claim, "claim", "start", 1),
    Place("beat", _sqlite_commands._DO, base.Beat, "start", 1, _leaving(leaving=False)),
    Place("commit a batch", sqlite.SQLiteStore, "commit"),
    Place("append in one statement", sqlite, "append_after"),
    Place("look", sqlite, "look"),
    Place("write events", _sqlite_commit, "insert_events"),
    Place("write scheduled events", _sqlite_commit, "insert_scheduled"),
    Place("write outcomes", _sqlite_units.Outcomes, "write"),
    Place("write checkpoints", _sqlite_units, "write_lanes"),
    Place("write waiting deliveries", _sqlite_units, "write_waiting", most=3),
    Place("remove waiting deliveries", _sqlite_units, "_remove_rows", most=3),
    *(Place(f"write dead letters: {kind}", _sqlite_units._WRITE_LETTERS, kind, most=2) for kind in ("died", "handled")),
    Place("WAL checkpoint", sqlite, "wal_checkpoint", "work", 8, _in_mode("PASSIVE")),
    Place("look whether the files are there", _FILE.Identity, "check"),
    Place("tell of a commit", _journal.Journal, "_on_committed"),
    Place("announce", _dispatch.Dispatcher, "announce"),
    _command(base.Promote, "promote"),
    _command(base.Cancel, "cancel"),
    _command(base.Pause, "pause"),
    _command(base.Rewind, "rewind"),
    _command(base.Unsubscribe, "unsubscribe", most=1),
    _command(base.Redrive, "redrive"),
    _command(base.Discard, "discard"),
    _command(base.Prune, "prune", most=1),
    Place("find out after an I/O error", sqlite.SQLiteStore, "_find_out", "work", 2),
    Place("open again after an I/O error", sqlite.SQLiteStore, "_reopen", "work", 2),
    Place("WAL checkpoint after an I/O error", sqlite, "wal_checkpoint", "work", 2, _in_mode("FULL")),
    Place("sign off", _sqlite_commands._DO, base.Beat, "end", 1, _leaving(leaving=True)),
    Place("close the store", sqlite.SQLiteStore, "close", "end", 1),
    Place("last WAL checkpoint", sqlite, "wal_checkpoint", "end", 1, _in_mode("TRUNCATE")),
    Place("let go of the lock", _LOCKS.LockFile, "close", "end", 1),
)


@attrs.frozen
class Point:
    """One side of a place."""

    name: str
    when: When
    most: int

    def nth(self, number: int) -> str:
        """What the environment says for the n-th passing."""
        return f"{self.name}, {number}"


TRANSACTIONS: tuple[tuple[str, Any, When], ...] = (("the migration's", _sqlite_schema, "fresh"), ("a", sqlite, "work"))
POINTS = (
    *(Point(f"{place.name}: {side}", place.when, place.most) for place in PLACES for side in ("before", "after")),
    *(
        Point(f"{whose} {what}: {side}", when, 1 if when == "fresh" else 8)
        for whose, _, when in TRANSACTIONS
        for what in ("BEGIN", "COMMIT")
        for side in ("before", "after")
    ),
)


class _Trap:
    def __init__(self, text: str) -> None:
        self.name, _, number = text.rpartition(", ")
        if self.name not in {point.name for point in POINTS}:
            raise LookupError(f"there is no fail point {self.name!r}")
        self._left = int(number)

    def passed(self, name: str) -> None:
        """The process dies here if it is the point, and the passing, that was named."""
        if name == self.name:
            self._left -= 1
            if not self._left:
                os.write(1, f"\nK {name} .".encode())
                os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Set the trap that the environment names, if it does."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    trap = _Trap(text)
    for place in PLACES:
        _wrap(trap, place)
    for whose, module, _ in TRANSACTIONS:
        fails = "I/O error" in trap.name and module is sqlite
        module.transaction = _wrapped_transaction(trap, whose, module.transaction, fails=fails)


def _wrap(trap: _Trap, place: Place) -> None:
    is_dict = isinstance(place.owner, dict)
    function = place.owner[place.attribute] if is_dict else getattr(place.owner, place.attribute)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        counts = place.named(*arguments) is not None
        if counts:
            trap.passed(f"{place.name}: before")
        result = function(*arguments, **named)
        if counts:
            trap.passed(f"{place.name}: after")
        return result

    if is_dict:
        place.owner[place.attribute] = wrapped
    else:
        setattr(place.owner, place.attribute, wrapped)


def _wrapped_transaction(trap: _Trap, whose: str, transaction: Callable[..., Any], *, fails: bool) -> Callable[..., Any]:
    count = itertools.count(1)

    @contextlib.contextmanager
    def wrapped(connection: sqlite3.Connection) -> Iterator[Any]:
        trap.passed(f"{whose} BEGIN: before")
        with transaction(connection) as state:
            trap.passed(f"{whose} BEGIN: after")
            yield state
            trap.passed(f"{whose} COMMIT: before")
        trap.passed(f"{whose} COMMIT: after")
        if fails and next(count) % COMMIT_FAILS_EVERY == 0:
            error = sqlite3.OperationalError("disk I/O error, by the fail points")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error

    return wrapped
