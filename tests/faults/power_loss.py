"""Loss of power, and torn writes: what is on the disk then, opened again.

A program runs on the store in a process of its own, through a VFS that writes down what is asked of the disk (`recorder`). At
every operation the power goes, as it were: images are made of what may be on the disk then (`disk`), and each is opened with the
standard library's SQLite, through the store. It must open, be whole, hold exactly the state after one of the commits that may be
there, and go on with positions above those it holds. Programs that recover from some of these images are recorded in turn.

The SQLite that writes is apsw's, a newer one than the standard library's, which recovers: statements, transactions and WAL
checkpoints are those of the store, and the file format is one; how an older SQLite orders its syncs is not shown by this.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import attrs

from eventbus.errors import EventBusError
from eventbus.stores.base import Events
from eventbus.stores.sqlite import SQLiteStore
from tests.campaign import Case
from tests.faults.disk import RULES, Disk, File, Image
from tests.faults.programs import INSTANCE, Program, digest
from tests.faults.recorder import NAME, Recorder, Recording, Request

COMMITS = 16
"""In a program."""

RECOVERIES = 4
"""Images of a program from which another is recorded, and of that one from which a third is."""

_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@attrs.define
class Inspector:
    """Opens images. What was found of one is remembered, since most operations change little."""

    durability: Literal["full", "fast"]
    folder: Path
    known: dict[bytes, bytes | str] = attrs.field(factory=dict)
    _program: Program = attrs.field(factory=lambda: Program(random.Random(0), 0xFFFF))

    def look(self, image: Image) -> bytes | str:
        """Digest of what the image holds, or what is wrong with it."""
        name = hashlib.blake2b(digest_size=16)
        for file, data in sorted(image.items()):
            name.update(f"{file}:{len(data)}:".encode())
            name.update(data)
        found = self.known.get(name.digest())
        if found is None:
            found = self.known[name.digest()] = self._open(image)
        return found

    def _open(self, image: Image) -> bytes | str:
        for file in self.folder.iterdir():
            file.unlink()
        put(image, self.folder)
        store = SQLiteStore(self.folder / NAME, durability=self.durability)
        try:
            store.open(INSTANCE)
            try:
                return self._check(store)
            finally:
                store.close()
        except EventBusError as error:
            return f"it was refused: {error!r}"

    def _check(self, store: SQLiteStore) -> bytes | str:
        writer = store._writer
        assert writer is not None
        found = digest(writer)
        health = writer.execute("PRAGMA integrity_check").fetchall()
        if health != [("ok",)]:
            return f"integrity_check: {health}"
        sequence = writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        head = sequence[0] if sequence else 0
        batch = self._program.append()
        committed = store.commit(batch)
        if (committed.previous_head, committed.head) != (head, head + 1):
            return f"an event got position {committed.head} after {committed.previous_head}, where the last one given was {head}"
        page = store.read(Events(head, 10, 1_000_000))
        if [record.id for record in page.records] != [batch.appends[0][0].id]:
            return f"after {head} there are {[record.id for record in page.records]}"
        return found


def put(image: Image, folder: Path) -> None:
    """Write the files of an image."""
    for name, data in image.items():
        (folder / name).write_bytes(data)


@attrs.define
class Loss:
    """All losses of power of one program."""

    recorder: Recorder
    inspector: Inspector
    chance: random.Random
    seed: str
    faults: list[str] = attrs.field(factory=list)

    def all(self, base: Image, level: int, commits: int) -> None:
        """Record a program that begins with these files, and cut it off everywhere."""
        recording = self._record(base, level, commits)
        if level and recording.states[0] != self.inspector.look(base):
            self.faults.append(f"level {level}: two SQLites find different things in one image")
        recoverable = self._cut(base, recording, level)
        if level < 2:
            for image in self.chance.sample(recoverable, min(RECOVERIES // (level + 1), len(recoverable))):
                self.all(image, level + 1, 3)

    def _record(self, base: Image, level: int, commits: int) -> Recording:
        folder = Path(tempfile.mkdtemp(prefix="eventbus-power-", dir=_MEMORY))
        try:
            put(base, folder)
            return self.recorder.record(Request(str(folder), self.seed, level, commits, self.inspector.durability))
        finally:
            shutil.rmtree(folder)

    def _cut(self, base: Image, recording: Recording, level: int) -> list[Image]:
        """Cut a recording off at each operation; returns images that recovery has something to do with."""
        disk, recoverable = Disk(base), []
        for number, op in enumerate(recording.ops):
            disk.apply(op)
            rules = RULES if disk.unsettled else RULES[:1]
            for rule in rules:
                image = disk.image(rule, self.chance)
                least = disk.acknowledged
                if self.inspector.durability == "fast" and rule is not File.everything:
                    least = disk.synced
                found = self.inspector.look(image)
                wrong = found if isinstance(found, str) else _misplaced(found, recording, least, disk.begun)
                if wrong:
                    self.faults.append(f"level {level}, after operation {number}, {rule.__name__}: {wrong}")
                elif rule in {File.some, File.torn} and len(image) > 1:
                    recoverable.append(image)
        return recoverable


def _misplaced(found: bytes, recording: Recording, least: int, most: int) -> str | None:
    if found in recording.states[least : most + 1]:
        return None
    if found in recording.states:
        return f"it holds the state after commit {recording.states.index(found)}; it must be one from {least} to {most}"
    return f"it holds the state after no commit; it must be one from {least} to {most}"


def case(seed: int, number: int, recorder: Recorder, *, commits: int = COMMITS) -> Case:
    """One program, and all its losses of power."""
    name = f"{seed}-{number}"
    durability: Literal["full", "fast"] = "fast" if number % 3 == 2 else "full"
    with tempfile.TemporaryDirectory(prefix="eventbus-power-", dir=_MEMORY) as folder:
        inspector = Inspector(durability, Path(folder))
        loss = Loss(recorder, inspector, random.Random(name), name)
        loss.all({}, 0, commits)
    return Case(f"{name}, {durability}", len(inspector.known), loss.faults[:20])


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`. What is counted are different images."""
    with Recorder() as recorder:
        for number in itertools.count():
            yield case(seed, number, recorder)
