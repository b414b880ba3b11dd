"""Starts the programs that are killed: a process that has imported everything forks them, so that a start costs 10 ms, not 400.

    nursery = Nursery()
    child = nursery.start(task)         # a process of its own: it can be killed with SIGKILL
    child.wait(30)                      # its return code, as subprocess gives it; None if it still runs

The nursery has no thread, no loop and no open database, so that what it forks begins as a program does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

ROOT = Path(__file__).parents[2]


@attrs.frozen
class Task:
    """What a child is to do; see `child`.

    Attributes:
        mode: "work" until killed, or "drain" and leave.
        who: the number of this process among those that work on one file at once.
        starts: for each source the first number that it has not published.
        output, errors: files that its standard output and errors are appended to.
        environment: what is set in its environment beside ours.
    """

    database: str
    seed: str
    run: int
    backend: str
    mode: str
    output: str
    errors: str
    who: int = 0
    starts: dict[str, int] = attrs.field(factory=dict)
    environment: dict[str, str] = attrs.field(factory=dict)


class Nursery:
    """A process that forks children, as its owner's hand."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.crash.nursery"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End it; children that still run are killed."""
        self._process.communicate()

    def start(self, task: Task) -> Child:
        """Fork a child."""
        return Child(self, int(self.ask("start", attrs.asdict(task))))

    def ask(self, *words: Any) -> Any:
        """Have the nursery do something; its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@attrs.define
class Child:
    """A process that works."""

    _nursery: Nursery
    pid: int
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """Its return code, negative if a signal ended it; None if it still runs after so many seconds."""
        if self.code is None:
            self.code = self._nursery.ask("wait", self.pid, seconds)
        return self.code

    def kill(self) -> None:
        """SIGKILL, and wait for its end. It is nobody else's pid before it was waited for."""
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(30)


# ------------------------------------------------------------------ in the nursery


def _serve() -> None:
    children: set[int] = set()
    try:
        for line in sys.stdin:
            match json.loads(line):
                case ["start", task]:
                    children.add(pid := _fork(Task(**task)))
                    answer: int | None = pid
                case ["wait", pid, seconds]:
                    answer = _wait(pid, seconds)
                    if answer is not None:
                        children.discard(pid)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(task: Task) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for path, descriptor in ((os.devnull, 0), (task.output, 1), (task.errors, 2)):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.update(task.environment)
        from tests.crash.child import work  # imported already; the other way round it would be a circle

        work(task)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    import sqlite_utils
    import trio

    import eventbus._replay
    import eventbus._running
    import tests.crash.child

    assert all((sqlite_utils, trio, eventbus._replay, eventbus._running, tests.crash.child))  # imported for the children
    _serve()
