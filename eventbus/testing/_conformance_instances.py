"""Conformance: several instances on one store. See `eventbus.testing.conformance`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from eventbus.stores.base import (
    Beat,
    Claim,
    DeadLetterFilter,
    Discard,
    Instance,
    Lanes,
    LaneState,
    Mark,
    Marking,
    Pause,
    Prune,
    Release,
    Revive,
    Revived,
    Rewind,
    Serves,
    Stand,
    Store,
    Suspect,
    Suspicion,
    Suspicions,
    Unsubscribe,
    Waiting,
    WaitingRows,
)
from eventbus.testing._conformance_base import INSTANCE, NOW, OTHER, ConformanceBase, Shared, death, records


class Instances(Shared):
    """Several instances, and who has which lane."""

    def test_beat(self, store: Store) -> None:
        """An instance that shows itself is new, or known; it may leave, also one that nobody knows."""
        assert [self.beat(store, INSTANCE), self.beat(store, INSTANCE)] == [False, True]
        assert [member.instance for member in store.read(Stand()).members] == [INSTANCE]
        for _ in range(2):
            self.run(store, Beat(INSTANCE, leaving=True))
        assert store.read(Stand()).members == ()
        assert self.beat(store, INSTANCE) is False

    def test_what_an_instance_says_of_itself(self, store: Store) -> None:
        """What it serves and holds is there for the others."""
        serves = {"mailer": Serves("key", 16, ("a", "b.*"), ("3",))}
        self.beat(store, INSTANCE, serves=serves, holds=("mailer",))
        (member,) = store.read(Stand()).members
        assert (member.serves, member.holds, member.seen) == (serves, ("mailer",), NOW)

    def test_a_lease_that_has_ended(self, store: Store) -> None:
        """An instance whose lease has ended is removed by the next one that shows itself, and is told so when it comes back."""
        self.beat(store, OTHER, monotonic=100.0, lease=5.0)
        self.beat(store, INSTANCE, monotonic=104.0)
        assert len(store.read(Stand()).members) == 2
        self.beat(store, INSTANCE, monotonic=106.0)
        assert [member.instance.id for member in store.read(Stand()).members] == [INSTANCE.id]
        assert self.beat(store, OTHER, monotonic=107.0) is False

    def test_claim_of_what_another_has(self, store: Store) -> None:
        """A lane of an instance that is alive is not given away; that of one that has left or died is, with the next epoch."""
        self.register(store)
        self.beat(store, OTHER, monotonic=100.0, lease=5.0)
        self.beat(store, INSTANCE, monotonic=100.0)
        lane = (("mailer", "order.created", 0),)
        (held,) = self.run(store, Claim(OTHER.id, lane))
        assert held is not None
        assert self.run(store, Claim(INSTANCE.id, lane)) == (None,)
        self.beat(store, INSTANCE, monotonic=106.0)
        (claimed,) = self.run(store, Claim(INSTANCE.id, lane))
        assert claimed is not None
        assert claimed.epoch > held.epoch
        self.append(store, records(1))
        assert self.settle(store, self.unit(held, 1), self.unit(claimed, 1)).refused == {0: "fenced"}

    def test_release(self, store: Store) -> None:
        """A lane that is released is free; only its owner releases it."""
        self.register(store)
        for each in (OTHER, INSTANCE):
            self.beat(store, each)
        lane = (("mailer", "order.created", 0),)
        self.run(store, Claim(OTHER.id, lane))
        self.run(store, Release(INSTANCE.id, (lane[0][:2],)))
        assert self.run(store, Claim(INSTANCE.id, lane)) == (None,)
        self.run(store, Release(OTHER.id, (lane[0][:2],)))
        assert [each.owner for each in store.read(Stand()).lanes] == [None]
        assert self.run(store, Claim(INSTANCE.id, lane)) != (None,)
        assert [each.owner for each in store.read(Stand()).lanes] == [INSTANCE.id]

    def test_who_leaves_gives_back(self, store: Store) -> None:
        """The lanes of an instance that leaves are free."""
        self.register(store)
        self.beat(store, OTHER)
        self.run(store, Claim(OTHER.id, (("mailer", "order.created", 0),)))
        self.run(store, Beat(OTHER, leaving=True))
        assert [each.owner for each in store.read(Stand()).lanes] == [None]

    def test_claim_in_another_generation(self, store: Store) -> None:
        """Who relies on another generation of a subscription than is stored gets no lane of it."""
        known = self.register(store)
        lane = (("mailer", "order.created", 0),)
        assert self.run(store, Claim(INSTANCE.id, lane, {"mailer": known.generation - 1})) == (None,)
        assert self.run(store, Claim(INSTANCE.id, lane, {"mailer": known.generation})) != (None,)

    def test_changes_are_counted(self, store: Store) -> None:
        """What others are to notice counts up; the way of an event does not."""
        state = self.with_lane(store, events=1)
        seen = [store.read(Stand()).changes]

        def count() -> bool:
            seen.append(store.read(Stand()).changes)
            return seen[-1] > seen[-2]

        self.append(store, records(1))
        self.settle(store, self.unit(state, 1))
        self.beat(store, INSTANCE)
        assert count()
        self.beat(store, INSTANCE)
        assert not count()
        for command in (Pause("mailer", "x"), Pause("mailer", None), Rewind("mailer", 0), Unsubscribe("mailer")):
            self.run(store, command)
            assert count()


class OnProbation(Shared):
    """Lanes whose owner has died."""

    def _dies(self, store: Store, *marks: Mark) -> tuple[Suspicion, ...]:
        """Another instance owns the lane, has begun these, and its process dies. Then there is another one of that name."""
        self._works(store, *marks)
        return self._end(store)

    def _end(self, store: Store) -> tuple[Suspicion, ...]:
        if self._second is not None:
            self._second.close()  # where no store can tell, the end of the lease stands for the death
        self.beat(store, INSTANCE, monotonic=106.0)
        if self._second is not None:
            self._second.open(OTHER)
        return store.read(Suspicions())

    def _works(self, store: Store, *marks: Mark) -> LaneState:
        self.beat(store, OTHER, monotonic=100.0, lease=5.0)
        (state,) = self.run(store, Claim(OTHER.id, (("mailer", "order.created", 0),)))
        assert state is not None
        if marks:
            assert self._note(store, OTHER, state, begun=marks)
        return state

    def _note(self, store: Store, who: Instance, state: LaneState, **parts: Any) -> bool:
        """Note what is going on in a lane."""
        return self.run(store, Marking(who.id, state.subscription, state.lane, state.epoch, **parts))

    def test_a_death_raises_suspicion(self, store: Store) -> None:
        """The lanes of an instance that dies are on probation, with what it had marked; those of one that leaves are not."""
        self.register(store)
        assert self._dies(store) == (Suspicion("mailer", "order.created", 1),)
        mark = Mark(3)
        assert self._dies(store, mark) == (Suspicion("mailer", "order.created", 2, (Suspect(3, 0),)),)

    def test_a_lease_that_has_ended_is_no_death(self, store: Store) -> None:
        """An instance that is stopped, or hangs, loses its lanes when its lease has ended. It has not died: nothing is suspected,
        and what was suspected before is charged with nothing."""
        if self._second is None or not self.tells_deaths:
            pytest.skip("this store cannot tell who has died")
        self.register(store)
        marks = (Mark(3, alone=True), Mark(4))
        self._works(store, *marks)
        self.beat(store, INSTANCE, monotonic=106.0)
        assert [each.owner for each in store.read(Stand()).lanes] == [None]
        assert store.read(Suspicions()) == ()
        before = self._dies(store, *marks)
        assert before == (Suspicion("mailer", "order.created", 1, (Suspect(3, 1), Suspect(4, 0))),)
        self._works(store, *marks, Mark(5))
        self.beat(store, INSTANCE, monotonic=106.0)
        assert store.read(Suspicions()) == before
        self._works(store)
        self.run(store, Beat(OTHER, leaving=True))
        assert store.read(Suspicions()) == before

    def test_what_is_over_is_not_suspected(self, store: Store) -> None:
        """A mark that was removed before the death is none."""
        self.register(store)
        state = self._works(store, Mark(3))
        assert self._note(store, OTHER, state, over=(3,))
        assert self._end(store) == (Suspicion("mailer", "order.created", 1),)

    def test_only_what_was_alone_is_charged(self, store: Store) -> None:
        """A death is charged to what was alone, and adds up."""
        self.register(store)
        for deaths in (1, 2):
            (found,) = self._dies(store, Mark(3, alone=True), Mark(4))
            assert found.marks == (Suspect(3, deaths), Suspect(4, 0))

    def test_who_leaves_is_not_suspected(self, store: Store) -> None:
        """An instance that leaves takes its marks along, but for what was suspected before; that is charged with nothing."""
        self.register(store)
        self._dies(store, Mark(3))
        marks = (Mark(3, alone=True), Mark(4))
        self._note(store, INSTANCE, self.claim(store), begun=marks)
        self.run(store, Beat(INSTANCE, leaving=True))
        assert store.read(Suspicions()) == (Suspicion("mailer", "order.created", 1, (Suspect(3, 0),)),)

    def test_cleared(self, store: Store) -> None:
        """A lane that is cleared is not on probation, and nothing in it is suspected."""
        self.register(store)
        self._dies(store, Mark(3))
        self._note(store, INSTANCE, self.claim(store), cleared=True)
        self.run(store, Beat(INSTANCE, leaving=True))
        assert store.read(Suspicions()) == ()
        assert self._dies(store) == (Suspicion("mailer", "order.created", 1),)

    def test_what_is_noted_in_another_epoch_is_left_out(self, store: Store) -> None:
        """Who had a lane before, and goes on after it was stopped, changes nothing of what its owner has noted there."""
        self.register(store)
        before = self._works(store)
        self._end(store)
        state = self._works(store, Mark(3, alone=True))
        for parts in ({"begun": (Mark(3), Mark(4))}, {"over": (3,)}, {"cleared": True}):
            assert not self._note(store, INSTANCE, before, **parts)
        unknown = msgspec.structs.replace(state, lane="other")
        assert not self._note(store, INSTANCE, unknown, over=(3,))
        assert self._end(store) == (Suspicion("mailer", "order.created", 2, (Suspect(3, 1),)),)

    def test_a_lane_that_is_claimed_again(self, store: Store) -> None:
        """What was begun there before is not suspected when the process dies later; what had been suspected is not charged."""
        self.register(store)
        self._dies(store, Mark(3))
        self._works(store, Mark(3, alone=True), Mark(4, alone=True))
        assert self._dies(store) == (Suspicion("mailer", "order.created", 2, (Suspect(3, 0),)),)


class Reviving(ConformanceBase):
    """Taking back what failed attempts have left behind."""

    def test_a_strict_lane_goes_back(self, store: Store) -> None:
        """Dead letters go, and the lane stands before the first of them, in the next epoch, with the attempts it had."""
        state = self.with_lane(store, events=4)
        self.settle(store, self.unit(state, 1), self.unit(state, 2, death=death()), self.unit(state, 3, death=death()))
        deliveries = tuple(Revived("order.created", state.epoch, *each) for each in ((3, None, 0), (2, None, 1)))
        (lane,) = self.run(store, Revive(INSTANCE.id, "mailer", deliveries))
        assert (lane.epoch, lane.checkpoint, lane.attempt, lane.due_at) == (state.epoch + 1, 1, 1, None)
        assert (self.dead(store), store.read(Lanes())) == ([], (lane,))
        assert self.settle(store, self.unit(state, 4)).refused == {0: "fenced"}

    def test_without_order_each_gets_a_row(self, store: Store) -> None:
        """What the checkpoint has passed, or what is done above it, waits in a row, due now."""
        state = self.with_lane(store, events=4, order="none", concurrency=16)
        self.settle(
            store,
            self.unit(state, 1, death=death()),
            self.unit(state, 3, checkpoint=1, done=(3,), death=death()),
        )
        deliveries = tuple(Revived("", state.epoch, *each) for each in ((1, None, 0), (3, None, 2), (4, None, 0)))
        self.run(store, Revive(INSTANCE.id, "mailer", deliveries))
        rows = [
            (row.waiting.position, row.waiting.key, row.waiting.attempt, row.waiting.due_at) for row in store.read(WaitingRows())
        ]
        assert rows == [(1, None, 0, NOW), (3, None, 2, NOW)]
        assert self.dead(store) == []

    def test_a_key_gets_one_row(self, store: Store) -> None:
        """At its first position; a row that stood further on goes."""
        self.register(store, order="key", concurrency=1)
        self.append(store, records(3, key="k"))
        state = self.claim(store, lane="0")
        waiting = Waiting(2, "k", 3, NOW + 9)
        self.settle(store, self.unit(state, 1, death=death()), self.unit(state, 2, rows=(waiting,)))
        deliveries = tuple(Revived("0", state.epoch, *each) for each in ((1, "k", 0), (2, "k", 2)))
        self.run(store, Revive(INSTANCE.id, "mailer", deliveries))
        (row,) = store.read(WaitingRows())
        assert (row.waiting.position, row.waiting.key, row.waiting.attempt) == (1, "k", 0)

    def test_a_key_that_waits_already(self, store: Store) -> None:
        """A row that stands further back stays: it stands for what comes after it as well."""
        self.register(store, order="key", concurrency=1)
        self.append(store, records(3, key="k"))
        state = self.claim(store, lane="0")
        waiting = Waiting(1, "k", 3, NOW + 9)
        self.settle(store, self.unit(state, 2, rows=(waiting,)))
        self.run(store, Revive(INSTANCE.id, "mailer", (Revived("0", state.epoch, 2, "k", 0),)))
        assert [row.waiting for row in store.read(WaitingRows())] == [waiting]

    def test_what_was_discarded_stays_settled(self, store: Store) -> None:
        """A lane goes back behind the last delivery of which the dead letter is gone: what came before that stays dead."""
        state = self.with_lane(store, events=4)
        self.settle(store, *(self.unit(state, position, death=death()) for position in (1, 2, 3)))
        self.run(store, Discard(DeadLetterFilter(ids=(self.dead(store)[1].id,))))
        deliveries = tuple(Revived("order.created", state.epoch, position, None, 0) for position in (1, 2, 3))
        (lane,) = self.run(store, Revive(INSTANCE.id, "mailer", deliveries))
        assert (lane.epoch, lane.checkpoint) == (state.epoch + 1, 2)
        assert [letter.record.position for letter in self.dead(store)] == [1]

    def test_what_was_discarded_without_order(self, store: Store) -> None:
        """Each for itself; a lane of which nothing is left to take back stays as it is, and is told of all the same."""
        state = self.with_lane(store, events=2, order="none", concurrency=16)
        self.settle(store, *(self.unit(state, position, death=death()) for position in (1, 2)))
        first, second = (Revived("", state.epoch, position, None, 0) for position in (1, 2))
        self.run(store, Discard(DeadLetterFilter(ids=(self.dead(store)[0].id,))))
        (lane,) = self.run(store, Revive(INSTANCE.id, "mailer", (first,)))
        assert (lane.epoch, store.read(Lanes()), store.read(WaitingRows())) == (state.epoch, (lane,), ())
        self.run(store, Revive(INSTANCE.id, "mailer", (first, second)))
        assert [row.waiting.position for row in store.read(WaitingRows())] == [2]

    def test_what_was_discarded_of_a_key(self, store: Store) -> None:
        """The key goes on behind it: at the row that was freed, or the next delivery that failed."""
        self.register(store, order="key", concurrency=1)
        self.append(store, records(3, key="k"))
        state = self.claim(store, lane="0")
        first, second = (Revived("0", state.epoch, position, "k", 0) for position in (1, 2))
        self.settle(store, self.unit(state, 1, death=death(), rows=(Waiting(1, "k", 0, NOW, "parked"),)))
        self.run(store, Discard(DeadLetterFilter()))
        self.run(store, Revive(INSTANCE.id, "mailer", (first,)))
        assert [(row.waiting.position, row.waiting.state) for row in store.read(WaitingRows())] == [(1, "freed")]
        retrying = self.unit(state, 2, source="row", row=1, rows=(Waiting(2, "k", 1, NOW + 9),))
        self.settle(store, retrying)
        self.run(store, Revive(INSTANCE.id, "mailer", (first, second)))
        (row,) = store.read(WaitingRows())
        assert (row.waiting.position, row.waiting.attempt, row.waiting.due_at) == (2, 0, NOW)

    def test_reviving_twice(self, store: Store) -> None:
        """Given again, as when nobody could tell whether it was written, it changes nothing, and the result says so."""
        state = self.with_lane(store, events=1)
        self.settle(store, self.unit(state, 1, death=death()))
        command = Revive(INSTANCE.id, "mailer", (Revived("order.created", state.epoch, 1, None, 0),))
        (lane,) = self.run(store, command)
        assert self.run(store, command) == ()
        assert store.read(Lanes()) == (lane,)

    def test_what_is_gone_stays_dead(self, store: Store) -> None:
        """A dead letter whose event is not in the log any more is left alone; so are lanes of others, and in another epoch."""
        state = self.with_lane(store, events=1)
        self.settle(store, self.unit(state, 1, death=death()))
        first, before = (Revived("order.created", epoch, 1, None, 0) for epoch in (state.epoch, state.epoch - 1))
        assert self.run(store, Revive(OTHER.id, "mailer", (first,))) == ()
        assert self.run(store, Revive(INSTANCE.id, "mailer", (before,))) == ()
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert self.run(store, Revive(INSTANCE.id, "mailer", (first,))) == store.read(Lanes())
        assert len(self.dead(store)) == 1
