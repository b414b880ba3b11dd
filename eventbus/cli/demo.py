"""`python -m eventbus demo`: a shop on a bus, killed in mid-stream, started again, and judged.

The shop runs in a process of its own (`demo_child`), which tells this one what it does (`demo_reports`). This process kills it,
starts it again, shows what happens (`demo_show`), and in the end opens the file and checks what it was told (`demo_check`).
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import attrs

from eventbus import EventBus
from eventbus.cli.demo_check import Evidence, Stored, check
from eventbus.cli.demo_child import CROWD, RATE
from eventbus.cli.demo_process import Process
from eventbus.cli.demo_reports import AllPublished, Attempt, Closed, Drained, Opened, Published, Replayed, Report, Tally
from eventbus.cli.demo_shop import TAKES, OrderCreated, OrderShipped, PaymentTaken, shop_event
from eventbus.cli.demo_show import Screen, table, verdict

SUMMARY = "a shop's events, a kill, a recovery, a replay; about 10 seconds"
DESCRIPTION = (
    "Publishes a shop's events to three subscriptions in a SQLite file, kills the process with SIGKILL in mid-stream, starts it "
    "again, replays, and checks that nothing acknowledged was lost, out of order, or missed. Exits with 0 only then."
)

FEWEST = 200
"""Events below which the kill could come too late."""

_SILENCE = 10.0
_START = 3.0
_SELL = 6.0
_REST = 10.0
"""Seconds: without a word from the child before it is given up; allowed for its start; allowed to publish, at least; allowed
for draining and replaying."""


class DemoFailed(Exception):
    """The demo could not be played to its end."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--events", type=int, default=6000, metavar="N", help="events to publish (default: 6000)")
    parser.add_argument("--db", type=Path, metavar="PATH", help="a new file, which is kept (default: one that is removed)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the same shop again (default: by chance)")


def run(options: argparse.Namespace) -> int:
    """Play the demo; 0 if everything that was checked holds."""
    if options.events < FEWEST:
        print(f"--events {options.events}: at least {FEWEST}, so that there is a stream to kill it in")
        return 2
    if options.db is not None and options.db.exists():
        print(f"--db {options.db}: this file exists; the demo needs a new one")
        return 2
    seed = random.SystemRandom().randrange(10_000) if options.seed is None else options.seed
    folder = None if options.db is not None else Path(tempfile.mkdtemp(prefix="eventbus-demo-"))
    database = options.db if folder is None else folder / "shop.db"
    good = play(Demo(seed, options.events, str(database), Screen()))
    if folder is not None and good:
        shutil.rmtree(folder)
    else:
        print(f"\nThe file is kept: {database} (any SQLite tool opens it; see the tables events, lanes, dead_letters)")
    return 0 if good else 1


def play(demo: Demo) -> bool:
    """Play it, show the table and the verdict."""
    try:
        evidence = demo.play()
    except DemoFailed as error:
        demo.screen.say(f"FAILED: {error}")
        return False
    except KeyboardInterrupt:
        demo.screen.say("interrupted")
        return False
    checks = check(evidence)
    for line in ["", *table(evidence), "", *verdict(checks)]:
        demo.screen.plain(line)
    return not any(each.faults for each in checks)


@attrs.define
class Demo:
    """One play: what is to happen, and what was reported so far."""

    seed: int
    events: int
    database: str
    screen: Screen
    tally: Tally = attrs.field(factory=Tally)
    replayed: Replayed | None = None

    def play(self) -> Evidence:
        """All acts, and what they leave to judge by.

        Raises:
            DemoFailed: the child did not do its part.
        """
        self.screen.say(
            f"the file is {self.database}; {self.events:,} events to come; --seed {self.seed} plays the same shop again"
        )
        with self._start() as before:
            self._sell_and_kill(before)
        with self._start() as after:
            self._recover_and_finish(after, set(self.tally.owed))
        self.screen.say("reading the file, and comparing it with what was reported")
        stored, dead, lag = anyio.run(read_file, self.database)
        return Evidence(self.seed, (before.run(), after.run()), stored, dead, lag, self.replayed)

    def _start(self) -> Process:
        first = next((n for n in range(self.events) if n not in self.tally.acknowledged), self.events)
        process = Process(self.database, seed=self.seed, first=first, events=self.events, seconds=self._seconds())
        since = f" from event {first:,}, the first without an acknowledgement" if first else ""
        self.screen.say(f"process {process.pid} starts to publish and to handle{since}")
        return process

    def _seconds(self) -> float:
        """How long one process may publish: more than half of the events take, if the disk is as fast as the customers."""
        return max(_SELL, 0.8 * self.events / RATE)

    def _listen(self, process: Process) -> Iterator[Report | None]:
        until = time.monotonic() + _START + self._seconds() + _REST
        for report in process.listen(silence=_SILENCE, until=until):
            self._count(report)
            yield report

    def _count(self, report: Report | None) -> None:
        if isinstance(report, Published):
            self.tally.acknowledge(report, shop_event(self.seed, report.number))
        elif isinstance(report, Attempt):
            self.tally.attempted(report)
        if self.tally.acknowledged:
            self.screen.progress(self._standing())

    def _standing(self) -> str:
        tally = self.tally
        handled = "  ".join(f"{name} {tally.handled[name]:>5,}" for name in TAKES)
        published, retried = len(tally.acknowledged), len(tally.retried)
        return f"published {published:>5,}   handled: {handled}   retried {retried:>3,}  dead {tally.dead:>2,}"

    # -------------------------------------------------------------- the first process

    def _sell_and_kill(self, process: Process) -> None:
        kill_at, late = random.Random(self.seed).uniform(0.4, 0.5) * self.events, time.monotonic() + _START + self._seconds()
        killed = False
        for report in self._listen(process):
            if isinstance(report, Opened):
                self.screen.say("the bus is open: the shop sells, three subscriptions handle, one of them fails at times")
            elif not killed and (self._ripe(kill_at) or time.monotonic() > late):
                process.kill()
                killed = True
        code = process.wait()
        if code != -signal.SIGKILL:
            raise DemoFailed(f"the process ended by itself, with exit code {code}; what it says stands above")
        if any(isinstance(report, AllPublished) for report in process.reports):
            raise DemoFailed("the kill came too late, when all was published; try more --events")
        self.screen.say(
            f"SIGKILL: process {process.pid} is dead in mid-stream, {len(self.tally.acknowledged):,} events acknowledged, "
            f"{len(self.tally.owed):,} deliveries of them not finished"
        )

    def _ripe(self, kill_at: float) -> bool:
        """Whether this is the moment: about half is published, and much is under way."""
        published = len(self.tally.acknowledged)
        return published >= kill_at and (len(self.tally.owed) >= CROWD or published >= kill_at * 1.1)

    # -------------------------------------------------------------- the second process

    def _recover_and_finish(self, process: Process, owed: set[tuple[str, int]]) -> None:
        recovered = False
        for report in self._listen(process):
            if not recovered and isinstance(report, Attempt) and self.tally.owed.isdisjoint(owed):
                recovered = True
                self.screen.say("recovered: every event acknowledged before the kill is handled or a dead letter")
            self._narrate(report)
        code = process.wait()
        if code != 0 or not any(isinstance(report, Closed) for report in process.reports):
            raise DemoFailed(f"the process did not finish; its exit code is {code}; {self._standing()}")

    def _narrate(self, report: Report | None) -> None:
        say = self.screen.say
        if isinstance(report, Opened):
            say("the bus is open again: it delivers what was not settled, then what is new")
        elif isinstance(report, AllPublished):
            self._narrate_published()
        elif isinstance(report, Drained):
            left = ", ".join(f"{count:,} of {name}" for name, count in report.left.items()) or "nothing"
            say(f"drained; left: {left}")
        elif isinstance(report, Replayed):
            self.replayed = report
            say(
                f"replayed {report.events:,} events to the {report.to} in {report.seconds:.1f} s; "
                f"the payments come to {report.takings} once more"
            )
        elif isinstance(report, Closed):
            say("the bus is closed")

    def _narrate_published(self) -> None:
        published = len(self.tally.acknowledged)
        slow = "this machine is slower than the shop's customers, so it stops here"
        self.screen.say(
            f"all {published:,} are published" if published == self.events else f"{published:,} are published; {slow}"
        )
        if self.tally.unheard:
            told = "sent again, they were told by their idempotency keys and not stored twice"
            self.screen.say(f"{self.tally.unheard:,} of them had reached the file unacknowledged before the kill; {told}")


async def read_file(database: str) -> tuple[list[Stored], frozenset[tuple[str, str]], dict[str, int]]:
    """What the file holds: its log, its dead letters, and how much of it each subscription has not settled."""
    logging.getLogger("eventbus").setLevel(logging.ERROR)  # it would warn that no one handles the events here
    bus = EventBus(database, name="demo check")
    async with bus.open(dispatch=False):
        log = bus.history(OrderCreated, PaymentTaken, OrderShipped)
        stored = [Stored(envelope.position, envelope.id, envelope.event) async for envelope in log]
        dead = frozenset((letter.subscription, letter.envelope.id) for letter in await bus.dead_letters.list())
        lag = {name: each.lag for name, each in (await bus.stats()).subscriptions.items()}
    return stored, dead, lag
