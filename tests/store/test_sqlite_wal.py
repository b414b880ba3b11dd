"""A damaged WAL is told from one that was being written when the power went."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import attrs
import pytest

from eventbus.errors import StoreCorrupt
from eventbus.stores import _sqlite_wal
from eventbus.stores._sqlite_wal import CutOff, cut_off
from eventbus.stores.base import Batch, Instance, LogState
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing._conformance_base import INSTANCE, NOW, records

TRANSACTIONS = 6
HEADER, FRAME = 32, 24


@attrs.frozen
class Wal:
    """A WAL as SQLite has left it, and where its transactions end.

    Attributes:
        data: the file; beyond its frames lie those of an older generation.
        ends: for each transaction the number of frames up to its end.
        older: the file as it was before the last transaction was written.
        followed: behind the last transaction lie frames of one that was rolled back: so it is certain that the last was synced.
    """

    data: bytes
    page_size: int
    ends: list[int]
    older: bytes
    followed: bool

    @property
    def frame(self) -> int:
        return FRAME + self.page_size

    def cut_by(self, offset: int) -> int:
        """How many transactions recovery leaves out if this byte is damaged."""
        number = max(0, (offset - HEADER) // self.frame)
        return sum(1 for end in self.ends if end > number)


def make(folder: Path, page_size: int, *, rolled_back: bool = False) -> Wal:
    """Write transactions of one to five pages each, behind an older generation that was longer."""
    path = folder / f"{page_size}.db"
    wal = Path(f"{path}-wal")
    connection = sqlite3.connect(path, isolation_level=None)
    with contextlib.closing(connection):
        for text in (f"page_size = {page_size}", "journal_mode = wal", "wal_autocheckpoint = 0", "synchronous = 2"):
            connection.execute(f"PRAGMA {text}").fetchall()
        connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, x)")
        for n in range(20):
            connection.execute("INSERT INTO t VALUES (?, zeroblob(?))", (-n - 1, page_size * 2))
        connection.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
        connection.execute("INSERT INTO t VALUES (1000, 1)")  # begins the WAL anew
        ends, older = [frames_in(wal.read_bytes(), page_size)], b""
        for n in range(TRANSACTIONS - 1):
            older = wal.read_bytes()
            connection.execute("BEGIN")
            for m in range(1 + n % 4):
                connection.execute("INSERT INTO t VALUES (?, randomblob(?))", (n * 10 + m, page_size))
            connection.execute("COMMIT")
            ends.append(frames_in(wal.read_bytes(), page_size))
        if rolled_back:  # a transaction that does not fit in memory is written, and rolled back
            connection.execute("PRAGMA cache_size = 1")
            connection.execute("BEGIN")
            for n in range(100, 120):
                connection.execute("INSERT INTO t VALUES (?, randomblob(?))", (n, page_size * 3))
            connection.execute("ROLLBACK")
        data = wal.read_bytes()
    assert len(data) > HEADER + ends[-1] * (FRAME + page_size)
    return Wal(data, page_size, ends, older, rolled_back)


def frames_in(data: bytes, page_size: int) -> int:
    """How many frames belong to the newest generation."""
    starts = range(HEADER, len(data) - page_size - FRAME + 1, FRAME + page_size)
    return sum(1 for start in starts if data[start + 8 : start + 16] == data[16:24])


def other_order(wal: Wal) -> Wal:
    """The same WAL as a machine of the other byte order would write it."""

    def convert(data: bytes) -> bytes:
        found = bytearray(data)
        struct.pack_into(">I", found, 0, struct.unpack_from(">I", found)[0] ^ 1)
        sums = _sqlite_wal._checksum(bytes(found[:24]), (0, 0), order_of(bytes(found)))
        struct.pack_into(">2I", found, 24, *sums)
        for start in range(HEADER, len(found) - wal.frame + 1, wal.frame):
            if found[start + 8 : start + 16] != found[16:24]:
                break  # the older generation is left as it is
            content = bytes(found[start : start + 8] + found[start + FRAME : start + wal.frame])
            sums = _sqlite_wal._checksum(content, sums, order_of(bytes(found)))
            struct.pack_into(">2I", found, start + 16, *sums)
        return bytes(found)

    return attrs.evolve(wal, data=convert(wal.data), older=convert(wal.older))


def order_of(data: bytes) -> Literal["little", "big"]:
    """Byte order of a WAL's checksums."""
    return "big" if data[3] & 1 else "little"


@pytest.fixture(scope="module", params=["512", "4096", "1024 rolled back", "512 of the other order"])
def wal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wal:
    """WALs of several kinds."""
    size, *kind = request.param.split(" ", 1)
    made = make(tmp_path_factory.mktemp("wal"), int(size), rolled_back=kind == ["rolled back"])
    return other_order(made) if kind == ["of the other order"] else made


def look(data: bytes) -> CutOff | None:
    """What is found in a WAL."""
    return cut_off(io.BytesIO(data))


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    """The data with one bit flipped."""
    found = bytearray(data)
    found[offset] ^= 1 << bit
    return bytes(found)


def test_what_is_whole(wal: Wal) -> None:
    """A WAL that is whole is taken, with whatever an older generation or a transaction that was rolled back has left in it."""
    assert look(wal.data) is None
    for end in (0, 10, HEADER, HEADER + 10, HEADER + wal.frame, len(wal.data) - 1):
        assert look(wal.data[:end]) is None


def test_a_flipped_bit(wal: Wal) -> None:
    """A bit that is flipped in any transaction but the last two is always found; how many are cut off is said."""
    chance = random.Random(1)
    last, least = wal.ends[-1], 1 if wal.followed else 2
    step = max(1, len(wal.data) // 800)
    for offset in (*range(HEADER), *range(HEADER, HEADER + last * wal.frame, step)):
        found = look(flipped(wal.data, offset, chance.randrange(8)))
        cut = wal.cut_by(offset)
        if offset < HEADER:
            if 4 <= offset < 8:  # a version that SQLite refuses itself, or takes for another reason to recover nothing
                continue
            assert found == CutOff(0, TRANSACTIONS, 0), offset
        elif cut < least:
            assert found is None, offset
        else:
            number = (offset - HEADER) // wal.frame
            at_end = number + 1 in wal.ends  # the break lies in the end of a transaction itself
            if found is None:
                assert at_end, offset
                assert cut == least, offset
            else:
                assert (found.frame, found.size) == (number + 1, HEADER + number * wal.frame)
                assert found.commits in ((max(1, cut - 1), cut) if at_end else (cut,)), offset


def test_damage_of_several_frames(wal: Wal) -> None:
    """What lies beyond is found also if all of several frames is gone, or the first sector of the file."""
    for begin in range(0, wal.ends[-4] * wal.frame, 512):
        for length in (512, 3 * wal.frame):
            data = bytearray(wal.data)
            data[begin : begin + length] = bytes(byte ^ 0xFF for byte in data[begin : begin + length])
            found = look(bytes(data))
            assert found is not None, (begin, length)
            assert found.commits >= 1
            assert found.frame == (0 if begin < HEADER else (begin - HEADER) // wal.frame + 1)


def test_a_torn_write(wal: Wal) -> None:
    """Whatever part of the last transaction has come to the disk when the power goes: that is no damage."""
    chance = random.Random(2)
    begin, end = HEADER + wal.ends[-2] * wal.frame, HEADER + wal.ends[-1] * wal.frame
    older = wal.older.ljust(len(wal.data), b"\0")
    whole = wal.data[: end if wal.followed else None]
    for _ in range(150):
        data = bytearray(whole)
        for sector in range(begin // 512, -(-end // 512)):
            if chance.random() < 0.5:
                part = slice(max(begin, sector * 512), (sector + 1) * 512)
                data[part] = older[part]
        assert look(bytes(data)) is None


def test_the_end_of_a_transaction_was_torn(wal: Wal) -> None:
    """A frame of which only half the header has come to the disk does not pass for the end of a transaction."""
    first = HEADER + wal.ends[-2] * wal.frame
    if wal.ends[-1] - wal.ends[-2] < 2:
        pytest.fail("the last transaction is to have several frames")
    data = bytearray(wal.data)
    data[first + 4 : first + 8] = struct.pack(">I", 99)  # what an older frame may have said there
    in_one_sector = first // 512 == (first + FRAME - 1) // 512
    assert (look(bytes(data)) is not None) == in_one_sector


def test_copies_of_the_last_frame(wal: Wal) -> None:
    """Where SQLite fills a sector with copies of a transaction's last frame, the copies are no further transaction."""
    end = HEADER + wal.ends[-1] * wal.frame
    data = bytearray(wal.data[:end])
    last = bytes(data[end - wal.frame :])
    sums = struct.unpack(">2I", last[16:24])
    for _ in range(3):
        sums = _sqlite_wal._checksum(last[:8] + last[FRAME:], sums, order_of(wal.data))
        data += last[:16] + struct.pack(">2I", *sums) + last[FRAME:]
    assert look(bytes(data)) is None
    assert look(flipped(bytes(data), HEADER + wal.ends[-2] * wal.frame + 30, 0)) is None
    found = look(flipped(bytes(data), HEADER + 30, 0))
    assert found is not None
    assert TRANSACTIONS - 1 <= found.commits <= TRANSACTIONS  # the break may lie in the end of the first itself


def test_sqlite_leaves_out_what_is_found(tmp_path: Path) -> None:
    """What is said of a damaged WAL is what SQLite's recovery does to it."""
    store = SQLiteStore(tmp_path / "a.db")
    store.open(INSTANCE)
    for _ in range(8):
        store.commit(Batch(NOW, appends=[records(1)]))
    for name in ("a.db", "a.db-wal"):
        shutil.copy(tmp_path / name, tmp_path / f"copy-{name}")
    store.close()
    data = (tmp_path / "copy-a.db-wal").read_bytes()
    copy = tmp_path / "copy-a.db"
    bytes_of_database = copy.read_bytes()
    refused = 0
    for offset in range(len(data) // 2, len(data), 4_099):
        copy.write_bytes(bytes_of_database)
        Path(f"{copy}-wal").write_bytes(damaged := flipped(data, offset, 3))
        found = look(damaged)
        if found is not None:
            refused += 1
            with pytest.raises(StoreCorrupt, match=r"copy-a\.db-wal is damaged in frame"):
                SQLiteStore(copy).open(INSTANCE)
            assert Path(f"{copy}-wal").read_bytes() == damaged
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            (kept,) = connection.execute("SELECT count(*) FROM events").fetchone()
        if found is None:
            assert kept >= 7
        else:
            assert found.commits in (8 - kept, 7 - kept)  # the break may lie in the end of a transaction itself
    assert refused > 10


def broken(folder: Path, commits: int, part: float) -> SQLiteStore:
    """A store that is closed, on a file with so many commits in its WAL, which is broken after this part of it."""
    store = SQLiteStore(folder / "a.db")
    store.open(INSTANCE)
    for _ in range(commits):
        store.commit(Batch(NOW, appends=[records(1)]))
    kept = {name: (folder / name).read_bytes() for name in ("a.db", "a.db-wal")}
    store.close()
    kept["a.db-wal"] = flipped(kept["a.db-wal"], int(len(kept["a.db-wal"]) * part), 0)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    return store


def test_the_way_on(tmp_path: Path) -> None:
    """Whoever does what the error says has the transactions before the damage, and can publish again."""
    store = broken(tmp_path, 8, 2 / 3)
    with pytest.raises(StoreCorrupt) as refused:
        store.open(INSTANCE)
    code = str(refused.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    store.open(INSTANCE)
    head = store.read(LogState()).head
    assert 0 < head < 7
    assert store.commit(Batch(NOW, appends=[records(1)])).head == head + 1
    store.close()


def test_only_full_looks(tmp_path: Path) -> None:
    """Without a sync at each commit, a break in the middle is what a loss of power leaves; "fast" promises no more."""
    store = broken(tmp_path, 4, 1 / 2)
    with pytest.raises(StoreCorrupt):
        store.open(INSTANCE)
    fast = SQLiteStore(tmp_path / "a.db", durability="fast")
    fast.open(INSTANCE)
    fast.close()


def test_beside_another(tmp_path: Path) -> None:
    """While another instance has the file open nothing is recovered, so nothing is looked at."""
    first = SQLiteStore(tmp_path / "a.db")
    first.open(INSTANCE)
    for _ in range(4):
        first.commit(Batch(NOW, appends=[records(1)]))
    wal = tmp_path / "a.db-wal"
    with wal.open("r+b") as file:
        file.seek(5 * 4_120)
        file.write(b"what nobody reads any more"[::-1])
    assert look(wal.read_bytes()) is not None
    second = SQLiteStore(tmp_path / "a.db")
    second.open(Instance("2", "n", "h", 1, NOW))
    second.close()
    first.close()


def test_several_that_start_together(tmp_path: Path) -> None:
    """None of those that start at the same time takes the others for one that has the file open: all refuse."""
    broken(tmp_path, 4, 1 / 2)
    together = threading.Barrier(4)

    def open_one(number: int) -> str:
        one = SQLiteStore(tmp_path / "a.db")
        together.wait()
        try:
            one.open(Instance(str(number), "n", "h", 1, NOW))
        except StoreCorrupt:
            return "refused"
        one.close()
        return "opened"

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(open_one, range(4))) == ["refused"] * 4
