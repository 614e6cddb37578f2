"""LaMDA's files: the core, and with init="svd_residual" what rebuilds the residual base weight.

These are the start of lora_b and of core's diagonal; lora_a never changes.
"""

import re
from typing import Any

from lowrank_ext.adapter_format import AdapterFormat, StoredConfig


class LaMDAFormat(AdapterFormat):
    """Tensors of its own; the ranks of a file are the ones that were allocated."""

    def __init__(self) -> None:
        super().__init__(
            {
                "core": "lora_core.weight",
                "lora_b_init": "lora_B_init.weight",
                "core_init": "lora_core_init.weight",
            }
        )

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        options = super().options(stored)
        if options.get("rank_budget") is not None and not options["rank_pattern"]:
            # An empty pattern would have the ranks allocated once more.
            options["rank_pattern"] = {f"^{re.escape(path)}": options["r"] for path in stored.paths}
        return options
