"""`python -m tests.benchmarks`: run all benchmarks, print the table of goals and figures, and keep it in `last.json`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import pytest

from eventbus.cli.bench_machine import described, machine
from tests.benchmarks.report import LAST, TABLE, Run, load, markdown_of, now, save, summary_of
from tests.benchmarks.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them, or show what was kept. Returns 0 if every benchmark came to its end, whether or not it met its goal."""
    options = _parser().parse_args(arguments)
    if options.markdown:
        kept = load()
        print("\n".join([*summary_of(kept), "", *markdown_of(kept.rows)]))
        return 0
    folder = Path(tempfile.mkdtemp(prefix=".eventbus-benchmarks-", dir=options.folder or _disk()))
    try:
        return _run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller workloads, only to see that they work; keeps nothing")
    parser.add_argument("--only", metavar="WORD", help="benchmarks whose name matches, as for pytest -k; keeps nothing")
    parser.add_argument("--folder", type=Path, help="where files are made (default: the folder for temporary files)")
    parser.add_argument("--keep", type=Path, metavar="JSON", help="keep the run in this file, rather than in last.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of last.json as Markdown, and run nothing")
    return parser


def _disk() -> Path:
    """The folder for temporary files, unless it lies in memory."""
    folder = Path(tempfile.gettempdir())
    return ROOT if machine(folder).in_memory else folder


def _run(options: argparse.Namespace, folder: Path) -> int:
    here, began, watch = machine(folder), time.monotonic(), Watch()
    print("\n".join(described(here)), flush=True)
    code = pytest.main(list(_pytest_arguments(options, folder)), plugins=[watch])
    seconds = round(time.monotonic() - began)
    run = Run(now(), _commit(), seconds, attrs.evolve(here, folder=str(folder.parent)), watch.table.sorted(), watch.failed)
    print("\n".join(["", *summary_of(run)]))
    path = options.keep or (None if options.quick or options.only else LAST)
    if path is not None and run.rows and code in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        save(run, path)
        print(f"kept in {path}")
    return int(code)


def _pytest_arguments(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    yield from (str(HERE), f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}")
    yield from ("-n", "0", "-v", "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-quiet")
    yield from ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # anyio is imported before pytest starts
    yield from (f"--basetemp={folder / 'files'}", "-o", "tmp_path_retention_policy=none")
    if options.quick:
        yield "--quick"
    if options.only:
        yield from ("-k", options.only)


@attrs.define(eq=False)
class Watch:
    """A plugin that says what comes in, and remembers what failed."""

    table: Table = attrs.field(factory=Table)
    failed: list[str] = attrs.field(factory=list)
    _shown: int = 0

    @pytest.hookimpl(trylast=True)  # after conftest.py has made the table
    def pytest_configure(self, config: pytest.Config) -> None:
        self.table = config.stash.get(TABLE, self.table)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._remember(report)
        for row in self.table.rows[self._shown :]:
            print(f"\n    {row.what}, {row.backend}: {row.figure}", end="", flush=True)
        self._shown = len(self.table.rows)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._remember(report)

    def _remember(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    sys.exit(main())
