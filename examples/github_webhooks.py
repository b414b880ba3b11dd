"""GitHub's webhooks through a bus: an index, a search table, and a notifier that fails now and then.

    python examples/github_webhooks.py FILE [--repeat-to N] [--db PATH] [--seed N]

FILE has one webhook a line: {"event": "push", "action": null, "payload": {…}}. Each becomes an event, some of them of classes made
for them, the rest of a generic one. Three subscriptions handle them all:

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
from typing import Any, ClassVar

import anyio
import attrs

from eventbus import Delivery, EventBus, Reject, RetryPolicy, event

CHUNK = 200
WORD = "README"
Webhooks = list[dict[str, Any]]

# ------------------------------------------------------------------ the events


@attrs.frozen(kw_only=True)
class GitHubEvent:
    """What all have: the number of the delivery, whose repository, and what has happened."""

    delivery: int
    repository: str
    action: str | None


@attrs.frozen
class Commit:
    id: str
    message: str
    timestamp: datetime


@event("github.push", key="repository")
@attrs.frozen(kw_only=True)
class Push(GitHubEvent):
    kind: ClassVar = "push"
    ref: str
    after: str
    forced: bool
    commits: tuple[Commit, ...]

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Push:
        commits = tuple(
            Commit(each["id"], each["message"], datetime.fromisoformat(each["timestamp"])) for each in payload["commits"]
        )
        return cls(ref=payload["ref"], after=payload["after"], forced=payload["forced"], commits=commits, **common)

    @property
    def title(self) -> str:
        return self.commits[-1].message if self.commits else self.ref


@event("github.issue", key="repository")
@attrs.frozen(kw_only=True)
class Issue(GitHubEvent):
    kind: ClassVar = "issues"
    number: int
    title: str
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
    kind: ClassVar = "pull_request"
    number: int
    title: str
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
    kind: ClassVar = "release"
    tag: str
    title: str
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
    kind: ClassVar = "star"
    user: str
    starred_at: datetime | None

    @classmethod
    def parse(cls, payload: dict[str, Any], **common: Any) -> Star:
        at = payload["starred_at"]
        return cls(user=payload["sender"]["login"], starred_at=None if at is None else datetime.fromisoformat(at), **common)

    @property
    def title(self) -> str:
        return self.user


@event("github.webhook", key="repository")
@attrs.frozen(kw_only=True)
class Webhook(GitHubEvent):
    """Any other, as it came."""

    kind: str
    payload: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.kind} {self.action}"


AnyEvent = Push | Issue | PullRequest | Release | Star | Webhook
TYPED: tuple[type[Push | Issue | PullRequest | Release | Star], ...] = (Push, Issue, PullRequest, Release, Star)
PARSERS = {cls.kind: cls.parse for cls in TYPED}


def repository_of(webhook: dict[str, Any]) -> str:
    """Whose event it is; those of an organization or an installation belong to none."""
    return str((webhook["payload"].get("repository") or {}).get("full_name", "(none)"))


def event_of(webhook: dict[str, Any], delivery: int) -> AnyEvent:
    """The event that a webhook stands for."""
    common = {"delivery": delivery, "repository": repository_of(webhook), "action": webhook["action"]}
    parse = PARSERS.get(webhook["event"])
    if parse is None:
        return Webhook(kind=webhook["event"], payload=webhook["payload"], **common)
    return parse(webhook["payload"], **common)


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
        index: by repository. documents: rows of the search table by kind. found: rows whose title has the WORD.
        notified: deliveries that ended well before the repair. retried: those among all that failed at first.
        dead: dead letters by error, before the repair. mended: those redriven well after it. rejected: those left.
    """

    index: dict[str, Repository] = attrs.field(factory=lambda: defaultdict(Repository))
    documents: Counter[str] = attrs.field(factory=Counter)
    found: int = 0
    notified: int = 0
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
            "CREATE TABLE IF NOT EXISTS documents (event_id TEXT PRIMARY KEY, kind TEXT, repository TEXT, title TEXT) WITHOUT ROWID"
        )

    def add(self, event_id: str, event: AnyEvent) -> None:
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
    """The bus and its three subscriptions."""

    bus: EventBus
    search: Search
    seed: int
    done: Done = attrs.field(factory=Done)
    mended: bool = False

    def subscribe(self) -> None:
        """Declare the subscriptions: to the base class, which stands for all its subclasses."""
        all_kinds = {"order": "log", "name": "search"}
        assert all_kinds
        self.bus.subscribe(GitHubEvent, name="index", order="key")(self._index)
        self.bus.subscribe(GitHubEvent, name="search", order="log")(self._search)
        patience = RetryPolicy(attempts=3, first=0.01, factor=2)
        self.bus.subscribe(GitHubEvent, name="notify", order="none", retry=patience)(self._notify)
