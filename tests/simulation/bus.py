"""Whole-bus simulation, run after run: a part of `tests.campaign`.

    python -m tests.simulation.bus SEED      # one run again, with its trace
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from tests.campaign import Case
from tests.simulation.program import Run


def cases(seed: int) -> Iterator[Case]:
    """One run after another."""
    for number in itertools.count(1):
        name = f"{seed}-{number}"
        again = f"{name} (PYTHONHASHSEED=0 python -m tests.simulation.bus {name})"
        yield Case(again, faults=Run(name).run())


def main() -> int:
    """One run, with its trace."""
    run = Run(sys.argv[1])
    faults = run.run()
    print("\n".join(run.truth.trace))
    for wanted in run.wanted:
        print(wanted)
    print("\n".join(f"FAULT {fault}" for fault in faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
