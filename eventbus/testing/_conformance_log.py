"""Conformance: the log. Positions, pages, idempotency keys, scheduled events. See `eventbus.testing.conformance`."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from eventbus.errors import IdempotencyConflict
from eventbus.stores.base import (
    Batch,
    Cancel,
    EventsAt,
    Find,
    Lag,
    LagOfRows,
    LogState,
    NextDue,
    Page,
    PositionBefore,
    Promote,
    Promoted,
    Prune,
    Record,
    Store,
    Stored,
    Types,
    Waiting,
)
from eventbus.testing._conformance_base import NOW, ConformanceBase, places_of, record, records, stored_part


class Positions(ConformanceBase):
    """Where events come to lie."""

    def test_positions_ascend(self, store: Store) -> None:
        """Events lie in the log in the order in which they were handed in, within a batch and from one to the next."""
        groups = [records(2), records(1), records(3)]
        first = places_of(self.append(store, *groups), *groups)
        second = self.append(store, records(2))
        groups_of_places = [*first, *places_of(second, second.events)]
        places = [p.position for group in groups_of_places if not isinstance(group, Exception) for p in group]
        assert None not in places
        assert places == sorted(places, key=lambda p: p or 0)
        assert len(set(places)) == len(places)
        assert self.log(store) == [r.id for group in groups for r in group] + [r.id for r in second.events]

    def test_heads(self, store: Store) -> None:
        """A commit tells the log's last position before and after, and which events entered it."""
        first, second = self.append(store, records(2)), self.append(store, records(1))
        assert (first.head, second.previous_head) == (second.previous_head, first.events[-1].position)
        assert second.head == second.events[-1].position == self.head(store)

    def test_records_learn_their_positions(self, store: Store) -> None:
        """The records handed in are those given back, with their positions."""
        some = records(2)
        committed = self.append(store, some)
        assert [a is b for a, b in zip(committed.events, some, strict=True)] == [True, True]
        assert all(r.position > 0 for r in some)

    def test_nothing_to_do(self, store: Store) -> None:
        """An empty batch changes nothing."""
        self.append(store, records(1))
        committed = store.commit(Batch(NOW))
        assert (committed.previous_head, committed.head) == (1, 1)
        assert not committed.events

    def test_large_batch(self, store: Store) -> None:
        """A batch may hold thousands of events."""
        some = records(1_300)
        self.append(store, some)
        assert self.page(store, limit=2_000).up_to == some[-1].position
        assert [r.id for r in self.page(store, limit=2_000).records] == [r.id for r in some]

    def test_never_given_twice(self, store: Store) -> None:
        """A position is not given again, also when everything was removed."""
        last = self.append(store, records(3)).head
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        assert self.log(store) == []
        assert self.append(store, records(1)).events[0].position > last

    def test_never_given_twice_after_reopening(self, store: Store) -> None:
        """A position is not given again, also when everything was removed and the store was opened anew."""
        last = self.append(store, records(3)).head
        self.run(store, Prune(NOW + 1, 0.0, 0, 100))
        self.reopen(store)
        assert self.head(store) == last
        assert self.append(store, records(1)).events[0].position > last

    def test_log_survives_reopening(self, store: Store) -> None:
        """What was committed is there when the store is opened again."""
        some = records(3)
        self.append(store, some)
        self.reopen(store)
        assert [stored_part(r) for r in self.page(store).records] == [stored_part(r) for r in some]

    def test_close_twice(self, store: Store) -> None:
        """Closing a closed store does nothing."""
        store.close()
        store.close()

    def test_visible_in_order(self, store: Store) -> None:
        """Once a page up to p was read, nothing at or below p appears later, whoever commits meanwhile."""
        if not store.features.concurrent_reads:
            pytest.skip("this store is read between its transactions")
        pages: list[Page] = []
        done = threading.Event()

        def follow() -> None:
            after = 0
            while True:
                last = done.is_set()
                page = self.page(store, after, limit=7)
                pages.append(page)
                after = page.up_to
                if last and after >= page.head:
                    return

        reader = threading.Thread(target=follow)
        reader.start()
        written: list[Record] = []
        for size in (1, 5, 1, 17, 3) * 20:
            written += self.append(store, records(size)).events
        done.set()
        reader.join()
        assert [r.id for page in pages for r in page.records] == [r.id for r in written]
        assert all(page.records[-1].position <= page.up_to <= page.head for page in pages if page.records)


class Pages(ConformanceBase):
    """Reading the log."""

    def test_as_stored(self, store: Store) -> None:
        """Events come back as they were handed in: every field, any text, any bytes."""
        some = [
            record("a", key="ключ 🔑", headers='{"traceparent":"00-1"}', time=1_700_000_000.123457, version=7),
            record("b", data='{"ü": "\\u0000 \\" \'x\'"}'.encode(), slot=1023),
            record("c", data=b"\x00\xff\xfe", content_type="application/octet-stream"),
            record("d", data=b"\xff not json", content_type="application/json"),
            record("e", data=b"", content_type="text/plain", time=0.000001),
        ]
        self.append(store, some)
        assert [stored_part(r) for r in self.page(store).records] == [stored_part(r) for r in some]

    def test_limit(self, store: Store) -> None:
        """A page holds at most `limit` events, and says up to where it goes."""
        some = self.append(store, records(5)).events
        page = self.page(store, limit=2)
        assert [r.id for r in page.records] == [r.id for r in some[:2]]
        assert (page.up_to, page.head) == (some[1].position, some[-1].position)

    def test_to_the_head(self, store: Store) -> None:
        """A page that is not cut goes up to the head, whatever lies there."""
        head = self.append(store, records(2), records(2, "other")).head
        assert self.page(store, types=("order.created",)).up_to == head
        assert self.page(store, types=("nothing",)).up_to == head
        assert self.page(store, types=()).up_to == head
        assert self.page(store, types=()).records == []

    def test_empty(self, store: Store) -> None:
        """A page of an empty log goes up to 0."""
        page = self.page(store)
        assert (list(page.records), page.up_to, page.head) == ([], 0, 0)

    def test_bytes(self, store: Store) -> None:
        """A page holds at most `max_bytes` of data, but at least one event."""
        self.append(store, records(4, data=b"x" * 100, content_type="text/plain"))
        assert [r.position for r in self.page(store, max_bytes=250).records] == [1, 2]
        assert self.page(store, max_bytes=250).up_to == 2
        assert [r.position for r in self.page(store, after=2, max_bytes=1).records] == [3]
        assert [r.position for r in self.page(store, max_bytes=200, types=("order.created",)).records] == [1, 2]

    def test_until(self, store: Store) -> None:
        """A page ends at `until`."""
        self.append(store, records(5))
        page = self.page(store, after=1, until=3)
        assert [r.position for r in page.records] == [2, 3]
        assert page.up_to == 3
        assert self.page(store, until=99).up_to == 5

    @pytest.mark.parametrize("others", [0, 1, 60])
    def test_types(self, store: Store, others: int) -> None:
        """Events of several types come merged, in the order of the log; of few types or of many."""
        self.append(store, [record(type) for type in "abcabcab"])
        wanted = ("a", "c", "a", *(f"x{i}" for i in range(others)))
        first = self.page(store, limit=3, types=wanted)
        rest = self.page(store, after=first.up_to, types=wanted)
        assert [r.position for r in (*first.records, *rest.records)] == [1, 3, 4, 6, 7]
        assert rest.up_to == 8

    def test_key(self, store: Store) -> None:
        """Events of one key, of all types or of some."""
        self.append(store, [record(type, key=key) for type in "ab" for key in ("k", None, "l")])
        assert [r.position for r in self.page(store, key="k").records] == [1, 4]
        assert [r.position for r in self.page(store, key="k", types=("b",)).records] == [4]

    @pytest.mark.parametrize("types", [None, ("order.created",)])
    def test_times(self, store: Store, types: tuple[str, ...] | None) -> None:
        """Events from one time to another, both inclusive; a page may be empty and still go on."""
        self.append(store, [record(time=NOW + second) for second in range(6)])
        bounds: dict[str, Any] = {"since": NOW + 3, "until_time": NOW + 4, "types": types}
        found: list[Record] = []
        after = pages = 0
        while after < 6:
            page = self.page(store, after, limit=2, **bounds)
            assert page.up_to > after
            found += page.records
            after, pages = page.up_to, pages + 1
        assert [r.position for r in found] == [4, 5]
        assert pages >= 3

    def test_at_positions(self, store: Store) -> None:
        """Single events by position; those that are gone are left out."""
        self.append(store, records(4))
        assert [r.position for r in store.read(EventsAt((4, 2, 99)))] == [2, 4]
        assert store.read(EventsAt(())) == ()

    def test_find(self, store: Store) -> None:
        """An event by its id: in the log, scheduled, or nowhere."""
        there, due = record(), record(due_at=NOW + 60, idempotency_key="k")
        self.append(store, [there, due])
        found, scheduled = store.read(Find(there.id)), store.read(Find(due.id))
        assert found is not None
        assert stored_part(found) == stored_part(there)
        assert scheduled is not None
        assert (scheduled.position, scheduled.due_at, scheduled.data) == (0, NOW + 60, due.data)
        assert store.read(Find("nobody")) is None

    def test_types_in_the_log(self, store: Store) -> None:
        """The types in the log, each with its last position."""
        assert dict(store.read(Types())) == {}
        self.append(store, [record(type) for type in "abca"])
        assert dict(store.read(Types())) == {"a": 4, "b": 2, "c": 3}

    def test_position_before(self, store: Store) -> None:
        """The place before the first event of a time; the head if there is none so late."""
        self.append(store, [record(time=NOW + second) for second in (0, 10, 5, 20)])
        found = [store.read(PositionBefore(NOW + second)) for second in (-1, 0, 1, 10, 11, 21)]
        assert found == [0, 0, 1, 1, 3, 4]

    def test_log_state(self, store: Store) -> None:
        """What the log holds."""
        state = store.read(LogState())
        assert (state.head, state.events, state.pruned_to) == (0, 0, 0)
        self.append(store, records(3))
        state = store.read(LogState())
        assert (state.head, state.events, state.pruned_to) == (3, 3, 0)

    def test_lag(self, store: Store) -> None:
        """Events after a place, by type and slot, counted up to a limit, with the time of the first."""
        self.append(store, [record("ab"[i % 2], slot=i * 100, time=NOW + i) for i in range(10)])
        assert store.read(Lag(0, None)) == (10, NOW)
        assert store.read(Lag(4, ("a",))) == (3, NOW + 4)
        assert store.read(Lag(4, ("a", "b"), until=6)) == (2, NOW + 4)
        assert store.read(Lag(0, None, slots=(100, 400))) == (3, NOW + 1)
        assert store.read(Lag(0, ("a",), slots=(100, 500))) == (2, NOW + 2)
        assert store.read(Lag(0, None, limit=4)) == (4, NOW)
        assert store.read(Lag(0, ("b", "a"), limit=4)) == (4, NOW)
        assert store.read(Lag(0, (*(f"x{i}" for i in range(60)), "b"))) == (5, NOW + 1)
        assert store.read(Lag(10, None)) == (0, None)
        assert store.read(Lag(0, ())) == (0, None)

    def test_lag_of_rows(self, store: Store) -> None:
        """What waiting deliveries stand for: one event without a key, with one those of the key up to the lane's checkpoint."""
        self.register(store, types=("a", "b"), order="key", concurrency=1)
        self.append(store, [record("ab"[i % 2], key="xy"[i // 5], time=NOW + i) for i in range(10)])
        state = self.claim(store, lane="0")
        assert store.read(LagOfRows("mailer", None)) == (0, None)
        rows = (Waiting(2, "x", 1, NOW), Waiting(7, None, 1, NOW))
        assert not self.settle(store, self.unit(state, 2, checkpoint=9, rows=rows)).refused
        assert store.read(LagOfRows("mailer", None)) == (5, NOW + 1)
        assert store.read(LagOfRows("mailer", ("a",))) == (3, NOW + 2)
        assert store.read(LagOfRows("mailer", None, limit=2))[0] == 2
        assert store.read(LagOfRows("other", None)) == (0, None)


class Idempotency(ConformanceBase):
    """Idempotency keys."""

    def test_duplicate(self, store: Store) -> None:
        """The same key again gives the place of the first, and stores nothing."""
        first = record(idempotency_key="k", key="a")
        (place,) = self.places(store, first)
        again = record(idempotency_key="k", key="a")
        assert self.places(store, again) == [Stored(first.id, place.position, duplicate=True)]
        assert self.log(store) == [first.id]
        assert again.position == 0

    def test_within_a_batch(self, store: Store) -> None:
        """A key counts from the moment it is first used, within a group and within a batch too."""
        groups = [record(idempotency_key="k"), record(idempotency_key="k")], [record(), record(idempotency_key="k")]
        places = [group for group in places_of(self.append(store, *groups), *groups) if not isinstance(group, Exception)]
        assert [[(p.position, p.duplicate) for p in group] for group in places] == [
            [(1, False), (1, True)],
            [(2, False), (1, True)],
        ]

    @pytest.mark.parametrize(
        "other", [{"data": b"{}"}, {"type": "x"}, {"version": 2}, {"key": "x"}, {"content_type": "text/plain"}]
    )
    def test_key_conflict(self, store: Store, other: dict[str, object]) -> None:
        """The same key with another type, version, key, or content is a conflict that names the first event."""
        first = record(idempotency_key="k")
        self.append(store, [first])
        (conflict,) = self.append(store, [record(idempotency_key="k", **other)]).appends  # type: ignore[arg-type]
        assert isinstance(conflict, IdempotencyConflict)
        assert (conflict.key, conflict.event_id) == ("k", first.id)

    def test_a_group_with_a_conflict_is_left_out(self, store: Store) -> None:
        """Of a group with a conflict nothing is stored, not even its keys; the other groups are."""
        self.append(store, [record(idempotency_key="k")])
        before, between, after = record(), record(idempotency_key="new"), record()
        committed = self.append(store, [before], [between, record(idempotency_key="k", data=b"{}")], [after])
        assert [isinstance(group, IdempotencyConflict) for group in committed.appends] == [False, True, False]
        assert self.log(store)[1:] == [before.id, after.id]
        assert [r.position for r in committed.events] == [before.position, after.position]
        assert between.position == 0
        assert not self.places(store, record(idempotency_key="new", data=b"[]"))[0].duplicate

    def test_a_conflict_within_a_group(self, store: Store) -> None:
        """Two events of one group with one key and different content are a conflict."""
        (conflict,) = self.append(store, [record(idempotency_key="k"), record(idempotency_key="k", data=b"{}")]).appends
        assert isinstance(conflict, IdempotencyConflict)
        assert self.log(store) == []

    def test_any_text(self, store: Store) -> None:
        """A key is any text."""
        for key in ("'; DROP TABLE events; --", "🔑" * 63, "a\nb", '"', "%", "\\u0041"):
            assert not self.places(store, record(idempotency_key=key))[0].duplicate
            assert self.places(store, record(idempotency_key=key))[0].duplicate

    def test_kept_after_the_event(self, store: Store) -> None:
        """A key is kept when its event was removed, for as long as keys are kept."""
        self.append(store, [record(idempotency_key="k")])
        self.run(store, Prune(NOW + 1, NOW, 0, 100))
        assert self.log(store) == []
        assert self.places(store, record(idempotency_key="k"))[0].duplicate
        self.run(store, Prune(None, NOW + 1, 0, 100))
        assert not self.places(store, record(idempotency_key="k"))[0].duplicate

    def test_key_survives_reopening(self, store: Store) -> None:
        """A key is known after the store was opened again."""
        self.append(store, [record(idempotency_key="k")])
        self.reopen(store)
        assert self.places(store, record(idempotency_key="k"))[0].duplicate


class Scheduled(ConformanceBase):
    """Events that wait for their time."""

    def test_not_in_the_log(self, store: Store) -> None:
        """A scheduled event has no position and is not in the log."""
        event = record(due_at=NOW + 60)
        committed = self.append(store, [event])
        assert committed.appends == [[Stored(event.id, None)]]
        assert (self.log(store), list(committed.events), event.position) == ([], [], 0)
        assert store.read(NextDue()) == NOW + 60

    def test_promoted_in_order(self, store: Store) -> None:
        """What is due enters the log in the order of due time, then id, with the time at which it was promoted."""
        late, early, same, future = (record(due_at=NOW + second, headers="{}") for second in (2, 1, 1, 60))
        self.append(store, [late, early, same, future])
        committed = store.commit(Batch(NOW + 5, commands=[Promote(NOW + 5, 100)]))
        assert committed.results == [Promoted(NOW + 60)]
        assert [r.id for r in committed.events] == [early.id, same.id, late.id]
        assert (committed.previous_head, committed.head) == (0, 3)
        found = self.page(store).records
        assert [(r.id, r.position, r.time) for r in found] == [(r.id, r.position, NOW + 5) for r in committed.events]
        assert [(r.data, r.headers, r.fault) for r in found] == [(early.data, "{}", None)] * 3

    def test_promoted_in_steps(self, store: Store) -> None:
        """A promotion moves at most so many, and tells when to come again."""
        self.append(store, [record(due_at=NOW + second) for second in (1, 2, 3)])
        assert self.run(store, Promote(NOW + 5, 2)) == Promoted(NOW + 3)
        assert self.run(store, Promote(NOW + 5, 2)) == Promoted(None)
        assert len(self.log(store)) == 3

    def test_promoted_before_appends(self, store: Store) -> None:
        """What a batch promotes comes before what it appends."""
        due, event = record(due_at=NOW), record()
        self.append(store, [due])
        committed = store.commit(Batch(NOW, appends=[[event]], commands=[Promote(NOW, 10)]))
        assert [r.id for r in committed.events] == self.log(store) == [due.id, event.id]

    def test_nothing_due(self, store: Store) -> None:
        """A promotion with nothing due changes nothing."""
        assert self.run(store, Promote(NOW, 10)) == Promoted(None)
        assert store.read(NextDue()) is None

    def test_cancel(self, store: Store) -> None:
        """A cancelled event never enters the log, and its key is free again."""
        event = record(due_at=NOW + 60, idempotency_key="k")
        self.append(store, [event])
        assert self.run(store, Cancel(event.id)) is True
        assert self.run(store, Cancel(event.id)) is False
        self.run(store, Promote(NOW + 90, 10))
        assert self.log(store) == []
        assert not self.places(store, record(idempotency_key="k"))[0].duplicate

    def test_cancel_too_late(self, store: Store) -> None:
        """What is in the log cannot be cancelled, and keeps its key."""
        event = record(idempotency_key="k")
        self.append(store, [event])
        assert self.run(store, Cancel(event.id)) is False
        assert self.places(store, record(idempotency_key="k"))[0].duplicate

    def test_duplicate_of_a_scheduled_event(self, store: Store) -> None:
        """The key of a scheduled event gives its id; its position too, once it has entered the log."""
        event = record(due_at=NOW + 60, idempotency_key="k")
        self.append(store, [event])
        assert self.places(store, record(idempotency_key="k")) == [Stored(event.id, None, duplicate=True)]
        self.run(store, Promote(NOW + 60, 10))
        assert self.places(store, record(idempotency_key="k")) == [Stored(event.id, 1, duplicate=True)]

    def test_keys_of_scheduled_events_stay(self, store: Store) -> None:
        """The key of an event that is still scheduled is not removed, however old."""
        self.append(store, [record(due_at=NOW + 60, idempotency_key="k")])
        self.run(store, Prune(None, NOW + 30, 0, 100))
        assert self.places(store, record(idempotency_key="k"))[0].duplicate

    def test_scheduled_survives_reopening(self, store: Store) -> None:
        """A scheduled event is there after the store was opened again."""
        event = record(due_at=NOW + 60)
        self.append(store, [event])
        self.reopen(store)
        self.run(store, Promote(NOW + 60, 10))
        assert self.log(store) == [event.id]
        (found,) = self.page(store).records
        assert stored_part(found) == stored_part(msgspec.structs.replace(event, position=1, time=NOW + 60))
