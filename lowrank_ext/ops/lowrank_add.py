"""The low-rank branch on the output of any base module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.ops._branch import (
    Branch,
    check_branch,
    draw_seed,
    gradient_outputs,
    not_needed_as_none,
    save_branch,
    saved_branch,
    tf32_allowed,
)
from lowrank_ext.ops._checks import check_shape
from lowrank_ext.ops._registration import (
    needs_input_grad,
    register_autocast,
    register_autograd,
    register_fakes,
)

_OP = "lowrank_add"


def lowrank_add(
    base_out: Tensor,
    x: Tensor,
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
    """Adds a low-rank branch to a base output that some other module made from x.

        h = drop(x) lora_aᵀ
        y = base_out + scaling · out_scale ⊙ (((h ⊙ rank_scale) coreᵀ) lora_bᵀ)

    Args:
        base_out: [..., out_features], dtype of x; not modified.
        x: [..., in_features], float64, float32, bfloat16 or float16; as many rows as base_out.
        lora_a, lora_b, core, rank_scale, out_scale, scaling, dropout_p, seed: as in
            :func:`lowrank_ext.ops.lowrank_linear`.

    Returns:
        y, [..., out_features], dtype of x, contiguous.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; nothing has been read then.

    Example:
        >>> y = lowrank_add(quantised_linear(x), x, lora_a, lora_b, scaling=2.0)

    Source: as :func:`lowrank_ext.ops.lowrank_linear`. In plain torch: lowrank_ext/reference.py.
    """
    y, _ = torch.ops.lowrank_ext.lowrank_add.default(
        base_out,
        x,
        lora_a,
        lora_b,
        core,
        rank_scale,
        out_scale,
        scaling,
        dropout_p,
        draw_seed(dropout_p, seed, x.device),
        tf32_allowed(x),
    )
    return y


def _fake(base_out: Tensor, x: Tensor, *branch_args: Any) -> tuple[Tensor, Tensor]:
    branch = Branch(*branch_args)
    check_shape(_OP, "x", x, x.dim() >= 1, "[..., in_features]")
    same_rows = base_out.dim() == x.dim() and base_out.shape[:-1] == x.shape[:-1]
    check_shape(_OP, "base_out", base_out, same_rows, "x's leading dimensions and out_features")
    check_branch(_OP, branch, x, x.shape[-1], base_out.shape[-1])
    y = base_out.new_empty(base_out.shape)
    return y, x.new_empty((*x.shape[:-1], branch.lora_a.shape[0]))


def _backward_fake(
    dout: Tensor, x: Tensor | None, h: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return gradient_outputs(dout, Branch(*args[:9]), args[9:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, *branch_args = inputs
    _, _, need_dlora_a, need_dlora_b, need_dcore, need_drs, need_dos = needs_input_grad(ctx)[:7]
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    save_branch(
        ctx,
        Branch(*branch_args),
        x if need_dlora_a else None,
        h if need_dlora_b or need_dcore or need_drs or need_dos else None,
    )


def _backward(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    branch, (x, h) = saved_branch(ctx)
    need_dbase_out, *needs = needs_input_grad(ctx)[:7]
    gradients = not_needed_as_none(backward_op(dout, x, h, *branch, *needs), needs)
    return (dout if need_dbase_out else None, *gradients, None, None, None, None)


def register(library_name: str) -> None:
    """Fakes, autograd and autocast for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, _backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context)
    register_autocast(library_name, _OP, num_base_args=2)


register("lowrank_ext")
