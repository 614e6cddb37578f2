"""Files and folders that README and pages name exist."""

import re
from pathlib import Path

import pytest
from page_blocks import PAGES, ROOT, blocks_of, page_id

FOLDERS = "csrc|lowrank_ext|tests|benchmarks|docs|examples"
IN_TEXT = re.compile(rf"`((?:{FOLDERS})/[\w./*-]*)`")
IN_TREE = re.compile(r"^( *)([\w.-]+/?|(?:[\w.-]+/)+[\w.-]+)(?:  .*)?$")


def paths_in_trees(page: Path) -> list[str]:
    """Of text blocks that open with one of FOLDERS: a path a line, whole or under its parents."""
    found = []
    for block in blocks_of(page):
        if block.language != "text" or not re.match(rf"(?:{FOLDERS})/", block.code):
            continue
        parents: list[tuple[int, str]] = []
        for line in block.code.splitlines():
            entry = IN_TREE.match(line)
            assert entry, f"{page}: two blanks must stand between a path and what it holds: {line}"
            indent, name = entry.groups()
            parents = [parent for parent in parents if parent[0] < len(indent)]
            is_whole = "/" in name.rstrip("/")
            found.append(name if is_whole else "".join(p for _, p in parents) + name)
            parents.append((len(indent), name))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_exist(page: Path) -> None:
    named = IN_TEXT.findall(page.read_text()) + paths_in_trees(page)
    missing = [path for path in named if not list(ROOT.glob(path))]
    assert missing == []


def test_trees_are_read() -> None:
    found = paths_in_trees(ROOT / "CONTRIBUTING.md")
    assert {"csrc/library.cpp", "csrc/cuda/common/", "docs/"} <= set(found)
