"""What the demo's child tells its parent: one JSON object a line, written to a pipe at once, after the fact.

A handler reports *before* it returns, so nothing can be acknowledged to the store that the parent has not been told of: what was
written to a pipe outlives its writer. An acknowledgement is reported after `publish` has returned.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Literal

import attrs
import msgspec

from eventbus.cli.demo_shop import TAKES, ShopEvent

Outcome = Literal["handled", "failed", "rejected"]


class Published(msgspec.Struct, frozen=True, tag_field="did", tag="published"):
    """`publish` has returned for event `number`. `began`, `at`: seconds of the monotonic clock, at the call and after it."""

    number: int
    id: str
    position: int
    duplicate: bool
    began: float
    at: float


class Attempt(msgspec.Struct, frozen=True, tag_field="did", tag="attempt"):
    """A handler is done with an attempt and about to return, or to raise."""

    by: str
    id: str
    position: int
    attempt: int
    outcome: Outcome
    replaying: bool
    at: float

    @property
    def final(self) -> bool:
        """It will not be tried again."""
        return self.outcome != "failed"


class Opened(msgspec.Struct, frozen=True, tag_field="did", tag="opened"):
    """The bus is open and has recovered."""


class AllPublished(msgspec.Struct, frozen=True, tag_field="did", tag="all published"):
    """Nothing more will be published: it is all, or it has taken too long."""


class Drained(msgspec.Struct, frozen=True, tag_field="did", tag="drained"):
    """`drain` has returned; `left` is what it returned."""

    left: dict[str, int]


class Replayed(msgspec.Struct, frozen=True, tag_field="did", tag="replayed"):
    """The replay has returned. `takings`: what the ledger has added up from it."""

    to: str
    events: int
    seconds: float
    takings: str


class Closed(msgspec.Struct, frozen=True, tag_field="did", tag="closed"):
    """The bus is closed."""


Report = Published | Attempt | Opened | AllPublished | Drained | Replayed | Closed

_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
_encode = msgspec.json.Encoder().encode


def tell(report: Report) -> None:
    """Write a report to standard output, in one system call: from several threads the lines stay whole."""
    try:
        os.write(1, _encode(report) + b"\n")
    except BrokenPipeError:  # nobody is listening any more
        os._exit(1)


def read(line: bytes) -> Report:
    """The report in a line."""
    return _decoder.decode(line)


@attrs.define
class Tally:
    """Counts the reports as they come in, for the progress line and for the moment of the kill.

    Attributes:
        acknowledged: numbers of events.
        unheard: events that were in the file already when they were sent again, and whose first acknowledgement never came.
        owed: deliveries of acknowledged events that no handler has finished with, as (subscription, position).
        settled, retried, dead: deliveries, each counted once, replays not.
    """

    acknowledged: set[int] = attrs.field(factory=set)
    unheard: int = 0
    owed: set[tuple[str, int]] = attrs.field(factory=set)
    settled: set[tuple[str, int]] = attrs.field(factory=set)
    retried: set[tuple[str, int]] = attrs.field(factory=set)
    handled: Counter[str] = attrs.field(factory=Counter)
    dead: int = 0

    def acknowledge(self, receipt: Published, event: ShopEvent) -> None:
        """Count an acknowledgement."""
        if receipt.number in self.acknowledged:
            return
        self.unheard += receipt.duplicate
        self.acknowledged.add(receipt.number)
        takers = {(name, receipt.position) for name, types in TAKES.items() if isinstance(event, types)}
        self.owed |= takers - self.settled

    def attempted(self, attempt: Attempt) -> None:
        """Count an attempt."""
        delivery = (attempt.by, attempt.position)
        if attempt.replaying or delivery in self.settled:
            return
        if not attempt.final:
            self.retried.add(delivery)
            return
        self.settled.add(delivery)
        self.owed.discard(delivery)
        self.handled[attempt.by] += attempt.outcome == "handled"
        self.dead += attempt.outcome == "rejected"
