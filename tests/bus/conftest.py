"""Fixtures of the behaviour tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def db(tmp_path: Path) -> str:
    """A path for a store on disk; no file is there yet."""
    return str(tmp_path / "bus.db")


@pytest.fixture(params=["file", "memory"])
def any_db(request: pytest.FixtureRequest, db: str) -> str:
    """A store on disk, then one in memory; for promises that must hold on both."""
    return db if request.param == "file" else ":memory:"
