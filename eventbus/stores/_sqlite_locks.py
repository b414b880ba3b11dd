"""The lock file of the SQLite store, `<db>-lock`: who lives, and whose turn it is to write.

publish → journal → *store* → lanes → workers → outcome. In come a path and the id of an instance; out come two kinds of locks,
which the kernel frees when this process dies, however it dies:

- the turn, an exclusive `flock` on the file around each write transaction and each WAL checkpoint. Beside SQLite's own lock it
  keeps writes and WAL checkpoints of different connections apart, which SQLite up to 3.51.2 needs (see docs/decisions), and it
  wakes those who wait in their order, where SQLite makes them ask again and again;
- the life of an instance, an open-file-description lock (fcntl(2), F_OFD_SETLK) on one byte of it. Others ask whether it is held.

The file stays when it is let go: to remove it would let two processes lock two files of one name.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator

from eventbus.errors import StoreInUse, StoreUnavailable, StoreUnsafe
from eventbus.stores._sqlite_file import give_to_owner

try:
    import fcntl
except ImportError:  # no flock there
    fcntl = None  # type: ignore[assignment]

_LIVES = 1 << 32
"""The bytes from here on stand for instances; nothing is ever written there."""


class LockFile:
    """`<db>-lock`, open.

    Raises:
        StoreUnsafe: there is no flock. StoreUnavailable: the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        if fcntl is None:
            raise StoreUnsafe("this platform has no flock; the SQLite store needs it to keep writers apart")
        self.path = f"{path}-lock"
        self.forked = False
        """This process is a child of the one that opened it."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor: int | None = os.open(self.path, flags, 0o600)
            give_to_owner(self._descriptor, path)
        except OSError as error:
            raise StoreUnavailable(f"{self.path} cannot be opened: {error}") from error
        self._queue = _Queue(self._descriptor)
        _open_files.add(self)

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        _open_files.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            if hasattr(fcntl, "F_OFD_SETLK"):  # at once, should a thread keep the file open for a while
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
            self._queue.close()

    def drop_in_child(self) -> None:
        """Close the child's copy, which would keep what the parent holds locked after the parent has died."""
        self.forked = True
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    # -------------------------------------------------------------- whose turn it is

    def take_turn(self, seconds: float) -> bool:
        """Wait for the turn to write, at most so long; False if it did not come. It is given back with `give_turn`.

        Raises:
            StoreUnavailable: the kernel gives no lock.
        """
        with _translated(self.path):
            return self._queue.take(seconds)

    def give_turn(self) -> None:
        """The turn is the next one's."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def turn(self, seconds: float, refused: Callable[[], Exception]) -> Iterator[None]:
        """The turn for a block, or the error that `refused` makes."""
        if not self.take_turn(seconds):
            raise refused()
        try:
            yield
        finally:
            self.give_turn()

    # -------------------------------------------------------------- who lives

    def live(self, instance: str) -> None:
        """From now on, until this file is closed or this process dies, this instance lives."""
        if hasattr(fcntl, "F_OFD_SETLK"):
            try:
                with _translated(self.path):
                    fcntl.fcntl(self._opened(), fcntl.F_OFD_SETLK, _byte_of(instance, fcntl.F_WRLCK))
            except BlockingIOError:
                raise StoreInUse(f"{self.path}: an instance with the id {instance} is alive; try again") from None

    def lives(self, instance: str) -> bool | None:
        """Whether an instance holds its lock; None where this cannot be told (no such locks there): its lease tells."""
        with _translated(self.path):
            return lives_in(self._opened(), instance)

    def is_alone(self) -> bool:
        """Whether no other instance holds its lock; True also where that cannot be told."""
        if not hasattr(fcntl, "F_OFD_GETLK"):
            return True
        all_of_them = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LIVES, 1 << 32, 0)
        with _translated(self.path):
            answer = fcntl.fcntl(self._opened(), fcntl.F_OFD_GETLK, all_of_them)
        return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)

    def _opened(self) -> int:
        if self._descriptor is None:
            raise StoreUnavailable(f"{self.path} is closed")
        return self._descriptor


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """What the kernel refuses is an error of the store, but for a lock that another has."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"{path}: the kernel does not tell of its locks: {error}") from error


def lives_in(descriptor: int, instance: str) -> bool | None:
    """See `LockFile.lives`; for one who has the lock file open to ask, and may be unable to write it."""
    return is_locked(descriptor, _byte_of(instance, fcntl.F_WRLCK)) if hasattr(fcntl, "F_OFD_GETLK") else None


def is_locked(descriptor: int, wanted: bytes) -> bool:
    """Whether another open file has a lock against this `struct flock`. Takes nothing."""
    return bool(_FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)


def flock_of(kind: int, start: int) -> bytes:
    """A `struct flock` for one byte."""
    return _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""


def _byte_of(instance: str, kind: int) -> bytes:
    # Two instances on one byte would keep each other alive; of ids that are live at once that is one in 2**32.
    return flock_of(kind, _LIVES + zlib.crc32(instance.encode()))


class _Queue:
    """Takes a `flock` within a time. The call itself knows none, so where the lock is not free at once a thread of its own makes
    it; if that gets the lock too late, it gives it back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mutex = threading.Lock()
        self._asked = threading.Semaphore(0)
        self._got = threading.Semaphore(0)
        self._wanted = self._asking = self._closed = False
        self._failure: OSError | None = None
        self._thread: threading.Thread | None = None

    def take(self, seconds: float) -> bool:
        """See `LockFile.take_turn`."""
        with self._mutex:
            if not self._asking:
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._ask()
                else:
                    return True
            self._wanted = True
        if not self._got.acquire(timeout=seconds):
            with self._mutex:
                if self._wanted:
                    self._wanted = False
                    return False
            self._got.acquire()  # it came in between
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return True

    def _ask(self) -> None:
        self._asking = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eventbus-lock", daemon=True)
            self._thread.start()
        self._asked.release()

    def _run(self) -> None:
        while True:
            self._asked.acquire()
            if self._closed:
                return
            failure: OSError | None = None
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            except OSError as error:
                failure = error  # whoever waits is told; the next one asks anew
            with self._mutex:
                self._asking = False
                if self._closed:
                    os.close(self._descriptor)
                    return
                if self._wanted:
                    self._wanted, self._failure = False, failure
                    self._got.release()
                elif failure is None:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file, and end the thread; one that still waits for the lock does both when it has got it."""
        with self._mutex:
            self._closed = True
            if self._asking:
                return
            os.close(self._descriptor)
        if self._thread is not None:
            self._asked.release()
            self._thread.join()


_open_files: weakref.WeakSet[LockFile] = weakref.WeakSet()


def _drop_all_in_child() -> None:
    for each in list(_open_files):
        each.drop_in_child()
    _open_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_all_in_child)
