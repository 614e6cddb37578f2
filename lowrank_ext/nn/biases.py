"""Biases of branches: beside the base's in a call of the op, and inside of it after a merge."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_ext.nn.merged_weight import check_finite

if TYPE_CHECKING:
    from lowrank_ext.nn.low_rank_linear import LowRankLinear


def sum_of_biases(
    bias: Tensor | None, branch_bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The sum of those that are there, with one rounding to ``dtype``."""
    if branch_bias is None:
        return bias
    return (branch_bias if bias is None else bias + branch_bias).to(dtype)


def merged_bias(module: "LowRankLinear") -> Tensor | None:
    """round(fp32(bias) + branch_bias()), a new tensor; None where the branch has no bias.

    Raises:
        ValueError: the base has no bias of which the branch's could become a part, or the sum is
            not finite in its dtype.
    """
    branch_bias = module.branch_bias()
    if branch_bias is None:
        return None
    owner, bias = f"{type(module).__name__}.merge", module.base_bias
    if bias is None:
        raise ValueError(
            f"{owner}: the base must have a bias, to which lora_bias would be added, got none; "
            "keep the adapter unmerged"
        )
    merged = (bias + branch_bias).to(bias.dtype)
    check_finite(merged, owner, "bias")
    return merged
