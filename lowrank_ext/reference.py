"""Every op in plain torch, written to be read as its definition.

Tests compare the kernels with this file in fp64; readers and docs use it as the specification.
All functions are differentiable and work on any device and floating dtype.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_COLUMNS_PER_CALL = 8  # one Philox call gives 128 bits: eight 16-bit decisions


def dropout_threshold(dropout_p: float) -> int:
    """Number of the 65536 possible 16-bit draws that drop an element: round(p · 65536)."""
    return round(dropout_p * 65536)


def dropout_scale(dropout_p: float) -> float:
    """1 / (1 - p) for p rounded to a multiple of 1/65536; 0 where everything is dropped."""
    threshold = dropout_threshold(dropout_p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def _philox4x32(counter: list[Tensor], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Philox4x32-7 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0 = c0 * _PHILOX_MULTIPLIERS[0]  # wraps modulo 2^64, as it must
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _PHILOX_WEYL[0]) & _MASK32
        k1 = (k1 + _PHILOX_WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def dropout_mask(
    seed: int | Tensor,
    num_rows: int,
    num_cols: int,
    dropout_p: float,
    device: torch.device | str | None = None,
    expert: int = 0,
) -> Tensor:
    """Keep mask of the in-kernel dropout, ``bool [num_rows, num_cols]``; True means kept.

    Element (m, k) belongs to the Philox4x32-7 call with counter
    ``(k // 8, m mod 2^32, m div 2^32, expert)`` and key ``(seed mod 2^32, seed div 2^32)``. The
    call's four words, low half first, are eight 16-bit draws for eight neighboring columns; a draw
    below ``round(p · 65536)`` drops its element. The mask depends on seed, row, column and expert
    only.
    """
    num_calls = (num_cols + _COLUMNS_PER_CALL - 1) // _COLUMNS_PER_CALL
    rows = torch.arange(num_rows, dtype=torch.int64, device=device).unsqueeze(1)
    calls = torch.arange(num_calls, dtype=torch.int64, device=device).unsqueeze(0)
    counter = [
        calls.expand(num_rows, num_calls),
        (rows & _MASK32).expand(num_rows, num_calls),
        (rows >> 32).expand(num_rows, num_calls),
        torch.full((num_rows, num_calls), expert, dtype=torch.int64, device=device),
    ]
    words = _philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    draws = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack(draws, dim=-1) >= dropout_threshold(dropout_p)
    return kept.reshape(num_rows, num_calls * _COLUMNS_PER_CALL)[:, :num_cols]


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, expert: int = 0) -> Tensor:
    """x ⊙ mask / (1 - p) with the mask of ``dropout_mask``; rows are all leading dims of x."""
    if dropout_threshold(dropout_p) == 0:
        return x
    if seed is None:
        raise ValueError("dropout: seed must be a one-element int64 tensor when dropout_p > 0")
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols if num_cols else 0
    kept = dropout_mask(seed, num_rows, num_cols, dropout_p, x.device, expert)
    kept = kept.reshape(x.shape)
    return torch.where(kept, x * dropout_scale(dropout_p), torch.zeros_like(x))


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
    """y = base_out + scaling · out_scale ⊙ (mid(drop(x) lora_aᵀ) lora_bᵀ).

    mid(h) = (h ⊙ rank_scale) coreᵀ. Adapter tensors are rounded to x's dtype first, as in the
    kernels.
    """
    h = dropout(x, dropout_p, seed) @ lora_a.to(x.dtype).mT
    if rank_scale is not None:
        h = h * rank_scale.to(x.dtype)
    if core is not None:
        h = h @ core.to(x.dtype).mT
    branch = h @ lora_b.to(x.dtype).mT
    if out_scale is not None:
        branch = branch * out_scale.to(x.dtype)
    return base_out + scaling * branch


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
    """y = x weightᵀ + bias + branch, the branch of ``lowrank_add``."""
    return lowrank_add(
        torch.nn.functional.linear(x, weight, bias),
        x,
        lora_a,
        lora_b,
        core=core,
        rank_scale=rank_scale,
        out_scale=out_scale,
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed,
    )


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
    """y[m] = base_out[m] + scaling[i] · lora_b[i] lora_a[i] drop(x[m]), i = adapter_ids[m].

    Rows of lora_a[i] and columns of lora_b[i] from ranks[i] on are padding. Where i = -1 or
    ranks[i] = 0, y[m] is base_out[m]. The stacks are rounded to x's dtype first, as in the kernels.
    """
    dropped = dropout(x, dropout_p, seed)
    y = base_out
    for i in range(lora_a.shape[0]):
        rank = lora_a.shape[1] if ranks is None else int(ranks[i])
        h = dropped @ lora_a[i, :rank].to(x.dtype).mT
        branch = float(scaling[i]) * (h @ lora_b[i, :, :rank].to(x.dtype).mT)
        chosen = (adapter_ids == i).unsqueeze(-1) & (rank > 0)
        y = torch.where(chosen, base_out + branch, y)
    return y


def moe_route(
    router_logits: Tensor, *, top_k: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Top-k routing of [..., E] logits, in fp32 (fp64 for fp64 logits).

    Returns topk_weights, topk_ids, expert_counts, balance_loss, sorted_slots, expert_offsets and
    slot_positions, as ``lowrank_ext.ops.moe_route`` describes them.
    """
    num_experts = router_logits.shape[-1]
    logits = _statistics(router_logits)
    # Stable, so that equal logits keep the lower id first; NaN sorts as the greatest.
    order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
    topk_ids = order[..., :top_k]
    topk_weights = torch.softmax(logits.gather(-1, topk_ids), dim=-1)

    counted = _counted(logits, token_mask)
    chosen = one_hot(topk_ids, num_experts).sum(-2)
    expert_counts = torch.where(counted, chosen, 0).reshape(-1, num_experts).sum(0)
    num_counted = counted.sum().clamp(min=1)
    probs = torch.where(counted, torch.softmax(logits, dim=-1), 0).reshape(-1, num_experts)
    share = expert_counts.to(logits.dtype) / num_counted
    balance_loss = num_experts * (share * probs.sum(0) / num_counted).sum()

    slots = topk_ids.reshape(-1)
    sorted_slots = torch.sort(slots, stable=True).indices
    slot_positions = torch.argsort(sorted_slots)
    ends = one_hot(slots, num_experts).sum(0).cumsum(0)
    expert_offsets = torch.nn.functional.pad(ends, (1, 0))
    return (
        topk_weights,
        topk_ids,
        expert_counts,
        balance_loss,
        sorted_slots,
        expert_offsets,
        slot_positions,
    )


def one_hot(ids: Tensor, num_experts: int) -> Tensor:
    """int64 [..., E]; torch's own does not work under vmap(grad(...))."""
    return (ids.unsqueeze(-1) == torch.arange(num_experts, device=ids.device)).long()


def _statistics(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _counted(per_token: Tensor, token_mask: Tensor | None) -> Tensor:
    """bool [..., 1]: the tokens that count for the balance of the experts."""
    if token_mask is None:
        return per_token.new_ones((*per_token.shape[:-1], 1), dtype=torch.bool)
    return token_mask.unsqueeze(-1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = base_out + scaling · Σ_i w_i (drop_i(x) lora_a[i]ᵀ) lora_b[i]ᵀ over each row's experts.

    The router's logits are x router_weightᵀ in fp32 (fp64 for fp64 x), x without dropout. Returns
    y, balance_loss, topk_ids and router_probs.
    """
    logits = _statistics(x) @ _statistics(router_weight.to(x.dtype)).mT
    weights, topk_ids, _, balance_loss, *_ = moe_route(logits, top_k=top_k, token_mask=token_mask)
    branch = torch.zeros_like(base_out)
    for i in range(lora_a.shape[0]):
        chosen = topk_ids == i
        weight = torch.where(chosen, weights, 0).sum(-1, keepdim=True).to(x.dtype)
        h = dropout(x, dropout_p, seed, 0 if shared_dropout else i) @ lora_a[i].to(x.dtype).mT
        out = (weight * h) @ lora_b[i].to(x.dtype).mT
        branch = torch.where(chosen.any(-1, keepdim=True), branch + out, branch)
    y = base_out + scaling * branch
    return y, balance_loss, topk_ids, torch.softmax(logits, dim=-1)
