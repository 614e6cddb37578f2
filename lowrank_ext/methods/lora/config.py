"""Configuration of LoRA, rsLoRA and PiSSA."""

from dataclasses import dataclass
from typing import ClassVar

from lowrank_ext.config import AdapterConfig


@dataclass(kw_only=True, frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA: y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ; lora_a and lora_b train.

    Attributes:
        init: ``"kaiming"``: lora_a uniform as in PEFT, lora_b zero. ``"gaussian"``: lora_a normal
            with standard deviation 1/r, lora_b zero. ``"pissa"``: the top-r singular triples of W,
            which are subtracted from the base weight (Meng et al., arXiv 2404.02948).
    """

    peft_type: ClassVar[str] = "LORA"
    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian", "pissa")

    init: str = "kaiming"
