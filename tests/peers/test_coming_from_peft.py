"""The tables of docs/coming_from_peft.md: complete, and every row true beside the installed PEFT.

A row "same" or "other name" is compared with PEFT; one "not there" must raise what users get.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
from lora_cases import CASES
from lora_sides import check_values
from moved_checks import CHECKS, Pair
from peft import LoraModel, PeftModel
from torch import nn

import lowrank_ext as lr

PAGE = Path(__file__).parents[2] / "docs" / "coming_from_peft.md"
STATUSES = ("same", "other name", "not there")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Row(NamedTuple):
    name: str  # PEFT's
    status: str
    note: str

    @property
    def here(self) -> str:
        """The code that the note begins with."""
        match = re.match(r"`([^`]+)`", self.note)
        assert match, f"{self.name}: the row must begin with its name here"
        return match[1]


def table(kind: str) -> dict[str, Row]:
    text = PAGE.read_text().partition(f"<!-- table: {kind} -->")[2].lstrip().partition("\n\n")[0]
    rows = [
        re.fullmatch(r"\| `(\w+)` \| ([\w ]+) \| (.*?) ?\|", line) for line in text.splitlines()[2:]
    ]
    assert rows and all(rows), f"{PAGE}: {kind}"
    named = [Row(*row.groups()) for row in rows if row]
    assert len({row.name for row in named}) == len(named)
    return {row.name: row for row in named}


FIELDS, METHODS = table("fields"), table("methods")
EVERY = [*FIELDS.values(), *METHODS.values()]
PRESENT = [row for row in EVERY if row.status != "not there"]


def of(rows: Iterable[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", list(rows), ids=lambda row: row.name)


def public(cls: type) -> set[str]:
    """Methods and properties of PEFT's that nn.Module lacks."""
    found = {name for name in dir(cls) if not name.startswith("_") and not hasattr(nn.Module, name)}
    values = {name: inspect.getattr_static(cls, name) for name in found}
    return {
        name
        for name, value in values.items()
        if isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
    }


def test_every_field_has_a_row() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_method_has_a_row() -> None:
    assert METHODS.keys() == public(PeftModel) | public(LoraModel)


@of(EVERY)
def test_statuses_and_names(row: Row) -> None:
    assert row.status in STATUSES
    for name in re.findall(r"`[^`]*?\blr\.([\w.]+)", row.note):
        value = lr
        for part in name.split("."):
            value = getattr(value, part)
    fields = {field.name for field in dataclasses.fields(lr.LoRAConfig)}
    if row.status == "same" and row.name in FIELDS:
        assert row.name in fields
    if row.status == "other name":
        assert row.here in fields or re.match(r"((rich\.)?print\()?(lr|model)\.\w+", row.here)


@of(row for row in PRESENT if row.name in FIELDS and row.name not in CHECKS)
def test_a_field_gives_what_pefts_gives(row: Row, tmp_path: Path) -> None:
    ours = row.name if row.status == "same" else row.here
    case = next(case for case in CASES.values() if ours in case.own)
    check_values(case._replace(ways=("adapt",)), tmp_path)


@of(row for row in PRESENT if row.name in METHODS or row.name in CHECKS)
def test_a_method_does_what_pefts_does(row: Row, tmp_path: Path) -> None:
    CHECKS[row.name](Pair(tmp_path))


@of(row for row in FIELDS.values() if row.status == "not there")
def test_a_field_that_is_not_there_raises(row: Row) -> None:
    with pytest.raises(TypeError, match=f"^LoRAConfig: {row.name} is no option here: ."):
        lr.LoRAConfig(**{row.name: None})


@of(row for row in METHODS.values() if row.status == "not there")
def test_a_method_that_is_not_there_raises(row: Row, tmp_path: Path) -> None:
    model = Pair(tmp_path).ours
    with pytest.raises((AttributeError, ValueError), match=rf"{row.name}'|one adapter"):
        getattr(model, row.name)("other")


def test_every_check_is_of_a_row() -> None:
    assert CHECKS.keys() <= {row.name for row in PRESENT}
