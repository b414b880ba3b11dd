"""The end of the log: what this instance and others have committed is announced in order, once, to those who want it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import anyio
import pytest

from eventbus import _tail as tail_module
from eventbus._intake import Budget, Feed, Intake, runs_by_type
from eventbus._loop import current_loop
from eventbus._tail import MOST_TYPES, Tail
from eventbus.errors import StoreUnavailable
from eventbus.stores.base import Committed, Events, Page, Record, slot_of


class _Log:
    """A tail that ends at 5 and feeds of one lane each, all live there. What is asked of the store is noted, and answered by the
    test; so is what is to be done later."""

    def __init__(self, *types: tuple[str, ...] | None) -> None:
        anything = cast("Any", self)
        self.questions: list[tuple[Events, Callable[[object], object]]] = []
        self.later: list[Callable[[], object]] = []
        self.feeds: list[Feed] = []
        self.lanes: list[Intake] = []
        self.offered: list[str] = []
        self.tail = Tail(anything, anything, lambda: self.feeds, self.offer)
        self.tail.begin(5)
        for each in types:
            self.add(each)

    def add(self, types: tuple[str, ...] | None, taken: int = 5, *, live: bool = True) -> Intake:
        """Another feed."""
        anything = cast("Any", self)
        feed = Feed(1, types, lambda _type: 0, anything, anything, lambda: self.tail.head, lambda: self.tail.end)
        lane = feed.intakes[0] = Intake(feed, Budget(1_000_000), taken, lambda: None)
        lane.live = live
        self.feeds.append(feed)
        self.lanes.append(lane)
        return lane

    def offer(self, records: Sequence[Record]) -> None:
        self.offered += [record.type for record in records]
        for type, run in runs_by_type(records):
            for feed in self.feeds:
                if feed.types is None or type in feed.types:
                    feed.offer(type, run)

    def ask_then(self, query: Events, then: Callable[[object], object]) -> None:
        self.questions.append((query, then))

    def after(self, _seconds: float, function: Callable[[], object]) -> None:
        self.later.append(function)

    def answer(self, *records: Record, up_to: int = 0, head: int = 0) -> None:
        """Answer what was asked first: with these records, and that there is no other up to its end."""
        query, then = self.questions.pop(0)
        end = up_to or query.until or records[-1].position
        then(Page(records, end, head or end))

    def asked(self) -> list[tuple[int, int | None, set[str] | None]]:
        """After which position, until which, for which types."""
        return [(q.after, q.until, None if q.types is None else set(q.types)) for q, _ in self.questions]

    def positions(self) -> list[list[int]]:
        """What waits in each lane."""
        return [[each.position for each in iter(lane.pop, None)] for lane in self.lanes]


def _at(position: int, type: str, fault: str | None = None) -> Record:
    id = f"01900000-0000-7000-8000-{position:012x}"
    return Record(id, type, 1, 1.0, None, 0, None, "application/json", b"{}", position=position, fault=fault)


def _commit(*records: Record) -> Committed:
    return Committed(records[0].position - 1, records[-1].position, (), {}, (), records)


def test_own_commits_are_offered_at_once() -> None:
    """Nothing is read for them; those who do not want them have nothing to do with it."""
    log = _Log(("a",), ("b",))
    log.tail.committed(_commit(_at(6, "a"), _at(7, "b")))
    assert log.positions() == [[6], [7]]
    assert [lane.reach() for lane in log.lanes] == [7, 7]
    assert not log.questions


def test_what_others_have_committed_is_read_once_for_all() -> None:
    """By type, in the order of positions; those without any have reached the head as well, and were not touched."""
    log = _Log(("a",), ("b", "a"), ("c",))
    log.tail.extend(7)
    assert log.asked() == [(5, 7, {"a", "b", "c"})]
    assert [lane.reach() for lane in log.lanes] == [5, 5, 5]
    log.answer(_at(6, "a"), _at(7, "b"))
    assert [(lane.live, lane.reach()) for lane in log.lanes] == [(True, 7)] * 3
    assert log.positions() == [[6], [6, 7], []]
    assert not log.questions


@pytest.mark.parametrize("types", [None, tuple(map(str, range(MOST_TYPES + 1)))], ids=["all", "many"])
def test_all_types_are_read_where_somebody_wants_all_or_many_are_wanted(types: tuple[str, ...] | None) -> None:
    """A store looks through the log for many types in any case."""
    log = _Log(("a",), types)
    log.tail.extend(6)
    assert log.asked() == [(5, 6, None)]


def test_nothing_is_read_for_those_who_are_behind() -> None:
    """They read for themselves; a page of theirs that is under way is not what brings them to the head."""
    log = _Log()
    lane = log.add(("a",), 3, live=False)
    lane.feed.read()
    assert log.asked() == [(3, 5, {"a"})]
    log.tail.extend(7)
    assert (log.tail.head, log.asked()) == (7, [(3, 5, {"a"})])
    log.answer(_at(4, "a"), up_to=6, head=6)  # read before 7 was there
    assert not lane.live
    assert log.asked() == [(6, 7, {"a"})]
    log.answer(_at(7, "a"))
    assert lane.live
    assert log.positions() == [[4, 7]]


def test_own_commits_wait_for_what_was_committed_before_them() -> None:
    """Each event comes in its turn, and what is at hand is not read: only what lies between is."""
    log = _Log(None)
    log.tail.committed(_commit(_at(8, "a"), _at(9, "a")))
    log.tail.committed(_commit(_at(12, "a")))
    assert log.asked() == [(5, 7, None)]
    log.answer(_at(6, "a"), _at(7, "a"))
    assert log.asked() == [(9, 11, None)]
    assert log.tail.head == 9
    log.answer(_at(10, "a"), _at(11, "a"))
    assert log.positions() == [[6, 7, 8, 9, 10, 11, 12]]
    assert not log.questions


def test_own_commits_that_were_read_before_they_were_told_of() -> None:
    """They are not announced twice, also if only some of one had been read."""
    log = _Log(None)
    log.tail.extend(7)
    log.answer(_at(6, "a"), _at(7, "a"))
    log.tail.committed(_commit(_at(6, "a"), _at(7, "a")))
    log.tail.committed(_commit(_at(7, "a"), _at(8, "a")))
    assert log.tail.head == 8
    assert log.positions() == [[6, 7, 8]]
    assert not log.questions


def test_more_own_commits_than_may_wait_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the log, and need no memory. Of all types, so that one comes by that nobody has a lane for yet."""
    monkeypatch.setattr(tail_module, "WAITING_BYTES", 1_000)
    log = _Log(("a",))
    log.tail.committed(_commit(_at(7, "a")))
    log.tail.committed(_commit(_at(8, "a"), _at(9, "b")))
    log.answer(_at(6, "a"), up_to=6)
    assert log.asked() == [(6, 9, None)]
    log.tail.committed(_commit(_at(11, "a")))
    log.answer(_at(7, "a"), _at(8, "a"), _at(9, "b"))
    assert log.offered == ["a", "a", "a", "b"]
    assert log.asked() == [(9, 10, {"a"})]


def test_commits_without_events_wait_for_nothing() -> None:
    """Outcomes are committed a hundred times a second; a page that takes long is not cut into pieces by them."""
    log = _Log(("a",))
    log.tail.extend(6)
    for head in (7, 8, 9):
        log.tail.committed(Committed(head, head, (), {}, (), ()))
    assert not log.tail._own
    log.answer(_at(6, "a"))
    assert log.asked() == [(6, 9, {"a"})]


def test_what_is_left_of_a_page_that_was_cut_is_read_next() -> None:
    """From where it ended."""
    log = _Log(("a",), ("b",))
    log.tail.extend(7)
    log.answer(_at(6, "a"), up_to=6)
    assert log.asked() == [(6, 7, {"a", "b"})]
    log.answer(_at(7, "b"))
    assert log.positions() == [[6], [7]]


def test_one_that_has_come_meanwhile_misses_nothing() -> None:
    """A page that was asked for before somebody wanted a type lacks its events: it is read again, with all of them."""
    log = _Log(("a",))
    log.tail.extend(7)
    log.add(("b",))
    log.answer(_at(6, "a"))
    assert log.asked() == [(5, 7, None)]
    assert log.tail.head == 5
    log.answer(_at(6, "a"), _at(7, "b"))
    assert log.positions() == [[6], [7]]


def test_one_that_has_come_up_meanwhile_misses_nothing() -> None:
    """Its own page brought it to the head that was announced, and the other page had been asked for without its types."""
    log = _Log(("a",))
    lane = log.add(("b",), 3, live=False)
    lane.feed.read()
    log.tail.extend(7)
    log.answer(_at(4, "b"), up_to=5, head=5)
    assert lane.live
    log.answer(_at(6, "a"))
    assert log.asked() == [(5, 7, None)]
    log.answer(_at(6, "a"), _at(7, "b"))
    assert log.positions() == [[6], [4, 7]]


def test_a_damaged_event_goes_to_whom_the_store_finds_it_for() -> None:
    """Its type may be what is damaged: which lane it belongs to, only the index says, so each feed asks for its own."""
    log = _Log(("a",), ("b",))
    log.tail.extend(7)
    log.answer(_at(6, "zzzz", "damaged"), _at(7, "b"))
    assert log.asked() == [(5, 7, {"a"}), (5, 7, {"b"})]
    log.answer(_at(6, "zzzz", "damaged"), up_to=7)
    log.answer(_at(7, "b"))
    assert log.positions() == [[6], [7]]
    assert all(lane.live for lane in log.lanes)


def test_a_damaged_slot_changes_no_lane() -> None:
    """The slot is computed anew; what is stored of it has no checksum."""
    log = _Log(None)
    record = _at(6, "a")
    record.key = "k"
    log.tail.extend(6)
    log.answer(record)
    assert record.slot == slot_of("k")


@pytest.mark.parametrize("answer", [StoreUnavailable("not now"), Page((), 5, 5)], ids=["error", "nothing new"])
def test_a_page_that_brings_nothing_holds_up_nobody_else(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    """Each feed reads for itself then, so that those whose events can be read go on."""
    log = _Log(("a",), ("b",))
    log.tail.extend(6)
    log.questions.pop(0)[1](answer)
    log.tail.committed(_commit(_at(7, "a")))
    assert log.tail.head == 7
    assert log.asked() == [(5, 6, {"a"}), (5, 6, {"b"})]
    log.questions.pop()[1](StoreUnavailable("neither"))
    log.answer(_at(6, "a"))
    assert log.positions()[0] == [6, 7]
    assert len(log.later) == 1
    assert caplog.text.count("not now") == isinstance(answer, StoreUnavailable)


def test_nothing_is_read_beyond_what_is_known_of() -> None:
    """What is committed here may have brought a type that a page was not asked for, and is told of together with that."""
    log = _Log()
    lane = log.add(("a",), 3, live=False)
    lane.feed.read()
    assert log.asked() == [(3, 5, {"a"})]
    log.answer(_at(4, "a"), head=6)
    assert lane.live
    lane.feed.retype(("a", "b"))
    log.tail.committed(_commit(_at(6, "b")))
    assert log.positions() == [[4, 6]]


def test_what_was_settled_before_the_lanes_were_made_anew_is_not_offered() -> None:
    """Others may have settled what they have committed, in lanes of before, by the time it is announced here."""
    log = _Log(("a",))
    log.feeds[0].settled_before = lambda record: record.position == 6
    log.tail.extend(7)
    log.answer(_at(6, "a"), _at(7, "a"))
    assert log.positions() == [[7]]


def test_lanes_that_nobody_serves_do_not_make_each_other_forget_without_end() -> None:
    """What one has forgotten is read again when it is asked for, not as soon as there is room."""
    log = _Log()
    first, second = (log.add((type,), 0, live=False) for type in "ab")
    first._budget = second._budget = Budget(1_500)  # two events
    for lane in (first, second):
        lane.feed.read()
    log.answer(_at(1, "a"), up_to=5)
    log.answer(_at(2, "b"), _at(3, "b"), up_to=5)
    assert (len(first), first.dozes, log.asked()) == (0, True, [])
    assert first.pop() is None
    assert log.asked() == [(0, 5, {"a"})]


def test_one_that_came_up_with_a_sibling_reads_again_when_it_must() -> None:
    """A lane that has forgotten, and got its part of a page that another lane of its feed asked for, is asked for nothing more."""
    log = _Log(("a",))
    log.lanes[0].dozes = True
    log.tail.extend(6)
    log.questions.pop(0)[1](StoreUnavailable("not now"))
    assert log.asked() == [(5, 6, {"a"})]


async def test_who_waits_is_told() -> None:
    """Of a position when it was announced; of all when nothing more will be, and then nobody waits any more."""
    log, loop = _Log(("a",)), current_loop()
    log.tail._loop = loop
    with anyio.fail_after(10):
        await log.tail.announced(5)
        loop.soon(lambda: log.tail.committed(_commit(_at(6, "b"))))
        await log.tail.announced(6)
        with anyio.move_on_after(0):
            await log.tail.announced(7)
        assert not log.tail._waiters
        loop.soon(log.tail.close)
        await log.tail.announced(7)
        await log.tail.announced(8)
