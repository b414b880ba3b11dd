"""Whole-bus simulation, run after run: a part of `tests.campaign`.

    PYTHONHASHSEED=0 python -m tests.simulation.bus SEED      # one run again, with its trace
    PYTHONHASHSEED=0 python -m tests.simulation.bus 1 --all          # one run after another

Each run is decided by its seed, and by the order of sets of strings; so the runs are made in a process that has that fixed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

from tests.campaign import Case
from tests.simulation.program import Run


def cases(seed: int) -> Iterator[Case]:
    """One run after another."""
    command = [sys.executable, "-m", "tests.simulation.bus", str(seed), "--all"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                name, faults = json.loads(line)
                yield Case(f"{name} (PYTHONHASHSEED=0 python -m tests.simulation.bus {name})", faults=faults)
        finally:
            process.kill()
    yield Case(f"seed {seed}", faults=["the process of the runs has ended"])


def main() -> int:
    """One run with its trace; or all that a seed has, a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.bus", description=__doc__)
    parser.add_argument("seed")
    parser.add_argument("--all", action="store_true", help="one run after another, without end")
    options = parser.parse_args()
    logging.getLogger("eventbus").setLevel(logging.CRITICAL + 1)  # what goes wrong is told by what comes of it
    if options.all:
        with contextlib.suppress(BrokenPipeError):
            for number in itertools.count(1):
                name = f"{options.seed}-{number}"
                print(json.dumps([name, Run(name).run()]), flush=True)
        return 0
    run = Run(options.seed)
    faults = run.run()
    print("\n".join([*run.truth.trace, *map(str, run.wanted), *(f"FAULT {fault}" for fault in faults)]))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
