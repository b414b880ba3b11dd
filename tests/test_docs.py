"""The documentation is true: its code runs and prints what it says, its links lead somewhere, its tables are the code's."""

from __future__ import annotations

import inspect
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from eventbus import errors, hooks
from eventbus.stores.base import Instance
from eventbus.stores.sqlite import SQLiteStore
from tests.pages import DOCS, ROOT, Page, first_cells, page, pages, tree_of

PAGES = pages()
RUN = "python"
NO_RUN = "python no-run"
OUTPUT = "text output"
SHELL = ("console", "bash", "sh", "shell")
KNOWN = {RUN, NO_RUN, OUTPUT, "text", "sql", "toml", *SHELL}


def _name(each: Page) -> str:
    return each.name


def _script(each: Page) -> str:
    """The page's blocks as one program, every line at the number that it has on the page."""
    lines: list[str] = []
    for block in each.blocks():
        if block.info == RUN:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("each", [p for p in PAGES if any(b.info == RUN for b in p.blocks())], ids=_name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(each: Page, tmp_path: Path) -> None:
    """A reader who pastes the blocks of a page one after another sees what the page shows."""
    script = tmp_path / f"{each.path.stem.replace('-', '_')}.py"
    script.write_text(_script(each), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", script.name], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert ran.returncode == 0, f"{each.name}:\n{ran.stderr}"
    assert ran.stdout == "".join(block.text for block in each.blocks() if block.info == OUTPUT)


@pytest.mark.parametrize("each", PAGES, ids=_name)
def test_code_that_does_not_run_is_python_all_the_same(each: Page) -> None:
    """Blocks that only show something are compiled."""
    for block in each.blocks():
        if block.info == NO_RUN:
            compile(block.text, f"{each.name}:{block.line}", "exec")


@pytest.mark.parametrize("each", PAGES, ids=_name)
def test_blocks_are_of_a_kind_that_is_looked_after(each: Page) -> None:
    """A block that no test knows, such as a misspelt `pyhton`, would never be run."""
    assert {block.info for block in each.blocks()} <= KNOWN


def test_ci_runs_the_commands_of_the_readme() -> None:
    """What the README tells a newcomer to type is what .ci/run types, up to pip's -qq."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(" -qq", "")
    ran = {line.strip() for line in script.splitlines()}
    told = [
        line.removeprefix("$ ").strip()
        for block in page("README.md").blocks()
        if block.info in SHELL
        for line in block.text.splitlines()
        if line.strip()
    ]
    assert len(told) >= 2
    assert [command for command in told if command not in ran] == []


@pytest.mark.parametrize("each", PAGES, ids=_name)
def test_links_lead_somewhere(each: Page) -> None:
    """Links within the project name a file that is there, and a heading that it has."""
    broken = []
    for target in each.links():
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (each.path.parent / path).resolve() if path else each.path
        if not found.exists() or (anchor and anchor not in Page(found, found.read_text(encoding="utf-8")).anchors()):
            broken.append(target)
    assert broken == []


def test_every_page_is_reached_from_the_index() -> None:
    """No page is an orphan."""
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for target in Page(path, path.read_text(encoding="utf-8")).links():
            found = (path.parent / target.partition("#")[0]).resolve()
            if found.suffix == ".md" and found.is_relative_to(DOCS):
                waiting.append(found)
    assert reached == set(DOCS.rglob("*.md"))


# ------------------------------------------------------------------ what the pages say about the code


def _columns(path: Path) -> dict[str, list[str]]:
    store = SQLiteStore(path)
    store.open(Instance("01890000-0000-7000-8000-000000000001", "docs", "localhost", 1, 0.0))
    store.close()
    connection = sqlite3.connect(path)
    try:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        ours = [name for name in names if not name.startswith(("sqlite_", "_sqlite_"))]
        return {name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for name in ours}
    finally:
        connection.close()


def test_the_tables_page_shows_the_tables_that_the_store_makes(tmp_path: Path) -> None:
    """Every table and every column, in order, and no other."""
    documented = {
        section.title.strip("`"): first_cells(section.text)
        for section in page("docs/reference/tables.md").sections()
        if section.level == 2 and re.fullmatch(r"`\w+`", section.title)
    }
    assert dict(sorted(documented.items())) == _columns(tmp_path / "docs.db")


def _parents() -> dict[str, str | None]:
    classes = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, errors.EventBusError)}
    return {
        name: next((base.__name__ for base in cls.__bases__ if issubclass(base, errors.EventBusError)), None)
        for name, cls in classes.items()
    }


def test_the_errors_page_draws_the_tree_of_the_code() -> None:
    """The tree on the page is that of eventbus.errors, and every error has its row below."""
    errors_page = page("docs/reference/errors.md")
    tree = next(tree_of(block.text) for block in errors_page.blocks() if "EventBusError" in block.text)
    assert tree == _parents()
    assert sorted(first_cells(errors_page.text)) == sorted(_parents())


def test_the_tree_in_the_docstring_of_the_errors_is_that_of_the_code() -> None:
    """What a reader of errors.py sees first is true."""
    assert tree_of(errors.__doc__ or "") == _parents()


def test_the_hooks_page_shows_every_moment_with_its_fields() -> None:
    """What a hook is told, with all fields."""
    documented = {
        section.title.strip("`"): first_cells(section.text)
        for section in page("docs/reference/hooks.md").sections()
        if re.fullmatch(r"`[A-Z]\w+`", section.title)
    }
    moments = hooks.Moment.__args__
    assert documented == {cls.__name__: list(cls.__struct_fields__) for cls in moments}


def test_file_names_on_the_architecture_page_exist() -> None:
    """The way through the files leads through files that are there; a module of the package has its place on the page."""
    text = page("docs/explanation/architecture.md").text
    named = set(re.findall(r"(?<![\w/])(?:(?:stores|testing|cli)/)?\w+\.py\b", text))
    there = {path.relative_to(ROOT / "eventbus").as_posix() for path in (ROOT / "eventbus").rglob("*.py")}
    assert named - there == set()
    way = {name for name in there if "/" not in name and name not in {"__init__.py", "__main__.py"}}
    assert way - named == set()


def test_the_performance_page_shows_the_runs_that_are_kept() -> None:
    """Its tables are those that the benchmarks print of their last runs."""
    from tests.benchmarks import report
    from tests.benchmarks.peers import report as peers

    shown = page("docs/explanation/performance.md").text.splitlines()
    kept = report.load()
    lines = [*report.summary_of(kept), *report.markdown_of(kept.rows), *peers.markdown_of(peers.load().lines)]
    assert [line for line in lines if line not in shown] == []
