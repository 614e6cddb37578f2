"""Blocks and dynamic shared memory of every launch of a training step, against the limits of GPUs.

What a launch asks for is known once it runs: its size comes from plans. Registers, the other half
of how many blocks are resident, are in tests/test_cuda_compile.py.
"""

from types import ModuleType
from typing import Any

import pytest
import torch

# Shared memory of an SM and of one block: sm_86, sm_89 and sm_120, and of them and sm_80, sm_90 and
# sm_100 the smallest (CUDA C++ Programming Guide, "Compute Capabilities"). A block costs 1 KiB more
# than it asks for.
SMALL_SM_BYTES, MAX_BLOCK_BYTES = 100 * 1024, 99 * 1024
LARGE_SM_BYTES = 164 * 1024
RESERVED_BYTES = 1024

COMPUTE_TYPES = {
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "fp64": (torch.float64, False),
}


def launches(
    simt: ModuleType, compute_type: str, num_rows: int, rank: int, everything: bool
) -> list[dict[str, Any]]:
    """Of lowrank_add and its backward; in_features and out_features take a few column tiles."""
    dtype, allow_tf32 = COMPUTE_TYPES[compute_type]
    num_in, num_out = 72, 136

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    x, base, dout = values(num_rows, num_in), values(num_rows, num_out), values(num_rows, num_out)
    mid = (values(rank, rank), values(rank), values(num_out)) if everything else (None, None, None)
    adapter = (values(rank, num_in), values(num_out, rank), *mid)
    options = (1.0, 0.1, torch.tensor([3]), allow_tf32)
    simt.set_options(record=False)
    simt.clear_reports()
    ops = torch.ops.lowrank_ext_simt
    _, h = ops.lowrank_add(base, x, *adapter, *options)
    needs = (True, True, True, everything, everything, everything)
    ops.lowrank_add_backward(dout, x, h, *adapter, *options, *needs)
    reports = simt.reports()
    assert len(reports) >= 6
    return reports


def resident_warps(report: dict[str, Any], sm_bytes: int) -> int:
    """As far as shared memory goes; one that uses none is limited elsewhere."""
    threads = report["block"][0]
    blocks = sm_bytes // (report["shared_bytes"] + RESERVED_BYTES)
    return min(blocks * threads // 32, 64)


@pytest.mark.parametrize(
    ("num_rows", "rank"),
    [*((3, rank) for rank in (1, 16, 64, 65, 130, 256, 512)), (130, 1), (130, 64), (130, 512)],
)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_every_launch_fits_every_gpu(
    simt: ModuleType, compute_type: str, rank: int, num_rows: int
) -> None:
    everything = rank <= 130
    for report in launches(simt, compute_type, num_rows, rank, everything):
        assert report["shared_bytes"] <= MAX_BLOCK_BYTES, report["kernel"]
        assert report["block"][0] % 32 == 0 and report["block"][1:] == (1, 1)


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("compute_type", ["bf16", "tf32"])
def test_shared_memory_leaves_warps_to_hide_latency(
    simt: ModuleType, compute_type: str, rank: int
) -> None:
    """At usual ranks: 16 warps on the SMs of A100, H100 and B200, 8 on the smaller ones.

    Not where rows are few: there a launch has fewer blocks than a GPU has SMs.
    """
    for report in launches(simt, compute_type, 200, rank, everything=False):
        assert resident_warps(report, SMALL_SM_BYTES) >= 8, report
        assert resident_warps(report, LARGE_SM_BYTES) >= 16, report
