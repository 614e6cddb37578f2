"""GOAT's files: lora_A [E, r/E, K], lora_B [E, N, r/E], the router, and initial factors.

The initial lora_A and lora_B rebuild the residual base weight; with init="zero" there are none.
"""

from typing import Any

from lowrank_ext.adapter_format import AdapterFormat, StoredConfig


class GOATFormat(AdapterFormat):
    """The format with GOAT's tensors; with scale="theory" lora_alpha is not read."""

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
