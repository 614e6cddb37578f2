"""AFLoRALinear: two trainable vectors with projections that are frozen one by one."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_flag
from lowrank_ext.config import AdapterConfig
from lowrank_ext.freezing import ScheduledLinear
from lowrank_ext.methods.aflora.config import AFLoRAConfig


class AFLoRALinear(ScheduledLinear):
    """AFLoRA (Liu et al., arXiv 2403.13269): the branch of ``LowRankLinear`` with two vectors.

        y = x Wᵀ + bias + scaling · out_scale ⊙ ((rank_scale ⊙ drop(x) lora_aᵀ) lora_bᵀ)

    rank_scale [r] and out_scale [N] always train. lora_a and lora_b train until
    ``lr.AdaptiveFreezeSchedule`` freezes them, or not at all with ``train_projections=False``; once
    lora_a is frozen, backward needs no x.

    Init ``kaiming``: lora_a uniform in ±sqrt(6/K), lora_b in ±sqrt(6/r), rank_scale
    ``rank_scale_init``, out_scale zero. Drawn in fp32 on the CPU, so the numbers depend on neither
    device nor dtype. The branch starts at zero, and in the first step only out_scale has a nonzero
    gradient.
    """

    config_class = AFLoRAConfig
    schedule_name = "AdaptiveFreezeSchedule"

    config: AFLoRAConfig
    rank_scale: nn.Parameter
    out_scale: nn.Parameter

    @classmethod
    def _config(cls, config: AdapterConfig | None, options: dict[str, Any]) -> AdapterConfig:
        if "train_projections" in options:  # the option of one module; a config has live_modules
            owner = cls.__name__
            if config is not None or "live_modules" in options:
                raise TypeError(f"{owner}: give train_projections or live_modules, got both")
            train = options["train_projections"]
            check_flag(train, owner, "train_projections")
            rest = {name: value for name, value in options.items() if name != "train_projections"}
            options = {**rest, "live_modules": None if train else ()}
        config = super()._config(config, options)
        if isinstance(config, AFLoRAConfig) and config.live_modules not in (None, ()):
            raise ValueError(
                f"{cls.__name__}: live_modules must be None, or () for none, for a single module, "
                f"got {config.live_modules!r}; use config.for_module(path)"
            )
        return config

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        self.rank_scale = nn.Parameter(torch.zeros(self.r, dtype=dtype, device=device))
        self.out_scale = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        for projection in (self.lora_a, self.lora_b):
            projection.requires_grad_(self.config.is_live(""))

    def _init_adapter(self) -> None:
        for projection in (self.lora_a, self.lora_b):
            projection.copy_(_kaiming(projection))
        self.rank_scale.fill_(self.config.rank_scale_init)
        self.out_scale.zero_()


def _kaiming(like: Tensor) -> Tensor:
    """Uniform in ±sqrt(6 / columns), fp32 on the CPU, from the default generator."""
    return nn.init.kaiming_uniform_(torch.empty(like.shape, dtype=torch.float32, device="cpu"))
