"""Helpers of the ops' fakes: shape checks, in the words of csrc/checks.h, and gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, matches: bool, expected: str) -> None:
    """Raise RuntimeError unless ``matches``, with the shape of argument ``name``."""
    torch._check(
        matches,
        lambda: f"{op}: {name} must be {expected}, got [{', '.join(map(str, tensor.shape))}]",
    )


def check_rows(op: str, base_out: Tensor, x: Tensor) -> None:
    """Check that x has features, and base_out one row for each row of x."""
    check_shape(op, "x", x, x.dim() >= 1, "[..., in_features]")
    same_rows = base_out.dim() == x.dim() and base_out.shape[:-1] == x.shape[:-1]
    check_shape(op, "base_out", base_out, same_rows, "x's leading dimensions and out_features")


def fake_gradients(
    dout: Tensor, in_features: int, adapter: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dx and a gradient for each tensor of ``adapter``, of shape [0] where it is not needed."""
    need_dx, *needs_of_adapter = needs
    return (
        dout.new_empty((*dout.shape[:-1], in_features) if need_dx else (0,)),
        *(
            tensor.new_empty(tensor.shape)
            if needed and tensor is not None
            else dout.new_empty((0,))
            for tensor, needed in zip(adapter, needs_of_adapter, strict=True)
        ),
    )
