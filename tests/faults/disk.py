"""What may be on a disk when the power goes: images of its files, from what a program asked of them.

What POSIX promises, and what SQLite counts on, and no more:

- what was written to a file before its last sync is there, with its size; of what was written since, nothing, all, or any part:
  whole writes in any choice, or each sector of 512 bytes as it was at any moment since. A write harms no byte beside it
  (SQLite's SQLITE_IOCAP_POWERSAFE_OVERWRITE, which its VFS for Unix takes for granted). A file may have grown before its data
  has come: what is read there then are zeros, or whatever lay there before;
- names that came and went before the last sync of the directory are as they were then; those since may be or not be, one by one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import attrs

from tests.faults.recording_vfs import Acknowledged, Begun, Create, Delete, Op, Sync, SyncDirectory, Truncate, Write

SECTOR = 512

Image = dict[str, bytes]
"""What is in each file, by its name."""


@attrs.define
class File:
    """An inode: what is surely on disk, what was asked for since, and what a running program would read."""

    durable: bytes
    pending: list[Write | Truncate] = attrs.field(factory=list)
    current: bytearray = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.current = bytearray(self.durable)

    def ask(self, op: Write | Truncate) -> None:
        self.pending.append(op)
        _apply(self.current, op)

    def sync(self) -> None:
        if self.pending:
            self.durable = bytes(self.current)
            self.pending.clear()

    # -------------------------------------------------------------- what may be left of it

    def nothing(self, _: random.Random) -> bytes:
        """Of what was not synced, nothing."""
        return self.durable

    def everything(self, _: random.Random) -> bytes:
        """All of it."""
        return bytes(self.current)

    def some(self, chance: random.Random) -> bytes:
        """Some of the writes, whole; whatever their order was."""
        share, data = chance.random(), bytearray(self.durable)
        for op in self.pending:
            if chance.random() < share:
                _apply(data, op)
        return self._grown(data, chance)

    def torn(self, chance: random.Random) -> bytes:
        """Each sector as it was at some moment, and the size."""
        moments: dict[int, int] = {}
        data, count = bytearray(self.durable), len(self.pending)
        for moment, op in enumerate(self.pending):
            for sector, piece in _pieces(op):
                if sector not in moments:
                    moments[sector] = chance.choice((0, count, chance.randint(0, count)))
                if moment < moments[sector]:
                    _apply(data, piece)
        return self._grown(data, chance)

    def last_torn(self, chance: random.Random) -> bytes:
        """All but the last write, which is there in part."""
        if not self.pending:
            return self.durable
        *before, last = self.pending
        data = bytearray(self.durable)
        for op in before:
            _apply(data, op)
        for _, piece in _pieces(last):
            if chance.random() < 0.5:
                _apply(data, piece)
        return self._grown(data, chance)

    def _grown(self, data: bytearray, chance: random.Random) -> bytes:
        missing = len(self.current) - len(data)
        if missing > 0 and chance.random() < 0.3:
            data += chance.choice((bytes(missing), chance.randbytes(missing)))
        return bytes(data)


def _apply(data: bytearray, op: Write | Truncate) -> None:
    if isinstance(op, Truncate):
        del data[op.size :]
        data.extend(bytes(op.size - len(data)))
    else:
        data.extend(bytes(max(0, op.offset - len(data))))
        data[op.offset : op.offset + len(op.data)] = op.data


def _pieces(op: Write | Truncate) -> Iterator[tuple[int, Write | Truncate]]:
    """An operation by sectors; sizes have a number of their own."""
    if isinstance(op, Truncate):
        yield -1, op
        return
    at, end = op.offset, op.offset + len(op.data)
    while at < end:
        until = min(end, (at // SECTOR + 1) * SECTOR)
        yield at // SECTOR, Write(op.inode, at, op.data[at - op.offset : until - op.offset])
        at = until


Rule = Callable[[File, random.Random], bytes]

RULES: Sequence[Rule] = (File.nothing, File.everything, File.some, File.some, File.torn, File.torn, File.last_torn)


class Disk:
    """A disk, at a moment of a recording.

    Attributes:
        begun: the last state that may be found. acknowledged: the last that a program was told is there.
        synced: … that had been acknowledged when the WAL was synced last.
        unsettled: whether anything would be lost by a loss of power now.
    """

    def __init__(self, base: Image) -> None:
        self._files = {inode: File(base[name]) for inode, name in enumerate(sorted(base))}
        self._names: dict[str, list[int | None]] = {name: [inode] for inode, name in enumerate(sorted(base))}
        self._wal = {inode for inode, name in enumerate(sorted(base)) if name.endswith("-wal")}
        self.begun = self.acknowledged = self.synced = 0

    def apply(self, op: Op) -> None:
        """The next operation."""
        match op:
            case Write() | Truncate():
                self._files[op.inode].ask(op)
            case Sync():
                self._files[op.inode].sync()
                if op.inode in self._wal:
                    self.synced = self.acknowledged
            case Create():
                self._files[op.inode] = File(b"")
                self._names.setdefault(op.name, [None]).append(op.inode)
                if op.name.endswith("-wal"):
                    self._wal.add(op.inode)
            case Delete():
                self._names[op.name].append(None)
            case SyncDirectory():
                self._names = {name: versions[-1:] for name, versions in self._names.items()}
            case Begun():
                self.begun = op.state
            case Acknowledged():
                self.acknowledged = op.state

    @property
    def unsettled(self) -> bool:
        return any(len(versions) > 1 for versions in self._names.values()) or any(f.pending for f in self._files.values())

    def image(self, rule: Rule, chance: random.Random) -> Image:
        """What may be there if the power went now."""
        image = {}
        for name, versions in self._names.items():
            inode = versions[0] if rule is File.nothing else versions[-1] if rule is File.everything else chance.choice(versions)
            if inode is not None:
                image[name] = rule(self._files[inode], chance)
        return image
