"""experts/dense_stack.cuh: router and experts in one matrix, and their gradients apart."""

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
    acc_dtype,
    assert_lean,
    integers,
    matrix,
    normal,
    reports_of,
    spread,
)
from torch import Tensor

# Experts, rank, in_features, out_features.
SIZES = [(1, 1, 1, 1), (3, 2, 33, 17), (8, 4, 64, 40), (5, 17, 20, 9), (2, 3, 0, 5), (2, 3, 5, 0)]
LAYOUTS = [{}, {"padded": True}, {"padded": True, "shared_dropout": True}]


def adapters(compute_type: str, sizes, dtype=None) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, rank, num_in, num_out = sizes
    shapes = (num_experts, num_in), (num_experts * rank, num_in), (num_experts * num_out, rank)
    tensors = (
        normal(*shape, compute_type="fp64").to(dtype or DTYPES[compute_type]) for shape in shapes
    )
    router, lora_a, lora_b = tensors
    return router, lora_a, lora_b


def rows_of(columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where w holds the router's rows and lora_a's."""
    num_experts, rank, first, stride, _ = columns
    experts = first + stride * torch.arange(num_experts).unsqueeze(1) + torch.arange(rank)
    return torch.arange(num_experts), experts.flatten()


def stacked(columns, router: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    num_experts, rank, *_, num_cols = columns
    router_rows, lora_a_rows = rows_of(columns)
    w = router.new_zeros(num_cols, router.shape[1])
    w[router_rows], w[lora_a_rows] = router, lora_a
    by_row = lora_b.reshape(num_experts, lora_b.shape[0] // num_experts, rank).transpose(0, 1)
    return w, by_row.reshape(by_row.shape[0], num_experts * rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "own masks", "shared mask"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_stack(compute_type, sizes, layout):
    """Rounded once; zero in padding columns; strided rows of the result."""
    columns = _simt.dense_columns(*sizes[:2], **layout)
    wide = torch.float32 if compute_type in ("bf16", "fp16") and sizes[0] == 3 else None
    tensors = adapters(compute_type, sizes, wide)
    expected = [tensor.to(DTYPES[compute_type]) for tensor in stacked(columns, *tensors)]
    w, up = (spread(torch.full_like(tensor, torch.nan), 1, 3) for tensor in expected)
    _simt.dense_stack(compute_type, columns, *map(matrix, tensors), matrix(w), matrix(up))
    assert torch.equal(w, expected[0])
    assert torch.equal(up, expected[1])
    alone = torch.full_like(expected[1], torch.nan)
    _simt.dense_stack(compute_type, columns, *map(matrix, tensors), None, matrix(alone))
    assert torch.equal(alone, up)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "own masks", "shared mask"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_unstack(compute_type, sizes, layout):
    """Partial sums added, each gradient in its own dtype."""
    num_experts, rank, num_in, num_out = sizes
    columns, num_partials = _simt.dense_columns(num_experts, rank, **layout), 3
    dw = integers(num_partials, columns[4], num_in, compute_type=compute_type, low=-9, high=9).to(
        acc_dtype(compute_type)
    )
    dup = normal(num_out, num_experts * rank, compute_type="fp64").to(acc_dtype(compute_type))
    router_rows, lora_a_rows = rows_of(columns)
    by_expert = dup.reshape(num_out, num_experts, rank).transpose(0, 1)
    expected = (
        dw.sum(0)[router_rows],
        dw.sum(0)[lora_a_rows],
        by_expert.reshape(num_experts * num_out, rank),
    )
    dtypes = acc_dtype(compute_type), DTYPES[compute_type], DTYPES[compute_type]
    got = [
        torch.full_like(tensor, torch.nan, dtype=dtype)
        for tensor, dtype in zip(expected, dtypes, strict=True)
    ]
    arguments = matrix(dw.flatten(0, 1)), num_partials, matrix(dup)
    _simt.dense_unstack(compute_type, columns, *arguments, *map(matrix, got))
    for tensor, wanted in zip(got, expected, strict=True):
        assert torch.equal(tensor, wanted.to(tensor.dtype))
    alone = torch.full_like(got[1], torch.nan)
    _simt.dense_unstack(compute_type, columns, *arguments, None, matrix(alone), None)
    assert torch.equal(alone, got[1])


def test_traffic():
    """Everything once; in whole sectors, as 16 ranks of two bytes fill one."""
    columns = _simt.dense_columns(8, 16)
    tensors = adapters("bf16", (8, 16, 256, 128))
    w, up = (torch.empty_like(tensor) for tensor in stacked(columns, *tensors))
    call = map(matrix, (*tensors, w, up))
    [report] = reports_of(lambda: _simt.dense_stack("bf16", columns, *call))
    assert_lean(report, 2 * sum(tensor.nbytes for tensor in (w, up)))
