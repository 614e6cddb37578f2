"""RelaxedLinear: a tied linear with the adapter of one loop."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.nn.init import top_singular_triples
from lowrank_ext.ops import lowrank_linear, multi_lowrank_add


class RelaxedLinear(nn.Linear):
    """A linear whose weight all loops share, with the adapter of its own loop.

        y = x W'ᵀ + bias + (x lora_aᵀ) lora_bᵀ

    Everything trains: weight [out_features, in_features] and bias, which the layers of one position
    share, lora_a [r, in_features] and lora_b [out_features, r], which belong to one layer.

    Attributes:
        r: the rank, at least 1.
        loop: the loop to which the adapter belongs.

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), eq. 3.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        lora_a: Tensor,
        lora_b: Tensor,
        loop: int,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.lora_a = nn.Parameter(lora_a, requires_grad=weight.requires_grad)
        self.lora_b = nn.Parameter(lora_b, requires_grad=weight.requires_grad)
        self.loop = loop

    @property
    def r(self) -> int:
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return lowrank_linear(x, self.weight, self.bias, self.lora_a, self.lora_b)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W' + lora_b lora_a, summed in fp32 (fp64 for fp64) and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.lora_b.to(wide) @ self.lora_a.to(wide)
        return (self.weight.to(wide) + product).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, loop={self.loop}"


class MixedDepthLinear(nn.Module):
    """A tied linear for rows of any loop in one call.

        y[m] = x[m] W'ᵀ + bias + (x[m] lora_a[l]ᵀ) lora_b[l]ᵀ,     l = loops[m]

    One product for the tied weight of all rows; ``multi_lowrank_add`` adds to each row the adapter
    of its own loop.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], or None.
        lora_a: [B, r, in_features].
        lora_b: [B, out_features, r].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.lora_a, self.lora_b = weight, bias, lora_a, lora_b
        self._scaling = torch.ones(lora_a.shape[0], device=lora_a.device)

    def forward(self, x: Tensor, loops: Tensor) -> Tensor:
        """
        Args:
            x: [..., in_features].
            loops: int64 [...], the loop of each row.
        """
        base_out = F.linear(x, self.weight, self.bias)
        return multi_lowrank_add(base_out, x, self.lora_a, self.lora_b, loops, self._scaling)


@torch.no_grad()
def svd_factors(residual: Tensor, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lora_a = V_rᵀ [r, in] and lora_b = U_r S_r [out, r] of ``residual`` [out, in]: the product is
    its best approximation of rank r in the Frobenius norm."""
    lora_a, lora_b = _by_eigenvectors(residual, r) or _by_svd(residual, r)
    return lora_a.to(dtype).contiguous(), lora_b.to(dtype).contiguous()


def _by_svd(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, sig, v_t = top_singular_triples(residual, r)
    return v_t, u * sig


def _by_eigenvectors(residual: Tensor, r: int) -> tuple[Tensor, Tensor] | None:
    """The same from the smaller Gram matrix in fp64: for fp32 as exact as its SVD, in half the
    time. None where it is not: fp64, or a rank below r, where a row of lora_a would be noise."""
    if residual.dtype == torch.float64:
        return None
    wide = residual.double()
    is_tall = wide.shape[0] >= wide.shape[1]
    tall = wide if is_tall else wide.mT
    right = torch.linalg.eigh(tall.mT @ tall).eigenvectors[:, -r:].flip(1)
    scaled = tall @ right  # the left singular vectors, times the singular values
    sig = torch.linalg.vector_norm(scaled, dim=0)
    if not sig[-1] > torch.finfo(torch.float32).eps * sig[0]:
        return None
    return (right.mT, scaled) if is_tall else ((scaled / sig).mT, right * sig)


@torch.no_grad()
def zero_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A Gaussian lora_a [r, in], of the variance of PEFT's start, and lora_b [out, r] = 0."""
    out_features, in_features = weight.shape
    draw = torch.randn(r, in_features, dtype=torch.float32, device="cpu")
    lora_a = (draw / math.sqrt(3 * in_features)).to(weight)
    return lora_a, torch.zeros(out_features, r, dtype=weight.dtype, device=weight.device)
