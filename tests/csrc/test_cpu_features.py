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
LIMITS = {
    "portable": "portable",
    "avx512": "avx512 portable",
    "avx512_bf16": "avx512_bf16 avx512 portable",
}
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
# Any shape: drawn by hypothesis, and sought once, where all kernels are lesser ones.
DRAWN = {"test_any_shape.py", "test_moe_lowrank_add.py::test_any_sizes"}
DRAWN |= {"test_multi_lowrank_add.py::test_any_ids_shape_and_layout"}
# multi_lowrank_add has kernels of tiles (AMX); these take their place.
CASES_BELOW_TILES = [
    "test_multi_lowrank_add.py::test_values_and_gradients",
    "test_multi_lowrank_add.py::test_large_ranks_of_several_rows",
    "test_multi_lowrank_add.py::test_edges_of_tiles",
    "test_multi_lowrank_add.py::test_bits_of_a_row_do_not_depend_on_the_others",
]


def run(*arguments: str, limit: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LOWRANK_EXT_CPU": limit}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS, capture_output=True, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize("limit", LIMITS)
def test_ops_on_a_lesser_cpu(limit: str) -> None:
    features = torch.ops.lowrank_ext.cpu_features()
    if limit not in features.split():
        pytest.skip(f"this CPU has no {limit}")
    if limit != "portable" and features == LIMITS[limit]:
        pytest.skip(f"this CPU has no more than {limit}")
    cases = {
        "portable": CASES,
        "avx512": [case for case in CASES if case not in DRAWN],
        "avx512_bf16": CASES_BELOW_TILES,
    }[limit]
    done = run(
        *("-m", "pytest", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"),
        *("-k", "cpu and not 1.0", *cases),  # all of x dropped: the same on every CPU
        limit=limit,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"\nCPU kernels: {LIMITS[limit]}\n" in done.stdout


def test_an_unknown_limit_is_named() -> None:
    done = run("-c", "import torch, lowrank_ext; torch.ops.lowrank_ext.cpu_features()", limit="sse")
    assert done.returncode != 0
    message = "LOWRANK_EXT_CPU must be amx_bf16, avx512_bf16, avx512 or portable, got 'sse'"
    assert message in done.stderr
