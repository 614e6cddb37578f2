"""The code blocks of the README and of the pages, as the tests of this folder read them.

A block is a fence of one of LANGUAGES. An HTML comment just before it may say more:

    <!-- fragment: reason -->            the block is not run, for this reason
    <!-- from: benchmarks/results/F -->  the block stands in F word for word, a table's figures do
    <!-- hidden python                   run before the blocks that follow, not shown to readers
    ...
    -->
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = ("python", "bash", "text")  # text: formulas and output, nothing to run

_COMMENT = re.compile(r"<!-- (fragment|from): (.+) -->|<!-- (hidden) python\n(.*)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fence, one hidden block of Python, or one table that names its source."""

    language: str  # "table" for a table; "" for an indented block, which no page may have
    code: str
    line: int  # of the page, where the code begins; 1 is the first
    fragment: str | None = None  # why it is not run
    source: str | None = None  # the file that it was copied from


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page in their order, hidden ones included."""
    return read_blocks(page.read_text())


def read_blocks(text: str) -> list[Block]:
    """The blocks of a page's text."""
    lines = text.splitlines()
    blocks, marks = [], dict[str, str]()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        comment = _COMMENT.match(token.content) if token.type == "html_block" else None
        if comment and comment[3]:
            blocks.append(Block("python", comment[4], token.map[0] + 2))
        elif comment:
            marks[comment[1]] = comment[2]
        elif block := _block(token, lines, marks):
            blocks.append(block)
            marks = {}
    if marks:
        raise ValueError(f"a comment has no block after it: {marks}")
    return blocks


def _block(token: Token, lines: list[str], marks: dict[str, str]) -> Block | None:
    fragment, source = marks.get("fragment"), marks.get("from")
    if token.type == "fence":
        return Block(token.info, token.content, token.map[0] + 2, fragment, source)
    if token.type == "code_block":
        return Block("", token.content, token.map[0] + 1)
    if token.type == "table_open" and source:
        table = "\n".join(lines[token.map[0] : token.map[1]])
        return Block("table", table, token.map[0] + 1, source=source)
    return None
