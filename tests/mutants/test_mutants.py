"""The list of `make mutants` fits the source: each mutant can be planted and names real tests."""

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from mutate import ROOT, Mutant, Tree, judged, problem_of, read_mutants, run

MUTANTS = read_mutants()


def name_of(mutant: Mutant) -> str:
    return mutant.name


@cache
def names_in(file: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_every_mutant_can_be_planted(mutant: Mutant) -> None:
    assert not problem_of(mutant)
    assert mutant.new != mutant.old
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), f"{test} is no test"


def test_the_list_covers_the_library() -> None:
    assert len(MUTANTS) >= 40
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    for part in ("csrc/cpu", "csrc/cuda", "freezing", "merging", "checkpoint", "targets"):
        assert any(part in mutant.file for mutant in MUTANTS), part


def test_a_text_that_is_gone_or_ambiguous_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\ny = 2\n")

    def problem(file: str, old: str) -> str:
        return problem_of(Mutant("m", "sign", file, old, "", []), tmp_path)

    assert problem("a.py", "y = 2") == ""
    assert "2 times" in problem("a.py", "x = 1")
    assert "0 times" in problem("a.py", "z")
    assert "0 times" in problem("b.py", "y = 2")


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("assert add(1, 2) == 3", "killed"),
        ("assert add(0, 0) == 0", "survived"),
        ("import os; os.abort()", "killed"),
    ],
)
def test_outcomes(tmp_path: Path, body: str, outcome: str) -> None:
    """And the file is as before."""
    source = "def add(a, b):\n    return a + b\n"
    (tmp_path / "added.py").write_text(source)
    (tmp_path / "test_added.py").write_text(f"from added import add\n\ndef test():\n    {body}\n")
    mutant = Mutant("m", "sign", "added.py", "a + b", "a - b", ["test_added.py::test"])
    assert Tree(tmp_path, built={"cpu"}).outcome_of(mutant).outcome == outcome
    assert (tmp_path / "added.py").read_text() == source


def test_a_test_that_does_not_run_is_no_verdict(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "pytest", "-q", "nowhere.py"], tmp_path)
    assert judged(done).outcome == "broken"
