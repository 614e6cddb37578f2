"""Initial values of projections: PEFT's random lora_a, the top singular triples of a weight."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lowrank_ext.nn.low_rank_linear import LowRankLinear


def draw_lora_a(module: "LowRankLinear", gaussian: bool = False) -> Tensor:
    """PEFT's random start of lora_a, fp32 [..., r, K] on the CPU, from the default generator."""
    # PEFT makes lora_A and lora_B as nn.Linear, whose own init draws these numbers first; over a
    # stack of E weights as one of rank E r.
    rank = math.prod(module.stack) * module.r
    torch.empty(rank, module.in_features, device="cpu").uniform_()
    torch.empty(module.out_features, rank, device="cpu").uniform_()
    if module.branch_bias() is not None:
        torch.empty(module.out_features, device="cpu").uniform_()
    lora_a = torch.empty(rank, module.in_features, dtype=torch.float32, device="cpu")
    if gaussian:
        nn.init.normal_(lora_a, std=1 / module.r)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a.view(*module.stack, module.r, module.in_features)


def top_singular_triples(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r [N, r], sig_r [r] descending, V_rᵀ [r, K] of ``weight`` [N, K], in fp32 (fp64 for fp64).

    The signs are fixed: the entry of largest magnitude in each column of U_r is positive.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, sig, v_t = torch.linalg.svd(wide, full_matrices=False)
    u, sig, v_t = u[:, :r], sig[:r], v_t[:r]
    largest = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, largest).squeeze(0) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, sig, v_t * sign.unsqueeze(1)
