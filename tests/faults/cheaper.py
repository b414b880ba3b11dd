"""Opening a database thousands of times, for less."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest

from eventbus.stores import _sqlite_ballast, _sqlite_wal


@contextlib.contextmanager
def cheaper() -> Iterator[None]:
    """Opening thousands of images takes less: their frames are mostly the same, and a ballast is no part of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sqlite_wal, "_checksum", functools.lru_cache(maxsize=2_000)(_sqlite_wal._checksum))
        patch.setattr(_sqlite_ballast, "BYTES", 4_096)
        yield
