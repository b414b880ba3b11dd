"""The SQLite store against the conformance suite, on a file and in memory."""

from __future__ import annotations

from pathlib import Path

from eventbus.stores.base import Store
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing.conformance import StoreConformance


def test_no_test_hides_another() -> None:
    """The parts of the suite have no name in common."""
    parts = StoreConformance.__mro__[1:-2]
    names = [name for part in parts for name in vars(part) if not name.startswith("__")]
    assert len(names) == len(set(names))
    assert len([name for name in names if name.startswith("test_")]) > 90


class TestFile(StoreConformance):
    """On a file."""

    def make_store(self, directory: Path) -> Store:
        """A store on one file in the directory."""
        return SQLiteStore(directory / "events.db")


class TestFast(StoreConformance):
    """On a file, without waiting for the disk."""

    def make_store(self, directory: Path) -> Store:
        """A store on one file in the directory."""
        return SQLiteStore(directory / "events.db", durability="fast")


class TestMemory(StoreConformance):
    """In memory."""

    persistent = False

    def make_store(self, directory: Path) -> Store:
        """A store of its own."""
        return SQLiteStore(":memory:")
