"""y = base + scaling[i] h lora_b[i]ᵀ and dx = drop'(dh lora_a[i]), row by row, by the row's group:
segments/segment_up.cuh on the SIMT executor, and how it is planned."""

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
    segment_down_backward_x,
    segment_up,
    spread_stack,
)

from lowrank_ext import reference

# (M, C, r): ragged, both block sizes, one rank tile and several.
SHAPES = [(1, 1, 1), (17, 65, 3), (64, 130, 17), (65, 63, 16), (130, 66, 33), (70, 200, 70)]


def up(groups, base, h, right, factors, rounding=lambda t: t):
    """right [n, r, C]; base may be absent."""
    out = torch.zeros(h.shape[0], right.shape[2], dtype=h.dtype)
    for group, rank, rows in groups.segments(right.shape[1]):
        branch = rounding(h[rows, :rank]) @ rounding(right[group, :rank])
        out[rows] = branch * float(factors[group])
        if base is not None:
            out[rows] += base[rows]
    return groups.fill(out, right.shape[1], base)


def bits(tensor):
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(compute_type, shape):
    rows, cols, rank = shape
    scaling_dtype = torch.float32 if rows % 2 else torch.float64
    groups = Groups.named("random", rows, rank)
    base, h = (
        integers(rows, cols, compute_type=compute_type),
        integers(rows, rank, compute_type=compute_type),
    )
    lora_b = poison_padding(groups, integers(5, cols, rank, compute_type=compute_type), 2)
    scaling = scalings(5, scaling_dtype)
    expected = up(groups, base.double(), h.double(), lora_b.double().mT, scaling)
    same(segment_up(compute_type, groups, base, h, lora_b, scaling), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(compute_type, shape):
    rows, cols, rank = shape
    groups = Groups.named("random", rows, rank)
    dh = integers(rows, rank, compute_type=compute_type)
    lora_a = poison_padding(groups, integers(5, rank, cols, compute_type=compute_type), 1)
    expected = up(groups, None, dh.double(), lora_a.double(), [1.0] * 5)
    got = segment_down_backward_x(compute_type, groups, dh, lora_a)
    same(got, expected)
    none = torch.tensor([groups.rank(i, rank) == 0 for i in groups.ids.tolist()])
    assert (bits(got)[none] == 0).all()


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("rows", "num_sms"), [(40, 132), (90, 1), (70, 132)])
def test_ids(name, rows, num_sms):
    groups = Groups.named(name, rows, 9)
    base, h = integers(rows, 300, compute_type="bf16"), integers(rows, 9, compute_type="bf16")
    n = groups.num_groups
    lora_b = poison_padding(groups, integers(n, 300, 9, compute_type="bf16"), 2)
    expected = up(groups, base.double(), h.double(), lora_b.double().mT, scalings(n))
    same(segment_up("bf16", groups, base, h, lora_b, scalings(n), num_sms=num_sms), expected)
    lora_a = poison_padding(groups, integers(n, 9, 300, compute_type="bf16"), 1)
    expected = up(groups, None, h.double(), lora_a.double(), [1.0] * n)
    same(segment_down_backward_x("bf16", groups, h, lora_a, num_sms=num_sms), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("cols", "padding"), [(200, 8), (67, 0), (67, 3)])
@pytest.mark.parametrize("rows", [20, 70])
def test_rows_without_a_group_keep_their_bits(compute_type, rows, cols, padding):
    """-0.0 and any NaN included."""
    groups = Groups.named("random", rows, 4)
    base, h = (
        normal(rows, cols, compute_type=compute_type),
        normal(rows, 4, compute_type=compute_type),
    )
    base[:, ::3] = -0.0
    bits(base)[:, 1::5] = bits(torch.full((), torch.nan, dtype=base.dtype)) + 1
    expected = base.clone()
    none = torch.tensor([groups.rank(i, 4) == 0 for i in groups.ids.tolist()])
    h[none] = torch.nan
    lora_b = normal(5, cols, 4, compute_type=compute_type)
    y = segment_up(compute_type, groups, spread(base, 0, padding), h, lora_b, scalings(5))
    assert torch.equal(bits(y)[none], bits(expected)[none])


def test_ranks_out_of_range_give_nan_rows():
    groups = Groups.of([0, 1, 2, 3, -1, 4, -5], 4, [5, 6, -1, 2])
    base, h = integers(7, 8, compute_type="fp32"), integers(7, 5, compute_type="fp32")
    y = segment_up("fp32", groups, base, h, integers(4, 8, 5, compute_type="fp32"), torch.ones(4))
    dx = segment_down_backward_x("fp32", groups, h, integers(4, 5, 8, compute_type="fp32"))
    for out in (y, dx):
        assert out[[1, 2, 5, 6]].isnan().all() and out[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    groups = Groups.named("random", 66, 18)
    base = spread(integers(66, 70, compute_type=compute_type), offset, padding)
    h = spread(integers(66, 18, compute_type=compute_type), offset, padding)
    lora_b = spread_stack(integers(5, 70, 18, compute_type=compute_type), offset, padding, gap=1)
    y = spread(torch.zeros_like(base), offset, padding)
    lora_a = spread_stack(integers(5, 18, 70, compute_type=compute_type), offset, padding, gap=1)
    with free_banks():
        y = segment_up(compute_type, groups, base, h, lora_b, scalings(5), y=y)
        dx = segment_down_backward_x(compute_type, groups, h, lora_a)
    same(y, up(groups, base.double(), h.double(), lora_b.double().mT, scalings(5)))
    same(dx, up(groups, None, h.double(), lora_a.double(), [1.0] * 5))


def test_large_ranks_and_nothing():
    """r = 600: 64 rows of h have no room."""
    assert _simt.plan_segment_up("fp32", 70, 5, 40, 600, num_sms=4)["block_rows"] == 16
    groups = Groups.named("random", 70, 600)
    base, h = integers(70, 40, compute_type="fp32"), integers(70, 600, compute_type="fp32")
    lora_b = integers(5, 40, 600, compute_type="fp32")
    expected = up(groups, base.double(), h.double(), lora_b.double().mT, scalings(5))
    same(segment_up("fp32", groups, base, h, lora_b, scalings(5)), expected)
    groups = Groups.of([], 5)
    for rows, cols in ((0, 64), (0, 0)):
        base, h = integers(rows, cols, compute_type="bf16"), integers(rows, 8, compute_type="bf16")
        lora_b = integers(5, cols, 8, compute_type="bf16")
        assert reports_of(lambda: segment_up("bf16", groups, base, h, lora_b, scalings(5))) == []  # noqa: B023


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("rows", [20, 70])
def test_dropout_is_that_of_the_whole_batch(compute_type, rows):
    groups = Groups.named("random", rows, 17)
    dh, lora_a = (
        integers(rows, 17, compute_type=compute_type),
        integers(5, 17, 130, compute_type=compute_type),
    )
    kept = reference.dropout_mask(SEED, rows, 130, 0.5)
    expected = 2 * up(groups, None, dh.double(), lora_a.double(), [1.0] * 5)
    expected = torch.where(kept, expected, 0)
    got = segment_down_backward_x(
        compute_type, groups, dh, lora_a, dropout_p=0.5, seed=seed_tensor(SEED)
    )
    same(got, expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("rows", [20, 70])
def test_rounding(compute_type, rows):
    groups = Groups.named("random", rows, 40, mixed_ranks=False)
    base, h = (
        normal(rows, 200, compute_type=compute_type),
        normal(rows, 40, compute_type=compute_type),
    )
    lora_b, scaling = normal(5, 200, 40, compute_type=compute_type), torch.full((5,), 0.3)
    y = segment_up(compute_type, groups, base, h, lora_b, scaling, num_sms=8)
    rounding = tf32 if compute_type == "tf32" else lambda t: t
    ordinary = up(groups, base, h, lora_b.mT, scaling, rounding)
    truth = up(groups, base.double(), h.double(), lora_b.double().mT, scaling)
    assert_within_rule(compute_type, y, ordinary, truth)
    _simt.set_options(schedule_seed=1)
    assert torch.equal(segment_up(compute_type, groups, base, h, lora_b, scaling, num_sms=8), y)


# ---- traffic


@pytest.mark.parametrize(
    ("compute_type", "rank"), [("bf16", 16), ("bf16", 64), ("fp32", 16), ("fp64", 16)]
)
def test_traffic(compute_type, rank):
    """Full tiles: base is read once and y written once, the third without a group too."""
    rows, cols, n = 192, 512, 2
    groups = Groups.of([i % 3 - 1 for i in range(rows)], n)
    base, h = (
        normal(rows, cols, compute_type=compute_type),
        normal(rows, rank, compute_type=compute_type),
    )
    lora_b = normal(n, cols, rank, compute_type=compute_type)
    [report] = reports_of(
        lambda: segment_up(compute_type, groups, base, h, lora_b, scalings(n), num_sms=1)
    )
    size = DTYPES[compute_type].itemsize
    assert traffic_of(report, "base")["bytes_read"] == size * rows * cols
    assert traffic_of(report, "out")["bytes_written"] == size * rows * cols
    assert traffic_of(report, "left")["unique_bytes_read"] == size * 128 * rank
    assert traffic_of(report, "right")["bytes_read"] == size * n * cols * rank
    assert_lean(report, size * (2 * rows * cols + n * cols * rank + 128 * rank) + 8 * rows)


def test_traffic_of_decoding():
    """Only adapters in use are read, and of them their own ranks."""
    n, rank, cols = 40, 16, 2048
    groups = Groups.of([3, 3, 17, -1, 30, 30, 30, 39], n, [16, 8, 16, 8] * 10)
    base, h = normal(8, cols, compute_type="bf16"), normal(8, rank, compute_type="bf16")
    lora_b = normal(n, cols, rank, compute_type="bf16")
    [report] = reports_of(
        lambda: segment_up("bf16", groups, base, h, lora_b, scalings(n), num_sms=132)
    )
    ranks = sum(rank for _, rank, _ in groups.segments(rank))
    assert ranks == 8 + 8 + 16 + 8
    assert traffic_of(report, "right")["bytes_read"] == 2 * ranks * cols
    assert traffic_of(report, "base")["bytes_read"] == 2 * 8 * cols
    assert traffic_of(report, "out")["bytes_written"] == 2 * 8 * cols
    assert report["grid"][1] > 1


def test_traffic_of_the_backward():
    rows, cols, rank, n = 128, 512, 16, 2
    groups = Groups.of([i % 2 for i in range(rows)], n)
    dh, lora_a = normal(rows, rank, compute_type="bf16"), normal(n, rank, cols, compute_type="bf16")
    [report] = reports_of(lambda: segment_down_backward_x("bf16", groups, dh, lora_a, num_sms=1))
    assert traffic_of(report, "right")["bytes_read"] == 2 * n * rank * cols
    assert_lean(report, 2 * (rows * cols + n * rank * cols + rows * rank) + 8 * rows)


# ---- plan


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_plan_covers_everything(compute_type, num_sms):
    warp_cols = 128 // DTYPES[compute_type].itemsize
    for rows, groups, cols, rank in itertools.product(
        [1, 64, 65, 8192, 10**9], [0, 1, 1000], [1, 65, 4096, 2**20], [1, 16, 33, 512]
    ):
        plan = _simt.plan_segment_up(compute_type, rows, groups, cols, rank, num_sms=num_sms)
        block_cols = warp_cols * (2 if plan["block_rows"] == 16 else 1)
        col_tiles = -(-cols // block_cols)
        assert plan["num_col_blocks"] * plan["col_tiles_per_block"] >= col_tiles
        assert (plan["num_col_blocks"] - 1) * plan["col_tiles_per_block"] < col_tiles
        assert plan["num_col_blocks"] <= 65535
        assert plan["max_tiles"] >= -(-rows // plan["block_rows"])
        assert plan["shared_bytes"] <= 99 * 1024
        assert plan["block_rows"] == 16 or rows > 64
