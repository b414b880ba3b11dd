"""A disk that fails when it is told to: a VFS of apsw, in which the n-th operation fails, or many from there on.

Operations on the -shm are not among them: SQLite makes those below its VFS. Everything else is: reads, writes, sizes, syncs,
truncations, locks, opening, deleting, and asking whether a file is there.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Literal

import apsw

_CODES: dict[str, tuple[int, ...]] = {
    "open": (apsw.SQLITE_CANTOPEN,),
    "delete": (apsw.SQLITE_IOERR_DELETE,),
    "access": (apsw.SQLITE_IOERR_ACCESS,),
    "read": (apsw.SQLITE_IOERR_READ,),
    "write": (apsw.SQLITE_IOERR_WRITE,),  # a full disk is a part of its own: `disk_full`
    "truncate": (apsw.SQLITE_IOERR_TRUNCATE,),
    "sync": (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC),
    "size": (apsw.SQLITE_IOERR_FSTAT,),
    "lock": (apsw.SQLITE_IOERR_LOCK, apsw.SQLITE_IOERR_RDLOCK),
    "unlock": (apsw.SQLITE_IOERR_UNLOCK,),
}

_NAMES: dict[int | str, int | str] = {**apsw.mapping_result_codes, **apsw.mapping_extended_result_codes}


Mode = Literal["once", "a few times", "for a while", "for ever"]
"""One operation; the next two or three that write; all that write, until the disk is repaired; all."""

_WRITING = {"delete", "write", "truncate", "sync"}


class Disk:
    """Whether the disk fails, and when.

    Attributes:
        asked: operations so far. left: how many are still to fail.
        failed: the first that failed, in words; "" if none has.
    """

    def __init__(self) -> None:
        self.repair()

    def repair(self) -> None:
        """Nothing fails from here on."""
        self.asked, self.failed = 0, ""
        self._at, self._chance, self.left = 0, random.Random(), 0.0
        self._mode: Mode = "once"

    def break_at(self, at: int, mode: Mode) -> None:
        """The operation of this number is to fail, counted from 1, or it is the first of those that are."""
        self.repair()
        self._at, self._mode, self._chance = at, mode, random.Random(at)
        self.left = {"once": 1, "a few times": self._chance.choice((2, 3))}.get(mode, math.inf)

    def fails(self, what: str, path: str | None) -> Exception | None:
        """The error of an operation, if it is to fail."""
        self.asked += 1
        if not self._is_broken(what):
            return None
        self.left -= 1
        code = self._chance.choice(_CODES[what])
        name = "a temporary file" if path is None else Path(path).name
        self.failed = self.failed or f"operation {self.asked}, {what} of {name}, with {_NAMES[code]}"
        return apsw.exception_for(code)

    def _is_broken(self, what: str) -> bool:
        if not self.left or self.asked < self._at:
            return False
        return self._mode in {"once", "for ever"} or what in _WRITING

    def check(self, what: str, path: str | None) -> None:
        """Raise it."""
        error = self.fails(what, path)
        if error is not None:
            raise error

    def partly(self) -> bool:
        """Whether a write that fails has written a part."""
        return self._chance.random() < 0.5


class FailingVFS(apsw.VFS):
    def __init__(self, name: str, disk: Disk) -> None:
        super().__init__(name, "")
        self.disk = disk

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FailingFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.disk.check("open", path)
        return FailingFile(self.disk, path, name, flags)

    def xDelete(self, path: str, syncdir: bool) -> None:
        self.disk.check("delete", path)
        super().xDelete(path, syncdir)

    def xAccess(self, path: str, flags: int) -> bool:
        self.disk.check("access", path)
        return super().xAccess(path, flags)


class FailingFile(apsw.VFSFile):
    def __init__(self, disk: Disk, path: str | None, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._disk, self._path = disk, path
        super().__init__("", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        self._disk.check("read", self._path)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        error = self._disk.fails("write", self._path)
        if error is None:
            super().xWrite(data, offset)
            return
        if self._disk.partly():
            half = len(data) // 2 // 512 * 512  # a sector is written whole, or not
            super().xWrite(bytes(data)[:half], offset)
        raise error

    def xTruncate(self, size: int) -> None:
        self._disk.check("truncate", self._path)
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        self._disk.check("sync", self._path)
        super().xSync(flags)

    def xFileSize(self) -> int:
        self._disk.check("size", self._path)
        return super().xFileSize()

    def xLock(self, level: int) -> None:
        self._disk.check("lock", self._path)
        super().xLock(level)

    def xUnlock(self, level: int) -> None:
        self._disk.check("unlock", self._path)
        super().xUnlock(level)
