"""LaMDALinear: a trainable core between frozen projections."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.freezing import ScheduledLinear
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.nn.init import draw_lora_a, top_singular_triples


class LaMDALinear(ScheduledLinear):
    """LaMDA (Azizi et al., arXiv 2406.12832): the branch of ``LowRankLinear`` with a core [r, r].

        y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ coreᵀ) lora_bᵀ

    lora_a never trains, so backward needs no x; the core always trains; lora_b trains until it is
    frozen, column by column, by ``FreezeSchedule``, or not at all with ``train_lora_b=False``.

    Inits, with W = U diag(sig) Vᵀ in fp32 and s the scaling:

    - ``svd_residual``: lora_a = V_rᵀ, lora_b = U_r, core = diag(sig_r) / s, all rounded to the
      base's dtype, and the base weight becomes W - s lora_b core lora_a. The buffers
      ``lora_b_init`` [N, r] and ``core_init`` [r] rebuild W (lora_a never changes).
    - ``svd_zero_core``: the same projections, core zero, W untouched.
    - ``lora``: lora_a Kaiming, lora_b zero, core as nn.Linear starts, as in the released code.
    """

    config_class = LaMDAConfig
    schedule_name = "FreezeSchedule"
    svd_inits = ("svd_residual", "svd_zero_core")
    residual_inits = ("svd_residual",)
    residual_starts = ("lora_b_init", "core_init")
    residual_constants = ("lora_a",)

    config: LaMDAConfig
    core: nn.Parameter
    lora_b_init: Tensor
    core_init: Tensor

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        self.lora_a.requires_grad_(False)
        self.lora_b.requires_grad_(self.config.train_lora_b)
        self.core = nn.Parameter(torch.zeros(self.r, self.r, dtype=dtype, device=device))
        if self.init == "svd_residual":
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))
            self.register_buffer("core_init", torch.zeros_like(self.core[0]))

    def _init_adapter(self) -> None:
        if self.init == "lora":
            self.lora_a.copy_(draw_lora_a(self))
            self.lora_b.zero_()
            start = torch.empty(self.r, self.r, dtype=torch.float32, device="cpu")
            self.core.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5)))
            return
        weight = self.base_weight()
        u, sig, v_t = top_singular_triples(weight, self.r)
        # Rounded as by the ops, so that the residual lacks exactly what the branch computes.
        self.lora_a.copy_(v_t.to(weight.dtype))
        self.lora_b.copy_(u.to(weight.dtype))
        self.core.zero_()
        if self.init == "svd_residual":
            self.core_init.copy_((sig / self.scaling).to(weight.dtype))
            self.lora_b_init.copy_(self.lora_b)
            self.begin_at_start()

    def begin_at_start(self) -> None:
        self.lora_b.copy_(self.lora_b_init)
        self.core.copy_(self.core_init.diag())

    def start_branch(self) -> dict[str, Any]:
        start = {"lora_a": self.lora_a, "lora_b": self.lora_b_init, "core": self.core_init.diag()}
        return {**start, "scaling": self.start_scaling}
