"""The demo's verdict: was anything acknowledged lost, out of order, or missed by a subscription?

Judged from three sources: what the child reported while it ran (`demo_reports`), what the file holds after it has ended, and what
the seed says that each event is. An attempt that the kill cut short has left no report, and is not judged; but whatever the file
counts as handled was reported before. That the disk keeps its word when the power fails is not tried here: a kill ends the
process, not the machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal

import attrs

from eventbus.cli.demo_reports import Attempt, Published, Replayed
from eventbus.cli.demo_shop import ORDER, TAKES, PaymentTaken, ShopEvent, mishap, shop_event


@attrs.frozen
class Stored:
    """An event as found in the file."""

    position: int
    id: str
    event: object


@attrs.frozen
class Run:
    """What one process reported, in the order of its reports."""

    published: Sequence[Published]
    attempts: Sequence[Attempt]


@attrs.frozen
class Evidence:
    """All there is to judge by.

    Attributes:
        runs: before the kill, and after it.
        stored: the log as the file holds it, in order of position.
        dead: dead letters in the file: (subscription, event id).
        lag: what the file says is not settled, by subscription.
        replayed: what the child said about its replay.
    """

    seed: int
    runs: tuple[Run, ...]
    stored: Sequence[Stored]
    dead: frozenset[tuple[str, str]]
    lag: Mapping[str, int]
    replayed: Replayed | None


@attrs.frozen
class Check:
    """One thing that was checked, and what speaks against it."""

    claim: str
    faults: tuple[str, ...]


@attrs.frozen
class Known:
    """The evidence, put in order.

    Attributes:
        acknowledged: the first receipt of each event, by number. numbers: the way back from the id.
        events: what each of them is, by the seed, in the order of publishing.
        live, replayed: attempts, those of each run, and those of the replay.
    """

    evidence: Evidence
    acknowledged: dict[int, Published]
    numbers: dict[str, int]
    events: dict[int, ShopEvent]
    live: tuple[list[Attempt], ...]
    replayed: list[Attempt]

    def wanted(self, subscription: str) -> set[str]:
        """Ids of the acknowledged events that a subscription must get."""
        return {self.acknowledged[n].id for n, event in self.events.items() if isinstance(event, TAKES[subscription])}

    def settled(self, subscription: str) -> set[str]:
        """Ids of the events that a subscription was seen to handle, or whose dead letters the file holds."""
        handled = {a.id for run in self.live for a in run if a.by == subscription and a.outcome == "handled"}
        return handled | {id for name, id in self.evidence.dead if name == subscription}

    def lane(self, attempt: Attempt) -> object:
        """The lane of an attempt, by the shop's own reckoning."""
        number = self.numbers.get(attempt.id)
        if number is None or ORDER[attempt.by] == "log":
            return None
        event = self.events[number]
        return type(event).__name__ if ORDER[attempt.by] == "type" else event.order_id


def known_from(evidence: Evidence) -> Known:
    """Put the evidence in order."""
    published = [report for run in evidence.runs for report in run.published]
    acknowledged: dict[int, Published] = {}
    for report in published:
        acknowledged.setdefault(report.number, report)
    return Known(
        evidence,
        acknowledged,
        numbers={report.id: report.number for report in published},
        events={number: shop_event(evidence.seed, number) for number in sorted(acknowledged)},
        live=tuple([a for a in run.attempts if not a.replaying] for run in evidence.runs),
        replayed=[a for run in evidence.runs for a in run.attempts if a.replaying],
    )


def check(evidence: Evidence) -> list[Check]:
    """Everything that can be said from this evidence, each with what speaks against it."""
    known = known_from(evidence)
    count = len(known.acknowledged)
    claims: list[tuple[str, Callable[[Known], Iterable[str]]]] = [
        (f"nothing lost: each of the {count:,} acknowledged events is in the file once, where its receipt says, unchanged", lost),
        ("nothing extra: the file holds no event, and no handler was given one, that was not acknowledged in the end", extra),
        ("published in order: the events of an order stand in the file as the shop published them", misplaced),
        ("nothing missed: each event was handled, or dead-lettered, by each subscription to its type", missed),
        ("nothing out of order: in each lane deliveries came by position, before the kill, after it, and across it", disordered),
        ("dead letters: those whose mail address was bad, and no others", wrongly_dead),
        ("nothing left: the file says that every subscription has settled everything", left),
        ("replay: the ledger got each of its events again, once, in order, and has the right sum", badly_replayed),
    ]
    return [Check(claim, tuple(find(known))) for claim, find in claims]


def lost(known: Known) -> Iterator[str]:
    """Acknowledged events that the file does not hold as they were published."""
    if not known.acknowledged:
        yield "no event was acknowledged at all"
    stored = {each.id: each for each in known.evidence.stored}
    for run in known.evidence.runs:
        for receipt in run.published:
            found = stored.get(receipt.id)
            if found is None:
                yield f"event {receipt.number} was acknowledged, and is not in the file"
            elif found.position != receipt.position:
                yield f"event {receipt.number} is at {found.position}, its receipt says {receipt.position}"
            elif found.event != known.events[receipt.number]:
                yield f"event {receipt.number} is {found.event} in the file; published was {known.events[receipt.number]}"
            if receipt.id != known.acknowledged[receipt.number].id:
                yield f"event {receipt.number} was stored twice: as {known.acknowledged[receipt.number].id} and as {receipt.id}"


def extra(known: Known) -> Iterator[str]:
    """Events that nobody knows to have been published."""
    for stored in known.evidence.stored:
        if stored.id not in known.numbers:
            yield f"position {stored.position} holds an event that was never acknowledged"
    for run in known.live:
        for attempt in run:
            number = known.numbers.get(attempt.id)
            if number is None:
                yield f"{attempt.by} was given an event at {attempt.position} that was never acknowledged"
            elif not isinstance(known.events[number], TAKES[attempt.by]):
                yield f"{attempt.by} was given event {number}, which is not for it"


def misplaced(known: Known) -> Iterator[str]:
    """Events of an order that are stored in another order than they were published in."""
    last: dict[object, Published] = {}
    for number, event in known.events.items():
        receipt = known.acknowledged[number]
        before = last.get(event.order_id)
        if before is not None and receipt.position <= before.position:
            yield f"event {number} is at {receipt.position}, and {before.number}, published earlier, at {before.position}"
        last[event.order_id] = receipt


def missed(known: Known) -> Iterator[str]:
    """Acknowledged events that a subscription has not got."""
    for name in TAKES:
        for id in sorted(known.wanted(name) - known.settled(name)):
            yield f"{name} has not handled event {known.numbers[id]}"


def disordered(known: Known) -> Iterator[str]:
    """Deliveries that overtook others of their lane.

    A lane begins again where its checkpoint was, so after the kill it may repeat; what must grow is, within each run, the
    position of what it finishes with, and, over both, that of what it meets for the first time (failed attempts included).
    """
    met: dict[tuple[str, object], int] = defaultdict(int)
    seen: set[tuple[str, int]] = set()
    for which, run in zip(("before", "after"), known.live, strict=False):
        finished: dict[tuple[str, object], int] = defaultdict(int)
        for attempt in run:
            lane, position = (attempt.by, known.lane(attempt)), attempt.position
            if position <= finished[lane]:
                yield f"{attempt.by} got {position} after it was done with {finished[lane]}, {which} the kill"
            elif (attempt.by, position) not in seen and position < met[lane]:
                yield f"{attempt.by} first got {position} after {met[lane]}"
            if attempt.final:
                finished[lane] = max(finished[lane], position)
            met[lane] = max(met[lane], position)
            seen.add((attempt.by, position))


def wrongly_dead(known: Known) -> Iterator[str]:
    """Dead letters that should not be, and the other way round."""
    expected = {("mailer", known.acknowledged[n].id) for n, event in known.events.items() if mishap(event).rejected}
    for name, id in sorted(expected - known.evidence.dead):
        yield f"{name} has no dead letter of event {known.numbers[id]}"
    for name, id in sorted(known.evidence.dead - expected):
        yield f"{name} has given up on event {known.numbers.get(id, id)}"


def left(known: Known) -> Iterator[str]:
    """Subscriptions that the file knows to have something unsettled, or does not know."""
    for name in TAKES:
        lag = known.evidence.lag.get(name)
        if lag is None:
            yield f"the file knows no subscription {name}"
        elif lag:
            yield f"{name} has {lag:,} events left"


def badly_replayed(known: Known) -> Iterator[str]:
    """What is wrong with the replay."""
    summary = known.evidence.replayed
    if summary is None:
        yield "the replay did not end"
        return
    wanted = known.wanted(summary.to)
    receipts = sorted(known.acknowledged.values(), key=lambda receipt: receipt.position)
    order = [receipt.id for receipt in receipts if receipt.id in wanted]
    got = [attempt.id for attempt in known.replayed if attempt.by == summary.to]
    if got != order:
        yield f"{summary.to} got {len(got):,} events in the replay; {len(order):,} were to come, in order of position"
    takings = sum((e.amount for e in known.events.values() if isinstance(e, PaymentTaken)), Decimal(0))
    if Decimal(summary.takings) != takings:
        yield f"{summary.to} has added up {summary.takings}; the payments come to {takings}"
