"""Fixtures of the behaviour tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from eventbus import _elsewhere as elsewhere_module
from eventbus import _membership as membership_module


@pytest.fixture
def db(tmp_path: Path) -> str:
    """A path for a store on disk; no file is there yet."""
    return str(tmp_path / "bus.db")


@pytest.fixture(params=["file", "memory"])
def any_db(request: pytest.FixtureRequest, db: str) -> str:
    """A store on disk, then one in memory; for promises that must hold on both."""
    return db if request.param == "file" else ":memory:"


@pytest.fixture
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks again only when he is told."""
    monkeypatch.setattr(elsewhere_module, "PATIENCE", math.inf)
    monkeypatch.setattr(membership_module, "PATIENCE", math.inf)
