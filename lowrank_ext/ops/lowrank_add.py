"""lowrank_add: a low-rank branch on the output of any base module."""

from collections.abc import Callable
from typing import Any

import torch
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
from lowrank_ext.ops._fakes import check_rows
from lowrank_ext.ops._plain import backward_with
from lowrank_ext.ops._registration import (
    needed_gradients,
    needs_input_grad,
    overload,
    register_any_scaling,
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
    """Adds a low-rank branch to the output that a base module computed from x.

        h = drop(x) lora_aᵀ
        y = base_out + scaling · out_scale ⊙ (((h ⊙ rank_scale) coreᵀ) lora_bᵀ)

    Args:
        base_out: [..., out_features], dtype of x; not modified.
        x: [..., in_features], float64, float32, bfloat16 or float16; as many rows as base_out.
        lora_a, lora_b, core, rank_scale, out_scale, scaling, dropout_p, seed: as in
            ``lowrank_ext.ops.lowrank_linear``.

    Returns:
        y, [..., out_features], dtype of x, contiguous.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; nothing has been read then.

    Examples:
        >>> y = lowrank_add(quantized_linear(x), x, lora_a, lora_b, scaling=2.0)

    Source: as ``lowrank_ext.ops.lowrank_linear``. In plain torch: lowrank_ext/reference.py.
    """
    branch = make_branch(x, lora_a, lora_b, core, rank_scale, out_scale, scaling, dropout_p, seed)
    y, _ = overload(torch.ops.lowrank_ext.lowrank_add)(base_out, x, *branch)
    return y


def _fake(base_out: Tensor, x: Tensor, *branch_args: Any) -> tuple[Tensor, Tensor]:
    branch = Branch(*branch_args)
    check_rows(_OP, base_out, x)
    check_branch(_OP, branch, x.shape[-1], base_out.shape[-1])
    return base_out.new_empty(base_out.shape), x.new_empty((*x.shape[:-1], branch.lora_a.shape[0]))


def _plain(base_out: Tensor, x: Tensor, *branch_args: Any) -> tuple[Tensor, Tensor]:
    _fake(base_out, x, *branch_args)
    branch = Branch(*branch_args)
    check_plain_branch(_OP, x, branch, base_out=base_out)
    return plain_branch(base_out, x, branch)


def _plain_backward(
    dout: Tensor, x: Tensor | None, h: Tensor | None, *args: Any, dh: Tensor | None = None
) -> tuple[Tensor, ...]:
    return plain_branch_backward(dout, x, h, Branch(*args[:-6]), args[-6:], dh)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, *branch_args = inputs
    _, _, need_dlora_a, *need_others = needs_input_grad(ctx)[:7]
    _, h = output
    kept = (x if need_dlora_a else None, h if any(need_others) else None)
    save_branch(ctx, Branch(*branch_args), *kept)


def _backward(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    branch, (x, h) = saved_branch(ctx)
    need_dbase_out, *needs = needs_input_grad(ctx)[:7]
    compute, upstream = backward_with(backward_op, _plain_backward, dout, dh, branch.lora_b)
    gradients = needed_gradients(compute, (upstream, x, h, *branch), needs)
    return (dout if need_dbase_out else None, *gradients)


def register(library_name: str) -> None:
    """Fakes, autograd and autocast for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context, _plain, _plain_backward)
    register_any_scaling(library_name, _OP)
    register_autocast(library_name, _OP, num_base_args=2)


register("lowrank_ext")
