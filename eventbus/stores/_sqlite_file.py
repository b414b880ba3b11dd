"""The files of the SQLite store: who may have them, where they may lie, and whether they are still there.

publish → journal → *store* → lanes → workers → outcome. In comes a path; out come a lock that the kernel frees when this
process dies, a database file that only its owner can read, and, after each commit, the certainty that what was written
went into files that still have their names. The database file itself is never opened here: closing any descriptor of it
drops the locks that SQLite holds on it (POSIX), and commits are lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
import stat
import weakref
from datetime import UTC, datetime

import msgspec

from eventbus.errors import StoreInUse, StoreLost, StoreUnavailable, StoreUnsafe
from eventbus.stores.base import Instance

try:
    import fcntl
except ImportError:  # no flock there
    fcntl = None  # type: ignore[assignment]

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
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be created: {error}") from error


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


# ------------------------------------------------------------------ one instance at a time


class LockFile:
    """`<db>-lock`: locked exclusively (flock) while a store is open; its text says by whom.

    The file stays when it is let go: to remove it would let two processes lock two files of one name.
    """

    def __init__(self, path: str) -> None:
        self._path = f"{path}-lock"
        self._database = path
        self._descriptor: int | None = None
        self.forked = False
        """This process is a child of the one that holds the lock."""

    def acquire(self, instance: Instance) -> None:
        """Lock it, or raise StoreInUse."""
        if fcntl is None:
            raise StoreUnsafe("this platform has no flock; the SQLite store needs it to keep other processes out")
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise StoreUnavailable(f"{self._path} cannot be opened: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = json.dumps(msgspec.structs.asdict(instance)).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise StoreInUse(f"{self._database} is in use by {holder}; stop it first, or use another file") from None
        except OSError as error:
            os.close(descriptor)
            raise StoreUnavailable(f"{self._path} cannot be locked: {error}") from error
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Let go of it. Safe to call twice."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def drop_in_child(self) -> None:
        """Close the child's copy, which would keep the file locked after the parent has died."""
        self.forked = True
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: weakref.WeakSet[LockFile] = weakref.WeakSet()


def _drop_all_in_child() -> None:
    for lock in list(_held):
        lock.drop_in_child()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_all_in_child)


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        since = datetime.fromtimestamp(holder["started"], UTC).isoformat(timespec="seconds")
        here = holder["host"] == socket.gethostname() and holder["pid"] == os.getpid()
        place = f"process {holder['pid']} on {holder['host']}{', this very process' if here else ''}"
        return f"instance {holder['name']!r} ({place}, since {since})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another instance, which is just opening it"


# ------------------------------------------------------------------ still the same files


def _identity(path: str) -> tuple[int, int, int, int]:
    database, wal = os.stat(path), os.stat(f"{path}-wal")
    return database.st_dev, database.st_ino, wal.st_dev, wal.st_ino


class Identity:
    """Device and inode of the database and its WAL, as they were when it was opened.

    SQLite goes on writing into files that were deleted or replaced, without an error: such commits are lost.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._recorded = _identity(path)
        except OSError as error:
            raise StoreUnavailable(f"{path} or its -wal went away while it was being opened: {error}") from error

    def check(self) -> None:
        """Raise StoreLost if they are others now."""
        try:
            same = _identity(self._path) == self._recorded
            why = "was replaced"
        except OSError as error:
            same, why = False, f"is gone ({error})"
        if not same:
            raise StoreLost(
                f"{self._path} or its -wal {why} while the bus had it open: what was written last is lost. "
                "Never move, restore or delete these files under a running bus"
            )
