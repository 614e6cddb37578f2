"""Low-rank fine-tuning on fused torch ops: LoRA, LaMDA, AFLoRA and their relatives."""

from typing import TYPE_CHECKING, Any

from lowrank_ext._load import load_library

load_library()  # before the imports below, which declare the Python side of its ops

from lowrank_ext import guard, motion, nn, ops, style
from lowrank_ext.adapt import (
    adapt,
    prepare_for_checkpointing,
    summary,
    trainable_parameters,
)
from lowrank_ext.adapter_bank import AdapterBank
from lowrank_ext.adaptive_freezing import AdaptiveFreezeSchedule
from lowrank_ext.balance import ExpertLoad, balance_loss, expert_load
from lowrank_ext.checkpoint import load_adapter, save_adapter
from lowrank_ext.config import (
    AFLoRAConfig,
    BasisLoRAConfig,
    GOATConfig,
    LaMDAConfig,
    LoRAConfig,
    ResLoRAConfig,
)
from lowrank_ext.freezing import FreezeSchedule
from lowrank_ext.integrations.peft import accelerate, decelerate
from lowrank_ext.merging import merge, unload, unmerge
from lowrank_ext.nn.goat import token_mask
from lowrank_ext.rank_allocation import allocate_ranks
from lowrank_ext.shortcuts import reslora_call, reslora_merge_error, reslora_statistics

if TYPE_CHECKING:
    from lowrank_ext.integrations.transformers import BalanceLossMixin, FreezeCallback

__version__ = "0.1.0"

__all__ = [
    "AFLoRAConfig",
    "AdapterBank",
    "AdaptiveFreezeSchedule",
    "BalanceLossMixin",
    "BasisLoRAConfig",
    "ExpertLoad",
    "FreezeCallback",
    "FreezeSchedule",
    "GOATConfig",
    "LaMDAConfig",
    "LoRAConfig",
    "ResLoRAConfig",
    "__version__",
    "accelerate",
    "adapt",
    "allocate_ranks",
    "balance_loss",
    "decelerate",
    "expert_load",
    "guard",
    "load_adapter",
    "merge",
    "motion",
    "nn",
    "ops",
    "prepare_for_checkpointing",
    "reslora_call",
    "reslora_merge_error",
    "reslora_statistics",
    "save_adapter",
    "style",
    "summary",
    "token_mask",
    "trainable_parameters",
    "unload",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # These build on transformers, which is not needed for anything else.
    if name in ("BalanceLossMixin", "FreezeCallback"):
        from lowrank_ext.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
