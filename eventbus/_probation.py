"""Probation: how an event that kills the process is found, and how others are not taken for it.

publish → journal → store → *lanes* → workers → outcome. A lane whose owner's process has died comes with suspicion: the killer is
among what it had under way, no further than `AHEAD` past its checkpoint. From then on the lane has each attempt marked in the
store before it runs. After another death the marks that are left say what was running; these run alone, while nothing else does
in this process. Whoever was alone when the process died is charged with it, and with `CHARGES` of them it becomes a dead letter.
A kill from outside finds something alone only by a rare chance, and three times the same hardly ever: who was found so once
waits for a while before it runs again, so that a process which is killed soon after each start charges nobody twice.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from eventbus._lanes import AHEAD, Lane
from eventbus._outcomes import RELEASED, Attempt, Failed
from eventbus.errors import EventBusError, ProcessDied
from eventbus.stores.base import Mark, Marking, Suspicion

if TYPE_CHECKING:
    from eventbus._environment import Environment
    from eventbus._timers import Timers

_log = logging.getLogger("eventbus")

CHARGES = 3
"""Deaths of the process, while nothing else ran in it, that make an event a dead letter."""
PAUSE = 1.0
"""Seconds for which an event that is charged with a death waits before it runs again, for each death."""
PATIENCE = 30.0
"""Seconds for which everything else is held back so that an attempt can be alone; then it runs beside the others, uncharged."""


class Solo:
    """The right to be alone in this process; one lane has it at a time."""

    def __init__(self, lanes: Callable[[], Iterable[Lane]], timers: Timers) -> None:
        self.holder: Lane | None = None
        self._lanes = lanes
        self._timers = timers
        self._waiting: deque[tuple[Lane, Callable[[bool], object]]] = deque()
        self._then: Callable[[bool], object] | None = None
        self._turn = 0

    def ask(self, lane: Lane, then: Callable[[bool], object]) -> None:
        """Call `then` as soon as nothing else runs: with True, or with False if that was waited for too long. Until `done`,
        nothing else is started."""
        self._waiting.append((lane, then))
        if self.holder is None:
            self._next()

    def done(self, lane: Lane) -> None:
        """The lane need not be alone any more."""
        if self.holder is lane:
            self._next()

    def rested(self) -> None:
        """An attempt has ended."""
        if self._then is not None and not any(running(lane) + lane.holder.stuck for lane in self._lanes()):
            self._grant(alone=True)

    def _next(self) -> None:
        self._turn += 1
        self.holder, self._then = self._waiting.popleft() if self._waiting else (None, None)
        for lane in self._lanes():
            if self.holder is None:
                lane.wake()
            elif lane is not self.holder:
                lane.recall()
        if self.holder is not None:
            turn = self._turn
            self._timers.after(PATIENCE, lambda: self._give_up(turn))
            self.rested()

    def _give_up(self, turn: int) -> None:
        if turn == self._turn and self._then is not None:
            self._grant(alone=False)

    def _grant(self, *, alone: bool) -> None:
        lane, then, self._then = self.holder, self._then, None
        assert lane is not None
        assert then is not None
        then(alone)
        if not alone:
            self.done(lane)


def running(lane: Lane) -> int:
    """How many attempts of a lane really run; beside threads that have outlived their timeout."""
    return lane.running - (lane.probation.pending if lane.probation is not None else 0)


class Probation:
    """One lane on probation.

    Attributes:
        pending: attempts that were taken, and wait to be marked or to be alone; they count as running in the lane.
    """

    def __init__(self, lane: Lane, suspicion: Suspicion, environment: Environment, solo: Solo) -> None:
        self.pending = 0
        self._lane = lane
        self._instance = environment.instance
        self._journal = environment.journal
        self._solo = solo
        self._suspects = {mark.position: mark.deaths for mark in suspicion.marks}
        self._left = AHEAD
        self._ready: deque[Attempt] = deque()
        self._alone: Attempt | None = None
        lane.probation = self

    def take(self) -> Attempt | None:
        """The next attempt that is marked; the ones after it are taken, to be marked."""
        lane = self._lane
        if lane.is_held_up():  # since it was marked: by the end of the lease, of which nobody tells
            self.recall()
            return None
        if self._solo.holder is lane:
            return self._give(self._alone)
        while not self._ready and self._solo.holder is not lane:
            attempt = lane.take(marked=True)
            if attempt is None:
                self._end_if_idle()
                return None
            self._admit(attempt)
            if lane.probation is not self:  # the last one was convicted
                return lane.take()
        return self._give(self._ready[0] if self._ready else None)

    def _give(self, attempt: Attempt | None) -> Attempt | None:
        if attempt is None or attempt not in self._ready or not self._may_begin(attempt):
            return None
        self._ready.remove(attempt)
        self.pending -= 1
        return attempt

    def _may_begin(self, attempt: Attempt) -> bool:
        lane = self._lane
        circuit = lane.holder.circuit
        return not lane.is_held_up() and attempt.epoch == lane.epoch and (circuit is None or circuit.lets(attempt))

    def _admit(self, attempt: Attempt) -> None:
        """Convict it, or have it marked, alone if it is suspected."""
        deaths = self._suspects.get(attempt.record.position)
        if deaths is not None and deaths >= CHARGES:
            died = ProcessDied(f"while this event was handled, and nothing else, the process died {deaths} times")
            self._lane.settle(attempt, Failed(died, final=True))
            self._lane.flush()
            return
        self.pending += 1
        if deaths is None:
            self._mark(attempt, alone=False)
            return
        place = (self._lane.holder.options.name, attempt.record.position)
        _log.warning("%s: the event at %d was being handled when a process died; it runs alone", *place)
        timers, solo, lane = self._lane.environment.timers, self._solo, self._lane
        timers.after(PAUSE * deaths, lambda: solo.ask(lane, lambda alone: self._mark(attempt, alone=alone)))

    def _mark(self, attempt: Attempt, *, alone: bool) -> None:
        self._alone = attempt if alone else self._alone
        begun = (Mark(attempt.record.position, alone),)
        self._submit(attempt.epoch, lambda marked: self._marked(attempt, marked=marked), begun=begun)

    def _marked(self, attempt: Attempt, *, marked: bool) -> None:
        if attempt.over:
            return
        self._ready.append(attempt)
        if not marked or not self._may_begin(attempt):
            self.recall()
        elif not self._lane.scheduled:
            self._lane.environment.schedule(self._lane)

    def recall(self) -> None:
        """Give back what has not begun."""
        while self._ready:
            attempt = self._ready.pop()
            self.pending -= 1
            self._lane.settle(attempt, RELEASED)

    def over(self, attempt: Attempt, *, ran: bool) -> None:
        """An attempt has ended, or was given back. What is suspected stays so until it has run to an end, whichever."""
        position = attempt.record.position
        if ran:
            self._suspects.pop(position, None)
            self._left -= 1
        if ran or position not in self._suspects:
            self._submit(attempt.epoch, over=(position,))
        else:
            self._submit(attempt.epoch, begun=(Mark(position),))
        if attempt is self._alone:
            self._alone = None
            self._solo.done(self._lane)
        if self._left <= 0:
            self._end()

    def _end_if_idle(self) -> None:
        """All that may have been under way has been handled."""
        lane = self._lane
        intake = lane.log.intake
        if lane.running or lane.log.waiting or not intake.live or len(intake) or any(each.beside for each in lane.sources):
            return
        if not lane.is_held_up():
            self._end()

    def _end(self) -> None:
        if self.pending:
            return
        self._lane.probation = None
        self._submit(self._lane.epoch, cleared=True)

    def _submit(self, epoch: int, then: Callable[[bool], object] = lambda _marked: None, **parts: Any) -> None:
        """Have something noted; `then` is told whether it is. `parts`: fields of `Marking`."""
        marking = Marking(self._instance, self._lane.holder.options.name, self._lane.name, epoch, **parts)
        try:
            self._journal.submit(marking, lambda result: then(result is True))
        except EventBusError:  # the bus is closing, or the journal has stopped: nothing is started any more
            then(False)
