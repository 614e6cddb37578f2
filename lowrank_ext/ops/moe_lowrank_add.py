"""moe_lowrank_add: a mixture of low-rank experts on the output of any base module."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext import reference
from lowrank_ext.ops._branch import draw_seed
from lowrank_ext.ops._fakes import check_rows, check_shape, fake_gradients
from lowrank_ext.ops._plain import as_rows, check_dropout, check_dtypes, filled
from lowrank_ext.ops._registration import (
    needed_gradients,
    needs_input_grad,
    overload,
    register_any_scaling,
    register_autocast,
    register_autograd,
    register_fakes,
)
from lowrank_ext.ops.moe_route import (
    balance_gradient,
    check_token_mask,
    check_top_k,
    logits_gradient,
    statistics_dtype,
)

_OP = "moe_lowrank_add"


class MoEOutput(NamedTuple):
    """What ``moe_lowrank_add`` returns."""

    y: Tensor
    balance_loss: Tensor
    topk_ids: Tensor
    router_probs: Tensor


def moe_lowrank_add(
    base_out: Tensor,
    x: Tensor,
    router_weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    top_k: int,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    shared_dropout: bool = False,
    token_mask: Tensor | None = None,
) -> MoEOutput:
    """Adds to each row of a base output the `top_k` low-rank experts that a router picks for it.

        p = softmax(x router_weightᵀ)
        w = p of the top_k experts, renormalized to sum to one
        y = base_out + scaling · Σ_i w_i lora_b[i] lora_a[i] drop_i(x)   over those experts i
        balance_loss = E Σ_i f_i P_i,  f_i: share of the tokens that chose i,  P_i: mean of p_i

    The router sees x without dropout; its logits, p, w and the loss are float32 (float64 for
    float64 x). Experts that no token chose cost nothing, and their gradients are exact zeros.

    Args:
        base_out: [..., out_features], dtype of x; not modified.
        x: [..., in_features], float64, float32, bfloat16 or float16; any strides.
        router_weight: [E, in_features]. This and the experts have x's dtype, or float32 beside
            bfloat16 and float16; they are rounded to x's dtype once per call, their gradients have
            their own.
        lora_a: [E, r_e, in_features].
        lora_b: [E, out_features, r_e].
        top_k: experts per token, at most E.
        scaling: factor of the branch.
        dropout_p, seed: as in ``lowrank_ext.ops.lowrank_linear``. Every expert draws its own
            mask.
        shared_dropout: all experts use one mask, that of ``lowrank_add``.
        token_mask: bool [...], False where a token is padding: it is routed, but not counted in
            balance_loss. None: every token counts.

    Returns:
        y: [..., out_features], dtype of x, contiguous.
        balance_loss: [], top_k where the load is even, more where it is not; 0 if no token counts.
            f has no gradient.
        topk_ids: int64 [..., k], by descending logit; a tie goes to the lower id. A row of NaN has
            valid ids and a y of NaN, and changes no other row.
        router_probs: [..., E], the p above; no gradient flows through it.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; nothing has been read then.

    Examples:
        >>> y, balance_loss, *_ = moe_lowrank_add(
        ...     linear(x), x, router_weight, lora_a, lora_b, top_k=2, scaling=2.0
        ... )

    Source: GOAT (arXiv 2502.16894), MoLoRA (arXiv 2309.05444); loss of Fedus et al. 2021 (arXiv
    2101.03961), eq. 4. In plain torch: lowrank_ext/reference.py.
    """
    op = overload(torch.ops.lowrank_ext.moe_lowrank_add)
    y, _, router_probs, topk_ids, _, balance_loss, _ = op(
        base_out,
        x,
        router_weight,
        lora_a,
        lora_b,
        top_k,
        scaling,
        dropout_p,
        draw_seed(dropout_p, seed, x.device),
        shared_dropout,
        token_mask,
    )
    return MoEOutput(y, balance_loss, topk_ids, router_probs.detach())


def _fake(
    base_out: Tensor,
    x: Tensor,
    router_weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    top_k: int,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    shared_dropout: bool,
    token_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    check_rows(_OP, base_out, x)
    _check_experts(router_weight, lora_a, lora_b, x.shape[-1], base_out.shape[-1])
    num_experts, rank, _ = lora_a.shape
    check_top_k(_OP, top_k, num_experts)
    check_token_mask(_OP, token_mask, x, "x")
    lead, statistics = x.shape[:-1], statistics_dtype(x.dtype)
    return (
        base_out.new_empty(base_out.shape),
        x.new_empty((*lead, num_experts * rank)),
        x.new_empty((*lead, num_experts), dtype=statistics),
        x.new_empty((*lead, top_k), dtype=torch.int64),
        x.new_empty((*lead, top_k), dtype=statistics),
        x.new_empty((), dtype=statistics),
        x.new_empty((num_experts,), dtype=torch.int64),
    )


def _check_experts(
    router_weight: Tensor, lora_a: Tensor, lora_b: Tensor, in_features: int, out_features: int
) -> None:
    """The shape checks of csrc/ops/moe_lowrank_add.h in the same words, for fake tensors."""
    a, b, router = lora_a.shape, lora_b.shape, router_weight.shape
    matches = len(a) == 3 and a[0] >= 1 and a[1] >= 1 and a[2] == in_features
    check_shape(_OP, "lora_a", lora_a, matches, f"[E, r_e, in_features={in_features}]")
    matches = len(b) == 3 and b[0] == a[0] and b[1] == out_features and b[2] == a[1]
    expected = f"[E={a[0]}, out_features={out_features}, r_e={a[1]}]"
    check_shape(_OP, "lora_b", lora_b, matches, expected)
    matches = len(router) == 2 and router[0] == a[0] and router[1] == in_features
    expected = f"[E={a[0]}, in_features={in_features}]"
    check_shape(_OP, "router_weight", router_weight, matches, expected)


def _backward_fake(
    dout: Tensor,
    dbalance_loss: Tensor | None,
    x: Tensor | None,
    router_weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(dout, lora_a.shape[2], (router_weight, lora_a, lora_b), args[-4:])


def _plain(
    base_out: Tensor,
    x: Tensor,
    router_weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    top_k: int,
    scaling: float,
    *others: Any,
) -> tuple[Tensor, ...]:
    tensors = {"router_weight": router_weight, "lora_a": lora_a, "lora_b": lora_b}
    _fake(base_out, x, router_weight, lora_a, lora_b, top_k, scaling, *others)
    dropout = _Dropout(*others[:3])
    check_dtypes(_OP, x, {"base_out": base_out}, tensors)
    check_dropout(_OP, dropout.p, dropout.seed)
    statistics = statistics_dtype(x.dtype)
    logits = x.to(statistics) @ router_weight.to(x.dtype).to(statistics).mT
    weights, ids, counts, loss, *_ = reference.moe_route(logits, top_k=top_k, token_mask=others[3])
    gates, chosen = _gates(weights, ids, lora_a.shape[0])
    branch, h = torch.zeros_like(base_out), []
    for i in range(lora_a.shape[0]):
        own = dropout(x, i) @ lora_a[i].to(x.dtype).mT
        h.append(torch.where(chosen[..., i, None], own, 0))
        out = (gates[..., i, None].to(x.dtype) * own) @ lora_b[i].to(x.dtype).mT
        branch = torch.where(chosen[..., i, None], branch + out, branch)
    probs = torch.softmax(logits, -1)
    return base_out + scaling * branch, torch.cat(h, -1), probs, ids, weights, loss, counts


class _Dropout(NamedTuple):
    p: float
    seed: Tensor | None
    shared: bool

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        return reference.dropout(x, self.p, self.seed, 0 if self.shared else expert)


def _gates(weights: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[..., E]: the weight of each expert, and bool, whether it is chosen."""
    one_hot = reference.one_hot(ids, num_experts)
    gates = (weights.unsqueeze(-1) * one_hot).sum(-2)
    return gates, one_hot.sum(-2) > 0


def _plain_backward(
    dout: Tensor,
    dbalance_loss: Tensor | None,
    x: Any,
    router_weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    h: Any,
    router_probs: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_counts: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    shared_dropout: bool,
    token_mask: Tensor | None,
    *needs: bool,
    dh: Tensor | None = None,
    dprobs: Tensor | None = None,
    dtopk_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`dh`, `dprobs` and `dtopk_weights` are gradients that the backward op does not take."""
    need_dx, need_drouter_weight, need_dlora_a, need_dlora_b = needs
    num_experts, rank, in_features = lora_a.shape
    dropout = _Dropout(dropout_p, seed, shared_dropout)
    gates, chosen = _gates(topk_weights, topk_ids, num_experts)
    upstream = scaling * dout
    dx = dout.new_zeros((*dout.shape[:-1], in_features))
    dlora_a, dlora_b, dgates = [], [], []
    for i in range(num_experts):
        rows, gate = chosen[..., i, None], gates[..., i, None].to(dout.dtype)
        part = slice(i * rank, (i + 1) * rank)
        dgated = torch.where(rows, upstream @ lora_b[i].to(dout.dtype), 0)
        down = gate * dgated if dh is None else gate * dgated + torch.where(rows, dh[..., part], 0)
        if need_dx:
            dx = dx + dropout(down @ lora_a[i].to(dout.dtype), i)
        if need_dlora_a:
            dlora_a.append(as_rows(down).mT @ as_rows(dropout(x, i)))
        if need_dlora_b:
            dlora_b.append(as_rows(upstream).mT @ as_rows(gate * h[..., part]))
        if need_dx or need_drouter_weight:
            dgates.append((dgated * h[..., part]).to(gates.dtype).sum(-1))
    drouter_weight = None
    if need_dx or need_drouter_weight:
        dweights = torch.stack(dgates, -1).gather(-1, topk_ids)
        balance = balance_gradient(dbalance_loss, router_probs, expert_counts, token_mask)
        dlogits = logits_gradient(
            router_probs,
            topk_weights,
            topk_ids,
            _sum(dweights, dtopk_weights),
            _sum(balance, dprobs),
        )
        router = router_weight.to(dout.dtype).to(gates.dtype)
        dx = dx + (dlogits @ router).to(dout.dtype)
        if need_drouter_weight:
            drouter_weight = as_rows(dlogits).mT @ as_rows(x).to(gates.dtype)
    gradients = (
        dx if need_dx else None,
        drouter_weight,
        torch.stack(dlora_a) if need_dlora_a else None,
        torch.stack(dlora_b) if need_dlora_b else None,
    )
    return filled(gradients, (dout, router_weight, lora_a, lora_b))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, router_weight, lora_a, lora_b, _, scaling, dropout_p, seed, shared, token_mask = inputs
    _, h, router_probs, topk_ids, topk_weights, _, expert_counts = output
    _, need_dx, need_drouter, need_dlora_a, need_dlora_b = needs_input_grad(ctx)[:5]
    ctx.mark_non_differentiable(topk_ids, expert_counts)
    ctx.dtype = x.dtype
    ctx.scaling, ctx.dropout_p, ctx.shared_dropout = scaling, dropout_p, shared
    ctx.save_for_backward(
        x if need_drouter or need_dlora_a else None,
        router_weight,
        lora_a,
        lora_b,
        h if need_dx or need_drouter or need_dlora_b else None,
        router_probs,
        topk_ids,
        topk_weights,
        expert_counts,
        seed,
        token_mask,
    )


def _backward(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    dh, dprobs, _, dtopk_weights, dbalance_loss, _ = others
    need_dbase_out, *needs = needs_input_grad(ctx)[:5]
    *saved, seed, token_mask = ctx.saved_tensors
    if dout is None:  # only the loss was used
        lora_b, topk_ids = saved[3], saved[6]
        shape = (*topk_ids.shape[:-1], lora_b.shape[1])
        dout = lora_b.new_zeros(shape, dtype=ctx.dtype)
    options = (ctx.scaling, ctx.dropout_p, seed, ctx.shared_dropout, token_mask)
    inner: dict[str, Any] = {"dh": dh, "dprobs": dprobs, "dtopk_weights": dtopk_weights}
    differentiated = any(gradient is not None for gradient in inner.values())
    compute = functools.partial(_plain_backward, **inner) if differentiated else backward_op
    gradients = needed_gradients(compute, (dout, dbalance_loss, *saved, *options), needs)
    return (dout if need_dbase_out else None, *gradients)


def register(library_name: str) -> None:
    """Fakes, autograd and autocast for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, _backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context, _plain, _plain_backward)
    register_any_scaling(library_name, _OP)
    register_autocast(library_name, _OP, num_base_args=2)


register("lowrank_ext")
