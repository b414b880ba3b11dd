"""`python -m eventbus bench`: what this machine's disk lets SQLite do, and what the bus makes of it.

Round after round the floors are measured (`bench_floor`) and then the work (`bench_work`), so that both see the same disk and the
same neighbours; what is shown (`bench_show`) are medians. A first, small round warms up, and tells how large the others may be.
The benchmarks of the project, `python -m tests.benchmarks`, use the same floors and the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs

from eventbus import EventBusError
from eventbus.cli.bench_floor import BenchFailed, Floor, measure_floor, remove
from eventbus.cli.bench_machine import described, machine
from eventbus.cli.bench_show import MEANING, disk_lines, table_lines
from eventbus.cli.bench_work import Singles, Throughput, Where, many_tasks, one_task, plain_handler, publish_many

SUMMARY = "what this disk and this machine can do; about 20 seconds"
DESCRIPTION = (
    "Measures the disk's commit time, what a bare SQLite loop inserts, and what a bus publishes and handles, one after another, "
    "in three rounds, and prints medians. The disk is the one that holds the current folder, or --db; every commit is synced."
)

ROUNDS = 3

_SUFFIXES = ("", "-wal", "-shm", "-lock", "-ballast")


@attrs.frozen
class Work:
    """One line of the table.

    Attributes:
        measure: takes a new file's path and how many events; see `bench_work`.
        pilot: events in the first, small round.
    """

    what: str
    measure: Callable[[Where, int], Awaitable[Throughput | Singles]]
    pilot: int = 2_000


WORK: Sequence[Work] = (
    Work("publish_many of 100, 1 subscription", publish_many),
    Work("  the same, 3 subscriptions", partial(publish_many, subscriptions=3)),
    Work("  the same, 10 subscriptions", partial(publish_many, subscriptions=10)),
    Work("  the same, 1 plain handler, in a thread", plain_handler),
    Work("100 tasks, publishing one at a time", partial(many_tasks, tasks=100)),
    Work("1,000 tasks, publishing one at a time", partial(many_tasks, tasks=1_000)),
    Work("1 task, publishing one at a time", one_task, pilot=50),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--seconds", type=float, default=20.0, metavar="N", help="how long it may take, about (default: 20)")
    parser.add_argument(
        "--db",
        type=Path,
        metavar="PATH",
        help="a new file on the disk to measure, removed afterwards (default: one in this folder)",
    )
    parser.add_argument("--loop", choices=("asyncio", "trio"), default="asyncio", help="the event loop (default: asyncio)")


def run(options: argparse.Namespace) -> int:
    """Measure and print; 0 if everything that was published was handled."""
    if not (math.isfinite(options.seconds) and options.seconds > 0):
        print(f"--seconds {options.seconds}: expected a number above 0; below 5 the figures mean little")
        return 2
    if importlib.util.find_spec(options.loop) is None:
        print(f"--loop {options.loop}: it is not installed; pip install {options.loop}")
        return 2
    try:
        with _file(options.db) as path:
            return _measure(path, options)
    except _Refused as refused:
        print(refused)
        return 2
    except (EventBusError, BenchFailed, sqlite3.Error, OSError, ExceptionGroup) as error:
        print(f"FAILED: {_told(error)}")
        return 1
    except KeyboardInterrupt:
        print("interrupted; the files are removed")
        return 1


def _told(error: BaseException) -> str:
    """What went wrong; the first of what went wrong in several tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, BenchFailed) else f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------ the file


class _Refused(Exception):
    """The file cannot be made, and what to do."""


@contextlib.contextmanager
def _file(db: Path | None) -> Iterator[Path]:
    """A path on the disk to measure, where no file is yet; what is made there is removed."""
    if db is None:
        try:
            folder = tempfile.TemporaryDirectory(prefix=".eventbus-bench-", dir=Path.cwd())
        except OSError as error:
            raise _Refused(f"no file can be made in {Path.cwd()} ({error.strerror}); choose a disk with --db PATH") from error
        with folder as name:
            yield Path(name) / "bench.db"
        return
    path = db.absolute()
    taken = [each for each in (path.with_name(path.name + suffix) for suffix in _SUFFIXES) if each.exists()]
    if taken:
        raise _Refused(f"--db {db}: {taken[0]} exists; the benchmark needs a new file, which it removes afterwards")
    if not path.parent.is_dir():
        raise _Refused(f"--db {db}: there is no folder {path.parent}")
    try:
        yield path
    finally:
        remove(path)


# ------------------------------------------------------------------ rounds


@attrs.frozen
class Round:
    """What one round has measured: the floor, and each work by its name."""

    floor: Floor
    done: Mapping[str, Throughput | Singles]


def _measure(path: Path, options: argparse.Namespace) -> int:
    print(
        f"eventbus bench, about {options.seconds:g} s, on {options.loop}; every commit is synced to the disk (synchronous=FULL)\n"
    )
    print("\n".join(described(machine(Path.cwd() if options.db is None else path.parent))), flush=True)
    until = time.monotonic() + options.seconds
    rounds: list[Round] = []
    last = _round(path, options.loop, _Sizes())
    for number in range(ROUNDS):
        print(f"measuring, round {number + 1} of {ROUNDS}", flush=True)
        share = (until - time.monotonic()) / (ROUNDS - number) / (len(WORK) + 2)
        last = _round(path, options.loop, _Sizes(share, last))
        rounds.append(last)
    floors = [each.floor for each in rounds]
    results = {work.what: [each.done[work.what] for each in rounds] for work in WORK}
    print("\n".join(["", *disk_lines(floors), "", *table_lines(floors, results), "", *MEANING]))
    return 0


@attrs.frozen
class _Sizes:
    """How much may be done in `share` seconds each, judged by the last round; without one, little."""

    share: float = 0.0
    last: Round | None = None

    def rows(self) -> int:
        return 1_000 if self.last is None else self._events(self.last.floor.per_second, 500)

    def commits(self) -> int:
        return 20 if self.last is None else min(2_000, self._events(1 / self.last.floor.commit, 20))

    def of(self, work: Work) -> int:
        return work.pilot if self.last is None else self._events(self.last.done[work.what].per_second, work.pilot // 5)

    def _events(self, per_second: float, least: int) -> int:
        return max(least, int(per_second * (self.share - _OPENING)))


_OPENING = 0.1
"""Seconds that opening a bus, its warm-up and closing it may take beside what is measured."""


def _round(path: Path, loop: str, sizes: _Sizes) -> Round:
    floor = measure_floor(path, events=sizes.rows(), commits=sizes.commits())
    done: dict[str, Any] = {}
    for work in WORK:
        try:
            done[work.what] = anyio.run(work.measure, path, sizes.of(work), backend=loop)
        finally:
            remove(path)
    return Round(floor, done)
