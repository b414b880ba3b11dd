"""The campaign of faults: every part of it, one command, one table.

    python -m tests.campaign --hours 1 --seed 1
    python -m tests.campaign --minutes 5 --only "power loss"

A part breaks something in one way, case after case without end, and says what it found wrong. The default test run takes the
first few cases of each (`tests/crash`, `tests/faults`, `tests/simulation`); here they share the time among them, one part at a time
for each core.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import attrs

SHOWN = 20
"""Faults of a case that are told, which is enough to see what is wrong: there may be a hundred thousand."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A directory in memory, where there is one, for what is not about the disk: nothing hangs on a sync there."""


@attrs.frozen
class Case:
    """One case that was run.

    Attributes:
        what: enough to run it again: the seed, and whatever else it takes.
        checked: how many things were broken and looked at in it: kills, images of a disk, steps.
        faults: what was found wrong, in words.
    """

    what: str
    checked: int = 1
    faults: Sequence[str] = ()

    def told(self) -> str:
        """Its faults, one a line; of very many the first `SHOWN`."""
        return "\n".join(self.faults[:SHOWN])


@attrs.frozen
class Part:
    """A row of the table.

    Attributes:
        name: the fault.
        counts: what `Case.checked` counts, in the plural.
        aim: how many of them in an hour.
        module: where `cases` is: imported when it is needed, since some need what others do not.
        share: of the time, against the others.
    """

    name: str
    counts: str
    aim: int
    module: str
    share: float = 1.0

    def cases(self, seed: int) -> Iterator[Case]:
        """Run one case after another, without end; the same seed gives the same cases."""
        cases: Callable[[int], Iterator[Case]] = importlib.import_module(self.module).cases
        return cases(seed)


PARTS: Sequence[Part] = (
    Part("SIGKILL at random moments, 1 process", "kills", 10_000, "tests.crash.campaign", 2.0),
    Part("SIGKILL at random moments, 4 processes", "kills", 10_000, "tests.crash.processes", 2.0),
    Part("SIGSTOP past the lease", "stops", 500, "tests.crash.stops"),
    Part("wall-clock jumps", "jumps", 500, "tests.crash.jumps", 0.2),
    Part("SIGKILL at every fail point", "kills", 5_000, "tests.crash.at_points"),
    Part("power loss, torn writes", "images", 500_000, "tests.faults.power_loss", 6.0),
    Part("every operation of the disk failing", "runs", 5_000, "tests.faults.io_errors"),
    Part("another process holds the write lock, is stopped, is killed", "times", 1_000, "tests.faults.held_lock"),
    Part("disk full", "times", 200, "tests.faults.disk_full"),
    Part("calls of the disk that fail", "calls", 5_000, "tests.faults.failing_disk"),
    Part("flipped bits", "images", 20_000, "tests.faults.flipped_bits"),
    Part("random programs against a model", "steps", 5_000_000, "tests.simulation.store_steps"),
    Part("whole-bus simulation", "runs", 500_000, "tests.simulation.bus", 2.0),
)


@attrs.define
class Tally:
    """What came of one part."""

    part: Part
    cases: int = 0
    checked: int = 0
    seconds: float = 0.0
    faults: list[str] = attrs.field(factory=list)

    def take(self, case: Case) -> None:
        self.cases += 1
        self.checked += case.checked
        self.faults += [f"{self.part.name}: {case.what}: {fault}" for fault in case.faults]


def run(part: Part, seed: int, seconds: float) -> Tally:
    """Run cases of a part until the time is over, or its aim is reached; at least one."""
    tally, begun = Tally(part), time.monotonic()
    for case in part.cases(seed):
        tally.take(case)
        tally.seconds = time.monotonic() - begun
        for fault in case.faults[:SHOWN]:
            print(f"FAULT {part.name}: {case.what}: {fault}", flush=True)
        if tally.seconds >= seconds or tally.checked >= part.aim:
            break
    return tally


def table(tallies: Sequence[Tally]) -> str:
    """The table, as it stands in the guarantees."""
    lines = ["| fault | cases | checked | one hour's aim | seconds | wrong |", "|---|---|---|---|---|---|"]
    for tally in tallies:
        part = tally.part
        lines.append(
            f"| {part.name} | {tally.cases:,} | {tally.checked:,} {part.counts} | {part.aim:,} "
            f"| {tally.seconds:,.0f} | {len(tally.faults)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, each for its share of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=None, help="instead of hours")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parts that run at once; without it, one a core")
    parser.add_argument("--only", action="append", help="names of parts; without it, all of them")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.only or ()) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(part.name for part in PARTS)}")
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    seconds = options.hours * 3600 if options.minutes is None else options.minutes * 60
    jobs = min(options.jobs, len(chosen))
    unit = seconds * jobs / sum(part.share for part in chosen)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        by_share = sorted(chosen, key=lambda part: -part.share)
        running = {pool.submit(run, part, options.seed, min(seconds, unit * part.share)): part for part in by_share}
        for ended in as_completed(running):
            print(table([ended.result()]), flush=True)
    tallies = [ended.result() for ended in sorted(running, key=lambda each: chosen.index(running[each]))]
    print(f"\nseed {options.seed}, {jobs} at once\n\n{table(tallies)}")
    return 1 if any(tally.faults for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
