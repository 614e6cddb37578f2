"""AFLoRA on the command line."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.aflora.freezing import DECAYS, AdaptiveFreezeSchedule
from lowrank_ext.recipe import (
    Option,
    Recipe,
    Run,
    Training,
    above_zero,
    at_least,
    fraction_above_zero,
    one_of,
    parse_modules,
)


def _check_start(start: float | None, options: Mapping[str, Any]) -> str | None:
    eta = options["freeze_eta"]
    if start is None or 0 <= start <= eta:
        return None
    return f"must be at least 0 and at most --freeze-eta {eta}"


def _check_decay_rate(value: float, options: Mapping[str, Any]) -> str | None:
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


OPTIONS = (
    Option(
        name="freeze_eta",
        type=float,
        default=0.3,
        help="AFLoRA: after this part everything but its vectors is frozen.",
        check=fraction_above_zero,
    ),
    Option(
        name="freeze_start",
        type=float,
        default=None,
        help="AFLoRA: nothing is frozen in this part of the steps.",
        check=_check_start,
        shown_default="a third of --freeze-eta",
    ),
    Option(
        name="freeze_decay",
        type=str,
        default="cubic",
        help="AFLoRA: how the part that trains falls, cubic or quadratic.",
        check=one_of(DECAYS),
    ),
    Option(
        name="freeze_window",
        type=int,
        default=None,
        help="AFLoRA: steps between decisions.",
        check=at_least(1),
        shown_default="10, less in short runs",
    ),
    *(
        Option(
            name=name,
            type=float,
            default=default,
            help=f"AFLoRA: decay rate of {what} in its scores.",
            check=_check_decay_rate,
        )
        for name, default, what in (
            ("freeze_beta1", 0.85, "importance"),
            ("freeze_beta2", 0.95, "uncertainty"),
        )
    ),
    Option(
        name="rank_scale_init",
        type=float,
        default=0.1,
        help="AFLoRA: start of the vector between its projections.",
        check=above_zero,
    ),
    Option(
        name="live_modules",
        type=str,
        default=None,
        help="AFLoRA: modules whose projections train at first, named as in --targets.",
        shown_default="all",
    ),
)


def score_window(run: Run) -> int:
    """--freeze-window; by default AFLoRA's ten steps, or a tenth of a short freezing phase, so that
    a phase of ten or more steps has at least ten decisions."""
    window, eta = run.options["freeze_window"], run.options["freeze_eta"]
    if window is not None:
        return int(window)
    start = run.options["freeze_start"]
    start = eta / 3 if start is None else start
    return max(1, min(10, int((eta - start) * run.steps) // 10))


def _schedule(model: nn.Module, run: Run) -> AdaptiveFreezeSchedule:
    return AdaptiveFreezeSchedule(
        model,
        run.steps,
        eta=run.options["freeze_eta"],
        start=run.options["freeze_start"],
        decay=run.options["freeze_decay"],
        window=score_window(run),
        beta1=run.options["freeze_beta1"],
        beta2=run.options["freeze_beta2"],
    )


def _config(shared: dict[str, Any], run: Run) -> AFLoRAConfig:
    live = run.options["live_modules"]
    return AFLoRAConfig(
        **shared,
        rank_scale_init=run.options["rank_scale_init"],
        live_modules=None if live is None else parse_modules(live),
    )


RECIPES = (
    Recipe(
        name="aflora",
        learning_rate=3e-2,
        config=_config,
        options=OPTIONS,
        training=Training(schedule=_schedule),
    ),
)
