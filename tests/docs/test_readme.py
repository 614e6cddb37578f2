"""The README: its first example, the lines in its table of methods, its links to the pages."""

import re
from pathlib import Path

import peft
import pytest
import torch
from page_blocks import ROOT, blocks_of
from page_models import llama, unet

import lowrank_ext as lr

README = ROOT / "README.md"
MAX_LINES, MAX_EXAMPLE_LINES = 130, 10
STARTS_OFF_BASE = "GOAT"  # its SVD start has the base's output on average only


def table_rows() -> list[list[str]]:
    """The lines of code in the last cell of each row whose first cell links to a page."""
    rows = [line for line in README.read_text().splitlines() if line.startswith("| [")]
    return [re.findall(r"`(lr\.[^`]+)`", row.strip("| ").split(" | ")[-1]) for row in rows]


@pytest.mark.parametrize("lines", table_rows(), ids=lambda lines: lines[0])
def test_lines_of_the_table(lines: list[str]) -> None:
    model = llama()
    names = {"lr": lr, "model": model}
    if "unet" in lines[0]:
        names["unet"] = unet()
    if "peft_model" in lines[0]:
        names["peft_model"] = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        base = model(ids).logits
        for line in lines:
            assert eval(line, names) is not None
        if STARTS_OFF_BASE not in lines[0]:
            torch.testing.assert_close(model(ids).logits, base)


def test_every_method_page_is_linked() -> None:
    linked = set(re.findall(r"docs/methods/(\w+\.md)", README.read_text()))
    pages = {page.name for page in README.parent.glob("docs/methods/*.md")} - {"index.md"}
    assert linked == pages
    assert len(table_rows()) == len(linked) + 1  # and lr.accelerate, which is no method


def test_first_example_is_the_quickstart_script(tmp_path: Path) -> None:
    """test_code_blocks.py runs it."""
    example = next(block for block in blocks_of(README) if block.language == "python")
    assert example.code == (ROOT / "examples" / "quickstart.py").read_text()
    assert len([line for line in example.code.splitlines() if line]) <= MAX_EXAMPLE_LINES


def test_read_in_three_minutes() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert text.count("![") == 1
