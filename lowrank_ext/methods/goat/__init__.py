"""GOAT and plain mixtures of LoRA experts."""

from lowrank_ext.methods.goat.balance import ExpertLoad, balance_loss, expert_load
from lowrank_ext.methods.goat.command_line import RECIPES
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.goat.files import GOATFormat
from lowrank_ext.methods.goat.module import GOATLinear
from lowrank_ext.methods.goat.token_mask import token_mask
from lowrank_ext.methods.goat.trainer import BalanceLossMixin
from lowrank_ext.registry import Method, register

__all__ = [
    "BalanceLossMixin",
    "ExpertLoad",
    "GOATConfig",
    "balance_loss",
    "expert_load",
    "token_mask",
]

register(
    Method(
        config_class=GOATConfig, module_class=GOATLinear, file_format=GOATFormat(), recipes=RECIPES
    )
)
