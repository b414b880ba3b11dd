"""Known failures of other libraries, each of them shown not to be ours. What each was about stands in its test's docstring."""

from __future__ import annotations

import sqlite3
from datetime import timedelta
from typing import Any, TypeVar

import anyio
import attrs
import pytest

from eventbus import Delivery, EventBus, InvalidEvent, InvalidSubscription, Reject, RetryAfter, RetryPolicy, UnknownEvent, event
from eventbus.errors import StoreBusy
from eventbus.hooks import LaneBlocked
from eventbus.stores import _sqlite_commands
from eventbus.stores.base import (
    Batch,
    Beat,
    Claim,
    Committed,
    Death,
    Events,
    Instance,
    Order,
    Query,
    Register,
    Registration,
    Unit,
    Waiting,
)
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, Hurrying, Recorder
from tests.faults.test_deadly_handlers import run_until_dead
from tests.faults.test_handler_zoo import Fed

T = TypeVar("T")

NOW = 1_700_000_000.0
INSTANCE = Instance("0123456789", "worker-1", "here", 1, NOW)
"""One that was killed."""


@event("job", key="n")
@attrs.frozen
class Job:
    n: int


@event("other")
@attrs.frozen
class Other:
    n: int


@event("job", version=2, key="n")
@attrs.frozen
class NewerJob:
    n: int
    colour: str = "red"


# ------------------------------------------------------------------ huey


async def test_huey_253_a_claim_deletes_nothing_before_it_is_run(db: str, anyio_backend_name: str) -> None:
    """huey #253: a task was deleted from the queue when it was taken, and lost with the worker that had taken it.

    An event is handed to a handler by a lane's memory alone: when the process is killed in the handler, it comes again.
    """
    run_until_dead(db, "kill", anyio_backend_name)
    again = Recorder()
    bus = EventBus(db)
    bus.subscribe(Fed, name="animal")(again.note)
    async with bus:
        assert await bus.drain(timeout=5) == {}
    assert again.seen[-1] == Fed(2)


@pytest.mark.parametrize("place", ["insert_events", "_give_positions"])
async def test_huey_915_due_events_are_moved_in_one_piece(db: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huey #915: due tasks were removed from the schedule first and queued one by one after; an error in between lost the rest.

    Here both are one transaction: an error before, between or after leaves all of them scheduled, and they come later, once.
    """
    owner: Any = _sqlite_commands if place == "insert_events" else _sqlite_commands.Commands
    function, left = getattr(owner, place), 2

    def fail(*arguments: Any) -> None:
        nonlocal left
        function(*arguments)
        if left:
            left -= 1
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
            raise error

    monkeypatch.setattr(owner, place, fail)
    recorder = Recorder()
    bus = EventBus(db, clock=Hurrying(50))
    bus.subscribe(Job, order="none")(recorder.note)
    async with bus:
        for first in range(0, 503, 100):
            await bus.publish_many([_later(n) for n in range(first, min(first + 100, 503))])
        seen = await recorder.wait_for(503)
        assert sorted(job.n for job in seen) == list(range(503))
        assert left == 0
        assert await bus.drain(timeout=5) == {}
        assert len([1 async for _ in bus.history()]) == 503
    assert len(recorder.seen) == 503


def _later(n: int) -> Any:
    from eventbus import Draft

    return Draft(Job(n), due=timedelta(seconds=5), idempotency_key=f"k{n}")


# ------------------------------------------------------------------ celery


@pytest.mark.parametrize("plain", [False, True])
async def test_celery_5935_a_long_handler_is_not_delivered_again_while_it_runs(db: str, plain: bool) -> None:
    """celery #5935: a task that ran for longer than the broker's visibility timeout was given to another worker as well.

    No time makes a delivery run twice while its handler runs: here it lasts for many leases.
    """
    clock, starts = Hurrying(1_000), Recorder()
    bus = EventBus(db, clock=clock, lease=1.0)

    def wait_for_leases() -> bool:
        return clock.monotonic() < until

    async def long(job: Job, delivery: Delivery) -> None:
        starts.add((job.n, delivery.attempt))
        while wait_for_leases():
            await anyio.lowlevel.checkpoint()

    def long_in_thread(job: Job, delivery: Delivery) -> None:
        starts.add((job.n, delivery.attempt))
        while wait_for_leases():
            pass

    bus.subscribe(Job, name="long", order="none", timeout=None)(long_in_thread if plain else long)
    async with bus:
        until = clock.monotonic() + 100.0
        await bus.publish_many([Job(0), Job(1)])
        assert await bus.drain() == {}
    assert sorted(starts.seen) == [(0, 1), (1, 1)]


# ------------------------------------------------------------------ river


def _claimed(store: SQLiteStore) -> int:
    """Register and claim a lane; its epoch."""
    claim = Claim(INSTANCE.id, (("s", "", 0),))
    register = Register((Registration("s", ("*",), "log", 1, "beginning"),))
    return int(store.commit(Batch(NOW, commands=[register, claim])).results[1][0].epoch)  # type: ignore[index]


async def _publish(db: str, *events: object) -> None:
    async with EventBus(db).open(dispatch=False) as bus:
        await bus.publish_many(events)


async def test_river_1302_what_is_settled_is_not_overwritten_by_who_looked_before(db: str) -> None:
    """river #1302: the rescuer wrote what it had decided from an older look, also over jobs that had been completed meanwhile.

    Whatever is written of a delivery holds only if its lane's epoch and its being unsettled hold in the same transaction.
    """
    await _publish(db, Job(1), Job(2))
    store = SQLiteStore(db)
    store.open(INSTANCE)
    try:
        old = _claimed(store)
        new = _claimed(store)
        row = Waiting(1, None, 1, NOW + 9, "retrying", NOW, "late")
        death = Death("ValueError", "late", "", 1, NOW, NOW)
        assert not store.commit(Batch(NOW, units=[Unit("s", "", new, "log", 1, 1)])).refused
        late = [
            Unit("s", "", old, "log", 1, 0, attempt=1, due_at=NOW + 9),
            Unit("s", "", old, "log", 1, 1, death=death),
            Unit("s", "", new, "log", 1, 0, attempt=1, due_at=NOW + 9),
            Unit("s", "", new, "log", 1, 1, rows=(row,)),
            Unit("s", "", new, "row", 1, 1, row=1, death=death),
        ]
        assert store.commit(Batch(NOW, units=late)).refused == dict(enumerate(["fenced"] * 2 + ["settled"] * 3))
    finally:
        store.close()
    with sqlite3.connect(db) as connection:
        assert connection.execute("SELECT checkpoint, attempt, due_at FROM lanes").fetchall() == [(1, 0, None)]
        assert connection.execute("SELECT count(*) FROM deliveries").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM dead_letters").fetchone() == (0,)
    connection.close()


MANY = 1_200
"""More than are brought to the lanes at once."""


@pytest.mark.parametrize("why", ["nobody decodes them", "they fail and wait"])
async def test_river_1318_redrives_do_not_starve_behind_those_that_cannot_be_made(db: str, why: str) -> None:
    """river #1318: a whole batch of stuck jobs that could not be rescued hid all those behind it, at each look again.

    However many dead letters cannot be redriven for now, those behind them are.
    """
    bus = EventBus(db)

    @bus.subscribe(NewerJob, Other, name="s")
    async def reject(event: NewerJob | Other) -> None:
        raise Reject("for now")

    async with bus:
        await bus.publish_many([NewerJob(n) for n in range(MANY)])
        assert await bus.drain(timeout=20) == {}
        await bus.publish_many([Other(n) for n in range(3)])
        assert await bus.drain(timeout=20) == {}

    handled = Recorder()
    again = EventBus(db)
    cls: Any = Job if why == "nobody decodes them" else NewerJob

    @again.subscribe(cls, Other, name="s")
    async def handle(event: Any) -> None:
        if not isinstance(event, Other):
            raise RetryAfter(3600)
        handled.add(event.n)

    async with again:
        assert await again.dead_letters.redrive(all=True) == MANY + 3
        assert sorted(await handled.wait_for(3)) == [0, 1, 2]


# ------------------------------------------------------------------ dbos


async def test_dbos_546_one_bad_event_does_not_strand_those_read_with_it(db: str) -> None:
    """dbos-py #546: one workflow that could not be started left all others of its batch claimed, and never run.

    Of a page, or of waiting rows, in which there is one that cannot be read, all others are handled.
    """
    first = EventBus(db)

    @first.subscribe(Job, name="waiting", order="key", retry=RetryPolicy(first=0.0))
    async def fail(job: Job) -> None:
        raise RetryAfter(0.0) if job.n % 2 else ValueError

    first.subscribe(Job, name="log", order="log", start="beginning")(Recorder().note)
    first.subscribe(Job, name="none", order="none", start="beginning")(Recorder().note)
    async with first.open(dispatch=["waiting"], stop_timeout=0.0):
        await first.publish_many([Job(n) for n in range(300)])
    connection = sqlite3.connect(db)
    with connection:
        connection.execute("UPDATE events SET data = '{\"n\": 7}' WHERE position = 150")
    connection.close()

    seen = {name: Recorder() for name in ("waiting", "log", "none")}
    again = EventBus(db)
    orders: dict[str, Order] = {"waiting": "key", "log": "log", "none": "none"}
    for name, order in orders.items():
        again.subscribe(Job, name=name, order=order, retry=NO_RETRY)(seen[name].note)
    async with again:
        assert await again.drain(timeout=10) == {}
        letters = await again.dead_letters.list()
    for name, recorder in seen.items():
        assert sorted(job.n for job in recorder.seen) == [n for n in range(300) if n != 149], name
    assert sorted((letter.subscription, letter.envelope.position) for letter in letters) == [(n, 150) for n in sorted(seen)]


class LockedStore(SQLiteStore):
    """A store whose outcomes and pages are refused as busy a number of times."""

    def __init__(self, path: str, times: int) -> None:
        super().__init__(path)
        self.commits = self.reads = times

    def commit(self, batch: Batch) -> Committed:
        """Commit, or refuse outcomes."""
        if batch.units and self.commits:
            self.commits -= 1
            raise StoreBusy("database is locked")
        return super().commit(batch)

    def read(self, query: Query[T]) -> T:
        """Read, or refuse pages of the log."""
        if isinstance(query, Events) and self.reads:
            self.reads -= 1
            raise StoreBusy("database is locked")
        return super().read(query)


async def test_dbos_761_a_locked_database_is_no_failure_of_the_handler(db: str) -> None:
    """dbos-py #761: "database is locked", met while the bookkeeping was read, was stored as the workflow's own, final error.

    A store that is busy fails no attempt, neither when pages are read nor when outcomes are written: it is tried again.
    """
    first = EventBus(db)
    first.subscribe(Job, name="s")(Recorder().note)
    async with first.open(dispatch=False):
        await first.publish_many([Job(n) for n in range(20)])
    store = LockedStore(db, 3)
    attempts = Recorder()
    bus = EventBus(store, clock=Hurrying(50))

    @bus.subscribe(Job, name="s", retry=NO_RETRY)
    async def handle(job: Job, delivery: Delivery) -> None:
        attempts.add((job.n, delivery.attempt))

    async with bus:
        assert await bus.drain(timeout=200) == {}
        stats = (await bus.stats()).subscriptions["s"]
        assert (stats.failed, stats.dead, stats.retrying) == (0, 0, 0)
    assert attempts.seen == [(n, 1) for n in range(20)]
    assert (store.commits, store.reads) == (0, 0)


async def test_dbos_759_empty_ids(db: str) -> None:
    """dbos-py #759: a workflow with an empty id was taken, and then could be neither found nor recovered: each recovery ran another.

    What is empty is refused, or finds nothing, wherever an identity or a key is asked for.
    """
    bus, seen = EventBus(db), Recorder()
    with pytest.raises(InvalidSubscription):
        bus.subscribe(Job, name="")(seen.note)
    bus.subscribe(Job, name="s", order="key", retry=RetryPolicy(attempts=2, first=0.001))(seen.note)
    async with bus:
        with pytest.raises(InvalidEvent):
            await bus.publish(Job(1), idempotency_key="")
        with pytest.raises(UnknownEvent):
            await bus.status("")
        assert await bus.cancel("") is False
        receipts = await bus.publish_many([Job(n) for n in range(3)])
        with pytest.raises(InvalidEvent):
            await bus.publish(Job(3), key="")
        assert all(receipt.id for receipt in receipts)
        assert await bus.drain(timeout=5) == {}
    assert sorted(job.n for job in seen.seen) == [0, 1, 2]


# ------------------------------------------------------------------ oban


async def test_oban_862_a_restart_under_the_same_name_hides_no_work(db: str) -> None:
    """oban #862: jobs that were running when a node was killed were taken to be running still, as long as a node of that name was.

    An instance that is started under the name, even under the id, of one that was killed goes on with what that had claimed.
    """
    await _publish(db, Job(1), Job(1), Job(1))
    store = SQLiteStore(db)
    store.open(INSTANCE)
    register = Register((Registration("s", ("job",), "type", 1, "beginning"),))
    claim = Claim(INSTANCE.id, (("s", "job", 0),))
    store.commit(Batch(NOW, commands=[Beat(INSTANCE), register, claim]))
    store.close()  # as the kernel does it: nobody signs off

    seen = Recorder()
    bus = EventBus(db, name=INSTANCE.name)
    bus.subscribe(Job, name="s")(seen.note)
    async with bus:
        assert await bus.drain(timeout=5) == {}
        connection = sqlite3.connect(f"file:{db}?mode=ro", uri=True)
        assert connection.execute("SELECT name FROM instances WHERE id <> ?", (INSTANCE.id,)).fetchall() == [(INSTANCE.name,)]
        assert connection.execute("SELECT count(*) FROM instances").fetchone() == (1,)
        connection.close()
    assert seen.seen == [Job(1)] * 3
    store.open(INSTANCE)
    stale = store.commit(Batch(NOW, units=[Unit("s", "job", 1, "log", 1, 0, attempt=1, due_at=NOW)]))
    store.close()
    assert stale.refused == {0: "fenced"}


# ------------------------------------------------------------------ everybody


async def test_an_event_that_nobody_can_decode_does_not_loop_for_ever(db: str) -> None:
    """Seen in many queues: what no consumer can decode is taken, fails, is put back, and is taken again, for ever.

    It stops its lane, once, is reported, and costs nothing more; other lanes flow. Damaged bytes are a dead letter, untried.
    """
    newer = EventBus(db)
    newer.subscribe(NewerJob, name="s")(Recorder().note)
    async with newer.open(dispatch=False):
        await newer.publish(NewerJob(1))

    blocked, seen = Recorder(), Recorder()
    bus = EventBus(db, hooks=[lambda moment: blocked.add(moment) if isinstance(moment, LaneBlocked) else None])
    bus.subscribe(Job, Other, name="s", retry=RetryPolicy(attempts=None, first=0.0))(seen.note)
    async with bus:
        await blocked.wait_for(1)
        for n in range(50):
            await bus.publish(Other(n))
        await seen.wait_for(50)
        assert await bus.drain(timeout=5) == {"s": 1}
        stats = (await bus.stats()).subscriptions["s"]
        assert (stats.failed, stats.dead, stats.lag) == (0, 0, 1)
    assert len(blocked.seen) == 1
    assert seen.seen == [Other(n) for n in range(50)]
