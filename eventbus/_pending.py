"""What the journal's next commit takes: groups of records, outcomes and commands, and who waits for them.

publish → *journal* → store → lanes → workers → outcome → *journal*. Callers put in, the writer's thread takes all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from eventbus.stores.base import Command, Record, Refusal, Unit


class Settling(Protocol):
    """Who sends units: a lane."""

    def confirmed(self, unit: Unit, serial: int, refusal: Refusal | None, *, conflict: bool) -> None:
        """What became of a unit."""


class Ticket(msgspec.Struct, eq=False):
    """A caller who waits: for a group of records, or for a command. `kept`: the command is not given up with a failed commit."""

    decided: Callable[[], object]
    records: Sequence[Record] = ()
    command: Command[object] | None = None
    kept: bool = False
    result: object = None


class Pending(msgspec.Struct, eq=False):
    """What the next commit takes."""

    appends: list[Ticket] = []
    commands: list[Ticket] = []
    again: list[Ticket] = []  # submitted commands that could not be written before
    units: list[tuple[Settling, Unit, int]] = []
    last: dict[tuple[Settling, int], int] = {}  # index in units of the newest of each lane in an epoch, for coalescing
    jobs: list[Callable[[], object]] = []
    urgent: bool = False  # outcomes go at once
    rides: bool = False  # … or with whatever else is next

    def add(self, lane: Settling, unit: Unit, serial: int) -> None:
        """Add an outcome. It stands for the lane's last one as well if both say no more than where the checkpoint is; not for
        that of a lane of the same name which was lost, or in another epoch: what becomes of that one is another matter."""
        key = (lane, unit.epoch)
        last = self.last.get(key)
        if last is not None and is_plain(unit) and is_plain(self.units[last][1]):
            self.units[last] = (lane, unit, serial)
        else:
            self.last[key] = len(self.units)
            self.units.append((lane, unit, serial))


def is_plain(unit: Unit) -> bool:
    """Whether a unit says no more than where the lane's checkpoint is, so that a later one can stand for it."""
    return (
        unit.source == "log"
        and unit.attempt == 0
        and unit.death is None
        and unit.pause is None
        and not unit.rows
        and not unit.published
    )
