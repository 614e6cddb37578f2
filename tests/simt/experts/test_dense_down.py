"""z = drop_g(x) w_gᵀ by groups of columns: experts/dropout_product.cuh on the executor."""

import pytest
import torch
from dropout_group_cases import (
    SEED,
    SHAPES,
    column_groups,
    dense_down,
    kept_and_scale,
    make_w,
    num_group_columns,
)
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
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)

from lowrank_ext import reference


def formula(experts, shared_dropout, dropout_p):
    def z(x, w, rounding):
        result = x.new_zeros(x.shape[0], w.shape[0])
        for columns, mask in column_groups(experts, shared_dropout):
            kept, scale = kept_and_scale(x, mask, dropout_p)
            result[:, columns] = (rounding(kept) @ rounding(w[columns]).mT) * scale
        return result

    return z


def operands(make, compute_type, rows, cols, experts, shared_dropout):
    w = make_w(make, compute_type, cols, experts, shared_dropout)
    return make(rows, cols, compute_type=compute_type), w


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_shapes(compute_type, shape, shared_dropout):
    """At p = 0.5 the scale is 2 and every sum exact."""
    rows, cols, experts = shape
    x, w = operands(integers, compute_type, rows, cols, experts, shared_dropout)
    z = dense_down(compute_type, x, w, experts, shared_dropout, 0.5)
    expected = true(formula(experts, shared_dropout, 0.5), x, w)
    assert torch.equal(z.double().sum(0), expected)


def test_no_columns_and_no_rows():
    experts, columns = (2, 4), num_group_columns((2, 4), False)
    x, w = integers(20, 0, compute_type="bf16"), integers(columns, 0, compute_type="bf16")
    assert torch.equal(dense_down("bf16", x, w, experts, False, 0.5), torch.zeros(1, 20, columns))
    empty, w = operands(integers, "bf16", 0, 64, experts, False)
    assert reports_of(lambda: dense_down("bf16", empty, w, experts, False, 0.5)) == []


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    experts = (3, 4)
    x, w = (
        spread(tensor, offset, padding)
        for tensor in operands(integers, compute_type, 66, 70, experts, False)
    )
    with free_banks():
        z = dense_down(compute_type, x, w, experts, False, 0.5)
    assert torch.equal(z.double().sum(0), true(formula(experts, False, 0.5), x, w))


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_splits(compute_type, num_sms):
    x, w = operands(integers, compute_type, 70, 1100, (2, 4), False)
    z = dense_down(compute_type, x, w, (2, 4), False, 0.5, num_sms=num_sms)
    assert (z.shape[0] > 1) == (num_sms > 2)
    assert torch.equal(z.double().sum(0), true(formula((2, 4), False, 0.5), x, w))


@pytest.mark.parametrize("shared_dropout", [False, True])
def test_everything_dropped_but_for_the_router(shared_dropout):
    experts = (3, 4)
    x, w = operands(integers, "bf16", 65, 130, experts, shared_dropout)
    z = dense_down("bf16", x, w, experts, shared_dropout, 1.0)[0]
    assert torch.equal(z[:, :3].double(), x.double() @ w[:3].double().mT)
    assert torch.equal(z[:, 3:], torch.zeros_like(z[:, 3:]))


def test_what_is_dropped_may_be_nan():
    """Where one mask drops an element and another keeps it, only the other's columns are NaN."""
    experts = (2, 4)
    x, w = operands(integers, "bf16", 20, 64, experts, False)
    w[:] = 1
    kept = reference.dropout_mask(SEED, 20, 64, 0.5)
    z = dense_down("bf16", torch.where(kept, x, torch.nan), w, experts, False, 0.5)[0]
    first, second = (columns for columns, mask in column_groups(experts, False) if mask is not None)
    assert z[:, :2].isnan().all() and z[:, second].isnan().any()
    assert torch.equal(z[:, first.start].double(), 2 * torch.where(kept, x, 0).double().sum(1))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_rounding(compute_type, shared_dropout):
    experts = (4, 8)
    x, w = operands(normal, compute_type, 70, 400, experts, shared_dropout)
    f = formula(experts, shared_dropout, 0.3)
    z = dense_down(compute_type, x, w, experts, shared_dropout, 0.3, num_sms=8)
    assert_within_rule(compute_type, z.sum(0), plain(compute_type, f, x, w), true(f, x, w))
    _simt.set_options(schedule_seed=1)
    assert torch.equal(dense_down(compute_type, x, w, experts, shared_dropout, 0.3, num_sms=8), z)


@pytest.mark.parametrize(
    ("compute_type", "experts", "shared_dropout"),
    [
        ("bf16", (3, 16), False),
        ("bf16", (8, 16), False),
        ("bf16", (8, 4), True),
        ("fp32", (3, 16), False),
        ("fp64", (3, 16), False),
    ],
)
def test_traffic(compute_type, experts, shared_dropout):
    """x is read once per 64 columns, w once per 64 rows."""
    rows, cols, size = 192, 512, DTYPES[compute_type].itemsize
    x, w = operands(normal, compute_type, rows, cols, experts, shared_dropout)
    [report] = reports_of(lambda: dense_down(compute_type, x, w, experts, shared_dropout, 0.3))
    columns = w.shape[0]
    rank_tiles = -(-columns // 64)
    assert traffic_of(report, "x")["bytes_read"] == rank_tiles * size * rows * cols
    assert traffic_of(report, "w")["bytes_read"] == rows // 64 * size * cols * columns
    partial_bytes = acc_dtype(compute_type).itemsize * rows * columns
    assert traffic_of(report, "partials")["bytes_written"] == partial_bytes
    assert_lean(report, size * (rows + columns) * cols + partial_bytes)
    assert report["shared_conflicts"] == 0
