"""`python -m eventbus`: the commands.

Each is a module of `eventbus.cli` with `SUMMARY`, `DESCRIPTION`, `configure(parser)` and `run(options) -> exit code`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from eventbus.cli import bench, demo, doctor

COMMANDS = {"bench": bench, "demo": demo, "doctor": doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; without one, say which there are. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eventbus", description="eventbus: an embeddable, durable event bus.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.DESCRIPTION)
        command.configure(sub)
        sub.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 0
    try:
        exit_code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written goes nowhere
        return 1
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
