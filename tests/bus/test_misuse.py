"""Wrong uses: each is an error of our tree that says what is wrong."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from eventbus import (
    BusNotOpen,
    ConfigurationError,
    EventBus,
    EventBusError,
    InvalidSubscription,
    NotSupported,
    Receipt,
    RetryPolicy,
    UnknownSubscription,
    WrongLoop,
)
from tests.bus.support import Recorder, threads_of_the_bus


@attrs.frozen
class Placed:
    order: str = ""


def exists(path: str | Path) -> bool:
    return Path(path).exists()


async def _history(bus: EventBus) -> object:
    return [envelope async for envelope in bus.history()]


CALLS: dict[str, Callable[[EventBus], Awaitable[object]]] = {
    "publish": lambda bus: bus.publish(Placed()),
    "publish_many": lambda bus: bus.publish_many([Placed()]),
    "publish_many of nothing": lambda bus: bus.publish_many([]),
    "cancel": lambda bus: bus.cancel("id"),
    "drain": lambda bus: bus.drain(),
    "replay": lambda bus: bus.replay(),
    "rewind": lambda bus: bus.rewind("take"),
    "history": _history,
    "stats": lambda bus: bus.stats(),
    "status": lambda bus: bus.status("id"),
    "subscriptions": lambda bus: bus.subscriptions(),
    "pause": lambda bus: bus.pause("take"),
    "resume": lambda bus: bus.resume("take"),
    "unsubscribe": lambda bus: bus.unsubscribe("take"),
    "dead_letters.list": lambda bus: bus.dead_letters.list(),
    "dead_letters.redrive": lambda bus: bus.dead_letters.redrive(all=True),
    "dead_letters.discard": lambda bus: bus.dead_letters.discard(all=True),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@each_call
async def test_not_open(db: str, call: Callable[[EventBus], Awaitable[object]]) -> None:
    """Before the bus is opened and after it is closed every call says that it is not open, and no file is made."""
    bus = EventBus(db)
    bus.subscribe(Placed, name="take")(Recorder().note)
    with pytest.raises(BusNotOpen, match="async with"):
        await call(bus)
    assert not exists(db)
    async with bus:
        pass
    with pytest.raises(BusNotOpen, match="async with"):
        await call(bus)


@each_call
async def test_other_thread(call: Callable[[EventBus], Awaitable[object]]) -> None:
    """A call from another thread and its event loop is refused; nothing hangs, nothing is stored."""
    bus, errors = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="take")(Recorder().note)

    def run() -> None:
        async def use() -> None:
            with anyio.fail_after(20):
                await call(bus)

        try:
            asyncio.run(use())
        except BaseException as error:
            errors.add(error)
        else:
            errors.add(None)

    async with bus:
        threading.Thread(target=run, daemon=True).start()
        (error,) = await errors.wait_for(1)
        assert isinstance(error, WrongLoop), repr(error)
        assert await _history(bus) == []


async def test_receipt_elsewhere() -> None:
    """A receipt can be waited for only where its bus is open."""
    bus, errors = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="take")(Recorder().note)
    receipts: list[Receipt] = []

    def run() -> None:
        try:
            asyncio.run(receipts[0].handled(timeout=20))
        except BaseException as error:
            errors.add(error)
        else:
            errors.add(None)

    async with bus:
        receipts.append(await bus.publish(Placed()))
        threading.Thread(target=run, daemon=True).start()
        (error,) = await errors.wait_for(1)
        assert isinstance(error, WrongLoop), repr(error)
    with anyio.fail_after(20), pytest.raises(EventBusError):
        await receipts[0].handled(timeout=20)


async def test_handled_of_a_closed_bus(db: str) -> None:
    """`handled` on a receipt of a bus that has been closed raises BusNotOpen, it does not wait."""
    bus = EventBus(db)
    bus.subscribe(Placed, name="take")(Recorder().note)
    async with bus.open(dispatch=False):
        receipt = await bus.publish(Placed())
    with anyio.fail_after(20), pytest.raises(BusNotOpen):
        await receipt.handled()
    async with bus:
        with anyio.fail_after(20), pytest.raises(BusNotOpen):
            await receipt.handled()


# ------------------------------------------------------------------ opening


async def test_open_twice() -> None:
    """One bus can be open once; the first opening is not harmed by the second."""
    bus = EventBus(":memory:")
    async with bus:
        for again in (bus, bus.open()):
            with pytest.raises(ConfigurationError, match="open"):
                async with again:
                    pass
        await bus.publish(Placed())
    with pytest.raises(BusNotOpen):
        await bus.publish(Placed())


async def test_open_again(db: str) -> None:
    """A bus that was closed can be opened again, also on another store."""
    bus = EventBus(db)
    async with bus:
        await bus.publish(Placed("a"))
    async with bus.open(":memory:"):
        assert await _history(bus) == []
    async with bus:
        assert len(await _history(bus)) == 1  # type: ignore[arg-type]


async def test_subscribe_while_open() -> None:
    """Subscribing while the bus is open is refused; afterwards it works."""
    bus = EventBus(":memory:")
    async with bus:
        with pytest.raises(InvalidSubscription, match="before it is opened"):
            bus.subscribe(Placed, name="late")(Recorder().note)
    bus.subscribe(Placed, name="late")(Recorder().note)


async def test_nothing_before_open(db: str) -> None:
    """A bus that is made and declared, but not opened, makes no file and no thread."""
    bus = EventBus(db)
    bus.subscribe(Placed, name="take")(Recorder().note)
    assert not threads_of_the_bus()
    assert not exists(db)


async def test_nothing_after_a_failed_open(tmp_path: Path) -> None:
    """An opening that fails leaves no thread and no open bus behind, and can be tried again."""
    bus = EventBus(tmp_path / "no such folder" / "bus.db")
    with pytest.raises(EventBusError):
        async with bus:
            pass
    assert not threads_of_the_bus()
    with pytest.raises(BusNotOpen):
        await bus.publish(Placed())
    (tmp_path / "no such folder").mkdir()
    async with bus:
        await bus.publish(Placed())
    assert not threads_of_the_bus()


@pytest.mark.parametrize("kind", ["folder", "text"])
async def test_no_database(tmp_path: Path, kind: str) -> None:
    """A path that is no database is refused with an error of ours that names it."""
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text("no database " * 1000)
    with pytest.raises(EventBusError, match="thing"):
        async with EventBus(path):
            pass


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": True},
        {"workers": 1.5},
        {"max_pending": 0},
        {"max_pending": None},
        {"max_event_bytes": -1},
        {"durability": "none"},
        {"durability": None},
        {"retention": timedelta(0)},
        {"retention": 5},
        {"dedup_for": None},
        {"dedup_for": timedelta(days=-1)},
        {"lease": 0},
        {"lease": "10"},
        {"lease": float("nan")},
        {"name": 5},
        {"name": ""},
        {"hooks": [None]},
        {"hooks": 5},
        {"codec": 5},
        {"clock": 5},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    """An option of EventBus that cannot be is refused at once, by its name."""
    (name,) = options
    with pytest.raises(ConfigurationError, match=name):
        EventBus(":memory:", **options)


@pytest.mark.parametrize("store", [5, b"bus.db", {}, "", ["bus.db"]], ids=str)
async def test_bad_stores(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no store is refused with an error of ours."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="store"):
        async with EventBus(store):
            pass
    assert not exists(tmp_path / "bus.db")


async def test_no_store() -> None:
    """A bus without a store says so when it is opened, and takes one then."""
    bus = EventBus(None)
    with pytest.raises(ConfigurationError, match="no store"):
        async with bus:
            pass
    async with bus.open(":memory:"):
        await bus.publish(Placed())


async def test_other_stores() -> None:
    """The address of a store that is not there yet is refused by its kind."""
    with pytest.raises(NotSupported, match="postgresql"):
        async with EventBus("postgresql://localhost/shop"):
            pass


@pytest.mark.parametrize("timeout", [-1, "5", None, float("nan")], ids=str)
def test_bad_stop_timeout(timeout: Any) -> None:
    """A stop timeout that cannot be is refused at once."""
    with pytest.raises(ConfigurationError, match="stop_timeout"):
        EventBus(":memory:").open(stop_timeout=timeout)


def test_bad_dispatch() -> None:
    """Names to dispatch that are not known are refused, with those that are; a bare name is not taken letter by letter."""
    bus = EventBus(":memory:")
    bus.subscribe(Placed, name="mailer")(Recorder().note)
    with pytest.raises(UnknownSubscription, match=r"'mailr'.*'mailer'"):
        bus.open(dispatch=["mailr"])
    with pytest.raises(ConfigurationError, match="list"):
        bus.open(dispatch="mailer")
    with pytest.raises(ConfigurationError, match="dispatch"):
        bus.open(dispatch=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"order": "fifo"},
        {"concurrency": 0},
        {"concurrency": 5, "order": "type"},
        {"concurrency": 5, "order": "log"},
        {"concurrency": 100_000, "order": "key"},
        {"retry": 5},
        {"retry": None},
        {"on_exhausted": "drop"},
        {"on_exhausted": "park", "order": "type"},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": "5"},
        {"start": "then"},
        {"start": -1},
        {"start": 1.5},
        {"replay": "no"},
    ],
    ids=str,
)
def test_bad_subscriptions(options: dict[str, Any]) -> None:
    """An option of subscribe that cannot be is refused at once, with the subscription and the option named."""
    name = next(iter(options))
    with pytest.raises(InvalidSubscription, match=f"'take'.*{name}"):
        EventBus(":memory:").subscribe(Placed, name="take", **options)(Recorder().note)


@pytest.mark.parametrize(
    "options",
    [{"attempts": 0}, {"first": -1.0}, {"factor": 0.5}, {"cap": -1}, {"jitter": 2}, {"give_up_on": (5,)}, {"attempts": 1.5}],
    ids=str,
)
def test_bad_retry_policies(options: dict[str, Any]) -> None:
    """A retry policy that cannot be is refused at once, by the option's name."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RetryPolicy(**options)


def test_names_of_subscriptions() -> None:
    """Handlers without a name of their own, and names that clash, are refused and ask for `name=`."""
    bus = EventBus(":memory:")
    with pytest.raises(InvalidSubscription, match="name="):
        bus.subscribe(Placed)(lambda placed: None)

    @bus.subscribe(Placed)
    async def take(placed: Placed) -> None: ...

    first = take

    def again() -> None:
        @bus.subscribe(Placed)
        async def take(placed: Placed) -> None: ...

    with pytest.raises(InvalidSubscription, match=r"take.*name="):
        again()
    assert bus.subscribe(Placed, name="other")(first) is first
    for name in ("", "n" * 256, 5, "a\nb"):
        with pytest.raises(InvalidSubscription, match="name"):
            bus.subscribe(Placed, name=name)(first)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["pause", "resume", "rewind", "unsubscribe"])
async def test_unknown_names(method: str) -> None:
    """Asking for a subscription that there is not says so."""
    async with EventBus(":memory:") as bus:
        for name in ("nobody", print):
            with pytest.raises(UnknownSubscription):
                await getattr(bus, method)(name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child(db: str) -> None:
    """In a forked child the bus raises at once and says what to do; the parent goes on."""
    async with EventBus(db) as bus:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, that threads do not live on in the child
            child = os.fork()
        if child == 0:
            try:
                await bus.publish(Placed("1"))
            except WrongLoop as error:
                os._exit(7 if "forked" in str(error) else 1)
            finally:
                os._exit(2)
        status = os.waitpid(child, 0)[1]  # noqa: ASYNC222  # it ends at once
        assert os.waitstatus_to_exitcode(status) == 7
        assert (await bus.publish(Placed("2"))).position == 1
