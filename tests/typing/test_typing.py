"""What mypy and pyright say to handlers, right and wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import eventbus

HERE = Path(__file__).parent
ROOT = Path(eventbus.__path__[0]).parent
GOOD, BAD = HERE / "good_handlers.py", HERE / "bad_handlers.py"
SAYS = re.compile(r"\s*# (?P<checker>\w+) says: (?P<pattern>.*)")
LONGEST = {"mypy": 250, "pyright": 800}
"""Characters; mypy says it in a line, pyright explains itself over a few."""

Messages = dict[int, str]


def run(arguments: list[str], cwd: Path) -> str:
    """The standard output of a checker, which must have run: it leaves with 0 (nothing found) or 1 (found something)."""
    environment = os.environ | {"MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode in {0, 1}, f"{arguments[0]} did not run (exit {done.returncode}):\n{done.stdout}\n{done.stderr}"
    return done.stdout


def mypy(cwd: Path) -> dict[str, Messages]:
    options = ["--strict", "--config-file=", "--output=json", f"--cache-dir={cwd}", "--follow-imports=silent"]
    found: dict[str, Messages] = defaultdict(lambda: defaultdict(str))
    for line in run(["mypy", *options, str(GOOD), str(BAD)], cwd).splitlines():
        message = json.loads(line)
        found[Path(message["file"]).name][message["line"]] += message["message"] + "\n"
    return found


def pyright(cwd: Path) -> dict[str, Messages]:
    for file in (GOOD, BAD):  # pyright looks at nothing outside of its project's folder
        shutil.copy(file, cwd)
    project = cwd / "pyrightconfig.json"
    settings = {
        "include": [GOOD.name, BAD.name],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        # What follows from an error that is reported already.
        "reportUntypedFunctionDecorator": "none",
        "reportUnknownMemberType": "none",
    }
    project.write_text(json.dumps(settings))
    found: dict[str, Messages] = defaultdict(lambda: defaultdict(str))
    output = run(["pyright", "--outputjson", f"--project={project}", f"--pythonpath={sys.executable}"], cwd)
    report = json.loads(output)
    assert report["summary"]["filesAnalyzed"] == 2, output
    for message in report["generalDiagnostics"]:
        found[Path(message["file"]).name][message["range"]["start"]["line"] + 1] += message["message"] + "\n"
    return found


@pytest.fixture(scope="module", params=[mypy, pyright], ids=["mypy", "pyright"])
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Messages]]:
    """The checker's name and, for each file, its messages by line."""
    name = request.param.__name__
    return name, request.param(tmp_path_factory.mktemp(name))


def expected(checker: str) -> dict[int, str]:
    """For each line of the bad file that has an expectation above it: the pattern."""
    patterns: dict[int, str] = {}
    pending: str | None = None
    for number, line in enumerate(BAD.read_text(encoding="utf-8").splitlines(), start=1):
        said = SAYS.fullmatch(line)
        if said and said["checker"] == checker:
            pending = said["pattern"]
        elif not said and pending is not None:
            patterns[number] = pending
            pending = None
    return patterns


@pytest.mark.timeout(300)  # a first run of mypy reads all dependencies
def test_right_handlers_are_accepted(checked: tuple[str, dict[str, Messages]]) -> None:
    """Handlers of every documented shape pass in strict mode, and keep their types."""
    _, found = checked
    assert found.get(GOOD.name, {}) == {}


@pytest.mark.timeout(300)
def test_wrong_handlers_are_flagged_where_they_stand(checked: tuple[str, dict[str, Messages]]) -> None:
    """Each wrong handler, and nothing else, is an error on its own line, which names what was given and what was expected."""
    checker, found = checked
    messages, patterns = found[BAD.name], expected(checker)
    assert sorted(messages) == sorted(patterns)
    missed = {line: (pattern, messages[line]) for line, pattern in patterns.items() if not re.search(pattern, messages[line])}
    assert missed == {}


@pytest.mark.timeout(300)
def test_messages_are_short(checked: tuple[str, dict[str, Messages]]) -> None:
    """No message is a wall of overloads."""
    checker, found = checked
    long = {line: text for line, text in found[BAD.name].items() if len(text) > LONGEST[checker]}
    assert long == {}
