"""multi_lowrank_add: a low-rank branch per row, on the output of any base module."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext import reference
from lowrank_ext.ops._branch import draw_seed
from lowrank_ext.ops._fakes import check_rows, check_shape, fake_gradients
from lowrank_ext.ops._plain import as_rows, backward_with, check_dropout, check_dtypes, filled
from lowrank_ext.ops._registration import (
    needed_gradients,
    needs_input_grad,
    register_autocast,
    register_autograd,
    register_fakes,
)

_OP = "multi_lowrank_add"


class _Adapters(NamedTuple):
    """The arguments beside base_out and x, in schema order."""

    lora_a: Tensor
    lora_b: Tensor
    adapter_ids: Tensor
    scaling: Tensor
    ranks: Tensor | None
    dropout_p: float
    seed: Tensor | None


def multi_lowrank_add(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    scaling: Tensor,
    *,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Adds to each row of a base output the low-rank branch of the row's own adapter.

        y[m] = base_out[m] + scaling[i] · lora_b[i] lora_a[i] drop(x[m]),     i = adapter_ids[m]

    Where i is -1, y[m] has the bits of base_out[m]. Adapters without a row are not read, and their
    gradients are zeros. With ``ranks`` the rows of lora_a[i] and the columns of lora_b[i] from
    ranks[i] on are padding: not read, their gradients zeros; rank 0 means no adapter. Every tensor
    is on x's device.

    On a GPU the host reads neither ids nor ranks. A row of y and dx is NaN there where its id or
    its adapter's rank is out of range; the gradients of an adapter are NaN where it has rows but no
    valid rank. So is such a row of y under torch.func and forward mode, on a CPU too. float32
    products are never rounded to TF32.

    Args:
        base_out: [..., out_features], dtype of x; not modified.
        x: [..., in_features], float64, float32, bfloat16 or float16; as many rows as base_out.
        lora_a: [n, r, in_features]. The stacks have x's dtype, or float32 beside bfloat16 and
            float16; the adapters in use are rounded to x's dtype once per call.
        lora_b: [n, out_features, r].
        adapter_ids: int64 [...], from -1 to n - 1: an id for each row, any strides.
        scaling: float32 or float64 [n]; gets no gradient.
        ranks: int64 [n], from 0 to r; None: r for all.
        dropout_p, seed: as in ``lowrank_ext.ops.lowrank_linear``.

    Returns:
        y, [..., out_features], dtype of x, contiguous.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, on a CPU an id or a rank is
            out of range (outside of torch.func and forward mode), or scaling requires a gradient;
            nothing has been computed then.

    Examples:
        >>> ids = torch.tensor([0, -1, 2])  # a sequence each; x [3, T, K]
        >>> y = multi_lowrank_add(base(x), x, a, b, ids[:, None].expand(3, T), scaling)

    In plain torch: lowrank_ext/reference.py.
    """
    y, _ = torch.ops.lowrank_ext.multi_lowrank_add.default(
        base_out,
        x,
        lora_a,
        lora_b,
        adapter_ids,
        scaling,
        ranks,
        dropout_p,
        draw_seed(dropout_p, seed, x.device),
    )
    return y


def _fake(base_out: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    adapters = _Adapters(*others)
    check_rows(_OP, base_out, x)
    _check(adapters, x, base_out.shape[-1])
    h_shape = (*x.shape[:-1], adapters.lora_a.shape[1])
    return base_out.new_empty(base_out.shape), x.new_empty(h_shape)


def _check(adapters: _Adapters, x: Tensor, out_features: int) -> None:
    """The shape checks of csrc/ops/multi_lowrank_add.h in the same words."""
    a, b, ids = adapters.lora_a, adapters.lora_b, adapters.adapter_ids
    in_features = x.shape[-1]
    fits = a.dim() == 3 and a.shape[1] >= 1 and a.shape[2] == in_features
    check_shape(_OP, "lora_a", a, fits, f"[n, r, in_features={in_features}]")
    n, r = a.shape[:2]
    fits = b.dim() == 3 and (b.shape[0] == n and b.shape[1] == out_features and b.shape[2] == r)
    check_shape(_OP, "lora_b", b, fits, f"[n={n}, out_features={out_features}, r={r}]")
    one_per_row = ids.shape == x.shape[:-1]
    check_shape(_OP, "adapter_ids", ids, one_per_row, "x's leading dimensions, an id for each row")
    for name, vector in (("scaling", adapters.scaling), ("ranks", adapters.ranks)):
        if vector is not None:
            fits = vector.dim() == 1 and vector.shape[0] == n
            check_shape(_OP, name, vector, fits, f"[n={n}]")


def _backward_fake(
    dout: Tensor, x: Tensor | None, h: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    adapters = _Adapters(*args[:7])
    return fake_gradients(dout, adapters.lora_a.shape[2], adapters[:2], args[7:])


def _plain(base_out: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _fake(base_out, x, *others)
    adapters = _Adapters(*others)
    factors = {"lora_a": adapters.lora_a, "lora_b": adapters.lora_b}
    check_dtypes(_OP, x, {"base_out": base_out}, factors)
    check_dropout(_OP, adapters.dropout_p, adapters.seed)
    if adapters.adapter_ids.dtype != torch.int64:
        raise RuntimeError(f"{_OP}: adapter_ids must be int64, got {adapters.adapter_ids.dtype}")
    dropped = reference.dropout(x, adapters.dropout_p, adapters.seed)
    y, h = base_out, x.new_zeros((*x.shape[:-1], adapters.lora_a.shape[1]))
    for lora_a, lora_b, scale, rows, _ in _each_adapter(adapters, x.dtype):
        own = dropped @ lora_a.mT
        h = torch.where(rows, own, h)
        y = torch.where(rows, base_out + scale * (own @ lora_b.mT), y)
    return torch.where(_out_of_range(adapters), torch.nan, y), h


def _each_adapter(
    adapters: _Adapters, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of each adapter: lora_a [r, K] and lora_b [N, r] with zeros as padding, scaling [], and bool
    its rows [..., 1] and its ranks [r]."""
    n, r = adapters.lora_a.shape[:2]
    column = torch.arange(r, device=adapters.lora_a.device)
    for i in range(n):
        rank = column.new_full((), r) if adapters.ranks is None else adapters.ranks[i]
        used = column < rank
        lora_a = torch.where(used.unsqueeze(1), adapters.lora_a[i].to(dtype), 0)
        lora_b = torch.where(used, adapters.lora_b[i].to(dtype), 0)
        rows = ((adapters.adapter_ids == i) & (rank > 0)).unsqueeze(-1)
        yield lora_a, lora_b, adapters.scaling[i].to(dtype), rows, used


def _out_of_range(adapters: _Adapters) -> Tensor:
    """bool [..., 1]: the rows whose id, or the rank of whose adapter, is out of range."""
    ids, (n, r) = adapters.adapter_ids, adapters.lora_a.shape[:2]
    bad = (ids < -1) | (ids >= n)
    if adapters.ranks is not None:
        for i in range(n):
            rank = adapters.ranks[i]
            bad = bad | ((ids == i) & ((rank < 0) | (rank > r)))
    return bad.unsqueeze(-1)


def _plain_backward(
    dout: Tensor, x: Any, h: Any, *args: Any, dh: Tensor | None = None
) -> tuple[Tensor, ...]:
    adapters, (need_dx, need_dlora_a, need_dlora_b) = _Adapters(*args[:7]), args[7:]
    dropout = functools.partial(reference.dropout, dropout_p=adapters.dropout_p, seed=adapters.seed)
    dropped: Any = dropout(x) if need_dlora_a else None
    parts_of_dx, dlora_a, dlora_b = [], [], []
    for lora_a, lora_b, scale, rows, used in _each_adapter(adapters, dout.dtype):
        upstream = torch.where(rows, scale * dout, 0)
        down = upstream @ lora_b
        if dh is not None:
            down = down + torch.where(rows & used, dh, 0)
        if need_dx:
            parts_of_dx.append(down @ lora_a)
        if need_dlora_a:
            dlora_a.append(as_rows(down).mT @ as_rows(dropped))
        if need_dlora_b:
            dlora_b.append(as_rows(upstream).mT @ as_rows(torch.where(rows & used, h, 0)))
    dx = dout.new_zeros((*dout.shape[:-1], adapters.lora_a.shape[2]))
    dx = dropout(sum(parts_of_dx, dx))
    stacks = (
        (torch.stack(parts) if parts else torch.zeros_like(stack)) if needed else None
        for needed, parts, stack in (
            (need_dlora_a, dlora_a, adapters.lora_a),
            (need_dlora_b, dlora_b, adapters.lora_b),
        )
    )
    return filled((dx if need_dx else None, *stacks), (dout, *adapters[:2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, *others = inputs
    adapters = _Adapters(*others)
    _, _, need_dlora_a, need_dlora_b, _, need_dscaling = needs_input_grad(ctx)[:6]
    if need_dscaling:
        raise RuntimeError(f"{_OP}: scaling must not require a gradient, it has none")
    _, h = output
    ctx.save_for_backward(
        x if need_dlora_a else None, h if need_dlora_b else None, *adapters[:5], adapters.seed
    )
    ctx.dropout_p = adapters.dropout_p


def _backward(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, dh: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, h, *adapters, seed = ctx.saved_tensors
    need_dbase_out, *needs = needs_input_grad(ctx)[:4]
    compute, upstream = backward_with(backward_op, _plain_backward, dout, dh, adapters[1])
    args = (upstream, x, h, *adapters, ctx.dropout_p, seed)
    return (dout if need_dbase_out else None, *needed_gradients(compute, args, needs))


def register(library_name: str) -> None:
    """Fakes, autograd and autocast for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, _backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context, _plain, _plain_backward)
    register_autocast(library_name, _OP, num_base_args=2)


register("lowrank_ext")
