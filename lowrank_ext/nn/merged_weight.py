"""The weight that a merge writes, with the checks that come before it is written."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank_ext.nn.quantized import dequantized_weight, way_out

if TYPE_CHECKING:
    from lowrank_ext.nn.low_rank_linear import LowRankLinear


def merged_weight(module: "LowRankLinear", dense_dtype: torch.dtype | None = None) -> Tensor:
    """round(fp32(W) + delta_weight()) in the layout of the base's weight, a new tensor.

    Args:
        dense_dtype: of the result for a quantized base, whose W is taken dense; None refuses one.

    Raises:
        TypeError: the base does not compute x weightᵀ + bias with a floating-point weight, or the
            branch is no single matrix.
        ValueError: the weight has no values, the sum is not finite in its dtype, or the adapter is
            switched off.
    """
    owner = f"{type(module).__name__}.merge"
    if module.unmergeable_because:
        raise TypeError(f"{owner}: the branch must be one matrix, {module.unmergeable_because}")
    if module.blocks:
        raise ValueError(
            f"{owner}: the adapter must act, got one that lr.disable_adapter has switched off; "
            "merge after its block"
        )
    weight: Tensor | None = module.mergeable_parameter
    if weight is None and dense_dtype is not None and module.base_layer is not None:
        weight = dequantized_weight(module.base_layer)
    if weight is None:
        base = module if module.base_layer is None else module.base_layer
        raise TypeError(
            f"{owner}: the base must compute x weightᵀ + bias with a floating-point weight, got "
            f"{type(base).__name__}{way_out(base)}"
        )
    if weight.is_meta:
        raise ValueError(
            f"{owner}: the base weight must hold values, got a meta tensor; load or merge the "
            "model without offloading"
        )
    merged = module.with_delta(weight).to(dense_dtype or weight.dtype)
    check_finite(merged, owner)
    return merged


def check_finite(merged: Tensor, owner: str, what: str = "weight") -> None:
    """Raise ValueError where what is to be written into a base is not finite."""
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"{owner}: the merged {what} must be finite in {str(merged.dtype)[6:]}, got inf or "
            "nan; keep the adapter unmerged, or load the base in a dtype of wider range"
        )


def without_gradient(module: nn.Module, y: Tensor) -> Tensor:
    """y, the output of a merged module in training mode; a backward through it raises, since no
    gradient would reach the adapter."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return y
    if not y.requires_grad:
        y = y.detach().requires_grad_().clone()  # no leaf: the model may change it in place
    owner = f"{type(module).__name__}.forward"

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError(
            f"{owner}: the adapter must be unmerged to train, got a backward through a merged "
            "module in training mode; call lr.unmerge(model) first, or model.eval() for gradients "
            "of the input"
        )

    y.register_hook(refuse)
    return y
