"""LoRA on the command line."""

from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.recipe import Recipe

RECIPES = (
    Recipe(name="lora", learning_rate=3e-3, config=lambda shared, run: LoRAConfig(**shared)),
)
