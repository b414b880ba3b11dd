"""The log as a source in strict order: one lane per type, or one over the log.

publish → journal → store → *lanes* → workers → outcome. The next event is given out when the one before it is settled; while an
event waits for another attempt, the lane waits, and both are columns of the lane's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eventbus._lanes import Lane
from eventbus._outcomes import Attempt, Failure, conflict_of, death_of, summary_of
from eventbus._retry import seconds_until
from eventbus.stores.base import LaneState, Record, Unit

if TYPE_CHECKING:
    from eventbus._intake import Intake


class StrictSource:
    """The log in strict order: the next event is given out when the one before it is settled."""

    beside = False
    replay: object = None

    def __init__(self, lane: Lane, intake: Intake, state: LaneState) -> None:
        self._lane = lane
        self.intake = intake
        self._checkpoint = state.checkpoint
        self._attempts = state.attempt  # made of the event after the checkpoint
        self._first_failed_at = state.first_failed_at
        self._due = 0.0  # monotonic
        self._current: list[Record] = []  # given out and not settled; more than one only within one crossing into a thread
        self._next: Record | None = None  # waits for another attempt
        if state.due_at is not None:
            now = lane.environment.clock.time()
            self._wait(seconds_until(state.due_at, state.first_failed_at, now))

    @property
    def checkpoint(self) -> int:
        """Up to here everything is settled."""
        return self._checkpoint

    @property
    def waiting(self) -> int:
        """1 while an event waits for another attempt."""
        return int(self._attempts > 0)

    @property
    def parked(self) -> int:
        """No key is parked in strict order."""
        return 0

    def hindrance(self) -> None:
        """It goes on by itself."""

    def parks(self, _record: Record) -> bool:
        """No event is."""
        return False

    def free(self, _position: int) -> None:
        """Nothing is parked here."""

    def done(self) -> tuple[int, ...]:
        """Nothing is settled above the checkpoint."""
        return ()

    def is_idle(self) -> bool:
        """Whether no event waits for another attempt."""
        return not self._attempts

    def take(self) -> Attempt | None:
        """The event after the checkpoint, when it is due."""
        if self._due and self._lane.environment.clock.monotonic() < self._due:
            return None
        record = self._next or self.intake.pop()
        if record is None:
            return None
        self._next = None
        number = 1 if self._current else self._attempts + 1
        self._current.append(record)
        return Attempt(self._lane, self, record, number)

    def acked(self, attempt: Attempt, published: Sequence[Record]) -> None:
        """The checkpoint moves."""
        conflict = conflict_of(attempt, published, self._lane.environment.clock) if published else None
        if conflict is None:
            self._pass(attempt)
            self._lane.settled(attempt.record.position, published)
        else:
            self._lane.flush()
            self._pass(attempt)
            self._lane.send("log", attempt.record.position, published=tuple(published), conflict=conflict)

    def go_on(self, attempt: Attempt) -> Attempt | None:
        """`acked` of the only attempt, a first one that published nothing, and `take`."""
        lane, record = self._lane, self.intake.pop()
        self._checkpoint = position = attempt.record.position
        lane.settled(position)
        if record is None:
            self._current.clear()
            return None
        self._current[0] = record
        return Attempt(lane, self, record, 1)

    def failed(self, failure: Failure) -> None:
        """The lane waits, or the event is given up."""
        attempt, lane = failure.attempt, self._lane
        lane.flush()
        position = attempt.record.position
        first = failure.now if self._first_failed_at is None else self._first_failed_at
        if failure.delay is None and (failure.final or lane.holder.options.on_exhausted != "pause"):
            self._pass(attempt)
            lane.send("log", position, death=death_of(failure, attempt.number, first))
            return
        self._put_first(attempt.record)
        self._attempts, self._first_failed_at = attempt.number, first
        due_at = failure.now + (failure.delay or 0.0)
        self._wait(failure.delay or 0.0)
        reason = None if failure.delay is not None else summary_of(failure.error)
        lane.send(
            "log",
            position,
            attempt=attempt.number,
            due_at=due_at,
            first_failed_at=first,
            error=summary_of(failure.error),
            pause=reason,
            counts=False,
        )
        if reason is not None:
            lane.holder.pause(reason)

    def given_back(self, attempt: Attempt) -> None:
        """It is next again."""
        self._put_first(attempt.record)

    def retry_now(self) -> None:
        """What waits is due, at attempt 1."""
        self._attempts, self._due, self._first_failed_at = 0, 0.0, None

    def clear_to(self, position: int) -> bool:
        """Whether everything up to a position is settled, and the store knows it."""
        if self._lane.stored >= position:
            return True
        if not self._lane.up_to_date() or self.intake.reach() < position:
            return False
        opened = [record.position for record in self._current]
        first = self.intake.first()
        if first is not None:
            opened.append(first)
        if self._next is not None:
            opened.append(self._next.position)
        return min(opened, default=position + 1) > position

    def has_settled(self, record: Record) -> bool:
        """Whether this event is settled, and the store knows it."""
        return self._lane.stored >= record.position

    def confirmed(self, unit: Unit) -> None:
        """Nothing to do: the lane knows the stored checkpoint."""

    def _put_first(self, record: Record) -> None:
        self._current.remove(record)
        if self._next is not None:
            self.intake.put_back(self._next)
        self._next = record

    def _pass(self, attempt: Attempt) -> None:
        self._current.remove(attempt.record)
        self._checkpoint = attempt.record.position
        self._attempts, self._due, self._first_failed_at = 0, 0.0, None

    def _wait(self, seconds: float) -> None:
        environment = self._lane.environment
        self._due = environment.clock.monotonic() + seconds
        environment.timers.at(self._due, self._lane.wake)
