"""dlora_a = dhᵀ drop(x): lowrank/thin_product.cuh and partial_sums.cuh on the SIMT executor."""

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    RAGGED_SHAPES,
    _simt,
    acc_dtype,
    assert_lean,
    assert_within_rule,
    free_banks,
    integers,
    lowrank_down_backward_lora_a,
    normal,
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)
from lowrank_cases import seed_tensor

from lowrank_ext import reference

SEED = 987_654_321


def formula(dh, x, rounding):
    return rounding(dh).mT @ rounding(x)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", RAGGED_SHAPES)
def test_shapes(compute_type, shape):
    rows, cols, rank = shape
    dh, x = (
        integers(rows, rank, compute_type=compute_type),
        integers(rows, cols, compute_type=compute_type),
    )
    dlora_a = lowrank_down_backward_lora_a(compute_type, dh, x)
    assert torch.equal(dlora_a, true(formula, dh, x).to(dlora_a.dtype))


def test_no_rows():
    dh, x = integers(0, 8, compute_type="bf16"), integers(0, 65, compute_type="bf16")
    dlora_a = lowrank_down_backward_lora_a("bf16", dh, x)
    assert torch.equal(dlora_a, torch.zeros(8, 65, dtype=torch.bfloat16))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (0, 3), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    dh = spread(integers(66, 20, compute_type=compute_type), offset, padding)
    x = spread(integers(66, 70, compute_type=compute_type), offset, padding)
    with free_banks():
        dlora_a = lowrank_down_backward_lora_a(compute_type, dh, x)
    assert torch.equal(dlora_a, true(formula, dh, x).to(dlora_a.dtype))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("num_sms", [1, 132])
def test_splits_dropout_and_wide_gradient(compute_type, num_sms):
    """p = 0.5: the scale is 2 and every sum exact. Dropped elements may even be NaN."""
    rows, cols, rank = 700, 70, 20
    dh, x = (
        integers(rows, rank, compute_type=compute_type),
        integers(rows, cols, compute_type=compute_type),
    )
    kept = reference.dropout_mask(SEED, rows, cols, 0.5)
    expected = 2 * true(formula, dh, torch.where(kept, x, 0))
    x = torch.where(kept, x, torch.nan)
    for dtype in {DTYPES[compute_type], acc_dtype(compute_type)}:
        dlora_a = lowrank_down_backward_lora_a(
            compute_type,
            dh,
            x,
            dropout_p=0.5,
            seed=seed_tensor(SEED),
            gradient_dtype=dtype,
            num_sms=num_sms,
        )
        assert torch.equal(dlora_a, expected.to(dtype))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_rounding(compute_type):
    dh, x = normal(600, 20, compute_type=compute_type), normal(600, 70, compute_type=compute_type)
    dlora_a = lowrank_down_backward_lora_a(compute_type, dh, x, num_sms=8)
    assert_within_rule(
        compute_type, dlora_a, plain(compute_type, formula, dh, x), true(formula, dh, x)
    )
    _simt.set_options(schedule_seed=1)
    assert torch.equal(lowrank_down_backward_lora_a(compute_type, dh, x, num_sms=8), dlora_a)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("compute_type", "rank"),
    [("bf16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 16), ("fp64", 32)],
)
def test_traffic(compute_type, rank, dropout_p):
    """x and dh are read once, apart from dh again per 64 columns; the partial sums are written and
    read once per split."""
    rows, cols = 512, 192
    dh, x = (
        normal(rows, rank, compute_type=compute_type),
        normal(rows, cols, compute_type=compute_type),
    )
    options = {"dropout_p": dropout_p, "seed": seed_tensor(SEED), "num_sms": 4}
    pass_over_x, sums = reports_of(
        lambda: lowrank_down_backward_lora_a(compute_type, dh, x, **options)
    )
    size = DTYPES[compute_type].itemsize
    partial_bytes = acc_dtype(compute_type).itemsize * rank * cols
    assert_lean(pass_over_x, size * (rows * cols + rows * rank) + partial_bytes)
    assert_lean(sums, partial_bytes + size * rank * cols)
    assert traffic_of(pass_over_x, "source")["bytes_read"] == size * rows * cols
    assert traffic_of(pass_over_x, "left")["bytes_read"] == cols // 64 * size * rows * rank
    assert traffic_of(pass_over_x, "partials")["bytes_written"] == partial_bytes
    assert pass_over_x["shared_conflicts"] == 0
