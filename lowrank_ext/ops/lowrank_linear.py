"""lowrank_linear: dense base and low-rank branch in one op."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ext.ops._branch import (
    Branch,
    backward_fake,
    check_branch,
    check_plain_branch,
    make_branch,
    plain_branch,
    plain_branch_backward,
    save_branch,
    saved_branch,
)
from lowrank_ext.ops._fakes import check_shape
from lowrank_ext.ops._plain import as_rows, backward_with
from lowrank_ext.ops._registration import (
    needed_gradients,
    needs_input_grad,
    overload,
    register_any_scaling,
    register_autocast,
    register_autograd,
    register_fakes,
)

_OP = "lowrank_linear"


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    core: Tensor | None = None,
    rank_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Linear layer with a low-rank branch.

        h = drop(x) lora_aᵀ
        y = x weightᵀ + bias + scaling · out_scale ⊙ (((h ⊙ rank_scale) coreᵀ) lora_bᵀ)

    Only weights, h and, where lora_a or weight needs a gradient, x are kept for backward. Dropout
    is drawn inside the kernel and drawn again in backward; no mask and no dropped copy of x exists.
    On a GPU float32 products use TF32 where torch.backends.cuda.matmul.fp32_precision says so.

    Args:
        x: [..., in_features], float64, float32, bfloat16 or float16; any strides.
        weight: [out_features, in_features], dtype of x; may be a transposed view.
        bias: [out_features], dtype of x, or None.
        lora_a: [r, in_features]. Adapter tensors have x's dtype, or float32 beside bfloat16 and
            float16; they are rounded to x's dtype once per call, their gradients have their own.
        lora_b: [out_features, r].
        core: [r, r] (LaMDA's square matrix), or None for the identity.
        rank_scale: [r] (AFLoRA's d), or None for ones.
        out_scale: [out_features] (AFLoRA's b), or None for ones.
        scaling: factor of the branch, alpha / r in LoRA.
        dropout_p: probability of dropping an element of x on its way into the branch, rounded to a
            multiple of 1/65536; kept elements are scaled by 1 / (1 - p). 1 drops the branch.
        seed: int64 tensor of one element on x's device, the key of the dropout mask. None: drawn
            from torch's default generator of the device.

    Returns:
        y, [..., out_features], dtype of x, contiguous.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; nothing has been read then.

    Examples:
        >>> y = lowrank_linear(x, weight, None, lora_a, lora_b, scaling=2.0, dropout_p=0.05)

    Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3; core: LaMDA (arXiv 2406.12832);
    rank_scale and out_scale: AFLoRA (arXiv 2403.13269). In plain torch: lowrank_ext/reference.py.
    """
    branch = make_branch(x, lora_a, lora_b, core, rank_scale, out_scale, scaling, dropout_p, seed)
    y, _ = overload(torch.ops.lowrank_ext.lowrank_linear)(x, weight, bias, *branch)
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, *branch_args: Any
) -> tuple[Tensor, Tensor]:
    branch = Branch(*branch_args)
    check_shape(_OP, "weight", weight, weight.dim() == 2, "[out_features, in_features]")
    out_features, in_features = weight.shape
    matches = x.dim() >= 1 and x.shape[-1] == in_features
    check_shape(_OP, "x", x, matches, f"[..., in_features={in_features}]")
    if bias is not None:
        fits = bias.dim() == 1 and bias.shape[0] == out_features
        check_shape(_OP, "bias", bias, fits, f"[out_features={out_features}]")
    check_branch(_OP, branch, in_features, out_features)
    y = x.new_empty((*x.shape[:-1], out_features))
    return y, x.new_empty((*x.shape[:-1], branch.lora_a.shape[0]))


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, *branch_args: Any
) -> tuple[Tensor, Tensor]:
    _fake(x, weight, bias, *branch_args)
    branch = Branch(*branch_args)
    check_plain_branch(_OP, x, branch, weight=weight, bias=bias)
    return plain_branch(F.linear(x, weight, bias), x, branch)


def _plain_backward(
    dout: Tensor,
    x: Tensor | None,
    weight: Tensor,
    h: Tensor | None,
    *args: Any,
    dh: Tensor | None = None,
) -> tuple[Tensor, ...]:
    branch, needs = Branch(*args[:-6]), args[-6:]
    dx, *dbranch = plain_branch_backward(dout, x, h, branch, needs, dh)
    return (dx + dout @ weight if needs[0] else dx, *dbranch)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *branch_args = inputs
    _, need_dweight, _, need_dlora_a, *need_others = needs_input_grad(ctx)[:8]
    _, h = output
    kept_x = x if need_dlora_a or need_dweight else None
    save_branch(ctx, Branch(*branch_args), kept_x, weight, h if any(need_others) else None)


def _backward(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    branch, (x, weight, h) = saved_branch(ctx)
    need_dx, need_dweight, need_dbias, *need_branch = needs_input_grad(ctx)[:8]
    needs = (need_dx, *need_branch)
    compute, upstream = backward_with(backward_op, _plain_backward, dout, dh, branch.lora_b)
    saved = (x if needs[1] else None, weight, h)
    dx, *dbranch = needed_gradients(compute, (upstream, *saved, *branch), needs)
    # A base that trains (modules_to_save, a tied weight) is rare: its gradients are plain torch.
    dweight = as_rows(upstream).mT @ as_rows(x) if need_dweight else None
    dbias = upstream.sum_to_size(upstream.shape[-1]) if need_dbias else None
    return (dx, dweight, dbias, *dbranch)


def register(library_name: str) -> None:
    """Fakes, autograd and autocast for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context, _plain, _plain_backward)
    register_any_scaling(library_name, _OP)
    register_autocast(library_name, _OP, num_base_args=3)


register("lowrank_ext")
