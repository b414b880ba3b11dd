"""The SQLite store against the conformance suite, on a file and in memory."""

from __future__ import annotations

from pathlib import Path

from eventbus.stores.base import Store
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing.conformance import StoreConformance


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
