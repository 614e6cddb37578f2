"""LaMDA's files: the core, and with init="svd_residual" the initial lora_b and diagonal of core.

These rebuild the residual base weight, together with lora_a, which never changes.
"""

import re
from typing import Any

from torch import Tensor

from lowrank_ext.adapter_format import AdapterFormat, StoredConfig, rounded
from lowrank_ext.nn.low_rank_linear import LowRankLinear


class LaMDAFormat(AdapterFormat):
    """The format with LaMDA's tensors; a file's ranks are those that were allocated."""

    def __init__(self) -> None:
        super().__init__(
            {
                "core": "lora_core.weight",
                "lora_b_init": "lora_B_init.weight",
                "core_init": "lora_core_init.weight",
            }
        )

    def lora_factors(self, module: LowRankLinear) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = super().lora_factors(module)
        if not module.residual_taken:
            return lora_a, lora_b
        start = module.get_buffer("lora_b_init").double() * module.get_buffer("core_init").double()
        start = (module.start_scaling / module.scaling) * start
        return lora_a, rounded(module.with_scales(module.lora_b) - start, lora_b)

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        options = super().options(stored)
        if options.get("rank_budget") is not None and not options["rank_pattern"]:
            # An empty pattern would make adapt allocate the ranks again.
            options["rank_pattern"] = {f"^{re.escape(path)}": options["r"] for path in stored.paths}
        return options
