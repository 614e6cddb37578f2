"""Low-rank fine-tuning on fused torch ops: LoRA, LaMDA, AFLoRA and their relatives."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_ext._load import load_library

load_library()  # before the imports below, which declare the Python side of its ops

from lowrank_ext import methods, nn, ops
from lowrank_ext.activation_checkpointing import prepare_for_checkpointing
from lowrank_ext.adapt import adapt
from lowrank_ext.adapter_bank import AdapterBank
from lowrank_ext.checkpoint import export_lora, load_adapter, save_adapter
from lowrank_ext.disabling import disable_adapter
from lowrank_ext.integrations.peft import accelerate, decelerate
from lowrank_ext.lora_plus import lora_plus_groups
from lowrank_ext.merging import merge, unload, unmerge
from lowrank_ext.methods import *
from lowrank_ext.summary import summary, trainable_parameters

if TYPE_CHECKING:
    from lowrank_ext.integrations.peft_tuner import peft_config as peft_config
    from lowrank_ext.integrations.peft_tuner import register_with_peft as register_with_peft
    from lowrank_ext.integrations.transformers import AdapterTrainer as AdapterTrainer
    from lowrank_ext.integrations.transformers import FreezeCallback as FreezeCallback

__version__ = "0.1.0"

# Without what needs transformers or PEFT: `from lowrank_ext import *` works without them.
__all__ = [
    "AdapterBank",
    "__version__",
    "accelerate",
    "adapt",
    "decelerate",
    "disable_adapter",
    "export_lora",
    "load_adapter",
    "lora_plus_groups",
    "merge",
    "nn",
    "ops",
    "prepare_for_checkpointing",
    "save_adapter",
    "summary",
    "trainable_parameters",
    "unload",
    "unmerge",
]
__all__ += methods.__all__


# Imported on first use: they need transformers or PEFT, which nothing else here does.
_ON_FIRST_USE = {
    "AdapterTrainer": "transformers",
    "FreezeCallback": "transformers",
    "peft_config": "peft_tuner",
    "register_with_peft": "peft_tuner",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lowrank_ext.integrations.{_ON_FIRST_USE[name]}"), name)
