"""lowrank/lowrank_down_backward_x.cuh: dx = base + drop'(dh lora_a)."""

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    RAGGED_SHAPES,
    _simt,
    assert_lean,
    assert_within_rule,
    free_banks,
    integers,
    lowrank_down_backward_x,
    normal,
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)
from torch import Tensor

from lowrank_ext import reference

SEED = -1_234_567_890_123_456_789


def formula(dropout_p: float):
    def dx(base, dh, lora_a, rounding):
        branch = rounding(dh) @ rounding(lora_a)
        branch = reference.dropout(branch, dropout_p, torch.tensor(SEED))
        return branch if base is None else base + branch

    return dx


def operands(make, compute_type: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, rank = shape
    return (
        make(rows, cols, compute_type=compute_type),
        make(rows, rank, compute_type=compute_type),
        make(rank, cols, compute_type=compute_type),
    )


def run(
    compute_type: str, base: Tensor | None, dh: Tensor, lora_a: Tensor, dropout_p: float, **options
):
    seed = torch.tensor([SEED])
    return lowrank_down_backward_x(
        compute_type, base, dh, lora_a, dropout_p=dropout_p, seed=seed, **options
    )


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", RAGGED_SHAPES)
def test_shapes(compute_type, shape):
    """Dropout of a half scales by two: all sums stay integers."""
    base, dh, lora_a = operands(integers, compute_type, shape)
    for dropout_p in (0.0, 0.5):
        expected = true(formula(dropout_p), base, dh, lora_a).to(DTYPES[compute_type])
        assert torch.equal(run(compute_type, base, dh, lora_a, dropout_p), expected)


@pytest.mark.parametrize("compute_type", ["bf16", "fp64"])
def test_without_base(compute_type):
    _, dh, lora_a = operands(integers, compute_type, (66, 65, 16))
    expected = true(formula(0.5), None, dh, lora_a).to(DTYPES[compute_type])
    assert torch.equal(run(compute_type, None, dh, lora_a, 0.5), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (0, 3), (8, 8)])
def test_strides_alignment_in_place(compute_type, offset, padding):
    base, dh, lora_a = (
        spread(tensor, offset, padding) for tensor in operands(integers, compute_type, (66, 67, 20))
    )
    expected = true(formula(0.5), base, dh, lora_a).to(DTYPES[compute_type])
    with free_banks():
        dx = run(compute_type, base, dh, lora_a, 0.5, dx=base)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(70, 65, 20), (7, 65, 20)])
def test_rounding_and_dropout(compute_type, shape):
    base, dh, lora_a = operands(normal, compute_type, shape)
    for dropout_p in (0.0, 0.3):
        f = formula(dropout_p)
        got = run(compute_type, base, dh, lora_a, dropout_p)
        assert_within_rule(
            compute_type, got, plain(compute_type, f, base, dh, lora_a), true(f, base, dh, lora_a)
        )
        _simt.set_options(schedule_seed=1)
        assert torch.equal(run(compute_type, base, dh, lora_a, dropout_p), got)
        _simt.set_options()


def test_all_dropped():
    base, dh, lora_a = operands(normal, "bf16", (65, 64, 8))
    dh.fill_(float("inf"))
    assert torch.equal(run("bf16", base, dh, lora_a, 1.0), base)


@pytest.mark.parametrize(
    ("compute_type", "rank"),
    [("bf16", 16), ("bf16", 64), ("bf16", 128), ("tf32", 16), ("fp64", 16)],
)
def test_traffic(compute_type, rank):
    rows, cols = 256, 512
    base, dh, lora_a = operands(normal, compute_type, (rows, cols, rank))
    [report] = reports_of(lambda: run(compute_type, base, dh, lora_a, 0.3, dx=base))
    size = DTYPES[compute_type].itemsize
    assert_lean(report, size * (2 * rows * cols + (rows + cols) * rank))
    out = traffic_of(report, "out")
    assert out["bytes_read"] == out["bytes_written"] == size * rows * cols
    assert traffic_of(report, "seed")["unique_bytes_read"] == 8
