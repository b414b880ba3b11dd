"""SIGSTOP past the lease: of four processes on one file some are stopped at random moments; others take their lanes; they go on.

    python -m tests.campaign --only "SIGSTOP past the lease"

What a process writes that was stopped for longer than its lease is refused, and it takes part again. One that is stopped while it
has the turn to write holds up all others until it goes on; that is shorter here than what they wait for. Checked is what is
checked after kills (`processes`), but that a stopped process may, in each lane, still begin the one event that it was about to.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator

from tests.campaign import Case
from tests.crash.campaign import new_folder, round_case
from tests.crash.nursery import Nursery
from tests.crash.processes import ROLES, Company

STOPS = 5
"""Moments at which some are stopped, in one database."""
LEASE = 0.5
UNDER_WAY = {"chain": 1, "flaky": 1, "plain": 1, "audit": 1, "link": 4, "keyed": 4, "free": 8}
"""For each subscription so many events as may be between the look at the lease and the handler: one a lane, or its concurrency."""


def stop_some(company: Company, chance: random.Random) -> None:
    """Let all work, stop one to three of them for longer than their lease, mostly, and let them go on."""
    company.start_all()
    company.wait_for_word()
    time.sleep(chance.random() * 0.3)
    stopped = chance.sample(range(len(ROLES)), chance.choice((1, 2, 2, 3)))
    for who in stopped:
        os.kill(company.working[who].pid, signal.SIGSTOP)
    time.sleep(LEASE * (0.5 + chance.random() * 1.5))
    company.listen()
    company.look()
    company.excused.update({who: dict(UNDER_WAY) for who in stopped})
    for who in stopped:
        for subscription, count in UNDER_WAY.items():
            company.late[who, subscription] += count
        os.kill(company.working[who].pid, signal.SIGCONT)
    time.sleep(chance.random() * 0.2)
    company.look_for_ended()
    company.kills += len(stopped)


def case(seed: int, number: int, nursery: Nursery) -> Case:
    """One database; the same numbers choose the same moments, though not what the machine does until then."""
    chance = random.Random(f"stops {seed}-{number}")

    def stop(company: Company) -> None:
        for _ in range(STOPS):
            stop_some(company, chance)

    what = f"stops {seed}-{number}"
    return round_case(what, Company(new_folder(), what, ("asyncio", "trio")[number % 2], nursery, lease=LEASE), stop)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    with Nursery() as nursery:
        for number in itertools.count():
            yield case(seed, number, nursery)
