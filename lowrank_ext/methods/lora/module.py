"""LoRALinear: both projections train; with init="pissa" from the principal part of the weight."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn.init import draw_lora_a, top_singular_triples
from lowrank_ext.nn.low_rank_linear import LowRankLinear


class LoRALinear(LowRankLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ,
    with lora_bias=True + scaling · lora_bias, which the op takes as a part of the base's bias.

    Inits; random numbers are drawn in fp32 on the CPU, so they depend on neither device nor dtype:

    - ``kaiming``: lora_a uniform in ±1/sqrt(K), lora_b zero; after the same ``torch.manual_seed``
      these are PEFT's numbers.
    - ``gaussian``: lora_a normal with standard deviation 1/r, lora_b zero; likewise.
    - ``pissa`` (arXiv 2404.02948): with W = U diag(sig) Vᵀ, lora_a = sqrt(sig_r / s) V_rᵀ and
      lora_b = U_r sqrt(sig_r / s), s being the scaling, both rounded to the base's dtype; the base
      weight becomes W - s lora_b lora_a. The buffers ``lora_a_init`` and ``lora_b_init`` rebuild W.
      The ops round factors to the base's dtype, so base and branch together keep W: PEFT, which
      multiplies in fp32, subtracts unrounded factors (``reset_as_peft``).
    """

    config_class = LoRAConfig
    svd_inits = ("pissa",)
    residual_inits = ("pissa",)
    residual_starts = ("lora_a_init", "lora_b_init")

    lora_a_init: Tensor
    lora_b_init: Tensor
    lora_bias: nn.Parameter | None  # [N], with lora_bias=True

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        config = self.config
        assert isinstance(config, LoRAConfig)
        has_bias = config.lora_bias
        empty = torch.zeros(self.out_features, dtype=dtype, device=device) if has_bias else None
        self.register_parameter("lora_bias", None if empty is None else nn.Parameter(empty))
        if self.init == "pissa":
            self.register_buffer("lora_a_init", torch.zeros_like(self.lora_a))
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))

    def _init_adapter(self) -> None:
        if self.init == "pissa":
            self._init_pissa(self.base_weight().dtype)
            return
        self.lora_a.copy_(draw_lora_a(self, gaussian=self.init == "gaussian"))
        self.lora_b.zero_()
        if self.lora_bias is not None:
            self.lora_bias.zero_()

    def branch_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return None
        wide = torch.promote_types(self.lora_bias.dtype, torch.float32)
        return self.scaling * self.lora_bias.to(wide)

    @torch.no_grad()
    def reset_as_peft(self) -> None:
        """As ``reset_adapter`` with init="pissa", but from unrounded factors, as PEFT: for files
        whose adapter PEFT trained over its own residual."""
        self.unmerge()
        self.restore_base()
        self._init_pissa(torch.float32)
        self.take_residual()

    def _init_pissa(self, dtype: torch.dtype) -> None:
        u, sig, v_t = top_singular_triples(self.base_weight(), self.r)
        root = (sig / self.scaling).sqrt()
        # Rounded as by the ops, so that the residual lacks exactly what the branch computes.
        self.lora_a_init.copy_((root.unsqueeze(1) * v_t).to(dtype))
        self.lora_b_init.copy_((u * root).to(dtype))
        self.begin_at_start()

    def begin_at_start(self) -> None:
        self.lora_a.copy_(self.lora_a_init)
        self.lora_b.copy_(self.lora_b_init)

    def start_branch(self) -> dict[str, Any]:
        start = {"lora_a": self.lora_a_init, "lora_b": self.lora_b_init}
        return {**start, "scaling": self.start_scaling}
