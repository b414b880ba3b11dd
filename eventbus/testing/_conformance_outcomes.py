"""Conformance: outcomes. Lanes, waiting deliveries, dead letters. See `eventbus.testing.conformance`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from eventbus.stores.base import (
    Batch,
    Claim,
    CountDeadLetters,
    DeadLetterFilter,
    DeadLetters,
    Discard,
    Lanes,
    Prune,
    Record,
    Redrive,
    Store,
    Stored,
    Subscriptions,
    Unit,
    Waiting,
)
from eventbus.testing._conformance_base import INSTANCE, NOW, ConformanceBase, death, record, records, stored_part


class Units(ConformanceBase):
    """Outcomes are applied whole or not at all."""

    def test_ack(self, store: Store) -> None:
        """An ack moves the checkpoint, and what the attempt published enters the log with it."""
        state = self.with_lane(store)
        event = record("mail.sent")
        committed = self.settle(store, self.unit(state, 1, published=(event,)))
        assert not committed.refused
        assert self.lane(store).checkpoint == 1
        assert [r.id for r in committed.events] == [event.id]
        assert self.log(store)[-1] == event.id

    def test_order_in_the_batch(self, store: Store) -> None:
        """A batch appends its own events first, then what its units published, in their order."""
        state = self.with_lane(store)
        own, first, second = record(), record(), record()
        units = [self.unit(state, 1, published=(first,)), self.unit(state, 2, published=(second,))]
        committed = store.commit(Batch(NOW, appends=[[own]], units=units))
        assert [r.id for r in committed.events] == self.log(store)[3:] == [own.id, first.id, second.id]

    def test_one_stands_for_all_before_it(self, store: Store) -> None:
        """A unit that settles nothing special settles everything up to its position."""
        state = self.with_lane(store)
        self.settle(store, self.unit(state, 3))
        assert self.lane(store).checkpoint == 3
        assert self.settle(store, self.unit(state, 2)).refused == {0: "settled"}

    def test_a_lane_waits(self, store: Store) -> None:
        """A retry is kept with its lane: attempts, due time, first failure and error; the ack clears them."""
        state = self.with_lane(store)
        retry: dict[str, Any] = {"attempt": 2, "due_at": NOW + 1.25, "first_failed_at": NOW, "error": "ValueError: no stock"}
        self.settle(store, self.unit(state, 1, checkpoint=0, **retry))
        assert self.lane(store) == msgspec.structs.replace(state, **retry)
        self.settle(store, self.unit(state, 1))
        assert self.lane(store) == msgspec.structs.replace(state, checkpoint=1)

    def test_units_that_come_again(self, store: Store) -> None:
        """Of units that are committed twice, since nobody could tell whether they were, none undoes what a later one has settled:
        that one is refused the second time, and what it publishes is in the log once."""
        state = self.with_lane(store, events=3, order="none", concurrency=16)
        waiting = Waiting(1, None, 1, NOW + 9, first_failed_at=NOW)
        first = self.unit(state, 1, checkpoint=1, rows=(waiting,))
        second = self.unit(state, 3, checkpoint=1, done=(3,), published=tuple(records(1)))
        before = self.unit(state, 1, source="row", row=1, checkpoint=1, rows=(waiting,))
        self.settle(store, first)
        self.settle(store, before, second)
        again = self.settle(store, before, second)
        assert again.refused == {1: "settled"}
        assert self.lane(store).done == (3,)
        assert again.head == 4

    def test_unit_done_above_the_checkpoint(self, store: Store) -> None:
        """Positions settled above the checkpoint are kept with the lane."""
        state = self.with_lane(store, order="none", concurrency=16)
        self.settle(store, self.unit(state, 3, checkpoint=0, done=(3,)), self.unit(state, 2, checkpoint=0, done=(2, 3)))
        assert self.lane(store).done == (2, 3)
        assert self.settle(store, self.unit(state, 2, checkpoint=0, done=(2, 3))).refused == {0: "settled"}
        self.settle(store, self.unit(state, 1, checkpoint=3))
        assert (self.lane(store).checkpoint, self.lane(store).done) == (3, ())

    def test_the_checkpoint_never_goes_back(self, store: Store) -> None:
        """A unit with a smaller checkpoint than the stored one leaves it where it is."""
        state = self.with_row(store)
        self.settle(store, self.unit(state, 2, source="row", row=2, checkpoint=1))
        assert self.lane(store).checkpoint == 3

    def test_units_of_a_former_owner(self, store: Store) -> None:
        """A unit of a former owner leaves nothing behind."""
        old = self.with_lane(store)
        new = self.claim(store)
        assert new.epoch > old.epoch
        waiting = Waiting(1, None, 1, NOW)
        unit = self.unit(old, 1, published=(record(idempotency_key="k"),), death=death(), rows=(waiting,), pause="why")
        committed = self.settle(store, unit, self.unit(new, 1))
        assert committed.refused == {0: "fenced"}
        assert (self.lane(store).checkpoint, self.dead(store), self.waiting(store)) == (1, [], [])
        assert len(self.log(store)) == 3
        assert store.read(Subscriptions())[0].paused is None
        assert not self.places(store, record(idempotency_key="k"))[0].duplicate

    def test_a_lane_that_nobody_claimed(self, store: Store) -> None:
        """A unit of a lane that does not exist is refused."""
        self.register(store)
        assert self.settle(store, Unit("mailer", "order.created", 1, "log", 1, 1)).refused == {0: "fenced"}
        assert store.read(Lanes()) == ()

    @pytest.mark.parametrize("source", ["log", "row", "redrive"])
    def test_settled_before(self, store: Store, source: str) -> None:
        """A unit of a delivery that was settled before leaves nothing behind, whatever source it came from."""
        unit = self._unit_of(store, source)
        first = self.settle(store, unit)
        assert first.refused == {}
        before = (store.read(Lanes()), self.dead(store), self.waiting(store))
        late = msgspec.structs.replace(unit, published=(record("twice"),), death=death("Twice"), pause="twice")
        again = self.settle(store, late)
        assert again.refused == {0: "settled"}
        assert before == (store.read(Lanes()), self.dead(store), self.waiting(store))
        assert again.events == []
        assert store.read(Subscriptions())[0].paused is None

    @pytest.mark.parametrize("source", ["log", "row", "redrive"])
    def test_settled_twice_in_a_batch(self, store: Store, source: str) -> None:
        """Of two units for one delivery in one batch the first counts."""
        unit = self._unit_of(store, source)
        committed = self.settle(store, unit, msgspec.structs.replace(unit, published=(record("twice"),)))
        assert (committed.refused, committed.events) == ({1: "settled"}, [])

    def _unit_of(self, store: Store, source: str) -> Unit:
        if source == "log":
            return self.unit(self.with_lane(store), 1)
        if source == "row":
            return self.unit(self.with_row(store), 2, source="row", row=2, checkpoint=3)
        state, letter = self.with_dead_letter(store)
        self.run(store, Redrive(DeadLetterFilter()))
        return self.unit(state, 1, source="redrive", dead_letter=letter.id)

    def test_replays_always_count(self, store: Store) -> None:
        """A unit of a replay is applied though its event was settled long ago, and leaves the lane as it is."""
        state = self.with_lane(store)
        retry: dict[str, Any] = {"attempt": 1, "due_at": NOW + 9}
        self.settle(store, self.unit(state, 2), self.unit(state, 3, checkpoint=2, **retry))
        committed = self.settle(store, self.unit(state, 1, source="replay", checkpoint=2, death=death()))
        assert committed.refused == {}
        assert [letter.record.position for letter in self.dead(store)] == [1]
        assert self.lane(store) == msgspec.structs.replace(state, checkpoint=2, **retry)

    def test_commands_come_first(self, store: Store) -> None:
        """A claim fences the units that are in the same batch."""
        state = self.with_lane(store)
        claim = Claim(INSTANCE.id, (("mailer", "order.created", 0),))
        assert store.commit(Batch(NOW, units=[self.unit(state, 1)], commands=[claim])).refused == {0: "fenced"}

    def test_pause(self, store: Store) -> None:
        """A unit may pause its subscription."""
        state = self.with_lane(store)
        self.settle(store, self.unit(state, 1, checkpoint=0, attempt=3, pause="ValueError: no stock"), now=NOW + 7)
        (subscribed,) = store.read(Subscriptions())
        assert (subscribed.paused, subscribed.paused_at) == ("ValueError: no stock", NOW + 7)

    def test_unit_survives_reopening(self, store: Store) -> None:
        """Lanes and waiting deliveries are there after the store was opened again."""
        self.with_row(store)
        before = (store.read(Lanes()), self.waiting(store))
        self.reopen(store)
        assert (store.read(Lanes()), self.waiting(store)) == before


class PublishedKeys(ConformanceBase):
    """Idempotency keys of events that an attempt published."""

    def test_known(self, store: Store) -> None:
        """A published event whose key is known is left out; the rest of the unit counts."""
        state = self.with_lane(store)
        self.append(store, [record("mail.sent", idempotency_key="k")])
        other = record("other")
        committed = self.settle(store, self.unit(state, 1, published=(record("mail.sent", idempotency_key="k"), other)))
        assert (committed.refused, list(committed.conflicts)) == ({}, [])
        assert [r.id for r in committed.events] == [other.id]
        assert self.lane(store).checkpoint == 1

    def test_used(self, store: Store) -> None:
        """The key of a published event counts from then on."""
        state = self.with_lane(store)
        event = record("mail.sent", idempotency_key="k")
        self.settle(store, self.unit(state, 1, published=(event,)))
        assert self.places(store, record("mail.sent", idempotency_key="k")) == [Stored(event.id, 4, duplicate=True)]

    def test_published_key_conflict(self, store: Store) -> None:
        """If a key belongs to other content the delivery ends as a dead letter, with none of its events; later ones go on."""
        state = self.with_lane(store)
        self.append(store, [record("mail.sent", idempotency_key="k")])
        bad = (record("a"), record("mail.sent", data=b"[]", idempotency_key="k"))
        good = record("b")
        units = [
            self.unit(state, 1, published=bad, conflict=death("IdempotencyConflict")),
            self.unit(state, 2, published=(good,)),
        ]
        committed = self.settle(store, *units)
        assert (committed.refused, list(committed.conflicts)) == ({}, [0])
        assert [r.id for r in committed.events] == [good.id]
        assert [(d.record.position, d.death.error_type) for d in self.dead(store)] == [(1, "IdempotencyConflict")]
        assert self.lane(store).checkpoint == 2

    def test_scheduled(self, store: Store) -> None:
        """A published event with a due time is scheduled."""
        state = self.with_lane(store)
        committed = self.settle(store, self.unit(state, 1, published=(record(due_at=NOW + 60),)))
        assert committed.events == []
        assert len(self.log(store)) == 3


class WaitingDeliveries(ConformanceBase):
    """Rows of deliveries that a checkpoint has passed."""

    def test_waiting_kept(self, store: Store) -> None:
        """A waiting delivery is kept as it was handed in."""
        self.with_row(store)
        (row,) = self.waiting(store)
        assert (row.subscription, row.lane) == ("mailer", "")
        assert row.waiting == Waiting(2, None, 1, NOW + 1, "retrying", NOW, "ValueError: no stock")

    def test_replaced(self, store: Store) -> None:
        """A unit may remove a row and write another, or the same again."""
        state = self.with_row(store)
        later = Waiting(2, None, 2, NOW + 9)
        self.settle(store, self.unit(state, 2, source="row", row=2, checkpoint=3, rows=(later,)))
        assert [row.waiting for row in self.waiting(store)] == [later]
        moved = Waiting(3, "k", 0, NOW)
        self.settle(store, self.unit(state, 2, source="row", row=2, checkpoint=3, rows=(moved,)))
        assert [row.waiting for row in self.waiting(store)] == [moved]

    def test_several_in_a_batch(self, store: Store) -> None:
        """Rows that come and go in one batch end as their last unit left them."""
        state = self.with_row(store)
        again = Waiting(2, None, 2, NOW + 9)
        retry = self.unit(state, 2, source="row", row=2, checkpoint=3, rows=(again,))
        committed = self.settle(store, retry, self.unit(state, 2, source="row", row=2, checkpoint=3))
        assert (committed.refused, self.waiting(store)) == ({}, [])
        committed = self.settle(store, self.unit(state, 4, rows=(Waiting(4, "k", 1, NOW, "running"),)))
        assert [row.waiting.state for row in self.waiting(store, "mailer")] == ["running"]
        assert self.waiting(store, "other") == []


class DeadLettersKept(ConformanceBase):
    """Deliveries given up on."""

    def test_a_copy_of_the_event(self, store: Store) -> None:
        """A dead letter has its own copy of the event, which stays when the log is pruned."""
        state = self.with_lane(store)
        (event,) = self.page(store, limit=1).records
        self.settle(store, self.unit(state, 1, death=death()), self.unit(state, 3))
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert self.log(store) == []
        (letter,) = self.dead(store)
        assert stored_part(letter.record) == stored_part(event)
        assert (letter.subscription, letter.death) == ("mailer", death())
        assert (letter.redriving, letter.attempt, letter.due_at) == (False, 0, None)
        assert dict(store.read(CountDeadLetters())) == {"mailer": 1}

    def test_one_for_each_delivery(self, store: Store) -> None:
        """A delivery that dies again, replayed, brings its dead letter up to date."""
        state, letter = self.with_dead_letter(store)
        self.settle(store, self.unit(state, 1, source="replay", checkpoint=1, death=death("KeyError", attempts=9)))
        (again,) = self.dead(store)
        assert (again.id, again.death.error_type, again.death.attempts) == (letter.id, "KeyError", 9)

    def test_redrive(self, store: Store) -> None:
        """A redrive marks dead letters as due now; those that are marked already are left as they are."""
        _, letter = self.with_dead_letter(store)
        assert self.run(store, Redrive(DeadLetterFilter()), now=NOW + 9) == ("mailer",)
        (marked,) = self.dead(store, redriving=True)
        assert (marked.id, marked.redriving, marked.attempt, marked.due_at) == (letter.id, True, 0, NOW + 9)
        assert self.run(store, Redrive(DeadLetterFilter()), now=NOW + 99) == ()
        assert [(letter.id, letter.due_at) for letter in self.dead(store)] == [(marked.id, NOW + 9)]

    def test_redrive_handled(self, store: Store) -> None:
        """Only the ack of a redriven dead letter deletes it."""
        state, letter = self.with_dead_letter(store)
        self.run(store, Redrive(DeadLetterFilter(ids=(letter.id,))))
        retry = self.unit(state, 1, source="redrive", dead_letter=letter.id, retry=(2, NOW + 4))
        self.settle(store, retry)
        (waiting,) = self.dead(store)
        assert (waiting.redriving, waiting.attempt, waiting.due_at) == (True, 2, NOW + 4)
        event = record("mail.sent")
        committed = self.settle(store, msgspec.structs.replace(retry, retry=None, published=(event,)))
        assert ([r.id for r in committed.events], self.dead(store)) == ([event.id], [])

    def test_redrive_failed(self, store: Store) -> None:
        """A redriven dead letter that dies again stays, with its new error, and can be redriven anew."""
        state, letter = self.with_dead_letter(store)
        self.run(store, Redrive(DeadLetterFilter()))
        end = death("KeyError", attempts=8)
        self.settle(store, self.unit(state, 1, source="redrive", dead_letter=letter.id, death=end))
        (dead,) = self.dead(store)
        assert (dead.id, dead.redriving, dead.death) == (letter.id, False, end)
        assert self.run(store, Redrive(DeadLetterFilter())) == ("mailer",)

    def test_not_redriven(self, store: Store) -> None:
        """A unit of a redrive counts only while the dead letter is being redriven."""
        state, letter = self.with_dead_letter(store)
        committed = self.settle(store, self.unit(state, 1, source="redrive", dead_letter=letter.id))
        assert (committed.refused, len(self.dead(store))) == ({0: "settled"}, 1)

    def test_discard(self, store: Store) -> None:
        """Discarding deletes dead letters, also those being redriven, and tells how many."""
        self.with_dead_letter(store)
        self.run(store, Redrive(DeadLetterFilter()))
        assert self.run(store, Discard(DeadLetterFilter(subscription="nobody"))) == 0
        assert self.run(store, Discard(DeadLetterFilter())) == 1
        assert self.dead(store) == []

    def test_filters(self, store: Store) -> None:
        """Every condition of a filter must hold."""
        events = self._three(store)
        assert self._found(store) == [1, 2, 3]
        assert self._found(store, subscription="b") == [3]
        assert self._found(store, type="order.created") == [1, 3]
        assert self._found(store, type="order.*") == [1, 2, 3]
        assert self._found(store, type="ord.*") == []
        assert self._found(store, type="*", subscription="a") == [1, 2]
        assert self._found(store, error="KeyError") == [2]
        assert self._found(store, since=NOW + 2, until=NOW + 2) == [2]
        assert self._found(store, event_id=events[2].id) == [3]
        assert self._found(store, ids=()) == []
        assert self._found(store, redriving=True) == []

    def test_pages(self, store: Store) -> None:
        """Dead letters come by id, after one and up to so many."""
        self._three(store)
        first, second, third = (letter.id for letter in self.dead(store))
        assert [d.id for d in store.read(DeadLetters(DeadLetterFilter(), limit=2))] == [first, second]
        assert [d.id for d in store.read(DeadLetters(DeadLetterFilter(), after=second))] == [third]
        assert self.run(store, Discard(DeadLetterFilter(ids=(first, third)))) == 2

    def _three(self, store: Store) -> list[Record]:
        events = [record("order.created"), record("order.paid"), record("order.created")]
        self.append(store, events)
        for name in "ab":
            self.register(store, name, ("*",), order="log")
        a, b = self.claim(store, "a", ""), self.claim(store, "b", "")
        ends = [death("ValueError", last_failed_at=NOW + 1), death("KeyError", last_failed_at=NOW + 2)]
        self.settle(store, self.unit(a, 1, death=ends[0]), self.unit(a, 2, death=ends[1]))
        self.settle(store, self.unit(b, 3, death=death("ValueError", last_failed_at=NOW + 3)))
        return events

    def _found(self, store: Store, **conditions: object) -> list[int]:
        return [letter.record.position for letter in self.dead(store, **conditions)]

    def test_dead_letter_many(self, store: Store) -> None:
        """A batch may end a thousand deliveries."""
        state = self.with_lane(store, events=0)
        self.append(store, records(1_000))
        self.settle(store, *(self.unit(state, position, death=death()) for position in range(1, 1_001)))
        assert dict(store.read(CountDeadLetters())) == {"mailer": 1_000}
