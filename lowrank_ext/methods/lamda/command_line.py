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
    above_zero,
    fraction_above_zero,
    given,
    init_option,
)

# Entries of a core are singular values (about 10); those of lora_b, whose columns have norm 1, are
# about 0.04. AdamW moves every entry by the same amount, so the core needs larger steps.
CORE_LR_RATIO = Option(
    name="core_lr_ratio",
    type=float,
    default=40.0,
    help="LaMDA: the core's learning rate over --lr.",
    check=above_zero,
)
TRAIN_LORA_B = Option(
    name="train_lora_b",
    type=bool,
    default=True,
    help="LaMDA: lora_b trains until it is frozen, else the core alone does.",
)
DIRECTION = Option(
    name="direction",
    type=str,
    default="flat_gets_more",
    help="lamda++: spectra that get larger ranks, flat_gets_more or concentrated_gets_more.",
)
RANK_BUDGET = Option(
    name="rank_budget",
    type=str,
    default="rank",
    help="lamda++: what allocation keeps, rank (their mean) or params (their sum of squares).",
)
FREEZE_ETA = Option(
    name="freeze_eta",
    type=float,
    default=0.3,
    help="LaMDA: lora_b is frozen column by column over this part of the steps.",
    check=fraction_above_zero,
)


def _config(options: tuple[Option, ...]) -> Callable[[dict[str, Any], Run], LaMDAConfig]:
    fields = [option.name for option in options if option not in (CORE_LR_RATIO, FREEZE_ETA)]
    return lambda shared, run: LaMDAConfig(**shared, **given(run, *fields))


def _cores(model: nn.Module, run: Run) -> list[ParameterGroup]:
    cores = [module.core for module in model.modules() if isinstance(module, LaMDALinear)]
    return [(cores, run.options["core_lr_ratio"])]


def _schedule(model: nn.Module, run: Run) -> FreezeSchedule:
    return FreezeSchedule(model, run.steps, eta=run.options["freeze_eta"])


INIT = init_option("lamda: svd_residual, svd_zero_core or lora.")
OPTIONS = (FREEZE_ETA, INIT, CORE_LR_RATIO, TRAIN_LORA_B)

RECIPES = tuple(
    Recipe(
        name=name,
        learning_rate=5e-4,
        dropout=0.0,  # it would fall on the principal part of the weight, which the branch holds
        config=_config(options),
        options=options,
        training=Training(parameter_groups=_cores, schedule=_schedule),
        changes_base=lambda run: run.options["init"] in (None, "svd_residual"),
    )
    for name, options in (("lamda", OPTIONS), ("lamda++", (*OPTIONS, RANK_BUDGET, DIRECTION)))
)
