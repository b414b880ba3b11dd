"""Feeds that share a page of what others have committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from eventbus._intake import Budget, Feed, Intake, read_together
from eventbus.errors import StoreUnavailable
from eventbus.stores.base import Events, Page, Record


class _Asked:
    """A reader that notes what it is asked, and whom to answer; and timers that note what they are to do."""

    def __init__(self) -> None:
        self.questions: list[tuple[Events, Callable[[object], object]]] = []
        self.later: list[Callable[[], object]] = []

    def ask_then(self, query: Events, then: Callable[[object], object]) -> None:
        self.questions.append((query, then))

    def after(self, _seconds: float, function: Callable[[], object]) -> None:
        self.later.append(function)

    def answer(self, page: object) -> None:
        """Answer what was asked first."""
        self.questions.pop(0)[1](page)


class _Feeds:
    """Feeds of one lane each, all live at position 5, of a log whose head is 7."""

    def __init__(self, *types: tuple[str, ...] | None) -> None:
        self.asked = _Asked()
        anything = cast("Any", self.asked)
        self.feeds = [Feed(1, each, lambda _type: 0, anything, anything, lambda: 7) for each in types]
        budget = Budget(1_000_000)
        self.lanes = [Intake(feed, budget, 3, lambda: None) for feed in self.feeds]
        for feed, lane in zip(self.feeds, self.lanes, strict=True):
            feed.intakes[0] = lane
            lane.live = True

    def read(self) -> None:
        """Others have written after 5."""
        read_together(self.feeds, 5, cast("Any", self.asked))

    def positions(self) -> list[list[int]]:
        """What waits in each lane."""
        return [[each.position for each in iter(lane.pop, None)] for lane in self.lanes]


def _at(position: int, type: str, fault: str | None = None) -> Record:
    id = f"01900000-0000-7000-8000-{position:012x}"
    return Record(id, type, 1, 1.0, None, 0, None, "application/json", b"{}", position=position, fault=fault)


def test_each_gets_its_own_of_one_page() -> None:
    """By type, in the order of positions; those without any are live again as well."""
    feeds = _Feeds(("a",), ("b", "a"), ("c",))
    feeds.read()
    ((query, _),) = feeds.asked.questions
    assert (query.after, set(query.types or ())) == (5, {"a", "b", "c"})
    feeds.asked.answer(Page([_at(6, "a"), _at(7, "b")], 7, 7))
    assert all(lane.live for lane in feeds.lanes)
    assert [lane.reach() for lane in feeds.lanes] == [7, 7, 7]
    assert feeds.positions() == [[6], [6, 7], []]
    assert not feeds.asked.questions


def test_one_that_takes_all_types_has_all_read() -> None:
    """The page is of all types then."""
    feeds = _Feeds(("a",), None)
    feeds.read()
    assert feeds.asked.questions[0][0].types is None
    feeds.asked.answer(Page([_at(6, "z"), _at(7, "a")], 7, 7))
    assert feeds.positions() == [[7], [6, 7]]


def test_what_is_left_of_a_page_that_was_cut_is_read_together_again() -> None:
    """By those that are still where it ended; one that has no room reads when it has, from where it is."""
    feeds = _Feeds(("a",), ("b",), ("c",))
    feeds.read()
    feeds.asked.answer(Page([_at(6, "a")], 6, 7))
    ((query, _),) = feeds.asked.questions
    assert (query.after, set(query.types or ())) == (6, {"a", "b", "c"})
    feeds.asked.answer(Page([_at(7, "b")], 7, 7))
    assert all(lane.live for lane in feeds.lanes)
    assert feeds.positions() == [[6], [7], []]
    assert not feeds.asked.questions


def test_what_is_announced_meanwhile_is_read_together_as_well() -> None:
    """Others go on to write while a page is under way, and this instance writes between."""
    feeds = _Feeds(("a",), ("b",))
    feeds.read()
    feeds.read()  # 7 was announced after 6, and the page ends at 6
    feeds.asked.answer(Page([_at(6, "a")], 6, 6))
    ((query, _),) = feeds.asked.questions
    assert query.after == 6
    feeds.asked.answer(Page([_at(7, "b")], 7, 7))
    assert all(lane.live for lane in feeds.lanes)
    assert feeds.positions() == [[6], [7]]


def test_a_page_without_an_end_is_not_shared_again() -> None:
    """What brings nobody further is each one's own."""
    feeds = _Feeds(("a",), ("b",))
    feeds.read()
    feeds.asked.answer(Page([], 5, 7))
    assert [(query.after, query.types) for query, _ in feeds.asked.questions] == [(5, ("a",)), (5, ("b",))]


def test_a_damaged_event_goes_to_whom_the_store_finds_it_for() -> None:
    """Its type may be what is damaged: which lane it belongs to, only the index says, so each feed asks for its own."""
    feeds = _Feeds(("a",), ("b",))
    feeds.read()
    feeds.asked.answer(Page([_at(6, "zzzz", "damaged"), _at(7, "b")], 7, 7))
    assert [(query.after, query.types) for query, _ in feeds.asked.questions] == [(5, ("a",)), (5, ("b",))]
    feeds.asked.answer(Page([_at(6, "zzzz", "damaged")], 7, 7))
    feeds.asked.answer(Page([_at(7, "b")], 7, 7))
    assert feeds.positions() == [[6], [7]]


def test_one_that_is_behind_reads_alone() -> None:
    """It has further to go."""
    feeds = _Feeds(("a",), ("b",))
    feeds.lanes[0].live = False
    feeds.read()
    assert sorted((query.after, query.types) for query, _ in feeds.asked.questions) == [(3, ("a",)), (5, ("b",))]


def test_a_page_that_cannot_be_read_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    """By each for its own, a moment later."""
    feeds = _Feeds(("a",), ("b",))
    feeds.read()
    feeds.asked.answer(StoreUnavailable("not now"))
    assert not feeds.asked.questions
    for again in feeds.asked.later:
        again()
    assert [(query.after, query.types) for query, _ in feeds.asked.questions] == [(5, ("a",)), (5, ("b",))]
    assert caplog.text.count("not now") == 1
