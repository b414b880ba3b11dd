"""The table of goals and figures: what a benchmark reports, how it is printed, how it is kept.

A benchmark measures, in one run and in turn with its floor, and adds a `Row`. `python -m tests.benchmarks` runs them all, prints
the table, and keeps it as JSON with a description of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs


@attrs.frozen
class Row:
    """One figure beside its goal.

    Attributes:
        what: the work, in the words of the table.
        figure: what was measured, with its unit, for people.
        goal: what it should be, for people; "" where the row has none.
        met: whether it is; None where there is no goal.
        backend: "asyncio", "trio", "asyncio + uvloop", or "" where no event loop takes part.
        note: what the figure does not include, or why the goal is missed.
        data: the raw numbers, by name with their unit (`events_per_second`, `floor_events_per_second`, `ratio`, `p99_ms`).
        order: place in the table.
    """

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None
    backend: str = "asyncio"
    note: str = ""
    data: Mapping[str, float] = attrs.field(factory=dict)
    order: int = 1_000


class Table:
    """The rows of one run. The fixture `table` hands it to every benchmark."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Take a row. Goals are for asyncio; what other loops do is reported beside it, without one."""
        if row.backend not in ("asyncio", ""):
            row = attrs.evolve(row, goal="", met=None)
        self.rows.append(row)

    def sorted(self) -> Sequence[Row]:
        """All rows, in the order of the table."""
        return sorted(self.rows, key=lambda row: (row.order, row.backend))
