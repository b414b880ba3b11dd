"""EventBus: what a program declares, and what it calls.

*publish* → journal → store → lanes → workers → outcome. The bus wires the parts and owns none of their work: an event is made
a record (`_encoding`), handed to the journal (`_journal`), announced to the lanes (`_dispatch`, `_intake`, `_lanes`), and run by
the workers (`_workers`, `_attempts`). `_running` holds what lives while the bus is open.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from eventbus._breaker import Breaker
from eventbus._clock import Clock, SystemClock
from eventbus._codec import Codec, JSONCodec
from eventbus._dead_letters import DeadLetters
from eventbus._declared import Declared
from eventbus._events import Registry
from eventbus._model import DeliveryStatus, Envelope, Receipt, ReplaySummary, Stats, SubscriptionInfo
from eventbus._opening import Opening
from eventbus._options import (
    Durability,
    Keeping,
    Settings,
    check_counts,
    check_durability,
    check_hooks,
    check_instance_name,
    check_iterable,
    check_methods,
    check_numbers,
    check_spans,
    check_stop_timeout,
    event_id_of,
    key_of,
    prune_every,
    store_of,
)
from eventbus._retry import RetryPolicy
from eventbus._subscription import OnExhausted, Start, Subscription, split_types, subscription_of
from eventbus._typing import E1, E2, E3, E4, E5, E6, E7, E8, NOT_GIVEN, On, Point, Progress, given
from eventbus.errors import BusNotOpen, ConfigurationError, InvalidSubscription
from eventbus.hooks import Hook
from eventbus.stores.base import Cancel, Order, Record, Store

if TYPE_CHECKING:
    from eventbus._running import Running

Name = str | Callable[..., Any]
"""A subscription: its name, or the handler."""


class EventBus:
    """A durable event bus inside the program.

    Nothing happens before `open`: no file, no thread, no loop. Open, it may be used from any task of the loop it was opened on.

    Args:
        store: a path to a SQLite file, `":memory:"`, or a `Store`.
        name: what this instance is called in tables and messages; default: host and process.
        workers: handlers that run at once, at most; one subscription has at most half of them.
        durability: "full": what `publish` has returned survives power loss; "fast": it survives a crash of the process, and
            after power loss the newest may be missing, never some in the middle.
        retention: how long events are kept that every subscription has settled; None keeps them. It is applied at the start
            and from then on at intervals of half of it, at least 0.5 s and at most a minute.
        max_pending: events that may wait to be written; beyond, `publish` waits.
        max_event_bytes: the largest event, encoded.
        dedup_for: how long idempotency keys are kept, whatever the retention.
        lease: seconds for which an instance counts as alive.
        hooks: told what happens; see `eventbus.hooks`.
        codec: makes bytes of events and back; default: JSON.
        clock: where the time comes from.

    Raises:
        ConfigurationError: an option that cannot be.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store | None = "eventbus.db",
        *,
        name: str | None = None,
        workers: int = 100,
        durability: Durability = "full",
        retention: timedelta | None = None,
        max_pending: int = 10_000,
        max_event_bytes: int = 1_048_576,
        dedup_for: timedelta = timedelta(days=7),
        lease: float = 10.0,
        hooks: Iterable[Hook] = (),
        codec: Codec | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_counts(workers=workers, max_pending=max_pending, max_event_bytes=max_event_bytes)
        check_spans(retention=retention, dedup_for=dedup_for)
        check_durability(durability)
        check_numbers(lease=lease)
        check_instance_name(name)
        hooks = list(hooks) if isinstance(hooks, Iterable) else hooks
        check_hooks(hooks)
        codec = JSONCodec() if codec is None else codec
        check_methods(codec=codec, methods=("content_type", "prepare", "encode", "decode"))
        clock = SystemClock() if clock is None else clock
        check_methods(clock=clock, methods=("time", "monotonic"))
        self._store = store
        self._durability: Durability = durability
        self._registry = Registry(codec.prepare)
        keeping = Keeping(
            None if retention is None else retention.total_seconds(),
            dedup_for.total_seconds(),
            prune_every(retention),
        )
        self._settings = Settings(
            name, workers, max_pending, max_event_bytes, lease, keeping, tuple(hooks), clock, codec, self._registry
        )
        self._declared = Declared(self._registry)
        self._running: Running | None = None
        self._opening: Opening[EventBus] | None = None
        self.dead_letters = DeadLetters(self._open, self._declared)
        """Deliveries given up on: `list`, `get`, `redrive`, `discard`."""

    # -------------------------------------------------------------- declaring

    def subscribe(
        self,
        t1: type[E1] | str,
        t2: type[E2] | str = NOT_GIVEN,
        t3: type[E3] | str = NOT_GIVEN,
        t4: type[E4] | str = NOT_GIVEN,
        t5: type[E5] | str = NOT_GIVEN,
        t6: type[E6] | str = NOT_GIVEN,
        t7: type[E7] | str = NOT_GIVEN,
        t8: type[E8] | str = NOT_GIVEN,
        /,
        *more: type[Any] | str,
        name: str | None = None,
        order: Order = "type",
        concurrency: int | None = None,
        retry: RetryPolicy = RetryPolicy(),
        on_exhausted: OnExhausted = "dead_letter",
        timeout: float | None = 60.0,
        start: Start = "now",
        replay: bool = True,
        breaker: Breaker | None = Breaker(),
    ) -> On[E1 | E2 | E3 | E4 | E5 | E6 | E7 | E8]:
        """Tie a handler to event types, durably; a decorator that returns the function unchanged.

        The handler takes `(event)` or `(event, delivery)`. What it returns (an event, a list of events or `Draft`s, or None) is
        published together with the ack. A plain function runs in a thread.

        Args:
            t1, …: classes (subclasses too), or strings: a type's name, `"prefix.*"`, or `"*"`; with strings the handler
                takes the `Envelope`.
            name: the durable identity; default: the function's qualified name, without its module.
            order: "type": strictly, for each type; "log": strictly, over all its types; "key": for each key; "none".
            concurrency: lanes of order "key", deliveries at once of order "none"; default 16.
            retry: when failed attempts are made again.
            on_exhausted: what happens then: "dead_letter", or "pause" the subscription.
            timeout: seconds for one attempt, None for no limit. An async handler is cancelled; a thread cannot be, so its lane
                waits until it returns.
            start: where a *new* subscription begins: "now", "beginning", an aware datetime, or a position (after it).
            replay: whether `bus.replay` delivers to it.
            breaker: when it is held back because everything fails; None: never.

        Raises:
            InvalidSubscription: the handler or an option cannot work.
            InvalidEventType: a class cannot be an event, or its name is taken.
        """
        types = given(t1, t2, t3, t4, t5, t6, t7, t8, *more)
        classes, _ = split_types(types)
        for cls in classes:
            self._registry.subclasses(cls)

        def register(handler: Callable[..., Any]) -> Any:
            self._add(
                subscription_of(
                    types,
                    handler,
                    name=name,
                    order=order,
                    concurrency=concurrency,
                    retry=retry,
                    on_exhausted=on_exhausted,
                    timeout=timeout,
                    start=start,
                    replay=replay,
                    breaker=breaker,
                )
            )
            return handler

        return register

    def _add(self, subscription: Subscription) -> None:
        if self._running is not None:
            raise InvalidSubscription(f"subscription {subscription.name!r}: the bus is open; subscribe before it is opened")
        self._declared.add(subscription)

    # -------------------------------------------------------------- opening

    def open(
        self,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        dispatch: bool | Sequence[Name] = True,
        stop_timeout: float = 10.0,
    ) -> Opening[EventBus]:
        """Open the bus for the body of an `async with`; `async with bus` is `async with bus.open()`.

        Entering recovers what was not settled, then dispatches. Leaving lets running attempts finish for `stop_timeout`
        seconds, cancels and releases the rest, and closes the store; it does not work off what waits.

        Args:
            store: instead of the one given to `EventBus`.
            dispatch: False to publish only; a list of subscriptions to dispatch these. All of them are registered in any
                case, so that nothing published meanwhile is missed.
            stop_timeout: seconds.

        Raises (on entering):
            StoreInUse, StoreTooNew, StoreUnsafe, StoreCorrupt, StoreUnavailable: the store cannot be used.
            InvalidSubscription: a stored subscription cannot be changed as declared.
        """
        check_stop_timeout(stop_timeout)
        if isinstance(dispatch, (str, bytes)) or not isinstance(dispatch, (bool, Iterable)):
            raise ConfigurationError(f"dispatch={dispatch!r}; expected True, False, or a list of subscriptions")
        if isinstance(dispatch, bool):
            names = self._declared.names() if dispatch else set()
        else:
            names = {self._declared.declared_name(each) for each in dispatch}
        which = self._store if store is None else store
        return Opening(self, lambda: self._start(which, names), self._end, stop_timeout)

    async def __aenter__(self) -> Self:
        """Open the bus; see `open`."""
        opening = self.open()
        await opening.__aenter__()
        self._opening = opening
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the bus; see `open`."""
        if self._opening is None:
            raise BusNotOpen("the bus is not open")
        await self._opening.__aexit__(kind, error, traceback)

    async def _start(self, store: str | os.PathLike[str] | Store | None, names: set[str]) -> Running:
        if self._running is not None:
            raise ConfigurationError("this bus is open already; one EventBus is one instance")
        from eventbus._running import Running  # noqa: PLC0415  # what declares events and handlers is imported faster without it

        running = self._running = Running(store_of(store, self._durability), self._settings)
        try:
            await running.start(self._declared.wanted(names))
        except BaseException:
            self._end()
            raise
        return running

    def _end(self) -> None:
        self._running = self._opening = None

    def _open(self) -> Running:
        running = self._running
        if running is None:
            raise BusNotOpen("the bus is not open; use it inside `async with bus:`")
        running.check()
        return running

    # -------------------------------------------------------------- publishing

    async def publish(
        self,
        event: object,
        *,
        key: object = None,
        idempotency_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        due: datetime | timedelta | None = None,
    ) -> Receipt:
        """Store an event for every subscription to its type; returns once it is on disk.

        Waits while `max_pending` events wait to be written. Cancelled before it is queued, it is not stored; after that, the
        cancellation is raised once it is decided whether it is.

        Args:
            event: an instance of an attrs class, a dataclass, a msgspec.Struct or a pydantic model.
            key: what `order="key"` orders by, as `str(key)`; default: the field that `@event(key=…)` names.
            idempotency_key: 1–255 characters; the same key again gives the first receipt, with `duplicate=True`.
            headers: str to str, stored beside the event.
            due: an aware datetime, or a timedelta from now, before which it is not delivered.

        Raises:
            InvalidEvent: it cannot be stored as it is; names the type and the field.
            IdempotencyConflict: the key was used for other content.
            PublishOutcomeUnknown: the disk failed, and it could not be found out whether it is stored.
            StoreError: it is not stored, and why.
            BusNotOpen, WrongLoop: it is not stored.
        """
        running = self._open()
        record = running.encoder.record(event, key=key, idempotency_key=idempotency_key, headers=headers, due=due)
        return (await self._append(running, (record,)))[0]

    async def publish_many(self, events: Iterable[object]) -> list[Receipt]:
        """Store events, or `Draft`s, in one transaction, all or nothing, in this order; see `publish`.

        If one of them cannot be stored (`InvalidEvent`, `IdempotencyConflict`), none is.
        """
        running = self._open()
        check_iterable(events)
        records = running.encoder.records(list(events))
        return await self._append(running, records) if records else []

    async def _append(self, running: Running, records: Sequence[Record]) -> list[Receipt]:
        handled = running.waiting.handled
        try:
            stored = await running.journal.append(records)
        finally:  # who is cancelled after it was queued does not come back here, and it is stored
            for record in records:
                if record.due_at is not None:
                    running.upkeep.scheduled(record.due_at)
        if stored is None:
            return [Receipt(record.id, record.position, False, handled, record) for record in records]
        return [
            Receipt(place.id, place.position, place.duplicate, handled, None if place.duplicate else record)
            for record, place in zip(records, stored, strict=True)
        ]

    async def cancel(self, event_id: str) -> bool:
        """Cancel an event that was published with `due`; False if it is in the log already, or was never scheduled."""
        running = self._open()
        event_id = event_id_of(event_id)
        try:
            return await running.journal.command(Cancel(event_id))
        finally:
            running.dispatcher.tell_promoted((event_id,))

    # -------------------------------------------------------------- waiting

    async def drain(self, timeout: float | None = None) -> Mapping[str, int]:
        """Wait until everything published before the call is settled by the subscriptions dispatched here.

        What the handlers of these events publish is waited for as well, and so are retries and redrives. Not waited for:
        events with a later `due`, and what is paused or blocked.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            What is left, by subscription: how many deliveries are not settled. Empty if nothing is.
        """
        return await self._open().waiting.drain(timeout)

    # -------------------------------------------------------------- history

    async def replay(
        self,
        *types: type | str,
        since: Point = None,
        after: int | None = None,
        until: Point = None,
        to: Name | Iterable[Name] | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        exclusive: bool = False,
        progress: Progress | None = None,
    ) -> ReplaySummary:
        """Deliver past events again, beside live ones, with `delivery.replaying` set; returns when all are settled.

        What a replayed attempt would publish with its ack is dropped. A failing one is tried again by the subscription's policy,
        out of line, and dead-lettered in the end. Checkpoints do not move.

        Args:
            types: classes, names or patterns; none: all.
            since, until: aware datetimes, or positions; inclusive. Default: the oldest retained, the head at the call.
            after: a position, exclusive, instead of `since`; `ReplaySummary.position` resumes.
            to: subscriptions dispatched here, by name or handler; default: all with `replay=True`.
            rate: events per second, at most.
            dry_run: only count.
            exclusive: hold everything else of these subscriptions back until the replay is over, however it ends.
            progress: called with a `ReplaySummary` after each page of events; may be async.

        Raises:
            RangeNotRetained: the range begins before what is retained.
            ConfigurationError: a point or a rate that cannot be, a subscription that does not allow replays, or an exclusive
                replay to one that has one already.
            UnknownSubscription: one of `to` is not dispatched here.
            LaneLost: a lane that it needs is not here, or not any more.
        """
        running = self._open()
        if not isinstance(exclusive, bool):
            raise ConfigurationError(f"exclusive={exclusive!r}; expected True or False")
        if rate is not None:
            check_numbers(rate=rate)
        from eventbus._replay import Replay, targets_of  # noqa: PLC0415  # see `_start`

        targets = targets_of(running.dispatcher, self._declared, to)
        patterns = self._declared.patterns(types)
        stretch = await running.history.range(since, after, until)
        options: dict[str, Any] = {"rate": rate, "dry_run": dry_run, "exclusive": exclusive, "progress": progress}
        replay = Replay(running.dispatcher, running.membership, running.history, targets, patterns, stretch, **options)
        running.replays.add(replay)
        try:
            return await replay.run()
        finally:
            running.replays.discard(replay)

    async def rewind(self, subscription: Name, *, since: Point = None, after: int | None = None) -> None:
        """Move a subscription's checkpoints back: what lies after is handled again, as if it were new.

        Its waiting retries and its dead letters of those events are forgotten; attempts that are running do not count.
        Use it to rebuild a projection.

        Args:
            since: an aware datetime or a position, inclusive. after: a position, exclusive. Neither: from the beginning.

        Raises:
            RangeNotRetained: events of that range have been removed. UnknownSubscription: there is none of this name.
        """
        running = self._open()
        name = self._declared.name_of(subscription)
        stretch = await running.history.range(since, after, None)
        if since is None and after is None:
            await running.history.check_complete()
        await running.rewind(name, stretch.after)

    def history(
        self,
        *types: type | str,
        since: Point = None,
        after: int | None = None,
        until: Point = None,
        key: object = None,
    ) -> AsyncIterator[Envelope]:
        """Read envelopes from the log, in order of position, without delivering them: `async for envelope in bus.history(…)`.

        Args:
            types: classes, names or patterns; none: all.
            since, until: aware datetimes, or positions; inclusive. Default: the oldest retained, the head at the call.
            after: a position, exclusive. key: only events with this key.

        Raises:
            RangeNotRetained: the range begins before what is retained.
        """
        from eventbus._replay import Envelopes  # noqa: PLC0415  # see `_start`

        running = self._open()
        text_key = None if key is None else key_of(key)
        patterns = self._declared.patterns(types)
        return Envelopes(running.history, (since, after, until), patterns, text_key, running.decoder.envelope)

    # -------------------------------------------------------------- status

    async def stats(self) -> Stats:
        """How the bus stands: its log, and every stored subscription."""
        return await self._open().status.stats()

    async def status(self, event_id: str) -> dict[str, DeliveryStatus]:
        """How an event stands with each subscription that it is for: pending, retrying, parked, handled or dead.

        Raises:
            UnknownEvent: there is no such event, stored or scheduled.
        """
        return await self._open().status.of(event_id_of(event_id))

    async def subscriptions(self) -> list[SubscriptionInfo]:
        """All stored subscriptions, those without a handler as well."""
        return await self._open().status.subscriptions()

    async def pause(self, subscription: Name) -> None:
        """Stop delivering to a subscription, durably; what is running finishes, what is published waits.

        Raises:
            UnknownSubscription: there is none of this name.
        """
        await self._open().pause(self._declared.name_of(subscription), "paused by hand")

    async def resume(self, subscription: Name) -> None:
        """Deliver to a paused subscription again; what waited for a retry is due now, at attempt 1.

        Raises:
            UnknownSubscription: there is none of this name.
        """
        await self._open().resume(self._declared.name_of(subscription))

    async def unsubscribe(self, subscription: Name) -> None:
        """Remove a subscription with its checkpoints and waiting retries; its dead letters stay.

        Its handler gets nothing more, also after the next start, unless it is subscribed again; then it is new.

        Raises:
            UnknownSubscription: there is none of this name.
        """
        running, name = self._open(), self._declared.name_of(subscription)
        await running.unsubscribe(name)
        self._declared.remove(name)
