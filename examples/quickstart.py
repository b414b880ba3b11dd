"""A shop in thirty lines: `python examples/quickstart.py`. What is published is on disk before it is handled."""

import sys
from decimal import Decimal

import anyio
import attrs

from eventbus import Delivery, EventBus, event


@event("order.created", key="order_id")
@attrs.frozen
class OrderCreated:
    order_id: str
    total: Decimal


@event("stock.reserved", key="order_id")
@attrs.frozen
class StockReserved:
    order_id: str


bus = EventBus()


@bus.subscribe(OrderCreated)
async def reserve(order: OrderCreated) -> StockReserved:
    return StockReserved(order.order_id)  # published together with the ack: both, or neither


@bus.subscribe(OrderCreated, StockReserved, name="log", order="key")
def log(event: OrderCreated | StockReserved, delivery: Delivery) -> None:  # a plain function runs in a thread
    print(f"{delivery.envelope.position}: {event}")


async def main(database: str) -> None:
    async with bus.open(database):
        receipt = await bus.publish(OrderCreated("o-1", Decimal("9.50")))  # returns once it is on disk
        await receipt.handled(timeout=5)
        await bus.drain()
        print(f"{(await bus.stats()).events} events in {database}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1] if len(sys.argv) > 1 else "shop.db")
