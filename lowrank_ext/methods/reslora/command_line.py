"""ResLoRA on the command line: a recipe for each shortcut."""

from collections.abc import Callable, Mapping
from typing import Any

from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.recipe import SHARED_DROPOUT, Option, Recipe, Run, given


def _check_pre_num(value: int, options: Mapping[str, Any]) -> str | None:
    return None if value >= 1 or value == -1 else "must be at least 1, or -1 for all"


PRE_NUM = Option(
    name="pre_num",
    type=int,
    default=4,
    help="reslora-bs, reslora-ms: earlier blocks that a module reaches; -1: all.",
    check=_check_pre_num,
)


def _config(
    shortcut: str, options: tuple[Option, ...]
) -> Callable[[dict[str, Any], Run], ResLoRAConfig]:
    names = [option.name for option in options]
    return lambda shared, run: ResLoRAConfig(**shared, shortcut=shortcut, **given(run, *names))


RECIPES = tuple(
    Recipe(name=name, learning_rate=3e-3, config=_config(shortcut, options), options=options)
    for name, shortcut, options in (
        ("reslora-is", "input", ()),
        ("reslora-bs", "block", (PRE_NUM, SHARED_DROPOUT)),
        ("reslora-ms", "middle", (PRE_NUM,)),
    )
)
