"""Files that may not be had, or go away: a clear error at once, and nothing acknowledged that is not kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import attrs
import pytest

from eventbus import EventBus, StoreLost
from eventbus.stores.base import Notice
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import Recorder
from tests.faults.as_nobody import NOBODY

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0


@attrs.frozen
class Noted:
    n: int


# ------------------------------------------------------------------ what may not be had


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter and write to."""
    with tempfile.TemporaryDirectory(prefix="eventbus-trouble-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o777)
        yield path
        path.chmod(0o777)


def publish(path: Path) -> str:
    """What comes of a bus on this path, for a user who owns nothing."""
    command = [sys.executable, "-m", "tests.faults.as_nobody", str(path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout.strip()


def own(path: Path) -> None:
    """Make a file that user's."""
    if IS_ROOT:
        os.chown(path, NOBODY, NOBODY)


def made(path: Path) -> None:
    """A database of that user's, with an event."""
    assert publish(path) == "published"


def test_a_file_that_may_only_be_read(folder: Path) -> None:
    """A bus on a file that may only be read says so."""
    made(path := folder / "a.db")
    path.chmod(0o444)
    assert publish(path).startswith(f"StoreUnavailable: {path}: the file or its directory cannot be written")


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_may_only_be_read(folder: Path, there: bool) -> None:
    """So it is for a folder in which no file may be made."""
    path = folder / "a.db"
    if there:
        made(path)
    folder.chmod(0o555)
    said = publish(path)
    assert said.startswith(f"StoreUnavailable: {path}")
    assert ("cannot be written" if there else "cannot be created") in said


ROOT_ONLY = pytest.mark.skipif(not IS_ROOT, reason="only root can give a file to somebody else")


@ROOT_ONLY
def test_somebody_elses_file(folder: Path) -> None:
    """And for a file that belongs to somebody else; nothing is left beside it that would keep its owner out."""
    path = folder / "a.db"
    path.touch(0o600)
    assert publish(path).startswith(f"StoreUnavailable: {path}: the file cannot be opened by user {NOBODY}")
    path.chmod(0o644)
    assert publish(path).startswith(f"StoreUnavailable: {path}: the file or its directory cannot be written by user {NOBODY}")
    assert list(folder.iterdir()) == [path]
    path.unlink()
    (folder / "a.db-lock").touch(0o600)
    assert publish(path).startswith(f"StoreUnavailable: {path}-lock cannot be opened")


@ROOT_ONLY
async def test_opened_by_root(folder: Path) -> None:
    """What root makes beside somebody else's file belongs to that user, who can open it as before."""
    made(path := folder / "a.db")
    for suffix in ("-lock", "-ballast", "-wal", "-shm"):
        (folder / f"a.db{suffix}").unlink(missing_ok=True)
    async with EventBus(path) as bus:
        await bus.publish(Noted(1))
        assert {(each.name, each.stat().st_uid) for each in folder.iterdir()} == {
            (f"a.db{suffix}", NOBODY) for suffix in ("", "-lock", "-ballast", "-wal", "-shm")
        }
    made(path)


@pytest.mark.parametrize("suffix", ["", "-lock", "-wal", "-shm"])
def test_a_folder_in_its_place(folder: Path, suffix: str) -> None:
    """And where a folder lies in the place of one of its files."""
    path = folder / "a.db"
    if suffix:
        made(path)
        (folder / f"a.db{suffix}").unlink(missing_ok=True)
    (folder / f"a.db{suffix}").mkdir()
    assert publish(path).startswith(f"StoreUnavailable: {path}")


def test_without_a_ballast(folder: Path) -> None:
    """Where only the ballast cannot be made, the bus does without."""
    path = folder / "a.db"
    (folder / "a.db-ballast").mkdir()
    made(path)
    for suffix in ("-wal", "-shm"):
        (folder / f"a.db{suffix}").touch(0o600)
        own(folder / f"a.db{suffix}")
    (folder / "a.db-ballast").rmdir()
    folder.chmod(0o555)
    made(path)


# ------------------------------------------------------------------ what goes away while it is open


def remove(file: Path) -> None:
    """Remove a file."""
    file.unlink()


def rename(file: Path) -> None:
    """Give it another name."""
    file.rename(file.with_name("elsewhere"))


def replace(file: Path) -> None:
    """Put another in its place, with the same content."""
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


GOES = pytest.mark.parametrize("goes", [remove, rename, replace])
FILE = pytest.mark.parametrize("suffix", ["", "-wal", "-lock"])


def bus_on(path: Path) -> EventBus:
    """A bus that would renew its lease in 100 s."""
    return EventBus(path, lease=300.0)


class Watched(SQLiteStore):
    """A store that notes when the bus looks for what others have done."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.looks = Recorder()

    def notice(self) -> Notice | None:
        """Look."""
        self.looks.add("look")
        return super().notice()


@GOES
@FILE
async def test_publish_into_a_file_that_is_gone(tmp_path: Path, goes: Callable[[Path], None], suffix: str) -> None:
    """What is published after a file has gone is not acknowledged, and the bus ends; what was acknowledged before is in the file
    that was."""
    path, acknowledged = tmp_path / "a.db", []
    with anyio.fail_after(30), pytest.raises(StoreLost, match=r"a\.db"):
        async with bus_on(path) as bus:
            acknowledged.append(await bus.publish(Noted(1)))
            goes(tmp_path / f"a.db{suffix}")
            while True:
                acknowledged.append(await bus.publish(Noted(2)))
    assert len(acknowledged) == 1
    if goes is rename:
        (tmp_path / "elsewhere").rename(tmp_path / f"a.db{suffix}")
        async with bus_on(path) as bus:
            assert acknowledged[0].id in [envelope.id async for envelope in bus.history()]


@GOES
@FILE
async def test_an_idle_bus_notices(tmp_path: Path, goes: Callable[[Path], None], suffix: str) -> None:
    """A bus that only waits or reads ends with the error soon, long before its lease must be renewed."""
    store = Watched(tmp_path / "a.db")
    with anyio.fail_after(5) as scope, pytest.raises(StoreLost, match=r"a\.db"):
        async with EventBus(store, lease=300.0):
            await store.looks.wait_for(5)  # by then what the start has to write is written
            goes(tmp_path / f"a.db{suffix}")
            await anyio.sleep_forever()
    assert not scope.cancel_called  # leaving the bus would have told it as well


@FILE
async def test_an_outcome_that_cannot_be_kept(tmp_path: Path, suffix: str) -> None:
    """A bus whose outcomes cannot be kept ends with the error. When the file is back, the event is settled: handled again, or
    not, where the outcome had been written into the file that had another name."""
    path, recorder, go_on = tmp_path / "a.db", Recorder(), anyio.Event()

    async def handle(event: Noted) -> None:
        recorder.add(event)
        await go_on.wait()

    with anyio.fail_after(30), pytest.raises(StoreLost):
        bus = bus_on(path)
        bus.subscribe(Noted, name="handle")(handle)
        async with bus:
            await bus.publish(Noted(1))
            await recorder.wait_for(1)
            rename(tmp_path / f"a.db{suffix}")
            go_on.set()
            await anyio.sleep_forever()
    (tmp_path / "elsewhere").replace(tmp_path / f"a.db{suffix}")
    again = bus_on(path)
    again.subscribe(Noted, name="handle")(handle)
    async with again:
        assert not any((await again.drain(timeout=10)).values())
    assert 1 <= len(recorder.seen) <= 2


async def test_two_owners(tmp_path: Path) -> None:
    """When the lock file is removed, a second bus cannot see that the first one lives: both would own what there is. The first
    notices, and ends; the second goes on."""
    path, recorder, removed = tmp_path / "a.db", Recorder(), anyio.Event()
    ended: list[BaseException] = []

    async def first() -> None:
        try:
            async with bus_on(path) as bus:
                await bus.publish(Noted(1))
                (tmp_path / "a.db-lock").unlink()
                removed.set()
                await anyio.sleep_forever()
        except StoreLost as error:
            ended.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await removed.wait()
            second = bus_on(path)
            second.subscribe(Noted, name="note", start="beginning")(recorder.note)
            async with second:
                await second.publish(Noted(2))
                assert await recorder.wait_for(2) == [Noted(1), Noted(2)]
    assert ended
