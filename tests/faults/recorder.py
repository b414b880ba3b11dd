"""A process that runs programs on the store through the recording VFS, and hands over what was recorded.

    python -m tests.faults.recorder        # one request a line on standard input, see `Request`

A process of its own, since it opens databases with apsw's SQLite; see `apsw_sqlite`.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from eventbus.stores.base import Batch, LogState
from tests.faults.programs import INSTANCE, Program, digest
from tests.faults.recording_vfs import Acknowledged, Begun, Recording, RecordingVFS

ROOT = Path(__file__).parents[2]

NAME = "power.db"


class Request(msgspec.Struct):
    """A program to record.

    Attributes:
        folder: holds the files that the program begins with, if any; afterwards, what it has left.
        seed: chooses the program.
        level: 0 on an empty disk; one more than that of the program whose files these are.
        commits: how many.
    """

    folder: str
    seed: str
    level: int
    commits: int
    durability: Literal["full", "fast"]


class Recorder:
    """Its owner's hand."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.recorder"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def record(self, request: Request) -> Recording:
        """Have a program run. EOFError: the process has died; its standard error says why."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise EOFError(f"the recorder ended with {self._process.wait()} while it ran {request}")
        return msgspec.msgpack.decode((Path(request.folder) / "recording").read_bytes(), type=Recording)


# ------------------------------------------------------------------ in the process


def _serve() -> None:
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Request)
        recording = _record(request)
        (Path(request.folder) / "recording").write_bytes(msgspec.msgpack.encode(recording))
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _record(request: Request) -> Recording:
    from eventbus.stores import sqlite
    from tests.faults import apsw_sqlite

    chance = random.Random(f"{request.seed}/{request.level}")
    folder = Path(request.folder)
    vfs = RecordingVFS(f"recording-{request.seed}-{request.level}", folder, random.Random(request.seed))
    apsw_sqlite.install(f"recording-{request.seed}-{request.level}")
    sqlite.WAL_PAGES = chance.choice([8, 20, 60])
    store = sqlite.SQLiteStore(folder / NAME, durability=request.durability)
    run = _Run(store, vfs, Recording(vfs.ops, [], []), chance, Program(chance, request.level))
    try:
        run.all(request.commits)
    finally:
        store.close()
        vfs.unwatch()
        vfs.unregister()
    return run.recording


class _Run(msgspec.Struct):
    store: Any
    vfs: RecordingVFS
    recording: Recording
    chance: random.Random
    program: Program
    reading: bool = False

    def all(self, commits: int) -> None:
        self.open()
        self.commit(self.program.first())
        while len(self.recording.states) <= commits:
            what = self.chance.random()
            if what < 0.06:
                self.store.close()
                self.reading = False
                self.open()
            elif what < 0.16:
                self.read_or_let_go()
            else:
                self.commit(self.program.batch(self.store))
        self.store.close()

    def open(self) -> None:
        self.store.open(INSTANCE)
        if not self.recording.states:
            self.note(self.store.read(LogState()).head)

    def read_or_let_go(self) -> None:
        """A reader that stays open: WAL checkpoints come only as far as it lets them, and the WAL grows."""
        self.store._reader.execute("COMMIT" if self.reading else "BEGIN")
        self.store._reader.execute("SELECT count(*) FROM events").fetchone()
        self.reading = not self.reading

    def commit(self, batch: Batch) -> None:
        number = len(self.recording.states)
        self.vfs.ops.append(Begun(number))
        committed = self.store.commit(batch)
        self.vfs.ops.append(Acknowledged(number))
        self.note(max(committed.head, self.recording.heads[-1]))

    def note(self, head: int) -> None:
        self.recording.states.append(digest(self.store._writer))
        self.recording.heads.append(head)


if __name__ == "__main__":
    _serve()
