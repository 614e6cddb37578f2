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
    """1 / (1 - p) for the probability that is really used; 0 where everything is dropped."""
    threshold = dropout_threshold(dropout_p)
    return 0.0 if threshold == 65536 else 65536 / (65536 - threshold)


def _philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
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
    seed: int,
    num_rows: int,
    num_cols: int,
    dropout_p: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keep mask of the in-kernel dropout, ``bool [num_rows, num_cols]``; True means kept.

    Element (m, k) belongs to the Philox4x32-7 call with counter
    ``(k // 8, m mod 2^32, m div 2^32, 0)`` and key ``(seed mod 2^32, seed div 2^32)``. The call's
    four words, low half first, are eight 16-bit draws for eight neighbouring columns; a draw below
    ``round(p · 65536)`` drops its element. The mask depends on seed, row and column only.
    """
    num_calls = (num_cols + _COLUMNS_PER_CALL - 1) // _COLUMNS_PER_CALL
    rows = torch.arange(num_rows, dtype=torch.int64, device=device).unsqueeze(1)
    calls = torch.arange(num_calls, dtype=torch.int64, device=device).unsqueeze(0)
    counter = [
        calls.expand(num_rows, num_calls),
        (rows & _MASK32).expand(num_rows, num_calls),
        (rows >> 32).expand(num_rows, num_calls),
        torch.zeros(num_rows, num_calls, dtype=torch.int64, device=device),
    ]
    words = _philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    draws = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack(draws, dim=-1) >= dropout_threshold(dropout_p)
    return kept.reshape(num_rows, num_calls * _COLUMNS_PER_CALL)[:, :num_cols]


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x ⊙ mask / (1 - p) with the mask of :func:`dropout_mask`; rows are all leading dims of x."""
    if dropout_threshold(dropout_p) == 0:
        return x
    if seed is None:
        raise ValueError("dropout: seed must be a one-element int64 tensor when dropout_p > 0")
    num_cols = x.shape[-1]
    num_rows = x.numel() // num_cols if num_cols else 0
    kept = dropout_mask(int(seed), num_rows, num_cols, dropout_p, x.device).reshape(x.shape)
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
    """y = x weightᵀ + bias + branch, the branch of :func:`lowrank_add`."""
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
