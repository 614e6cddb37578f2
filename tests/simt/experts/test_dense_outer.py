"""dw = dz_gᵀ drop_g(x) by groups of columns: experts/dropout_product.cuh on the executor."""

import pytest
import torch
from dropout_group_cases import (
    SHAPES,
    column_groups,
    dense_outer,
    kept_and_scale,
    make_dz,
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


def formula(experts, shared_dropout, dropout_p):
    def dw(dz, x, rounding):
        result = x.new_zeros(dz.shape[1], x.shape[1])
        for columns, mask in column_groups(experts, shared_dropout):
            kept, scale = kept_and_scale(x, mask, dropout_p)
            result[columns] = (rounding(dz[:, columns]).mT @ rounding(kept)) * scale
        return result

    return dw


def operands(make, compute_type, rows, cols, experts, shared_dropout):
    dz = make_dz(make, compute_type, rows, experts, shared_dropout)
    return dz, make(rows, cols, compute_type=compute_type)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_shapes(compute_type, shape, shared_dropout):
    """At p = 0.5 the scale is 2 and every sum exact."""
    rows, cols, experts = shape
    dz, x = operands(integers, compute_type, rows, cols, experts, shared_dropout)
    dw = dense_outer(compute_type, dz, x, experts, shared_dropout, 0.5)
    expected = true(formula(experts, shared_dropout, 0.5), dz, x)
    assert torch.equal(dw.double().sum(0), expected)


def test_no_rows():
    dz, x = operands(integers, "bf16", 0, 65, (2, 4), False)
    dw = dense_outer("bf16", dz, x, (2, 4), False, 0.5)
    assert torch.equal(dw, torch.zeros(1, dz.shape[1], 65))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    experts = (3, 4)
    dz, x = (
        spread(tensor, offset, padding)
        for tensor in operands(integers, compute_type, 66, 70, experts, False)
    )
    with free_banks():
        dw = dense_outer(compute_type, dz, x, experts, False, 0.5)
    assert torch.equal(dw.double().sum(0), true(formula(experts, False, 0.5), dz, x))


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_splits(compute_type, num_sms):
    dz, x = operands(integers, compute_type, 700, 70, (2, 4), False)
    dw = dense_outer(compute_type, dz, x, (2, 4), False, 0.5, num_sms=num_sms)
    assert (dw.shape[0] > 1) == (num_sms > 2)
    assert torch.equal(dw.double().sum(0), true(formula((2, 4), False, 0.5), dz, x))


@pytest.mark.parametrize("shared_dropout", [False, True])
def test_everything_dropped_but_for_the_router(shared_dropout):
    dz, x = operands(integers, "bf16", 65, 130, (3, 4), shared_dropout)
    dw = dense_outer("bf16", dz, x, (3, 4), shared_dropout, 1.0)[0].double()
    assert torch.equal(dw[:3], dz[:, :3].double().mT @ x.double())
    assert torch.equal(dw[3:], torch.zeros_like(dw[3:]))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_tokens_reach_their_own_experts_only(compute_type, shared_dropout):
    """Not even with NaN and infinities, which are in dz too where the expert was chosen."""
    experts = (4, 4)
    dz, x = operands(integers, compute_type, 70, 65, experts, shared_dropout)
    _, *groups = column_groups(experts, shared_dropout)
    (first, _), (second, _), *_ = groups
    dz[:, first] = 0
    dz[11] = 0
    expected = true(formula(experts, shared_dropout, 0.5), dz, x)
    dz[11, second], x[11], x[11, ::2] = torch.nan, torch.nan, float("inf")
    dw = dense_outer(compute_type, dz, x, experts, shared_dropout, 0.5).double().sum(0)
    assert dw[second].isnan().all()
    for columns, _ in groups:
        assert columns == second or torch.equal(dw[columns], expected[columns])


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_rounding(compute_type, shared_dropout):
    experts = (4, 8)
    dz, x = operands(normal, compute_type, 350, 70, experts, shared_dropout)
    f = formula(experts, shared_dropout, 0.3)
    dw = dense_outer(compute_type, dz, x, experts, shared_dropout, 0.3, num_sms=8)
    assert_within_rule(compute_type, dw.sum(0), plain(compute_type, f, dz, x), true(f, dz, x))
    _simt.set_options(schedule_seed=1)
    assert torch.equal(
        dense_outer(compute_type, dz, x, experts, shared_dropout, 0.3, num_sms=8), dw
    )


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
    """x is read once per 64 columns of dz, dz once per 64 columns of x."""
    rows, cols, size = 512, 192, DTYPES[compute_type].itemsize
    dz, x = operands(normal, compute_type, rows, cols, experts, shared_dropout)
    [report] = reports_of(lambda: dense_outer(compute_type, dz, x, experts, shared_dropout, 0.3))
    columns = dz.shape[1]
    rank_tiles = -(-columns // 64)
    partial_bytes = report["grid"][1] * acc_dtype(compute_type).itemsize * columns * cols
    assert traffic_of(report, "x")["bytes_read"] == rank_tiles * size * rows * cols
    assert traffic_of(report, "dz")["bytes_read"] == cols // 64 * size * rows * columns
    assert traffic_of(report, "partials")["bytes_written"] == partial_bytes
    assert_lean(report, size * rows * (columns + cols) + partial_bytes)
    assert report["shared_conflicts"] == 0
