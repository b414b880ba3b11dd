"""The oracle against the conformance suite: the words of the protocol are enough to write a store by."""

from __future__ import annotations

from pathlib import Path

from eventbus.stores.base import Store
from eventbus.testing.conformance import StoreConformance
from tests.simulation.disk import Disk
from tests.simulation.oracle import Oracle


class _OnDisks(StoreConformance):
    disks: dict[Path, Disk]
    shared = True

    def make_store(self, directory: Path) -> Store:
        """One disk for each directory."""
        disks = self.__dict__.setdefault("disks", {})
        return Oracle(disks.setdefault(directory, Disk()), shared=self.shared)


class TestOracle(_OnDisks):
    """Alone."""

    shared = False


class TestSharedOracle(_OnDisks):
    """With others."""
