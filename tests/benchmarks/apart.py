"""A function in a process of its own: for figures that belong to a process (its memory, its CPU, its imports), and to be killed.

    found = apart(idle.measure, subscriptions=100, seconds=10.0)

The function is imported by its name in the new process; its arguments and its answer travel as JSON. What it prints comes through.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Numbers = dict[str, float]

_PATIENCE = 1_200.0
"""Seconds after which a process is given up."""

_MARK = "answer: "


def apart(function: Callable[..., Numbers], /, **arguments: object) -> Numbers:
    """Call a function of a module in a process of its own; returns what it returns."""
    done = _run(function, arguments)
    assert done.returncode == 0, f"{function.__qualname__} failed: {done.stderr[-4_000:]}"
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    found: Numbers = json.loads(answer.removeprefix(_MARK))
    return found


def killed(function: Callable[..., Any], /, **arguments: object) -> None:
    """Call a function that kills its process with SIGKILL."""
    done = _run(function, arguments)
    assert done.returncode == -signal.SIGKILL, f"{function.__qualname__} ended with {done.returncode}: {done.stderr[-4_000:]}"


def python(code: str, *options: str, **changed: str | None) -> str:
    """Run Python code in a process of its own; returns what it prints. `changed`: variables of the environment, None to remove."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env=_environment(changed),
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=True,
    )
    return done.stdout


def _run(function: Callable[..., Any], arguments: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
    code = "from tests.benchmarks.apart import answer; answer()"
    return subprocess.run(
        [sys.executable, "-c", code, function.__module__, function.__qualname__, json.dumps(arguments)],
        cwd=ROOT,
        env=_environment({}),
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )


def _environment(changed: Mapping[str, str | None]) -> dict[str, str]:
    """This tree's package, whatever is installed."""
    changed = {"PYTHONPATH": str(ROOT), **changed}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return kept | {name: value for name, value in changed.items() if value is not None}


def answer() -> None:
    """In the new process: call the function that the arguments name."""
    module, name, arguments = sys.argv[1:]
    found = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    sys.stdout.write(f"{_MARK}{json.dumps(found)}\n")
