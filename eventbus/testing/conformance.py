"""One suite for every store: what `eventbus.stores.base` says in words, said in tests.

publish → journal → *store* → lanes → workers → outcome. In comes a store, made by you; out comes whether the bus can rely on it.
Authors of stores subclass `StoreConformance` in their own tests and let pytest collect it:

    from eventbus.testing.conformance import StoreConformance

    class TestMyStore(StoreConformance):
        def make_store(self, directory):
            return MyStore(directory / "my.store")

    class TestMyStoreInMemory(StoreConformance):
        persistent = False          # skips what opens the store again

        def make_store(self, directory):
            return MyStore(None)

`make_store` returns a store that is not open. Called again with the same directory it returns a store on the same things; a
new directory is a new store. The suite needs pytest, and nothing of the bus but the records of `eventbus.stores.base`. It uses
no clock and does not sleep.
"""

from __future__ import annotations

import pytest

# Before they are imported, so that a failed assertion says what was found.
for _part in ("base", "commands", "generations", "instances", "log", "outcomes", "park"):
    pytest.register_assert_rewrite(f"eventbus.testing._conformance_{_part}")

from eventbus.testing import _conformance_commands as _commands  # noqa: E402
from eventbus.testing import _conformance_generations as _generations  # noqa: E402
from eventbus.testing import _conformance_instances as _instances  # noqa: E402
from eventbus.testing import _conformance_log as _log  # noqa: E402
from eventbus.testing import _conformance_outcomes as _outcomes  # noqa: E402
from eventbus.testing import _conformance_park as _park  # noqa: E402

__all__ = ["StoreConformance"]


class StoreConformance(
    _log.Positions,
    _log.Pages,
    _log.Idempotency,
    _log.Scheduled,
    _outcomes.Units,
    _outcomes.PublishedKeys,
    _outcomes.WaitingDeliveries,
    _outcomes.DeadLettersKept,
    _park.ParkedKeys,
    _commands.Commands,
    _commands.Registering,
    _commands.Claiming,
    _commands.Rewinding,
    _commands.Pruning,
    _generations.Generations,
    _instances.Instances,
    _instances.OnProbation,
    _instances.Reviving,
):
    """Subclass it and define `make_store`; see the module.

    Attributes:
        persistent: whether what was committed is there when the store is opened again; set it to False for a store that
            keeps nothing.
        tells_deaths: whether the store can tell an instance that has died from one whose lease has ended; of interest where
            instances may share it. Set it to False where only leases tell.
    """
