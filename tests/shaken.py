"""Tests on a store that is slow at random: what counts on one thing being done before another is found out.

    python -m tests.shaken                                         # tests/bus, once
    python -m tests.shaken --seed 7 --most 0.03 tests/bus -k drain     # whatever pytest takes

Before and after each commit, read and look at what others have written, three times in ten, the thread sleeps for up to `--most` seconds. On a
quick and quiet disk a step is hardly ever overtaken by another; here it is all the time. Tests that promise a time of the clock may fail
with long delays; none may with the default.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from eventbus.stores.sqlite import SQLiteStore

_SETTINGS = "EVENTBUS_SHAKEN"
_OFTEN = 0.3


def pytest_configure(config: pytest.Config) -> None:
    """The plugin: make the store slow."""
    seed, most = os.environ[_SETTINGS].split()
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    chance = random.Random(seed + worker)
    for name in ("commit", "read", "notice"):
        _slow(name, chance, float(most))


def _slow(name: str, chance: random.Random, most: float) -> None:
    quick = getattr(SQLiteStore, name)

    def pause() -> None:
        if chance.random() < _OFTEN:
            time.sleep(chance.random() * most)

    def slow(self: SQLiteStore, *arguments: Any) -> Any:
        pause()
        result = quick(self, *arguments)
        pause()
        return result

    setattr(SQLiteStore, name, slow)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code of pytest."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.shaken", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=float, default=0.005, help="seconds of a delay (default: 0.005)")
    options, rest = parser.parse_known_args(arguments)
    command = [sys.executable, "-m", "pytest", "-p", "tests.shaken", *(rest or ["tests/bus"])]
    return subprocess.run(command, env=os.environ | {_SETTINGS: f"{options.seed} {options.most}"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
