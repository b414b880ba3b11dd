"""persist-queue's SQLite queues: an event is an item, pickled. A thread gets and handles, as its README shows."""

import threading

import common
from persistqueue import SQLiteAckQueue, SQLiteQueue
from persistqueue.exceptions import Empty

GET_TIMEOUT = 0.1
"""Seconds that a get waits for an item. Without one, an item that is put at the wrong moment can wait for 10 s: `get` clears its
event after it has found nothing, and an item put in between is not noticed."""

TASK_DONE_EACH = 100
"""Items after which `task_done` is called with auto_commit=False, or when the queue is empty."""

THREADS = 4
"""That put at once, where "many" is asked for: there is no way to put several items in one commit. More threads only queue up for
its lock, and keep the consumer from it (100 of them: 200 events/s)."""

CLEAR_EACH = 1_000
"""Items acked after which SQLiteAckQueue is told to delete them; its get looks at all that are there."""


def open_queue(task: common.Task) -> SQLiteQueue | SQLiteAckQueue:
    path = str(task.folder)
    if task.setting == "ack":
        return SQLiteAckQueue(path, multithreading=True)
    return SQLiteQueue(path, multithreading=True, auto_commit=task.setting == "auto-commit")


class Consumer(threading.Thread):
    def __init__(self, task: common.Task, queue: SQLiteQueue | SQLiteAckQueue, calls: common.Calls) -> None:
        super().__init__(daemon=True)
        self._setting = task.setting
        self._queue = queue
        self._calls = calls
        self._handled = 0  # since the last task_done
        self.done = 0
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            try:
                item = self._queue.get(timeout=GET_TIMEOUT)
            except Empty:
                if self._handled:
                    self._task_done()
                continue
            self._calls.mark()
            getattr(self, self._setting.replace("-", "_"))(item)

    def auto_commit(self, item: object) -> None:
        """`get` has deleted it before the handler was called."""
        self.done += 1

    def task_done(self, item: object) -> None:
        """`get` has only moved a cursor in memory; `task_done` deletes up to it."""
        self._handled += 1
        if self._handled == TASK_DONE_EACH or self._queue.qsize() == 0:
            self._task_done()

    def _task_done(self) -> None:
        self._queue.task_done()
        self.done += self._handled
        self._handled = 0

    def ack(self, item: object) -> None:
        self._queue.ack(item)
        self.done += 1
        if self.done % CLEAR_EACH == 0:
            self._queue.clear_acked_data(max_delete=CLEAR_EACH, keep_latest=0)


def work(task: common.Task) -> dict[str, object]:
    calls = common.Calls()
    queue = open_queue(task)
    settings = common.pragmas(queue._putter.execute, "PRAGMA on the connection that puts")
    consumer = Consumer(task, queue, calls)
    consumer.start()

    def publish(number: int) -> None:
        queue.put(common.event(number))

    if task.measure == "latency":
        figures = common.latency(publish, calls, task.seconds)
        return {"figures": figures, "settings": settings, "how": f"queue.put(event); queue.get(timeout={GET_TIMEOUT})"}

    threads = THREADS if task.measure == "many" else 1

    def run(number: int) -> None:
        calls.clear()
        before = consumer.done
        limit = task.limit()

        def publish_one(index: int) -> None:
            publish(index)
            common.hold_back(calls, index + 1, limit)

        if threads == 1:
            for index in range(number):
                publish_one(index)
        else:
            common.in_threads(number, threads, publish_one)
        common.wait_until(lambda: consumer.done - before == number, limit, lambda: f"{calls.count()} of {number} handled")

    figures = common.throughput(run, task.seconds, threads)
    consumer.stopping = True
    consumer.join()
    return {
        "figures": figures,
        "settings": settings,
        "how": "queue.put(event)" if threads == 1 else f"queue.put(event) from {threads} threads: a commit for each",
    }


if __name__ == "__main__":
    common.main(work)
