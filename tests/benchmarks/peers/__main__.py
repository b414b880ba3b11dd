"""`python -m tests.benchmarks.peers`: the same work through other libraries, each in an environment of its own.

Each is installed from the package index, used as its own documentation recommends (see the workers), and measured in turns with the
others. The table is printed and kept in `tests/benchmarks/peers.json`. Nothing is left behind but that, and with `--keep` the
environments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import attrs

from eventbus.cli.bench_machine import described, machine
from tests.benchmarks.peers.catalogue import FLOOR, PEERS, ROOT, Peer
from tests.benchmarks.peers.environments import Environment, NotInstalled, cache
from tests.benchmarks.peers.report import KEPT, Run, kept_of, load, markdown_of, notes_of, save
from tests.benchmarks.peers.runner import Line, Work, install, lines_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, measure, print, keep."""
    options = _parser().parse_args(arguments)
    if options.markdown:
        print("\n".join(markdown_of(load().lines)))
        return 0
    peers = [peer for peer in PEERS if not options.only or peer.name in options.only]
    with tempfile.TemporaryDirectory(prefix="eventbus-peers-", dir=options.folder) as scratch:
        found = machine(Path(scratch))
        print("\n".join(described(found)), flush=True)
        with nullcontext(str(cache())) if options.keep else tempfile.TemporaryDirectory(prefix="eventbus-envs-") as root:
            lines = _measured(peers, Path(root), Path(scratch), options.seconds, options.turns)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    commit = _commit()
    kept = [kept_of(line, date, commit) for line in lines]
    print("\n".join(["", *notes_of(kept), "", *markdown_of(kept)]))
    save(Run(attrs.evolve(found, folder=str(Path(found.folder).parent)), kept), options.json)
    print(f"\nkept in {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--only", metavar="NAME", action="append", choices=names, help=f"one of {', '.join(names)}; may be repeated"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement, over all turns (default: 5)")
    parser.add_argument(
        "--turns", type=int, default=3, help="every line is measured so often, in turns; medians count (default: 3)"
    )
    parser.add_argument("--keep", action="store_true", help=f"keep the environments in {cache()}, and use those that are there")
    parser.add_argument("--folder", type=Path, help="where databases are made (default: the folder for temporary files)")
    parser.add_argument("--json", type=Path, default=KEPT, help="where the figures are kept; with --only, other peers' stay")
    parser.add_argument("--markdown", action="store_true", help="print the table that is kept, and run nothing")
    return parser


def _measured(peers: Sequence[Peer], root: Path, scratch: Path, seconds: float, turns: int) -> list[Line]:
    environments: dict[str, Environment | NotInstalled] = {}
    for peer, there in install(list(dict.fromkeys([FLOOR, *peers])), root):
        environments[peer.name] = there
        said = f"not installed: {there}" if isinstance(there, NotInstalled) else there.versions.get(peer.package, "")
        print(f"{peer.name:14} {said}", flush=True)
    if isinstance(environments[FLOOR.name], NotInstalled):
        raise SystemExit("no virtual environment can be made here")
    lines = lines_of(peers, environments)
    work = Work(environments, seconds / turns, scratch)
    began = time.monotonic()
    for turn in range(turns):
        for line in lines:
            if not isinstance(environments[line.peer.name], NotInstalled):
                work.turn(line)
                _show(line, f"turn {turn + 1} of {turns}, {time.monotonic() - began:4.0f} s")
    return lines


def _show(line: Line, when: str) -> None:
    """One line on a screen, after each turn."""
    newest = []
    for measure, figures in line.turns.items():
        rate = figures[-1].get("events_per_second")
        newest.append(f"{measure} {figures[-1]['p50_ms']:.2f} ms" if rate is None else f"{measure} {rate:,.0f}/s")
    newest += [f"{measure} failed" for measure in line.failed]
    print(f"{when}  {line.peer.name}, {line.setting.title}: {', '.join(newest)}", flush=True)


def _commit() -> str:
    """Of the eventbus that was measured; "+" if files were changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


if __name__ == "__main__":
    sys.exit(main())
