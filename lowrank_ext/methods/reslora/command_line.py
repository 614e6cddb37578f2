"""ResLoRA on the command line: a recipe for each shortcut."""

from collections.abc import Callable
from typing import Any

from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.recipe import Recipe, Run


def _config(shortcut: str) -> Callable[[dict[str, Any], Run], ResLoRAConfig]:
    return lambda shared, run: ResLoRAConfig(**shared, shortcut=shortcut)


RECIPES = tuple(
    Recipe(name=name, learning_rate=3e-3, config=_config(shortcut))
    for name, shortcut in (
        ("reslora-is", "input"),
        ("reslora-bs", "block"),
        ("reslora-ms", "middle"),
    )
)
