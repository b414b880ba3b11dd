"""SIGKILL at every fail point: the program kills itself there, is started again, and is killed at the next.

A start that follows on a kill is itself killed, at each of its own points; so recovery is interrupted as well, and so is the
migration of a file of the first version. Every case takes a part of the points, in an order chosen by its seed; `CASES` of them
take all.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator, Sequence

from tests.campaign import Case
from tests.crash.campaign import PATIENCE, Round, new_folder, round_case
from tests.crash.failpoints import POINTS, VARIABLE, Point
from tests.crash.nursery import Nursery
from tests.first_version import to_first_version

FRESH = [point for point in POINTS if point.when == "fresh"]
START = [point for point in POINTS if point.when == "start"]
WORK = [point for point in POINTS if point.when == "work"]
END = [point for point in POINTS if point.when == "end"]
MIGRATION = [point for point in FRESH if "migrat" in point.name]

CASES = len(FRESH)


def share(seed: int, number: int) -> Sequence[Point]:
    """The points of a case, in order: one on a new file, some at work, each followed by some at the start, some in the end."""
    chance = random.Random(f"{seed}-{number // CASES}")
    part = number % CASES
    fresh, start, work, end = (chance.sample(points, len(points))[part::CASES] for points in (FRESH, START, WORK, END))
    middle = [point for pair in itertools.zip_longest(work, start) for point in pair if point is not None]
    return [*fresh, *middle, *end]


def case(seed: int, number: int, nursery: Nursery) -> Case:
    """Kill at a share of the points, at the first passing of each, and at a later one; and when all that this has left in the file
    is brought up from the first version of the tables."""
    chance = random.Random(f"{seed}-{number}")

    def kill(round_: Round) -> None:
        for point in share(seed, number):
            for nth in sorted({1, chance.randint(1, point.most)}):
                kill_at(round_, point, nth)
        to_first_version(round_.database)
        kill_at(round_, MIGRATION[number % len(MIGRATION)], 1)

    what, backend = f"points {seed}-{number}", ("asyncio", "trio")[(number + number // CASES) % 2]
    return round_case(what, Round(new_folder(), what, backend, nursery), kill)


def kill_at(round_: Round, point: Point, nth: int) -> None:
    """Start the program; it must end by its own hand, at this point."""
    mode = "drain" if point.when == "end" else "work"
    child = round_.child(mode, environment={VARIABLE: point.nth(nth)})
    code = child.wait(PATIENCE)
    child.kill()
    said = [" ".join(line) for line in round_.look_at_killed([0])]
    if code is None:
        round_.fault(f"the point {point.name!r} was not passed {nth} times in {PATIENCE:g} s")
    elif code != -signal.SIGKILL or f"K {point.name}" not in said:
        round_.fault(f"it was to be killed at {point.nth(nth)!r}, and ended with {code}: {round_.errors()}")


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    with Nursery() as nursery:
        for number in itertools.count():
            yield case(seed, number, nursery)
