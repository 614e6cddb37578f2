"""DoRA's equation (Liu et al., arXiv 2402.09353) on the ops: columns of trained magnitude.

y = m / n ⊙ (W x + s B A x) + bias,    n_j = ‖W_j + s B_j A‖, without a gradient
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ext import ops
from lowrank_ext.nn.autocast import without_autocast

_BLOCK = 2**22  # elements of W + s B A that are held at once


def dora_output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    factor: Tensor,
    *,
    scaling: float,
    dropout_p: float,
    base_out: Tensor | None = None,
) -> Tensor:
    """factor ⊙ (W x + s B A x) + bias; as in PEFT with dropout W x + bias + (factor - 1) ⊙ W x' +
    factor ⊙ s B A x', x' = drop(x).

    Args:
        x: [..., K].
        weight: W, [N, K] in x's dtype.
        bias: [N] or None.
        lora_a, lora_b: A [r, K], B [N, r].
        factor: m / n, [N], in float32 or more: its distance from 1 is what trains.
        base_out: W x + bias, where the base computes it itself.
    """
    if dropout_p > 0:
        dropped = F.dropout(x, dropout_p)
        z = ops.lowrank_linear(dropped, weight, None, lora_a, lora_b, scaling=scaling)
        if base_out is None:
            return _scaled(z, factor, F.linear(x - dropped, weight, bias))
        return _scaled(z, factor, base_out - F.linear(dropped, weight))
    if base_out is None:
        z = ops.lowrank_linear(x, weight, None, lora_a, lora_b, scaling=scaling)
        return _scaled(z, factor, bias)
    z = ops.lowrank_add(base_out, x, lora_a, lora_b, scaling=scaling)
    return _scaled(z, factor, None if bias is None else (1 - factor) * bias)


def _scaled(z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
    """factor ⊙ z + rest with one rounding to z's dtype."""
    y = z * factor if rest is None else torch.addcmul(rest, z, factor)
    return y.to(z.dtype)


def column_factor(
    magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """m / n, [N], in float32 (float64 for a float64 weight), with a gradient for m alone."""
    with without_autocast(weight.device):
        norms = column_norms(weight.detach(), lora_a.detach(), lora_b.detach(), scaling)
        return magnitude.to(norms.dtype) / norms


def column_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """n_j = ‖W_j + s B_j A‖, [N], in float32 (float64 for a float64 weight).

    Of the sum itself, block by block of rows: the expanded square ‖W_j‖² + 2 s B_j·(W Aᵀ)_j +
    s² B_j (A Aᵀ) B_jᵀ costs as many multiplications and cancels where the branch nearly cancels W.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_a.to(wide), scaling * lora_b.to(wide)
    # A compiled graph takes one block: it would hold the operations of each.
    whole = torch.compiler.is_compiling()
    num_rows = len(weight) if whole else max(1, _BLOCK // max(1, weight.shape[1]))
    blocks = zip(weight.split(num_rows), b.split(num_rows), strict=True)
    sums = (torch.addmm(rows.to(wide), b_rows, a) for rows, b_rows in blocks)
    norms = torch.cat([torch.linalg.vector_norm(each, dim=1) for each in sums])
    # A row of zeros has the magnitude 0: its output is then the base's, not 0 / 0.
    return norms.clamp_min(torch.finfo(wide).tiny ** 0.5)
