"""A look at what other instances do that fails, and locks that the kernel does not give: it is told and tried again, or told for
good; nobody waits for ever."""

from __future__ import annotations

import errno
import fcntl
import sqlite3
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import EventBus, StoreError, StoreUnavailable
from eventbus.stores import _sqlite_locks as locks
from eventbus.stores.base import Batch, Beat, Instance, Notice
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import Recorder


@attrs.frozen
class Noted:
    n: int


class Unreadable:
    """A connection for which the disk cannot read who there is, as often as this is said."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.times = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, text: str, *parameters: Any) -> sqlite3.Cursor:
        if self.times and text.startswith("SELECT id FROM instances"):
            self.times -= 1
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        return self.connection.execute(text, *parameters)


class Failing(SQLiteStore):
    """A store whose looks fail for once, in one way or another."""

    def __init__(self, path: Path, error: Exception | None = None) -> None:
        super().__init__(path)
        self.error = error

    def open(self, instance: Instance) -> None:
        super().open(instance)
        assert self._writer is not None
        self.unreadable = Unreadable(self._writer)
        self._writer = self.unreadable  # type: ignore[assignment]

    def notice(self) -> Notice | None:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().notice()


def instance(id: str) -> Instance:
    return Instance(id, id, "here", 1, 0.0)


def opened(store: SQLiteStore, id: str) -> SQLiteStore:
    """Opened, and shown to the others."""
    store.open(instance(id))
    beat = Beat(instance(id), store.monotonic(), 60.0)
    store.commit(Batch(now=0.0, appends=[], units=[], commands=[beat]))
    return store


def test_a_look_that_fails_is_made_again(tmp_path: Path) -> None:
    """What a look could not read is read by the next one: who has come meanwhile is known, and that he dies is noticed."""
    store = Failing(tmp_path / "a.db")
    opened(store, "one")
    other = opened(SQLiteStore(tmp_path / "a.db"), "other")
    store.unreadable.times = 1
    with pytest.raises(StoreUnavailable):
        store.notice()
    assert store.notice() is not None
    other.close()  # without a farewell: as if its process had died
    notice = store.notice()
    store.close()
    assert notice is not None
    assert notice.died


async def test_a_bus_whose_look_fails_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told that others cannot be seen; what is published is stored, and what others publish is handled when they are seen."""
    store, seen = Failing(tmp_path / "a.db"), Recorder()
    bus = EventBus(store)
    bus.subscribe(Noted, name="note")(seen.note)
    async with bus, EventBus(tmp_path / "a.db").open(dispatch=False) as other:
        with anyio.fail_after(10):
            store.unreadable.times = 1
            await other.pause("note")
            await other.resume("note")
            while "it cannot be seen what other instances do" not in caplog.text:
                await anyio.lowlevel.checkpoint()
            await bus.publish(Noted(1))
            await other.publish(Noted(2))
            assert await seen.wait_for(2) == [Noted(1), Noted(2)]


async def test_a_look_that_the_kernel_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it cannot be told who lives, for now, a bus goes on all the same."""
    refused = threading.Event()

    def refuse(_descriptor: int, _wanted: bytes) -> bool:
        refused.set()
        raise OSError(errno.EIO, "the kernel fails")

    async with EventBus(tmp_path / "a.db") as bus, EventBus(tmp_path / "a.db"):
        with anyio.fail_after(10), monkeypatch.context() as patch:
            patch.setattr(locks, "is_locked", refuse)
            while "it cannot be seen what other instances do" not in caplog.text:
                await anyio.lowlevel.checkpoint()
        await bus.publish(Noted(1))
    assert refused.is_set()


async def test_a_look_that_fails_as_nobody_has_foreseen(tmp_path: Path) -> None:
    """The bus ends, and says why; nobody waits for ever, also not who leaves."""
    store = Failing(tmp_path / "a.db")
    with anyio.fail_after(10) as scope, pytest.raises(StoreError, match="ZeroDivisionError"):
        async with EventBus(store):
            store.error = ZeroDivisionError("a fault of the store's")
            await anyio.sleep_forever()
    assert not scope.cancel_called


def test_a_turn_that_the_kernel_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for his turn to write is told that the kernel gives no lock; the next one gets it, when it does again."""
    (tmp_path / "a").touch()
    one, other = locks.LockFile(str(tmp_path / "a")), locks.LockFile(str(tmp_path / "a"))
    flock = fcntl.flock

    def refuse_to_wait(descriptor: int, kind: int) -> None:
        if kind == fcntl.LOCK_EX:
            raise OSError(errno.ENOLCK, "no locks are left")
        flock(descriptor, kind)

    try:
        assert one.take_turn(1.0)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", refuse_to_wait)
            with pytest.raises(StoreUnavailable, match="no locks are left"):
                other.take_turn(10.0)
        one.give_turn()
        assert other.take_turn(10.0)
        other.give_turn()
    finally:
        one.close()
        other.close()
