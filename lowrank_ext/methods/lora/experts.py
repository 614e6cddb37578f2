"""LoRAExpertLinear: LoRA for each expert of one stacked weight."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn.base_layer import STACKED
from lowrank_ext.nn.init import draw_lora_a
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.sharding import gathered


class LoRAExpertLinear(LowRankLinear):
    """LoRA on a stacked weight W [E, N, K] or [E, K, N] of an experts module:

        y = x W[e]ᵀ + bias[e] + scaling · (x lora_a[e]ᵀ) lora_b[e]ᵀ,      e the expert of the row

    lora_a is [E, r, K], lora_b [E, N, r]. ``AdaptedExperts``, of which it is a child, computes y.
    The inits are LoRALinear's ``kaiming`` and ``gaussian``, in the numbers of PEFT's
    target_parameters, which have no dropout either.

    Files hold PEFT's matrices: lora_A [E r, K], the experts one after the other, and lora_B
    [N, r E], in which neighboring columns are of different experts.
    """

    config_class = LoRAConfig
    family = STACKED
    bases = "one stacked weight of an experts module"

    @classmethod
    def check_fits(cls, in_features: int, out_features: int, config: AdapterConfig) -> None:
        super().check_fits(in_features, out_features, config)
        assert isinstance(config, LoRAConfig)
        for name, fits, allowed in (
            ("init", config.init != "pissa", "'kaiming' or 'gaussian'"),
            ("dropout", not config.dropout, "0, as in PEFT,"),
            ("lora_bias", not config.lora_bias, "False, as in PEFT,"),
            ("dora", not config.dora, "False, as in PEFT,"),
            ("bias", config.bias != "all", "'none' or 'lora_only'"),
        ):
            if not fits:
                raise ValueError(
                    f"{cls.__name__}: {name} must be {allowed} for target_parameters, got "
                    f"{getattr(config, name)!r}"
                )

    def _take_base(self, base: nn.Module) -> None:
        super()._take_base(base)
        self.borrow(base)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.fan_in_fan_out else weight

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.fan_in_fan_out else matrix

    def _init_adapter(self) -> None:
        self.lora_a.copy_(draw_lora_a(self, gaussian=self.init == "gaussian"))
        self.lora_b.zero_()

    def with_delta(self, weight: Tensor) -> Tensor:
        # An expert at a time: fp64 products of all of them take four times the memory of bf16 ones.
        wide = torch.promote_types(self.lora_a.dtype, torch.float32)
        total = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, wide))
        for e, (lora_a, lora_b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            delta = (self.scaling * (lora_b.double() @ lora_a.double())).to(wide)
            total[e] = weight[e].to(total.dtype) + self.in_layout(delta)
        return total

    def packed(self, name: str, tensor: Tensor) -> Tensor:
        tensor = gathered(tensor)
        return tensor.flatten(0, 1) if name == "lora_a" else tensor.permute(1, 2, 0).flatten(1)

    def unpacked(self, name: str, tensor: Tensor) -> Tensor:
        if name == "lora_a":
            return tensor.view_as(self.lora_a)
        return tensor.view(self.out_features, self.r, *self.stack).permute(2, 0, 1)

    def to_linear(self, merge: bool, dense_dtype: torch.dtype | None = None) -> nn.Module:
        """The experts module again, the branch merged in or dropped."""
        stacked: Any = super().to_linear(merge)
        experts: nn.Module = stacked.experts
        return experts.train(self.training)
