"""What ``import lowrank_ext`` imports."""

import subprocess
import sys

import pytest

# Slow to import; what needs one of them imports it when it is called.
HEAVY = ("torch._dynamo", "transformers", "peft", "diffusers", "matplotlib", "rich", "typer")


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """sys.modules of a fresh process after the import."""
    command = "import sys, lowrank_ext; print(*sys.modules, sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("name", HEAVY)
def test_import_leaves_out(imported: set[str], name: str) -> None:
    assert "lowrank_ext.ops" in imported
    assert name not in imported


def test_star_import_needs_no_transformers() -> None:
    """transformers is no dependency; what builds on it is imported when it is asked for."""
    command = (
        "import sys; sys.modules['transformers'] = None\n"
        "from lowrank_ext import *\n"
        "assert adapt and LoRAConfig and guard and motion and style"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def test_the_command_line_starts_without_its_extras() -> None:
    """doctor needs none of them, and torch itself not even numpy."""
    command = (
        "import sys\n"
        "for name in ('numpy', 'transformers', 'datasets', 'pyarrow', 'psutil', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import lowrank_ext.cli.main"
    )
    subprocess.run([sys.executable, "-c", command], check=True)
