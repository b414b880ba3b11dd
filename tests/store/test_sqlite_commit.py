"""The SQLite store's transactions: how many statements they take, and what is known when the disk fails."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from eventbus.errors import PublishOutcomeUnknown, StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreLost, StoreUnavailable
from eventbus.stores import _sqlite_commit, _sqlite_insert, _sqlite_read
from eventbus.stores import sqlite as module
from eventbus.stores._sqlite_connection import connect
from eventbus.stores.base import (
    Batch,
    Claim,
    DeadLetterFilter,
    DeadLetters,
    Death,
    Discard,
    Events,
    Lag,
    Lanes,
    LaneState,
    LogState,
    Pause,
    Promote,
    Query,
    Register,
    Registration,
    Rewind,
    Stand,
    Subscriptions,
    Types,
    Unit,
    Waiting,
    WaitingRows,
)
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing._conformance_base import INSTANCE, NOW, record, records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store lies."""
    return tmp_path / "a.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    """An open store."""
    store = SQLiteStore(path)
    store.open(INSTANCE)
    yield store
    store.close()


@contextlib.contextmanager
def traced(connection: sqlite3.Connection | None) -> Iterator[list[str]]:
    """The statements that a connection runs."""
    assert connection is not None
    statements: list[str] = []
    connection.set_trace_callback(lambda text: statements.append(text.split()[0]))
    yield statements
    connection.set_trace_callback(None)


def lane(store: SQLiteStore, count: int = 1) -> list[LaneState]:
    """So many claimed lanes."""
    register = Register((Registration("mailer", ("*",), "key", 1024, "beginning"),))
    claim = Claim(INSTANCE.id, tuple(("mailer", str(i), 0) for i in range(count)))
    (_, lanes) = store.commit(Batch(NOW, commands=[register, claim])).results
    return list(lanes)  # type: ignore[call-overload, no-any-return]


# ------------------------------------------------------------------ statements


@pytest.mark.parametrize("count", [1, 2, 99, 512])
def test_steps_of_a_commit(store: SQLiteStore, count: int) -> None:
    """A commit takes the same few statements for one event and for 512, in one group or in many, and for all lanes."""
    states = lane(store, count)
    with traced(store._writer) as statements:
        store.commit(Batch(NOW, appends=[records(count)]))
    assert statements == ["INSERT"]
    units = [Unit("mailer", state.lane, state.epoch, "log", 1, 1) for state in states]
    with traced(store._writer) as statements:
        store.commit(Batch(NOW, appends=[[event] for event in records(count)], units=units))
    assert statements == ["BEGIN", "SELECT", "INSERT", "INSERT", "COMMIT"]
    with traced(store._writer) as statements:
        store.commit(Batch(NOW, appends=[[record(idempotency_key=f"k{i}") for i in range(count)]]))
    assert statements == ["BEGIN", "SELECT", "INSERT", "INSERT", "COMMIT"]


def test_a_head_that_another_connection_has_moved(store: SQLiteStore, path: Path) -> None:
    """Events come after those that somebody else has put into the log, or removed from it, meanwhile."""
    store.commit(Batch(NOW, appends=[records(2)]))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO events SELECT 7, 'an-id', " + _REST + " FROM events WHERE position = 1")
        other.execute("DELETE FROM events WHERE position = 7")
    with traced(store._writer) as statements:
        committed = store.commit(Batch(NOW, appends=[records(1), records(2)]))
    assert statements == ["INSERT", "BEGIN", "SELECT", "INSERT", "COMMIT"]
    assert (committed.previous_head, committed.head) == (7, 10)
    assert [r.position for r in committed.events] == [8, 9, 10]
    assert [r.position for r in store.read(Events(0, 10, 10_000)).records] == [1, 2, 8, 9, 10]
    with traced(store._writer) as statements:
        store.commit(Batch(NOW, appends=[records(1)]))
    assert statements == ["INSERT"]


_REST = "type, version, time, key, slot, headers, content_type, size, crc, data"


def test_any_number_of_events(store: SQLiteStore) -> None:
    """A statement for more rows than there are writes those that there are."""
    groups = [records(count) for count in (*range(1, 40), 99, 131, 511, 513)]
    for group in groups:
        store.commit(Batch(NOW, appends=[group]))
    found = store.read(Events(0, 10_000, 10_000_000)).records
    assert [r.id for r in found] == [r.id for group in groups for r in group]
    assert not any(r.fault for r in found)


def test_more_than_a_statement_can_take(store: SQLiteStore) -> None:
    """A batch may name more keys, and hold more data, than one statement takes."""
    assert store._writer is not None
    store._writer.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)  # as SQLite comes by default
    keys = [f"k{i}" for i in range(9_000)]
    store.commit(Batch(NOW, appends=[[record(idempotency_key=key) for key in keys]]))
    (again,) = store.commit(Batch(NOW, appends=[[record(idempotency_key=key) for key in keys]])).appends
    assert isinstance(again, list)
    assert [(place.position, place.duplicate) for place in again] == [(i, True) for i in range(1, 9_001)]
    store.commit(Batch(NOW, appends=[records(7, data=b"x" * 1_500_000)]))
    assert store.read(LogState()).head == 9_007


def test_statements_are_few(store: SQLiteStore) -> None:
    """There are some 50 sizes of statements, none more than an eighth too large: each holds on to its memory."""
    rooms = [_sqlite_insert._room(rows) for rows in range(1, 513)]
    assert len(set(rooms)) < 60
    assert all(rows <= room <= rows * 1.13 for rows, room in enumerate(rooms, 1))


def test_nothing_is_written_for_nothing(store: SQLiteStore) -> None:
    """What has nothing to do is left out."""
    with traced(store._writer) as statements:
        store.commit(Batch(NOW, units=[Unit("nobody", "", 1, "log", 1, 1)]))
    assert statements == ["BEGIN", "SELECT", "COMMIT"]


@pytest.mark.parametrize(
    "query",
    [
        Events(0, 500, 1_000_000),
        Events(0, 500, 1_000_000, types=("order.created", "b")),
        Lanes(),
        WaitingRows(),
        Subscriptions(),
        Types(),
        DeadLetters(DeadLetterFilter()),
        Lag(0, None),
        LogState(),
    ],
)
def test_steps_of_a_query(store: SQLiteStore, query: Query[object]) -> None:
    """A query is one statement of one row, whatever it finds."""
    lane(store, 20)
    store.commit(Batch(NOW, appends=[records(500)]))
    assert store._reader is not None
    rows: list[object] = []
    store._reader.row_factory = lambda _, row: rows.append(row) or row  # type: ignore[func-returns-value]
    with traced(store._reader) as statements:
        store.read(query)
    assert (len(statements), len(rows)) == (1, 1)


def plan(store: SQLiteStore, text: str) -> str:
    """How SQLite will run a statement, after ANALYZE of a log on which it would rather scan."""
    assert store._writer is not None
    for _ in range(4):
        store.commit(Batch(NOW, appends=[records(500, key="k")]))
    store.commit(Batch(NOW, appends=[records(1, "rare")]))
    store._writer.execute("ANALYZE")
    names = {name.strip(":,)") for name in text.split() if name.startswith(":")} | {"after", "until", "limit", "max_bytes"}
    values: Any = dict.fromkeys(names, 1) if ":" in text else [1] * text.count("?")
    return "\n".join(row[3] for row in store._writer.execute(f"EXPLAIN QUERY PLAN {text}", values))


def test_pages_of_types_use_their_index(store: SQLiteStore) -> None:
    """A page of some types is read from the index of types, also after ANALYZE, and touches no other rows."""
    found = plan(store, _sqlite_read._page_text(2, False, False))
    assert found.count("SEARCH events USING COVERING INDEX events_type (type=? AND position>? AND position<?)") == 2
    assert "SCAN e" not in found


def test_pages_of_a_key_use_their_index(store: SQLiteStore) -> None:
    """A page of one key is read from the index of keys."""
    assert "INDEX events_key (key=? AND position>? AND position<?)" in plan(store, _sqlite_read._page_text(0, True, False))


def test_the_look_uses_indexes(store: SQLiteStore) -> None:
    """What decides a batch is found by primary keys."""
    found = plan(store, _sqlite_commit._look_text(4, 4, 4, 4))
    for table in ("idempotency", "lanes", "deliveries", "dead_letters"):
        assert f"SEARCH {table} USING" in found


def test_wal_checkpoints(store: SQLiteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The WAL is carried over between transactions, so that it does not grow without end."""
    monkeypatch.setattr(module, "WAL_PAGES", 50)
    with traced(store._writer) as statements:
        for _ in range(60):
            store.commit(Batch(NOW, appends=[records(50)]))
    carried = statements.count("PRAGMA")
    assert 2 <= carried < 60
    assert path.with_name("a.db-wal").stat().st_size < 300 * 4096


# ------------------------------------------------------------------ damage


def damage(path: Path, statement: str) -> None:
    """Change a row behind the store's back."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    "change",
    [
        """data = replace(data, '1', '2')""",
        """data = CAST(x'7bff22c37d' AS TEXT)""",
        """data = x'00ff'""",
        """data = 5""",
        """key = 'other'""",
        """time = time + 0.000001""",
        """type = type || 'x'""",
        """id = CAST(x'ff' AS TEXT)""",
        """headers = '{}'""",
    ],
)
def test_a_damaged_event(store: SQLiteStore, path: Path, change: str) -> None:
    """A damaged event comes with what is wrong with it; those beside it come as they are."""
    some = records(3)
    store.commit(Batch(NOW, appends=[some]))
    damage(path, f"UPDATE events SET {change} WHERE position = 2")
    found = store.read(Events(0, 10, 1_000_000)).records
    assert [r.fault is None for r in found] == [True, False, True]
    assert [found[0].data, found[2].data] == [some[0].data, some[2].data]


def test_a_damaged_type_among_many(store: SQLiteStore, path: Path) -> None:
    """With more types than have a range of the index each, an event is not passed by because its type is what was damaged."""
    store.commit(Batch(NOW, appends=[records(3)]))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE events SET type = 'damaged' WHERE position = 2")
    types = (records(1)[0].type, *(f"t{number}" for number in range(_sqlite_read.MOST_TYPES)))
    page = store.read(Events(0, 10, 10_000, types=types))
    assert [(each.position, each.fault is None) for each in page.records] == [(1, True), (2, False), (3, True)]


def test_a_damaged_scheduled_event_stays_damaged(store: SQLiteStore, path: Path) -> None:
    """Damage to a scheduled event is not covered up when it enters the log."""
    store.commit(Batch(NOW, appends=[[record(due_at=NOW), record(due_at=NOW)]]))
    damage(path, "UPDATE scheduled SET data = '{}' WHERE rowid = 1")
    (promoted,) = [store.commit(Batch(NOW, commands=[Promote(NOW, 10)])).events]
    assert [r.fault is None for r in promoted] == [False, True]
    assert [r.fault is None for r in store.read(Events(0, 10, 1_000)).records] == [False, True]


def test_a_damaged_lane(store: SQLiteStore, path: Path) -> None:
    """A damaged checkpoint is never worked with: it would skip events."""
    (state,) = lane(store)
    store.commit(Batch(NOW, appends=[records(3)]))
    damage(path, "UPDATE lanes SET checkpoint = 2")
    with pytest.raises(StoreCorrupt, match="mailer"):
        store.read(Lanes())
    with pytest.raises(StoreCorrupt, match="checksum"):
        store.commit(Batch(NOW, appends=[records(1)], units=[Unit("mailer", state.lane, 1, "log", 3, 3)]))
    assert store.read(LogState()).head == 3


@pytest.mark.parametrize(
    "change",
    [
        "position = 3",
        "lane = 'x'",
        "key = 'x'",
        "state = 'parked'",
        "attempt = 7",
        "due_at = due_at + 1",
        "first_failed_at = 1",
        "error = 'x'",
        "crc = crc + 1",
        "subscription = 'nobody'",
    ],
)
def test_a_damaged_waiting_delivery(store: SQLiteStore, path: Path, change: str) -> None:
    """A row that was damaged is told, also where it is not found under its subscription; to rewind to before it mends it."""
    (state,) = lane(store)
    waits = Waiting(2, "k", 1, NOW + 5, first_failed_at=NOW, error="RuntimeError: no")
    store.commit(Batch(NOW, appends=[records(3)], units=[Unit("mailer", state.lane, state.epoch, "log", 2, 2, rows=(waits,))]))
    (row,) = store.read(WaitingRows("mailer"))
    assert row.waiting == waits
    damage(path, f"UPDATE deliveries SET {change}")
    for query in (WaitingRows(), WaitingRows("mailer")):
        with pytest.raises(StoreCorrupt, match="checksum"):
            store.read(query)
    if "subscription" not in change:
        store.commit(Batch(NOW, commands=[Rewind("mailer", 0)]))
        assert store.read(WaitingRows()) == ()


@pytest.mark.parametrize(
    "change",
    [
        "name = 'nailer'",
        "types = '[\"a\"]'",
        "types = '['",
        "since = '{\"*\":4}'",
        "derived = '[\"b\"]'",
        "\"order\" = 'log'",
        "concurrency = 3",
        "generation = 9",
        "paused = 'x'",
        "paused_at = 1",
        "created_at = 1",
        "floors = ''",
    ],
)
def test_a_damaged_subscription(store: SQLiteStore, path: Path, change: str) -> None:
    """A row that was damaged is told wherever a subscription is asked for, and it is not written over."""
    lane(store)
    damage(path, f"UPDATE subscriptions SET {change}")
    for query in (Subscriptions(), Stand()):
        with pytest.raises(StoreCorrupt, match="checksum"):
            store.read(query)
    register = Register((Registration("mailer", ("*",), "key", 1024, "beginning"),))
    for command in (register, Claim(INSTANCE.id, (("mailer", "0", 0),)), Pause("mailer", "why"), Rewind("mailer", 0)):
        (result,) = store.commit(Batch(NOW, commands=[command])).results
        assert isinstance(result, StoreCorrupt), command


def test_rows_keep_their_checksums(store: SQLiteStore) -> None:
    """Whatever changes a row of `subscriptions` or of `deliveries` writes its checksum, too."""
    (state,) = lane(store)
    parked, failing = Waiting(1, "a", 8, NOW, "parked", NOW, "x"), Waiting(2, "b", 1, NOW + 9, first_failed_at=NOW, error="x")
    death = Death("X", "x", "", 8, NOW, NOW)
    units = [
        Unit("mailer", state.lane, state.epoch, "log", 1, 1, rows=(parked,), death=death),
        Unit("mailer", state.lane, state.epoch, "log", 2, 2, rows=(failing,), pause="all fails"),
    ]
    store.commit(Batch(NOW, appends=[records(3)], units=units))
    assert [each.paused for each in store.read(Subscriptions())] == ["all fails"]
    store.commit(Batch(NOW + 1, commands=[Pause("mailer", None), Discard(DeadLetterFilter(subscription="mailer"))]))
    assert [each.paused for each in store.read(Subscriptions())] == [None]
    freed, again = (row.waiting for row in store.read(WaitingRows("mailer")))
    assert freed == Waiting(1, "a", 0, NOW + 1, "freed")
    assert again == msgspec.structs.replace(failing, attempt=0, due_at=NOW + 1)


# ------------------------------------------------------------------ definite failures


def test_full(store: SQLiteStore) -> None:
    """Without room nothing is stored; with room again everything is."""
    assert store._writer is not None
    (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {pages + 3}")
    some = records(500)
    with pytest.raises(StoreFull):
        store.commit(Batch(NOW, appends=[some]))
    assert ({r.position for r in some}, store.read(LogState()).events) == ({0}, 0)
    store._writer.execute("PRAGMA max_page_count = 1000000")
    store.commit(Batch(NOW, appends=[some]))
    assert store.read(LogState()).head == 500


def test_busy(store: SQLiteStore, path: Path) -> None:
    """While somebody else writes nothing is stored."""
    assert store._writer is not None
    store._writer.execute("PRAGMA busy_timeout = 0")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy, match="write lock"):
            store.commit(Batch(NOW, appends=[records(1)]))
    assert store.commit(Batch(NOW, appends=[records(1)])).head == 1


@pytest.mark.parametrize("bad", [{"version": 2**63}, {"key": "\ud800"}])
def test_a_value_that_sqlite_cannot_take(store: SQLiteStore, bad: dict[str, Any]) -> None:
    """A value that cannot be stored fails its batch, and nothing else."""
    with pytest.raises(StoreError, match="cannot be stored"):
        store.commit(Batch(NOW, appends=[records(1), [record(**{"slot": 1, "key": "k", **bad})]]))
    assert store.commit(Batch(NOW, appends=[records(1)])).head == 1


def test_an_id_that_is_there_already(store: SQLiteStore) -> None:
    """An id is stored once."""
    (event,) = records(1)
    store.commit(Batch(NOW, appends=[[event]]))
    with pytest.raises(StoreUnavailable, match="UNIQUE"):
        store.commit(Batch(NOW, appends=[[msgspec.structs.replace(event, position=0)]]))
    assert store.commit(Batch(NOW, appends=[records(1)])).head == 2


# ------------------------------------------------------------------ a disk that fails


class Failing:
    """A connection on which one statement ends with an I/O error, before it did its work or after."""

    def __init__(self, connection: sqlite3.Connection, word: str, *, done: bool) -> None:
        self._connection = connection
        self._word = word
        self._done = done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, text: str, *values: Any) -> sqlite3.Cursor:
        """Run a statement, or fail."""
        if not text.startswith(self._word):
            return self._connection.execute(text, *values)
        if self._done:
            self._connection.execute(text, *values)
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC"
        raise error


def fail(store: SQLiteStore, word: str, *, done: bool) -> None:
    """Let one kind of statement fail from now on, until the store connects anew."""
    assert store._writer is not None
    store._writer = Failing(store._writer, word, done=done)  # type: ignore[assignment]


def _append(store: SQLiteStore) -> Batch:
    return Batch(NOW, appends=[records(2)])


def _append_alone(store: SQLiteStore) -> Batch:
    store.commit(Batch(NOW, appends=[records(1)]))
    return _append(store)


def _schedule(store: SQLiteStore) -> Batch:
    return Batch(NOW, appends=[[record(due_at=NOW + 1)]])


def _ack(store: SQLiteStore) -> Batch:
    store.commit(Batch(NOW, appends=[records(1)]))
    (state,) = lane(store)
    return Batch(NOW, units=[Unit("mailer", state.lane, state.epoch, "log", 1, 1)])


def _command(store: SQLiteStore) -> Batch:
    return Batch(NOW, commands=[Register((Registration("other", ("a",), "type", 1),))])


def _content(store: SQLiteStore) -> list[object]:
    lanes = store.read(Lanes())
    return [store.read(LogState()), [state.checkpoint for state in lanes], store.read(Subscriptions())]


@pytest.mark.parametrize(
    ("make", "before"),
    [
        (_append, ["BEGIN", "SELECT"]),
        (_append_alone, []),
        (_schedule, ["BEGIN", "SELECT"]),
        (_ack, ["BEGIN", "SELECT"]),
        (_command, ["BEGIN"]),
    ],
)
def test_the_writing_begins(store: SQLiteStore, make: Callable[[SQLiteStore], Batch], before: list[str]) -> None:
    """Who waits for it learns of it before anything is written or a command is run, whatever the batch is."""
    batch = make(store)
    with traced(store._writer) as statements:
        store.commit(msgspec.structs.replace(batch, begins=lambda: statements.append("begins")))
    assert statements[: statements.index("begins")] == before


@pytest.mark.parametrize("make", [_append, _append_alone, _schedule, _ack, _command])
def test_a_commit_that_took_place(store: SQLiteStore, make: Callable[[SQLiteStore], Batch]) -> None:
    """A commit that raised but took place is found, and reported as done."""
    batch = make(store)
    head = store.read(LogState()).head
    fail(store, "INSERT INTO events" if make is _append_alone else "COMMIT", done=True)
    committed = store.commit(batch)
    assert all(not isinstance(group, Exception) for group in committed.appends)
    assert [r.position for r in committed.events] == list(range(head + 1, committed.head + 1))
    before = _content(store)
    store.close()
    store.open(INSTANCE)
    assert _content(store) == before


@pytest.mark.parametrize("make", [_append, _append_alone, _schedule, _ack, _command])
def test_a_commit_that_did_not(store: SQLiteStore, make: Callable[[SQLiteStore], Batch]) -> None:
    """A commit that raised and did not take place is reported as not stored, and can be made again."""
    batch = make(store)
    before = _content(store)
    fail(store, "INSERT INTO events" if make is _append_alone else "COMMIT", done=False)
    with pytest.raises(StoreUnavailable, match="SQLITE_IOERR_FSYNC"):
        store.commit(batch)
    assert _content(store) == before
    assert not store.commit(batch).refused


def test_a_read_while_it_is_opened_again(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that comes while the store is opened anew, after the disk failed, waits for that and is answered."""
    answers: list[object] = []

    def read() -> None:
        try:
            answers.append(store.read(LogState()).head)
        except StoreUnavailable as error:
            answers.append(error)

    reading = threading.Thread(target=read)

    def slow(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if not reading.ident:
            reading.start()
            reading.join(0.1)
        return connect(*arguments, **options)

    monkeypatch.setattr(module, "connect", slow)
    fail(store, "COMMIT", done=True)
    store.commit(Batch(NOW, appends=[records(2)]))
    reading.join()
    assert answers == [2]


def test_another_file_in_its_place(store: SQLiteStore, tmp_path: Path) -> None:
    """A file that was put in the place of the store's while the disk failed is not taken for it."""
    store.commit(Batch(NOW, appends=[records(1)]))
    path = Path(store._path)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    fail(store, "COMMIT", done=True)
    copy.replace(path)
    with pytest.raises(PublishOutcomeUnknown):
        store.commit(Batch(NOW, [[record(idempotency_key="k")]]))
    with pytest.raises(StoreLost):
        store.commit(_append(store))


@pytest.mark.parametrize("done", [False, True])
def test_nobody_can_tell(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """Only if the second look fails too is the outcome unknown; the store is opened again with the next commit."""
    batch = Batch(NOW, appends=[[record(idempotency_key="k")], [record(due_at=NOW + 9)]])

    def refuse(*_: object, **__: object) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "connect", refuse)
        fail(store, "COMMIT", done=done)
        with pytest.raises(PublishOutcomeUnknown) as caught:
            store.commit(batch)
        assert caught.value.event_ids == tuple(group[0].id for group in batch.appends)
        with pytest.raises(StoreUnavailable):
            store.read(LogState())
        with pytest.raises(StoreUnavailable):
            store.commit(batch)
    (again,) = store.commit(Batch(NOW, appends=[[record(idempotency_key="k")]])).appends
    assert isinstance(again, list)
    assert (again[0].duplicate, again[0].position) == (done, 1)
    assert store.read(LogState()).head == 1


@pytest.mark.parametrize("word", ["BEGIN", "SELECT", "INSERT"])
def test_an_error_before_commit(store: SQLiteStore, word: str) -> None:
    """An I/O error before COMMIT is definite: nothing is stored, and the next commit connects anew."""
    some = records(2)
    fail(store, word, done=True)
    with pytest.raises(StoreUnavailable):
        store.commit(Batch(NOW, appends=[some]))
    assert store.commit(Batch(NOW, appends=[some])).head == 2


_LIMITED = """
import resource, signal, sys
from eventbus.errors import StoreError
from eventbus.stores.base import Batch, LogState, Events
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing._conformance_base import INSTANCE, NOW, records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = SQLiteStore(sys.argv[1])
store.open(INSTANCE)
stored = list(store.commit(Batch(NOW, appends=[records(20)])).events)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # a write beyond that fails, as on a disk that breaks
refused = 0
for size in (50, 900, 10, 2_000, 10):
    batch = Batch(NOW, appends=[records(size)])
    try:
        stored += store.commit(batch).events
    except StoreError as error:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
stored += store.commit(Batch(NOW, appends=[records(500)])).events
store.close()
store.open(INSTANCE)
assert [r.id for r in store.read(Events(0, 10_000, 10_000_000)).records] == [r.id for r in stored]
assert refused, "nothing failed"
store.close()
"""


def test_writes_that_fail(path: Path) -> None:
    """With writes that really fail, the store has what it reported as stored and nothing else."""
    subprocess.run([sys.executable, "-c", _LIMITED, str(path)], check=True)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_any_shape(store: SQLiteStore, seed: int) -> None:
    """What the events of one transaction have in common is bound once; what any of them differs in comes back as it was."""
    random = Random(seed)
    pick = random.choice
    vary = {name: random.random() < 0.5 for name in ("type", "key", "headers", "content_type", "version", "fault")}
    made = []
    for number in range(random.randint(1, 40)):
        one = record(pick("ab") if vary["type"] else "a", key=pick(["k", "ä", None]) if vary["key"] else None)
        one.headers = pick(['{"a":"b"}', None]) if vary["headers"] else pick([None])
        one.content_type = pick(["application/json", "text/x"]) if vary["content_type"] else "application/json"
        one.version = pick([1, 2]) if vary["version"] else 1
        one.data = pick([b'{"n":1}', b"\xff\x00", f'"{number}"'.encode()])
        one.fault = pick([None, None, "damaged before"]) if vary["fault"] else None
        made.append(one)
    store.commit(Batch(NOW, appends=[made]))
    found = store.read(Events(0, 100, 10**6)).records
    names = ("id", "type", "version", "time", "key", "slot", "headers", "content_type", "data", "position")
    assert [[getattr(one, name) for name in names] for one in found] == [[getattr(one, name) for name in names] for one in made]
    assert [one.fault is None for one in found] == [one.fault is None for one in made]
