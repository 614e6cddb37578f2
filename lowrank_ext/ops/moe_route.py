"""moe_route: top-k routing of tokens to experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ext import reference
from lowrank_ext.ops._fakes import check_shape
from lowrank_ext.ops._plain import check_input_dtype, softmax_gradient
from lowrank_ext.ops._registration import register_autograd, register_fakes

_OP = "moe_route"


class Routing(NamedTuple):
    """What ``moe_route`` returns; T tokens, E experts, k choices per token."""

    topk_weights: Tensor
    topk_ids: Tensor
    expert_counts: Tensor
    balance_loss: Tensor
    sorted_slots: Tensor
    expert_offsets: Tensor
    slot_positions: Tensor


def moe_route(router_logits: Tensor, *, top_k: int, token_mask: Tensor | None = None) -> Routing:
    """Sends every token to the `top_k` experts of its largest logits.

        p = softmax(router_logits)
        balance_loss = E Σ_i f_i P_i,  f_i = expert_counts[i] / tokens,  P_i = mean of p[:, i]

    Computed in float32, in float64 for float64 logits. The shapes of the outputs depend on the
    shape of the logits only.

    Args:
        router_logits: [..., E], float64, float32, bfloat16 or float16; any strides.
        top_k: experts per token, at most E.
        token_mask: bool [...], False where a token is padding: it is routed, but not counted in
            expert_counts and balance_loss. None: every token counts.

    Returns:
        topk_weights: [..., k], softmax over the chosen logits, so that they sum to one.
        topk_ids: int64 [..., k], by descending logit; a tie goes to the lower id. NaN counts as
            greater than any number: a row with NaN has valid, distinct ids and weights of NaN, and
            changes no other row.
        expert_counts: int64 [E], choices of each expert by the tokens that count.
        balance_loss: [], top_k where the load is even, more where it is not; 0 if no token counts.
            Its gradient is that of P alone.
        sorted_slots: int64 [T k], the slots stably ordered by expert; slot t k + j is token t's
            j-th choice.
        expert_offsets: int64 [E + 1]; expert i's slots are
            ``sorted_slots[expert_offsets[i]:expert_offsets[i + 1]]``.
        slot_positions: int64 [T k], the inverse permutation of sorted_slots.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; nothing has been read then.

    Examples:
        >>> weights, ids, *_ = moe_route(x @ router_weight.T, top_k=2)

    Source: Shazeer et al. 2017 (arXiv 1701.06538), loss of Fedus et al. 2021 (arXiv 2101.03961),
    eq. 4. In plain torch: lowrank_ext/reference.py.
    """
    return Routing(*torch.ops.lowrank_ext.moe_route.default(router_logits, top_k, token_mask))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of a router's probabilities, weights and loss, given that of its logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_top_k(op: str, top_k: int, num_experts: int) -> None:
    torch._check(
        1 <= top_k <= num_experts,
        lambda: (
            f"{op}: top_k must be between 1 and the number of experts {num_experts}, got {top_k}"
        ),
    )


def check_token_mask(op: str, token_mask: Tensor | None, like: Tensor, like_name: str) -> None:
    if token_mask is not None:
        matches = token_mask.shape == like.shape[:-1]
        check_shape(op, "token_mask", token_mask, matches, f"{like_name}'s leading dimensions")


def _fake(router_logits: Tensor, top_k: int, token_mask: Tensor | None) -> tuple[Tensor, ...]:
    matches = router_logits.dim() >= 1 and router_logits.shape[-1] >= 1
    check_shape(_OP, "router_logits", router_logits, matches, "[..., E] with at least one expert")
    *lead, num_experts = router_logits.shape
    check_top_k(_OP, top_k, num_experts)
    check_token_mask(_OP, token_mask, router_logits, "router_logits")
    statistics = statistics_dtype(router_logits.dtype)
    num_slots = top_k
    for size in lead:
        num_slots = num_slots * size

    def ids(*shape: int) -> Tensor:
        return router_logits.new_empty(shape, dtype=torch.int64)

    return (
        router_logits.new_empty((*lead, top_k), dtype=statistics),
        ids(*lead, top_k),
        ids(num_experts),
        router_logits.new_empty((), dtype=statistics),
        ids(num_slots),
        ids(num_experts + 1),
        ids(num_slots),
    )


def _backward_fake(
    dtopk_weights: Tensor | None, dbalance_loss: Tensor | None, router_logits: Tensor, *_: Any
) -> Tensor:
    return router_logits.new_empty(router_logits.shape)


def _plain(router_logits: Tensor, top_k: int, token_mask: Tensor | None) -> tuple[Tensor, ...]:
    _fake(router_logits, top_k, token_mask)
    check_input_dtype(_OP, "router_logits", router_logits)
    return reference.moe_route(router_logits, top_k=top_k, token_mask=token_mask)


def _plain_backward(
    dtopk_weights: Tensor | None,
    dbalance_loss: Tensor | None,
    router_logits: Tensor,
    topk_ids: Tensor,
    expert_counts: Tensor,
    token_mask: Tensor | None,
) -> Tensor:
    logits = router_logits.to(statistics_dtype(router_logits.dtype))
    dlogits = logits_gradient(
        torch.softmax(logits, -1),
        torch.softmax(logits.gather(-1, topk_ids), -1),
        topk_ids,
        dtopk_weights,
        balance_gradient(dbalance_loss, logits, expert_counts, token_mask),
    )
    return dlogits.to(router_logits.dtype)


def balance_gradient(
    dbalance_loss: Tensor | None,
    probs: Tensor,
    expert_counts: Tensor,
    token_mask: Tensor | None,
) -> Tensor | None:
    """Gradient of router_probs from that of balance_loss; of `probs` only the shape is used."""
    if dbalance_loss is None:
        return None
    counted = probs.new_ones((*probs.shape[:-1], 1))
    if token_mask is not None:
        counted = token_mask.unsqueeze(-1).to(probs.dtype)
    num_counted = counted.sum().clamp(min=1)
    share = expert_counts.to(probs.dtype) / num_counted
    return dbalance_loss * probs.shape[-1] * share * counted / num_counted


def logits_gradient(
    probs: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    dtopk_weights: Tensor | None,
    dprobs: Tensor | None,
) -> Tensor:
    """Gradient of the logits from those of the weights and of the probabilities."""
    dlogits = torch.zeros_like(probs)
    if dprobs is not None:
        dlogits = dlogits + softmax_gradient(probs, dprobs)
    if dtopk_weights is not None:
        chosen = softmax_gradient(topk_weights, dtopk_weights)
        dlogits = dlogits.scatter_add(-1, topk_ids, chosen)
    return dlogits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    router_logits, _, token_mask = inputs
    _, topk_ids, expert_counts, _, *order = output
    ctx.mark_non_differentiable(topk_ids, expert_counts, *order)
    ctx.save_for_backward(router_logits, topk_ids, expert_counts, token_mask)


def _backward(
    ctx: Any, backward_op: Callable[..., Any], *gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    dtopk_weights, _, _, dbalance_loss, *_ = gradients
    return (backward_op(dtopk_weights, dbalance_loss, *ctx.saved_tensors),)


def register(library_name: str) -> None:
    """Fakes and autograd for the op of this name in torch.ops.<library_name>."""
    register_fakes(library_name, _OP, _fake, _backward_fake)
    register_autograd(library_name, _OP, _backward, _setup_context, _plain, _plain_backward)


register("lowrank_ext")
