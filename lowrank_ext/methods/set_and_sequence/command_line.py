"""Set-and-Sequence on the command line: shuffled windows of text first, then the text itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig
from lowrank_ext.methods.set_and_sequence.stages import begin_residual_stage
from lowrank_ext.recipe import Option, Recipe, Run, Stage, Training, at_least, given, init_option
from lowrank_ext.wrappers import unwrapped


def _check_set_fraction(fraction: float, options: Mapping[str, Any]) -> str | None:
    return None if 0 < fraction < 1 else "must be above 0 and below 1"


OPTIONS = (
    Option(
        name="set_fraction",
        type=float,
        default=0.5,
        help="set-and-sequence: part of the steps in the first stage, on shuffled windows.",
        check=_check_set_fraction,
    ),
    Option(
        name="window",
        type=int,
        default=32,
        help="set-and-sequence: tokens per window of the first stage.",
        check=at_least(1),
    ),
)

# Options of the config, under their own names.
CONFIG_OPTIONS = (
    init_option("set-and-sequence: kaiming or gaussian."),
    Option(
        name="basis",
        type=str,
        default="down",
        help="set-and-sequence: the factor that the second stage keeps, down or up.",
    ),
    Option(
        name="coef_dropout",
        type=float,
        default=0.8,
        help="set-and-sequence: probability of dropping a coefficient in the first stage.",
    ),
    Option(
        name="residual_coef_dropout",
        type=float,
        default=0.5,
        help="set-and-sequence: the same in the second stage.",
    ),
    Option(
        name="mask_rescale",
        type=bool,
        default=True,
        help="set-and-sequence: kept coefficients are scaled up.",
    ),
    Option(
        name="mask_per",
        type=str,
        default="call",
        help="set-and-sequence: a mask for each call or sample.",
    ),
    Option(
        name="mask_identity",
        type=bool,
        default=False,
        help="set-and-sequence: in the second stage frozen coefficients are masked too.",
    ),
)


def _config(shared: dict[str, Any], run: Run) -> BasisLoRAConfig:
    return BasisLoRAConfig(**shared, **given(run, *(option.name for option in CONFIG_OPTIONS)))


def _check(run: Run) -> str | None:
    window = run.options["window"]
    if 2 * window > run.seq_len:
        return f"--window must be at most half of --seq-len {run.seq_len}, got {window}"
    return None


def set_steps(run: Run) -> int:
    """Steps of the first stage."""
    return max(1, round(run.options["set_fraction"] * run.steps))


def shuffled_windows(tokens: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """tokens [batch, seq_len] with the windows of each row in a random order; a remainder shorter
    than a window stays at the row's end."""
    batch, seq_len = tokens.shape
    num_windows = seq_len // window
    whole = tokens[:, : num_windows * window].reshape(batch, num_windows, window)
    order = torch.rand(batch, num_windows, generator=generator).argsort(dim=1)
    shuffled = whole.gather(1, order.unsqueeze(2).expand_as(whole)).flatten(1)
    return torch.cat([shuffled, tokens[:, num_windows * window :]], dim=1)


def _out_of_order(tokens: Tensor, run: Run, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    return shuffled_windows(tokens, run.options["window"], generator)


def _stage_of(model: nn.Module) -> int:
    config = getattr(unwrapped(model), "lowrank_config", None)
    return 1 if isinstance(config, BasisLoRAConfig) and config.residuals else 0


def _describe(run: Run) -> str:
    return f"set stage {set_steps(run)} steps on windows of {run.options['window']} tokens"


RECIPES = (
    Recipe(
        name="set-and-sequence",
        learning_rate=3e-3,
        config=_config,
        options=(*OPTIONS, *CONFIG_OPTIONS),
        check=_check,
        training=Training(
            stages=(
                Stage(num_steps=set_steps, begin=lambda model: model, batch=_out_of_order),
                Stage(
                    num_steps=lambda run: run.steps - set_steps(run),
                    begin=begin_residual_stage,
                    batch=lambda tokens, run, step: tokens,
                ),
            ),
            stage_of=_stage_of,
        ),
        describe=_describe,
    ),
)
