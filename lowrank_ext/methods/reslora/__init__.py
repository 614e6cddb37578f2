"""ResLoRA."""

from lowrank_ext.methods.reslora.command_line import RECIPES
from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.methods.reslora.files import ResLoRAFormat
from lowrank_ext.methods.reslora.model import reslora_call, reslora_merge_error, reslora_statistics
from lowrank_ext.methods.reslora.module import ResLoRALinear
from lowrank_ext.registry import Method, register

__all__ = ["ResLoRAConfig", "reslora_call", "reslora_merge_error", "reslora_statistics"]

register(
    Method(
        config_class=ResLoRAConfig,
        module_class=ResLoRALinear,
        file_format=ResLoRAFormat(),
        recipes=RECIPES,
    )
)
