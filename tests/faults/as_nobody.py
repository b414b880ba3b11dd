"""Opens a bus and publishes one event as a user who owns nothing; run by `test_file_trouble`.

    python -m tests.faults.as_nobody DATABASE

Prints what came of it: "published", or the class of the error and its message. Whatever Python could have to look up later is
imported before, since that user may not be allowed to read it.
"""

from __future__ import annotations

import encodings.ascii
import encodings.idna
import os
import sys

import anyio
import anyio._backends._asyncio
import attrs
import sqlite_utils

import eventbus._replay
import eventbus._running
from eventbus import EventBus, EventBusError
from eventbus.stores._sqlite_members import boot

NOBODY = 65_534
_LOADED = (encodings.ascii, encodings.idna, anyio._backends._asyncio, sqlite_utils, eventbus._replay, eventbus._running)


@attrs.frozen
class Noted:
    n: int


async def main(path: str) -> str:
    """Publish one event."""
    try:
        async with EventBus(path) as bus:
            await bus.publish(Noted(1))
    except EventBusError as error:
        return f"{type(error).__name__}: {error}"
    return "published"


if __name__ == "__main__":
    boot()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.stdout.write(anyio.run(main, sys.argv[1]))
