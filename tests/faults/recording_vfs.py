"""What SQLite asks of the file system, written down: a VFS of apsw that does all of it, and keeps a list.

The list holds what decides which bytes are there after a loss of power: files and names that come and go, writes, sizes, syncs.
The -shm is not in it: it is shared memory that recovery makes anew. Nor is the -lock file, which never holds a byte.
"""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import apsw
import msgspec

# ------------------------------------------------------------------ what is written down


class Create(msgspec.Struct, tag=True, array_like=True):
    """A name came to be, for a new and empty file."""

    name: str
    inode: int


class Delete(msgspec.Struct, tag=True, array_like=True):
    """A name is gone. Until the directory is synced, it may be there again."""

    name: str


class Write(msgspec.Struct, tag=True, array_like=True):
    inode: int
    offset: int
    data: bytes


class Truncate(msgspec.Struct, tag=True, array_like=True):
    inode: int
    size: int


class Sync(msgspec.Struct, tag=True, array_like=True):
    """What was written to the file is on disk, and so is its size."""

    inode: int


class SyncDirectory(msgspec.Struct, tag=True, array_like=True):
    """All names are on disk as they are."""


class Begun(msgspec.Struct, tag=True, array_like=True):
    """From here on the state of this number may be found."""

    state: int


class Acknowledged(msgspec.Struct, tag=True, array_like=True):
    """From here on this state, or a later one, must be found."""

    state: int


Op = Create | Delete | Write | Truncate | Sync | SyncDirectory | Begun | Acknowledged


class Recording(msgspec.Struct):
    """What a program did to a disk.

    Attributes:
        states: digests of the contents: when it was opened, and after each commit.
        heads: for each state, the largest position that had been given by then.
    """

    ops: list[Op]
    states: list[bytes]
    heads: list[int]


# ------------------------------------------------------------------ the VFS

_SYNCS_DIRECTORY = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL
"""Of these files, when they may have been created, SQLite's VFS for Unix syncs the directory at their first sync (os_unix.c)."""


class RecordingVFS(apsw.VFS):
    """The VFS; `ops` is what was asked of it.

    Args:
        folder: files in it are watched; those that are there are numbered in the order of their names.
        chance: where SQLite gets its randomness from, so that a program does the same each time.
    """

    def __init__(self, name: str, folder: Path, chance: random.Random) -> None:
        super().__init__(name, "")
        self.ops: list[Op] = []
        self._folder = folder
        self._chance = chance
        self._inodes = {file.name: number for number, file in enumerate(sorted(folder.iterdir()))}
        self._next = len(self._inodes)
        self._watch_python()

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> RecordingFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        assert path is not None  # temporary files: SQLite keeps those of these sizes in memory
        self.created(path)
        return RecordingFile(self, path, name, flags)

    def xDelete(self, path: str, syncdir: bool) -> None:
        super().xDelete(path, syncdir)
        name = Path(path).name
        if self._inodes.pop(name, None) is not None:
            self.ops.append(Delete(name))
        if syncdir:
            self.ops.append(SyncDirectory())

    def xRandomness(self, count: int) -> bytes:
        return self._chance.randbytes(count)

    def inode(self, path: str) -> int:
        return self._inodes[Path(path).name]

    def created(self, path: str) -> None:
        """Take in a file, if it is a new one."""
        name = Path(path).name
        if name not in self._inodes:
            self._inodes[name] = self._next
            self.ops.append(Create(name, self._next))
            self._next += 1

    def _watch_python(self) -> None:
        """The store creates the database file itself, and syncs the directory."""
        open_, sync = os.open, os.fsync

        def watched_open(path: str, flags: int, mode: int = 0o777) -> int:
            descriptor = open_(path, flags, mode)
            if flags & os.O_CREAT and Path(path).parent == self._folder and not path.endswith("-lock"):
                self.created(path)
            return descriptor

        def watched_sync(descriptor: int) -> None:
            sync(descriptor)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.ops.append(SyncDirectory())

        os.open, os.fsync = watched_open, watched_sync  # type: ignore[assignment]

        def unwatch() -> None:
            os.open, os.fsync = open_, sync

        self.unwatch = unwatch


class RecordingFile(apsw.VFSFile):
    def __init__(self, vfs: RecordingVFS, path: str, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._ops = vfs.ops
        self._inode = vfs.inode(path)
        self._syncs_directory = bool(flags[0] & _SYNCS_DIRECTORY and flags[0] & apsw.SQLITE_OPEN_CREATE)
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._ops.append(Write(self._inode, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._ops.append(Truncate(self._inode, size))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._ops.append(Sync(self._inode))
        if self._syncs_directory:
            self._syncs_directory = False
            self._ops.append(SyncDirectory())
