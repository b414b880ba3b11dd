"""Runs the workers, each in its environment, in turns, and gathers what they say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.benchmarks.peers.catalogue import FLOOR, ONE, Peer, Setting
from tests.benchmarks.peers.environments import Environment, NotInstalled, environment

_FLOOR_SECONDS = 0.3
"""For the bare commits that are measured before each line: disks have slow minutes."""


@attrs.define(eq=False)
class Line:
    """One line of the table: a peer in one setting.

    Attributes:
        turns: what the worker reported, for each measure, once a turn.
        bare_commits_per_second: of the sqlite3 module alone, synchronous=FULL, just before each turn.
        failed: why there is nothing, or nothing for some measures.
    """

    peer: Peer
    setting: Setting
    versions: Mapping[str, str] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    how: dict[str, str] = attrs.field(factory=dict)
    turns: dict[str, list[Mapping[str, float]]] = attrs.field(factory=dict)
    bare_commits_per_second: list[float] = attrs.field(factory=list)
    failed: dict[str, str] = attrs.field(factory=dict)

    def figure(self, measure: str, name: str) -> float | None:
        """The median of the turns."""
        turns = self.turns.get(measure)
        return statistics.median(turn[name] for turn in turns) if turns else None

    def take(self, measure: str, report: Mapping[str, Any]) -> None:
        """What a worker said."""
        if "error" in report:
            self.failed[measure] = report["error"]
            return
        self.turns.setdefault(measure, []).append(report["figures"])
        self.settings = report["settings"]
        self.how[measure] = report["how"]


def lines_of(peers: Sequence[Peer], environments: Mapping[str, Environment | NotInstalled]) -> list[Line]:
    """An empty line for each setting; one with the reason for a peer that is not there."""
    found = []
    for peer in peers:
        there = environments[peer.name]
        for setting in peer.settings:
            if isinstance(there, NotInstalled):
                found.append(Line(peer, setting, failed=dict.fromkeys(peer.measures, f"not installed: {there}")))
            else:
                found.append(Line(peer, setting, versions=there.versions))
    return found


def install(peers: Sequence[Peer], root: Path) -> Iterator[tuple[Peer, Environment | NotInstalled]]:
    """Make the environments, one after another."""
    for peer in peers:
        try:
            yield peer, environment(peer, root)
        except NotInstalled as reason:
            yield peer, reason


@attrs.frozen
class Work:
    """Measures lines.

    Attributes:
        seconds: that one measurement takes, about.
        scratch: where the databases are made.
    """

    environments: Mapping[str, Environment | NotInstalled]
    seconds: float
    scratch: Path

    def turn(self, line: Line) -> None:
        """All measures of one line, once; what has failed is not tried again."""
        bare = self._run(FLOOR, FLOOR.settings[0].name, ONE, _FLOOR_SECONDS)
        if "figures" in bare:
            line.bare_commits_per_second.append(bare["figures"]["events_per_second"])
        for measure in line.peer.measures:
            if measure not in line.failed:
                line.take(measure, self._run(line.peer, line.setting.name, measure, self.seconds))

    def _run(self, peer: Peer, setting: str, measure: str, seconds: float) -> Mapping[str, Any]:
        there = self.environments[peer.name]
        assert isinstance(there, Environment)
        folder = self.scratch / "work"
        folder.mkdir()
        command = [str(there.python), str(peer.script), "--setting", setting, "--measure", measure]
        command += ["--seconds", str(seconds), "--folder", str(folder)]
        try:
            return _report(command, folder, limit=60 + 10 * seconds)
        finally:
            shutil.rmtree(folder)


def _report(command: Sequence[str], folder: Path, limit: float) -> Mapping[str, Any]:
    """Run a worker and read its last line. After `limit` seconds it is killed, with all that it has started."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden} | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complained = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"killed after {limit:.0f} s"}
    try:
        report: Mapping[str, Any] = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        last = (complained.strip().splitlines() or ["nothing"])[-1]
        return {"error": f"the worker ended with {process.returncode}: {last}"}
    return report
