"""The arguments of a low-rank branch: seed, TF32 flag, shape checks, saving for backward; and the
branch in plain torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext import reference
from lowrank_ext.ops._fakes import check_shape, fake_gradients
from lowrank_ext.ops._plain import as_rows, check_dropout, check_dtypes, filled


class Branch(NamedTuple):
    """The last arguments of lowrank_add and lowrank_linear, in schema order."""

    lora_a: Tensor
    lora_b: Tensor
    core: Tensor | None
    rank_scale: Tensor | None
    out_scale: Tensor | None
    scaling: float
    dropout_p: float
    seed: Tensor | None
    allow_tf32: bool


def make_branch(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    core: Tensor | None,
    rank_scale: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Branch:
    """The branch arguments of a call on x, with the seed drawn and torch's TF32 setting read."""
    seed = draw_seed(dropout_p, seed, x.device)
    adapter = (lora_a, lora_b, core, rank_scale, out_scale)
    return Branch(*adapter, scaling, dropout_p, seed, tf32_allowed(x))


def tf32_allowed(x: Tensor) -> bool:
    """Whether torch's settings let fp32 products on x's device use TF32.

    The kernels cannot read torch's setting: the stable ABI has no call for it.
    """
    return x.is_cuda and x.dtype == torch.float32 and _tf32_is_set()


def _tf32_is_set() -> bool:
    if torch.compiler.is_compiling():  # dynamo cannot trace torch's getter
        from lowrank_ext.ops._untraced import fp32_precision

        return fp32_precision() == "tf32"
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def draw_seed(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The caller's seed; without one, a draw from torch's generator of ``device`` if p > 0."""
    if seed is not None or dropout_p == 0.0:
        return seed
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_branch(op: str, branch: Branch, in_features: int, out_features: int) -> None:
    """The shape checks of csrc/ops/branch.h in the same words, for fake tensors."""
    a, b, core = branch.lora_a, branch.lora_b, branch.core
    fits = a.dim() == 2 and a.shape[0] >= 1 and a.shape[1] == in_features
    check_shape(op, "lora_a", a, fits, f"[r, in_features={in_features}]")
    rank = a.shape[0]
    fits = b.dim() == 2 and b.shape[0] == out_features and b.shape[1] == rank
    check_shape(op, "lora_b", b, fits, f"[out_features={out_features}, r={rank}]")
    if core is not None:
        fits = core.dim() == 2 and core.shape[0] == rank and core.shape[1] == rank
        check_shape(op, "core", core, fits, f"[r={rank}, r={rank}]")
    for name, vector, size, label in (
        ("rank_scale", branch.rank_scale, rank, "r"),
        ("out_scale", branch.out_scale, out_features, "out_features"),
    ):
        if vector is not None:
            fits = vector.dim() == 1 and vector.shape[0] == size
            check_shape(op, name, vector, fits, f"[{label}={size}]")


def backward_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Fake of a backward op whose last arguments are the branch and the flags of needed
    gradients."""
    branch, needs = Branch(*args[-15:-6]), args[-6:]
    return fake_gradients(dout, branch.lora_a.shape[1], branch[:5], needs)


def save_branch(ctx: Any, branch: Branch, *others: Tensor | None) -> None:
    """Save the branch and ``others`` for backward."""
    ctx.save_for_backward(*branch[:5], branch.seed, *others)
    ctx.scaling, ctx.dropout_p, ctx.allow_tf32 = (
        branch.scaling,
        branch.dropout_p,
        branch.allow_tf32,
    )


def saved_branch(ctx: Any) -> tuple[Branch, tuple[Any, ...]]:
    """The branch and ``others`` that ``save_branch`` saved."""
    lora_a, lora_b, core, rank_scale, out_scale, seed, *others = ctx.saved_tensors
    adapter = (lora_a, lora_b, core, rank_scale, out_scale)
    branch = Branch(*adapter, ctx.scaling, ctx.dropout_p, seed, ctx.allow_tf32)
    return branch, tuple(others)


def check_plain_branch(op: str, x: Tensor, branch: Branch, **base: Tensor | None) -> None:
    """The checks of dtypes and dropout that plain torch would not make."""
    check_dtypes(op, x, base, dict(zip(Branch._fields[:5], branch[:5], strict=True)))
    check_dropout(op, branch.dropout_p, branch.seed)


def plain_branch(base_out: Tensor, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """y and h of lowrank_add by torch's own ops."""
    named = branch._asdict()
    for name in ("lora_a", "lora_b", "allow_tf32"):
        del named[name]
    y = reference.lowrank_add(base_out, x, branch.lora_a, branch.lora_b, **named)
    h = reference.dropout(x, branch.dropout_p, branch.seed) @ branch.lora_a.to(x.dtype).mT
    return y, h


def plain_branch_backward(
    dout: Tensor,
    x: Any,
    h: Any,
    branch: Branch,
    needs: Sequence[bool],
    dh: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The branch's gradients by torch's own ops, which can be differentiated again.

    x and h are None where they are not needed. `dh` is an upstream gradient of h, which a backward
    op does not take.
    """
    need_dx, need_dlora_a, need_dlora_b, need_dcore, need_drank_scale, need_dout_scale = needs
    lora_a, lora_b = branch.lora_a.to(dout.dtype), branch.lora_b.to(dout.dtype)
    core, rank_scale, out_scale = (t if t is None else t.to(dout.dtype) for t in branch[2:5])
    upstream = branch.scaling * as_rows(dout)
    g = upstream if out_scale is None else upstream * out_scale
    dmid = g @ lora_b
    dscaled = dmid if core is None else dmid @ core  # of h ⊙ rank_scale
    down = dscaled if rank_scale is None else dscaled * rank_scale
    down = down.reshape(*dout.shape[:-1], -1)
    down = down if dh is None else down + dh
    dlora_b = dcore = drank_scale = dout_scale = dlora_a = dx = None
    if need_dlora_b or need_dcore or need_drank_scale or need_dout_scale:
        rows = as_rows(h)
        scaled = rows if rank_scale is None else rows * rank_scale
        mid = scaled if core is None else scaled @ core.mT
        dlora_b = g.mT @ mid if need_dlora_b else None
        dcore = dmid.mT @ scaled if need_dcore else None
        drank_scale = (dscaled * rows).sum(0) if need_drank_scale else None
        dout_scale = (upstream * (mid @ lora_b.mT)).sum(0) if need_dout_scale else None
    if need_dlora_a:
        dropped = reference.dropout(x, branch.dropout_p, branch.seed)
        dlora_a = as_rows(down).mT @ as_rows(dropped)
    if need_dx:
        dx = reference.dropout(down @ lora_a, branch.dropout_p, branch.seed)
    return filled((dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale), (dout, *branch[:5]))
