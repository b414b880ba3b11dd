"""A random program against a real bus in a simulated world: one run, from a seed.

Several subscriptions whose handlers behave in every way there is, publishers and people who interfere, on a store in bad weather;
crashes, and another start. At the end the world is made good, everything is worked off, and `Truth` judges.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal
from unittest import mock

import anyio
import attrs
from anyio.lowlevel import current_token

from eventbus import (
    Breaker,
    Delivery,
    Draft,
    EventBus,
    Reject,
    RetryAfter,
    RetryPolicy,
    _intake,
    _lanes,
    _loose,
    _running,
    _side,
    event,
)
from eventbus._clock import Ids
from eventbus._codec import JSONCodec
from eventbus.errors import (
    BusNotOpen,
    EventBusError,
    IdempotencyConflict,
    PublishOutcomeUnknown,
    StoreCorrupt,
    StoreError,
    StoreLost,
)
from tests.simulation.clockwork import Scheduler, SimulatedLoop
from tests.simulation.disk import Disk
from tests.simulation.faulty import FaultyStore, Weather
from tests.simulation.truth import Truth

Behaviour = Literal["ok", "slow", "fails", "never", "rejects", "later", "hangs", "returns", "publishes"]
_BEHAVIOURS: tuple[Behaviour, ...] = ("ok", "slow", "fails", "never", "rejects", "later", "hangs", "returns", "publishes")
_WEIGHTS = (40, 12, 12, 5, 3, 4, 3, 12, 6)


@event("a", key="key")
@attrs.frozen
class A:
    name: str
    key: str | None


@event("b", key="key")
@attrs.frozen
class B:
    name: str
    key: str | None


@event("c", key="key")
@attrs.frozen
class C:
    name: str
    key: str | None


CODEC = JSONCodec()  # one for all: to prepare it for a class takes longer than a run
KINDS: tuple[type[A | B | C], ...] = (A, B, C)
KEYS = (None, "k", "l", "m")


@attrs.frozen
class Wanted:
    """A subscription of a program."""

    name: str
    kinds: tuple[type, ...]
    order: Literal["type", "key", "log", "none"]
    concurrency: int | None
    retry: RetryPolicy
    on_exhausted: Literal["dead_letter", "pause", "park"]
    breaker: Breaker | None
    plain: bool


def _wanted(seed: random.Random, name: str) -> Wanted:
    order: Any = seed.choice(("type", "key", "log", "none"))
    return Wanted(
        name,
        _in_order(seed.sample(KINDS, seed.randint(1, 3))),
        order,
        seed.randint(1, 4) if order in {"key", "none"} else None,
        RetryPolicy(attempts=seed.randint(1, 4), first=0.05, cap=1.0),
        _on_exhausted(seed.random(), order),
        seed.choice((None, None, Breaker(), Breaker(failures=2, first=0.2, cap=1.0))),
        seed.random() < 0.3,
    )


def _in_order(kinds: Iterable[type]) -> tuple[type, ...]:
    return tuple(sorted(kinds, key=lambda kind: kind.__name__))


def _types_of(wanted: Wanted) -> list[str]:
    """The names of its types."""
    return [kind.__name__.lower() for kind in wanted.kinds]


def _on_exhausted(chance: float, order: str) -> Literal["dead_letter", "pause", "park"]:
    if order == "key" and chance < 0.4:
        return "park"
    return "pause" if chance > 0.9 else "dead_letter"


class Run:
    """One run. Its seed decides everything; in three of ten another instance comes and goes."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.random = random.Random(f"{seed} program")
        self.disk = Disk()
        self.truth = Truth(self.disk)
        self.weather = self._weather()
        self.others = self.random.random() < 0.3
        self.wanted = [_wanted(self.random, f"s{number}") for number in range(self.random.randint(1, 3))]
        self.ever = {wanted.name: {*wanted.kinds} for wanted in self.wanted}
        self.good = False
        self.buses: list[EventBus] = []
        self._names = 0
        self._scheduled: list[str] = []
        self._scheduler: Scheduler

    def _weather(self) -> Weather:
        chance = self.random
        if chance.random() < 0.3:
            return Weather(slow=0.1)
        return Weather(
            slow=chance.choice((0.0, 0.05, 0.3)),
            refuses=chance.choice((0.0, 0.0, 0.05, 0.3)),
            unknown=chance.choice((0.0, 0.0, 0.05)),
            fatal=chance.choice((0.0, 0.0, 0.01)),
            blind=chance.choice((0.0, 0.0, 0.05)),
            crash=chance.choice((0.0, 0.0, 0.003, 0.02)),
        )

    # -------------------------------------------------------------- the run

    def run(self) -> list[str]:
        """Do it all; what was wrong."""
        for number in range(self.random.randint(1, 4)):
            if number and self.random.random() < 0.2:
                self._deploy()
            self._begin(f"{self.seed} {number}", self._live)
        self.good = True
        self.weather = Weather()
        for place, wanted in enumerate(self.wanted):
            self._take_over(place, attrs.evolve(wanted, kinds=_in_order(self.ever[wanted.name])))
        self._begin(f"{self.seed} end", self._make_good)
        if not self.truth.faults:
            self.truth.judge()
            self.truth.judge_chains(self._owed())
        return self.truth.faults

    def _deploy(self) -> None:
        """Another program: one of its subscriptions has other types, or another order, which hold from here on."""
        place = self.random.randrange(len(self.wanted))
        if self.random.random() < 0.5:
            kinds = _in_order(self.random.sample(KINDS, self.random.randint(1, 3)))
            self._take_over(place, attrs.evolve(self.wanted[place], kinds=kinds))
            return
        if any(row.waiting.state == "parked" for row in self.disk.rows.values()):
            return  # refused while keys are parked
        now = _wanted(self.random, self.wanted[place].name)
        self._take_over(place, attrs.evolve(now, kinds=self.wanted[place].kinds))

    def _take_over(self, place: int, wanted: Wanted) -> None:
        if wanted == self.wanted[place]:
            return
        self.wanted[place] = wanted
        self.ever[wanted.name] |= {*wanted.kinds}
        self.truth.note(f"deploys {wanted}")
        self.truth.forget_order(wanted.name)

    def _begin(self, seed: str, body: Callable[[], Awaitable[None]]) -> None:
        """One life of the program, to its end or to a crash."""
        if self.truth.faults:
            return
        now = self.random.random() if self.truth.scheduler is None else self.truth.scheduler.now + self.random.random() * 15
        scheduler = self._scheduler = self.truth.scheduler = Scheduler(seed, now)
        try:
            self.buses = []
            with _world(scheduler):
                self.truth.note("begins")
                ended = scheduler.run(self._life(scheduler, body))
                self.truth.note("ends" if ended else "CRASHES")
        except Exception as error:
            self.truth.wrong(f"it ends with {error!r}")
        for complaint in scheduler.complaints:
            self.truth.wrong(complaint)
        self.disk.connected.clear()

    async def _life(self, scheduler: Scheduler, body: Callable[[], Awaitable[None]]) -> None:
        bus = self._bus(scheduler)
        try:
            async with self._opened(scheduler, bus):
                await body()
        except (StoreError, PublishOutcomeUnknown) as error:
            self.truth.note(f"the bus ends: {error!r}")
            if self.good:
                raise

    @contextlib.asynccontextmanager
    async def _opened(self, scheduler: Scheduler, bus: EventBus) -> AsyncIterator[None]:
        store = FaultyStore(self.disk, scheduler, self.weather, self.truth)
        async with bus.open(store, stop_timeout=self.random.choice((0.0, 0.1, 1.0))):
            self.truth.note("is open")
            self.buses.append(bus)
            try:
                yield
            finally:
                self.truth.note("stops")
                self.buses.remove(bus)

    async def _another(self, scheduler: Scheduler) -> None:
        """Another instance comes, and goes."""
        chance = self.random
        await anyio.sleep(chance.random())
        try:
            async with self._opened(scheduler, self._bus(scheduler)):
                await anyio.sleep(chance.random() * 4)
        except (StoreError, PublishOutcomeUnknown) as error:
            self.truth.note(f"the other bus ends: {error!r}")

    def _bus(self, scheduler: Scheduler) -> EventBus:
        chance = self.random
        bus = EventBus(
            "not opened",
            clock=scheduler.clock,
            codec=CODEC,
            workers=chance.choice((2, 4, 100)),
            retention=chance.choice((None, timedelta(seconds=1))),
            max_pending=chance.choice((3, 10_000)),
        )
        for wanted in self.wanted:
            bus.subscribe(
                *wanted.kinds,
                name=wanted.name,
                order=wanted.order,
                concurrency=wanted.concurrency,
                retry=wanted.retry,
                on_exhausted=wanted.on_exhausted,
                breaker=wanted.breaker,
                timeout=2.0,
                start="beginning",
            )(self._handler(wanted))
        return bus

    @property
    def bus(self) -> EventBus:
        """One of those that are open."""
        if not self.buses:
            raise BusNotOpen("none is open")
        return self.random.choice(self.buses)

    # -------------------------------------------------------------- handlers

    def _behaviour(self, subscription: str, name: str) -> tuple[Behaviour, random.Random]:
        chance = random.Random(f"{self.seed} {subscription} {name}")
        (kind,) = chance.choices(_BEHAVIOURS, _WEIGHTS)
        if kind in {"returns", "publishes"} and name.count(">") >= 2:
            kind = "ok"
        return kind, chance

    def _child(self, subscription: str, name: str, chance: random.Random) -> A | B | C:
        return chance.choice(KINDS)(f"{name}>{subscription}", chance.choice(KEYS))

    def _handler(self, wanted: Wanted) -> Callable[..., Any]:
        def plain(thing: A | B | C, delivery: Delivery) -> object:
            outcome, seconds = self._attempt(wanted, thing, delivery)
            if seconds:
                self._scheduler.sleep(min(seconds, 1.0))
            return self._end(wanted, thing, delivery, outcome)

        async def waiting(thing: A | B | C, delivery: Delivery) -> object:
            outcome, seconds = self._attempt(wanted, thing, delivery)
            if seconds:
                await anyio.sleep(seconds)
            return self._end(wanted, thing, delivery, outcome)

        return plain if wanted.plain else waiting

    def _attempt(self, wanted: Wanted, thing: A | B | C, delivery: Delivery) -> tuple[object, float]:
        """What an attempt is to end with, and after how many seconds."""
        number = self.truth.begins(wanted.name, delivery, thing.name)
        kind, chance = self._behaviour(wanted.name, thing.name)
        if kind == "returns":
            return self._child(wanted.name, thing.name, chance), 0.0
        if kind == "publishes":
            delivery.publish(self._child(wanted.name, thing.name, chance))
            return None, chance.choice((0.0, 0.1))
        if self.good or kind == "ok":
            return None, 0.0
        if kind == "slow":
            return None, chance.random() * 0.5
        if kind == "hangs":
            return None, 0.0 if number > 1 else 5.0
        if kind == "fails" and number > chance.randint(1, 3):
            return None, 0.0
        ends: dict[str, Exception] = {"rejects": Reject("as planned"), "later": RetryAfter(0.3)}
        if kind == "later" and number > 2:
            return None, 0.0
        return ends.get(kind, ValueError("as planned")), chance.choice((0.0, 0.0, 0.05))

    def _end(self, wanted: Wanted, thing: A | B | C, delivery: Delivery, outcome: object) -> object:
        if isinstance(outcome, Exception):
            self.truth.note(f"{wanted.name} fails {thing.name}: {outcome!r}")
            raise outcome
        self.truth.succeeded(wanted.name, thing.name, replaying=delivery.replaying)
        return outcome

    def _owed(self) -> Iterator[tuple[str, str, str]]:
        for wanted in self.wanted:
            for name in list(self.truth.log):
                if self._behaviour(wanted.name, name)[0] in {"returns", "publishes"}:
                    yield wanted.name, name, f"{name}>{wanted.name}"

    # -------------------------------------------------------------- a life in bad weather

    async def _live(self) -> None:
        chance = self.random
        async with anyio.create_task_group() as group:
            for _ in range(chance.randint(1, 3)):
                group.start_soon(self._acts, self._publish, chance.randint(1, 12))
            group.start_soon(self._acts, self._interfere, chance.randint(0, 6))
            if self.others and chance.random() < 0.7:
                group.start_soon(self._another, self._scheduler)
            if chance.random() < 0.15:
                group.start_soon(self._crash_after, chance.random() * 3)

    async def _crash_after(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        self._scheduler.crash()
        await anyio.sleep_forever()

    async def _acts(self, act: Callable[[], Awaitable[None]], times: int) -> None:
        for _ in range(times):
            await anyio.sleep(self.random.choice((0.0, 0.0, 0.01, 0.3, 1.0)) * self.random.random())
            limit = self.random.random() * 0.02 if self.random.random() < 0.1 else 60.0
            with anyio.move_on_after(limit):
                try:
                    await act()
                except (BusNotOpen, StoreCorrupt, StoreLost):
                    return
                except (EventBusError, TimeoutError) as error:
                    self.truth.note(f"{act.__name__}: {error!r}")

    def _new(self) -> A | B | C:
        self._names += 1
        return self.random.choice(KINDS)(f"e{self._names}", self.random.choice(KEYS))

    def _draft(self) -> Draft:
        chance = self.random
        idempotency_key = None
        thing = self._new()
        if chance.random() < 0.2:
            number = chance.randint(1, 4)
            idempotency_key = f"i{number}"
            thing = KINDS[number % 3](f"i{number}", KEYS[number % 4])
        due = timedelta(seconds=chance.random() * 3) if chance.random() < 0.15 else None
        return Draft(thing, idempotency_key=idempotency_key, due=due)

    async def _publish(self) -> None:
        chance, truth = self.random, self.truth
        drafts = [self._draft() for _ in range(chance.choice((1, 1, 1, 3, 12)))]
        names = [draft.event.name for draft in drafts]  # type: ignore[attr-defined]
        fresh = [name for name in names if not name.startswith("i")]
        truth.publishes(names)
        try:
            if len(drafts) == 1:
                draft = drafts[0]
                receipts = [await self.bus.publish(draft.event, idempotency_key=draft.idempotency_key, due=draft.due)]
            else:
                receipts = await self.bus.publish_many(drafts)
        except PublishOutcomeUnknown:
            return
        except (StoreError, BusNotOpen, IdempotencyConflict) as error:
            truth.definitely_not(fresh, error)
            raise
        for name, receipt in zip(names, receipts, strict=True):
            truth.published(name, receipt)
            if receipt.position is None:
                self._scheduled.append(receipt.id)
        if chance.random() < 0.3:
            await chance.choice(receipts).handled(timeout=chance.random() * 3)

    async def _interfere(self) -> None:
        what = self.random.choice(INTERFERENCES)
        wanted = self.random.choice(self.wanted)
        self.truth.note(f"somebody: {what.__name__} {wanted.name}")
        await what(self, wanted.name)

    async def pause(self, name: str) -> None:
        await self.bus.pause(name)

    async def resume(self, name: str) -> None:
        await self.bus.resume(name)

    async def redrive(self, name: str) -> None:
        await self.bus.dead_letters.redrive(subscription=name)

    async def discard(self, name: str) -> None:
        for letter in await self.bus.dead_letters.list(subscription=name, limit=2):
            self.truth.discarded.add((name, letter.envelope.event.name))  # type: ignore[attr-defined]
            await self.bus.dead_letters.discard(letter.id)

    async def replay(self, name: str) -> None:
        await self.bus.replay(to=name)

    async def replay_alone(self, name: str) -> None:
        await self.bus.replay(to=name, exclusive=True)

    async def rewind(self, name: str) -> None:
        await self.bus.rewind(name, after=self.random.randint(0, max(1, self.disk.head)))

    async def drain(self, name: str) -> None:
        await self.bus.drain(timeout=self.random.random() * 5)

    async def cancel(self, name: str) -> None:
        if self._scheduled:
            id = self.random.choice(self._scheduled)
            self.truth.cancelled.add(id)
            await self.bus.cancel(id)

    async def look(self, name: str) -> None:
        await self.bus.stats()
        async for envelope in self.bus.history():
            await self.bus.status(envelope.id)

    # -------------------------------------------------------------- the end

    async def _make_good(self) -> None:
        """Nothing fails any more: resume, redrive, work off, until nothing is left."""
        for _ in range(10):
            await anyio.sleep(1)  # what is scheduled becomes due
            for wanted in self.wanted:
                await self.bus.resume(wanted.name)
            if self.disk.letters:
                await self.bus.dead_letters.redrive(all=True)
            scheduled = bool(self.disk.scheduled)
            left = await self.bus.drain(timeout=300)
            self.truth.note(f"drained, left {dict(left)}")
            served = all({*_types_of(wanted)} <= {*self.disk.subscriptions[wanted.name].types} for wanted in self.wanted)
            if served and not self.disk.letters and not scheduled and not any(left.values()):
                return
        self.truth.wrong(f"it is never worked off: {dict(left)}, {len(self.disk.letters)} dead letters")


INTERFERENCES: Sequence[Callable[[Run, str], Awaitable[None]]] = (
    *(
        Run.pause,
        Run.resume,
        Run.redrive,
        Run.discard,
        Run.replay,
        Run.replay_alone,
        Run.rewind,
        Run.drain,
        Run.drain,
        Run.cancel,
        Run.look,
    ),
)


@contextlib.contextmanager
def _world(scheduler: Scheduler) -> Iterator[None]:
    """What the bus takes for the machine."""
    backend = "checkpoint_if_cancelled"
    small = scheduler.random.random() < 0.5
    with contextlib.ExitStack() as stack:

        def put(place: object, name: str, thing: object) -> None:
            stack.enter_context(mock.patch.object(place, name, thing))

        put(_running, "current_loop", lambda: SimulatedLoop(scheduler, getattr(current_token().backend_class, backend)))
        put(_running, "Ids", partial(Ids, entropy=scheduler.random.randbytes))
        put(_running, "random", scheduler.random)
        if small:  # so that lanes fall behind, windows fill and pages are many, with few events
            for module, name, least in ((_intake, "QUEUE", 2), (_intake, "PAGE", 2), (_lanes, "AHEAD", 4), (_side, "_PAGE", 2)):
                put(module, name, least + scheduler.random.randrange(4))
            put(_loose, "WINDOW", 2 + scheduler.random.randrange(4))
            put(_loose, "HELD", 1 + scheduler.random.randrange(4))
        yield
