"""eventsourcing with its SQLite module: the event is the first of an aggregate; handlers are process applications that follow.

A runner prompts the followers, which pull events and record the position of each, in a transaction for each event. Its
projection runners need `subscribe`, which its SQLite recorders do not have.
"""

import sys
from datetime import datetime
from decimal import Decimal
from uuid import UUID

import common
from eventsourcing.application import Application
from eventsourcing.dispatch import singledispatchmethod
from eventsourcing.domain import Aggregate, event
from eventsourcing.system import MultiThreadedRunner, ProcessApplication, SingleThreadedRunner, System

calls = common.Calls()


class Order(Aggregate):
    @event("Placed")
    def __init__(
        self, order_id: UUID, customer: str, total: Decimal, quantity: int, placed_at: datetime, note: str | None
    ) -> None:
        self.order_id = order_id
        self.customer = customer
        self.total = total
        self.quantity = quantity
        self.placed_at = placed_at
        self.note = note


class Shop(Application):
    def place(self, first: int, number: int) -> None:
        """All in one transaction."""
        self.save(*(Order(**common.fields(i)) for i in range(first, first + number)))


class Follower(ProcessApplication):
    pull_section_size = 100
    """Events to pull at once; 10 is the default, and so is `log_section_size` of the application."""

    @singledispatchmethod
    def policy(self, domain_event: object, processing_event: object) -> None:
        """Other events are of no interest."""

    @policy.register(Order.Placed)
    def _(self, domain_event: object, processing_event: object) -> None:
        calls.mark()


Shop.log_section_size = 100


class Handler0(Follower):
    pass


class Handler1(Follower):
    pass


class Handler2(Follower):
    pass


HANDLERS = (Handler0, Handler1, Handler2)


def work(task: common.Task) -> dict[str, object]:
    handlers = HANDLERS[: task.subscribers]
    system = System(pipes=[[Shop, handler] for handler in handlers])
    env = {"PERSISTENCE_MODULE": "eventsourcing.sqlite"}
    for name in ("Shop", *(handler.__name__ for handler in handlers)):
        env[f"{name.upper()}_SQLITE_DBNAME"] = str(task.folder / f"{name}.db")  # as its documentation does: a file for each
    make = MultiThreadedRunner if task.setting == "threads" else SingleThreadedRunner
    with make(system, env=env) as runner:
        shop = runner.get(Shop)
        with shop.recorder.datastore.transaction(commit=False) as cursor:

            def execute(statement: str) -> object:
                cursor.execute(statement)
                return cursor

            settings = common.pragmas(execute, "PRAGMA on a connection of the application's datastore")
        if task.measure == "latency":
            figures = common.latency(lambda i: shop.place(i, 1), calls, task.seconds)
            return {"figures": figures, "settings": settings, "how": "app.save(aggregate)"}

        at_once = 1 if task.measure == "one" else common.BATCH
        followers = [runner.get(handler) for handler in handlers]

        def run(number: int) -> None:
            calls.clear()
            limit = task.limit()
            for first in range(0, number, at_once):
                shop.place(first, at_once)
                common.hold_back(calls, first + at_once, limit, task.subscribers)
            common.wait_for_calls(calls, number * task.subscribers, limit)
            head = shop.recorder.max_notification_id()
            for follower in followers:
                common.wait_until(
                    lambda one=follower: one.recorder.max_tracking_id("Shop") == head, limit, lambda: "not all tracked"
                )

        figures = common.throughput(run, task.seconds, at_once)
    how = "app.save(aggregate)" if at_once == 1 else f"app.save({at_once} aggregates)"
    return {"figures": figures, "settings": settings, "how": how}


if __name__ == "__main__":
    sys.modules["work_eventsourcing"] = sys.modules["__main__"]  # its topics name the module
    common.main(work)
