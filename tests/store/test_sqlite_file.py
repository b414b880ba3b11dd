"""The SQLite store and its files: who may open them, how, and what happens when they are not what they should be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventbus.errors import (
    ConfigurationError,
    StoreCorrupt,
    StoreError,
    StoreInUse,
    StoreLost,
    StoreTooNew,
    StoreUnavailable,
    StoreUnsafe,
)
from eventbus.stores import _sqlite_connection, _sqlite_file
from eventbus.stores.base import Batch, Instance, LogState, Register, Registration, Subscriptions, Waiting, WaitingRows
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing._conformance_base import INSTANCE, NOW, records
from tests.first_version import make_first_version

ME = Instance("1", "shop", "localhost", os.getpid(), NOW)


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Iterator[SQLiteStore]:
    """An open store."""
    store = SQLiteStore(path, **options)
    store.open(ME)
    try:
        yield store
    finally:
        store.close()


def outside(path: Path, *statements: str) -> list[Any]:
    """Run statements through a connection of our own, as a person with a tool would; the rows of the last."""
    rows: list[Any] = []
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            rows = connection.execute(statement).fetchall()
    return rows


def setting(connection: sqlite3.Connection | None, name: str) -> object:
    """What a connection says about a pragma."""
    assert connection is not None
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("fast", 1)])
def test_settings(tmp_path: Path, durability: str, synchronous: int) -> None:
    """Both connections have the settings that durability needs."""
    with opened(tmp_path / "a.db", durability=durability) as store:
        for connection in (store._writer, store._reader):
            assert setting(connection, "journal_mode") == "wal"
            assert setting(connection, "synchronous") == synchronous
            assert setting(connection, "busy_timeout") == 5_000
            assert setting(connection, "foreign_keys") == 1
            assert [setting(connection, name) for name in ("mmap_size", "trusted_schema", "wal_autocheckpoint")] == [0, 0, 0]
        assert setting(store._writer, "query_only") == 0
        assert setting(store._reader, "query_only") == 1


def test_a_setting_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that SQLite does not take is refused at the start, by name."""
    original = _sqlite_connection._settings
    monkeypatch.setattr(_sqlite_connection, "_settings", lambda **k: {**original(**k), "synchronous": 9})
    with pytest.raises(StoreUnsafe, match="synchronous"):
        SQLiteStore(tmp_path / "a.db").open(ME)


def test_an_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLite that is too old is refused."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    with pytest.raises(StoreUnsafe, match="too old"):
        SQLiteStore(tmp_path / "a.db").open(ME)


def test_features(tmp_path: Path) -> None:
    """A store says what it can do before it is opened."""
    full, fast, memory = SQLiteStore(tmp_path / "a"), SQLiteStore(tmp_path / "a", durability="fast"), SQLiteStore(":memory:")
    assert [store.features.survives_power_loss for store in (full, fast, memory)] == [True, False, False]
    assert [store.features.concurrent_reads for store in (full, fast, memory)] == [True, True, False]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
def test_no_path(path: Any) -> None:
    """What cannot be a path is refused at once."""
    with pytest.raises(ConfigurationError):
        SQLiteStore(path)
    with pytest.raises(ConfigurationError, match="durability"):
        SQLiteStore("a.db", durability="none")  # type: ignore[arg-type]


def test_importing_is_cheap(tmp_path: Path) -> None:
    """sqlite-utils is imported only to make or change tables."""
    with opened(tmp_path / "a.db"):
        pass
    code = (
        "import sys; from eventbus.stores.sqlite import SQLiteStore; from eventbus.stores.base import Instance\n"
        f"s = SQLiteStore({str(tmp_path / 'a.db')!r}); s.open(Instance('1', 'n', 'h', 1, 0.0)); s.close()\n"
        "assert 'sqlite_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ the file


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """All files are created 0600."""
    with opened(tmp_path / "a.db") as store:
        store.commit(Batch(NOW, appends=[records(1)]))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("a.db", "a.db-wal", "a.db-shm", "a.db-lock", "a.db-ballast"), 0o600)


def test_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may hold any character, and be relative."""
    monkeypatch.chdir(tmp_path)
    for name in ("ü %41?x=1#y.db", "file:a.db", "a b.db"):
        with opened(Path(name)) as store:
            store.commit(Batch(NOW, appends=[records(1)]))
            assert store.address == name
        assert (tmp_path / name).exists()


def test_no_directory(tmp_path: Path) -> None:
    """A directory that is not there is named."""
    with pytest.raises(StoreUnavailable, match="no directory"):
        SQLiteStore(tmp_path / "nowhere" / "a.db").open(ME)
    with pytest.raises(StoreUnavailable, match="not a file"):
        SQLiteStore(tmp_path).open(ME)


def test_not_a_database(tmp_path: Path) -> None:
    """A file that is no database is refused and left as it is."""
    path = tmp_path / "a.db"
    path.write_text("dear diary, " * 1000)
    with pytest.raises(StoreCorrupt, match="not an SQLite database"):
        SQLiteStore(path).open(ME)
    assert path.read_text() == "dear diary, " * 1000


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE events (id INTEGER, what TEXT)"],
        ["CREATE VIEW lanes AS SELECT 1"],
        ["PRAGMA application_id = 1", "CREATE TABLE t (x)"],
        ["PRAGMA user_version = 7", "CREATE TABLE t (x)"],
    ],
)
def test_a_foreign_database(tmp_path: Path, statements: list[str]) -> None:
    """The database of another program is refused and left as it is."""
    outside(tmp_path / "a.db", *statements)
    before = outside(tmp_path / "a.db", "SELECT sql FROM sqlite_master")
    with pytest.raises(StoreUnavailable, match="another program"):
        SQLiteStore(tmp_path / "a.db").open(ME)
    assert outside(tmp_path / "a.db", "SELECT sql FROM sqlite_master") == before


def test_beside_other_tables(tmp_path: Path) -> None:
    """A database with unrelated tables may take ours in."""
    outside(tmp_path / "a.db", "CREATE TABLE orders (id TEXT)")
    with opened(tmp_path / "a.db") as store:
        assert store.read(LogState()).head == 0


def test_too_new(tmp_path: Path) -> None:
    """A file of a newer version is refused."""
    with opened(tmp_path / "a.db"):
        pass
    outside(tmp_path / "a.db", "PRAGMA user_version = 999")
    with pytest.raises(StoreTooNew, match="999"):
        SQLiteStore(tmp_path / "a.db").open(ME)


def test_migrations_are_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that fails leaves nothing behind, and the next start makes it whole."""
    from eventbus.stores import _sqlite_schema as schema

    with monkeypatch.context() as patch:
        patch.setattr(schema, "_FIRST", (*schema._FIRST, "CREATE TABLE nonsense"))
        with pytest.raises(StoreError):
            SQLiteStore(tmp_path / "a.db").open(ME)
    assert outside(tmp_path / "a.db", "SELECT name FROM sqlite_master") == []
    with opened(tmp_path / "a.db") as store:
        assert store.read(LogState()).head == 0
    assert outside(tmp_path / "a.db", "PRAGMA application_id") == [(schema.APPLICATION_ID,)]
    assert outside(tmp_path / "a.db", "SELECT migration_set, name FROM _sqlite_migrations") == [
        ("eventbus", "0001_first"),
        ("eventbus", "0002_several_processes"),
    ]


def test_a_file_of_the_first_version(tmp_path: Path) -> None:
    """A file whose tables are of the first version is brought up to date, and keeps what it holds."""
    make_first_version(
        tmp_path / "a.db",
        "INSERT INTO subscriptions VALUES ('mailer', '[\"a\"]', '{\"a\":0}', '[]', 'type', 1, 7, NULL, NULL, 5)",
        "INSERT INTO deliveries VALUES ('mailer', 3, 'a', 'k', 'retrying', 2, 7.25, 5.000001, 'no')",
    )
    with opened(tmp_path / "a.db") as store:
        (subscribed,) = store.read(Subscriptions())
        assert (subscribed.name, subscribed.generation, subscribed.floors) == ("mailer", 7, ())
        (row,) = store.read(WaitingRows())
        assert (row.lane, row.waiting) == ("a", Waiting(3, "k", 2, 7.25, "retrying", 5.000001, "no"))
        store.commit(Batch(NOW, commands=[Register((Registration("other", ("a",), "type", 1),))]))
        assert store.read(Subscriptions())[1].generation > 7


def test_people_can_read_it(tmp_path: Path) -> None:
    """JSON is text that SQL can look into, other bytes are bytes, times are unix seconds."""
    with opened(tmp_path / "a.db") as store:
        json, other = records(1, data=b'{"total":"9.50"}')[0], records(1, data=b"{}", content_type="application/x")[0]
        store.commit(Batch(NOW, appends=[[json, other]]))
    rows = outside(tmp_path / "a.db", "SELECT type, time, json_extract(data, '$.total') FROM events WHERE position = 1")
    assert rows == [("order.created", NOW, "9.50")]
    assert outside(tmp_path / "a.db", "SELECT typeof(data), size FROM events WHERE position = 2") == [("blob", 2)]


# ------------------------------------------------------------------ file systems

_MOUNTS = """\
22 1 0:20 / / rw - ext4 /dev/vda rw
23 22 0:21 / /data rw,relatime shared:1 - nfs4 server:/x rw
24 23 0:22 / /data/local rw - xfs /dev/vdb rw
25 22 0:23 / /my\\040share rw - fuse.sshfs host: rw
26 22 0:24 / /over rw - ext4 /dev/vdc rw
27 26 0:25 / /over rw - cifs //host/x rw
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/a.db", "ext4"),
        ("/data/a.db", "nfs4"),
        ("/database/a.db", "ext4"),
        ("/data/local/a.db", "xfs"),
        ("/my share/a.db", "fuse.sshfs"),
        ("/over/a.db", "cifs"),
    ],
)
def test_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: str) -> None:
    """The file system of a path is that of its longest mount; of several at one place the last counts."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(_MOUNTS)
    monkeypatch.setattr(_sqlite_file, "MOUNTINFO", str(mounts))
    assert _sqlite_file.file_system_of(path) == kind


def test_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system is refused before anything is created; where the kernel does not tell, nothing is."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:20 / / rw - ext4 /dev/vda rw\n23 22 0:21 / {tmp_path} rw - nfs s:/x rw\n")
    monkeypatch.setattr(_sqlite_file, "MOUNTINFO", str(mounts))
    with pytest.raises(StoreUnsafe, match="network file system"):
        SQLiteStore(tmp_path / "a.db").open(ME)
    assert [path.name for path in tmp_path.iterdir()] == ["mountinfo"]
    monkeypatch.setattr(_sqlite_file, "MOUNTINFO", str(tmp_path / "none"))
    with opened(tmp_path / "a.db"):
        pass


# ------------------------------------------------------------------ one instance


def test_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose lock another has taken for itself, as eventbus before 0.1 did, is refused; then it may be had."""
    monkeypatch.setattr("eventbus.stores.sqlite.BUSY_TIMEOUT", 50)
    with (tmp_path / "a.db-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreInUse, match=r"a\.db is in use"):
            SQLiteStore(tmp_path / "a.db").open(ME)
    with opened(tmp_path / "a.db"):
        pass


def test_several_names_of_a_file(tmp_path: Path) -> None:
    """Two stores on one file, also by a symbolic link, take turns to write, and see what the other has written."""
    (tmp_path / "link.db").symlink_to(tmp_path / "a.db")
    with opened(tmp_path / "a.db") as first:
        second = SQLiteStore(tmp_path / "link.db")
        second.open(INSTANCE)
        try:
            for store in (first, second, first):
                store.commit(Batch(NOW, appends=[records(1)]))
            assert first.read(LogState()).head == second.read(LogState()).head == 3
        finally:
            second.close()


def test_open_twice(tmp_path: Path) -> None:
    """A store that is open is not opened again, and stays open."""
    with opened(tmp_path / "a.db") as store:
        with pytest.raises(StoreUnavailable, match="open already"):
            store.open(ME)
        assert store.read(LogState()).head == 0


def test_not_open(tmp_path: Path) -> None:
    """A store that is not open says so."""
    store = SQLiteStore(tmp_path / "a.db")
    with pytest.raises(StoreUnavailable, match="not open"):
        store.commit(Batch(NOW))
    with pytest.raises(StoreUnavailable, match="not open"):
        store.read(LogState())
    store.close()


def test_a_failed_start_lets_go(tmp_path: Path) -> None:
    """A store that could not be opened does not hold the file."""
    path = tmp_path / "a.db"
    path.write_text("dear diary, " * 1000)
    store = SQLiteStore(path)
    with pytest.raises(StoreCorrupt):
        store.open(ME)
    path.unlink()
    with opened(path):
        pass


def test_a_forked_child(tmp_path: Path) -> None:
    """A child neither writes through its parent's store nor keeps the file locked."""
    with opened(tmp_path / "a.db") as store:
        gone, release = os.pipe()
        begun, begin = os.pipe()
        child = os.fork()
        if not child:
            os.close(release)
            os.write(begin, b"!")
            code = 1
            with contextlib.suppress(BaseException):
                store.commit(Batch(NOW, appends=[records(1)]))
                os._exit(2)
            try:
                store.read(LogState())
            except StoreUnavailable:
                store.close()
                code = 0
            os.read(gone, 1)  # until the parent closes it
            os._exit(code)
        os.read(begun, 1)  # what a fork runs in the child first has been run
    with opened(tmp_path / "a.db") as again:
        os.close(release)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert again.read(LogState()).head == 0
    for descriptor in (gone, begun, begin):
        os.close(descriptor)


# ------------------------------------------------------------------ files that go away


@pytest.mark.parametrize("name", ["a.db", "a.db-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_lost(tmp_path: Path, name: str, replaced: bool) -> None:
    """A commit into files that were removed or replaced is not reported as done."""
    with opened(tmp_path / "a.db") as store:
        store.commit(Batch(NOW, appends=[records(1)]))
        (tmp_path / name).unlink()
        if replaced:
            (tmp_path / name).touch()
        some = records(1)
        with pytest.raises(StoreLost, match=r"a\.db"):
            store.commit(Batch(NOW, appends=[some]))
        assert some[0].position == 0


def test_not_lost(tmp_path: Path) -> None:
    """What people do to a file through SQLite does not make it count as lost."""
    with opened(tmp_path / "a.db") as store:
        store.commit(Batch(NOW, appends=[records(3)]))
        outside(tmp_path / "a.db", "SELECT * FROM events", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)", "ANALYZE")
        store.commit(Batch(NOW, appends=[records(1)]))
        assert store.read(LogState()).head == 4


def test_the_wal_goes_with_the_store(tmp_path: Path) -> None:
    """After closing, everything is in the one file."""
    with opened(tmp_path / "a.db") as store:
        store.commit(Batch(NOW, appends=[records(3)]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "a.db-ballast", "a.db-lock"]
    assert outside(tmp_path / "a.db", "SELECT count(*) FROM events") == [(3,)]
