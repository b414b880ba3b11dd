"""`python -m eventbus doctor`: *two looks*, some time apart, at the instances and the lanes.

What stands still can only be seen so: a checkpoint that does not move while events wait, a lock that is not given back.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping

import attrs

from eventbus._status import MOST, lag_of, types_of, unclaimed
from eventbus.cli.doctor_processes import Held, Process, locks_of, users_of
from eventbus.errors import StoreCorrupt
from eventbus.stores.base import (
    CountDeadLetters,
    LagOfRows,
    Lanes,
    LaneState,
    Member,
    Stand,
    Standing,
    Subscribed,
    Types,
    WaitingRow,
    WaitingRows,
)
from eventbus.stores.sqlite_inspect import Inspection, Lease

_BETWEEN = 0.05
"""Seconds from one look at the locks to the next."""


@attrs.frozen
class LaneLook:
    """A lane at one moment.

    Attributes:
        lag: events above the checkpoint, counted up to 10,000. oldest: unix seconds of the first of them.
    """

    state: LaneState
    owner: str | None
    lag: int
    oldest: float | None


@attrs.frozen
class Look:
    """How it all stood at one moment.

    Attributes:
        at: unix seconds. data_version: another after each commit of another connection.
        lanes: by subscription. held: by subscription, events that waiting rows stand for, and the time of the oldest.
        damaged: subscriptions with a lane that cannot be read.
    """

    at: float
    data_version: int
    standing: Standing
    leases: Mapping[str, Lease]
    users: Mapping[int, Process]
    has_lock: bool
    rows: tuple[WaitingRow, ...]
    lanes: Mapping[str, list[LaneLook]]
    held: Mapping[str, tuple[int, float | None]]
    dead: Mapping[str, int]
    damaged: Mapping[str, str]

    def members(self) -> list[Member]:
        """Instances whose rows are there, alive or not."""
        return list(self.standing.members)


@attrs.frozen
class Watched:
    """Two looks, and the locks that were held each time one looked in between."""

    first: Look
    last: Look
    seconds: float
    held: frozenset[Held]

    @property
    def stands_still(self) -> bool:
        """Nobody has committed anything."""
        return self.first.data_version == self.last.data_version


def watch(inspection: Inspection, seconds: float) -> Watched:
    """Look, look at the locks for so long, and look again. Raises StoreError."""
    begun = time.monotonic()
    first = _look(inspection)
    held = [locks_of(inspection.path)]
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _BETWEEN))
        held.append(locks_of(inspection.path))
    last = _look(inspection)
    return Watched(first, last, time.monotonic() - begun, functools.reduce(operator.and_, held))


def _look(inspection: Inspection) -> Look:
    users = users_of(inspection.path)
    with inspection.snapshot():
        return _read(inspection, users)


def _read(inspection: Inspection, users: Mapping[int, Process]) -> Look:
    data_version = int(str(inspection.value("PRAGMA data_version")))
    standing, rows = inspection.ask(Stand()), inspection.ask(WaitingRows())
    known = inspection.ask(Types())
    owners = {(each.subscription, each.lane): each.owner for each in standing.lanes}
    lanes: dict[str, list[LaneLook]] = {}
    held: dict[str, tuple[int, float | None]] = {}
    damaged: dict[str, str] = {}
    for stored in standing.subscriptions:
        try:
            states = inspection.ask(Lanes(stored.name))
        except StoreCorrupt as error:
            damaged[stored.name] = str(error)
            continue
        every = (*states, *unclaimed(stored, {state.lane for state in states}, known))
        lanes[stored.name] = [_lane(inspection, stored, state, owners, known) for state in every]
        if any(row.subscription == stored.name for row in rows):
            held[stored.name] = inspection.ask(LagOfRows(stored.name, types_of(stored, known), MOST))
    return Look(
        at=time.time(),
        data_version=data_version,
        standing=standing,
        leases=inspection.leases(time.monotonic()),
        users=users,
        has_lock=inspection.has_lock,
        rows=rows,
        lanes=lanes,
        held=held,
        dead=inspection.ask(CountDeadLetters()),
        damaged=damaged,
    )


def _lane(
    inspection: Inspection,
    stored: Subscribed,
    state: LaneState,
    owners: Mapping[tuple[str, str], str | None],
    known: Mapping[str, int],
) -> LaneLook:
    behind, oldest = inspection.ask(lag_of(stored, state, known))
    return LaneLook(state, owners.get((stored.name, state.lane)), max(0, behind - len(state.done)), oldest)
