"""The log as a source where only a key, or nothing, must stay in order: `order="key"` and `order="none"`.

publish → journal → store → *lanes* → workers → outcome. A failing event does not stop the lane: it gets a row of `deliveries`,
the checkpoint goes on, and later events of its key are passed over, for the row stands for them as well. When the row is due
they are read from the log by (key, position) and delivered in order; the row goes with the last ack. Without a key an event
is alone in its row. A parked key's row stands at its dead letter; when that is gone the store frees the row, and what comes after
it is delivered like all else that has a row. `LooseSource` gives out first attempts, `HeldSource` what has rows.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eventbus._held import Held, Hold
from eventbus._intake import READ_AGAIN
from eventbus._lanes import Lane
from eventbus._outcomes import Attempt, Failure, conflict_of, death_of, summary_of
from eventbus._reader import report
from eventbus._retry import seconds_until
from eventbus.stores.base import Events, EventsAt, LaneState, Page, Record, Unit, Waiting

if TYPE_CHECKING:
    from eventbus._intake import Intake

_log = logging.getLogger("eventbus")

WINDOW = 1_000
"""Positions that may be settled above the checkpoint; then the event that blocks it gets a row."""
HELD = 1_000
"""Rows that a lane may have; then it gives out no first attempts until one goes."""
PARKED = 10_000
"""Keys that may be parked in a lane, each some 320 bytes here; then it gives out no first attempts until one is freed."""
_BACKLOG = 64
_BACKLOG_BYTES = 262_144


class LooseSource:
    """The log, given out in order of position; an event is not waited for by those of other keys."""

    beside = False
    replay: object = None

    def __init__(self, lane: Lane, intake: Intake, state: LaneState, *, by_key: bool) -> None:
        self._lane = lane
        self.intake = intake
        self._by_key = by_key
        self._checkpoint = state.checkpoint
        self._settled_before = set(state.done)
        self._window: deque[int] = deque()  # positions given out above the checkpoint, in order
        self._settled: set[int] = set()  # … those of them that are settled, or have a row
        self._back: list[tuple[int, Record]] = []  # … those of them that were given back, as a heap
        self._stored_done: tuple[int, ...] = ()
        self.held: HeldSource  # set right after

    @property
    def checkpoint(self) -> int:
        """Up to here everything is settled, or has a row."""
        return self._checkpoint

    @property
    def waiting(self) -> int:
        """Rows of this lane."""
        return len(self.held)

    @property
    def parked(self) -> int:
        """Keys of this lane that are parked."""
        return self.held.parked

    def hindrance(self) -> str | None:
        """Why it gives out no first attempts, if something must be done about it."""
        if self.held.parked < PARKED:
            return None
        return f"{self.held.parked} keys are parked in this lane: redrive or discard their dead letters"

    def free(self, position: int) -> None:
        """The store has freed what was parked behind the dead letter at this position."""
        self.held.free(position)
        self._lane.wake()

    def parks(self, record: Record) -> bool:
        """Whether an event waits behind its key's dead letter."""
        return self.held.parks(self.hold_of(record), record.position)

    def hold_of(self, record: Record) -> Hold:
        """What a row for this event would stand for."""
        # A damaged one waits behind no other: its key may be what is damaged, and it would not be found under it.
        if self._by_key and record.key is not None and record.fault is None:
            return record.key
        return record.position

    def done(self) -> tuple[int, ...]:
        """Positions above the checkpoint that are settled or have a row."""
        return (*self._settled, *self._settled_before)

    def is_idle(self) -> bool:
        """It gives out first attempts alone; what has a row is another source's."""
        return True

    def take(self) -> Attempt | None:
        """The next event whose key is not held."""
        if not self._back and len(self._window) >= WINDOW:
            self._give_row_to_first()
        while not self.held.is_full() and (record := self._pop()) is not None:
            position = record.position
            if position in self._settled_before:
                self._settled_before.discard(position)
                self._settle(position)
            elif self.held.passes(self.hold_of(record), position):
                self._settle(position)
                self._lane.settled(position)
            else:
                return Attempt(self._lane, self, record, 1)
        return None

    def _pop(self) -> Record | None:
        """The next event that is not given out; from then on it is in the window."""
        if self._back:
            return heapq.heappop(self._back)[1]
        record = self.intake.pop()
        if record is not None:
            self._window.append(record.position)
        return record

    def acked(self, attempt: Attempt, published: Sequence[Record]) -> None:
        """It is settled; the checkpoint moves if it was the first."""
        if self.held.has_row(attempt.record.position):
            self.held.acked(attempt, published)
            return
        conflict = conflict_of(attempt, published, self._lane.environment.clock) if published else None
        if conflict is None:
            self._settle(attempt.record.position)
            self._lane.settled(attempt.record.position, published)
        else:
            self._lane.flush()
            self._settle(attempt.record.position)
            self._lane.send("log", attempt.record.position, published=tuple(published), conflict=conflict)

    def go_on(self, attempt: Attempt) -> Attempt | None:
        """`acked` of an attempt that published nothing, and `take`."""
        self.acked(attempt, ())
        return self.take()

    def failed(self, failure: Failure) -> None:
        """It gets a row, or is given up."""
        attempt, lane = failure.attempt, self._lane
        position = attempt.record.position
        if self.held.has_row(position):
            self.held.failed(failure)
            return
        lane.flush()
        self._settle(position)
        dies = failure.delay is None and (failure.final or lane.holder.options.on_exhausted != "pause")
        hold = self.hold_of(attempt.record)
        if dies and not self.held.is_to_park(hold):
            lane.send("log", position, death=death_of(failure, attempt.number, None))
            return
        held = Held(hold, position, position, attempt.number, failure.now)
        if dies:
            self.held.park(held, failure, "log")
        else:
            self.held.wait(held, failure, "log")

    def given_back(self, attempt: Attempt) -> None:
        """It is next again. It stays in the window: later ones may be settled, and the checkpoint must not pass it."""
        position = attempt.record.position
        if self.held.has_row(position):
            self.held.given_back(attempt)
        else:
            heapq.heappush(self._back, (position, attempt.record))

    def retry_now(self) -> None:
        """What waits is due, at attempt 1."""
        self.held.retry_now()

    def clear_to(self, position: int) -> bool:
        """Whether everything up to a position is settled, and the store knows it."""
        if self.held.holds_to(position):
            return False
        if self._lane.stored >= position and not self.held.unconfirmed_to(position):
            return True
        if not self._lane.up_to_date() or self.intake.reach() < position:
            return False
        first = self._window[0] if self._window else self.intake.first()
        return first is None or first > position

    def has_settled(self, record: Record) -> bool:
        """Whether this event is settled, and the store knows it."""
        position = record.position
        if self.held.holds(self.hold_of(record), position):
            return False
        return self._lane.stored >= position or position in self._stored_done

    def confirmed(self, unit: Unit) -> None:
        """A unit of this lane has been committed."""
        self._stored_done = unit.done
        self.held.confirmed(unit)

    def _settle(self, position: int) -> None:
        window, settled = self._window, self._settled
        settled.add(position)
        while window and window[0] in settled:
            self._checkpoint = window.popleft()
            settled.discard(self._checkpoint)

    def _give_row_to_first(self) -> None:
        """The first event of a full window takes long: it gets a row, so that the checkpoint can pass it."""
        self._lane.flush()
        position = self._window[0]
        self._settle(position)
        self.held.add_running(position)


class HeldSource:
    """What has rows: events of held keys, and single events that wait for another attempt."""

    beside = False
    replay: object = None

    def __init__(self, lane: Lane, log: LooseSource, accepts: Callable[[Record], bool], types: tuple[str, ...] | None) -> None:
        self._lane = lane
        self._log = log
        self._accepts = accepts
        self.types = types
        self._held: dict[Hold, Held] = {}
        self._due: list[tuple[float, int, Held]] = []  # monotonic
        self._tie = itertools.count()
        self._active: list[Held] = []
        self._unconfirmed: deque[tuple[Hold, Unit]] = deque()  # units that remove a row
        self._parked: dict[int, Held] = {}  # by the position of the dead letter

    def __len__(self) -> int:
        return len(self._held)

    @property
    def parked(self) -> int:
        """How many keys are parked."""
        return len(self._parked)

    def is_full(self) -> bool:
        """Whether there must be no more rows. Parked ones cost little, and may wait for weeks."""
        parked = len(self._parked)
        return len(self._held) - parked >= HELD or parked >= PARKED

    def load(self, rows: Iterable[Waiting]) -> None:
        """Rows from the store, at the start."""
        for row in rows:
            hold: Hold = row.position if row.key is None else row.key
            up_to = row.position if row.key is None else self._log.checkpoint
            held = Held(hold, row.position, up_to, row.attempt, row.first_failed_at)
            held.after, held.parked = row.begins > row.position, row.state == "parked"
            self._held[hold] = held
            if held.parked:
                held.first_failed_at = None  # the row's is that of its dead letter
                self._parked[row.position] = held
            else:
                now = self._lane.environment.clock.time()
                self._wait(held, seconds_until(row.due_at, row.first_failed_at, now))

    def free(self, position: int) -> None:
        """The store has freed a parked row: its dead letter is gone."""
        held = self._parked.pop(position, None)
        if held is not None:
            held.parked = False
            self._wait(held, 0.0)

    def parks(self, hold: Hold, position: int) -> bool:
        """Whether this event waits behind its key's dead letter."""
        held = self._held.get(hold)
        return held is not None and held.parked and held.begins <= position

    def is_to_park(self, hold: Hold) -> bool:
        """Whether the death of an event parks what a row for it would stand for: only a key has later events."""
        return isinstance(hold, str) and self._lane.holder.options.on_exhausted == "park"

    def passes(self, hold: Hold, position: int) -> bool:
        """Whether a key is held; if so, this event of it is held as well."""
        held = self._held.get(hold)
        if held is None:
            return False
        held.up_to = position
        return True

    def has_row(self, position: int) -> bool:
        """Whether a single event, given out by the log, has got a row meanwhile."""
        return position in self._held

    def holds(self, hold: Hold, position: int) -> bool:
        """Whether this event waits in a row, by itself or behind its key, as far as the store knows."""
        held = self._held.get(hold) or self._held.get(position)
        if held is not None and held.begins <= position:
            return True
        return any(unit.row is not None and unit.row <= position for of, unit in self._unconfirmed if of in (hold, position))

    def holds_to(self, position: int) -> bool:
        """Whether something up to a position is held that is not parked."""
        return any(held.begins <= position for held in self._held.values() if not held.parked)

    def unconfirmed_to(self, position: int) -> bool:
        """Whether the removal of a row up to a position is not in the store yet."""
        return any(unit.row is not None and unit.row <= position for _, unit in self._unconfirmed)

    def confirmed(self, unit: Unit) -> None:
        """A unit of this lane has been committed."""
        if self._unconfirmed and self._unconfirmed[0][1] is unit:
            self._unconfirmed.popleft()

    # -------------------------------------------------------------- a source

    def is_idle(self) -> bool:
        """Whether there are no rows but parked ones."""
        return len(self._held) == len(self._parked)

    def take(self) -> Attempt | None:
        """The next event of a held key that is due."""
        if not self._held:
            return None
        self._activate()
        for held in self._active:
            if held.running or held.reading:
                continue
            if len(held.backlog) < 2 and held.read_to < held.up_to:  # noqa: PLR2004  # its successor must be known when it is acked
                self._read(held)
            elif held.backlog:
                held.running = True
                return Attempt(self._lane, self, held.backlog[0], held.attempts + 1, item=held)
        return None

    def acked(self, attempt: Attempt, published: Sequence[Record]) -> None:
        """The row moves to the next event of its key, or goes."""
        conflict = conflict_of(attempt, published, self._lane.environment.clock)
        self._go_on(attempt, published=tuple(published), conflict=conflict)

    def failed(self, failure: Failure) -> None:
        """The row waits again, or the event is given up and the next one of its key has its turn."""
        attempt, lane = failure.attempt, self._lane
        held = self._of(attempt)
        dies = failure.delay is None and (failure.final or lane.holder.options.on_exhausted != "pause")
        if dies and not self.is_to_park(held.hold):
            self._go_on(attempt, death=death_of(failure, attempt.number, held.first_failed_at))
            return
        row = held.row
        held.row, held.after, held.attempts = attempt.record.position, False, attempt.number
        held.first_failed_at = failure.now if held.first_failed_at is None else held.first_failed_at
        if dies:
            self.park(held, failure, "row", row)
        else:
            self.wait(held, failure, "row", row)

    def given_back(self, attempt: Attempt) -> None:
        """It is next again."""
        held = self._of(attempt)
        held.running = False
        if held not in self._active:  # a first attempt, given out by the log, which has got a row meanwhile
            held.backlog.append(attempt.record)
            held.read_to = held.up_to
            self._active.append(held)

    def retry_now(self) -> None:
        """Every row is due, at attempt 1."""
        self._due.clear()
        for held in self._held.values():
            if not held.active and not held.parked:
                held.attempts, held.first_failed_at = 0, None
                self._wait(held, 0.0)

    # -------------------------------------------------------------- rows

    def wait(self, held: Held, failure: Failure, source: str, row: int | None = None) -> None:
        """Write a row that waits for another attempt of its first event."""
        lane = self._lane
        due_at = failure.now + (failure.delay or 0.0)
        error = summary_of(failure.error)
        waiting = Waiting(held.row, held.key, held.attempts, due_at, "retrying", held.first_failed_at, error)
        pause = error if failure.delay is None else None
        self._held[held.hold] = held
        self._rest(held)
        self._wait(held, failure.delay or 0.0)
        self._write(held, source, row, rows=(waiting,), pause=pause)
        if pause is not None:
            lane.holder.pause(pause)

    def park(self, held: Held, failure: Failure, source: str, row: int | None = None) -> None:
        """The first event of a key is a dead letter from now on, and its row says that the later ones wait behind it."""
        death = death_of(failure, held.attempts, held.first_failed_at)
        held.parked = held.after = True
        held.attempts, held.first_failed_at = 0, None
        self._held[held.hold] = self._parked[held.row] = held
        self._rest(held)
        waiting = Waiting(held.row, held.key, 0, failure.now, "parked", death.first_failed_at, summary_of(failure.error))
        self._write(held, source, row, rows=(waiting,), death=death)
        _log.warning("%s: the key %r is parked behind its dead letter at %d", self._lane.holder.options.name, held.key, held.row)
        self._lane.tell_waiters()

    def _write(self, held: Held, source: str, row: int | None, **parts: Any) -> None:
        """Send what became of an event that the log has given out, or a row."""
        if source == "log":
            self._lane.send("log", held.row, **parts)
        else:
            self._send(held, row, held.row, **parts)

    def add_running(self, position: int) -> None:
        """A first attempt that takes long gets a row; it stays with the worker that runs it."""
        now = self._lane.environment.clock.time()
        held = Held(position, position, position, running=True, active=True)
        self._held[position] = held
        self._lane.send("log", position, rows=(Waiting(position, None, 0, now, "running"),), counts=False)

    def _of(self, attempt: Attempt) -> Held:
        if isinstance(attempt.item, Held):
            return attempt.item
        return self._held[attempt.record.position]

    def _go_on(self, attempt: Attempt, **parts: Any) -> None:
        """The first event of a row is settled."""
        held, row = self._of(attempt), self._of(attempt).row
        held.running = False
        held.attempts, held.first_failed_at = 0, None
        if held.backlog:
            held.backlog.pop(0)
        if held.backlog:
            held.row, held.after = held.backlog[0].position, False
            now = self._lane.environment.clock.time()
            self._send(held, row, attempt.record.position, rows=(Waiting(held.row, held.key, 0, now),), **parts)
        else:
            del self._held[held.hold]
            if held in self._active:
                self._active.remove(held)
            self._send(held, row, attempt.record.position, **parts)

    def _send(self, held: Held, row: int | None, position: int, **parts: Any) -> None:
        self._lane.flush()
        self._unconfirmed.append((held.hold, self._lane.send("row", position, row=row, **parts)))

    def _rest(self, held: Held) -> None:
        if held in self._active:
            self._active.remove(held)
        held.active = held.running = held.reading = False
        held.backlog.clear()
        held.read_to = 0

    def _wait(self, held: Held, seconds: float) -> None:
        environment = self._lane.environment
        due = environment.clock.monotonic() + seconds
        heapq.heappush(self._due, (due, next(self._tie), held))
        environment.timers.at(due, self._lane.wake)

    def _activate(self) -> None:
        """Turn to the rows that are due, as many at once as the lane may run."""
        now = self._lane.environment.clock.monotonic()
        while self._due and self._due[0][0] <= now and len(self._active) < self._lane.concurrency:
            held = heapq.heappop(self._due)[2]
            held.active = True
            self._active.append(held)
            self._read(held)

    # -------------------------------------------------------------- their events

    def _read(self, held: Held) -> None:
        held.reading = True
        reader = self._lane.environment.reader
        if held.key is None:
            reader.ask_then(EventsAt((held.row,)), lambda answer: self._on_read(held, held.up_to, answer))
            return
        up_to = held.up_to
        after = held.backlog[-1].position if held.backlog else held.begins - 1  # a bound below what is held
        query = Events(max(after, held.read_to), _BACKLOG, _BACKLOG_BYTES, until=up_to, types=self.types, key=held.key)
        reader.ask_then(query, lambda answer: self._on_read(held, up_to, answer))

    def _on_read(self, held: Held, up_to: int, answer: Page | tuple[Record, ...] | BaseException) -> None:
        if not held.active or self._lane.closed or self not in self._lane.sources:
            return
        if isinstance(answer, BaseException):
            report("waiting deliveries", answer)
            self._lane.environment.timers.after(READ_AGAIN, lambda: self._read_again(held))
            return
        held.reading = False
        records = answer.records if isinstance(answer, Page) else answer
        held.read_to = answer.up_to if isinstance(answer, Page) else up_to
        held.backlog.extend(record for record in records if self._accepts(record))
        if not held.backlog and held.read_to >= held.up_to:
            self._lose(held)
        self._lane.wake()

    def _read_again(self, held: Held) -> None:
        if held.active:
            self._read(held)

    def _lose(self, held: Held) -> None:
        """A row holds nothing: it goes. That is as it should be where nothing came after a parked event; else it is told."""
        if not held.after:
            _log.warning("%s: the event at %d is gone from the log", self._lane.holder.options.name, held.row)
        del self._held[held.hold]
        self._rest(held)
        self._send(held, held.row, held.row)
