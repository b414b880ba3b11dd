"""Lanes: which event is next for whom, and what becomes of it.

publish → journal → store → *lanes* → workers → outcome → journal. A `Lane` is the serial order inside one subscription. It has
sources that take turns: the log first of all, redrives and replays beside it. A worker takes an `Attempt`, runs the handler,
and gives back an outcome; the source it came from turns that into a `Unit` for the journal. The log as a source is in `_strict`
and `_loose`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from eventbus._circuit import State, Verdict
from eventbus._outcomes import ACKED, Acked, Attempt, Failed, Failure, Outcome, Undeliverable, summary_of
from eventbus._retry import next_delay
from eventbus._sources import LogSource, Recallable, Source
from eventbus.errors import Reject
from eventbus.hooks import AttemptFailed, LaneBlocked
from eventbus.stores.base import LaneState, Record, Refusal, Unit
from eventbus.stores.base import Source as SourceName

if TYPE_CHECKING:
    from eventbus._environment import Environment, Holder
    from eventbus._loop import Waiter
    from eventbus._probation import Probation

_log = logging.getLogger("eventbus")

AHEAD = 2_000
"""Deliveries that a lane may have settled ahead of what is stored."""
RIDE = 1_200
"""… with which they go with the next transaction, whatever it is. A transaction of their own costs three times as much."""
HURRY = 1_600
"""… with which they go at once, to be stored before the lane has to stop."""
TOGETHER = 500
"""Events that are published with one unit, beside what a single handler publishes: what one statement writes."""


MOVED = "another instance has its lane now"
"""Why nothing more comes of a lane here, while it goes on elsewhere."""


class _Call(msgspec.Struct, frozen=True):
    """Stands among those who wait for a lane, for someone who is to be called."""

    set: Callable[[], object]


class _Waiting(msgspec.Struct, eq=False):
    """Somebody who waits for a lane.

    Attributes:
        reached: whether what is waited for is there. hindrance: why it does not come, for now.
        is_near: whether it takes no more than that the store knows what was settled.
    """

    reached: Callable[[], bool]
    hindrance: Callable[[], str | None]
    waiter: Waiter | _Call
    is_near: Callable[[], bool]


class Lane:
    """The serial order inside one subscription. All of it runs on the loop."""

    def __init__(self, environment: Environment, holder: Holder, state: LaneState, concurrency: int) -> None:
        self.environment = environment
        self.holder = holder
        self.name = state.lane
        self.epoch = state.epoch
        self.concurrency = concurrency
        self.log: LogSource  # set right after, by who makes the lane
        self.sources: list[Source] = []
        self.blocked: str | None = None
        self.blocked_at = 0.0
        self.closed = self.scheduled = self.moved = False
        self.retiring = False  # it is to go to another instance, as soon as it is quiet
        self.running = 0
        self._turn = 0
        self._serial = 0  # deliveries settled
        self._confirmed = 0  # … of which the store knows
        self._ridden = 0  # … for which the journal was asked to let them ride
        self._dirty = False
        self._flushing = False  # it will flush soon
        self._newest = 0  # position of the delivery that was settled last
        self._undisturbed = False  # when the last attempt was taken, nothing was unusual
        self._published: list[Record] = []  # by deliveries that are settled and not sent yet, to be committed with their acks
        self._stored = state.checkpoint
        self.crossings: list[Recallable] = []
        self.probation: Probation | None = None
        self._waiters: list[_Waiting] = []

    def begin(self, log: LogSource, *others: Source) -> None:
        """Give the lane its sources."""
        self.log = log
        self.sources = [log, *others]

    # -------------------------------------------------------------- for the workers

    def wake(self) -> None:
        """There may be something to do."""
        if self._waiters:
            self._tell_waiters()
        if not self.scheduled and self.running < self.concurrency and not self.closed:
            self.environment.schedule(self)

    def take(self, *, marked: bool = False) -> Attempt | None:
        """The next attempt to run, or None for now. `marked`: on probation, the next one to mark."""
        if self.probation is not None and not marked:
            return self.probation.take()
        if self.running >= self.concurrency or self._serial - self._confirmed >= AHEAD or self.is_held_up():
            return None
        circuit = self.holder.circuit
        if circuit is not None and circuit.is_open and circuit.state is not State.READY:
            return None
        self._undisturbed = not marked and self._is_undisturbed()
        attempt = self.log.take() if self._undisturbed else self._take_turns()
        if attempt is not None:
            attempt.epoch = self.epoch
            self.running += 1
            if circuit is not None and circuit.is_open:
                circuit.gives(attempt)
        return attempt

    def go_on(self, attempt: Attempt) -> Attempt | None:
        """`settle` an attempt that was acked without having waited, and `take` the next one.

        Most attempts are such, and nothing but their handler has run since they were given out. If nothing was unusual then, all
        that can hold the lane up now is the end of the lease, and how far it is ahead.
        """
        if not self._undisturbed:
            self.settle(attempt, ACKED)
            return self.take()
        attempt.over = True
        self.holder.handled += 1
        environment = self.environment
        if self._serial - self._confirmed >= AHEAD - 1 or environment.lease_clock() >= environment.deadline:
            self.running -= 1
            self.log.acked(attempt, ())
            return None
        following = self.log.go_on(attempt)
        if following is None:
            self.running -= 1
        else:
            following.epoch = self.epoch
        return following

    def _is_undisturbed(self) -> bool:
        """Whether there is nothing but first attempts from the log, and nothing has failed of late."""
        holder, solo = self.holder, self.environment.solo
        if holder.exclusive is not None or (holder.circuit is not None and holder.circuit.troubled):
            return False
        return (solo is None or solo.holder is None) and all(source.is_idle() for source in self.sources)

    def is_held_up(self) -> bool:
        """Whether nothing may be started for now, not even what was given out before."""
        holder, environment = self.holder, self.environment
        if holder.paused is not None or holder.rewinding or environment.halted or self.blocked is not None or self.closed:
            return True
        if environment.solo is not None and environment.solo.holder not in (None, self):
            return True
        return self.retiring or environment.lease_clock() >= environment.deadline

    def take_more(self, limit: int) -> list[Attempt]:
        """Further first attempts from the log, after one from there, for one crossing into a thread."""
        circuit = self.holder.circuit
        if self.probation is not None or (circuit is not None and circuit.is_open):
            return []
        limit = min(limit, AHEAD - (self._serial - self._confirmed))
        more: list[Attempt] = []
        while len(more) < limit and len(self.sources) == 1 and (attempt := self.log.take()) is not None:
            if attempt.number > 1:
                self.log.given_back(attempt)
                break
            attempt.epoch = self.epoch
            more.append(attempt)
        return more

    def _take_turns(self) -> Attempt | None:
        only = self.holder.exclusive
        sources = self.sources if only is None else [source for source in self.sources if source.replay is only]
        for _ in range(len(sources)):
            self._turn = (self._turn + 1) % len(sources)
            attempt = sources[self._turn].take()
            if attempt is not None:
                return attempt
        return None

    def settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Take an attempt's outcome, once."""
        if attempt.over:
            return
        attempt.over = True
        self.running -= 1
        if self.probation is not None:
            self.probation.over(attempt, ran=isinstance(outcome, Acked | Failed))
        circuit = self.holder.circuit
        if attempt.epoch != self.epoch and attempt.source not in self.sources:
            if circuit is not None:  # the lane was rewound meanwhile: the event comes again
                circuit.released(attempt)
        elif isinstance(outcome, Acked):
            self.holder.handled += 1
            attempt.source.acked(attempt, outcome.published)
            if circuit is not None and circuit.troubled:
                circuit.succeeded()
        elif isinstance(outcome, Failed):
            self.holder.failed += 1
            self._fail(attempt, outcome, Verdict.COUNTS if circuit is None else circuit.failed(attempt, outcome))
        else:
            attempt.source.given_back(attempt)
            if circuit is not None:
                circuit.released(attempt)
            if isinstance(outcome, Undeliverable) and self.blocked is None:
                self._block(outcome.reason, math.inf if attempt.source.beside else attempt.record.position)
        self.rested()

    def _fail(self, attempt: Attempt, outcome: Failed, verdict: Verdict | float) -> None:
        if verdict is Verdict.NOTHING:
            attempt.source.given_back(attempt)
        elif isinstance(verdict, Verdict):
            attempt.source.failed(self._failure(attempt, outcome, last=verdict is Verdict.GIVES_UP))
        else:
            attempt.number -= 1
            attempt.source.failed(Failure(attempt, outcome.error, verdict, final=False, now=self.environment.clock.time()))

    def _block(self, reason: str, position: float) -> None:
        self.blocked, self.blocked_at = reason, position
        _log.error("%s: the lane %r waits: %s", self.holder.options.name, self.name, reason)
        self.environment.notify(LaneBlocked(self.holder.options.name, self.name, reason))
        self.holder.hindered()
        self.tell_waiters()

    def rested(self) -> None:
        """Less of it runs now; somebody may wait for that."""
        solo, circuit = self.environment.solo, self.holder.circuit
        if solo is not None and solo.holder is not None:
            solo.rested()
        if circuit is not None and circuit.is_open:
            circuit.rested()

    def give_back(self, attempt: Attempt) -> None:
        """Take an attempt back that did not run."""
        attempt.over = True
        if attempt.source in self.sources:
            attempt.source.given_back(attempt)
        if self.holder.circuit is not None:
            self.holder.circuit.released(attempt)

    def _failure(self, attempt: Attempt, outcome: Failed, *, last: bool) -> Failure:
        error, delay = outcome.error, None
        final = outcome.final or isinstance(error, Reject)
        if not final and not last:
            delay = next_delay(self.holder.options.retry, attempt.number, error, self.environment.random)
        options, record = self.holder.options, attempt.record
        self.environment.notify(AttemptFailed(options.name, record.type, record.position, attempt.number, error, delay))
        level = logging.INFO if delay is not None else logging.WARNING
        _log.log(
            level,
            "%s: attempt %d of %s at %d failed: %s%s",
            options.name,
            attempt.number,
            record.type,
            record.position,
            summary_of(error),
            "" if delay is None else f"; next in {delay:.2f} s",
        )
        return Failure(attempt, error, delay, final, self.environment.clock.time())

    # -------------------------------------------------------------- towards the journal

    def settled(self, position: int, published: Sequence[Record] = ()) -> None:
        """A delivery is settled by the checkpoint, or `done`, and what it published; it is written with the next `flush`.

        That must come before the checkpoint passes anything that is written in another way.
        """
        self._serial += 1
        self._newest = position
        self._dirty = True
        if published:
            self._published += published
            if len(self._published) >= TOGETHER:
                self.flush()

    def flush(self) -> None:
        """Hand the checkpoint, what is done above it and what these deliveries published to the journal, as one unit."""
        if self._dirty:
            published, self._published = tuple(self._published), []
            # The checkpoint need not have moved: the unit is that of a delivery that the store does not know as settled.
            self.send("log", self._newest, counts=False, published=published)

    def flush_soon(self) -> None:
        """`flush` once the loop has done what it is about to do: attempts that end with the same turn of it share a unit."""
        if self._dirty and not self._flushing:
            self._flushing = True
            self.environment.loop.soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        self.flush()

    def send(self, source: SourceName, position: int, *, counts: bool = True, **parts: Any) -> Unit:
        """Hand a unit to the journal, and return it. `counts`: it settles a delivery of its own. `parts`: fields of `Unit`."""
        if self._published:
            self.flush()
        if counts:
            self._serial += 1
        self._dirty = False
        unit = Unit(
            self.holder.options.name,
            self.name,
            self.epoch,
            source,
            position,
            self.log.checkpoint,
            self.log.done(),
            **parts,
        )
        self.environment.journal.settle(self, unit, self._serial)
        if self._serial - self._confirmed >= HURRY:
            self.environment.journal.flush()
        elif self._waiters:
            self._hurry()
        elif self._serial - self._ridden >= RIDE:
            self._ridden = self._serial
            self.environment.journal.ride()
        return unit

    def confirmed(self, unit: Unit, serial: int, refusal: Refusal | None, *, conflict: bool) -> None:
        """The journal has written a unit, or left it out."""
        self._confirmed = serial
        if refusal is None:
            self._tell_scheduled(unit.published)
        if conflict:
            _log.error("%s: an event it published has an idempotency key of other content: dead-lettered", unit.subscription)
        if refusal is not None and unit.pause is not None:
            self.holder.pause_refused(unit.pause)
        if refusal == "fenced":
            if unit.epoch == self.epoch and not self.closed and not self.holder.rewinding:
                _log.warning("%s: an outcome was refused, for the lane %r is not ours any more", unit.subscription, unit.lane)
                self.environment.fenced(self)
        elif unit.epoch == self.epoch:
            if refusal is not None:
                _log.info("%s: the delivery at %d had been settled before", unit.subscription, unit.position)
            self._stored = max(self._stored, unit.checkpoint)
            self.log.confirmed(unit)
        if unit.dead_letter is not None:
            if refusal is None and unit.retry is None and unit.death is None and not conflict:
                self.log.free(unit.position)
            due_at = None if unit.retry is None else unit.retry[1]
            self.holder.redriven(unit.dead_letter, 0.0 if refusal == "fenced" else due_at)  # left out: it is made again, at once
        self.wake()

    def _tell_scheduled(self, published: Sequence[Record]) -> None:
        for record in published:
            if record.due_at is not None:
                self.environment.scheduled(record.due_at)

    # -------------------------------------------------------------- for those who wait

    @property
    def stored(self) -> int:
        """The checkpoint that the store knows."""
        return self._stored

    def up_to_date(self) -> bool:
        """Whether the store knows of every delivery that was settled."""
        return not self._dirty and self._confirmed == self._serial

    def clear_to(self, position: int) -> bool:
        """Whether everything of this lane up to a position is settled, and the store knows it."""
        return self.log.clear_to(position)

    def has_settled(self, record: Record) -> bool:
        """Whether this event of the lane is settled, and the store knows it."""
        return self.log.has_settled(record)

    def hindrance(self) -> str | None:
        """Why nothing more comes of this lane for now, if so. What ran when it was paused or blocked still comes to its end."""
        if self.holder.paused is not None:
            reason: str | None = f"paused: {self.holder.paused}"
        elif self.closed:
            return MOVED if self.moved else "not dispatched"
        else:
            reason = self.blocked or self.log.hindrance()
        if self.running or not self.up_to_date():
            reason = None
        # This at once: the replay's own attempts run here, and may be what waits.
        return reason if self.holder.exclusive is None else reason or "held back by an exclusive replay"

    def hindrance_of(self, record: Record) -> str | None:
        """Why this event is not settled for now, if so."""
        if self.log.parks(record):
            return f"parked: its key {record.key!r} waits behind a dead letter"
        return self.hindrance()

    def is_quiet(self) -> bool:
        """Whether nothing of it is under way, and the store knows of everything."""
        return not self.running and self.up_to_date()

    def gives_nothing(self) -> bool:
        """Whether it gives nothing out until it is resumed, or another program has it."""
        return self.holder.paused is not None or self.closed or self.blocked is not None or self.holder.exclusive is not None

    async def wait_clear(self, position: int) -> str | None:
        """Wait until everything up to a position is settled; returns None then, or at once why that will not come."""
        return await self._wait_until(lambda: self.clear_to(position), self.hindrance, lambda: self.log.checkpoint >= position)

    async def wait_settled(self, record: Record) -> str | None:
        """Wait until this event is settled, whatever else waits; returns None then, or at once why that will not come."""
        return await self._wait_until(lambda: self.has_settled(record), lambda: self.hindrance_of(record), lambda: True)

    async def _wait_until(
        self, reached: Callable[[], bool], hindrance: Callable[[], str | None], is_near: Callable[[], bool]
    ) -> str | None:
        while not reached():
            reason = hindrance()
            if reason is not None:
                return reason
            waiter = self.environment.loop.waiter()
            entry = _Waiting(reached, hindrance, waiter, is_near)
            self._waiters.append(entry)
            self._hurry()
            try:
                await waiter.wait()
            finally:
                if entry in self._waiters:
                    self._waiters.remove(entry)
        return None

    def tell_waiters(self) -> None:
        """Something that they wait for may have changed."""
        if self._waiters:
            self._tell_waiters()

    def _tell_waiters(self) -> None:
        for entry in list(self._waiters):
            if entry.reached() or entry.hindrance() is not None:
                self._waiters.remove(entry)
                entry.waiter.set()
        self._hurry()

    def _hurry(self) -> None:
        """Have what was settled written at once, if somebody waits for no more than that."""
        if self._waiters and (not self.running or any(entry.is_near() for entry in self._waiters)):
            self.environment.journal.flush()

    # -------------------------------------------------------------- when things change

    def restart(self, state: LaneState, log: LogSource, *others: Source) -> None:
        """Go on from another checkpoint, in another epoch. What is under way does not count; redrives and replays stay."""
        kept = [source for source in self.sources if source.beside]
        self.epoch, self._stored = state.epoch, state.checkpoint
        self.begin(log, *others, *kept)
        self._published.clear()
        if self._dirty:
            # What was settled and not sent counts no more; a unit that changes nothing brings the serials together again.
            self.send("log", log.checkpoint, counts=False)

    def recall(self) -> None:
        """Start nothing more of what was given out already and has not begun."""
        for crossing in self.crossings:
            crossing.give_back_rest()
        if self.probation is not None:
            self.probation.recall()

    def retire(self, quiet: Callable[[], object]) -> None:
        """Start nothing more, so that another instance can have it; `quiet` is called when it can."""
        self.retiring = True
        self.recall()
        self.flush()
        self.call_when(self.is_quiet, quiet)

    def call_when(self, reached: Callable[[], bool], then: Callable[[], object]) -> None:
        """Call `then` once, as soon as this is so; now, or when an attempt has ended or the store has written something."""
        self._waiters.append(_Waiting(reached, lambda: None, _Call(then), lambda: False))
        self.tell_waiters()

    def move(self) -> None:
        """Give out nothing any more: another instance has it."""
        self.moved = True
        self.close()

    def close(self) -> None:
        """Give out nothing any more."""
        self.closed = True
        self.recall()
        self.tell_waiters()
