"""litequeue: an event is a message, as JSON text. It has no consumer of its own: a thread pops, handles, and marks as done.

Publisher and consumer have a LiteQueue object each, on one file, so that neither's statements fall into the other's transaction.
"""

import threading
import time

import common
from litequeue import LiteQueue

PRUNE_EACH = 1_000
"""Messages done after which `prune` deletes them: its way to keep the table small, and with it the pop fast."""

POLL = 0.001
"""Seconds to sleep when the queue is empty. It has no blocking get; the loop is the user's."""


def open_queue(task: common.Task) -> LiteQueue:
    queue = LiteQueue(task.folder / "queue.db")
    if task.setting == "full":
        queue.conn.execute("PRAGMA synchronous = FULL")
    return queue


class Consumer(threading.Thread):
    """The loop that a user would write."""

    def __init__(self, task: common.Task, calls: common.Calls) -> None:
        super().__init__(daemon=True)
        self._task = task
        self._calls = calls
        self.done = 0
        self.stopping = False

    def run(self) -> None:
        queue = open_queue(self._task)
        while not self.stopping:
            message = queue.pop()
            if message is None:
                time.sleep(POLL)
                continue
            common.from_json(message.data)
            self._calls.mark()
            queue.done(message.message_id)
            self.done += 1
            if self.done % PRUNE_EACH == 0:
                queue.prune()
        queue.close()


def work(task: common.Task) -> dict[str, object]:
    calls = common.Calls()
    queue = open_queue(task)
    settings = common.pragmas(queue.conn.execute, "PRAGMA on queue.conn")
    consumer = Consumer(task, calls)
    consumer.start()

    def publish(number: int) -> None:
        queue.put(common.to_json(common.event(number)))

    if task.measure == "latency":
        figures = common.latency(publish, calls, task.seconds)
        how = f"queue.put(text); the consumer's loop polls each {POLL * 1000:g} ms"
        return {"figures": figures, "settings": settings, "how": how}

    at_once = common.BATCH if task.measure == "many" else 1

    def run(number: int) -> None:
        calls.clear()
        before = consumer.done
        limit = task.limit()
        for first in range(0, number, at_once):
            if at_once == 1:
                publish(first)
            else:
                with queue.transaction("IMMEDIATE"):
                    for i in range(first, first + at_once):
                        publish(i)
            common.hold_back(calls, first + at_once, limit)
        common.wait_until(lambda: consumer.done - before == number, limit, lambda: f"{calls.count()} of {number} handled")

    figures = common.throughput(run, task.seconds, at_once)
    consumer.stopping = True
    consumer.join()
    return {
        "figures": figures,
        "settings": settings,
        "how": "queue.put(text)" if at_once == 1 else f"{at_once} × queue.put(text) in queue.transaction()",
    }


if __name__ == "__main__":
    common.main(work)
