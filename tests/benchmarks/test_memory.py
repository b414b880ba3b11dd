"""Subscriptions that stand still: how much memory the process gains, and what a busy type beside them loses of its speed.

What is stalled are handlers that wait and do not end. In the end they are let go, and it is checked that each event comes. See
`memory.py`, which runs in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import memory
from tests.benchmarks.apart import apart
from tests.benchmarks.rounds import events_of
from tests.benchmarks.table import Row, Table

MOST_MB = 50
LEAST_SPEED = 0.9


def _add(table: Table, what: str, data: dict[str, float], order: int) -> None:
    table.add(
        Row(
            what,
            f"{data['peak_mb']:+.1f} MB at most, others at {data['speed_ratio']:.2f} of their speed",
            goal=f"< {MOST_MB} MB, others ≥ {LEAST_SPEED:g} of their speed",
            met=data["peak_mb"] < MOST_MB and data["speed_ratio"] >= LEAST_SPEED,
            note=f"{data['grown_mb']:+.1f} MB in the end, from {data['before_mb']:.0f} MB with two warm buses; the busy type does "
            f"{data['beside_events_per_second']:,.0f} events/s beside it, {data['alone_events_per_second']:,.0f} alone; let go, "
            f"it handles all at {data['catching_up_per_second']:,.0f}/s, at most {data['catching_up_peak_mb']:+.1f} MB",
            data=data,
            order=order,
        )
    )


def test_stalled_subscription(table: Table, tmp_path: Path, quick: bool) -> None:
    """One that stands still costs no memory and holds up nobody, however far it is behind."""
    events = events_of(1_000_000, quick=quick)
    data = apart(memory.stalled_behind, folder=str(tmp_path), events=events)
    _add(table, f"a stalled subscription, {events:,} events behind", data, order=130)


@pytest.mark.parametrize(("order", "place"), [("type", 131), ("key", 132)])
def test_stalled_lanes(order: str, place: int, table: Table, tmp_path: Path, quick: bool) -> None:
    """A thousand lanes that stand still share a bounded memory, and hold up nobody."""
    rounds = 6 if quick else 40
    data = apart(memory.stalled_lanes, folder=str(tmp_path), order=order, lanes=1_000, rounds=rounds)
    _add(table, f"1,000 stalled lanes of 8 KB events, order={order!r}, {rounds} in each", data, place)
