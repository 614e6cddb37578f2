"""Modules: parameters, initialization and one op call in forward.

A method's module lives in its folder, ``lowrank_ext/methods/<method>/module.py``; registering the
method makes it public here, ``lowrank_ext.nn.LoRALinear``.
"""

from typing import TYPE_CHECKING, Any

from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.nn.token_rows import TiedTokenRows, TokenRows

__all__ = ["LowRankLinear", "MultiLoRALinear", "TiedTokenRows", "TokenRows"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:  # the modules of methods
        ...
