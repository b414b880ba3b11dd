"""DBOS on SQLite: an event is the argument of a workflow. Started, it is stored and then run by a thread of its pool; enqueued, it
is stored and then found by a queue's poll. Its documentation has SQLite for development and testing, PostgreSQL for production.
"""

import sqlite3

import common
from dbos import DBOS, DBOSConfig

SETTINGS = {
    # name: (journal mode set on the file beforehand, whether a queue is used)
    "default": (None, False),
    "wal": ("wal", False),
    "queue": ("wal", True),
}

POLL = 0.01
"""Seconds between the polls of the queue; the default is 1.0."""

QUEUE = "events"

calls = common.Calls()


@DBOS.workflow()
def handle(event: common.OrderPlaced) -> None:
    calls.mark()


def publish(task: common.Task, number: int) -> object:
    if SETTINGS[task.setting][1]:
        return DBOS.enqueue_workflow(QUEUE, handle, common.event(number))
    return DBOS.start_workflow(handle, common.event(number))


def settings_of(dbos: DBOS) -> dict[str, object]:
    with dbos._sys_db.engine.connect() as connection:
        return common.pragmas(connection.exec_driver_sql, "PRAGMA on a connection of its system database's engine")


def open_workflows() -> int:
    """What is enqueued or running."""
    return len(DBOS.list_workflows(status=["ENQUEUED", "PENDING"], limit=1, load_input=False, load_output=False))


def work(task: common.Task) -> dict[str, object]:
    journal, queued = SETTINGS[task.setting]
    path = task.folder / "dbos.db"
    if journal:
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA journal_mode = {journal}")  # is kept in the file
        connection.close()
    config: DBOSConfig = {"name": "peers", "system_database_url": f"sqlite:///{path}", "log_level": "ERROR"}
    dbos = DBOS(config=config)
    DBOS.launch()
    try:
        if queued:
            DBOS.register_queue(QUEUE, polling_interval_sec=POLL)
        return {"settings": settings_of(dbos), **measured(task)}
    finally:
        DBOS.destroy()


def measured(task: common.Task) -> dict[str, object]:
    how = "DBOS.enqueue_workflow" if SETTINGS[task.setting][1] else "DBOS.start_workflow"
    if task.measure == "latency":
        figures = common.latency(lambda i: publish(task, i), calls, task.seconds, spread=POLL)
        return {"figures": figures, "how": f"{how}(handle, event)"}

    threads = THREADS if task.measure == "many" else 1

    def run(number: int) -> None:
        calls.clear()
        limit = task.limit()
        if threads == 1:
            for index in range(number):
                publish(task, index)
                common.hold_back(calls, index + 1, limit)
        else:
            common.in_threads(number, threads, lambda index: publish(task, index))
        common.wait_for_calls(calls, number, limit)
        common.wait_until(lambda: open_workflows() == 0, limit, lambda: "not all ended", pause=0.005)

    figures = common.throughput(run, task.seconds, threads)
    return {"figures": figures, "how": f"{how}(handle, event)" + ("" if threads == 1 else f" from {threads} threads")}


THREADS = 4
"""That start workflows at once, where "many" is asked for."""


if __name__ == "__main__":
    common.main(work)
