"""GitHub's webhooks through a bus: an index, a search table, and a notifier that fails now and then.

    python examples/github_webhooks.py FILE [--repeat-to N] [--db PATH] [--seed N]

FILE has one webhook a line: {"event": "push", "action": null, "payload": {…}}. Each becomes an event, some of them
of classes made for them, the rest of a generic one. Three subscriptions handle them all:

- `index` counts the events of each repository, in the order of their arrival (order="key", the key is the repository);
- `search` writes titles into a SQLite file of its own, a plain function (order="log");
- `notify` fails for some at first, for some until it is mended, and gives up on some at once (order="none").

At the end what they have done is compared with a count of the file made without the bus; exits with 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import attrs

from eventbus import Delivery, EventBus, Reject, RetryPolicy, event

CHUNK = 200
WORD = "README"
Webhooks = list[dict[str, Any]]

# ------------------------------------------------------------------ the events


@attrs.frozen(kw_only=True)
class GitHubEvent:
    """What all have: the number of the delivery, GitHub's name of the kind, whose repository, what has happened, and a title."""

    delivery: int
    kind: str
    repository: str
    action: str | None
    title: str


@attrs.frozen
class Commit:
    id: str
    message: str
    timestamp: datetime


@event("github.push", key="repository")
@attrs.frozen(kw_only=True)
class Push(GitHubEvent):
    ref: str
    after: str
    forced: bool
    commits: tuple[Commit, ...]

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Push:
        commits = tuple(
            Commit(each["id"], each["message"], datetime.fromisoformat(each["timestamp"])) for each in payload["commits"]
        )
        title = commits[-1].message if commits else payload["ref"]
        return cls(title=title, ref=payload["ref"], after=payload["after"], forced=payload["forced"], commits=commits, **common)


@event("github.issue", key="repository")
@attrs.frozen(kw_only=True)
class Issue(GitHubEvent):
    number: int
    user: str
    labels: frozenset[str]
    created_at: datetime

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Issue:
        issue = payload["issue"]
        return cls(
            number=issue["number"],
            title=issue["title"],
            user=issue["user"]["login"],
            labels=frozenset(label["name"] for label in issue.get("labels") or ()),
            created_at=datetime.fromisoformat(issue["created_at"]),
            **common,
        )


@event("github.pull_request", key="repository")
@attrs.frozen(kw_only=True)
class PullRequest(GitHubEvent):
    number: int
    head: str
    base: str
    merged: bool
    created_at: datetime

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> PullRequest:
        pull = payload["pull_request"]
        return cls(
            number=payload["number"],
            title=pull["title"],
            head=pull["head"]["ref"],
            base=pull["base"]["ref"],
            merged=bool(pull.get("merged")),
            created_at=datetime.fromisoformat(pull["created_at"]),
            **common,
        )


@event("github.release", key="repository")
@attrs.frozen(kw_only=True)
class Release(GitHubEvent):
    tag: str
    prerelease: bool
    published_at: datetime | None

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Release:
        release = payload["release"]
        published = release["published_at"]
        return cls(
            tag=release["tag_name"],
            title=release["name"] or release["tag_name"],
            prerelease=release["prerelease"],
            published_at=None if published is None else datetime.fromisoformat(published),
            **common,
        )


@event("github.star", key="repository")
@attrs.frozen(kw_only=True)
class Star(GitHubEvent):
    user: str
    starred_at: datetime | None

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Star:
        at, user = payload["starred_at"], payload["sender"]["login"]
        return cls(title=user, user=user, starred_at=None if at is None else datetime.fromisoformat(at), **common)


@event("github.webhook", key="repository")
@attrs.frozen(kw_only=True)
class Webhook(GitHubEvent):
    """Any other, as it came."""

    payload: dict[str, Any]

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Webhook:
        return cls(title=f"{common['kind']} {common['action']}", payload=payload, **common)


CLASSES: dict[str, type[Push | Issue | PullRequest | Release | Star]] = {
    "push": Push,
    "issues": Issue,
    "pull_request": PullRequest,
    "release": Release,
    "star": Star,
}


def repository_of(webhook: dict[str, Any]) -> str:
    """Whose event it is; those of an organization or an installation belong to none."""
    return str((webhook["payload"].get("repository") or {}).get("full_name", "(none)"))


def event_of(webhook: dict[str, Any], delivery: int) -> GitHubEvent:
    """The event that a webhook stands for."""
    kind, action, repository = webhook["event"], webhook["action"], repository_of(webhook)
    cls = CLASSES.get(kind, Webhook)
    return cls.parse(webhook["payload"], delivery=delivery, kind=kind, repository=repository, action=action)


def repeated(webhooks: Webhooks, total: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The webhooks, over and over, with the numbers of their deliveries."""
    return ((number, webhooks[number % len(webhooks)]) for number in range(total))


# ------------------------------------------------------------------ what is done with them


@attrs.define
class Repository:
    """What the index knows of one: how many events of each kind, and a checksum over the numbers in the order they came in."""

    kinds: Counter[str] = attrs.field(factory=Counter)
    chain: int = 0

    def add(self, kind: str, delivery: int) -> None:
        self.kinds[kind] += 1
        self.chain = zlib.crc32(str(delivery).encode(), self.chain)


@attrs.define
class Done:
    """What was done, by the bus or by the count without it.

    Attributes:
        index: by repository. documents: rows of the search table, by kind. found: rows with WORD in the title.
        handled: by subscription. retried: deliveries to notify that were tried again. dead: its dead letters, by error.
        mended: dead letters that were redriven well. rejected: those that stay.
    """

    index: dict[str, Repository] = attrs.field(factory=lambda: defaultdict(Repository))
    documents: Counter[str] = attrs.field(factory=Counter)
    found: int = 0
    handled: Counter[str] = attrs.field(factory=Counter)
    retried: int = 0
    dead: Counter[str] = attrs.field(factory=Counter)
    mended: int = 0
    rejected: int = 0


def mishap(seed: int, delivery: int) -> str:
    """What the notifier will meet: "" or what goes wrong; the same for each attempt."""
    chance = random.Random(f"{seed}/{delivery}").random()
    return "rejected" if chance < 0.005 else "down" if chance < 0.015 else "slow" if chance < 0.065 else ""


class Search:
    """A table of titles in a SQLite file of its own; adding an event twice adds it once."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
            "CREATE TABLE documents (event_id TEXT PRIMARY KEY, kind TEXT, repository TEXT, title TEXT) WITHOUT ROWID"
        )

    def add(self, event_id: str, event: GitHubEvent) -> None:
        row = (event_id, event.kind, event.repository, event.title)
        self._database.execute("INSERT OR IGNORE INTO documents VALUES (?, ?, ?, ?)", row)

    def kinds(self) -> Counter[str]:
        return Counter(dict(self._database.execute("SELECT kind, count(*) FROM documents GROUP BY kind")))

    def count(self, word: str) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM documents WHERE instr(title, ?)", (word,)).fetchone()
        return int(count)

    def close(self) -> None:
        self._database.close()


@attrs.define
class Service:
    """The bus and its three subscriptions: to the base class, which stands for all its subclasses."""

    bus: EventBus
    search: Search
    seed: int
    done: Done = attrs.field(factory=Done)
    mended: bool = False

    def __attrs_post_init__(self) -> None:
        self.bus.subscribe(GitHubEvent, name="index", order="key")(self.on_index)
        self.bus.subscribe(GitHubEvent, name="search", order="log")(self.on_search)
        patience = RetryPolicy(attempts=3, first=0.01, factor=2)
        self.bus.subscribe(GitHubEvent, name="notify", order="none", retry=patience)(self.on_notify)

    async def on_index(self, event: GitHubEvent) -> None:
        self.done.index[event.repository].add(event.kind, event.delivery)
        self.done.handled["index"] += 1

    def on_search(self, event: GitHubEvent, delivery: Delivery) -> None:  # in a thread
        self.search.add(delivery.envelope.id, event)
        self.done.handled["search"] += 1

    async def on_notify(self, event: GitHubEvent, delivery: Delivery) -> None:
        trouble = mishap(self.seed, event.delivery)
        if trouble == "rejected":
            raise Reject("nobody to tell")
        if trouble == "down" and not self.mended:
            self.done.retried += delivery.attempt == 1
            raise ConnectionError("the mail server is down")
        if trouble == "slow" and delivery.attempt == 1:
            self.done.retried += 1
            raise TimeoutError("the mail server took too long")
        self.done.handled["notify"] += 1


async def through_the_bus(service: Service, webhooks: Webhooks, total: int) -> None:
    """Publish all, wait until all is handled, then mend the notifier and redrive what it gave up on."""
    bus, done = service.bus, service.done
    async with bus:
        await publish(bus, webhooks, total)
        await settle(bus, f"{total:,} published")
        done.dead = Counter(letter.error_type for letter in await bus.dead_letters.list(subscription="notify"))
        before, service.mended = done.handled["notify"], True
        again = await bus.dead_letters.redrive(error=ConnectionError)
        await settle(bus, f"{again:,} dead letters redriven")
        done.mended = done.handled["notify"] - before
        done.rejected = len(await bus.dead_letters.list())
        await compare_log(bus, webhooks, total)


async def publish(bus: EventBus, webhooks: Webhooks, total: int) -> None:
    """All webhooks, so many in a transaction."""
    began, chunk = time.monotonic(), []
    for number, webhook in repeated(webhooks, total):
        chunk.append(event_of(webhook, number))
        if len(chunk) == CHUNK or number == total - 1:
            await bus.publish_many(chunk)
            chunk = []
        if (number + 1) % 10_000 == 0:
            show(f"{number + 1:,} published, {(number + 1) / (time.monotonic() - began):,.0f}/s")


async def settle(bus: EventBus, after: str) -> None:
    """Wait until nothing is left to handle."""
    show(f"{after}; waiting for the handlers")
    if left := await bus.drain():
        raise SystemExit(f"not settled: {dict(left)}")


async def compare_log(bus: EventBus, webhooks: Webhooks, total: int) -> None:
    """What is in the log must be what was put in; of what is repeated, the first time is read."""
    published = repeated(webhooks, min(total, len(webhooks)))
    log = bus.history(GitHubEvent)
    async for envelope in log:
        number, webhook = next(published, (0, None))
        if webhook is None:
            break
        if envelope.event != event_of(webhook, number):
            raise SystemExit(f"webhook {number} came out of the log as another: {envelope.event}")
    show("the log holds what was published")


# ------------------------------------------------------------------ the same without the bus


def title_of(webhook: dict[str, Any]) -> str:
    """The title, straight from the payload."""
    kind, payload = webhook["event"], webhook["payload"]
    match kind:
        case "push":
            return str(payload["commits"][-1]["message"] if payload["commits"] else payload["ref"])
        case "issues":
            return str(payload["issue"]["title"])
        case "pull_request":
            return str(payload["pull_request"]["title"])
        case "release":
            return str(payload["release"]["name"] or payload["release"]["tag_name"])
        case "star":
            return str(payload["sender"]["login"])
        case _:
            return f"{kind} {webhook['action']}"


def without_the_bus(webhooks: Webhooks, total: int, seed: int) -> Done:
    """The same, counted directly."""
    done, met = Done(), Counter[str]()
    for number, webhook in repeated(webhooks, total):
        done.index[repository_of(webhook)].add(webhook["event"], number)
        done.documents[webhook["event"]] += 1
        done.found += WORD in title_of(webhook)
        met[mishap(seed, number)] += 1
    done.retried = met["slow"] + met["down"]
    done.dead = +Counter(ConnectionError=met["down"], Reject=met["rejected"])
    done.mended, done.rejected = met["down"], met["rejected"]
    done.handled = Counter(index=total, search=total, notify=total - met["rejected"])
    return done


def differences(done: Done, expected: Done) -> list[str]:
    """In what the two are not the same."""
    fields = [field.name for field in attrs.fields(Done)]
    return [
        f"{name}: {getattr(done, name)}; without the bus {getattr(expected, name)}"
        for name in fields
        if getattr(done, name) != getattr(expected, name)
    ]


# ------------------------------------------------------------------ the command


def show(text: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024 * 1024)
    print(f"{text} (memory so far at most {peak:,.0f} MB)", flush=True)


def report(done: Done, seconds: float) -> None:
    """What was handled, retried and dead-lettered."""
    print(f"\nafter {seconds:.1f} s:")
    for name in ("index", "search", "notify"):
        print(f"  {name:<7} handled {done.handled[name]:>9,}")
    print(f"  notify  retried {done.retried:>9,}")
    print(f"  notify  dead-lettered: {', '.join(f'{count:,} {error}' for error, count in sorted(done.dead.items())) or 'none'}")
    print(f"  notify  redriven with success {done.mended:,}; still dead {done.rejected:,}")
    print(f"  search  {done.documents.total():,} rows, {done.found:,} of them with {WORD} in the title")
    print("  index  ", end="")
    busiest = sorted(done.index.items(), key=lambda item: -item[1].kinds.total())[:3]
    print(
        ", ".join(f" {name}: {repository.kinds.total():,}" for name, repository in busiest), f"of {len(done.index)} repositories"
    )


def search_file(database: Path) -> Path:
    return database.with_name(database.name + ".search")


def run(webhooks: Webhooks, total: int, seed: int, database: Path) -> int:
    """All of it; returns the exit code."""
    began = time.monotonic()
    with closing(Search(search_file(database))) as search:
        service = Service(EventBus(database), search, seed)
        anyio.run(through_the_bus, service, webhooks, total)
        service.done.documents, service.done.found = search.kinds(), search.count(WORD)
    report(service.done, time.monotonic() - began)
    wrong = differences(service.done, without_the_bus(webhooks, total, seed))
    print(
        "\n"
        + ("\n".join(["DIFFERENT from the count without the bus:", *wrong]) if wrong else "the same as counted without the bus")
    )
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="GitHub's webhooks through a bus.")
    parser.add_argument("file", type=Path, help='one webhook a line: {"event": …, "action": …, "payload": {…}}')
    parser.add_argument("--repeat-to", type=int, metavar="N", help="repeat them up to so many events (100,000 take 1 GB of disk)")
    parser.add_argument("--db", type=Path, metavar="PATH", help="a new file, which is kept (default: one that is removed)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.db is not None and (options.db.exists() or search_file(options.db).exists()):
        parser.error(f"{options.db} or {search_file(options.db)} exists; what is in it would be counted, too")
    logging.getLogger("eventbus").setLevel(logging.CRITICAL)  # the failures are wanted
    webhooks: Webhooks = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
    folder = Path(tempfile.mkdtemp(prefix="github-webhooks-")) if options.db is None else None
    try:
        total = len(webhooks) if options.repeat_to is None else options.repeat_to
        return run(webhooks, total, options.seed, options.db if folder is None else folder / "webhooks.db")
    finally:
        if folder is not None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
