"""The pages of the documentation as tests see them: their code blocks, headings, links and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import attrs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_FIRST_CELL = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@attrs.frozen
class Block:
    """A fenced block. `line` is the number, from 1, of its first line of text; `info` stands behind the fence."""

    info: str
    text: str
    line: int


@attrs.frozen
class Section:
    """A heading and what stands under it, up to the next heading of any level."""

    level: int
    title: str
    text: str


@attrs.frozen
class Page:
    """A page of Markdown."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Its path within the project."""
        return self.path.relative_to(ROOT).as_posix()

    def blocks(self) -> list[Block]:
        """Its fenced blocks, in order."""
        return blocks_of(self.text)

    def prose(self) -> str:
        """The page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    def anchors(self) -> set[str]:
        """What `#…` may name, as GitHub makes it of headings."""
        return {_slug(title) for _, title in _HEADING.findall(self.prose())}

    def links(self) -> list[str]:
        """The targets of its links."""
        return _LINK.findall(self.prose())

    def sections(self) -> Iterator[Section]:
        """Its headings with their texts; a `#` inside a fenced block is no heading."""
        blank = _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), self.text)
        found = list(_HEADING.finditer(blank))
        for heading, following in zip(found, [*found[1:], None], strict=True):
            end = len(self.text) if following is None else following.start()
            yield Section(len(heading[1]), heading[2], self.text[heading.end() : end])


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a text."""
    return [
        Block(fence["info"].strip(), fence["text"], text.count("\n", 0, fence.start("text")) + 1)
        for fence in _FENCE.finditer(text)
    ]


def first_cells(text: str) -> list[str]:
    """The first cells of tables, where they hold code."""
    return _FIRST_CELL.findall(text)


def page(name: str) -> Page:
    """A page by its path within the project."""
    path = ROOT / name
    return Page(path, path.read_text(encoding="utf-8"))


def pages() -> list[Page]:
    """The README, the changelog and everything under docs/."""
    paths = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
    return [Page(path, path.read_text(encoding="utf-8")) for path in paths]


def tree_of(text: str) -> dict[str, str | None]:
    """A tree drawn with ├── and └──: each name with the name above it."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        drawn = re.match(r"^( *(?:[│├└─ ]*))([A-Z]\w+)(?:\s|$)", line)
        if drawn is None or ("─" not in drawn[1] and line.strip() != drawn[2]):
            continue
        column, name = len(drawn[1]), drawn[2]
        while above and above[-1][0] >= column:
            above.pop()
        parents[name] = above[-1][1] if above else None
        above.append((column, name))
    return parents


def _slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
