"""dlora_b[i] = scaling[i] Σ doutᵀ h and dlora_a[i] = Σ dhᵀ drop(x) over each group's rows:
segments/segment_outer.cuh on the SIMT executor."""

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
    acc_dtype,
    assert_lean,
    assert_within_rule,
    free_banks,
    integers,
    normal,
    reports_of,
    spread,
    tf32,
    traffic_of,
)
from lowrank_cases import seed_tensor
from segment_cases import (
    IDS,
    SEED,
    Groups,
    same,
    scalings,
    segment_down_backward_lora_a,
    segment_up_backward_lora_b,
)

from lowrank_ext import reference

# (M, C, r): ragged, one rank tile and several, segments of one step, several and more than stages.
SHAPES = [(1, 1, 1), (17, 65, 3), (70, 130, 17), (300, 63, 16), (130, 66, 70), (700, 20, 5)]


def outer(groups, large, thin, factors, rounding=lambda t: t):
    """[n, C, r]"""
    rank = thin.shape[1]
    out = torch.zeros(groups.num_groups, large.shape[1], rank, dtype=large.dtype)
    for group, own, rows in groups.segments(rank):
        product = rounding(large[rows]).mT @ rounding(thin[rows, :own])
        out[group, :, :own] = float(factors[group]) * product
    for group in set(groups.ids.tolist()):
        if 0 <= group < groups.num_groups and groups.rank(group, rank) < 0:
            out[group] = torch.nan
    return out


def few_ones(*shape, compute_type):
    """Integers few of which are not zero: sums stay exact in bf16."""
    return integers(*shape, compute_type=compute_type) * (torch.rand(*shape) < 0.3)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide", [False, True], ids=["own dtype", "fp32"])
def test_shapes(compute_type, shape, wide):
    rows, cols, rank = shape
    groups = Groups.named("random", rows, rank)
    large, thin = (
        few_ones(rows, cols, compute_type=compute_type),
        few_ones(rows, rank, compute_type=compute_type),
    )
    options = {"gradient_dtype": acc_dtype(compute_type) if wide else None}
    expected = outer(groups, large.double(), thin.double(), scalings(5))
    got = segment_up_backward_lora_b(compute_type, groups, large, thin, scalings(5), **options)
    same(got, expected)
    expected = outer(groups, large.double(), thin.double(), [1.0] * 5).mT
    same(segment_down_backward_lora_a(compute_type, groups, thin, large, **options), expected)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("rows", [40, 90])
def test_ids(name, rows):
    """Idle groups and padding ranks get zeros, whatever is in their place in h and dh."""
    groups = Groups.named(name, rows, 9)
    n = groups.num_groups
    large, thin = few_ones(rows, 70, compute_type="bf16"), few_ones(rows, 9, compute_type="bf16")
    for row, group in enumerate(groups.ids.tolist()):
        thin[row, max(groups.rank(group, 9), 0) :] = torch.nan
        if groups.rank(group, 9) <= 0:
            large[row] = torch.nan
    wide = outer(groups, large.double(), thin.double(), scalings(n))
    same(segment_up_backward_lora_b("bf16", groups, large, thin, scalings(n)), wide)
    wide = outer(groups, large.double(), thin.double(), [1.0] * n).mT
    same(segment_down_backward_lora_a("bf16", groups, thin, large), wide)


def test_ranks_out_of_range_give_nan():
    """A group without rows gets zeros all the same."""
    groups = Groups.of([0, 1, 0, 3, -1], 5, [6, -1, 9, 2, -3])
    large, thin = integers(5, 8, compute_type="fp32"), integers(5, 5, compute_type="fp32")
    got = segment_up_backward_lora_b("fp32", groups, large, thin, torch.ones(5))
    assert got[:2].isnan().all() and got[3].isfinite().all()
    assert (got[2] == 0).all() and (got[4] == 0).all()


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    groups = Groups.named("random", 66, 18)
    large = spread(few_ones(66, 70, compute_type=compute_type), offset, padding)
    thin = spread(few_ones(66, 18, compute_type=compute_type), offset, padding)
    with free_banks():
        dlora_b = segment_up_backward_lora_b(compute_type, groups, large, thin, scalings(5))
        dlora_a = segment_down_backward_lora_a(compute_type, groups, thin, large)
    same(dlora_b, outer(groups, large.double(), thin.double(), scalings(5)))
    same(dlora_a, outer(groups, large.double(), thin.double(), [1.0] * 5).mT)


def test_nothing():
    groups = Groups.of([], 3)
    large, thin = integers(0, 64, compute_type="bf16"), integers(0, 8, compute_type="bf16")
    got = segment_up_backward_lora_b("bf16", groups, large, thin, scalings(3))
    assert torch.equal(got, torch.zeros_like(got))
    groups = Groups.of([-1] * 5, 0)
    large, thin = integers(5, 64, compute_type="bf16"), integers(5, 8, compute_type="bf16")
    assert reports_of(lambda: segment_down_backward_lora_a("bf16", groups, thin, large)) == []


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_dropout_is_that_of_the_whole_batch(compute_type):
    groups = Groups.named("random", 90, 17)
    dh, x = (
        few_ones(90, 17, compute_type=compute_type),
        few_ones(90, 130, compute_type=compute_type),
    )
    kept = reference.dropout_mask(SEED, 90, 130, 0.5)
    expected = 2 * outer(groups, torch.where(kept, x, 0).double(), dh.double(), [1.0] * 5).mT
    x = torch.where(kept, x, torch.nan)
    options = {"dropout_p": 0.5, "seed": seed_tensor(SEED)}
    same(segment_down_backward_lora_a(compute_type, groups, dh, x, **options), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_rounding(compute_type):
    groups = Groups.named("random", 400, 20, mixed_ranks=False)
    dout, h = normal(400, 70, compute_type=compute_type), normal(400, 20, compute_type=compute_type)
    scaling = torch.full((5,), 0.3)
    got = segment_up_backward_lora_b(compute_type, groups, dout, h, scaling)
    rounding = tf32 if compute_type == "tf32" else lambda t: t
    ordinary = outer(groups, dout, h, scaling, rounding)
    assert_within_rule(
        compute_type, got, ordinary, outer(groups, dout.double(), h.double(), scaling)
    )
    _simt.set_options(schedule_seed=1)
    assert torch.equal(segment_up_backward_lora_b(compute_type, groups, dout, h, scaling), got)


@pytest.mark.parametrize(
    ("compute_type", "rank"), [("bf16", 16), ("bf16", 64), ("fp32", 32), ("fp64", 32)]
)
def test_traffic(compute_type, rank):
    """Large is read once where all ranks are one tile; rows without a group are not."""
    rows, cols, n = 192, 512, 2
    groups = Groups.of([i % 3 - 1 for i in range(rows)], n)
    x, dh = (
        normal(rows, cols, compute_type=compute_type),
        normal(rows, rank, compute_type=compute_type),
    )
    [report] = reports_of(lambda: segment_down_backward_lora_a(compute_type, groups, dh, x))
    size = DTYPES[compute_type].itemsize
    assert traffic_of(report, "source")["bytes_read"] == size * 128 * cols
    assert traffic_of(report, "left")["unique_bytes_read"] == size * 128 * rank
    assert traffic_of(report, "out")["bytes_written"] == size * n * cols * rank
    assert_lean(report, size * (128 * cols + 128 * rank + n * cols * rank) + 8 * rows)
    [report] = reports_of(
        lambda: segment_up_backward_lora_b(compute_type, groups, x, dh, scalings(n))
    )
    assert traffic_of(report, "source")["bytes_read"] == size * 128 * cols
    assert_lean(report, size * (128 * cols + 128 * rank + n * cols * rank) + 8 * rows)
