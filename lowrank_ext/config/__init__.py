"""What to adapt and how: one immutable dataclass per method.

Every check that needs no model happens when a config is built. A changed copy is made with
``dataclasses.replace(config, r=8)``.
"""

from lowrank_ext.config.aflora import AFLoRAConfig
from lowrank_ext.config.base import AdapterConfig
from lowrank_ext.config.basis import BasisLoRAConfig
from lowrank_ext.config.goat import GOATConfig
from lowrank_ext.config.lamda import LaMDAConfig
from lowrank_ext.config.lora import LoRAConfig
from lowrank_ext.config.reslora import ResLoRAConfig

METHOD_CONFIGS: tuple[type[AdapterConfig], ...] = (
    LoRAConfig,
    LaMDAConfig,
    AFLoRAConfig,
    GOATConfig,
    ResLoRAConfig,
    BasisLoRAConfig,
)

__all__ = [
    "METHOD_CONFIGS",
    "AFLoRAConfig",
    "AdapterConfig",
    "BasisLoRAConfig",
    "GOATConfig",
    "LaMDAConfig",
    "LoRAConfig",
    "ResLoRAConfig",
]
