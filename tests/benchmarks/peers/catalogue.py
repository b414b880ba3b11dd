"""The peers: what is installed for each, in which settings it is measured, and what it promises.

What a peer's connection is set to (journal mode, synchronous) is not written here: the workers ask it. Nor is it written here how
it is used: that stands at the top of each worker, with the reasons.
"""

from __future__ import annotations

from pathlib import Path

import attrs

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).resolve().parents[3]

ONE, MANY, THREE, LATENCY = "one", "many", "three", "latency"

_QUEUE = (ONE, MANY, LATENCY)
_BUS = (ONE, MANY, THREE, LATENCY)

_AGAIN = "delivered again"
_DELETED = "lost: deleted before the handler is called"
_PULLED = "delivered again, with the next event"
_IN_MEMORY = "lost"
_LEASE = "delivered again, after its lease"
_LOCKED = "stays locked until the program calls retry"


@attrs.frozen
class Setting:
    """One line of the table.

    Attributes:
        name: what the worker calls it.
        title: what the table calls it; "defaults" where nothing is set that bears on speed or durability.
        delivery: what becomes of an event when the process dies while it is handled.
    """

    name: str
    title: str
    delivery: str = _AGAIN


@attrs.frozen
class Peer:
    """A library, in an environment of its own.

    Attributes:
        name: of the library; `--only` takes it.
        worker: the script.
        requirements: what pip is given; a path is a folder to install from. Empty for the standard library alone.
        package: whose version is printed.
        measures: "three" only where an event can have several subscribers.
        stores: whether an event is in a file when publish has returned.
    """

    name: str
    worker: str
    settings: tuple[Setting, ...]
    requirements: tuple[str, ...] = ()
    package: str = ""
    measures: tuple[str, ...] = _QUEUE
    stores: bool = True

    @property
    def script(self) -> Path:
        """The worker's file."""
        return WORKERS / self.worker


FLOOR = Peer(
    name="sqlite3",
    worker="work_sqlite3.py",
    settings=(Setting("FULL", "bare inserts, FULL", delivery="–"), Setting("NORMAL", "bare inserts, NORMAL", delivery="–")),
)

PEERS = (
    FLOOR,
    Peer(
        name="eventbus",
        worker="work_eventbus.py",
        requirements=(str(ROOT),),
        package="eventbus",
        measures=_BUS,
        settings=(Setting("full", 'durability="full" (the default)'), Setting("fast", 'durability="fast"')),
    ),
    Peer(
        name="localqueue",
        worker="work_localqueue.py",
        requirements=("localqueue[bus]",),
        package="localqueue",
        measures=_BUS,
        settings=(
            Setting("default", "its bus, defaults", delivery=_LEASE),
            Setting("concurrent", "its bus, concurrency=20", delivery=_LEASE),
            Setting("durable", "its bus, DURABLE, concurrency=20", delivery=_LEASE),
        ),
    ),
    Peer(
        name="eventsourcing",
        worker="work_eventsourcing.py",
        requirements=("eventsourcing",),
        package="eventsourcing",
        measures=_BUS,
        settings=(
            Setting("threads", "MultiThreadedRunner", delivery=_PULLED),
            Setting("single", "SingleThreadedRunner", delivery=_PULLED),
        ),
    ),
    Peer(
        name="bubus",
        worker="work_bubus.py",
        requirements=("bubus",),
        package="bubus",
        measures=_BUS,
        stores=False,
        settings=(
            Setting("default", "defaults", delivery=_IN_MEMORY),
            Setting("short", "max_history_size=1", delivery=_IN_MEMORY),
            Setting("wal", "max_history_size=1, wal_path", delivery=_IN_MEMORY),
        ),
    ),
    Peer(
        name="huey",
        worker="work_huey.py",
        requirements=("huey",),
        package="huey",
        settings=(
            Setting("default", "defaults (polls each 100 ms)", delivery=_DELETED),
            Setting("fsync", "fsync=True, polls each 1 ms", delivery=_DELETED),
            Setting("no-fsync", "fsync=False, polls each 1 ms", delivery=_DELETED),
        ),
    ),
    Peer(
        name="litequeue",
        worker="work_litequeue.py",
        requirements=("litequeue",),
        package="litequeue",
        settings=(
            Setting("default", "defaults", delivery=_LOCKED),
            Setting("full", "PRAGMA synchronous = FULL", delivery=_LOCKED),
        ),
    ),
    Peer(
        name="persist-queue",
        worker="work_persist_queue.py",
        requirements=("persist-queue",),
        package="persist-queue",
        settings=(
            Setting("auto-commit", "SQLiteQueue, defaults", delivery=_DELETED),
            Setting("task-done", "SQLiteQueue, auto_commit=False, task_done for each 100"),
            Setting("ack", "SQLiteAckQueue"),
        ),
    ),
    Peer(
        name="dbos",
        worker="work_dbos.py",
        requirements=("dbos",),
        package="dbos",
        settings=(
            Setting("default", "start_workflow, defaults"),
            Setting("wal", "start_workflow, file set to WAL"),
            Setting("queue", "a queue polled each 10 ms, file set to WAL"),
        ),
    ),
)
