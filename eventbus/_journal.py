"""The journal: one thread that writes, many callers that wait, one transaction for all of them.

publish → *journal* → store → lanes → workers → outcome → *journal* → store. In come groups of records to append, outcomes
(`Unit`) and commands, from tasks of the loop; they gather while the thread commits, and the next commit takes all there are.
Out goes, with one post to the loop per commit, what became durable: to the dispatcher, to the lanes, to those who wait.
This is group commit: see "Group commit" in Gray & Reuter, Transaction Processing, 1993, 9.4.
"""

from __future__ import annotations

import collections
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from eventbus._pending import Pending, Settling, Ticket, is_plain
from eventbus.errors import (
    BusNotOpen,
    EventBusError,
    PublishOutcomeUnknown,
    StoreCorrupt,
    StoreError,
    StoreLost,
)
from eventbus.stores.base import Batch, Command, Committed, Notice, Record, Stored, Unit

if TYPE_CHECKING:
    from eventbus._clock import Clock
    from eventbus._loop import Loop, Waiter
    from eventbus.stores.base import Store

T = TypeVar("T")

_log = logging.getLogger("eventbus")

OUTCOME_INTERVAL = 0.020
"""Seconds between commits that carry outcomes, unless somebody waits for them: an append alone is a cheaper transaction."""

NOTICE_INTERVAL = 0.020
"""Seconds between looks at what other instances have done, while there are some."""
NOTICE_ALONE = 0.2
"""… and while there are none, so that one that comes is noticed."""

RETRY_INTERVAL = 0.5
"""Seconds after which outcomes that could not be written are tried again, and a disk that was full, if nothing else is."""

_FATAL = (StoreLost, StoreCorrupt)
"""Failures after which nothing that the store says can be relied upon. After all others it is tried again."""


class Listener(Protocol):
    """Who is told what the journal has done: the dispatcher. Called on the loop."""

    def announce(self, committed: Committed) -> None:
        """Events have become durable."""

    def noticed(self, notice: Notice) -> None:
        """Others have written to the store."""

    def renewal_due(self) -> None:
        """The time that `Journal.renew_at` named has come."""

    def halt(self, error: EventBusError) -> None:
        """Outcomes cannot be written: start no further attempt."""

    def proceed(self) -> None:
        """Outcomes can be written again."""

    def crashed(self, error: EventBusError, *, told: bool) -> None:
        """The journal has stopped for good; `told` says whether any caller was given the error."""


class Journal:
    """Runs the store's `open`, `commit` and `close` in a thread of its own."""

    def __init__(self, store: Store, loop: Loop, clock: Clock, max_pending: int) -> None:
        self._store = store
        self._begins = store.features.begins
        self._loop = loop
        self._clock = clock
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._pending = Pending()
        self._bell = loop.gate()
        self._asleep = False  # the thread waits for the bell
        self._dozing = False  # … or for the time at which outcomes are due
        self.turn = loop.turn()
        self._size = 0  # records handed in and not decided yet
        self._room: collections.deque[tuple[int, Waiter]] = collections.deque()
        self._closing = False
        self._halted = False
        self._full = False  # the store has no room for events: it is asked again and again
        self._outcomes_taken = 0.0
        self._retry_at = 0.0
        self._given_up = False  # outcomes; none that comes later may be written, for it would stand for them
        self._crash: EventBusError | None = None
        self.listener: Listener | None = None
        self.notice_every = math.inf
        """Seconds between looks at what other instances have done; infinite where there can be none."""
        self.renew_at = math.inf
        """When, by the store's clock, the listener is to be told that the lease must be renewed."""
        self._notice_at = 0.0
        self._blind = False

    @property
    def size(self) -> int:
        """Records that wait to be written."""
        return self._size

    @property
    def is_open(self) -> bool:
        """Whether it still takes anything."""
        return self._crash is None and not self._closing

    # -------------------------------------------------------------- on the loop

    async def append(self, records: Sequence[Record]) -> Sequence[Stored] | None:
        """Append a group of records, all or nothing; returns when they are durable, as `Committed.appends`.

        Waits while `max_pending` records are waiting before it. A cancellation before the group is queued means that it is
        not stored; after that, it is raised once the group is decided.
        """
        await self._loop.checkpoint_if_cancelled()
        if not self._admit(len(records)):
            await self._wait_for_room(len(records))
        waiter = self._loop.waiter()
        ticket = Ticket(waiter.set, records)
        with self._lock:
            self._pending.appends.append(ticket)
            self.turn.call()
            self._ring()
        await waiter.wait_decided()
        if isinstance(ticket.result, Exception):
            raise ticket.result
        return cast("Sequence[Stored] | None", ticket.result)

    async def written(self) -> None:
        """Wait until the outcomes that were handed in before are written."""
        self.flush()
        await self.append(())

    async def command(self, command: Command[T]) -> T:
        """Have a command carried out; returns its result when it is durable, or raises the error that it is."""
        waiter = self._loop.waiter()
        ticket = self._submit(command, waiter.set)
        await waiter.wait_decided()
        if isinstance(ticket.result, Exception):
            raise ticket.result
        return cast("T", ticket.result)

    def submit(self, command: Command[T], then: Callable[[T | Exception], object]) -> None:
        """Have a command carried out before whatever is queued after it; from any thread.

        If the store fails for now, it is tried again, still before what comes later. `then` is called on the loop with the
        result, before the events of its transaction are announced; or with an error, when it is given up.
        """
        ticket = self._submit(command, lambda: then(cast("T | Exception", ticket.result)), kept=True)

    def _submit(self, command: Command[T], decided: Callable[[], object], *, kept: bool = False) -> Ticket:
        self._check()
        ticket = Ticket(decided, command=cast("Command[object]", command), kept=kept)
        with self._lock:
            self._pending.commands.append(ticket)
            self._ring()
        return ticket

    def settle(self, lane: Settling, unit: Unit, serial: int) -> None:
        """Write an outcome, with the next commit; `lane.confirmed` tells what became of it."""
        with self._lock:
            pending = self._pending
            pending.add(lane, unit, serial)
            if unit.published:
                pending.urgent = True
            elif not pending.rides and not is_plain(unit):
                pending.rides = True
            if pending.urgent or not self._dozing:
                self._ring()

    def flush(self) -> None:
        """Do not make outcomes wait for the interval: somebody waits for them."""
        with self._lock:
            self._pending.urgent = True
            if self._pending.units:
                self._ring()

    def ride(self) -> None:
        """Let outcomes go with the next transaction."""
        with self._lock:
            self._pending.rides = True

    def job(self, job: Callable[[], object]) -> None:
        """Run a function between two transactions. It must not raise."""
        with self._lock:
            self._pending.jobs.append(job)
            self._ring()

    def close(self) -> None:
        """Commit what is pending, then end the thread's `run`."""
        with self._lock:
            self._closing = True
            self._ring()
        for _, waiter in self._room:
            waiter.set()

    def _ring(self) -> None:
        """Wake the thread, if it sleeps. With the lock held."""
        if self._asleep:
            self._asleep = self._dozing = False
            self._bell.open()

    def _check(self) -> None:
        if self._crash is not None:
            raise _again(self._crash, ())
        if self._closing:
            raise BusNotOpen("the bus is closing: nothing was stored")

    def _admit(self, count: int) -> bool:
        """Take room for so many records, if there is some and nobody waits for it."""
        self._check()
        if self._room or not self._has_room(count):
            return False
        self._size += count
        return True

    async def _wait_for_room(self, count: int) -> None:
        """Take room behind those who wait for some already."""
        turn = (count, self._loop.waiter())
        self._room.append(turn)
        try:
            await turn[1].wait()
            self._check()
        except BaseException:
            if turn in self._room:
                self._room.remove(turn)
            else:
                self._size -= count
            self._admit_waiting()
            raise

    def _has_room(self, count: int) -> bool:
        return not self._size or self._size + count <= self._max_pending

    # -------------------------------------------------------------- in the thread

    def run(self) -> None:
        """Commit what is pending, again and again, until closed. The job of the writer's thread."""
        while (pending := self._take()) is not None:
            told = self._commit(pending) if self._is_worth_a_commit(pending) else None
            self.turn.leave()
            if told is not None:
                self._post(*told)
            try:
                for job in pending.jobs:
                    job()
                if self.notice_every < math.inf:
                    self._look_around()
            except BaseException as error:  # noqa: BLE001  # as in a commit: nobody may wait for ever
                crash = self._stopped(error)
                self._post(self._on_failed, Pending(), crash, crash)

    def _is_worth_a_commit(self, pending: Pending) -> bool:
        if pending.appends or pending.commands or pending.units:
            return True
        return self._full and not self._closing and self._clock.monotonic() >= self._retry_at

    def _look_around(self) -> None:
        """See what others have done, if it is time for that. By the machine's time: they do not go by the clock given here."""
        if not self.is_open:
            return
        now = self._store.monotonic()
        if now >= self.renew_at:
            self.renew_at = math.inf
            self._post(self._on_renewal)
        if now < self._notice_at:
            return
        self._notice_at = now + self.notice_every
        try:
            notice = self._store.notice()
        except _FATAL as error:
            self._post(self._on_failed, Pending(), error)
            return
        except EventBusError as error:
            if not self._blind:
                _log.error("it cannot be seen what other instances do, trying again: %s", error)
            self._blind = True
            return
        self._blind = False
        if notice is not None:
            self._post(self._on_notice, notice)

    def _commit(self, pending: Pending) -> tuple[Callable[..., None], *tuple[object, ...]]:
        """Commit, and return what the loop is to call, and with what."""
        if self.notice_every < NOTICE_ALONE or not self._begins:
            self.turn.come()  # the loop does not wait until others let this one write
        try:
            committed = self._store.commit(self._batch(pending))
        except EventBusError as error:
            self._put_back(pending, error)
            return self._on_failed, pending, error
        except BaseException as error:  # noqa: BLE001  # a fault of ours or the store's: nobody may wait for ever
            wrapped = PublishOutcomeUnknown([record.id for ticket in pending.appends for record in ticket.records])
            wrapped.__cause__ = error
            return self._on_failed, pending, wrapped, self._stopped(error)
        self._full = committed.full is not None
        if self._full:
            self._retry_at = self._clock.monotonic() + RETRY_INTERVAL
        return self._on_committed, pending, committed

    def _stopped(self, error: BaseException) -> StoreError:
        """What it says when it has stopped for good, for a reason that nobody has foreseen."""
        self._given_up = True
        crash = StoreError(f"the store failed unexpectedly: {error!r}")
        crash.__cause__ = error
        return crash

    def _take(self) -> Pending | None:
        """What is to be committed next; waits for it. None: there will be nothing more."""
        while True:
            with self._lock:
                seconds = self._seconds_to_wait()
                if seconds <= 0:
                    return self._taken()
                if self._closing:
                    return None
                self._asleep, self._dozing = True, seconds < math.inf
            if not self._bell.wait(min(seconds, self.notice_every)):
                with self._lock:
                    if self._asleep:
                        self._asleep = self._dozing = False
                    else:
                        self._bell.wait()  # it was rung in between
                    if self.notice_every < seconds:
                        return Pending()
                    self._pending.urgent = True  # also when the wait is over by the machine's clock, but not by the one given
                    return self._taken()

    def _seconds_to_wait(self) -> float:
        pending = self._pending
        if pending.appends or pending.commands or pending.jobs:
            return 0.0
        if not pending.units and not pending.again and (self._closing or not self._full):
            return math.inf
        if self._closing:
            return 0.0
        due = 0.0 if pending.urgent else self._outcomes_taken + OUTCOME_INTERVAL
        return max(due, self._retry_at) - self._clock.monotonic()

    def _taken(self) -> Pending:
        """What is pending; outcomes only where they are due, or more than moved checkpoints. With the lock held."""
        pending, self._pending = self._pending, Pending()
        self.turn.take()
        pending.commands[:0] = pending.again
        if self._given_up:
            pending.units = []
        now = self._clock.monotonic()
        if pending.urgent or pending.rides or pending.commands or self._closing or now >= self._outcomes_taken + OUTCOME_INTERVAL:
            self._outcomes_taken = now
        else:
            self._pending.units, pending.units = pending.units, []
            self._pending.last, pending.last = pending.last, {}
        return pending

    def _batch(self, pending: Pending) -> Batch:
        return Batch(
            now=self._clock.time(),
            appends=[ticket.records for ticket in pending.appends],
            units=[unit for _, unit, _ in pending.units],
            commands=[ticket.command for ticket in pending.commands if ticket.command is not None],
            begins=self.turn.come,
        )

    def _put_back(self, pending: Pending, error: EventBusError) -> None:
        """Outcomes and submitted commands are not lost with a failed commit: they go before those that came meanwhile."""
        with self._lock:
            if isinstance(error, _FATAL) or self._closing:
                self._given_up = True
                return
            self._pending.again = [ticket for ticket in pending.commands if ticket.kept]
            pending.commands = [ticket for ticket in pending.commands if not ticket.kept]
            self._retry_at = self._clock.monotonic() + RETRY_INTERVAL
            later, self._pending.units, self._pending.last = self._pending.units, list(pending.units), {}
            for lane, unit, serial in later:
                self._pending.add(lane, unit, serial)

    def _post(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.post(function, *args)
        except RuntimeError:
            _log.warning("the event loop is gone; what was being written is in the store, nobody could be told")

    # -------------------------------------------------------------- on the loop again

    def _on_notice(self, notice: Notice) -> None:
        if self.listener is not None:
            self.listener.noticed(notice)

    def _on_renewal(self) -> None:
        if self.listener is not None:
            self.listener.renewal_due()

    def _on_committed(self, pending: Pending, committed: Committed) -> None:
        listener = self.listener
        for ticket, result in zip(pending.commands, committed.results, strict=True):
            self._decide(ticket, result)
        # Those who publish go on before the lanes they have published to: their next events can be written meanwhile.
        for ticket, result in zip(pending.appends, committed.appends, strict=True):
            self._decide(ticket, result)
        if listener is not None:
            if committed.full is not None:
                self._halt(committed.full)
            elif self._halted:
                self._halted = False
                listener.proceed()
            listener.announce(committed)
        conflicts = set(committed.conflicts)
        for index, (lane, unit, serial) in enumerate(pending.units):
            lane.confirmed(unit, serial, committed.refused.get(index), conflict=index in conflicts)
        self._admit_waiting()

    def _on_failed(self, pending: Pending, error: EventBusError, crash: EventBusError | None = None) -> None:
        if crash is not None or isinstance(error, _FATAL):
            self._crash = crash or error
            _log.critical("the journal has stopped: %s", error, exc_info=error)
        for ticket in pending.appends:
            self._decide(ticket, _again(error, ticket.records))
        for ticket in pending.commands:
            self._decide(ticket, _again(error, ()))
        if self.listener is not None:
            if self._crash is not None:
                self.listener.crashed(self._crash, told=bool(pending.appends))
            elif pending.units:
                self._halt(error)
        self._admit_waiting()

    def _halt(self, error: EventBusError) -> None:
        if self.listener is not None and not self._halted:
            self._halted = True
            _log.error("dispatch waits until more can be written: %s", error)
            self.listener.halt(error)

    def _decide(self, ticket: Ticket, result: object) -> None:
        self._size -= len(ticket.records)
        ticket.result = result
        ticket.decided()

    def _admit_waiting(self) -> None:
        # The room is theirs from here on: if a caller who comes before they run took it, a large group would never have its turn.
        while self._room and self._has_room(self._room[0][0]):
            count, waiter = self._room.popleft()
            self._size += count
            waiter.set()


def _again(error: EventBusError, records: Sequence[Record]) -> EventBusError:
    """The error of a failed commit, for one of the callers whose records were in it."""
    if isinstance(error, PublishOutcomeUnknown):
        own: EventBusError = PublishOutcomeUnknown([record.id for record in records])
    else:
        own = type(error)(*error.args)
    own.__cause__ = error
    return own
