"""AFLoRA."""

from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.methods.aflora.command_line import RECIPES
from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.aflora.freezing import AdaptiveFreezeSchedule
from lowrank_ext.methods.aflora.module import AFLoRALinear
from lowrank_ext.registry import Method, register

__all__ = ["AFLoRAConfig", "AdaptiveFreezeSchedule"]

register(
    Method(
        config_class=AFLoRAConfig,
        module_class=AFLoRALinear,
        file_format=AdapterFormat(
            {"rank_scale": "lora_rank_scale.weight", "out_scale": "lora_out_scale.weight"}
        ),
        schedule_class=AdaptiveFreezeSchedule,
        recipes=RECIPES,
    )
)
