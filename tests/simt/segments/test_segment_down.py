"""h = drop(x) lora_a[i]ᵀ and dh = scaling[i] dout lora_b[i], row by row, by the row's group:
segments/segment_down.cuh on the SIMT executor, and how it is planned."""

import itertools

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
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
    poison_padding,
    same,
    scalings,
    segment_down,
    segment_up_backward,
    spread_stack,
)

from lowrank_ext import reference

# (M, K, r): ragged, both block sizes, every rank tile, more than one of them.
SHAPES = [(1, 1, 1), (17, 65, 3), (64, 130, 17), (65, 63, 16), (130, 66, 33), (200, 17, 70)]


def down(groups, x, lora_a, rounding=lambda t: t):
    """[M, r] in the dtype of the arguments; x is dropped already."""
    h = torch.zeros(x.shape[0], lora_a.shape[1], dtype=x.dtype)
    for group, rank, rows in groups.segments(lora_a.shape[1]):
        h[rows, :rank] = rounding(x[rows]) @ rounding(lora_a[group, :rank]).mT
    return groups.fill(h, lora_a.shape[1], None)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(compute_type, shape):
    rows, cols, rank = shape
    groups = Groups.named("random", rows, rank)
    x = integers(rows, cols, compute_type=compute_type)
    lora_a = poison_padding(
        groups, integers(groups.num_groups, rank, cols, compute_type=compute_type), 1
    )
    same(segment_down(compute_type, groups, x, lora_a), down(groups, x.double(), lora_a.double()))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("rows", "num_sms"), [(40, 132), (90, 1), (70, 132)])
def test_ids(name, rows, num_sms):
    """With 132 processors the contraction is split."""
    groups = Groups.named(name, rows, 9)
    x = integers(rows, 600, compute_type="bf16")
    lora_a = poison_padding(groups, integers(groups.num_groups, 9, 600, compute_type="bf16"), 1)
    without = torch.tensor([groups.rank(i, 9) <= 0 for i in groups.ids.tolist()])
    expected = down(groups, x.double(), lora_a.double())
    x[without] = torch.nan  # not read
    same(segment_down("bf16", groups, x, lora_a, num_sms=num_sms), expected)


def test_ranks_out_of_range_give_nan_rows():
    groups = Groups.of([0, 1, 2, 3, -1], 4, [5, 6, -1, 2])
    x, lora_a = integers(5, 8, compute_type="fp32"), integers(4, 5, 8, compute_type="fp32")
    h = segment_down("fp32", groups, x, lora_a)
    assert h[1:3].isnan().all() and h[[0, 3, 4]].isfinite().all()


def test_infinite_rows_leave_padding_zero():
    """0 · ∞ of a padding rank is not 0."""
    groups = Groups.of([0, 1], 2, [2, 4])
    x, lora_a = torch.full((2, 8), torch.inf), torch.ones(2, 4, 8)
    h = segment_down("fp32", groups, x, lora_a)
    assert torch.equal(h, torch.tensor([[torch.inf] * 2 + [0.0] * 2, [torch.inf] * 4]))


def test_no_columns_and_no_rows():
    groups = Groups.named("random", 20, 8)
    x, lora_a = integers(20, 0, compute_type="bf16"), integers(5, 8, 0, compute_type="bf16")
    assert torch.equal(
        segment_down("bf16", groups, x, lora_a), torch.zeros(20, 8, dtype=torch.bfloat16)
    )
    groups = Groups.of([], 5)
    x, lora_a = integers(0, 64, compute_type="bf16"), integers(5, 8, 64, compute_type="bf16")
    assert reports_of(lambda: segment_down("bf16", groups, x, lora_a)) == []


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    groups = Groups.named("random", 66, 18)
    x = spread(integers(66, 70, compute_type=compute_type), offset, padding)
    lora_a = spread_stack(integers(5, 18, 70, compute_type=compute_type), offset, padding, gap=1)
    with free_banks():
        h = segment_down(compute_type, groups, x, lora_a)
    same(h, down(groups, x.double(), lora_a.double()))
    dout = spread(integers(66, 33, compute_type=compute_type), offset, padding)
    lora_b = spread_stack(integers(5, 33, 18, compute_type=compute_type), offset, padding, gap=1)
    expected = down(groups, dout.double(), lora_b.double().mT)
    ones = torch.ones(5, dtype=torch.float64)
    with free_banks():
        g = segment_up_backward(compute_type, groups, dout, lora_b, ones)
    same(g, expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(40, 130, 17), (130, 66, 9), (70, 1100, 40)])
@pytest.mark.parametrize("scaling_dtype", [torch.float32, torch.float64])
def test_backward(compute_type, shape, scaling_dtype):
    rows, cols, rank = shape
    groups = Groups.named("random", rows, rank)
    dout = integers(rows, cols, compute_type=compute_type)
    lora_b = poison_padding(groups, integers(5, cols, rank, compute_type=compute_type), 2)
    scaling = scalings(5, scaling_dtype)
    factors = scaling[groups.ids.clamp_min(0)].double()[:, None]
    expected = down(groups, dout.double(), lora_b.double().mT) * factors
    got = segment_up_backward(compute_type, groups, dout, lora_b, scaling, num_sms=20)
    same(got, expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("rows", [20, 70])
def test_dropout_is_that_of_the_whole_batch(compute_type, rows):
    groups = Groups.named("random", rows, 17)
    x, lora_a = (
        integers(rows, 130, compute_type=compute_type),
        integers(5, 17, 130, compute_type=compute_type),
    )
    kept = reference.dropout_mask(SEED, rows, 130, 0.5)
    expected = 2 * down(groups, torch.where(kept, x, 0).double(), lora_a.double())
    x = torch.where(kept, x, torch.nan)
    same(
        segment_down(compute_type, groups, x, lora_a, dropout_p=0.5, seed=seed_tensor(SEED)),
        expected,
    )


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("rows", "dropout_p"), [(70, 0.0), (70, 0.3), (20, 0.3)])
def test_rounding(compute_type, rows, dropout_p):
    groups = Groups.named("random", rows, 20, mixed_ranks=False)
    x, lora_a = (
        normal(rows, 700, compute_type=compute_type),
        normal(5, 20, 700, compute_type=compute_type),
    )
    kept = torch.where(reference.dropout_mask(SEED, rows, 700, dropout_p), x, 0)
    factor = reference.dropout_scale(dropout_p)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(SEED), "num_sms": 8}
    h = segment_down(compute_type, groups, x, lora_a, **options)
    rounding = tf32 if compute_type == "tf32" else lambda t: t
    ordinary = down(groups, kept, lora_a, rounding) * factor
    truth = down(groups, kept.double(), lora_a.double()) * factor
    assert_within_rule(compute_type, h, ordinary, truth)
    _simt.set_options(schedule_seed=1)
    assert torch.equal(segment_down(compute_type, groups, x, lora_a, **options), h)


# ---- traffic


@pytest.mark.parametrize(
    ("compute_type", "rank"), [("bf16", 16), ("bf16", 64), ("fp32", 32), ("fp64", 32)]
)
def test_traffic(compute_type, rank):
    """Full tiles: x is read once, each adapter once a tile."""
    rows, cols, n = 192, 512, 2
    groups = Groups.of([i % 3 - 1 for i in range(rows)], n)
    x, lora_a = (
        normal(rows, cols, compute_type=compute_type),
        normal(n, rank, cols, compute_type=compute_type),
    )
    [report] = reports_of(lambda: segment_down(compute_type, groups, x, lora_a))
    size = DTYPES[compute_type].itemsize
    used = size * (128 * cols + n * rank * cols + rows * rank)
    assert traffic_of(report, "x")["bytes_read"] == size * 128 * cols
    assert traffic_of(report, "lora_a")["bytes_read"] == size * n * cols * rank
    assert traffic_of(report, "out")["bytes_written"] == size * rows * rank
    assert_lean(report, used + 8 * rows)


def test_traffic_of_decoding():
    """Only adapters in use are read, and of them their own ranks; x once for each rank tile."""
    n, rank, cols = 40, 16, 2048
    groups = Groups.of([3, 3, 17, -1, 30, 30, 30, 39], n, [16, 4, 8, 2] * 10)
    x, lora_a = normal(8, cols, compute_type="bf16"), normal(n, rank, cols, compute_type="bf16")
    down_report, sums = reports_of(lambda: segment_down("bf16", groups, x, lora_a, num_sms=132))
    ranks = sum(rank for _, rank, _ in groups.segments(rank))
    assert ranks == 2 + 4 + 8 + 2
    read = traffic_of(down_report, "lora_a")
    assert read["bytes_read"] == read["unique_bytes_read"] == 2 * ranks * cols
    assert traffic_of(down_report, "x")["bytes_read"] == 2 * 7 * cols
    assert traffic_of(down_report, "ranks")["unique_bytes_read"] == 8 * 4
    splits = down_report["grid"][1]
    assert splits > 1
    assert traffic_of(down_report, "partials")["bytes_written"] == splits * 4 * 8 * rank
    assert traffic_of(sums, "partials")["bytes_read"] == splits * 4 * 8 * rank


def test_traffic_of_the_backward():
    rows, cols, rank, n = 128, 512, 16, 2
    groups = Groups.of([i % 2 for i in range(rows)], n)
    dout, lora_b = (
        normal(rows, cols, compute_type="bf16"),
        normal(n, cols, rank, compute_type="bf16"),
    )
    [report] = reports_of(
        lambda: segment_up_backward("bf16", groups, dout, lora_b, torch.ones(n), num_sms=1)
    )
    assert traffic_of(report, "dout")["bytes_read"] == 2 * rows * cols
    assert_lean(report, 2 * (rows * cols + n * rank * cols + rows * rank) + 8 * rows)


# ---- plan


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_plan_covers_everything(compute_type, num_sms):
    depth_of_step = 128 // DTYPES[compute_type].itemsize
    for rows, groups, depth, rank in itertools.product(
        [1, 64, 65, 8192, 10**9], [0, 1, 8, 1000], [0, 1, 65, 4096, 10**9], [1, 16, 17, 512]
    ):
        plan = _simt.plan_segment_down(compute_type, rows, groups, depth, rank, num_sms=num_sms)
        assert plan["block_rows"] == (16 if rows <= 64 else 64)
        assert plan["num_rank_tiles"] * plan["rank_tile"] >= rank
        assert (plan["num_rank_tiles"] - 1) * plan["rank_tile"] < rank
        steps = -(-depth // depth_of_step)
        assert plan["num_splits"] * plan["steps_per_split"] >= steps
        assert (plan["num_splits"] - 1) * plan["steps_per_split"] < max(steps, 1)
        assert plan["num_splits"] == 1 or plan["steps_per_split"] >= 4
        assert plan["num_splits"] <= 65535


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("groups", [0, 1, 7, 300])
def test_as_many_tiles_as_the_worst_ids_need(rows, groups):
    plan = _simt.plan_segment_down("bf16", rows, groups, 64, 8, num_sms=4)
    segments = min(rows, groups + 2)
    worst = [1] * (segments - 1) + [rows - segments + 1]
    tiles = sum(-(-count // plan["block_rows"]) for count in worst)
    assert tiles <= plan["max_tiles"] <= tiles + segments


def test_prefill_fills_the_device():
    """H100, M = 8192: as many blocks as tiles, nothing split; few rows are."""
    plan = _simt.plan_segment_down("bf16", 8192, 8, 4096, 16, num_sms=132)
    assert plan["num_splits"] == 1 and plan["max_tiles"] >= 128
    plan = _simt.plan_segment_down("bf16", 64, 8, 4096, 16, num_sms=132)
    assert plan["num_splits"] == 16 and plan["block_rows"] == 16
