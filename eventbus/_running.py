"""One open bus: its parts put together, its start and its end.

publish → journal → store → lanes → workers → outcome: here these are made and joined. `EventBus` is what was declared; a
`Running` is what runs between entering and leaving `async with bus`.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from eventbus._clock import Ids
from eventbus._declared import Wanted
from eventbus._decoding import Decoder
from eventbus._dispatch import Dispatcher
from eventbus._elsewhere import Elsewhere
from eventbus._encoding import Encoder, handler_context
from eventbus._environment import Environment
from eventbus._intake import Budget
from eventbus._journal import Journal
from eventbus._lanes import Lane
from eventbus._loop import Loop, current_loop, this_process
from eventbus._membership import Membership
from eventbus._outcomes import current_attempt
from eventbus._probation import Solo
from eventbus._reader import Reader
from eventbus._recovery import recover
from eventbus._replay import History, Replay
from eventbus._status import Status
from eventbus._timers import Timers
from eventbus._upkeep import Upkeep
from eventbus._waiting import Waiting
from eventbus._workers import Pool
from eventbus.errors import ConfigurationError, EventBusError, WrongLoop
from eventbus.hooks import notify
from eventbus.stores.base import (
    Instance,
    LogState,
    Notice,
    Pause,
    Register,
    Registration,
    Rewind,
    Subscribed,
    Subscriptions,
    Unsubscribe,
    WaitingRows,
)

if TYPE_CHECKING:
    from eventbus._events import EventType
    from eventbus._options import Settings
    from eventbus.stores.base import Store

_log = logging.getLogger("eventbus")


WAITING_BYTES = 12 * 1024 * 1024
"""Bytes of events that wait in lanes, over the whole bus."""


class Running:
    """An open bus."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.settings = settings
        self.loop: Loop = current_loop()
        self.ids = Ids(settings.clock)
        self.instance = self._instance()
        self._process = this_process()
        self.journal = Journal(store, self.loop, settings.clock, settings.max_pending)
        self._writer = self.loop.worker("eventbus-writer")
        self._reader_thread = self.loop.worker("eventbus-reader") if store.features.concurrent_reads else None
        if self._reader_thread is None:
            self.reader = Reader(store, self.loop, self.journal.job, self.journal.turn)
        else:
            self.reader = Reader(store, self.loop, self._reader_thread.submit, self.loop.turn())
        self.timers = Timers(settings.clock, self.loop)
        self.encoder = Encoder(settings.registry, settings.codec, self.ids, settings.clock, settings.max_event_bytes)
        self.decoder = Decoder(settings.registry, settings.codec)
        self.environment = Environment(
            settings.clock,
            self.timers,
            self.loop,
            self.journal,
            self.reader,
            random.random,
            self._schedule,
            lambda moment: notify(settings.hooks, moment),
            store.monotonic,
            self.instance.id,
        )
        self.dispatcher = Dispatcher(self.environment, self.decoder, self.encoder, Budget(WAITING_BYTES))
        self.environment.solo = Solo(self.dispatcher.lanes, self.timers)
        self.pool = Pool(self.environment, settings.workers, "eventbus", handler_context())
        self.upkeep = Upkeep(self.dispatcher, self.journal, self.reader, settings.keeping)
        self.environment.scheduled = self.upkeep.scheduled
        shared = store.features.shared
        self.membership = Membership(self.dispatcher, self.journal, self.reader, self.instance, settings.lease, shared=shared)
        self.status = Status(self.dispatcher, self.journal, self.reader)
        self.elsewhere = Elsewhere(self.dispatcher, self.membership, self.reader, self.status)
        self.waiting = Waiting(self.dispatcher, self.reader, self.elsewhere)
        self.history = History(self.reader)
        self.replays: set[Replay] = set()
        self.exit_error: BaseException | None = None
        self._wanted: Sequence[Wanted] = ()
        self._tasks = self.loop.tasks()
        self._scopes: list[anyio.CancelScope] = []
        self._journal_runs = False

    def _instance(self) -> Instance:
        host, pid = socket.gethostname(), os.getpid()
        return Instance(self.ids.next(), self.settings.name or f"{host}-{pid}", host, pid, self.settings.clock.time())

    def _schedule(self, lane: Lane) -> None:
        self.pool.schedule(lane)

    def check(self) -> None:
        """Raise `WrongLoop` in another loop or thread, and in a forked child, which has none of our threads."""
        if this_process() is not self._process:
            raise WrongLoop("this process was forked from the one that opened the bus; make and open an EventBus of its own here")
        self.loop.check()

    # -------------------------------------------------------------- the start

    async def start(self, wanted: Sequence[Wanted]) -> None:
        """Open the store, recover, dispatch. If that fails, nothing is left open."""
        self._wanted = wanted
        try:
            await self._in_writer(lambda: self.store.open(self.instance))
            self._writer.submit(self.journal.run)
            self._journal_runs = True
            self.journal.listener = self.dispatcher
            self.dispatcher.tail.begin((await self.reader.ask(LogState())).head)
            self.environment.fenced = self.membership.lose
            self.membership.on_step = self._on_step
            self.dispatcher.on_new_lane = self.membership.want_lane
            self.dispatcher.on_notice = self._on_notice
            self.dispatcher.on_renewal_due = self.membership.poke
            self.dispatcher.on_lane_lost = self._interrupt_replays
            self.dispatcher.on_pause = self.elsewhere.stepped
            await recover(self.dispatcher, self.journal, self.membership, self.instance, wanted)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close()
            raise
        self.encoder.on_new_type = self._on_new_type
        self.dispatcher.on_crash = self.leave
        self.pool.on_exit = self.leave
        await self._tasks.__aenter__()
        for task in (self.timers.run, self.membership.run, *self.upkeep.tasks()):
            self._run_until_closed(task)
        self.pool.start(self._tasks)

    def _run_until_closed(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run something until the bus is closed, whatever is cancelled around it."""
        scope = anyio.CancelScope(shield=True)
        self._scopes.append(scope)

        async def run() -> None:
            await self.loop.within(scope, partial(self.loop.insist, task, scope))

        self._tasks.start(run)

    # -------------------------------------------------------------- the end

    def leave(self, error: BaseException) -> None:
        """End the body of `async with bus`, and raise this from it."""
        if self.exit_error is None:
            self.exit_error = error
            self.dispatcher.leave()
            self._tasks.cancel()

    def check_leaving(self) -> None:
        """Raise in an attempt of this bus: to leave, it would wait for itself."""
        attempt = current_attempt.get()
        if attempt is not None and not attempt.over and attempt.lane.environment is self.environment:
            raise ConfigurationError(
                "a handler cannot leave the bus that runs it: leaving waits for the handler. End the body of `async with bus`, "
                "by an event that it waits for, for instance; or raise SystemExit"
            )

    async def stop(self, timeout: float) -> None:
        """Let running attempts finish for `timeout` seconds, release the rest, write what is to be written, let go."""
        await self._to_the_end(partial(self._stop, timeout))

    async def _to_the_end(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have a task of our own do something, so that no cancellation of the caller cuts it short; that comes out at the end."""
        ended = self.loop.waiter()
        errors: list[BaseException] = []

        async def run() -> None:
            try:
                await work()
            except BaseException as error:  # noqa: BLE001  # raised below, where it is waited for
                errors.append(error)
            finally:
                ended.set()

        self._tasks.start(run)
        await ended.wait_decided()
        if errors:
            raise errors[0]

    async def _stop(self, timeout: float) -> None:
        try:
            self.membership.withdraw()
            await self.pool.stop(timeout)
            scope = anyio.move_on_after(max(timeout, 1.0))  # on a full disk it would take for ever
            await self.loop.within(scope, partial(self.loop.insist, self._circuits_at_rest, scope))
        finally:
            self.dispatcher.close()
            self.elsewhere.stepped()
            self._interrupt_replays()
            try:
                await self._close()
            finally:
                for scope in self._scopes:
                    scope.cancel()

    async def _circuits_at_rest(self) -> None:
        for serving in list(self.dispatcher.servings.values()):
            if serving.circuit is not None:
                serving.circuit.hurry()
                await serving.circuit.at_rest.wait()

    async def end_group(self, *error: object) -> None:
        """Leave the tasks, after `stop`; raises what a handler wants the program to end with."""
        if self.exit_error is None:
            await self._tasks.__aexit__(None, None, None)
            return
        try:
            await self._tasks.__aexit__(*error)  # type: ignore[arg-type]  # it takes in the cancellation that was its own
        finally:
            raise self.exit_error

    async def _close(self) -> None:
        try:
            if self._journal_runs and self.dispatcher.crash is None:
                await self.membership.leave()
        except EventBusError as error:
            _log.warning("the instance could not sign off: %s", error)
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        self.reader.close()
        self.journal.close()
        if self._reader_thread is not None:
            self._reader_thread.stop()
            self._reader_thread.join()
        try:
            await self._in_writer(self.store.close)
        finally:
            self._writer.stop()
            self._writer.join()

    async def _in_writer(self, job: Callable[[], object]) -> None:
        """Run a function in the writer's thread, after what it is doing."""
        errors: list[BaseException] = []
        waiter = self.loop.waiter()

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001  # raised below, where it is waited for
                errors.append(error)
            self.loop.post(waiter.set)

        self._writer.submit(run)
        await waiter.wait_decided()
        if errors:
            raise errors[0]

    # -------------------------------------------------------------- what changes while it runs

    def _on_notice(self, notice: Notice) -> None:
        """Other instances have written to the store."""
        self.membership.noticed(notice)
        self.elsewhere.noticed()

    def _on_step(self) -> None:
        """Instances may have come or gone, and have left events that are scheduled."""
        self.elsewhere.stepped()
        self.upkeep.look()

    def _interrupt_replays(self) -> None:
        for replay in self.replays:
            replay.interrupt()

    def _on_new_type(self, kind: EventType) -> None:
        """A class is published that may belong to subscriptions to a base class of it, from any thread."""
        for wanted in self._wanted:
            registration = wanted.registration
            if wanted.options.name not in self.dispatcher.declared:
                continue  # it was removed, here or elsewhere
            if kind.name in registration.types or not issubclass(kind.cls, wanted.options.classes):
                continue
            types, derived = (*registration.types, kind.name), (*registration.derived, kind.name)
            joined = msgspec.structs.replace(registration, types=types, derived=derived)
            self._replace(wanted, joined)
            self.journal.submit(Register((joined,), self.instance.id), self._on_joined)

    def _replace(self, wanted: Wanted, registration: Registration) -> None:
        changed = msgspec.structs.replace(wanted, registration=registration)
        self._wanted = [changed if each is wanted else each for each in self._wanted]
        serving = self.dispatcher.servings.get(wanted.options.name)
        if serving is not None:
            serving.registration = registration

    def _on_joined(self, result: tuple[Subscribed, ...] | Exception) -> None:
        if isinstance(result, Exception):
            _log.error("a type could not join its subscriptions: %s", result)
            return
        for stored in result:
            self.dispatcher.follow(stored)

    async def pause(self, name: str, reason: str) -> None:
        """Stop delivering to a subscription, in the store and here."""
        await self._to_the_end(partial(self._pause, name, reason))

    async def _pause(self, name: str, reason: str) -> None:
        await self.journal.command(Pause(name, reason))
        self.dispatcher.set_pause(name, reason)
        self._look_again()

    async def resume(self, name: str) -> None:
        """Deliver to a paused subscription again."""
        await self._to_the_end(partial(self._resume, name))

    async def _resume(self, name: str) -> None:
        await self.dispatcher.written()  # a pause, or an attempt, on its way to the store must not come after the resume
        await self.journal.command(Pause(name, None))
        self.dispatcher.set_pause(name, None)
        self._look_again()

    async def rewind(self, name: str, after: int) -> None:
        """Set a subscription's checkpoints back; its lanes begin again from there."""
        await self._to_the_end(partial(self._rewind, name, after))

    async def _rewind(self, name: str, after: int) -> None:
        serving = self.dispatcher.servings.get(name)
        if serving is None:
            await self.journal.command(Rewind(name, after))
            self._look_again()
            return
        with serving.changing():
            await self.dispatcher.written()  # what was settled before the position stays so
            states = await self.journal.command(Rewind(name, after))
            serving.rewound(after, states, await self.reader.ask(WaitingRows(name)))

    async def unsubscribe(self, name: str) -> None:
        """Remove a subscription, in the store and here."""
        await self._to_the_end(partial(self._unsubscribe, name))

    async def _unsubscribe(self, name: str) -> None:
        serving = self.dispatcher.servings.get(name)
        if serving is None:
            await self.journal.command(Unsubscribe(name))
        else:
            with serving.changing():
                await self.journal.command(Unsubscribe(name))
                self.dispatcher.remove(serving)
            self._interrupt_replays()
        self.dispatcher.declared.discard(name)
        self.dispatcher.note_others(await self.reader.ask(Subscriptions()))
        self._look_again()

    def _look_again(self) -> None:
        """A step that is under way may have looked before a subscription was changed from here, and nobody is told of what he
        has written himself: the next step sees it, and tells those who wait."""
        self.membership.poke()
