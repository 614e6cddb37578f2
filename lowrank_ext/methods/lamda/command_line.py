"""LaMDA and LaMDA++ on the command line."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lamda.freezing import FreezeSchedule
from lowrank_ext.methods.lamda.module import LaMDALinear
from lowrank_ext.recipe import (
    Option,
    ParameterGroup,
    Recipe,
    Run,
    Training,
    always,
    fraction_above_zero,
)

# Entries of a core are singular values (about 10); those of lora_b, whose columns have norm 1, are
# about 0.04. AdamW moves every entry by the same amount, so the core needs larger steps.
CORE_LR_FACTOR = 40.0

FREEZE_ETA = Option(
    name="freeze_eta",
    type=float,
    default=0.3,
    help="LaMDA: lora_b is frozen column by column over this part of the steps.",
    check=fraction_above_zero,
)


def _config(rank_budget: str | None) -> Callable[[dict[str, Any], Run], LaMDAConfig]:
    return lambda shared, run: LaMDAConfig(**shared, rank_budget=rank_budget)


def _cores(model: nn.Module) -> list[ParameterGroup]:
    cores = [module.core for module in model.modules() if isinstance(module, LaMDALinear)]
    return [(cores, CORE_LR_FACTOR)]


def _schedule(model: nn.Module, run: Run) -> FreezeSchedule:
    return FreezeSchedule(model, run.steps, eta=run.options["freeze_eta"])


RECIPES = tuple(
    Recipe(
        name=name,
        learning_rate=5e-4,
        dropout=0.0,  # it would fall on the principal part of the weight, which the branch holds
        config=_config(rank_budget),
        options=(FREEZE_ETA,),
        training=Training(parameter_groups=_cores, schedule=_schedule),
        changes_base=always,
    )
    for name, rank_budget in (("lamda", None), ("lamda++", "rank"))
)
