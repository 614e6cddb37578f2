"""LoRA, rsLoRA and PiSSA."""

from lowrank_ext.methods.lora.command_line import RECIPES
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.methods.lora.convolution import LoRAConv
from lowrank_ext.methods.lora.embedding import LoRAEmbedding
from lowrank_ext.methods.lora.experts import LoRAExpertLinear
from lowrank_ext.methods.lora.files import LoRAFormat
from lowrank_ext.methods.lora.module import LoRALinear
from lowrank_ext.registry import Method, register

__all__ = ["LoRAConfig"]

register(
    Method(
        config_class=LoRAConfig,
        module_class=LoRALinear,
        other_classes=(LoRAEmbedding, LoRAConv, LoRAExpertLinear),
        file_format=LoRAFormat(),
        recipes=RECIPES,
    )
)
