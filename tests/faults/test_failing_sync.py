"""fsync and fdatasync fail under the standard library's own SQLite, by a library that is loaded before it (Linux, a C compiler)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc")
SOURCE = Path(__file__).with_name("failing_sync.c")


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler, and Linux")
def test_a_disk_that_cannot_be_synced_for_a_while(tmp_path: Path, anyio_backend: str) -> None:
    """Nothing is acknowledged meanwhile, in doubt is only what was under way, and the bus goes on by itself; handlers run once."""
    library, broken = tmp_path / "failing_sync.so", tmp_path / "broken"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "FAILING_SYNC": str(broken)}
    command = [sys.executable, "-m", "tests.faults.unsynced", str(tmp_path / "bus.db"), anyio_backend]
    done = subprocess.run(
        command, env=environment, cwd=SOURCE.parents[2], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
