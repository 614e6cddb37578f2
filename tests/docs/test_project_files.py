"""CITATION.cff, the issue templates, the README's picture, and the links of all pages."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from page_blocks import PAGES, ROOT, page_id
from PIL import Image

import lowrank_ext

TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"


def test_citation() -> None:
    """The fields that Citation File Format 1.2.0 requires, and the version of the package."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The lowrank_ext authors"}]
    assert citation["version"] == lowrank_ext.__version__


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_templates_are_forms(name: str) -> None:
    form = yaml.safe_load((TEMPLATES / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_a_bug_report_asks_for_the_doctor() -> None:
    form = yaml.safe_load((TEMPLATES / "bug.yml").read_text())
    (field,) = [f for f in form["body"] if "lowrank-ext doctor --json" in f["attributes"]["label"]]
    assert field["validations"]["required"]


def sizes_of_gain(drawn: dict) -> list[int]:
    return [len(drawn["step"]), len(drawn["saved"]), sum(map(len, drawn["layers"].values()))]


def sizes_of_depthwise(drawn: dict) -> list[int]:
    return [len(by_candidate) for by_slots in drawn.values() for by_candidate in by_slots.values()]


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [("gain", sizes_of_gain, [4, 3, 320]), ("depthwise", sizes_of_depthwise, [8] * 6)],
)
def test_a_picture_shows_the_committed_results(
    tmp_path: Path, name: str, sizes: Callable[[dict], list[int]], expected: list[int]
) -> None:
    """What is drawn stands in the picture's metadata."""
    drawn = tmp_path / "drawn.png"
    script = ROOT / "benchmarks" / f"plot_{name}.py"
    subprocess.run([sys.executable, script, "--out", drawn], check=True, timeout=120)
    committed = ROOT / "docs" / "pictures" / f"{name}.png"
    now, then = (json.loads(Image.open(p).text["Description"]) for p in (drawn, committed))
    assert now == then
    assert sizes(now) == expected


# ------------------------------------------------------------------------------------------- links


def links_of(page: Path) -> list[str]:
    """Targets of the links and pictures of a page."""
    tokens = [
        child
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text())
        for child in token.children or []
    ]
    return [
        t.attrs.get("href") or t.attrs["src"] for t in tokens if t.type in ("link_open", "image")
    ]


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs both write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors_of(file), link
