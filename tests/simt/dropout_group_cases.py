"""What the tests of dense_down, dense_outer and dense_expand share: columns in groups, each of
which sees x through a dropout mask of its own (experts/dropout_groups.h), and the calls."""

from typing import Any

import torch
from kernel_calls import _simt, acc_dtype, matrix, threshold_and_seed
from lowrank_cases import seed_tensor
from torch import Tensor

from lowrank_ext import reference

SEED = -0x1234_5678_9ABC_DEF0
Experts = tuple[int, int]  # number of experts, rank of each

# (M, K, experts): ragged in every letter, groups of one unit and of several, units that share a
# rank tile and groups that lie across two, more than 256 columns.
SHAPES = [
    (1, 1, (1, 1)),
    (17, 65, (2, 3)),
    (64, 64, (3, 4)),
    (65, 131, (8, 4)),
    (63, 17, (5, 16)),
    (130, 15, (2, 64)),
    (33, 70, (20, 1)),
    (66, 33, (17, 8)),
]


# ---- the columns


def padded_columns(experts: Experts, shared_dropout: bool) -> tuple[int, ...]:
    return _simt.dense_columns(*experts, padded=True, shared_dropout=shared_dropout)


def num_group_columns(experts: Experts, shared_dropout: bool) -> int:
    return padded_columns(experts, shared_dropout)[-1]


def column_groups(experts: Experts, shared_dropout: bool) -> list[tuple[slice, int | None]]:
    """The columns of the router and of each expert, and the mask that they see."""
    num_experts, rank, first, stride, _ = padded_columns(experts, shared_dropout)
    groups: list[tuple[slice, int | None]] = [(slice(0, num_experts), None)]
    for expert in range(num_experts):
        start = first + expert * stride
        groups.append((slice(start, start + rank), 0 if shared_dropout else expert))
    return groups


def zero_between_groups(dz: Tensor, experts: Experts, shared_dropout: bool) -> Tensor:
    """dz [M, R] with zeros in the padding columns."""
    result = torch.zeros_like(dz)
    for columns, _ in column_groups(experts, shared_dropout):
        result[:, columns] = dz[:, columns]
    return result


def make_dz(
    make: Any, compute_type: str, rows: int, experts: Experts, shared_dropout: bool
) -> Tensor:
    """Two of three rows of each expert's columns are zero: the expert was not chosen."""
    dz = make(rows, num_group_columns(experts, shared_dropout), compute_type=compute_type)
    for columns, mask in column_groups(experts, shared_dropout):
        if mask is not None:
            dz[torch.randint(3, (rows,)) > 0, columns] = 0
    return zero_between_groups(dz, experts, shared_dropout)


def make_w(
    make: Any, compute_type: str, cols: int, experts: Experts, shared_dropout: bool
) -> Tensor:
    w = make(num_group_columns(experts, shared_dropout), cols, compute_type=compute_type)
    return zero_between_groups(w.mT, experts, shared_dropout).mT.contiguous()


def kept_and_scale(x: Tensor, mask: int | None, dropout_p: float) -> tuple[Tensor, float]:
    """x with zeros where the mask drops, and the scale of what is kept."""
    if mask is None:
        return x, 1.0
    kept = reference.dropout_mask(SEED, *x.shape, dropout_p, expert=mask)
    return torch.where(kept, x, 0), reference.dropout_scale(dropout_p)


# ---- calls


def partial_sums(compute_type: str, sizes: dict[str, int], num_rows: int) -> Tensor:
    """[splits, rows, row_stride], exactly as large as the workspace, of NaN."""
    shape = (sizes["num_splits"], num_rows, sizes["row_stride"])
    sums = torch.full(shape, float("nan"), dtype=acc_dtype(compute_type))
    assert sums.numel() * sums.itemsize == sizes["bytes"]
    return sums


def dense_down(
    compute_type: str,
    x: Tensor,
    w: Tensor,
    experts: Experts,
    shared_dropout: bool,
    dropout_p: float,
    *,
    num_sms: int = 4,
) -> Tensor:
    """z [splits, M, R], in the accumulator's type."""
    sizes = _simt.dense_down_workspace(compute_type, *x.shape, w.shape[0], num_sms=num_sms)
    z, seed = partial_sums(compute_type, sizes, x.shape[0]), seed_tensor(SEED)
    _simt.dense_down(
        compute_type,
        matrix(x),
        matrix(w),
        padded_columns(experts, shared_dropout),
        shared_dropout=shared_dropout,
        **threshold_and_seed(dropout_p, seed),
        z=z.data_ptr(),
        num_sms=num_sms,
    )
    return z[..., : w.shape[0]]


def dense_outer(
    compute_type: str,
    dz: Tensor,
    x: Tensor,
    experts: Experts,
    shared_dropout: bool,
    dropout_p: float,
    *,
    num_sms: int = 4,
) -> Tensor:
    """dw [splits, R, K], in the accumulator's type."""
    sizes = _simt.dense_outer_workspace(compute_type, *x.shape, dz.shape[1], num_sms=num_sms)
    dw, seed = partial_sums(compute_type, sizes, dz.shape[1]), seed_tensor(SEED)
    _simt.dense_outer(
        compute_type,
        matrix(dz),
        matrix(x),
        padded_columns(experts, shared_dropout),
        shared_dropout=shared_dropout,
        **threshold_and_seed(dropout_p, seed),
        dw=dw.data_ptr(),
        num_sms=num_sms,
    )
    return dw[..., : x.shape[1]]


def dense_expand(
    compute_type: str,
    dz: Tensor,
    w: Tensor,
    experts: Experts,
    shared_dropout: bool,
    dropout_p: float,
    *,
    dx: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    if dx is None:
        dx = torch.full((dz.shape[0], w.shape[1]), float("nan"), dtype=dz.dtype)
    seed = seed_tensor(SEED)
    _simt.dense_expand(
        compute_type,
        matrix(dz),
        matrix(w),
        padded_columns(experts, shared_dropout),
        shared_dropout=shared_dropout,
        **threshold_and_seed(dropout_p, seed),
        dx=matrix(dx),
        num_sms=num_sms,
    )
    return dx
