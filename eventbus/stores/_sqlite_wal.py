"""The WAL, looked at before SQLite opens it: would recovery leave out what was acknowledged?

publish → journal → *store* → lanes → workers → outcome. In comes the path of a database that nobody has open; out goes nothing or
`StoreCorrupt`. SQLite's recovery takes the WAL up to the first frame whose checksum does not fit, and
passes by the rest without a word: after a loss of power that is right, for the last transaction was being written. But if a later
transaction was begun after the one that is broken, that one had been synced and acknowledged: then the disk has lost it.

What is in the file, and how it is checksummed: https://sqlite.org/fileformat2.html#walformat. Whether a break is damage or not is
decided in docs/decisions/0017. Only the WAL is read; SQLite holds no locks on that file, so closing it here drops none.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO, Literal

import msgspec

from eventbus.errors import StoreCorrupt, StoreUnavailable

Order = Literal["little", "big"]
Sums = tuple[int, int]

_MAGIC: dict[int, Order] = {0x377F0682: "little", 0x377F0683: "big"}
_HEADER = struct.Struct(">6I2I")  # magic, version, page size, checkpoint sequence, salts; checksums
_SUMMED = 24  # bytes of the header that its checksum is over
_FRAME = struct.Struct(">2I8s2I")  # page number, database size after a commit or 0, salts; checksums
_SALTS = slice(16, 24)
_PAGE_SIZES = tuple(1 << bits for bits in range(9, 17))
_SECTOR = 512  # the least that a disk writes whole
_PROBE = 16  # frames to look at where the header cannot be relied upon
_MASK = 0xFFFFFFFF


class CutOff(msgspec.Struct, frozen=True):
    """What recovery would pass by.

    Attributes:
        frame: the first frame that does not fit, counted from 1; 0 if it is the WAL's header.
        commits: complete transactions beyond it that were committed; there may have been more.
        size: bytes of the WAL up to the break, that is, of what recovery takes.
    """

    frame: int
    commits: int
    size: int


def refuse_cut_off(path: str) -> None:
    """See that recovery would take all that was acknowledged. `path` is that of the database; nobody writes to it now.

    Raises:
        StoreCorrupt: transactions would be left out that were complete, and synced.
    """
    try:
        with open(f"{path}-wal", "rb") as wal:
            found = cut_off(wal)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreUnavailable(f"{path}-wal cannot be read: {error}") from error
    if found is not None:
        where = f"frame {found.frame} (at byte {found.size:,})" if found.frame else "its header"
        code = f"import sqlite3; print(sqlite3.connect({path!r}).execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchone())"
        raise StoreCorrupt(
            f"{path}-wal is damaged in {where}, and SQLite would leave out without a word what comes from there on: at least "
            f"{found.commits} transaction(s) that were committed. Restore {path} and {path}-wal together. To go on without those "
            f'transactions, copy both files first, then have SQLite cut the WAL off: python -c "{code}"'
        )


def cut_off(wal: BinaryIO) -> CutOff | None:
    """What recovery would leave out of a WAL although it was committed; None if it takes all, or leaves out only the last
    transaction, of which nobody knows whether it was acknowledged."""
    header = wal.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    generation = _generation(header)
    if generation is None:
        generation = _behind_damaged_header(header, wal)
        return None if generation is None else _beyond_header(generation, wal)
    return _beyond_break(generation, wal)


# ------------------------------------------------------------------ header and frames


class _Generation(msgspec.Struct, frozen=True):
    """What the frames of a WAL have in common since it was begun anew last; older ones are left over."""

    order: Order
    page_size: int
    salts: bytes
    sums: Sums  # with which the first frame's checksum begins


class _Frame(msgspec.Struct):
    page: int
    size: int  # of the database after it, in pages, if it ends a transaction; 0 otherwise
    salts: bytes
    stored: Sums
    summed: bytes  # what its checksum is over
    offset: int

    def sums_after(self, sums: Sums, order: Order) -> Sums:
        """Its checksum, if that of the frame before it is `sums`."""
        return _checksum(self.summed, sums, order)

    def follows(self, sums: Sums, generation: _Generation) -> bool:
        """Whether it is what was written after a frame with this checksum."""
        return self.page != 0 and self.salts == generation.salts and self.sums_after(sums, generation.order) == self.stored


def _checksum(data: bytes, sums: Sums, order: Order) -> Sums:
    words = array.array("I", data)
    if order != sys.byteorder:
        words.byteswap()
    first, second = sums
    pairs = iter(words)
    for one, other in zip(pairs, pairs, strict=True):
        first = (first + second + one) & _MASK
        second = (second + first + other) & _MASK
    return first, second


def _generation(header: bytes) -> _Generation | None:
    """What a header says, if it is whole."""
    magic, _, page_size, _, _, _, *sums = _HEADER.unpack(header)
    order = _MAGIC.get(magic)
    if order is None or page_size not in _PAGE_SIZES:
        return None
    found = _checksum(header[:_SUMMED], (0, 0), order)
    return _Generation(order, page_size, header[_SALTS], found) if list(found) == sums else None


def _frames(generation: _Generation, wal: BinaryIO) -> Iterator[_Frame]:
    """All frames that are there whole."""
    offset = _HEADER.size
    wal.seek(offset)
    length = _FRAME.size + generation.page_size
    while len(raw := wal.read(length)) == length:
        page, size, salts, first, second = _FRAME.unpack_from(raw)
        yield _Frame(page, size, salts, (first, second), raw[:8] + raw[_FRAME.size :], offset)
        offset += length


# ------------------------------------------------------------------ beyond a break


def _beyond_break(generation: _Generation, wal: BinaryIO) -> CutOff | None:
    """Go as recovery does, up to the first frame that does not fit, and look at what lies beyond."""
    sums, order = generation.sums, generation.order
    frames = _frames(generation, wal)
    for number, frame in enumerate(frames, 1):
        found = frame.sums_after(sums, order)
        if found != frame.stored or frame.salts != generation.salts or not frame.page:
            commits, synced = _commits_from(frame, found, frames, generation)
            return CutOff(number, commits, frame.offset) if synced else None
        sums = found
    return None


def _commits_from(broken: _Frame, found: Sums, frames: Iterator[_Frame], generation: _Generation) -> tuple[int, bool]:
    """How many transactions can be seen to have been committed from a broken frame on, and whether one of them had been synced:
    that is so if a frame of another transaction follows upon its last one, as its checksum shows.

    Args:
        found: the checksum that the broken frame should have.
    """
    commits, synced = 0, False
    before, is_known = broken, found == broken.stored  # known: what it says of itself is what was written
    for frame in frames:
        follows = frame.follows(before.stored, generation)
        if before is broken and not follows:
            follows = is_known = frame.follows(found, generation)
        is_known = is_known or (follows and _has_whole_header(before, generation))
        # Where a disk has large sectors, SQLite may fill the last one with copies of a transaction's last frame.
        is_copy = frame.summed == before.summed
        synced = synced or (before.size != 0 and follows and is_known and not is_copy)
        commits += frame.size != 0 and follows and not is_copy
        before, is_known = frame, follows
    return max(commits, int(synced)), synced


def _has_whole_header(frame: _Frame, generation: _Generation) -> bool:
    """Whether a frame whose checksum does not fit, though the next one follows upon what is stored as its checksum, has the
    header that was written: then it is its page that is broken. In two sectors, half of it may be what stood there before."""
    return frame.salts == generation.salts and frame.offset // _SECTOR == (frame.offset + _FRAME.size - 1) // _SECTOR


# ------------------------------------------------------------------ a damaged header


def _behind_damaged_header(header: bytes, wal: BinaryIO) -> _Generation | None:
    """The generation of frames that follow upon each other behind a header that does not fit; None if there are none. The header
    is synced before the first frame is written."""
    (*_, first, second) = _HEADER.unpack(header)
    for order in _MAGIC.values():
        seeds = ((first, second), _checksum(header[:_SUMMED], (0, 0), order))
        for page_size in _PAGE_SIZES:
            probe = _Generation(order, page_size, b"", seeds[0])
            before: tuple[Sums, ...] = seeds
            for _, frame in zip(range(_PROBE), _frames(probe, wal), strict=False):
                for seed in before:
                    if frame.page and frame.sums_after(seed, order) == frame.stored:
                        return _Generation(order, page_size, frame.salts, seed)
                before = (frame.stored,)
    return None


def _beyond_header(generation: _Generation, wal: BinaryIO) -> CutOff | None:
    nothing = _Frame(0, 0, b"", generation.sums, b"", 0)
    commits, _ = _commits_from(nothing, generation.sums, _frames(generation, wal), generation)
    return CutOff(0, commits, 0) if commits else None
