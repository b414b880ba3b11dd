"""Fixtures of the tests that break things."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def db(tmp_path: Path) -> str:
    """A path for a store on disk; no file is there yet."""
    return str(tmp_path / "bus.db")
