"""When events were handled, measured where nobody is disturbed: a store that notes when acks are committed.

`Receipt.handled` would ask the store for each event, and hurry its ack. Here the writer thread looks at the clock once for each
transaction, and what was published is compared with that afterwards.
"""

from __future__ import annotations

import bisect
import time
from pathlib import Path

from eventbus.cli.bench_work import Singles
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore


class Acks(SQLiteStore):
    """For a bus with one lane: everything up to `checkpoints[i]` is handled since `times[i]`, of `time.perf_counter`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.checkpoints: list[int] = []
        self.times: list[float] = []
        self.refused = 0

    def commit(self, batch: Batch) -> Committed:
        committed = super().commit(batch)
        if batch.units:
            self.times.append(time.perf_counter())
            self.checkpoints.append(batch.units[-1].checkpoint)  # a lane's units stand in order
            self.refused += len(committed.refused)
        return committed

    def handled(self, singles: Singles) -> list[float]:
        """Seconds from the call of `publish` until the ack was committed, for every event; ascending."""
        assert not self.refused
        events = zip(sorted(singles.positions), singles.by_position(), strict=True)
        return sorted(self.times[bisect.bisect_left(self.checkpoints, position)] - began for position, began in events)
