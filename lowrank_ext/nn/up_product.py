"""The second half of a branch, for modules that compute h by other means than a product with x."""

import torch
from torch import Tensor

from lowrank_ext import ops


def add_up_product(base_out: Tensor, h: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """base_out + scaling · h lora_bᵀ for h [..., r], rounded once.

    lowrank_add on h, with the identity as its down projection: r² products a row beside r·N.
    """
    identity = torch.eye(lora_b.shape[1], dtype=lora_b.dtype, device=lora_b.device)
    return ops.lowrank_add(base_out, h.to(base_out.dtype), identity, lora_b, scaling=scaling)
