"""Handlers that users get wrong, and what the type checkers must say on the line above the handler.

`# mypy says` and `# pyright says` give, as regular expressions, what stands in the messages for the next line.
"""

from __future__ import annotations

from eventbus import Delivery, Envelope, EventBus


class Base: ...


class Created(Base): ...


class Paid(Base): ...


bus = EventBus("shop.db")


# mypy says: incompatible type "Callable\[\[Paid\], .*; expected "Callable\[\[Created\],
# pyright says: "Created" is incompatible with type "Paid"
@bus.subscribe(Created)
async def wrong_event(order: Paid) -> None: ...


# mypy says: incompatible type "Callable\[\[Paid\], None\]"; expected "Callable\[\[Created\], None\]"
# pyright says: "Created" is incompatible with type "Paid"
@bus.subscribe(Created)
def wrong_event_in_a_plain_function(order: Paid) -> None: ...


# mypy says: incompatible type "Callable\[\[Paid, Delivery\], .*; expected "Callable\[\[Created\],
# pyright says: "Created" is incompatible with type "Paid"
@bus.subscribe(Created)
async def wrong_event_with_delivery(order: Paid, delivery: Delivery) -> None: ...


# mypy says: incompatible type "Callable\[\[Created\], .*; expected "Callable\[\[Base\],
# pyright says: "Base" is incompatible with type "Created"
@bus.subscribe(Base)
async def subclass_of_the_type(order: Created) -> None: ...


# mypy says: incompatible type "Callable\[\[Created\], .*; expected "Callable\[\[Created \| Paid\],
# pyright says: "Created \| Paid" is incompatible with type "Created"
@bus.subscribe(Created, Paid)
async def one_of_two(order: Created) -> None: ...


# mypy says: incompatible type "Callable\[\[Created\], .*; expected "Callable\[\[Envelope\],
# pyright says: "Envelope" is incompatible with type "Created"
@bus.subscribe("order.*")
async def event_for_a_string(order: Created) -> None: ...


# mypy says: incompatible type "Callable\[\[Envelope\], .*; expected "Callable\[\[Created\],
# pyright says: "Created" is incompatible with type "Envelope"
@bus.subscribe(Created)
async def envelope_for_a_class(envelope: Envelope) -> None: ...


# mypy says: incompatible type "Callable\[\[Delivery\], .*; expected "Callable\[\[Created\],
# pyright says: "Created" is incompatible with type "Delivery"
@bus.subscribe(Created)
async def delivery_alone(delivery: Delivery) -> None: ...


# mypy says: incompatible type "Callable\[\[Delivery, Created\], .*; expected "Callable\[\[Created\],
# pyright says: "Created" is incompatible with type "Delivery"
@bus.subscribe(Created)
async def delivery_first(delivery: Delivery, order: Created) -> None: ...


# mypy says: incompatible type "Callable\[\[Created, int\],
# pyright says: Extra parameter "tries"
@bus.subscribe(Created)
async def something_else_second(order: Created, tries: int) -> None: ...


# mypy says: incompatible type "Callable\[\[\],
# pyright says: expected 1 but received 0
@bus.subscribe(Created)
async def no_parameter() -> None: ...


# mypy says: incompatible type "Callable\[\[Created, Delivery, int\],
# pyright says: Extra parameter "tries"
@bus.subscribe(Created)
async def three_parameters(order: Created, delivery: Delivery, tries: int) -> None: ...


# mypy says: incompatible type "def required_keyword\(order: Created, \*, database: str\)
# pyright says: Extra parameter "database"
@bus.subscribe(Created)
async def required_keyword(order: Created, *, database: str) -> None: ...


class Stock:
    # mypy says: incompatible type "Callable\[\[Stock, Created\],
    # pyright says: "Created" is not assignable to "Stock"
    @bus.subscribe(Created)
    # mypy says: "self" parameter missing
    async def reserve(self, order: Created) -> None: ...

    def release(self, order: Paid) -> None: ...


# mypy says: incompatible type "Callable\[\[Paid\], None\]"; expected "Callable\[\[Created\], None\]"
# pyright says: "Created" is incompatible with type "Paid"
bus.subscribe(Created)(Stock().release)


# mypy says: Argument 1 to "subscribe" .* incompatible type "Created"; expected "type\[Envelope\] \| str"
# pyright says: "Created" cannot be assigned to parameter "t1"
bus.subscribe(Created())


# mypy says: Argument 1 to "subscribe" .* incompatible type "Callable
# pyright says: cannot be assigned to parameter "t1"
@bus.subscribe
async def without_parentheses(order: Created) -> None: ...


# mypy says: Too few arguments for "subscribe"
# pyright says: Expected 1 more positional argument
bus.subscribe()


# mypy says: Argument "order" to "subscribe" .* incompatible type .*'keys'
# pyright says: "Literal\['keys'\]" cannot be assigned to parameter "order"
bus.subscribe(Created, order="keys")


# mypy says: Argument "retry" to "subscribe" .* incompatible type "int"; expected "RetryPolicy"
# pyright says: "Literal\[3\]" cannot be assigned to parameter "retry"
bus.subscribe(Created, retry=3)


# mypy says: Unexpected keyword argument "retries"
# pyright says: No parameter named "retries"
bus.subscribe(Created, retries=3)
