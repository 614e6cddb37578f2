"""GOAT's files: lora_A [E, r/E, K], lora_B [E, N, r/E], the router, and the starts of both.

The starts, which rebuild the residual base weight, are there but for init="zero".
"""

from typing import Any

from lowrank_ext.adapter_format import AdapterFormat, StoredConfig


class GOATFormat(AdapterFormat):
    """Tensors of its own; lora_alpha means nothing with scale="theory"."""

    def __init__(self) -> None:
        super().__init__(
            {
                "router_weight": "lora_router.weight",
                "lora_a_init": "lora_A_init.weight",
                "lora_b_init": "lora_B_init.weight",
            }
        )

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        options = super().options(stored)
        if options.get("scale") == "theory":  # lora_alpha is there for other readers
            options |= {"alpha": None, "alpha_pattern": {}}
        return options
