"""The pool of workers: long-lived tasks that take a ready lane, run its attempts for a quantum, and put it back.

publish → journal → store → lanes → *workers* → outcome. In comes a lane that has something to do; its attempts are run in
order and their outcomes given back to it. No task, lock, timeout or event object is made for an event that does not ask for
one: a handler that never waits is run in place; only when it waits is its timeout watched, by a look at all workers.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from eventbus._attempts import Suspended, Torn, failed, run_async, timed_out
from eventbus._environment import Environment
from eventbus._lanes import Lane
from eventbus._loop import context_for_threads
from eventbus._outcomes import ACKED, RELEASED, Attempt, Failed, Outcome
from eventbus._threads import Crossing, Threads
from eventbus.hooks import HandlerStuck

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventbus._gates import Worker
    from eventbus._loop import Tasks, Waiter

_log = logging.getLogger("eventbus")

QUANTUM = 0.002
"""Seconds for which a worker stays with a lane, and runs handlers without letting the loop have its turn."""
CROSSING = 64
"""Attempts that cross into a thread together, at most."""
PATIENCE = 1.0
"""Seconds after which a handler that does not end when it is cancelled is named in the log."""


class Pool:
    """Runs the attempts of all lanes, at most `limit` at once."""

    def __init__(self, environment: Environment, limit: int, name: str, context: Context) -> None:
        self.environment = environment
        self.context = context
        self.context_of_threads = context_for_threads(context)
        self.threads = Threads(name, environment.loop.worker)
        self.stopping = False
        self.on_exit: Callable[[BaseException], object] = lambda _error: None
        self._our_tasks: Tasks
        self._limit = limit
        self._share = max(1, limit // 2)
        self._ready: deque[Lane] = deque()
        self._idle: list[_Task] = []
        self._seeking = 0  # workers that will look for a lane before they rest; one is enough, for most handlers never wait
        self._tasks: dict[_Task, None] = {}  # a set in the order in which they came: nothing may hang on addresses
        self._hired: list[_Task] = []  # to be started
        self._hiring: Waiter | None = None
        self._watched_until = math.inf
        self._gone: Waiter | None = None

    def start(self, tasks: Tasks) -> None:
        """Workers may be started from now on."""
        self._our_tasks = tasks
        tasks.start(self._hire)

    async def _hire(self) -> None:
        """Start workers. Lanes are woken by callbacks of the loop, which belong to no task and so may start none."""
        scope = anyio.CancelScope(shield=True)
        await self.environment.loop.within(scope, partial(self.environment.loop.insist, self._hire_until_stopping, scope))

    async def _hire_until_stopping(self) -> None:
        while True:
            self._hiring = self.environment.loop.waiter()
            hired, self._hired = self._hired, []
            for task in hired:
                self._our_tasks.start(task.run)
            if self.stopping:
                return
            await self._hiring.wait()

    def schedule(self, lane: Lane) -> None:
        """A lane may have something to do."""
        if self.stopping:
            return
        lane.scheduled = True
        self._ready.append(lane)
        if not self._seeking:
            self._call_worker()

    def _call_worker(self) -> None:
        """Have one more worker look for lanes."""
        if self._idle:
            self._seeking += 1
            self._idle.pop().wake()
        elif len(self._tasks) < self._limit:
            self._seeking += 1
            task = _Task(self)
            self._tasks[task] = None
            self._hired.append(task)
            if self._hiring is not None:
                self._hiring.set()

    def step_aside(self) -> None:
        """A worker waits for its handler: another one takes over."""
        self._seeking -= 1
        if self._ready and not self._seeking and not self.stopping:
            self._call_worker()

    def step_back(self) -> None:
        """It goes on."""
        self._seeking += 1

    def next_lane(self) -> Lane | None:
        """The lane that is ready longest and whose subscription does not hold its share of the workers already."""
        while self._ready and not self.stopping:
            lane = self._ready.popleft()
            if lane.holder.workers >= self._share:
                lane.holder.delayed.append(lane)
                continue
            lane.scheduled = False
            lane.holder.workers += 1
            return lane
        return None

    def leave(self, lane: Lane) -> None:
        """A worker is done with a lane."""
        holder = lane.holder
        holder.workers -= 1
        if holder.delayed:
            self.schedule(holder.delayed.pop(0))

    def rest(self, task: _Task) -> None:
        """A worker has nothing to do."""
        self._seeking -= 1
        self._idle.append(task)

    def watch(self, deadline: float) -> None:
        """Look at the workers when this deadline has come."""
        if deadline < self._watched_until:
            self._watched_until = deadline
            self.environment.timers.at(deadline, partial(self._look, deadline))

    def _look(self, deadline: float) -> None:
        if deadline != self._watched_until:
            return  # an earlier one has taken its place, and looked for it
        now = self.environment.clock.monotonic()
        self._watched_until = math.inf
        for task in self._tasks:
            task.look(now)

    # -------------------------------------------------------------- the end

    async def stop(self, timeout: float) -> None:
        """Let running attempts finish for `timeout` seconds, then cancel them and release what is left."""
        self.stopping = True
        self._gone = self.environment.loop.waiter()
        if self._hiring is not None:
            self._hiring.set()
        for task in list(self._tasks):
            task.let_finish()
        if not self._tasks:
            self._gone.set()
        await self._wait_until_gone(timeout)
        for task in list(self._tasks):
            task.cancel()
        await self._wait_until_gone(PATIENCE)
        for task in self._tasks:
            _log.warning("the handler of %s does not end although it is cancelled; waiting for it", task.description)
        await self._wait_until_gone(math.inf)
        self.threads.stop()

    async def _wait_until_gone(self, seconds: float) -> None:
        assert self._gone is not None
        scope = anyio.move_on_after(seconds)
        await self.environment.loop.within(scope, partial(self.environment.loop.insist, self._gone.wait, scope))

    def gone(self, task: _Task) -> None:
        """A worker has ended."""
        if task in self._idle:
            self._idle.remove(task)
        else:
            self._seeking -= 1
        self._tasks.pop(task, None)
        if not self._tasks and self._gone is not None:
            self._gone.set()


class _Task:
    """One worker."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._environment = pool.environment
        self._wake: Waiter | None = None
        self._lane: Lane | None = None
        self._attempt: Attempt | None = None
        self._crossing: Crossing | None = None
        self._thread: Worker | None = None
        self._scope: anyio.CancelScope | None = None
        self._deadline = math.inf
        self._timed_out = False

    @property
    def description(self) -> str:
        """What it is busy with."""
        return "nothing" if self._lane is None else repr(self._lane.holder.options.name)

    # -------------------------------------------------------------- the task

    async def run(self) -> None:
        """Serve lanes until the pool stops."""
        try:
            while not self._pool.stopping:
                # The bus stops its workers itself; a cancellation from outside must not end them before. To make a scope costs
                # more than to run most handlers, so there is a new one only when a handler was cancelled.
                self._scope = scope = anyio.CancelScope(shield=True)
                await self._environment.loop.within(scope, partial(self._serve, scope))
                if self._lane is not None:
                    self._leave(self._lane)
        except Torn:
            _log.debug("the event loop was closed under a running handler")
        finally:
            self._scope = None
            if self._lane is not None:
                self._pool.leave(self._lane)
            self._pool.gone(self)

    async def _serve(self, scope: anyio.CancelScope) -> None:
        """Serve lanes until the pool stops, or the scope is cancelled."""
        pool, loop, monotonic = self._pool, self._environment.loop, self._environment.clock.monotonic
        self_cancelled = loop.self_cancelled()
        since = monotonic()
        while not pool.stopping and not scope.cancel_called:
            lane = pool.next_lane()
            if lane is None:
                self._wake = loop.waiter()
                pool.rest(self)
                await loop.insist(self._wake.wait, scope)
                since = monotonic()
                continue
            self._lane = lane
            await self._run_quantum(lane, scope, self_cancelled)
            self._leave(lane)
            if self_cancelled():
                await loop.forget_cancellation(scope)
            if monotonic() - since >= QUANTUM:
                await loop.insist(checkpoint, scope)
                since = monotonic()

    def _leave(self, lane: Lane) -> None:
        """Be done with a lane for now."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None and not attempt.over:
            # The handler was cancelled, by us: nobody else can cancel within the shield.
            lane.settle(attempt, Failed(timed_out(attempt)) if self._timed_out else RELEASED)
            lane.wake()
        if lane.running:
            lane.flush_soon()
        else:
            lane.flush()
        lane.tell_waiters()  # an attempt that leaves nothing to write may have been the last
        self._timed_out = False
        self._lane = None
        self._pool.leave(lane)

    def wake(self) -> None:
        """There is a lane to serve, or the pool stops."""
        if self._wake is not None:
            self._wake.set()

    async def _run_quantum(self, lane: Lane, scope: anyio.CancelScope, self_cancelled: Callable[[], int]) -> None:
        lane.log.intake.touch()
        self._environment.journal.turn.give_way()
        self._environment.reader.turn.give_way()
        monotonic, context = self._environment.clock.monotonic, self._pool.context
        is_async = lane.holder.options.is_async
        end = monotonic() + QUANTUM
        attempt = None if self._pool.stopping else lane.take()
        while attempt is not None:
            self._attempt = attempt
            if is_async:
                outcome = run_async(attempt, context)
                if outcome is ACKED and monotonic() < end and not self_cancelled():
                    attempt = lane.go_on(attempt)
                    continue
                if isinstance(outcome, Suspended):
                    outcome = await self._finish(lane, attempt, outcome)
                lane.settle(attempt, outcome)
                if isinstance(outcome, Failed) and isinstance(outcome.error, (SystemExit, KeyboardInterrupt)):
                    self._pool.on_exit(outcome.error)
            else:
                await self._cross(lane, attempt, scope)
            self._attempt = None
            if monotonic() >= end or self_cancelled() or scope.cancel_called:
                lane.wake()
                return
            attempt = None if self._pool.stopping else lane.take()

    async def _finish(self, lane: Lane, attempt: Attempt, suspended: Suspended) -> Outcome:
        """The handler waits for something: what was settled before goes out soon, others may serve the lane, the watch is set."""
        lane.flush_soon()
        lane.wake()
        timeout = lane.holder.options.timeout
        if timeout is not None:
            self._deadline = self._environment.clock.monotonic() + timeout
            self._pool.watch(self._deadline)
        self._pool.step_aside()
        try:
            outcome = await suspended.finish()
            # A handler that swallows its cancellation has failed all the same.
            return Failed(timed_out(attempt)) if self._timed_out else outcome
        except Torn:
            raise
        except BaseException as error:  # noqa: BLE001  # an outcome, unless it is our own cancellation on its way out
            return self._outcome(attempt, error)
        finally:
            self._pool.step_back()
            self._deadline = math.inf

    def _outcome(self, attempt: Attempt, error: BaseException) -> Outcome:
        cancelled = self._scope is not None and self._scope.cancel_called
        if cancelled and isinstance(error, anyio.get_cancelled_exc_class()):
            raise error
        if self._timed_out:
            late = timed_out(attempt)
            late.__cause__ = error
            return Failed(late)
        return RELEASED if cancelled and not isinstance(error, (SystemExit, KeyboardInterrupt)) else failed(attempt, error)

    async def _cross(self, lane: Lane, attempt: Attempt, scope: anyio.CancelScope) -> None:
        """Run a plain handler's attempts in a thread."""
        attempts = [attempt]
        if attempt.source is lane.log and attempt.number == 1:
            waiting = len(lane.log.intake)
            attempts += lane.take_more(min(CROSSING, math.ceil(waiting / lane.concurrency)) - 1 if waiting else 0)
        crossing = Crossing(lane, attempts, self._environment.clock, self._environment.loop, self._pool.context_of_threads)
        crossing.on_exit = self._pool.on_exit
        if lane.concurrency > 1:
            lane.wake()
        self._crossing, self._thread = crossing, self._pool.threads.get()
        if lane.holder.options.timeout is not None:
            self._pool.watch(self._environment.clock.monotonic() + lane.holder.options.timeout)
        lane.crossings.append(crossing)
        self._thread.submit(crossing.run)
        self._pool.step_aside()
        try:
            await self._environment.loop.insist(crossing.finished.wait, scope)
            self._pool.threads.put(self._thread)
        except BaseException:
            self._leave_behind(lane, crossing, self._thread)
            raise
        finally:
            self._pool.step_back()
            lane.crossings.remove(crossing)
            self._crossing = self._thread = None
            if self._timed_out:
                self._timed_out = False
                lane.holder.stuck -= 1

    def _leave_behind(self, lane: Lane, crossing: Crossing, thread: Worker) -> None:
        """The bus stops, and the thread cannot be made to: name it, and end it when it returns."""
        crossing.abandon()
        _log.warning(
            "the handler of %r did not end within the stop timeout; its thread %r goes on without the bus%s",
            lane.holder.options.name,
            thread.name,
            "" if self._timed_out else ", and what it was handling will be delivered again",
        )
        thread.stop()

    # -------------------------------------------------------------- from the loop, beside the task

    def look(self, now: float) -> None:
        """Has the attempt run for too long?"""
        if self._timed_out or self._lane is None:
            return
        if self._crossing is not None:
            self._look_into_thread(self._lane, self._crossing, now)
        elif now < self._deadline:
            self._pool.watch(self._deadline)
        else:
            self._timed_out = True
            self._deadline = math.inf
            if self._scope is not None:
                self._scope.cancel()

    def _look_into_thread(self, lane: Lane, crossing: Crossing, now: float) -> None:
        """The thread may have gone on to another attempt, or not have come to the first one yet."""
        timeout, started = lane.holder.options.timeout, crossing.started
        if timeout is None:
            return
        if not crossing.expire(now - timeout):
            self._pool.watch((now if started is None else started) + timeout)
            return
        self._timed_out = True
        lane.holder.stuck += 1
        self._environment.notify(HandlerStuck(lane.holder.options.name))
        _log.warning("the handler of %s outlives its timeout; its lane waits until its thread returns", self.description)

    def let_finish(self) -> None:
        """Finish what runs, and start nothing more."""
        self.wake()
        if self._crossing is not None:
            self._crossing.give_back_rest()

    def cancel(self) -> None:
        """Stop waiting for what runs."""
        if self._scope is not None:
            self._scope.cancel()
