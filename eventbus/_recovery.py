"""The start: from what is stored to lanes that run.

Nothing is repaired at the start, for nothing is ever half done: the checkpoints say what was settled, the rows of `deliveries`
what waits, the dead letters what is being redriven; the log holds everything else. The start registers the subscriptions, claims
their lanes, and lets each of them read from its checkpoint. After a kill, a stop or a week it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eventbus._declared import Wanted
from eventbus._dispatch import Dispatcher
from eventbus._serving import Serving
from eventbus.stores.base import Instance, Register

if TYPE_CHECKING:
    from eventbus._journal import Journal
    from eventbus._membership import Membership


async def recover(
    dispatcher: Dispatcher, journal: Journal, membership: Membership, instance: Instance, wanted: Sequence[Wanted]
) -> None:
    """Join the instances that are there, register, claim, and build the lanes."""
    await membership.renew()  # so that those who have died are out of the way
    stored = await journal.command(Register(tuple(w.registration for w in wanted), instance.id))
    dispatcher.declared = {w.options.name for w in wanted}
    for each, subscribed in zip(wanted, stored, strict=True):
        if each.dispatched:
            serving = Serving(dispatcher, each.options, each.registration, subscribed)
            dispatcher.servings[each.options.name] = serving
    await membership.step()
