"""The kernels that a lesser CPU than this one would choose: tests of the ops, run once more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_ext  # noqa: F401 - registers the ops

TESTS = Path(__file__).parents[1] / "ops"
# What each limit leaves, as `lowrank-ext doctor` names it.
LIMITS = {"portable": "portable", "avx512": "avx512 portable"}
CASES = [
    "test_any_shape.py",
    "test_dropout.py",
    "test_lowrank_ops.py::test_values_and_gradients",
    "test_lowrank_ops.py::test_sizes_that_need_several_blocks",
    "test_multi_lowrank_add.py::test_values_and_gradients",
    "test_multi_lowrank_add.py::test_any_ids_shape_and_layout",
    "test_moe_lowrank_add.py::test_values_and_gradients",
    "test_moe_lowrank_add.py::test_sizes_that_need_several_blocks",
    "test_moe_lowrank_add.py::test_any_sizes",
]


def run(*arguments: str, limit: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LOWRANK_EXT_CPU": limit}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS, capture_output=True, text=True
    )


@pytest.mark.parametrize("limit", LIMITS)
def test_ops_on_a_lesser_cpu(limit: str) -> None:
    if limit not in torch.ops.lowrank_ext.cpu_features().split():
        pytest.skip(f"this CPU has no {limit}")
    report = "import torch, lowrank_ext; print(torch.ops.lowrank_ext.cpu_features())"
    assert run("-c", report, limit=limit).stdout.strip() == LIMITS[limit]
    done = run(
        *("-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"),
        *("-k", "cpu and not 1.0", *CASES),  # all of x dropped: the same on every CPU
        limit=limit,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_unknown_limit_is_named() -> None:
    done = run("-c", "import torch, lowrank_ext; torch.ops.lowrank_ext.cpu_features()", limit="sse")
    assert done.returncode != 0
    assert "LOWRANK_EXT_CPU must be avx512_bf16, avx512 or portable, got 'sse'" in done.stderr
