"""Every `async def test_…` runs on asyncio and on trio (`anyio_mode = "auto"` in pyproject.toml); no other plugin is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import eventbus

# Programs that tests start (and kill) must run the package under test, wherever they start and whatever is installed.
_SOURCE = str(Path(eventbus.__path__[0]).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loop that a test runs on."""
    return str(request.param)
