"""The demo's child as its parent sees it: a process, and the reports that come out of it."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from eventbus.cli.demo_check import Run
from eventbus.cli.demo_reports import Attempt, Published, Report, read

_CHUNK = 65_536


class Process:
    """One start of `demo_child`. Its messages on standard error go where the parent's go."""

    def __init__(self, database: str, *, seed: int, first: int, events: int, seconds: float) -> None:
        options = {"--seed": seed, "--first": first, "--events": events, "--seconds": seconds}
        words = [word for name, value in options.items() for word in (name, str(value))]
        self._child = subprocess.Popen(  # noqa: S603  # our own module, with words of our own
            [sys.executable, "-m", "eventbus.cli.demo_child", database, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self.pid = self._child.pid
        self.reports: list[Report] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.kill()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()

    def kill(self) -> None:
        """SIGKILL: the process gets no chance to do anything about it."""
        self._child.kill()

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        return self._child.wait()

    def listen(self, *, silence: float, until: float) -> Iterator[Report | None]:
        """Reports as they come, until the process has ended and all it wrote is read; None each 0.1 s without one.

        Args:
            silence: seconds without a report after which the process is given up, and killed.
            until: the time of the monotonic clock at which it is given up in any case.
        """
        assert self._child.stdout is not None
        source, rest, heard = self._child.stdout.fileno(), b"", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while True:
                if not selector.select(0.1):
                    if time.monotonic() > min(heard + silence, until):
                        self.kill()
                    yield None
                    continue
                chunk = os.read(source, _CHUNK)
                if not chunk:
                    return
                heard = time.monotonic()
                if heard > until:
                    self.kill()
                *lines, rest = (rest + chunk).split(b"\n")  # what a kill has cut off in a line stays in `rest`, untold
                for line in lines:
                    report = read(line)
                    self.reports.append(report)
                    yield report

    def run(self) -> Run:
        """The reports that are judged."""
        return Run(
            [report for report in self.reports if isinstance(report, Published)],
            [report for report in self.reports if isinstance(report, Attempt)],
        )
