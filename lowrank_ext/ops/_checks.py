"""The shape checks of the ops, in the words of csrc/checks.h, for fake tensors."""

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, matches: bool, expected: str) -> None:
    torch._check(
        matches,
        lambda: f"{op}: {name} must be {expected}, got [{', '.join(map(str, tensor.shape))}]",
    )
