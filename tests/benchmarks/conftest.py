"""What benchmarks are given: the `table` they add rows to, the `machine`, whether to be `quick`, and the event loop's `backend`.

They are no part of the default run. `python -m tests.benchmarks` runs them and keeps the table; `pytest tests/benchmarks -n 0`
runs them and prints it. Their files are made in `tmp_path`, and removed after each test.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventbus.cli.bench_machine import Machine
from eventbus.cli.bench_machine import machine as machine_at
from tests.benchmarks.report import TABLE, lines_of
from tests.benchmarks.table import Table

_TIME_LIMIT = 1_800
"""Seconds for one benchmark."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: smaller workloads, fewer rounds; figures mean little")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks are measured one at a time: add -n 0, or use python -m tests.benchmarks")
    config.stash[TABLE] = Table()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(_TIME_LIMIT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[TABLE].sorted()
    if rows:
        terminalreporter.section("table of goals and figures")
        for line in lines_of(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """The rows of this run."""
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether smaller workloads will do: only to see that a benchmark works."""
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """What is measured on, and the disk under `tmp_path`."""
    return machine_at(tmp_path_factory.getbasetemp())


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """The event loop of a benchmark, which is a plain function and calls `anyio.run(…, backend=backend)`.

    Goals are for asyncio; what trio does is reported beside it.
    """
    return str(request.param)


@pytest.fixture(autouse=True)
def _only_its_own_garbage(tmp_path: Path) -> Iterator[None]:
    """What pytest and earlier benchmarks have made is not gone through by the garbage collector again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    for file in tmp_path.glob("**/*.db*"):  # gigabytes
        if file.is_file():
            file.unlink()
