from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.members import Members
from tests.crash.nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Where the programs come from that are killed."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """What the members' loops are."""
    return str(request.param)


@pytest.fixture
def members(tmp_path: Path, nursery: Nursery, backend: str) -> Iterator[Members]:
    """Processes that do what they are told."""
    with Members(tmp_path, nursery, backend) as members:
        yield members
