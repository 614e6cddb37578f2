"""ResLoRA's files: LoRA's tensors; and its chains as ordinary LoRAs."""

from torch import Tensor

from lowrank_ext.adapter_format import AdapterFormat, rounded
from lowrank_ext.methods.reslora.module import ResLoRALinear
from lowrank_ext.nn.low_rank_linear import LowRankLinear


class ResLoRAFormat(AdapterFormat):
    """The format as it is; shortcuts are in the config."""

    needs_other_modules = True

    def lora_factors(self, module: LowRankLinear) -> tuple[Tensor, Tensor]:
        assert isinstance(module, ResLoRALinear)
        lora_a, lora_b = module.merged_factors()
        return rounded(lora_a, module.lora_a), rounded(lora_b, module.lora_b)
