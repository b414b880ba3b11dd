"""The demo's shop as a process of its own, the one that is killed: publishes, handles, and tells its parent.

    python -m eventbus.cli.demo_child shop.db --seed 1 --first 0 --events 6000 --seconds 8

Started again after a kill it is told the first event whose acknowledgement did not arrive, and goes on from there. Each event has
an idempotency key, so one that had reached the disk unbeknown to the parent is not stored a second time.
"""

from __future__ import annotations

import argparse
import logging
import time
from decimal import Decimal

import anyio
import attrs

from eventbus import Delivery, EventBus, Reject, RetryPolicy
from eventbus.cli.demo_reports import AllPublished, Attempt, Closed, Drained, Opened, Outcome, Published, Replayed, tell
from eventbus.cli.demo_shop import (
    ORDER,
    ORDERS_AT_ONCE,
    OrderCreated,
    OrderShipped,
    PaymentTaken,
    ShopEvent,
    mishap,
    order_of,
    shop_event,
)

RATE = 800
"""Events a second that customers bring about."""

CROWD = 20
"""Customers come in small crowds: so many events at once."""

_TILLS = ORDERS_AT_ONCE // 2
_DRAIN_TIMEOUT = 10.0
_RETRY = RetryPolicy(attempts=5, first=0.05, factor=2, cap=1)


@attrs.define
class Ledger:
    """What the ledger has added up."""

    takings: Decimal = Decimal(0)


def tell_attempt(delivery: Delivery, outcome: Outcome) -> None:
    """Report an attempt that is about to end."""
    envelope = delivery.envelope
    tell(
        Attempt(
            delivery.subscription,
            envelope.id,
            envelope.position,
            delivery.attempt,
            outcome,
            delivery.replaying,
            time.monotonic(),
        )
    )


def shop(database: str, ledger: Ledger) -> EventBus:
    """The bus with its three subscriptions."""
    bus = EventBus(database, name="demo shop")

    @bus.subscribe(OrderCreated, OrderShipped, name="stock", order=ORDER["stock"], replay=False)
    async def stock(_event: OrderCreated | OrderShipped, delivery: Delivery) -> None:
        tell_attempt(delivery, "handled")

    @bus.subscribe(OrderCreated, PaymentTaken, OrderShipped, name="mailer", order=ORDER["mailer"], retry=_RETRY, replay=False)
    async def mailer(event: OrderCreated | PaymentTaken | OrderShipped, delivery: Delivery) -> None:
        await anyio.sleep(0.001)  # a mail server takes its time
        trouble = mishap(event)
        if trouble.rejected:
            tell_attempt(delivery, "rejected")
            raise Reject("no such address")
        if delivery.attempt <= trouble.failures:
            tell_attempt(delivery, "failed")
            raise ConnectionError("the mail server does not answer")
        tell_attempt(delivery, "handled")

    @bus.subscribe(PaymentTaken, OrderShipped, name="ledger", order=ORDER["ledger"])
    def book(event: PaymentTaken | OrderShipped, delivery: Delivery) -> None:
        if isinstance(event, PaymentTaken):
            ledger.takings += event.amount
        tell_attempt(delivery, "handled")

    return bus


async def publish(bus: EventBus, seed: int, number: int) -> None:
    """Publish one event and report the acknowledgement."""
    event: ShopEvent = shop_event(seed, number)
    began = time.monotonic()
    receipt = await bus.publish(event, idempotency_key=f"{seed}-{number}")
    assert receipt.position is not None
    tell(Published(number, receipt.id, receipt.position, receipt.duplicate, began, time.monotonic()))


async def till(bus: EventBus, options: argparse.Namespace, place: int) -> None:
    """One of the tills: publishes the events of its orders, one after the other, as customers bring them about."""
    opened = time.monotonic()
    for number in range(options.first, options.events):
        if order_of(number)[0] % _TILLS != place:
            continue
        due = opened + (number - options.first) // CROWD * CROWD / RATE
        if due > (now := time.monotonic()):
            await anyio.sleep(due - now)
        elif now > opened + options.seconds:
            return
        await publish(bus, options.seed, number)


async def sell(bus: EventBus, options: argparse.Namespace) -> None:
    """Open all tills, and wait until all are closed."""
    async with anyio.create_task_group() as tills:
        for place in range(_TILLS):
            tills.start_soon(till, bus, options, place)
    tell(AllPublished())


async def replay(bus: EventBus, ledger: Ledger) -> None:
    """Rebuild the ledger from the log."""
    ledger.takings = Decimal(0)
    began = time.monotonic()
    summary = await bus.replay(to="ledger")
    tell(Replayed("ledger", summary.events, time.monotonic() - began, str(ledger.takings)))


async def main(options: argparse.Namespace) -> None:
    """Recover, publish the rest, drain, replay."""
    logging.getLogger("eventbus").setLevel(logging.CRITICAL)  # the mishaps are wanted, and the parent is told of them
    ledger = Ledger()
    async with shop(options.database, ledger) as bus:
        tell(Opened())
        await sell(bus, options)
        tell(Drained(dict(await bus.drain(_DRAIN_TIMEOUT))))
        await replay(bus, ledger)
    tell(Closed())


def arguments() -> argparse.Namespace:
    """What the parent has said."""
    parser = argparse.ArgumentParser(description="The demo's shop; started by `python -m eventbus demo`.")
    parser.add_argument("database")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first event to publish")
    parser.add_argument("--events", type=int, required=True, help="number of the event to stop before")
    parser.add_argument("--seconds", type=float, required=True, help="stop publishing after that long, if behind")
    return parser.parse_args()


if __name__ == "__main__":
    anyio.run(main, arguments())
