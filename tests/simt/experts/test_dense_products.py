"""The dense form's products under dropout, z = drop_g(x) w_gᵀ and dw = dz_gᵀ drop_g(x) by groups of
columns: experts/dropout_product.cuh on the SIMT executor."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from dropout_group_cases import (
    SEED,
    SHAPES,
    column_groups,
    dense_down,
    dense_outer,
    kept_and_scale,
    make_dz,
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
from torch import Tensor

from lowrank_ext import reference


class Product(NamedTuple):
    """One of the two, of a pair of operands."""

    run: Callable[..., Tensor]  # [splits, …]
    formula: Callable[..., Callable[..., Tensor]]  # of experts, shared_dropout and dropout_p
    operands: Callable[..., tuple[Tensor, Tensor]]
    many_steps: tuple[int, int]  # rows and columns of x, with several splits
    by_column: Callable[[Tensor], Tensor]  # a result with the groups' columns last


def down_formula(experts, shared_dropout, dropout_p):
    def z(x, w, rounding):
        result = x.new_zeros(x.shape[0], w.shape[0])
        for columns, mask in column_groups(experts, shared_dropout):
            kept, scale = kept_and_scale(x, mask, dropout_p)
            result[:, columns] = (rounding(kept) @ rounding(w[columns]).mT) * scale
        return result

    return z


def down_operands(make, compute_type, rows, cols, experts, shared_dropout):
    w = make_w(make, compute_type, cols, experts, shared_dropout)
    return make(rows, cols, compute_type=compute_type), w


def outer_formula(experts, shared_dropout, dropout_p):
    def dw(dz, x, rounding):
        result = x.new_zeros(dz.shape[1], x.shape[1])
        for columns, mask in column_groups(experts, shared_dropout):
            kept, scale = kept_and_scale(x, mask, dropout_p)
            result[columns] = (rounding(dz[:, columns]).mT @ rounding(kept)) * scale
        return result

    return dw


def outer_operands(make, compute_type, rows, cols, experts, shared_dropout):
    dz = make_dz(make, compute_type, rows, experts, shared_dropout)
    return dz, make(rows, cols, compute_type=compute_type)


DOWN = Product(dense_down, down_formula, down_operands, (70, 1100), lambda z: z)
OUTER = Product(dense_outer, outer_formula, outer_operands, (700, 70), lambda dw: dw.mT)
both = pytest.mark.parametrize("product", [DOWN, OUTER], ids=["down", "outer"])


@both
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_shapes(product, compute_type, shape, shared_dropout):
    """At p = 0.5 the scale is 2 and every sum exact."""
    rows, cols, experts = shape
    pair = product.operands(integers, compute_type, rows, cols, experts, shared_dropout)
    got = product.run(compute_type, *pair, experts, shared_dropout, 0.5)
    expected = true(product.formula(experts, shared_dropout, 0.5), *pair)
    assert torch.equal(got.double().sum(0), expected)


def test_down_of_no_columns_and_no_rows():
    experts, columns = (2, 4), num_group_columns((2, 4), False)
    x, w = integers(20, 0, compute_type="bf16"), integers(columns, 0, compute_type="bf16")
    assert torch.equal(dense_down("bf16", x, w, experts, False, 0.5), torch.zeros(1, 20, columns))
    empty, w = DOWN.operands(integers, "bf16", 0, 64, experts, False)
    assert reports_of(lambda: dense_down("bf16", empty, w, experts, False, 0.5)) == []


def test_outer_of_no_rows():
    dz, x = OUTER.operands(integers, "bf16", 0, 65, (2, 4), False)
    dw = dense_outer("bf16", dz, x, (2, 4), False, 0.5)
    assert torch.equal(dw, torch.zeros(1, dz.shape[1], 65))


@both
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(product, compute_type, offset, padding):
    experts = (3, 4)
    dense = product.operands(integers, compute_type, 66, 70, experts, False)
    pair = [spread(tensor, offset, padding) for tensor in dense]
    with free_banks():
        got = product.run(compute_type, *pair, experts, False, 0.5)
    assert torch.equal(got.double().sum(0), true(product.formula(experts, False, 0.5), *pair))


@both
@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_splits(product, compute_type, num_sms):
    experts = (2, 4)
    pair = product.operands(integers, compute_type, *product.many_steps, experts, False)
    got = product.run(compute_type, *pair, experts, False, 0.5, num_sms=num_sms)
    assert (got.shape[0] > 1) == (num_sms > 2)
    assert torch.equal(got.double().sum(0), true(product.formula(experts, False, 0.5), *pair))


@both
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_everything_dropped_but_for_the_router(product, shared_dropout):
    experts = (3, 4)
    pair = product.operands(integers, "bf16", 65, 130, experts, shared_dropout)
    got = product.by_column(product.run("bf16", *pair, experts, shared_dropout, 1.0)[0].double())
    undropped = product.by_column(true(product.formula(experts, shared_dropout, 0.0), *pair))
    assert torch.equal(got[:, :3], undropped[:, :3])
    assert torch.equal(got[:, 3:], torch.zeros_like(got[:, 3:]))


def test_what_is_dropped_may_be_nan():
    """Where one mask drops an element and another keeps it, only the other's columns are NaN."""
    experts = (2, 4)
    x, w = DOWN.operands(integers, "bf16", 20, 64, experts, False)
    w[:] = 1
    kept = reference.dropout_mask(SEED, 20, 64, 0.5)
    z = dense_down("bf16", torch.where(kept, x, torch.nan), w, experts, False, 0.5)[0]
    first, second = (columns for columns, mask in column_groups(experts, False) if mask is not None)
    assert z[:, :2].isnan().all() and z[:, second].isnan().any()
    assert torch.equal(z[:, first.start].double(), 2 * torch.where(kept, x, 0).double().sum(1))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_tokens_reach_their_own_experts_only(compute_type, shared_dropout):
    """Not even with NaN and infinities, which are in dz too where the expert was chosen."""
    experts = (4, 4)
    dz, x = OUTER.operands(integers, compute_type, 70, 65, experts, shared_dropout)
    _, *groups = column_groups(experts, shared_dropout)
    (first, _), (second, _), *_ = groups
    dz[:, first] = 0
    dz[11] = 0
    expected = true(OUTER.formula(experts, shared_dropout, 0.5), dz, x)
    dz[11, second], x[11], x[11, ::2] = torch.nan, torch.nan, float("inf")
    dw = dense_outer(compute_type, dz, x, experts, shared_dropout, 0.5).double().sum(0)
    assert dw[second].isnan().all()
    for columns, _ in groups:
        assert columns == second or torch.equal(dw[columns], expected[columns])


@both
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_rounding(product, compute_type, shared_dropout):
    experts = (4, 8)
    rows, cols = (70, 400) if product is DOWN else (350, 70)
    pair = product.operands(normal, compute_type, rows, cols, experts, shared_dropout)
    f = product.formula(experts, shared_dropout, 0.3)
    got = product.run(compute_type, *pair, experts, shared_dropout, 0.3, num_sms=8)
    assert_within_rule(compute_type, got.sum(0), plain(compute_type, f, *pair), true(f, *pair))
    _simt.set_options(schedule_seed=1)
    again = product.run(compute_type, *pair, experts, shared_dropout, 0.3, num_sms=8)
    assert torch.equal(again, got)


traffic_cases = pytest.mark.parametrize(
    ("compute_type", "experts", "shared_dropout"),
    [
        ("bf16", (3, 16), False),
        ("bf16", (8, 16), False),
        ("bf16", (8, 4), True),
        ("fp32", (3, 16), False),
        ("fp64", (3, 16), False),
    ],
)


@traffic_cases
def test_traffic_of_down(compute_type, experts, shared_dropout):
    """x is read once per 64 columns, w once per 64 rows."""
    rows, cols, size = 192, 512, DTYPES[compute_type].itemsize
    x, w = DOWN.operands(normal, compute_type, rows, cols, experts, shared_dropout)
    [report] = reports_of(lambda: dense_down(compute_type, x, w, experts, shared_dropout, 0.3))
    columns = w.shape[0]
    rank_tiles = -(-columns // 64)
    assert traffic_of(report, "x")["bytes_read"] == rank_tiles * size * rows * cols
    assert traffic_of(report, "w")["bytes_read"] == rows // 64 * size * cols * columns
    partial_bytes = acc_dtype(compute_type).itemsize * rows * columns
    assert traffic_of(report, "partials")["bytes_written"] == partial_bytes
    assert_lean(report, size * (rows + columns) * cols + partial_bytes)
    assert report["shared_conflicts"] == 0


@traffic_cases
def test_traffic_of_outer(compute_type, experts, shared_dropout):
    """x is read once per 64 columns of dz, dz once per 64 columns of x."""
    rows, cols, size = 512, 192, DTYPES[compute_type].itemsize
    dz, x = OUTER.operands(normal, compute_type, rows, cols, experts, shared_dropout)
    [report] = reports_of(lambda: dense_outer(compute_type, dz, x, experts, shared_dropout, 0.3))
    columns = dz.shape[1]
    rank_tiles = -(-columns // 64)
    partial_bytes = report["grid"][1] * acc_dtype(compute_type).itemsize * columns * cols
    assert traffic_of(report, "x")["bytes_read"] == rank_tiles * size * rows * cols
    assert traffic_of(report, "dz")["bytes_read"] == cols // 64 * size * rows * columns
    assert traffic_of(report, "partials")["bytes_written"] == partial_bytes
    assert_lean(report, size * rows * (columns + cols) + partial_bytes)
    assert report["shared_conflicts"] == 0
