"""h = drop(x) lora_aᵀ: lowrank/thin_product.cuh on the SIMT executor, and how it is planned."""

import itertools

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
    lowrank_down,
    normal,
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)
from lowrank_cases import seed_tensor

from lowrank_ext import reference

SEED = 0x1234_5678_9ABC_DEF0

SHAPES = [*RAGGED_SHAPES, (2, 130, 128)]


def formula(x, lora_a, rounding):
    return rounding(x) @ rounding(lora_a).mT


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(compute_type, shape):
    rows, cols, rank = shape
    x, lora_a = (
        integers(rows, cols, compute_type=compute_type),
        integers(rank, cols, compute_type=compute_type),
    )
    h = lowrank_down(compute_type, x, lora_a)
    assert torch.equal(h, true(formula, x, lora_a).to(h.dtype))


def test_rank_512():
    x, lora_a = integers(65, 40, compute_type="bf16"), integers(512, 40, compute_type="bf16")
    h = lowrank_down("bf16", x, lora_a)
    assert torch.equal(h, true(formula, x, lora_a).to(h.dtype))


def test_no_columns_and_no_rows():
    x, lora_a = integers(20, 0, compute_type="bf16"), integers(8, 0, compute_type="bf16")
    assert torch.equal(lowrank_down("bf16", x, lora_a), torch.zeros(20, 8, dtype=torch.bfloat16))
    empty = integers(0, 64, compute_type="bf16")
    assert (
        reports_of(lambda: lowrank_down("bf16", empty, integers(8, 64, compute_type="bf16"))) == []
    )


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (0, 3), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    x = spread(integers(66, 70, compute_type=compute_type), offset, padding)
    lora_a = spread(integers(20, 70, compute_type=compute_type), offset, padding)
    with free_banks():
        h = lowrank_down(compute_type, x, lora_a)
    assert torch.equal(h, true(formula, x, lora_a).to(h.dtype))


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_splits(compute_type, rows, num_sms):
    x, lora_a = (
        integers(rows, 1100, compute_type=compute_type),
        integers(20, 1100, compute_type=compute_type),
    )
    h = lowrank_down(compute_type, x, lora_a, num_sms=num_sms)
    assert torch.equal(h, true(formula, x, lora_a).to(h.dtype))


# ---- dropout


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(65, 130, 17), (7, 1030, 8)])
def test_dropout_draws_the_reference_mask(compute_type, shape):
    """At p = 0.5 the scale is 2 and every sum exact. What is dropped may even be NaN."""
    rows, cols, rank = shape
    x, lora_a = (
        integers(rows, cols, compute_type=compute_type),
        integers(rank, cols, compute_type=compute_type),
    )
    kept = reference.dropout_mask(SEED, rows, cols, 0.5)
    expected = 2 * true(formula, torch.where(kept, x, 0), lora_a)
    x = torch.where(kept, x, torch.nan)
    h = lowrank_down(compute_type, x, lora_a, dropout_p=0.5, seed=seed_tensor(SEED))
    assert torch.equal(h, expected.to(h.dtype))


def test_everything_dropped():
    x, lora_a = normal(65, 130, compute_type="bf16"), normal(8, 130, compute_type="bf16")
    h = lowrank_down("bf16", x, lora_a, dropout_p=1.0, seed=seed_tensor(SEED))
    assert torch.equal(h, torch.zeros_like(h))


# ---- rounding and order


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("rows", "dropout_p"), [(70, 0.0), (70, 0.3), (7, 0.3)])
def test_rounding(compute_type, rows, dropout_p):
    x, lora_a = (
        normal(rows, 700, compute_type=compute_type),
        normal(20, 700, compute_type=compute_type),
    )

    def dropped(x, lora_a, rounding):
        return formula(x, lora_a, rounding) * reference.dropout_scale(dropout_p)

    kept = torch.where(reference.dropout_mask(SEED, rows, 700, dropout_p), x, 0)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(SEED), "num_sms": 8}
    h = lowrank_down(compute_type, x, lora_a, **options)
    assert_within_rule(
        compute_type, h, plain(compute_type, dropped, kept, lora_a), true(dropped, kept, lora_a)
    )
    _simt.set_options(schedule_seed=1)
    assert torch.equal(lowrank_down(compute_type, x, lora_a, **options), h)


# ---- traffic


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("compute_type", "rank"),
    [("bf16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 128), ("fp32", 16), ("fp64", 32)],
)
def test_traffic(compute_type, rank, dropout_p):
    rows, cols = 192, 512
    x, lora_a = (
        normal(rows, cols, compute_type=compute_type),
        normal(rank, cols, compute_type=compute_type),
    )
    options = {"dropout_p": dropout_p, "seed": seed_tensor(SEED)}
    [report] = reports_of(lambda: lowrank_down(compute_type, x, lora_a, **options))
    size = DTYPES[compute_type].itemsize
    assert_lean(report, size * (rows * cols + (rows + cols) * rank))
    assert traffic_of(report, "x")["bytes_read"] == size * rows * cols
    assert traffic_of(report, "lora_a")["bytes_read"] == rows // 64 * size * cols * rank
    assert traffic_of(report, "out")["bytes_written"] == size * rows * rank
    assert report["shared_conflicts"] == 0


def test_traffic_of_decoding():
    """One token: lora_a is read once, by many blocks."""
    x, lora_a = normal(1, 4096, compute_type="bf16"), normal(32, 4096, compute_type="bf16")
    down, sums = reports_of(lambda: lowrank_down("bf16", x, lora_a, num_sms=132))
    assert down["grid"][0] * down["grid"][1] == 32
    assert traffic_of(down, "lora_a")["bytes_read"] == 2 * 32 * 4096
    partial_bytes = down["grid"][1] * 4 * 32
    assert traffic_of(down, "partials")["bytes_written"] == partial_bytes
    assert traffic_of(sums, "partials")["bytes_read"] == partial_bytes


# ---- plan


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_plan_covers_everything(compute_type, small_blocks, num_sms):
    depth_of_step = 128 // DTYPES[compute_type].itemsize
    for outer, depth, rank in itertools.product(
        [1, 64, 65, 1000, 8192, 10**9], [0, 1, 65, 4096, 10**9], [1, 16, 17, 64, 65, 512]
    ):
        plan = _simt.plan_thin_product(
            compute_type, outer, depth, rank, small_blocks=small_blocks, num_sms=num_sms
        )
        assert (plan["num_outer_tiles"] - 1) * plan["block_outer"] < outer
        assert plan["num_outer_tiles"] * plan["block_outer"] >= outer
        assert (plan["num_rank_tiles"] - 1) * plan["rank_tile"] < rank
        assert plan["num_rank_tiles"] * plan["rank_tile"] >= rank
        steps = -(-depth // depth_of_step)
        assert plan["num_splits"] * plan["steps_per_split"] >= steps
        assert (plan["num_splits"] - 1) * plan["steps_per_split"] < max(steps, 1)
        assert plan["num_splits"] == 1 or plan["steps_per_split"] >= 4
        assert plan["num_splits"] <= 65535


@pytest.mark.parametrize(
    ("rows", "rank", "splits"), [(8192, 16, 1), (6336, 16, 1), (2048, 16, 4), (512, 64, 13)]
)
def test_plan_splits_only_to_fill_the_device(rows, rank, splits):
    """H100, K = 4096: at least three quarters of the SMs have a block."""
    plan = _simt.plan_thin_product("bf16", rows, 4096, rank, num_sms=132)
    assert plan["num_splits"] == splits
    assert plan["num_blocks"] >= 0.75 * 132
