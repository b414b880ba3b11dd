"""The files of the SQLite store: where they may lie, and whether they are still there.

publish → journal → *store* → lanes → workers → outcome. In comes a path; out come a database file that only its owner can read,
and, after each commit, the certainty that what was written went into files that still have their names. The database file
itself is never opened here: closing any descriptor of it drops the locks that SQLite holds on it (POSIX), and commits are lost.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import stat

from eventbus.errors import StoreLost, StoreUnavailable, StoreUnsafe

MOUNTINFO = "/proc/self/mountinfo"
_MOUNT_POINT = 4  # which of its fields says where

NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb2",
        "smb3",
        "smbfs",
        "afs",
        "ncpfs",
        "coda",
        "ceph",
        "glusterfs",
        "lustre",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.s3fs",
        "fuse.rclone",
        "fuse.gcsfuse",
    ]
)
"""Where locks or shared memory do not work between machines, so that a WAL is lost or mixed up."""


def prepare_file(path: str) -> None:
    """See that a database file may and does lie at `path`, created 0600 if it was not there (-wal and -shm inherit that)."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise StoreUnavailable(f"{path}: there is no directory {directory}; create it, or give another path")
    refuse_network(path)
    try:
        # Nothing can have this file open yet, so this close drops nobody's locks.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600))
        _sync_directory(directory)
    except FileExistsError:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StoreUnavailable(f"{path} is not a file; give the path of a file that is there, or may be created") from None
        _check_access(path)
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be created: {error}") from error


def _check_access(path: str) -> None:
    """Before anything is made beside a file that is another user's: it would keep out the one whose file it is."""
    for mode, what in ((os.R_OK, "the file cannot be opened"), (os.W_OK, "the file or its directory cannot be written")):
        if not os.access(path, mode, effective_ids=os.access in os.supports_effective_ids):
            raise StoreUnavailable(
                f"{path}: {what} by user {os.geteuid()}, it belongs to {os.stat(path).st_uid}; run as its owner, or give another "
                "path"
            )


def give_to_owner(descriptor: int, path: str) -> None:
    """What root makes beside a database belongs to its owner, as SQLite does it with -wal and -shm; else the owner could not
    open it any more."""
    if os.geteuid() == 0:
        owner = os.stat(path)
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _sync_directory(directory: str) -> None:
    """A file's name is durable only when its directory is. SQLite sees to that for the WAL, we for the database."""
    with contextlib.suppress(OSError):  # some file systems refuse it
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_network(path: str) -> None:
    """Raise StoreUnsafe if `path` lies on a network file system (where the kernel tells: Linux)."""
    kind = file_system_of(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreUnsafe(
            f"{path} lies on a network file system ({kind}), on which SQLite's locks and WAL cannot be relied upon; "
            "use a local disk"
        )


def file_system_of(path: str) -> str | None:
    """Type of the file system under a path, or None if the kernel does not tell. See proc(5), mountinfo."""
    try:
        lines = pathlib.Path(MOUNTINFO).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    best, kind = "", None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) <= _MOUNT_POINT or not right:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[_MOUNT_POINT])
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # of several on one place the last one counts
            best, kind = mount, right.split(" ", 1)[0]
    return kind


# ------------------------------------------------------------------ still the same files


def _identity(path: str) -> tuple[int, int, int, int, int]:
    database, wal, lock = os.stat(path), os.stat(f"{path}-wal"), os.stat(f"{path}-lock")
    return database.st_dev, database.st_ino, wal.st_dev, wal.st_ino, lock.st_ino


class Identity:
    """Device and inode of the database, its WAL and its lock file, as they were when it was opened.

    SQLite goes on writing into files that were deleted or replaced, without an error: such commits are lost. Of the lock file
    there would be two, and two processes that each hold one.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._recorded = _identity(path)
        except OSError as error:
            raise StoreUnavailable(f"{path}, its -wal or its -lock went away while it was being opened: {error}") from error

    def check(self) -> None:
        """Raise StoreLost if they are others now."""
        try:
            same = _identity(self._path) == self._recorded
            why = "was replaced"
        except OSError as error:
            same, why = False, f"is gone ({error})"
        if not same:
            raise StoreLost(
                f"{self._path}, its -wal or its -lock {why} while the bus had it open: what was written last is lost. "
                "Never move, restore or delete these files under a running bus"
            )
