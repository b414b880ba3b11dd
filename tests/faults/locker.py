"""Somebody's own tool on the database of a bus: another process, with plain sqlite3, that holds a lock as long as it is told to.

    with Locker(path) as tool:
        tool.ask("write")     # it holds the write lock
        tool.stop()           # SIGSTOP, while it holds it
        tool.go_on()
        tool.ask("end")       # it has let go

Run as a module it is that process; nothing of the bus is imported in it, and it knows nothing of the bus's own lock file.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Self

STATEMENTS = {
    "write": ("BEGIN IMMEDIATE", "UPDATE log_state SET last_write = 'by hand'"),
    "read": ("BEGIN", "SELECT count(*) FROM events"),
    "end": ("ROLLBACK",),
}


class Locker:
    """Its user's hand."""

    def __init__(self, path: str) -> None:
        # By its path: as a module, the names above would be imported a second time.
        command = [sys.executable, str(Path(__file__)), path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ask(self, what: str) -> None:
        """Have it do something, and wait until it is done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == f"{what}\n", answer

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.communicate()


def _serve(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    for line in sys.stdin:
        for statement in STATEMENTS[line.strip()]:
            connection.execute(statement).fetchall()
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
