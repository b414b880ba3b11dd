"""Reads, writes, syncs and truncates that fail: each call of a short program in turn, once, with a few after it, or with
all after it.

The program starts a bus, publishes, handles, carries the WAL over, and stops. It runs in a process into which `failing.c` was loaded, on the
stdlib's SQLite, and says on a pipe what was acknowledged. Then the database is opened without it: what was acknowledged must be there and
be handled, what was refused must not be there, and it must not be left open which of the two it is unless the disk went on failing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import attrs

from eventbus import EventBus, EventBusError, PublishOutcomeUnknown, StoreError
from eventbus.stores import sqlite
from tests.campaign import MEMORY, Case

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("failing.c")
NAME = "failing.db"
EVENTS = 10
RUNS = 40
"""Of one case."""
COUNTS = (1, 4, 12, 1 << 30)
"""How many calls in a row fail."""


@attrs.frozen
class Noted:
    n: int


@attrs.frozen
class Done:
    """Published with the ack of `Noted`: so each outcome leaves a trace that no later one stands for."""

    n: int


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


# ------------------------------------------------------------------ the program


def declare(path: Path, handled: list[int]) -> EventBus:
    bus = EventBus(path)

    @bus.subscribe(Noted, name="note")
    async def note(event: Noted) -> Done:
        handled.append(event.n)
        return Done(event.n)

    return bus


async def program(path: Path) -> dict[str, Any]:
    """Publish one after another; what was said of each, and what was handled."""
    said: dict[str, list[Any]] = {"stored": [], "refused": [], "unknown": [], "errors": [], "handled": []}
    try:
        async with declare(path, said["handled"]) as bus:
            for n in range(EVENTS):
                try:
                    await bus.publish(Noted(n))
                    said["stored"].append(n)
                except PublishOutcomeUnknown:
                    said["unknown"].append(n)
                except StoreError:
                    said["refused"].append(n)
            with anyio.move_on_after(0.05):
                await bus.drain()
    except EventBusError as error:
        said["errors"].append(f"{type(error).__name__}: {error}")
    except Exception as error:
        said["errors"].append(f"UNCLEAR {type(error).__name__}: {error}")
    return said


async def warm_up() -> None:
    """Import and compile, once for all children, what the program needs."""
    with tempfile.TemporaryDirectory(prefix="eventbus-failing-", dir=MEMORY) as folder:
        await program(Path(folder) / "warm.db")


def serve() -> None:
    """For each line of the standard input, run the program in a process of its own, with a call that fails."""
    logging.disable()
    sqlite.WAL_PAGES = 30
    anyio.run(warm_up)
    shim = ctypes.CDLL(None)
    for line in sys.stdin:
        path, number, count = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            shim.failing_arm(NAME.encode(), ctypes.c_long(number), ctypes.c_long(count))
            said = anyio.run(program, Path(path))
            said["calls"] = shim.failing_calls()
            os.write(write, json.dumps(said).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as answer:
            text = answer.read()
        os.waitpid(child, 0)
        sys.stdout.write((text or "null") + "\n")
        sys.stdout.flush()


# ------------------------------------------------------------------ what comes of it


class Disk:
    """Runs the program on a disk that fails."""

    def __init__(self, folder: Path) -> None:
        found = compiler()
        assert found is not None
        library = folder / "failing.so"
        subprocess.run([found, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        command = [sys.executable, "-m", "tests.faults.failing_disk"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, path: Path, number: int, count: int = 0) -> dict[str, Any] | None:
        """What the program said; None if it ended by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(path), number, count]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] | None = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()


async def look(path: Path) -> tuple[Counter[int], Counter[int], list[int]]:
    """Open the database on a disk that works: what is in the log, what the outcomes have published, and what is handled now."""
    handled: list[int] = []
    async with declare(path, handled) as bus:
        await bus.drain(timeout=20)
        stored = Counter([envelope.event.n async for envelope in bus.history(Noted)])  # type: ignore[attr-defined]
        done = Counter([envelope.event.n async for envelope in bus.history(Done)])  # type: ignore[attr-defined]
    return stored, done, handled


def wrong(path: Path, said: dict[str, Any] | None, count: int) -> Iterator[str]:
    """What is wrong after a run."""
    if said is None:
        yield "the program ended"
        return
    yield from (error for error in said["errors"] if error.startswith("UNCLEAR"))
    try:
        stored, done, handled = anyio.run(look, path)
    except (EventBusError, TimeoutError) as error:
        yield f"afterwards: {type(error).__name__}: {error}"
        return
    lost = [n for n in said["stored"] if n not in stored]
    there = [n for n in said["refused"] if n in stored]
    if lost:
        yield f"acknowledged and lost: {lost}"
    if there:
        yield f"refused and there: {there}"
    if said["unknown"] and count == 1:
        yield f"left open, though the disk worked again: {said['unknown']}"
    if any(count > 1 for count in stored.values()):
        yield f"there twice: {stored}"
    missed = set(stored) - set(handled) - set(said["handled"])
    if missed:
        yield f"never handled: {sorted(missed)}"
    if done != stored:
        yield f"outcomes lost, or written twice: {done}, where there are {stored}"


@contextlib.contextmanager
def failing() -> Iterator[tuple[Disk, Path]]:
    """A disk, and a folder on it."""
    with tempfile.TemporaryDirectory(prefix="eventbus-failing-", dir=MEMORY) as temporary:
        disk = Disk(Path(temporary))
        try:
            yield disk, Path(temporary)
        finally:
            disk.close()


def case(seed: int, number: int) -> Case:
    """Runs in which calls fail that are spread over the whole program; all cases of a seed together come by all of them."""
    faults: list[str] = []
    with failing() as (disk, folder):
        (whole := folder / "whole").mkdir()
        said = disk.run(whole / NAME, 0)
        assert said is not None
        assert said["stored"] == list(range(EVENTS)), said
        calls = said["calls"]
        order = list(itertools.product(range(1, calls + 1), COUNTS))
        random.Random(seed).shuffle(order)
        for run in range(number * RUNS, (number + 1) * RUNS):
            at, count = order[run % len(order)]
            (inner := folder / str(run)).mkdir()
            said = disk.run(inner / NAME, at, count)
            found = wrong(inner / NAME, said, count)
            faults += [f"call {at} of {calls} fails, {count} in all: {fault}" for fault in found]
            shutil.rmtree(inner)
    return Case(f"{seed}-{number}", RUNS, faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    for number in itertools.count():
        yield case(seed, number)


if __name__ == "__main__":
    serve()
