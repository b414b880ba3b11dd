"""A disk that is full: events are refused, outcomes are written, reads go on, and it goes on by itself when there is room."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventbus.errors import StoreFull
from eventbus.stores._sqlite_ballast import BYTES
from eventbus.stores.base import Batch, Instance, LogState, Record, Register, Registration
from eventbus.stores.sqlite import SQLiteStore
from tests.faults import disk_full
from tests.faults.disk_full import Filler, can_mount, small_disk

pytestmark = [
    pytest.mark.skipif(not can_mount(), reason="a small tmpfs is mounted, which only root may do"),
    pytest.mark.timeout(300),
]

NOW = 1_700_000_000.0
INSTANCE = Instance("1", "shop", "localhost", 1, NOW)


@pytest.mark.parametrize("number", range(4))
def test_nothing_is_lost_and_it_goes_on_by_itself(number: int) -> None:
    """What was acknowledged is handled when there is room again, without a call; what was refused is not there."""
    case = disk_full.case(1, number)
    assert not case.faults, case.told()
    assert case.checked == disk_full.CYCLES


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small disk."""
    with small_disk() as folder:
        yield folder


def register(name: str) -> Batch:
    """Something to write that is no event."""
    return Batch(NOW, commands=[Register((Registration(name, ("a",), "type", 1),))])


def some(size: int = 10) -> list[Record]:
    """An event of a size."""
    return [Record(str(uuid.uuid4()), "a", 1, NOW, None, 0, None, "application/octet-stream", b"x" * size)]


def publish() -> Batch:
    """An event that takes up room."""
    return Batch(NOW, appends=[some(20_000)])


def fill(store: SQLiteStore, filler: Filler) -> int:
    """Fill the disk until an event is refused; returns how many were not before."""
    filler.fill()
    for count in range(1_000):
        try:
            store.commit(publish())
        except StoreFull:
            return count
    raise AssertionError("it is never full")


def test_who_may_write(disk: Path) -> None:
    """On a full disk outcomes and commands are written in the room of the ballast, for long, and events are not."""
    store, filler, ballast = SQLiteStore(disk / "a.db"), Filler(disk), disk / "a.db-ballast"
    store.open(INSTANCE)
    assert ballast.stat().st_size == BYTES
    assert ballast.stat().st_blocks * 512 >= BYTES
    stored = fill(store, filler)
    assert ballast.exists()
    for number in range(1_000):
        if store.commit(register(f"a{number % 3}")).full is not None:
            break
    assert not ballast.exists()
    for number in range(300):
        committed = store.commit(Batch(NOW, appends=[some(), ()], commands=register(f"s{number % 3}").commands))
        assert isinstance(committed.appends[0], StoreFull)
        assert committed.appends[1] is None
        assert committed.full is not None
        assert committed.events == []
        with pytest.raises(StoreFull, match="no room is left for events"):
            store.commit(publish())
    assert store.read(LogState()).head == stored
    filler.free()
    assert store.commit(Batch(NOW)).full is None
    assert ballast.stat().st_size == BYTES
    assert store.commit(publish()).head == stored + 1
    store.close()


def test_another_process_has_used_the_ballast(disk: Path) -> None:
    """Events of one instance do not eat the room that another needs for its outcomes."""
    first, second, filler = SQLiteStore(disk / "a.db"), SQLiteStore(disk / "a.db"), Filler(disk)
    first.open(INSTANCE)
    second.open(other := Instance("2", "n", "h", 1, NOW))
    second._others = [INSTANCE.id]  # what it learns by `notice`
    assert other.id != INSTANCE.id
    second.commit(publish())
    fill(first, filler)
    while first.commit(register("a")).full is None:
        pass
    with pytest.raises(StoreFull, match="no room is left for events"):
        second.commit(publish())
    assert second.commit(register("b")).full is not None
    filler.free()
    second.commit(publish())
    first.commit(publish())
    first.close()
    second.close()


def test_no_room_for_the_ballast(disk: Path) -> None:
    """A bus that is opened on a full disk takes no events before there is room; without any room it says so."""
    filler = Filler(disk)
    filler.fill()
    store = SQLiteStore(disk / "a.db")
    with pytest.raises(StoreFull, match="no room"):
        store.open(INSTANCE)
    filler.free()
    store.open(INSTANCE)
    store.commit(publish())
    store.close()
    (disk / "a.db-ballast").unlink()
    filler.fill()
    with pytest.raises(StoreFull):
        store.open(INSTANCE)
    filler.free()
    store.open(INSTANCE)
    assert store.commit(publish()).head == 2
    store.close()
