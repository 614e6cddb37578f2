"""Set-and-Sequence: config and module here, functions on whole models in ``motion``."""

from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.methods.set_and_sequence import motion
from lowrank_ext.methods.set_and_sequence.command_line import RECIPES
from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig
from lowrank_ext.methods.set_and_sequence.module import BasisLoRALinear
from lowrank_ext.registry import Method, register

__all__ = ["BasisLoRAConfig", "motion"]

register(
    Method(
        config_class=BasisLoRAConfig,
        module_class=BasisLoRALinear,
        file_format=AdapterFormat(more_names=r"lora_residual_[^.]+"),
        recipes=RECIPES,
    )
)
