"""Conformance: deployments that change. See `eventbus.testing.conformance`."""

from __future__ import annotations

from typing import Any

from eventbus.stores.base import (
    Beat,
    Claim,
    DeadLetterFilter,
    Discard,
    Lanes,
    Prune,
    Register,
    Registration,
    Serves,
    Stand,
    Store,
    Subscriptions,
    Waiting,
    WaitingRows,
)
from eventbus.testing._conformance_base import INSTANCE, NOW, OTHER, Shared, death, record, records


class Generations(Shared):
    """Subscriptions that change from one deployment to the next."""

    def test_another_order(self, store: Store) -> None:
        """With another order, lanes begin at the first unsettled event; what was settled above it is known to be."""
        state = self.with_lane(store, types=("order.created", "other"), events=2)
        self.append(store, records(1, "other"))
        self.settle(store, self.unit(state, 2))
        changed = self.register(store, types=("order.created", "other"), order="log")
        (lane,) = store.read(Lanes())
        assert (changed.order, lane.lane, lane.checkpoint) == ("log", "", 2)
        assert not changed.settled_before(3, "other", 0, None)

    def test_another_order_where_all_is_settled(self, store: Store) -> None:
        """Then the lanes begin at the head, and nothing has to be remembered."""
        state = self.with_lane(store, events=2)
        self.settle(store, self.unit(state, 2))
        changed = self.register(store, order="key", concurrency=2)
        assert changed.floors == ()
        assert [(lane.lane, lane.checkpoint) for lane in store.read(Lanes())] == [("0", 2), ("1", 2)]

    def test_another_order_with_a_waiting_delivery(self, store: Store) -> None:
        """A waiting delivery is unsettled, wherever the checkpoint is; its row goes, it comes from the log again."""
        self.with_row(store)
        changed = self.register(store, order="log")
        (lane,) = store.read(Lanes())
        assert (lane.checkpoint, store.read(WaitingRows())) == (1, ())
        assert [changed.settled_before(n, "order.created", 0, None) for n in (1, 2, 3, 4)] == [True, False, True, False]

    def test_another_order_with_done(self, store: Store) -> None:
        """What is done above the checkpoint is settled."""
        state = self.with_lane(store, events=3, order="none", concurrency=16)
        self.settle(store, self.unit(state, 2, checkpoint=0, done=(2,)))
        changed = self.register(store, order="none", concurrency=4)
        assert [changed.settled_before(n, "order.created", 0, None) for n in (1, 2, 3)] == [False, True, False]

    def test_another_order_and_another(self, store: Store) -> None:
        """What was settled in any of the generations before is settled."""
        state = self.with_lane(store, events=3, order="none", concurrency=16)
        self.settle(store, self.unit(state, 2, checkpoint=0, done=(2,)))
        self.register(store, order="log")
        changed = self.register(store, order="type")
        assert [changed.settled_before(n, "order.created", 0, None) for n in (1, 2, 3)] == [False, True, False]

    def test_floors_go_when_they_are_passed(self, store: Store) -> None:
        """Once all lanes have passed what was settled before, nothing of it is kept."""
        state = self.with_lane(store, events=3, order="none", concurrency=16)
        self.settle(store, self.unit(state, 2, checkpoint=0, done=(2,)))
        self.register(store, order="log")
        self.settle(store, self.unit(self.claim(store, lane=""), 3))
        assert self.register(store, order="log").floors == ()

    def test_floors_stay_while_a_row_needs_them(self, store: Store) -> None:
        """A key that waits stands for its later events, too, of which some were settled before: they are not delivered again."""
        self.register(store, order="none", concurrency=16)
        self.append(store, records(3, key="k"))
        self.settle(store, self.unit(self.claim(store, lane=""), 2, checkpoint=0, done=(2,)))
        self.register(store, order="key", concurrency=1)
        state = self.claim(store, lane="0")
        self.settle(store, self.unit(state, 1, checkpoint=3, rows=(Waiting(1, "k", 1, NOW + 9, first_failed_at=NOW),)))
        assert self.register(store, order="key", concurrency=1).settled_before(2, "order.created", 0, "k")
        self.settle(store, self.unit(state, 1, source="row", row=1, checkpoint=3))
        assert self.register(store, order="key", concurrency=1).floors == ()

    def test_a_type_that_joins_without_being_served(self, store: Store) -> None:
        """A type that an instance registers which does not dispatch has events from now on. Lanes that do not hold it pass them
        by, and who serves it later gets them: once, and without what was settled of the others."""
        state = self.with_lane(store, order="log", events=1)
        self.register(store, types=("order.created", "other"), order="log", dispatched=False)
        self.append(store, [*records(1, "other"), *records(1)])
        assert not self.settle(store, self.unit(state, 3)).refused
        (known,) = store.read(Subscriptions())
        assert [known.holds("order.created"), known.holds("other"), known.since["other"]] == [True, False, 1]
        joined = self.register(store, types=("order.created", "other"), order="log")
        lane = self.claim(store, lane="")
        assert (joined.generation > known.generation, lane.checkpoint) == (True, 1)
        assert [joined.settled_before(n, type, 0, None) for n, type in ((2, "other"), (3, "order.created"))] == [False, True]
        assert self.register(store, types=("order.created", "other"), order="log") == joined

    def test_a_subclass_that_joins_without_being_served_fences(self, store: Store) -> None:
        """Who owns a lane may not know a type that joins as a subclass, though it must not pass it by."""
        state = self.with_lane(store, order="log", events=1)
        self.register(store, types=("order.created", "sub"), order="log", derived=("sub",), dispatched=False)
        assert self.settle(store, self.unit(state, 1)).refused == {0: "fenced"}
        assert store.read(Subscriptions())[0].holds("sub")

    def test_a_type_that_leaves_and_comes_back(self, store: Store) -> None:
        """What was settled of it stays so, what came while it was away is delivered."""
        both: dict[str, Any] = {"types": ("order.created", "other"), "order": "key", "concurrency": 1}
        self.register(store, **both)
        self.append(store, [*records(1, "other", key="k"), *records(1, key="k")])
        state = self.claim(store, lane="0")
        self.settle(store, self.unit(state, 1))
        self.register(store, order="key", concurrency=1)
        state = self.claim(store, lane="0")
        self.append(store, records(1, "other", key="k"))
        self.settle(store, self.unit(state, 3))
        self.register(store, **both)
        (known,) = store.read(Subscriptions())
        assert self.lane(store).checkpoint == 2
        assert not known.settled_before(3, "other", 0, "k")
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert [found.position for found in self.page(store).records] == [3]

    def test_a_type_that_leaves_fences(self, store: Store) -> None:
        """What is settled of it is noted when it leaves; who is late with an outcome is refused, or it would be settled twice."""
        both: dict[str, Any] = {"types": ("order.created", "other"), "order": "log"}
        state = self.with_lane(store, events=0, **both)
        self.append(store, records(2, "other"))
        self.settle(store, self.unit(state, 1))
        self.register(store, order="log")
        assert self.settle(store, self.unit(state, 2)).refused == {0: "fenced"}
        self.register(store, **both)
        assert self.lane(store).checkpoint == 1

    def test_a_type_that_was_known_fences_its_own_lanes(self, store: Store) -> None:
        """A type that comes back, of which there may be events, fences all lanes: who registers it may have passed them in
        memory. One that nobody has known does not fence those of the instance that brings it."""
        both = Registration("mailer", ("order.created", "other"), "log", 1)
        state = self.with_lane(store, order="log", events=1)
        self.run(store, Register((both,), INSTANCE.id))
        assert not self.settle(store, self.unit(state, 1)).refused
        self.register(store, order="log")
        state = self.claim(store, lane="")
        self.run(store, Register((both,), INSTANCE.id))
        assert self.settle(store, self.unit(state, 1)).refused == {0: "fenced"}

    def test_the_same_types_in_another_order(self, store: Store) -> None:
        """Change nothing: two that declare them so do not go on telling each other."""
        first = self.register(store, types=("a.*", "b.*"), order="log")
        changes = store.read(Stand()).changes
        assert self.register(store, types=("b.*", "a.*"), order="log") == first
        assert store.read(Stand()).changes == changes

    def test_another_order_with_another_type_while_it_is_served(self, store: Store) -> None:
        """What waits for an order changes no types: those who serve it go on, and the type's events wait."""
        self.register(store, order="log")
        self.run(store, Beat(OTHER, serves={"mailer": Serves("log", 1, ("order.created",))}))
        now = self.register(store, types=("order.created", "other"), order="none", concurrency=4)
        assert (now.order, now.types, now.since["other"]) == ("log", ("order.created",), 0)
        self.run(store, Beat(OTHER, leaving=True))
        now = self.register(store, types=("order.created", "other"), order="none", concurrency=4)
        assert (now.order, now.types) == ("none", ("order.created", "other"))

    def test_a_pattern_in_place_of_a_name_while_a_key_is_parked(self, store: Store) -> None:
        """A pattern that brings a type which was passed by has to wait for the key; what was held stays held."""
        self.register(store, types=("order.created", "order.paid"), order="key", concurrency=1)
        self.register(store, order="key", concurrency=1)
        self.append(store, [record(key="k"), record("order.paid", key="l")])
        state = self.claim(store, lane="0")
        row = Waiting(1, "k", 0, NOW, "parked", NOW, "no")
        self.settle(store, self.unit(state, 1, checkpoint=2, death=death(), rows=(row,)))
        waiting = self.register(store, types=("order.*",), order="key", concurrency=1)
        assert (waiting.types, waiting.holds("order.paid")) == (("order.created",), False)
        self.run(store, Discard(DeadLetterFilter()))
        assert self.register(store, types=("order.*",), order="key", concurrency=1).holds("order.paid")
        assert self.lane(store).checkpoint == 1

    def test_a_type_that_left_is_kept_from_retention(self, store: Store) -> None:
        """Its events are kept until it comes back, or the subscription is removed."""
        self.register(store, types=("order.created", "other"), order="log")
        self.register(store, order="log")
        self.append(store, [*records(1, "other"), *records(1)])
        self.settle(store, self.unit(self.claim(store, lane=""), 2))
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert [found.position for found in self.page(store).records] == [1]

    def test_another_order_fences(self, store: Store) -> None:
        """Who owned a lane of the same name in an earlier generation cannot write in the new one."""
        old = self.with_lane(store, events=2, order="log")
        new = self.register(store, order="none", concurrency=4)
        assert self.settle(store, self.unit(old, 1)).refused == {0: "fenced"}
        assert self.claim(store, lane="").epoch > old.epoch
        assert new.generation > 0

    def test_another_order_is_that_of_who_is_there(self, store: Store) -> None:
        """While an instance serves a subscription, another one does not change its order; when it has gone, it does."""
        self.with_lane(store, events=1)
        self.beat(store, OTHER, serves={"mailer": Serves("type", 1, ("order.created",))})
        registration = Registration("mailer", ("order.created",), "log", 1)
        (kept,) = self.run(store, Register((registration,), INSTANCE.id))
        assert kept.order == "type"
        self.run(store, Beat(OTHER, leaving=True))
        (changed,) = self.run(store, Register((registration,), INSTANCE.id))
        assert changed.order == "log"

    def test_what_waits_above_the_checkpoint_is_not_settled(self, store: Store) -> None:
        """A delivery with a row may stand among what a lane has done above its checkpoint; with another order it comes."""
        state = self.with_lane(store, order="none", concurrency=16, events=4)
        unit = self.unit(state, 3, checkpoint=0, done=(2, 3), rows=(Waiting(3, None, 1, NOW + 1),))
        assert not self.settle(store, unit).refused
        changed = self.register(store, order="log")
        assert [changed.settled_before(n, "order.created", 0, None) for n in (1, 2, 3, 4)] == [False, True, False, False]

    def test_another_order_where_it_is_not_dispatched(self, store: Store) -> None:
        """An instance that does not run a subscription leaves its order as it is."""
        self.with_lane(store, events=1)
        assert self.register(store, order="log", dispatched=False).order == "type"

    def test_a_type_that_joins_fences(self, store: Store) -> None:
        """Who owns a lane of several types and may not know one that has joined them writes there no more."""
        self.beat(store, OTHER)
        self.register(store, order="log")
        (old,) = self.run(store, Claim(OTHER.id, (("mailer", "", 0),)))
        assert old is not None
        self.append(store, records(1))
        self.register(store, types=("order.created", "order.paid"), order="log")
        assert self.settle(store, self.unit(old, 1)).refused == {0: "fenced"}

    def test_types_that_are_served_stay(self, store: Store) -> None:
        """A type that is not declared any more stays while another instance serves it."""
        self.register(store, types=("a", "b"))
        self.beat(store, OTHER, serves={"mailer": Serves("type", 1, ("a", "b"))})
        assert set(self.register(store, types=("a",)).types) == {"a", "b"}
        self.run(store, Beat(OTHER, leaving=True))
        assert self.register(store, types=("a",)).types == ("a",)
