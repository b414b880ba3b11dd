"""Virtual environments, one for each peer, outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs

from tests.benchmarks.peers.catalogue import Peer

_INSTALL_SECONDS = 600


@attrs.frozen
class Environment:
    """Where a peer is installed.

    Attributes:
        python: its interpreter.
        versions: of all that is installed in it.
    """

    python: Path
    versions: Mapping[str, str]


class NotInstalled(Exception):
    """A peer cannot be installed here. Its text says why."""


def cache() -> Path:
    """Where environments stay that are to be used again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "eventbus-benchmark-peers" / f"{sys.version_info.major}.{sys.version_info.minor}"


def environment(peer: Peer, root: Path) -> Environment:
    """Make a peer's environment below `root`, or bring one that is there up to date."""
    folder = root / peer.name
    if any("/" in requirement for requirement in peer.requirements):
        shutil.rmtree(folder, ignore_errors=True)  # the source changes without its version
    python = folder / "bin" / "python"
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)])
    if peer.requirements:
        _call([str(python), "-m", "pip", "install", "--quiet", "--upgrade", *peer.requirements])
    listed = _call([str(python), "-m", "pip", "list", "--format=json"])
    versions = {each["name"]: each["version"] for each in json.loads(listed) if each["name"] not in {"pip", "setuptools"}}
    return Environment(python, versions)


def _call(command: list[str]) -> str:
    calm = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_REQUIRE_VIRTUALENV": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS, env=calm)
    except subprocess.TimeoutExpired as late:
        raise NotInstalled(f"{' '.join(command[1:4])} took more than {_INSTALL_SECONDS} s") from late
    if done.returncode != 0:
        said = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no message"]
        )
        raise NotInstalled(said[-1].removeprefix("ERROR: "))
    return done.stdout
