"""Virtual time: an asyncio loop and threads that are steps of one seeded scheduler. No threads, no real time.

The loop is asyncio's own; only its selector is replaced, by one that moves the time on instead of waiting. What the bus takes for
threads are greenlets: they run until they wait (at a gate, for a job, or in a store that is slow), and are then called again by
the loop, a little later than they could be, as the seed has it. So everything that happens is decided by the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import greenlet

from eventbus._clock import SystemClock
from eventbus._gates import Turn
from eventbus._loop import _Asyncio

LIMIT = 50_000.0
"""Virtual seconds after which a run hangs."""
STEPS = 60_000
"""Turns of the loop after which a run hangs."""


class Hangs(Exception):
    """Nothing is scheduled, or nothing comes to an end."""


class Clock(SystemClock):
    """The virtual time, as the bus is given it. Each look takes a moment."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def time(self) -> float:
        return round((1_700_000_000 + self._scheduler.now) * 1e6) / 1e6

    def monotonic(self) -> float:  # the system's is a function, for speed
        scheduler = self._scheduler
        scheduler.now += scheduler.random.random() * 0.0002
        return scheduler.now


class Scheduler:
    """The time, what comes next, and the end of it all: `crash` drops everything in the middle."""

    def __init__(self, seed: str, now: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.now = now
        self.clock = Clock(self)
        self.shuffles = self.random.random() < 0.5
        self.loop = Loop(self)
        self.workers: list[SimulatedWorker] = []
        self.complaints: list[str] = []
        self.dead = False
        self._main: asyncio.Task[Any] | None = None

    # -------------------------------------------------------------- the loop's side

    def run(self, main: Coroutine[Any, Any, None]) -> bool:
        """Run to the end; False if it was ended by a crash. Raises what `main` raises, or Hangs."""
        sys.unraisablehook = self._unraisable  # stays: what a crash leaves behind may be found by the collector later
        self._main = self.loop.create_task(main)
        self._main.add_done_callback(lambda _task: self.loop.stop())
        try:
            self.loop.run_forever()
            if self.dead:
                return False
            self._main.result()
            self.complaints += [f"a task is left: {task!r}" for task in asyncio.all_tasks(self.loop)]
        finally:
            self._take_down()
        return True

    def _unraisable(self, found: sys.UnraisableHookArgs) -> None:
        if not self.dead:
            self.complaints.append(f"{found.err_msg}: {found.exc_value!r}")

    def crash(self) -> None:
        """Nothing runs any more from here on: what calls this does not come back."""
        self.dead = True
        for handle in self.loop._ready:  # type: ignore[attr-defined]
            handle.cancel()
        self.loop.stop()
        if isinstance(greenlet.getcurrent(), SimulatedWorker):
            raise greenlet.GreenletExit

    def _take_down(self) -> None:
        """Forget what was under way, without a word of it. What it does at its end goes nowhere: the store is closed to it."""
        self.dead = True
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        asyncio._set_running_loop(self.loop)
        try:
            for task in sorted(asyncio.all_tasks(self.loop), key=hash):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):
                    task.get_coro().close()
            for worker in self.workers:
                for _ in range(20):
                    if not worker.dead:
                        worker.throw(greenlet.GreenletExit)
        finally:
            asyncio._set_running_loop(None)
            warnings.resetwarnings()
            self.loop.close()
            logging.disable(logging.NOTSET)

    # -------------------------------------------------------------- the threads' side

    def later(self, worker: SimulatedWorker, seconds: float) -> None:
        """Have a thread that waits go on after so long."""
        if not self.dead:
            self.loop.call_later(seconds, worker.go_on, worker.parked)

    def soon(self, worker: SimulatedWorker) -> None:
        """… as soon as a machine would have it."""
        self.later(worker, self.random.choice((0.0, 0.0, 0.00005, 0.001, 0.006)) * self.random.random())

    def sleep(self, seconds: float) -> None:
        """In a thread: let time pass."""
        worker = greenlet.getcurrent()
        assert isinstance(worker, SimulatedWorker)
        until = self.now + seconds
        while self.now < until and not worker.hurried:
            self.later(worker, until - self.now)
            worker.park()


class SimulatedWorker(greenlet.greenlet):
    """As `eventbus._gates.Worker`, a greenlet."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        super().__init__(self._work)
        self.name = name
        self.parked = 0
        self.hurried = False
        self._scheduler = scheduler
        self._jobs: deque[Callable[[], object] | None] = deque()
        scheduler.workers.append(self)
        scheduler.soon(self)

    def submit(self, job: Callable[[], object] | None) -> None:
        """Run a job after those before it."""
        self._jobs.append(job)
        self._scheduler.soon(self)

    def stop(self) -> None:
        """End after the jobs before."""
        self.submit(None)

    def join(self, timeout: float | None = None) -> bool:
        """Run it to its end: the loop waits meanwhile."""
        self.hurried = True
        for _ in range(1_000):
            if self.dead:
                return True
            self.switch()
        raise Hangs(f"the thread {self.name} does not end")

    def park(self) -> None:
        """In it: wait to be called; it may be called too early."""
        assert self.parent is not None
        self.parent.switch()
        self.parked += 1  # what was to call it is out of date
        if self._scheduler.dead:
            raise greenlet.GreenletExit

    def go_on(self, parked: int) -> None:
        """On the loop: go on, if it still waits where it did."""
        if not self.dead and not self._scheduler.dead and parked == self.parked:
            self.switch()

    def _work(self) -> None:
        while True:
            while not self._jobs:
                self.park()
            job = self._jobs.popleft()
            if job is None:
                return
            job()


class SimulatedGate:
    """As `eventbus._gates.Gate`, for these threads."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open = False
        self._waits: SimulatedWorker | None = None

    def open(self) -> None:
        """Let the one that waits, or comes next, pass."""
        if self._open:
            raise RuntimeError("the gate is open already")
        self._open = True
        if self._waits is not None:
            self._scheduler.soon(self._waits)

    def wait(self, seconds: float = math.inf) -> bool:
        """Pass when it is open; False if it was not for so long."""
        worker = greenlet.getcurrent()
        assert isinstance(worker, SimulatedWorker)
        until = self._scheduler.now + seconds
        while not self._open and self._scheduler.now < until:
            if seconds < math.inf:
                self._scheduler.later(worker, until - self._scheduler.now)
            self._waits = worker
            worker.park()
            self._waits = None
        passed, self._open = self._open, False
        return passed


class SimulatedTurn(Turn):
    """As `eventbus._gates.Turn`: the loop gives way as it likes."""

    def give_way(self) -> None:
        """It goes on: the thread comes when the scheduler calls it."""


class SimulatedLoop(_Asyncio):
    """What the bus takes for the loop that it runs on."""

    def __init__(self, scheduler: Scheduler, checkpoint: Any) -> None:
        super().__init__(scheduler.loop, checkpoint)
        self._scheduler = scheduler

    def worker(self, name: str) -> Any:
        return SimulatedWorker(self._scheduler, name)

    def gate(self) -> Any:
        return SimulatedGate(self._scheduler)

    def turn(self) -> Turn:
        return SimulatedTurn()


# ------------------------------------------------------------------ asyncio


class _Task(asyncio.Task[Any]):
    """A task whose hash, and so its place in a set, is not where it lies in memory."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class _Selector:
    """Does not wait: it moves the time on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._until = scheduler.now + LIMIT

    def select(self, seconds: float | None) -> list[object]:
        """Nothing ever comes from outside."""
        if seconds is None:
            raise Hangs("nothing is scheduled any more")
        if seconds > 0:
            self._scheduler.now += seconds
            if self._scheduler.now > self._until:
                raise Hangs(f"it goes on for {LIMIT:g} s")
        return []


class Loop(asyncio.BaseEventLoop):
    """asyncio's loop in virtual time."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._steps = 0
        self._selector = _Selector(scheduler)
        numbers = itertools.count(1)
        self.set_task_factory(lambda loop, coro, **options: _Task(next(numbers), coro, loop=loop, **options))
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        return self._scheduler.now

    def _complain(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._scheduler.dead:
            self._scheduler.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _process_events(self, events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _run_once(self) -> None:
        self._steps += 1
        if self._steps > STEPS:
            raise Hangs(f"it goes on for {STEPS} turns of the loop")
        if self._scheduler.shuffles:
            self._shuffle()
        super()._run_once()  # type: ignore[misc]

    def _shuffle(self) -> None:
        """Tasks that are ready at once may run in any order. Other callbacks may rely on theirs."""
        ready = self._ready  # type: ignore[attr-defined]
        places = [at for at, handle in enumerate(ready) if isinstance(getattr(handle._callback, "__self__", None), _Task)]
        if len(places) > 1:
            handles = [ready[at] for at in places]
            self._scheduler.random.shuffle(handles)
            for at, handle in zip(places, handles, strict=True):
                ready[at] = handle
