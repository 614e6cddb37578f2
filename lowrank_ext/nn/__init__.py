"""Modules: parameters, initialization and one op call in forward.

A method's module lives in its folder, ``lowrank_ext/methods/<method>/module.py``, and is found here
by its name: ``lowrank_ext.nn.LoRALinear``.
"""

from typing import Any

from lowrank_ext import registry
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear

__all__ = ["LowRankLinear", "MultiLoRALinear"]


def __getattr__(name: str) -> Any:
    for method in registry.METHODS.values():
        if method.module_class.__name__ == name:
            return method.module_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = (method.module_class.__name__ for method in registry.METHODS.values())
    return sorted({*globals(), *classes})
