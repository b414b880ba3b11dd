"""The ballast, `<db>-ballast`: a file that takes up room, to have some when the disk is full.

publish → journal → *store* → lanes → workers → outcome. When no room is left it is removed, so that outcomes can still be
written, and whatever else is not a new event; events are refused until there is room to make it again. It stays when the store is
closed, so that a bus can also be opened on a disk that is full.
"""

from __future__ import annotations

import contextlib
import errno
import os

from eventbus.stores._sqlite_file import give_to_owner

BYTES = 1_048_576
"""Of the ballast: some 20 transactions of outcomes, or a WAL that is begun anew again and again."""

MARGIN = 1_048_576
"""Bytes that must be left beside it when it is made, so that it is not removed again at once."""


class Ballast:
    """The ballast of one database; it is used by whoever has the turn to write."""

    def __init__(self, path: str) -> None:
        self._database = path
        self._path = f"{path}-ballast"
        self._directory = os.path.dirname(path)

    def is_there(self) -> bool:
        """Whether it is there, whole."""
        try:
            return os.stat(self._path).st_size == BYTES
        except OSError:
            return False

    def make(self) -> bool:
        """Have it; False if there is no room for it. Where it cannot be made for another reason, it is done without."""
        if self.is_there():
            return True
        if not self.has_room(BYTES + MARGIN):
            return False
        try:
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
            with open(os.open(self._path, flags, 0o600), "wb", buffering=0) as file:
                give_to_owner(file.fileno(), self._database)
                file.write(os.urandom(BYTES))  # zeros may take up no room
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return True
            self.free()
            return False
        return self.is_there()

    def has_room(self, size: int) -> bool:
        """Whether so many bytes are left on the disk."""
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize >= size

    def free(self) -> None:
        """Give its room to others."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
