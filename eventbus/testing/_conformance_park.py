"""The conformance suite on parked keys: rows of `deliveries` that wait behind a dead letter.

publish → journal → *store* → lanes → workers → outcome, with the journal and the reader played by the tests.
"""

from __future__ import annotations

import msgspec
import pytest

from eventbus.errors import InvalidSubscription
from eventbus.stores.base import (
    DeadLetterFilter,
    DeadLetterRow,
    Discard,
    LagOfRows,
    LaneState,
    Pause,
    Prune,
    Redrive,
    Rewind,
    Store,
    Subscriptions,
    Unsubscribe,
    Waiting,
    WaitingRows,
)
from eventbus.testing._conformance_base import NOW, ConformanceBase, death, record

PARKED = Waiting(2, "k", 0, NOW, "parked", NOW, "ValueError: no stock")
FREED = Waiting(2, "k", 0, NOW + 9, "freed")


class ParkedKeys(ConformanceBase):
    """Keys that wait behind a dead letter."""

    def with_parked(self, store: Store) -> tuple[LaneState, DeadLetterRow]:
        """Five events, all but the third of one key; the second is a dead letter, the key is parked, the checkpoint is 5."""
        self.register(store, order="key", concurrency=1)
        self.append(store, [record(key="l" if n == 3 else "k") for n in range(1, 6)])
        state = self.claim(store, lane="0")
        committed = self.settle(store, self.unit(state, 2, death=death(), rows=(PARKED,)), self.unit(state, 5))
        assert not committed.refused
        (letter,) = self.dead(store)
        return msgspec.structs.replace(state, checkpoint=5), letter

    def parked_rows(self, store: Store) -> list[Waiting]:
        """What waits."""
        return [row.waiting for row in self.waiting(store)]

    def test_parked_kept(self, store: Store) -> None:
        """A dead letter and the row that says that its key is parked come in one unit, and are kept."""
        self.with_parked(store)
        self.reopen(store)
        assert self.parked_rows(store) == [PARKED]
        assert [letter.record.position for letter in self.dead(store)] == [2]

    def test_parked_by_state(self, store: Store) -> None:
        """Rows can be asked for by their state."""
        self.with_parked(store)
        assert [row.waiting for row in store.read(WaitingRows("mailer", "parked"))] == [PARKED]
        assert list(store.read(WaitingRows("mailer", "freed"))) == []
        assert list(store.read(WaitingRows("other", "parked"))) == []

    def test_parked_redrive_keeps(self, store: Store) -> None:
        """A redrive frees nothing before its ack: neither when it is asked for, nor with a retry, nor when it dies again."""
        state, letter = self.with_parked(store)
        redrive = self.unit(state, 2, source="redrive", checkpoint=5, dead_letter=letter.id)
        self.run(store, Redrive(DeadLetterFilter()))
        self.settle(store, msgspec.structs.replace(redrive, retry=(1, NOW + 1)))
        self.settle(store, msgspec.structs.replace(redrive, death=death("KeyError")))
        assert self.parked_rows(store) == [PARKED]

    def test_parked_redrive_frees(self, store: Store) -> None:
        """The ack of a redrive deletes the dead letter and frees its key, in one transaction."""
        state, letter = self.with_parked(store)
        self.run(store, Redrive(DeadLetterFilter()))
        redrive = self.unit(state, 2, source="redrive", checkpoint=5, dead_letter=letter.id)
        assert not self.settle(store, redrive, now=NOW + 9).refused
        assert (self.parked_rows(store), self.dead(store)) == ([FREED], [])

    def test_parked_conflict_keeps(self, store: Store) -> None:
        """A redrive that ends by a conflict of idempotency keys dies again, and frees nothing."""
        state, letter = self.with_parked(store)
        self.append(store, [record("mail.sent", idempotency_key="i")])
        self.run(store, Redrive(DeadLetterFilter()))
        bad = (record("mail.sent", data=b"[]", idempotency_key="i"),)
        redrive = self.unit(state, 2, source="redrive", checkpoint=5, dead_letter=letter.id, published=bad)
        assert self.settle(store, redrive).conflicts == [0]
        assert self.parked_rows(store) == [PARKED]

    def test_parked_fenced(self, store: Store) -> None:
        """The ack of a redrive by a former owner of the lane frees nothing."""
        state, letter = self.with_parked(store)
        self.run(store, Redrive(DeadLetterFilter()))
        self.claim(store, lane="0")
        redrive = self.unit(state, 2, source="redrive", checkpoint=5, dead_letter=letter.id)
        assert self.settle(store, redrive).refused == {0: "fenced"}
        assert (self.parked_rows(store), len(self.dead(store))) == ([PARKED], 1)

    def test_parked_discard_frees(self, store: Store) -> None:
        """Discarding the dead letter frees its key; discarding others does not."""
        self.with_parked(store)
        assert self.run(store, Discard(DeadLetterFilter(error="KeyError"))) == 0
        assert self.parked_rows(store) == [PARKED]
        assert self.run(store, Discard(DeadLetterFilter()), now=NOW + 9) == 1
        assert (self.parked_rows(store), self.dead(store)) == ([FREED], [])

    def test_parked_only_parked_rows(self, store: Store) -> None:
        """The end of a dead letter frees what is parked behind it; a row that waits for another reason stays as it is."""
        state = self.with_row(store)
        self.settle(store, self.unit(state, 2, source="replay", checkpoint=3, death=death()))
        before = self.parked_rows(store)
        self.run(store, Redrive(DeadLetterFilter()))
        (letter,) = self.dead(store)
        redrive = self.unit(state, 2, source="redrive", checkpoint=3, dead_letter=letter.id)
        assert not self.settle(store, redrive).refused
        assert self.parked_rows(store) == before
        self.settle(store, self.unit(state, 2, source="replay", checkpoint=3, death=death()))
        assert self.run(store, Discard(DeadLetterFilter())) == 1
        assert self.parked_rows(store) == before

    def test_parked_worked_off(self, store: Store) -> None:
        """A freed row is settled, moved and parked anew by the units of its later events."""
        state, _ = self.with_parked(store)
        self.run(store, Discard(DeadLetterFilter()))
        anew = Waiting(4, "k", 0, NOW, "parked")
        unit = self.unit(state, 4, source="row", row=2, checkpoint=5, rows=(anew,), death=death())
        committed = self.settle(store, unit, unit)
        assert committed.refused == {1: "settled"}
        assert self.parked_rows(store) == [anew]
        assert [letter.record.position for letter in self.dead(store)] == [4]

    def test_parked_resume(self, store: Store) -> None:
        """Resuming a subscription does not free what is parked."""
        self.with_parked(store)
        self.run(store, Pause("mailer", "by hand"))
        self.run(store, Pause("mailer", None), now=NOW + 9)
        assert self.parked_rows(store) == [PARKED]

    def test_parked_rewind(self, store: Store) -> None:
        """A rewind to before the dead letter removes the row, one to behind it leaves it."""
        self.with_parked(store)
        self.run(store, Rewind("mailer", 3))
        assert (self.parked_rows(store), self.lane(store).checkpoint) == ([PARKED], 3)
        self.run(store, Rewind("mailer", 1))
        assert (self.parked_rows(store), self.dead(store)) == ([], [])

    def test_parked_unsubscribe(self, store: Store) -> None:
        """Removing the subscription removes the row."""
        self.with_parked(store)
        self.run(store, Unsubscribe("mailer"))
        assert (self.parked_rows(store), len(self.dead(store))) == ([], 1)

    def test_parked_prune(self, store: Store) -> None:
        """What waits behind a dead letter is not pruned, parked or freed; the dead letter's event may go."""
        self.with_parked(store)
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert [found.position for found in self.page(store).records] == [4, 5]
        self.run(store, Discard(DeadLetterFilter()))
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert [found.position for found in self.page(store).records] == [4, 5]

    def test_parked_lag(self, store: Store) -> None:
        """What waits behind a dead letter counts as unsettled; the dead letter does not."""
        self.with_parked(store)
        assert store.read(LagOfRows("mailer", ("order.created",)))[0] == 2
        self.run(store, Discard(DeadLetterFilter()))
        assert store.read(LagOfRows("mailer", None))[0] == 2

    def test_parked_another_order(self, store: Store) -> None:
        """The order cannot change while a key is parked; once it is freed it can, and what came after it stays unsettled."""
        self.with_parked(store)
        with pytest.raises(InvalidSubscription, match="parked"):
            self.register(store, order="none", concurrency=5)
        assert self.parked_rows(store) == [PARKED]
        self.run(store, Discard(DeadLetterFilter()))
        self.register(store, order="none", concurrency=5)
        (subscribed,) = store.read(Subscriptions())
        settled = [subscribed.settled_before(n, "order.created", 0, "l" if n == 3 else "k") for n in range(1, 6)]
        assert settled == [True, True, True, False, False]
        assert (self.parked_rows(store), self.lane(store).checkpoint) == ([], 2)
