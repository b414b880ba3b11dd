"""What really happened, as the store and the handlers saw it, and whether that is as promised.

publish → journal → store → lanes → workers → outcome, looked at from outside: what was acknowledged, what is stored, what was handed
to handlers, in what order. What is found wrong is a sentence in `faults`; all that happened is a line in `trace`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import attrs

from eventbus import Delivery, Envelope, Receipt
from eventbus._outcomes import current_attempt
from eventbus.stores.base import Batch, Committed, Record, Register, Rewind, Unsubscribe, lane_name, since_of
from tests.simulation.clockwork import Scheduler
from tests.simulation.disk import Disk

Name = str


@attrs.define
class Truth:
    """Everything there is to know about one run; it outlives crashes."""

    disk: Disk
    scheduler: Scheduler | None = None
    faults: list[str] = attrs.field(factory=list)
    trace: list[str] = attrs.field(factory=list)
    log: dict[str, Record] = attrs.field(factory=dict)  # everything that was ever in the log, by the event's name
    acknowledged: dict[str, Receipt] = attrs.field(factory=dict)
    refused: dict[str, str] = attrs.field(factory=dict)
    unknown: set[str] = attrs.field(factory=set)
    cancelled: set[str] = attrs.field(factory=set)  # ids of scheduled events
    handled: dict[tuple[Name, str], int] = attrs.field(factory=collections.Counter)
    attempts: dict[tuple[Name, str], int] = attrs.field(factory=collections.Counter)
    started: dict[Name, set[int]] = attrs.field(factory=dict)
    newest: dict[tuple[Name, str], int] = attrs.field(factory=dict)  # by lane or key: position of the last first delivery
    rewinds: dict[Name, int] = attrs.field(factory=collections.Counter)
    generations: dict[Name, int] = attrs.field(factory=dict)
    discarded: set[tuple[Name, str]] = attrs.field(factory=set)
    _head: int = 0

    def note(self, line: str) -> None:
        """A line of the trace."""
        now = 0.0 if self.scheduler is None else self.scheduler.now
        self.trace.append(f"{now:10.4f} {line}")

    def wrong(self, what: str) -> None:
        """Something is not as promised."""
        self.note(f"WRONG {what}")
        if len(self.faults) < 20:
            self.faults.append(what)

    # -------------------------------------------------------------- publishing

    def publishes(self, names: Iterable[str]) -> None:
        """These are about to be published; until it is known better, nobody knows."""
        self.unknown.update(names)

    def published(self, name: str, receipt: Receipt) -> None:
        """A receipt has come back: by now the event must be in the store."""
        self.note(f"published {name} at {receipt.position}{' again' if receipt.duplicate else ''}")
        self.unknown.discard(name)
        if receipt.duplicate:
            return
        self.acknowledged[name] = receipt
        there = receipt.id in self.disk.scheduled or (name in self.log and self.log[name].id == receipt.id)
        if not there and receipt.id not in self.cancelled:
            self.wrong(f"{name} was acknowledged and is not in the store")

    def definitely_not(self, names: Iterable[str], why: Exception) -> None:
        """An error that promises that nothing of it is stored."""
        for name in names:
            self.note(f"refused {name}: {why!r}")
            self.unknown.discard(name)
            self.refused[name] = repr(why)

    # -------------------------------------------------------------- the store

    def took_place(self, batch: Batch, committed: Committed) -> None:
        """A transaction is durable."""
        for event in committed.events:
            name = name_of(event)
            self.note(f"stored {name} at {event.position}")
            if event.position <= self._head:
                self.wrong(f"position {event.position} was given again, to {name}")
            if name in self.log:
                self._stored_again(name, event)
            self._head = event.position
            self.log.setdefault(name, event)
        for index, unit in enumerate(batch.units):
            end = committed.refused.get(index, "settled" if unit.death is None else "dead")
            self.note(f"  {unit.subscription}/{unit.lane} {unit.source} {unit.position} → {unit.checkpoint} {end}")
            if end == "fenced":
                self.forget_order(unit.subscription)  # it began in a lane that was another's already, or began anew
        for command, result in zip(batch.commands, committed.results, strict=True):
            self.note(f"  {type(command).__name__}")
            if isinstance(command, Register) and isinstance(result, tuple):
                for each in result:
                    if self.generations.get(each.name) != each.generation:  # lanes begin anew, perhaps with types that came back
                        self.generations[each.name] = each.generation
                        self.forget_order(each.name)
            if isinstance(command, Rewind | Unsubscribe):
                self.rewinds[command.subscription] += 1
                self.forget_order(command.subscription)
                if isinstance(command, Unsubscribe):
                    self.started.pop(command.subscription, None)

    def _stored_again(self, name: str, event: Record) -> None:
        """Only what a handler publishes may come again: if its subscription was rewound; and then what follows from that."""
        first, (_, *parents) = self.log[name], name.split(">")
        if not any(self.rewinds[parent] for parent in parents):
            self.wrong(f"{name} is stored twice, at {first.position} and {event.position}")

    # -------------------------------------------------------------- handlers

    def begins(self, subscription: Name, delivery: Delivery, name: str) -> int:
        """An attempt begins; returns which one it is, counted over everything."""
        envelope = delivery.envelope
        self.attempts[subscription, name] += 1
        number = self.attempts[subscription, name]
        again = " replaying" if delivery.replaying else ""
        self.note(f"{subscription} begins {name} at {envelope.position}, attempt {delivery.attempt} ({number}){again}")
        if not delivery.replaying and not self._is_redriven(subscription, envelope.id):
            self._is_due(subscription, envelope.position, name)
            self._is_in_order(subscription, envelope, name)
        return number

    def _is_redriven(self, subscription: Name, id: str) -> bool:
        letters = self.disk.letters.values()
        return any(each.redriving and (each.subscription, each.record.id) == (subscription, id) for each in letters)

    def _is_due(self, subscription: Name, position: int, name: str) -> None:
        disk = self.disk
        known, event = disk.subscriptions.get(subscription), disk.log.get(position)
        if known is None or (subscription, name) in self.discarded:
            return  # what is being redriven when it is discarded may still be begun; it is refused then
        if event is None or not (disk.is_unsettled(known, event) or disk.is_waited_for(known, event)):
            self.wrong(f"{subscription} is given {name} at {position}, which the store says is settled")

    def _is_in_order(self, subscription: Name, event: Envelope, name: str) -> None:
        started = self.started.setdefault(subscription, set())
        position, known = event.position, self.disk.subscriptions.get(subscription)
        if position in started or known is None or known.order == "none":
            started.add(position)
            return
        started.add(position)
        if known.order == "key":
            place = f"key {event.key}" if event.key is not None else f"event {event.id}"
        else:
            place = lane_name(known.order, known.concurrency, event.type, 0)
        if self._is_fenced(subscription):
            return  # its lane was rewound elsewhere, which the instance has not noticed yet: it comes again in its turn
        if self.newest.get((subscription, place), 0) > position:
            self.wrong(f"{subscription} is first given {name} at {position} after {self.newest[subscription, place]}")
        self.newest[subscription, place] = max(position, self.newest.get((subscription, place), 0))

    def _is_fenced(self, subscription: Name) -> bool:
        attempt = current_attempt.get()
        assert attempt is not None
        stored = self.disk.lanes.get((subscription, attempt.lane.name))
        return stored is None or stored.state.epoch > attempt.epoch

    def forget_order(self, subscription: Name) -> None:
        """From here on the order is another, or begins anew."""
        for place in [each for each in self.newest if each[0] == subscription]:
            del self.newest[place]

    def succeeded(self, subscription: Name, name: str, *, replaying: bool) -> None:
        """A handler has come to a good end."""
        self.note(f"{subscription} has handled {name}")
        if not replaying:
            self.handled[subscription, name] += 1

    # -------------------------------------------------------------- the end

    def judge(self) -> None:
        """All has been made good and worked off: is it as promised?"""
        for name, receipt in self.acknowledged.items():
            if name not in self.log and receipt.id not in self.cancelled:
                self.wrong(f"{name} was acknowledged and is lost")
        for name, why in self.refused.items():
            if name in self.log:
                self.wrong(f"{name} was refused ({why}) and is stored all the same")
        for subscribed in self.disk.subscriptions.values():
            for name, event in self.log.items():
                start = since_of(subscribed.since, event.type)
                if start is None or event.position <= start:
                    continue
                place = (subscribed.name, name)
                if not self.handled[place] and place not in self.discarded:
                    self.wrong(f"{subscribed.name} has never handled {name} at {event.position}")
                if event.position in self.disk.log and self.disk.is_unsettled(subscribed, event):
                    self.wrong(f"{subscribed.name} has not settled {name} at {event.position}")
        for row in self.disk.rows.values():
            if row.waiting.state == "freed":
                continue  # nothing came after the dead letter that was its last
            self.wrong(f"{row.subscription} still waits for {row.waiting.position}")
        for letter in self.disk.letters.values():
            self.wrong(f"{letter.subscription} still has a dead letter: {name_of(letter.record)}")

    def judge_chains(self, owed: Iterable[tuple[Name, str, str]]) -> None:
        """Of each (subscription, event, what it publishes): it is there if it was handled."""
        for subscription, name, child in owed:
            if self.handled[subscription, name] and (subscription, name) not in self.discarded and child not in self.log:
                self.wrong(f"{subscription} has handled {name}, and {child} was not published with it")


def name_of(event: Record) -> str:
    """The name of a simulated event: its first field."""
    return event.data.split(b'"')[3].decode()
