"""experts/dense_expand.cuh: dx = Σ_g drop'_g(dz_g w_g) over groups of columns."""

import pytest
import torch
from dropout_group_cases import (
    SHAPES,
    column_groups,
    dense_expand,
    kept_and_scale,
    make_dz,
    make_w,
)
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
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
    def dx(dz, w, rounding):
        result = dz.new_zeros(dz.shape[0], w.shape[1])
        for columns, mask in column_groups(experts, shared_dropout):
            part = rounding(dz[:, columns]) @ rounding(w[columns])
            kept, scale = kept_and_scale(part, mask, dropout_p)
            result = result + kept * scale
        return result

    return dx


def operands(make, compute_type, rows, cols, experts, shared_dropout):
    dz = make_dz(make, compute_type, rows, experts, shared_dropout)
    return dz, make_w(make, compute_type, cols, experts, shared_dropout)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_shapes(compute_type, shape, shared_dropout):
    """At p = 0.5 the scale is 2 and every sum exact."""
    rows, cols, experts = shape
    dz, w = operands(integers, compute_type, rows, cols, experts, shared_dropout)
    dx = dense_expand(compute_type, dz, w, experts, shared_dropout, 0.5)
    assert torch.equal(dx, true(formula(experts, shared_dropout, 0.5), dz, w).to(dx.dtype))


def test_no_rows():
    dz, w = operands(integers, "bf16", 0, 65, (2, 4), False)
    assert reports_of(lambda: dense_expand("bf16", dz, w, (2, 4), False, 0.5)) == []


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    experts = (3, 4)
    dz, w, dx = (
        spread(tensor, offset, padding)
        for tensor in (
            *operands(integers, compute_type, 66, 67, experts, False),
            integers(66, 67, compute_type=compute_type),
        )
    )
    expected = true(formula(experts, False, 0.5), dz, w).to(DTYPES[compute_type])
    with free_banks():
        got = dense_expand(compute_type, dz, w, experts, False, 0.5, dx=dx)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shared_dropout", [False, True])
def test_everything_dropped_but_for_the_router(shared_dropout):
    dz, w = operands(integers, "fp32", 65, 130, (3, 4), shared_dropout)
    dz[:, 3:].clamp_(max=0).mul_(float("inf")).nan_to_num_(nan=0.0, neginf=float("inf"))
    dx = dense_expand("fp32", dz, w, (3, 4), shared_dropout, 1.0)
    assert torch.equal(dx, dz[:, :3] @ w[:3])


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_rows_get_nothing_from_experts_that_they_did_not_choose(compute_type):
    """Neither do those of a warp none of whose rows chose the expert."""
    dz, w = operands(integers, compute_type, 70, 65, (4, 4), False)
    dz[:, 16:32] = 0
    dz[5, 16:20] = 1
    expected = true(formula((4, 4), False, 0.5), dz, w).to(DTYPES[compute_type])
    assert torch.equal(dense_expand(compute_type, dz, w, (4, 4), False, 0.5), expected)
    w[16:20] = float("inf")
    dx = dense_expand(compute_type, dz, w, (4, 4), False, 0.5)
    others = torch.arange(70) != 5
    assert torch.equal(dx[others], expected[others]) and not dx[5].isfinite().all()


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_rounding(compute_type, shared_dropout):
    experts = (4, 8)
    dz, w = operands(normal, compute_type, 150, 70, experts, shared_dropout)
    f = formula(experts, shared_dropout, 0.3)
    dx = dense_expand(compute_type, dz, w, experts, shared_dropout, 0.3)
    assert_within_rule(compute_type, dx, plain(compute_type, f, dz, w), true(f, dz, w))
    _simt.set_options(schedule_seed=1)
    assert torch.equal(dense_expand(compute_type, dz, w, experts, shared_dropout, 0.3), dx)


@pytest.mark.parametrize("compute_type", ["bf16", "tf32", "fp32", "fp64"])
def test_traffic(compute_type):
    """dx is written once; dz is read again, from L2, per 128 bytes of columns, w per 128 rows."""
    rows, cols, experts, size = 256, 512, (4, 4), DTYPES[compute_type].itemsize
    dz, w = operands(normal, compute_type, rows, cols, experts, False)
    [report] = reports_of(lambda: dense_expand(compute_type, dz, w, experts, False, 0.3))
    columns = w.shape[0]
    assert traffic_of(report, "dx")["bytes_written"] == size * rows * cols
    assert traffic_of(report, "dz")["bytes_read"] == cols * size // 128 * size * rows * columns
    assert traffic_of(report, "w")["bytes_read"] == rows // 128 * size * cols * columns
    assert_lean(report, size * (rows * cols + (rows + cols) * columns))


def test_experts_that_nobody_chose_are_not_multiplied():
    dz, w = operands(normal, "bf16", 128, 64, (8, 4), False)
    dz[:, 16:] = 0
    dz[:16, 32:36] = 1
    [report] = reports_of(lambda: dense_expand("bf16", dz, w, (8, 4), False, 0.3))
    units = 8 + 1  # of 16 rows and 16 columns: the router's of eight warps, one expert's of one
    assert report["mma"] == units * 8
