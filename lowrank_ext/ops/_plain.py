"""Helpers of the ops in plain torch: rows, gradients, and the checks of csrc/checks.h that torch's
own ops do not make, in the same words."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.ops._registration import HALF_DTYPES

_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)


def check_input_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Check that the ops have kernels for the dtype of ``tensor``."""
    if tensor.dtype not in _DTYPES:
        raise RuntimeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {_name(tensor.dtype)}"
        )


def check_dtypes(
    op: str, x: Tensor, base: Mapping[str, Tensor | None], adapter: Mapping[str, Tensor | None]
) -> None:
    """Check x's dtype, that `base` has it, and that `adapter` has it or is float32 beside it."""
    check_input_dtype(op, "x", x)
    for name, tensor in base.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise RuntimeError(
                f"{op}: {name} must have the dtype of x ({_name(x.dtype)}), "
                f"got {_name(tensor.dtype)}"
            )
    allowed = (x.dtype, torch.float32) if x.dtype in HALF_DTYPES else (x.dtype,)
    for name, tensor in adapter.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise RuntimeError(
                f"{op}: {name} must have the dtype of x ({_name(x.dtype)}), or float32 beside "
                f"bfloat16 and float16, got {_name(tensor.dtype)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    """Check that dropout_p is a probability, and that there is a seed where one is needed."""
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p:g}")
    if dropout_p == 0.0:
        return
    expected = f"{op}: seed must be an int64 tensor of one element"
    if seed is None:
        raise RuntimeError(f"{expected} when dropout_p > 0, got None")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        shape = f"[{', '.join(map(str, seed.shape))}]"
        raise RuntimeError(f"{expected}, got {_name(seed.dtype)} {shape}")


def as_rows(tensor: Tensor) -> Tensor:
    """[M, K] of [..., K]; a vector is one row."""
    # torch's older vmap, of is_grads_batched=True, has no rule for flatten and atleast_2d.
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What a backward op returns: gradients in the dtypes of `like`, empty where there is none.

    The first of `like` is dout, whose dtype is x's.
    """
    dout = like[0]
    assert dout is not None
    return tuple(
        dout.new_empty((0,)) if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, like, strict=True)
    )


def backward_with(
    backward_op: Callable[..., Any],
    plain_backward: Callable[..., Any],
    dout: Tensor | None,
    dh: Tensor | None,
    lora_b: Tensor,
) -> tuple[Callable[..., Any], Tensor]:
    """What computes the gradients from those of y and h, and dout for it.

    h has a gradient where a gradient is differentiated; the kernels do not take it.
    """
    if dh is None:
        assert dout is not None
        return backward_op, dout
    if dout is None:
        dout = dh.new_zeros((*dh.shape[:-1], lora_b.shape[-2]))
    return functools.partial(plain_backward, dh=dh), dout


def softmax_gradient(probs: Tensor, dprobs: Tensor) -> Tensor:
    """Gradient of the logits whose softmax is `probs`."""
    return probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True))
