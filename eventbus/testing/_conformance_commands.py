"""Conformance: commands. Subscriptions, claims, rewind, retention. See `eventbus.testing.conformance`."""

from __future__ import annotations

import pytest

from eventbus.errors import UnknownSubscription
from eventbus.stores.base import (
    Batch,
    Claim,
    DeadLetterFilter,
    Lanes,
    LaneState,
    LogState,
    Pause,
    Prune,
    Redrive,
    Register,
    Registration,
    Rewind,
    Store,
    Subscriptions,
    Unsubscribe,
    Waiting,
    slot_of,
)
from eventbus.testing._conformance_base import INSTANCE, NOW, ConformanceBase, death, record, records


class Commands(ConformanceBase):
    """Each command for itself."""

    def test_an_error_leaves_the_others(self, store: Store) -> None:
        """A command that fails writes nothing; the others of its batch, and its events and units, do."""
        state = self.with_lane(store)
        commands = [Pause("nobody", "why"), Rewind("nobody", 0), Register((Registration("good", ("a",), "type", 1),))]
        committed = store.commit(Batch(NOW, appends=[records(1)], units=[self.unit(state, 1)], commands=commands))
        assert isinstance(committed.results[0], UnknownSubscription)
        assert isinstance(committed.results[1], UnknownSubscription)
        assert not isinstance(committed.results[2], Exception)
        assert [subscribed.name for subscribed in store.read(Subscriptions())] == ["good", "mailer"]
        assert (len(self.log(store)), self.lane(store).checkpoint, committed.refused) == (4, 1, {})


class Registering(ConformanceBase):
    """Subscriptions."""

    @pytest.mark.parametrize(("start", "since"), [("now", 3), ("beginning", 0), (2, 2), (NOW + 2, 1), (NOW + 99.0, 3)])
    def test_start(self, store: Store, start: str | float, since: int) -> None:
        """A new subscription begins at the head, at the beginning, after a position, or with the first event of a time."""
        self.append(store, [record(time=NOW + second) for second in (1, 2, 3)])
        assert self.register(store, start=start).since == {"order.created": since}

    def test_subscription_kept(self, store: Store) -> None:
        """A subscription is kept as it was registered; to register it again changes nothing, whatever start it names."""
        first = self.register(store, types=("a", "b.*"), order="key", concurrency=4, start="now")
        self.append(store, records(2))
        again = self.register(store, types=("a", "b.*"), order="key", concurrency=4, start="now")
        assert first == again == store.read(Subscriptions())[0]
        assert (first.types, first.order, first.concurrency, first.created_at) == (("a", "b.*"), "key", 4, NOW)
        assert (first.paused, first.paused_at) == (None, None)

    def test_subscription_in_the_order_given(self, store: Store) -> None:
        """The results stand in the order of the command, the stored ones by name."""
        names = ("b", "a", "c")
        result = self.run(store, Register(tuple(Registration(name, ("x",), "type", 1) for name in names)))
        assert [subscribed.name for subscribed in result] == ["b", "a", "c"]
        assert [subscribed.name for subscribed in store.read(Subscriptions())] == ["a", "b", "c"]

    def test_a_type_that_joins(self, store: Store) -> None:
        """A type that joins a stored subscription begins at the head; the others keep their start, also those that leave."""
        self.register(store, types=("a", "b"))
        self.append(store, records(3))
        changed = self.register(store, types=("a", "c"))
        assert (changed.types, dict(changed.since)) == (("a", "c"), {"a": 0, "b": 0, "c": 3})

    def test_subclasses_are_remembered(self, store: Store) -> None:
        """Types that ever joined as subclasses are kept as such, also when a program does not name them."""
        self.register(store, types=("a", "b"), derived=("b",))
        self.register(store, types=("a", "c"), derived=("c",))
        assert self.register(store, types=("a",)).derived == ("b", "c")
        assert store.read(Subscriptions())[0].derived == ("b", "c")

    def test_events_of_the_same_batch_come_after_it(self, store: Store) -> None:
        """What a batch appends lies after the start of the subscriptions that it registers."""
        self.append(store, records(1))
        command = Register((Registration("mailer", ("order.created",), "type", 1),))
        store.commit(Batch(NOW, appends=[records(1)], commands=[command]))
        assert store.read(Subscriptions())[0].since == {"order.created": 1}

    def test_pause_and_resume(self, store: Store) -> None:
        """A pause has a reason; after it, what waits is due now, at its first attempt."""
        state = self.with_row(store)
        self.settle(store, self.unit(state, 4, checkpoint=3, attempt=5, due_at=NOW + 99, error="x"))
        self.run(store, Pause("mailer", "by hand"), now=NOW + 1)
        (paused,) = store.read(Subscriptions())
        assert (paused.paused, paused.paused_at) == ("by hand", NOW + 1)
        self.run(store, Pause("mailer", None), now=NOW + 2)
        (resumed,) = store.read(Subscriptions())
        assert (resumed.paused, resumed.paused_at) == (None, None)
        (row,) = self.waiting(store)
        assert (row.waiting.attempt, row.waiting.due_at) == (0, NOW + 2)
        lane = self.lane(store)
        assert (lane.attempt, lane.due_at, lane.checkpoint, lane.epoch) == (0, None, 3, state.epoch)

    def test_unsubscribe(self, store: Store) -> None:
        """A subscription goes with its lanes and waiting deliveries; its dead letters stay."""
        state = self.with_row(store)
        self.settle(
            store, self.unit(state, 2, source="row", row=2, checkpoint=3, death=death(), rows=(Waiting(3, None, 1, NOW),))
        )
        self.register(store, "other")
        self.run(store, Unsubscribe("mailer"))
        assert [subscribed.name for subscribed in store.read(Subscriptions())] == ["other"]
        assert (store.read(Lanes()), self.waiting(store), len(self.dead(store))) == ((), [], 1)
        assert self.settle(store, self.unit(state, 3)).refused == {0: "fenced"}

    @pytest.mark.parametrize(
        "command", [Pause("nobody", "why"), Pause("nobody", None), Unsubscribe("nobody"), Rewind("nobody", 0)]
    )
    def test_unknown(self, store: Store, command: Pause | Unsubscribe | Rewind) -> None:
        """A command for a subscription that is not stored says so."""
        with pytest.raises(UnknownSubscription, match="nobody"):
            self.run(store, command)


class Claiming(ConformanceBase):
    """Lanes and their owners."""

    def test_a_new_lane(self, store: Store) -> None:
        """A lane without a row begins where the claim says."""
        self.register(store)
        state = self.claim(store, start=7)
        assert (state.checkpoint, state.done, state.attempt) == (7, (), 0)
        assert store.read(Lanes()) == (state,)

    def test_the_next_epoch(self, store: Store) -> None:
        """Each claim gives the next epoch and keeps everything else."""
        state = self.with_lane(store)
        self.settle(store, self.unit(state, 1), self.unit(state, 2, checkpoint=1, attempt=1, due_at=NOW + 1, error="x"))
        assert self.claim(store, start=9) == LaneState("mailer", "order.created", state.epoch + 1, 1, (), 1, NOW + 1, None, "x")

    def test_claim_in_the_order_given(self, store: Store) -> None:
        """The lanes stand in the order of the claim; a query gives them by subscription and name."""
        lanes = (("b", "1", 0), ("a", "2", 0), ("b", "0", 0))
        claimed = [state for state in self.run(store, Claim(INSTANCE.id, lanes)) if state is not None]
        assert [(state.subscription, state.lane) for state in claimed] == [lane[:2] for lane in lanes]
        assert [(s.subscription, s.lane) for s in store.read(Lanes())] == [("a", "2"), ("b", "0"), ("b", "1")]
        assert [s.lane for s in store.read(Lanes("b"))] == ["0", "1"]
        assert self.run(store, Claim(INSTANCE.id, ())) == ()

    def test_claim_many(self, store: Store) -> None:
        """A thousand lanes are claimed and moved at once."""
        claimed = self.run(store, Claim(INSTANCE.id, tuple(("mailer", str(i), 0) for i in range(1_024))))
        self.settle(store, *(self.unit(state, 1) for state in claimed if state is not None))
        assert {state.checkpoint for state in store.read(Lanes())} == {1}


class Rewinding(ConformanceBase):
    """Handling the past again."""

    def test_rewind(self, store: Store) -> None:
        """What lies after the place is handled again, as if it were new: checkpoints, rows, dead letters, epochs."""
        state = self.with_row(store)
        self.settle(store, self.unit(state, 4, checkpoint=3, done=(5,), attempt=2, due_at=NOW, death=None))
        self.settle(store, self.unit(state, 1, source="replay", checkpoint=3, death=death()))
        self.settle(store, self.unit(state, 3, source="replay", checkpoint=3, death=death()))
        rewound = self.run(store, Rewind("mailer", 1))
        assert rewound == store.read(Lanes()) == (LaneState("mailer", "", state.epoch + 1, 1),)
        assert self.waiting(store) == []
        assert [letter.record.position for letter in self.dead(store)] == [1]
        assert self.settle(store, self.unit(state, 2)).refused == {0: "fenced"}
        assert self.settle(store, self.unit(rewound[0], 2)).refused == {}

    def test_only_back(self, store: Store) -> None:
        """A lane whose checkpoint is smaller stays there, with its earlier rows; and gets the next epoch too."""
        state = self.with_row(store)
        (rewound,) = self.run(store, Rewind("mailer", 99))
        assert (rewound.checkpoint, rewound.epoch) == (3, state.epoch + 1)
        assert [row.waiting.position for row in self.waiting(store)] == [2]

    def test_start_comes_down(self, store: Store) -> None:
        """A start above the place comes down to it; another subscription's does not."""
        self.append(store, records(3))
        self.register(store, start="now")
        self.register(store, "other", start="now")
        self.run(store, Rewind("mailer", 1))
        assert [dict(s.since) for s in store.read(Subscriptions())] == [{"order.created": 1}, {"order.created": 3}]

    def test_dead_letters_without_their_events_stay(self, store: Store) -> None:
        """A dead letter whose event is no longer in the log stays: it could not come again."""
        state, _ = self.with_dead_letter(store)
        self.settle(store, self.unit(state, 3))
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        self.run(store, Rewind("mailer", 0))
        assert len(self.dead(store)) == 1


class Pruning(ConformanceBase):
    """Retention."""

    def prune(
        self, store: Store, before: float = NOW + 100, after: int = 0, limit: int = 100, pinned: int | None = None
    ) -> int | None:
        """Remove what is older than `before`."""
        return self.run(store, Prune(before, 0.0, after, limit, pinned))

    def left(self, store: Store) -> list[int]:
        """Positions in the log."""
        return [r.position for r in self.page(store).records]

    def test_by_age(self, store: Store) -> None:
        """Events published before the time go, others stay, wherever they lie."""
        self.append(store, [record(time=NOW + second) for second in (0, 5, 1, 6)])
        assert self.prune(store, before=NOW + 5) is None
        assert self.left(store) == [2, 4]
        state = store.read(LogState())
        assert (state.pruned_to, state.pruned_time, state.events, state.head) == (3, NOW + 1, 2, 4)

    def test_no_age(self, store: Store) -> None:
        """Without an age only keys go."""
        self.append(store, records(2))
        assert self.run(store, Prune(None, NOW + 9, 0, 100)) is None
        assert self.left(store) == [1, 2]

    def test_in_steps(self, store: Store) -> None:
        """A step looks at so many events and tells where to go on; at the end it says so."""
        self.append(store, records(5))
        after: int | None = 0
        steps = []
        while after is not None:
            after = self.prune(store, after=after, limit=2)
            steps.append(self.left(store))
        assert steps[0] == [3, 4, 5]
        assert steps[-1] == []
        assert len(steps) in {3, 4}

    def test_keys_go_in_steps(self, store: Store) -> None:
        """All old keys go, however many there are."""
        self.append(store, [record(idempotency_key=f"k{i}") for i in range(7)])
        after: int | None = 0
        while after is not None:
            after = self.run(store, Prune(None, NOW + 1, after, 2))
        assert not any(place.duplicate for i in range(7) for place in self.places(store, record(idempotency_key=f"k{i}")))

    def test_pinned(self, store: Store) -> None:
        """What a replay has still to read stays."""
        self.append(store, records(4))
        self.prune(store, pinned=3)
        assert self.left(store) == [3, 4]

    def test_unsettled_events_stay(self, store: Store) -> None:
        """What lies above a lane's checkpoint stays, whatever its age; what nobody subscribed to goes."""
        self.append(store, [record(type) for type in ("order.created", "other") * 2])
        self.register(store)
        self.prune(store)
        assert self.left(store) == [1, 3]
        state = self.claim(store)
        self.settle(store, self.unit(state, 1))
        self.prune(store)
        assert self.left(store) == [3]

    def test_before_the_start(self, store: Store) -> None:
        """What lies before a subscription's start is not kept for it."""
        self.append(store, records(2))
        self.register(store, start="now")
        self.append(store, records(1))
        self.prune(store)
        assert self.left(store) == [3]

    def test_patterns(self, store: Store) -> None:
        """A pattern keeps what it matches."""
        self.append(store, [record(type) for type in ("order.created", "orders", "order.paid.late")])
        self.register(store, types=("order.*",), order="log")
        self.prune(store)
        assert self.left(store) == [1, 3]

    def test_prune_done_above_the_checkpoint(self, store: Store) -> None:
        """What is settled above the checkpoint may go."""
        state = self.with_lane(store, order="none", concurrency=16)
        self.settle(store, self.unit(state, 2, checkpoint=0, done=(2,)))
        self.prune(store)
        assert self.left(store) == [1, 3]

    def test_a_waiting_delivery(self, store: Store) -> None:
        """What waits below the checkpoint stays: the one event."""
        self.with_row(store)
        self.prune(store)
        assert self.left(store) == [2]

    def test_a_waiting_key(self, store: Store) -> None:
        """What waits below the checkpoint stays: the key's events from the first unsettled one."""
        keys = ("k", "l", "k", "l", "k")
        self.append(store, [record(key=key, slot=0) for key in keys])
        self.register(store, order="key", concurrency=4)
        state = self.claim(store, lane="0")
        self.settle(store, self.unit(state, 5, rows=(Waiting(3, "k", 1, NOW),)))
        self.prune(store)
        assert self.left(store) == [3, 5]

    def test_lanes_of_slots(self, store: Store) -> None:
        """With order "key" each lane has its own checkpoint."""
        keys = [f"k{i}" for i in range(8)]
        self.append(store, [record(key=key) for key in keys])
        self.register(store, order="key", concurrency=2)
        state = self.claim(store, lane="1")
        self.settle(store, self.unit(state, 8))
        self.prune(store)
        assert self.left(store) == [i + 1 for i, key in enumerate(keys) if slot_of(key) < 512]

    def test_a_redrive_needs_no_log(self, store: Store) -> None:
        """Dead letters being redriven keep nothing in the log."""
        state, _ = self.with_dead_letter(store)
        self.settle(store, self.unit(state, 3))
        self.run(store, Redrive(DeadLetterFilter()))
        self.prune(store)
        assert (self.left(store), len(self.dead(store))) == ([], 1)
