"""What `import eventbus` takes beside what its dependencies take by themselves.

In a new process: first every module that `import eventbus` loads and that is not its own, of the standard library as well, in the
order in which it loads them; then, in the same process, `import eventbus`. The second time is the bus's own. Beside it, in turn with
it, `import eventbus` at once. All modules are compiled before (`__pycache__`), as they are after the first start of a program.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from tests.benchmarks.apart import python
from tests.benchmarks.table import Row, Table

MOST_MS = 15.0

_LOADED = """
import sys
before = set(sys.modules)
import eventbus
print(" ".join(name for name in sys.modules if name not in before))
"""

_AT_ONCE = """
import time
began = time.perf_counter()
import eventbus
print(time.perf_counter() - began)
"""

_IN_PARTS = """
import importlib, time
began = time.perf_counter()
for name in {names!r}:
    importlib.import_module(name)
between = time.perf_counter()
import eventbus
print(between - began, time.perf_counter() - between)
"""


def test_import(table: Table, tmp_path: Path, quick: bool) -> None:
    """A program that imports eventbus starts as fast as one that imports what it depends on."""

    def run(code: str) -> str:
        compiled = f"pycache_prefix={tmp_path / 'pycache'}"
        return python(code, "-X", compiled, PYTHONDONTWRITEBYTECODE=None, PYTHONPYCACHEPREFIX=None)

    loaded = run(_LOADED).split()
    own = [name for name in loaded if name.partition(".")[0] == "eventbus"]
    in_parts = _IN_PARTS.format(names=[name for name in loaded if name not in own])
    run(in_parts)
    parts, at_once = [], []
    for _ in range(5 if quick else 25):
        parts.append([1e3 * float(seconds) for seconds in run(in_parts).split()])
        at_once.append(1e3 * float(run(_AT_ONCE)))
    ours = median(after for _, after in parts)
    data = {
        "own_ms": ours,
        "own_min_ms": min(after for _, after in parts),
        "dependencies_ms": median(before for before, _ in parts),
        "at_once_ms": median(at_once),
        "own_modules": float(len(own)),
        "other_modules": float(len(loaded) - len(own)),
    }
    table.add(
        Row(
            "import eventbus",
            f"its dependencies' own time + {ours:.1f} ms",
            goal=f"its dependencies' own time + {MOST_MS:g} ms",
            met=ours <= MOST_MS,
            backend="",
            note=f"dependencies {data['dependencies_ms']:.0f} ms, all at once {data['at_once_ms']:.0f} ms; "
            f"{len(own)} modules of its own, {len(loaded) - len(own)} others; fastest {data['own_min_ms']:.1f} ms",
            data=data,
            order=160,
        )
    )
