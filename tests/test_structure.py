"""Who may import whom: a method is known to its own folder, to the list, and to nobody else."""

import ast
from pathlib import Path

import pytest

import lowrank_ext as lr

PACKAGE = Path(lr.__file__).parent
METHODS = sorted(
    path.name for path in (PACKAGE / "methods").iterdir() if (path / "__init__.py").is_file()
)
# Adapters of their own; what is built on adapted models may use them.
SYSTEMS = {"lora_guard", "style_adapter"}
OUTSIDE = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "methods" not in path.relative_to(PACKAGE).parts[:-1]
]


def imports(path: Path) -> set[str]:
    """Full names of the modules, or of the things in them, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("lowrank_ext.")}


def method_in(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if parts[:2] == ["lowrank_ext", "methods"] and len(parts) > 2 else None


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_methods_imports_a_method(path: Path) -> None:
    named = {method for name in imports(path) if (method := method_in(name)) is not None}
    allowed = {"*"} if path == PACKAGE / "__init__.py" else set()
    guard = PACKAGE / "cli" / "guard_train"
    if path == guard.with_name("guard.py") or path.parent == guard:  # the commands of one system
        allowed = {"lora_guard"}
    if path.parent == PACKAGE / "cli" / "recursive":  # and those of another
        allowed = {"recursive"}
    assert named <= allowed


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_and_no_command_line(method: str) -> None:
    for path in sorted((PACKAGE / "methods" / method).rglob("*.py")):
        names = imports(path)
        assert not [name for name in names if name.startswith("lowrank_ext.cli")], path
        others = {other for name in names if (other := method_in(name)) is not None} - {method}
        assert not others or (method in SYSTEMS and others <= {"lora"}), path


def test_the_list_names_every_method() -> None:
    listed = {method_in(name) for name in imports(PACKAGE / "methods" / "__init__.py")}
    assert listed == set(METHODS)
    for method in METHODS:
        assert (PACKAGE / "methods" / method).joinpath("__init__.py").read_text().startswith('"""')


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 500} == {}


def test_no_test_imports_a_conftest() -> None:
    # There are several: which one is meant would depend on the order in which files are collected.
    tests = Path(__file__).parent
    files = [
        path for path in tests.rglob("*.py") if any("conftest" in name for name in imports(path))
    ]
    assert not files
