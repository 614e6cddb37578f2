"""Every public name has an entry in the reference, on its method's page or in docs/reference/."""

import re
from types import ModuleType

import pytest
from page_blocks import ROOT

import lowrank_ext as lr

ENTRY = re.compile(r"^::: lowrank_ext\.([\w.]+)$", re.MULTILINE)
ENTRIES = [e for page in (ROOT / "docs").rglob("*.md") for e in ENTRY.findall(page.read_text())]


def public_names() -> list[str]:
    """Of lr, and of each module that is public in it."""
    names = []
    for name in lr.__all__:
        value = getattr(lr, name)
        if isinstance(value, ModuleType):
            names += [n for n in getattr(value, "__all__", dir(value)) if not n.startswith("_")]
        elif name != "__version__":
            names.append(name)
    return names


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_name_has_an_entry(name: str) -> None:
    assert name in {entry.rpartition(".")[2] for entry in ENTRIES}


def test_every_module_class_has_an_entry() -> None:
    """dir() also lists those that lr.nn finds by name."""
    classes = {name for name in dir(lr.nn) if name.endswith("Linear")}
    assert classes <= {entry.rpartition(".")[2] for entry in ENTRIES}


def test_no_entry_stands_twice() -> None:
    assert len(set(ENTRIES)) == len(ENTRIES)
