"""This instance among the others that have the store open: its lease, and which lanes it has.

Beside the way publish → journal → store → *lanes* → workers → outcome. Now and then, and whenever others have changed something,
it takes a step: it renews its lease, looks how all stand, gives up the lanes that are not its own any more, takes those that are
free and meant for it, and lets those that are meant for others come to rest, to give them back. Lanes that nobody had before
are taken here, too; so the start of a bus is a first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import anyio
import msgspec

from eventbus._journal import NOTICE_ALONE, NOTICE_INTERVAL
from eventbus._probation import running
from eventbus._serving import by_lane, lanes_wanted
from eventbus._sharing import LaneKey, are_served, fits, share
from eventbus.errors import BusNotOpen, EventBusError, InvalidSubscription
from eventbus.stores.base import (
    Beat,
    Claim,
    Instance,
    Lanes,
    Notice,
    Register,
    Release,
    Serves,
    Stand,
    Standing,
    Subscribed,
    Subscriptions,
    Suspicions,
    Types,
    WaitingRows,
    since_of,
)

if TYPE_CHECKING:
    from eventbus._dispatch import Dispatcher
    from eventbus._journal import Journal
    from eventbus._lanes import Lane
    from eventbus._loop import Waiter
    from eventbus._reader import Reader
    from eventbus._serving import Serving

_log = logging.getLogger("eventbus")

RETRY = 0.5
"""Seconds after which a step that failed is taken again."""
RENEWALS = 3
"""So many times in a lease it is renewed."""
PATIENCE = 0.1
"""Seconds after which who waits for lanes looks again, whatever has happened."""

NOBODY = Standing(0, (), (), ())


class Membership:
    """One instance's part in the store."""

    def __init__(
        self, dispatcher: Dispatcher, journal: Journal, reader: Reader, instance: Instance, lease: float, *, shared: bool
    ) -> None:
        self._dispatcher = dispatcher
        self._environment = dispatcher.environment
        self._journal = journal
        self._reader = reader
        self._instance = instance
        self._lease = lease
        self._shared = shared
        self._joined = self._withdrawn = self._leaving = self._failing = False
        self._shares: Mapping[LaneKey, str | None] = {}
        self._shared_for: tuple[object, ...] = ()  # what the shares were computed for
        self.meant_for: dict[str, dict[str, str]] = {}
        """The same by subscription: for each lane the instance that is to have it, without those that nobody can have."""
        self._taken: set[LaneKey] = set()  # lanes that others have
        self._asked: list[tuple[Serving, str]] = []  # lanes that were asked for when the step began
        self._ending: set[LaneKey] = set()  # lanes that were lost while something ran in them
        self._wanted: Mapping[str, Mapping[str, int]] = {}  # lanes and starts of all subscriptions
        self._known: Mapping[str, int] = {}  # what was in the log
        self._head = 0  # … when this had been announced
        self._begun = self._looked = 0  # steps, and the last that has seen how all stand
        self._told: dict[str, Serves] = {}  # what others were told of how subscriptions are served here
        self._heard = 0  # of what others have published, when the last look began
        self._holds: list[str] = []
        self._seen = -1  # of the standing's changes
        self._changed = self._environment.loop.waiter()
        self._at_rest = self._environment.loop.waiter()
        self._at_rest.set()
        self._waiters: list[Waiter] = []
        self.on_step: Callable[[], object] = lambda: None
        self.standing = NOBODY
        """How all stood when it was looked last."""

    # -------------------------------------------------------------- when to take a step

    async def run(self) -> None:
        """Take steps until cancelled."""
        while True:
            await self._changed.wait()
            if self._leaving:
                return
            self._changed = self._environment.loop.waiter()
            try:
                await self.step()
                self._failing = False
            except BusNotOpen:
                return
            except EventBusError as error:
                if not self._failing:
                    _log.error("this instance could not do all of its part among the others, trying again: %s", error)
                self._failing = True
                self._journal.renew_at = self._environment.lease_clock() + min(RETRY, self._lease / RENEWALS)
            except BaseException:
                self.poke()  # a step that was cut short is taken again at once: the journal asks only once for a renewal
                raise

    def poke(self) -> None:
        """Take a step soon."""
        self._changed.set()

    def noticed(self, notice: Notice) -> None:
        """Others have written to the store."""
        if notice.died or notice.changes != self._seen:
            self.poke()

    # -------------------------------------------------------------- a step

    async def step(self) -> None:
        """Renew the lease, look, and do what follows, part by part: one that fails stops no other; its error comes at the end."""
        self._at_rest = self._environment.loop.waiter()
        self._begun += 1
        try:
            await self._step()
        finally:
            self._at_rest.set()
            self._tell_waiters()
            self.on_step()

    async def _step(self) -> None:
        # What is done here from now on need not be in the standing; what was done before goes with the renewal.
        before = {serving: (serving.stored, serving.pauses) for serving in self._dispatcher.servings.values()}
        self._asked = self._asked_for()
        await self.renew()
        await self._look(before)
        if self._told != self._to_tell():  # for types have joined: others, and the shares, go by what was told
            await self.renew()
            await self._look(before)
        errors = []
        for part in (self._give_back,) if self._withdrawn else (self._declare_again, self._give_back, self._take):
            try:
                await part()
            except EventBusError as error:
                errors.append(error)
        self._kick_redrivers()
        if errors:
            raise errors[0]

    async def renew(self) -> None:
        """Show that this instance is alive."""
        begun = self._environment.lease_clock()
        self._told = serves = self._to_tell()
        holds = () if self._withdrawn else tuple(sorted(set(self._holds)))
        pinned = min(self._dispatcher.pins, default=None)
        known = await self._journal.command(Beat(self._instance, begun, self._lease, serves, holds, pinned))
        if self._joined and not known:
            _log.warning("the others have taken this instance for dead: its lease had ended. It begins anew")
            for lane in self._dispatcher.lanes():
                self.lose(lane)
        self._joined = True
        lapsed = self._environment.deadline <= self._environment.lease_clock()  # also while this waited for its turn
        if self._shared:
            self._environment.deadline = begun + self._lease
            self._journal.renew_at = begun + self._lease / RENEWALS
        if lapsed:
            self._dispatcher.wake_all()

    def _to_tell(self) -> dict[str, Serves]:
        return {name: self._serves(serving) for name, serving in self._dispatcher.servings.items()}

    def _serves(self, serving: Serving) -> Serves:
        """What others are told. One that is to leave serves a subscription to the end of its last handler, or its order could
        change under that; but it can run none of the lanes that somebody else can."""
        serves, name = serving.serves(), serving.options.name
        if not self._withdrawn:
            return serves
        others = [member.serves for member in self.standing.members if member.instance.id != self._instance.id]
        if any(name in each and fits(each[name], serving.stored) for each in others):
            return msgspec.structs.replace(serves, cannot=tuple(sorted(self._wanted.get(name, ()))))
        return serves

    def withdraw(self) -> None:
        """Take no lane any more, and let others have those that are quiet, and each of the rest when it has come to rest."""
        self._withdrawn = True
        if not self.is_alone():
            self.poke()

    async def leave(self) -> None:
        """Sign off; the lanes are free. No step is taken any more."""
        self._leaving = True
        self._tell_waiters()
        try:
            await self._at_rest.wait_decided()
        finally:  # also if this task was cancelled meanwhile: or the others would take this instance for dead
            await self._journal.command(Beat(self._instance, leaving=True))

    def knows_all(self) -> bool:
        """Whether the last look has seen all that others have done, as far as is known."""
        is_at_rest = self._at_rest.done and not self._changed.done
        return is_at_rest and self._looked == self._begun and self._heard == self._dispatcher.heard and self.is_alone()

    def is_alone(self) -> bool:
        """Whether there is no other instance."""
        return all(member.instance.id == self._instance.id for member in self.standing.members)

    # -------------------------------------------------------------- what others have changed

    async def _look(self, before: Mapping[Serving, tuple[Subscribed, int]]) -> None:
        """See how all stand and what is in the log, and do as others have done."""
        lanes, self._heard = self._dispatcher.lanes(), self._dispatcher.heard
        self.standing = standing = await self._reader.ask(Stand())
        every = NOTICE_ALONE if self.is_alone() else NOTICE_INTERVAL
        self._journal.notice_every = min(every, self._lease / RENEWALS) if self._shared else math.inf
        self._follow(standing, before)
        self._give_up(standing, lanes)
        self._head, self._known = self._dispatcher.tail.head, await self._reader.ask(Types())
        self._dispatcher.known_types.update(self._known)
        self._share()
        await self._try_again()
        self._looked = self._begun

    async def _try_again(self) -> None:
        """Lanes that this program could not run may have been brought, by others, past what it could not decode."""
        if any(serving.cannot for serving in self._dispatcher.servings.values()):
            states, rows = await self._reader.ask(Lanes()), await self._reader.ask(WaitingRows())
            if any(serving.can_again(states, rows) for serving in self._dispatcher.servings.values()):
                self.poke()

    def _follow(self, standing: Standing, before: Mapping[Serving, tuple[Subscribed, int]]) -> None:
        """What others have done to the subscriptions holds here as well; but not where something was done here meanwhile."""
        stored = {each.name: each for each in standing.subscriptions}
        self._dispatcher.declared.intersection_update(stored)
        for name, serving in list(self._dispatcher.servings.items()):
            if name not in stored:
                _log.warning("the subscription %r was removed by another instance", name)
                self._dispatcher.remove(serving)
                continue
            known, pauses = before.get(serving, (None, 0))
            if known is serving.stored:
                serving.follow(stored[name])
            if known is not None and pauses == serving.pauses:
                serving.follow_pause(stored[name].paused)
        self._dispatcher.note_others(standing.subscriptions)

    def _give_up(self, standing: Standing, lanes: Iterable[Lane]) -> None:
        """Lanes that are not ours any more, or not as they were."""
        owned = {(o.subscription, o.lane): o.epoch for o in standing.lanes if o.owner == self._instance.id}
        for lane in lanes:
            epoch = owned.get((lane.holder.options.name, lane.name))
            if not lane.closed and not lane.holder.rewinding and (epoch is None or epoch > lane.epoch):
                self.lose(lane)

    def lose(self, lane: Lane) -> None:
        """Another has this lane now, or it was set back elsewhere; if it is ours still, it is taken anew. Not before what runs in
        it has come to its end, though its outcome may be refused: two attempts would run in it at once."""
        key = (lane.holder.options.name, lane.name)
        lane.move()
        self._dispatcher.drop_lane(lane)
        self._ending.add(key)
        lane.call_when(lambda: not running(lane), lambda: self._has_ended(key))
        self.poke()

    def _has_ended(self, key: LaneKey) -> None:
        self._ending.discard(key)
        self.poke()

    async def _declare_again(self) -> None:
        """Try again to have subscriptions as they are declared here, now that others may have gone."""
        changed = False
        for serving in [serving for serving in self._dispatcher.servings.values() if self._is_otherwise(serving)]:
            before = serving.stored
            try:
                (now,) = await self._journal.command(Register((serving.registration,), self._instance.id))
            except InvalidSubscription as error:
                serving.refuse(str(error))
                continue
            serving.follow(now)
            if (now.generation, now.types, now.derived) != (before.generation, before.types, before.derived):
                changed = True
                for lane in [*serving.lanes.values()]:
                    self.lose(lane)  # it holds other types in the store, or is not there any more
            serving.refuse(None)
        if changed:
            lanes = self._dispatcher.lanes()
            await self.renew()  # tell what it serves now, or its lanes are nobody's until the next step
            self.standing = await self._reader.ask(Stand())
            self._give_up(self.standing, lanes)
            self._share()

    def _is_otherwise(self, serving: Serving) -> bool:
        """Whether it is stored with other options than here, without a type of here, or with one that nobody serves any more:
        then lanes that hold several types would be nobody's."""
        if serving.waits_for is not None:
            return True
        return serving.lacks_types() or (
            serving.options.order != "type" and not are_served(serving.stored, self.standing.members)
        )

    def _share(self) -> None:
        """Compute who should have which lane; with thousands of lanes that takes long, so not again where all stand as before."""
        members = [msgspec.structs.replace(member, seen=0.0) for member in self.standing.members]
        shared_for = (members, self.standing.subscriptions, self.standing.lanes, frozenset(self._known))
        if shared_for == self._shared_for:
            return
        # Also of those that are not served here: who has much of them gets less of others, and all instances must agree on it.
        self._wanted = {each.name: dict(self._lanes_wanted(each)) for each in self.standing.subscriptions}
        self._shares = share(self.standing, self._wanted)
        self.meant_for = {name: {} for name in self._wanted}
        for (name, lane), id in self._shares.items():
            if id is not None:
                self.meant_for[name][lane] = id
        for name, serving in self._dispatcher.servings.items():
            serving.nobodys = self._wanted.get(name, {}).keys() - self.meant_for.get(name, {}).keys()
        others = {member.instance.id for member in self.standing.members} - {self._instance.id}
        self._taken = {(each.subscription, each.lane) for each in self.standing.lanes if each.owner in others}
        self._shared_for = shared_for

    def _lanes_wanted(self, stored: Subscribed) -> list[tuple[str, int]]:
        types = (*stored.types, *stored.derived) if stored.order == "type" else stored.types
        return lanes_wanted(stored.order, stored.concurrency, types, stored.since, self._known)

    def _kick_redrivers(self) -> None:
        """Others may have redriven something."""
        if self.standing.changes != self._seen:
            self._seen = self.standing.changes
            for serving in self._dispatcher.servings.values():
                serving.redriver.kick()

    # -------------------------------------------------------------- give back

    async def _give_back(self) -> None:
        """Let lanes that others are to have come to rest, and release those that have."""
        resting, own = [], self._instance.id
        for lane in self._dispatcher.lanes():
            goes = self.meant_for.get(lane.holder.options.name, {}).get(lane.name, own) != own
            if lane.retiring and not goes:
                lane.retiring = False
                lane.wake()
            elif goes and lane.retiring and lane.is_quiet():
                resting.append(lane)
            elif goes and not lane.retiring:
                lane.retire(self.poke)
        names = [(lane.holder.options.name, lane.name) for lane in resting] + self._forgotten()
        if names:
            await self._journal.command(Release(self._instance.id, tuple(names)))
            for lane in resting:
                lane.move()
                self._dispatcher.drop_lane(lane)

    def _forgotten(self) -> list[LaneKey]:
        """Lanes that are ours in the store, that we gave up for they were set back elsewhere, and that are meant for others."""
        own, here = self._instance.id, {name: serving.lanes for name, serving in self._dispatcher.servings.items()}
        given_up = [o for o in self.standing.lanes if o.owner == own and o.lane not in here.get(o.subscription, ())]
        return [key for owned in given_up if self._shares.get(key := (owned.subscription, owned.lane)) != own]

    # -------------------------------------------------------------- take

    async def _take(self) -> None:
        """Claim what is free and meant for us, and what was asked for; after a failure that is asked for still. So is what was
        asked for since the step began, if it is not free for us: others were not told yet that this instance serves its type."""
        claims = [claim for claim in dict.fromkeys([*self._meant_for_us(), *self._asked_for()]) if self._is_ours(*claim)]
        for serving, lane in claims:
            serving.claiming.add(lane)
        if claims:
            await self._claim(claims)
        for serving, lane in [*claims, *self._asked]:
            serving.claiming.discard(lane)
        for serving in dict.fromkeys(serving for serving, _ in [*claims, *self._asked]):
            serving.redriver.kick()
        self._dispatcher.lanes_changed()

    def _asked_for(self) -> list[tuple[Serving, str]]:
        return [(serving, lane) for serving in self._dispatcher.servings.values() for lane in sorted(serving.claiming)]

    def _meant_for_us(self) -> list[tuple[Serving, str]]:
        """Lanes that are meant for us and are not here."""
        own, servings = self._instance.id, self._dispatcher.servings.items()
        meant_for = [(serving, self.meant_for.get(name, {})) for name, serving in servings]
        return [(s, lane) for s, lanes in meant_for for lane, id in lanes.items() if id == own and lane not in s.lanes]

    def _is_ours(self, serving: Serving, lane: str) -> bool:
        """Whether a lane that is not here, with nothing left of it, is free, as far as is known, and not meant for another."""
        key, id = (serving.options.name, lane), self._instance.id
        if lane in serving.lanes or key in self._ending:
            return False
        return key not in self._taken and self._shares.get(key, id) == id

    async def _claim(self, claims: Sequence[tuple[Serving, str]]) -> None:
        lanes = tuple((serving.options.name, lane, self._start(serving, lane)) for serving, lane in claims)
        generations = {each.name: each.generation for each in self.standing.subscriptions}
        states = await self._journal.command(Claim(self._instance.id, lanes, generations))
        rows = await self._reader.ask(WaitingRows()) if any(states) else ()
        suspicions = {(s.subscription, s.lane): s for s in await self._reader.ask(Suspicions())}
        epochs = {(s.subscription, s.lane): s.epoch for s in await self._reader.ask(Lanes())}
        self._follow_types(await self._reader.ask(Subscriptions()))
        last = self._known if self._dispatcher.tail.head == self._head else None  # more has come meanwhile: the lanes must read
        waiting = by_lane(rows)
        fitting = {serving for serving in {serving for serving, _ in claims} if fits(serving.serves(), serving.stored)}
        for (serving, _), state in zip(claims, states, strict=True):
            if state is None or epochs.get(key := (state.subscription, state.lane)) != state.epoch:
                self.poke()  # another was first, or it was set back meanwhile and the rows are not those of its state
            elif self._dispatcher.servings.get(state.subscription) is not serving:
                continue  # it has been removed here
            elif serving not in fitting:
                self.poke()  # a type has joined that is not served here
            else:
                self._dispatcher.add_lane(serving, state, waiting.get(key, ()), last, suspicions.get(key))

    def _follow_types(self, subscriptions: Iterable[Subscribed]) -> None:
        """A type that has joined before a lane was claimed has not fenced it: it must be known before the lane begins."""
        for stored in subscriptions:
            serving = self._dispatcher.servings.get(stored.name)
            if serving is not None and serving.generation == stored.generation:
                since = {**stored.since, **serving.stored.since}
                serving.follow(msgspec.structs.replace(serving.stored, types=stored.types, derived=stored.derived, since=since))

    def _start(self, serving: Serving, lane: str) -> int:
        start = self._wanted.get(serving.options.name, {}).get(lane)
        return start if start is not None else since_of(serving.since, lane) or 0

    def want_lane(self, serving: Serving, type: str) -> None:
        """A type has come up for which a subscription in order "type" has no lane; its events wait in the log. Nobody's lane is
        asked for as well: when this instance looked last, it may not have told yet that it can run it."""
        free = type in serving.nobodys or self._is_ours(serving, type)
        if free and type not in serving.claiming and serving.waits_for is None:
            serving.claiming.add(type)
            self.poke()

    # -------------------------------------------------------------- for those who need to know

    def serves_elsewhere(self, name: str) -> bool:
        """Whether another instance that is alive serves a subscription."""
        return any(name in m.serves for m in self.standing.members if m.instance.id != self._instance.id)

    async def hold(self, names: Sequence[str], check: Callable[[], object]) -> None:
        """Have all lanes of these subscriptions that this instance can have, however many there are, until `let_go`; and have the
        others know what is pinned. `check` raises when it is no use to wait any longer."""
        self._holds += names
        await self.look(check, lambda: all(self._has_whole(name) for name in names))

    async def look(self, check: Callable[[], object], reached: Callable[[], bool] = lambda: True) -> None:
        """Wait for a step that begins from here on, and until something is so. `check` as in `hold`."""
        begun = self._begun  # a step that is under way may have looked before
        self.poke()
        while self._looked <= begun or not reached():
            check()
            with anyio.move_on_after(PATIENCE):
                await self.next_step()

    def _has_whole(self, name: str) -> bool:
        serving = self._dispatcher.servings.get(name)
        stored = next((each for each in self.standing.subscriptions if each.name == name), None)
        own = next((member for member in self.standing.members if member.instance.id == self._instance.id), None)
        if serving is None or stored is None:
            return True  # it was removed
        if own is None or name not in own.holds or name not in own.serves:
            return False
        if not fits(own.serves[name], stored):
            return True  # as it is stored, this program gets none of it
        meant_for = self.meant_for.get(name, {})
        return {*meant_for.values()} <= {self._instance.id} and meant_for.keys() <= serving.lanes.keys()

    def let_go(self, names: Sequence[str]) -> None:
        """The end of a `hold`."""
        for name in names:
            self._holds.remove(name)
        self.poke()

    async def next_step(self) -> None:
        """Wait until a step has been taken."""
        waiter = self._environment.loop.waiter()
        self._waiters.append(waiter)
        try:
            await waiter.wait()
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _tell_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set()
