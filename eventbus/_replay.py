"""History again: `replay`, `rewind` and `history`.

publish → journal → store → *lanes* → workers → outcome. All three read pages of the log. A replay hands what it reads to the
lanes of the subscriptions, beside their live events; a rewind only sets checkpoints back, and the lanes read by themselves.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Self

import msgspec

from eventbus._intake import runs_by_type
from eventbus._lanes import Lane
from eventbus._model import Envelope, ReplaySummary
from eventbus._side import Item, SideSource
from eventbus._typing import Point, Progress
from eventbus.errors import BusNotOpen, ConfigurationError, LaneLost, RangeNotRetained, UnknownSubscription
from eventbus.stores.base import LARGEST, Events, LogState, Page, PositionBefore, Record, Retained, covers

if TYPE_CHECKING:
    from eventbus._declared import Declared
    from eventbus._dispatch import Dispatcher
    from eventbus._membership import Membership
    from eventbus._reader import Reader
    from eventbus._serving import Serving

PAGE = 500
PAGE_BYTES = 1_048_576
AHEAD = 2
"""Pages of a replay that are being delivered at once."""


class Range(msgspec.Struct, frozen=True):
    """A stretch of the log.

    Attributes:
        after, until: positions; exclusive and inclusive.
        since_time, until_time: unix seconds, inclusive, or None.
    """

    after: int
    until: int
    since_time: float | None = None
    until_time: float | None = None


def _timestamp(name: str, point: datetime) -> float:
    if point.utcoffset() is None:
        raise ConfigurationError(f"{name}={point!r} has no time zone; give an aware datetime, such as datetime.now(UTC)")
    return point.timestamp()


def _checked(name: str, point: object) -> None:
    if point is None or isinstance(point, datetime):
        return
    if isinstance(point, int) and not isinstance(point, bool) and 0 <= point <= LARGEST:
        return
    raise ConfigurationError(f"{name}={point!r}; expected an aware datetime, or a position (an int from 0)")


class History:
    """Finds and reads stretches of the log."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def range(self, since: Point, after: int | None, until: Point) -> Range:
        """The stretch that is meant.

        Raises:
            ConfigurationError: a point that cannot be read, or both `since` and `after`.
            RangeNotRetained: it begins before what is retained.
        """
        for name, point in (("since", since), ("after", after), ("until", until)):
            _checked(name, point)
        if since is not None and after is not None:
            raise ConfigurationError("give since= (inclusive) or after= (exclusive), not both")
        if isinstance(after, datetime):
            raise ConfigurationError("after= takes a position; for a time use since=")
        log = await self._reader.ask(LogState())
        since_time = _timestamp("since", since) if isinstance(since, datetime) else None
        until_time = _timestamp("until", until) if isinstance(until, datetime) else None
        start = await self._start(since, after, since_time, log)
        last = min(until, log.head) if isinstance(until, int) else log.head
        return Range(start, last, since_time, until_time)

    async def _start(self, since: Point, after: int | None, since_time: float | None, log: Retained) -> int:
        if since_time is not None:
            if log.pruned_to and since_time <= log.pruned_time:
                raise RangeNotRetained(
                    f"since={since} reaches back to events that retention has removed; the newest of them is of "
                    f"{datetime.fromtimestamp(log.pruned_time).astimezone().isoformat()}"
                )
            return await self._reader.ask(PositionBefore(since_time))
        if since is None and after is None:
            return 0
        start = after if after is not None else max(0, int(since) - 1)  # type: ignore[arg-type]  # a position
        if start < log.pruned_to:
            raise RangeNotRetained(f"the range begins at {start}, and retention has removed events up to {log.pruned_to}")
        return start

    async def check_complete(self) -> None:
        """Raise `RangeNotRetained` if the log does not reach back to its beginning."""
        log = await self._reader.ask(LogState())
        if log.pruned_to:
            raise RangeNotRetained(
                f"retention has removed events up to {log.pruned_to}; give since= or after= to rewind to what is left"
            )

    async def page(self, stretch: Range, after: int, types: tuple[str, ...] | None, key: str | None = None) -> Page:
        """The next page of a stretch."""
        return await self._reader.ask(
            Events(after, PAGE, PAGE_BYTES, stretch.until, types, key, stretch.since_time, stretch.until_time)
        )


class Envelopes:
    """All of a stretch that matches, page by page. No generator: one that is left early would have to be closed."""

    def __init__(
        self,
        history: History,
        points: tuple[Point, int | None, Point],
        patterns: Sequence[str],
        key: str | None,
        envelope: Callable[[Record], Envelope],
    ) -> None:
        self._history = history
        self._points = points
        self._patterns = patterns
        self._key = key
        self._envelope = envelope
        self._stretch: Range | None = None
        self._after = 0
        self._records: deque[Record] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        """The next envelope; the stretch is settled with the first."""
        if self._stretch is None:
            self._stretch = await self._history.range(*self._points)
            self._after = self._stretch.after
        while not self._records:
            if self._after >= self._stretch.until:
                raise StopAsyncIteration
            page = await self._history.page(self._stretch, self._after, exact(self._patterns), self._key)
            self._records.extend(record for record in page.records if matches(self._patterns, record.type))
            self._after = page.up_to
        return self._envelope(self._records.popleft())

    async def aclose(self) -> None:
        """Nothing to do; so that `contextlib.aclosing` takes it like a generator."""


def matches(patterns: Sequence[str], type: str) -> bool:
    """Whether a type is meant by any of the patterns; without any, it is."""
    return not patterns or covers(patterns, type)


def exact(patterns: Sequence[str]) -> tuple[str, ...] | None:
    """The names to read by, or None where all must be read."""
    return None if not patterns or any(p.endswith("*") for p in patterns) else tuple(patterns)


def targets_of(dispatcher: Dispatcher, declared: Declared, to: object) -> list[Serving]:
    """The subscriptions that a replay is for: those named by `to`, or all that allow it."""
    servings = dispatcher.servings
    if to is None:
        return [serving for serving in servings.values() if serving.options.replay]
    targets: dict[str, Serving] = {}
    for each in to if isinstance(to, Iterable) and not isinstance(to, str) else [to]:
        name = declared.declared_name(each)
        if name not in servings:
            raise UnknownSubscription(f"the subscription {name!r} is not dispatched here; a replay needs its handler")
        if not servings[name].options.replay:
            raise ConfigurationError(f"the subscription {name!r} was declared with replay=False")
        targets[name] = servings[name]
    return list(targets.values())


class _Counts(msgspec.Struct):
    """What a replay has done so far; see `ReplaySummary`."""

    position: int
    events: int = 0
    handled: int = 0
    dead: int = 0


class _Portion(msgspec.Struct, eq=False):
    """A page that is being delivered."""

    up_to: int
    counts: _Counts
    done: Callable[[], object]
    open: int = 1  # deliveries that have not ended, and one until all of the page is handed out

    def ended(self, acked: bool) -> None:
        """One of its deliveries has."""
        if acked:
            self.counts.handled += 1
        else:
            self.counts.dead += 1
        self.open -= 1
        if not self.open:
            self.done()


class Replay:
    """One running replay."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        membership: Membership,
        history: History,
        targets: Sequence[Serving],
        patterns: Sequence[str],
        stretch: Range,
        *,
        rate: float | None,
        dry_run: bool,
        exclusive: bool,
        progress: Progress | None,
    ) -> None:
        self._dispatcher = dispatcher
        self._environment = dispatcher.environment
        self._membership = membership
        self._history = history
        self._targets = targets
        self._patterns = patterns
        self._stretch = stretch
        self._rate = rate
        self._dry_run = dry_run
        self._exclusive = exclusive and not dry_run
        self._progress = progress
        self._portions: deque[_Portion] = deque()
        self._sources: dict[Lane, SideSource] = {}
        self._counts = _Counts(stretch.after)
        self._over = False
        self._moved = self._environment.loop.waiter()
        self._paced = self._environment.clock.monotonic()

    async def run(self) -> ReplaySummary:
        """Deliver the stretch; returns when every delivery of it has ended."""
        pins, after = self._dispatcher.pins, self._stretch.after
        held_back = self._hold_back()
        pins.append(after)
        held = [] if self._dry_run else [target.options.name for target in self._targets]
        try:
            await self._membership.hold(held, self._check_open)
            while after < self._stretch.until:
                page = await self._history.page(self._stretch, after, self._types())
                await self._deliver(page)
                after = page.up_to
                await self._wait_for_portions(AHEAD - 1)
            await self._wait_for_portions(0)
            if self._counts.dead:
                await self._dispatcher.written()
        finally:
            self._over = True
            pins.remove(self._stretch.after)
            self._membership.let_go(held)
            for target in held_back:
                target.hold_back(None)
        return self._summary()

    def _hold_back(self) -> list[Serving]:
        """Have the subscriptions give out nothing but this replay, if it is exclusive."""
        if not self._exclusive:
            return []
        taken = [target.options.name for target in self._targets if target.exclusive is not None]
        if taken:
            raise ConfigurationError(
                f"an exclusive replay to {', '.join(map(repr, taken))} is running; begin another when it is over"
            )
        held_back = list(self._targets)
        for target in held_back:
            target.hold_back(self)
        return held_back

    def _summary(self) -> ReplaySummary:
        counts = self._counts
        return ReplaySummary(counts.position, counts.events, counts.handled, counts.dead, self._dry_run)

    def _types(self) -> tuple[str, ...] | None:
        types = exact(self._patterns)
        if types is not None:
            return types
        wanted: set[str] = set()
        for target in self._targets:
            of_target = target.exact_types()
            if of_target is None:
                return None
            wanted.update(of_target)
        return tuple(wanted)

    async def _deliver(self, page: Page) -> None:
        portion = _Portion(page.up_to, self._counts, self._moved_on)
        self._portions.append(portion)
        for type, records in runs_by_type(page.records):
            targets = [t for t in self._targets if t.wants(type)] if matches(self._patterns, type) else []
            if not targets:
                continue
            if self._rate is None:
                self._hand_over(targets, records, portion)
                continue
            for record in records:
                await self._pace(self._rate)
                self._hand_over(targets, (record,), portion)
        portion.open -= 1
        await self._advance()

    def _hand_over(self, targets: Sequence[Serving], records: Sequence[Record], portion: _Portion) -> None:
        self._counts.events += len(records)
        if self._dry_run:
            return
        items: dict[Lane, list[Item]] = {}
        for record in records:
            for target in targets:
                lane = target.lane_of(record)
                if lane is None:
                    self._check_open()
                    raise LaneLost(self._counts.position)
                items.setdefault(lane, []).append(Item(record, portion.ended, self._goes_on))
        for lane, some in items.items():
            portion.open += len(some)
            source = self._sources.get(lane)
            if source is None:
                source = self._sources[lane] = SideSource(lane, self)
            source.add(some)

    def _goes_on(self) -> bool:
        return not self._over

    def _moved_on(self) -> None:
        self._moved.set()

    async def _pace(self, rate: float) -> None:
        clock = self._environment.clock
        self._paced = max(self._paced, clock.monotonic()) + 1 / rate
        while self._paced > clock.monotonic():
            self._check_open()
            self._environment.timers.at(self._paced, self._moved.set)
            await self._wait()

    async def _wait_for_portions(self, most: int) -> None:
        """Wait until at most so many pages are being delivered."""
        await self._advance()
        while len(self._portions) > most:
            self._check_open()
            await self._wait()
            await self._advance()

    async def _wait(self) -> None:
        await self._moved.wait()
        self._moved = self._environment.loop.waiter()

    async def _advance(self) -> None:
        """Count the pages at the start that are done, and tell of each."""
        while self._portions and not self._portions[0].open:
            self._counts.position = self._portions.popleft().up_to
            result = None if self._progress is None else self._progress(self._summary())
            if isinstance(result, Awaitable) and inspect.isawaitable(result):
                await result

    def _check_open(self) -> None:
        if self._dispatcher.closing:
            raise BusNotOpen(f"the bus was closed during a replay; replay(after={self._counts.position}) goes on")
        removed = [target.options.name for target in self._targets if target.closed]
        if removed:
            raise UnknownSubscription(f"{', '.join(map(repr, removed))} was removed during a replay to it")
        if any(lane.moved for lane in self._sources):
            raise LaneLost(self._counts.position)

    def interrupt(self) -> None:
        """The bus is closing, or a subscription has been removed."""
        self._moved.set()
