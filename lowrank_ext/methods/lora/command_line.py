"""LoRA on the command line, with rsLoRA, PiSSA, DoRA and LoRA+."""

from typing import Any

from torch import nn

from lowrank_ext.lora_plus import lora_plus_groups
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.recipe import (
    Option,
    ParameterGroup,
    Recipe,
    Run,
    Training,
    above_zero,
    given,
    init_option,
)

OPTIONS = (
    init_option("lora: start of the adapters, kaiming, gaussian or pissa."),
    Option(
        name="dora",
        type=bool,
        default=False,
        help="lora: trained magnitudes of the columns (DoRA).",
    ),
    Option(
        name="bias",
        type=str,
        default="none",
        help="lora: biases of the base that train: none, lora_only or all.",
    ),
    Option(name="lora_bias", type=bool, default=False, help="lora: lora_b has a bias."),
    Option(
        name="lora_plus_ratio",
        type=float,
        default=None,
        help="lora: lora_b learns that many times as fast as lora_a (LoRA+; the paper has 2 to "
        "16).",
        check=above_zero,
        shown_default="1",
    ),
)


def lora_plus(model: nn.Module, run: Run) -> list[ParameterGroup]:
    """The groups of --lora-plus-ratio, of models of `adapt` and of PEFT; adapters of embeddings
    have the run's rate."""
    ratio = run.options["lora_plus_ratio"]
    if ratio is None:
        return []
    groups = lora_plus_groups(model, lr=1.0, ratio=ratio, embedding_lr=1.0)
    return [(group["params"], group["lr"]) for group in groups if group["lr"] != 1.0]


def _config(shared: dict[str, Any], run: Run) -> LoRAConfig:
    return LoRAConfig(**shared, **given(run, "init", "dora", "bias", "lora_bias"))


def _changes_base(run: Run) -> bool:
    """PiSSA takes the adapters' start out of the weights; biases train in place."""
    return run.options["init"] == "pissa" or run.options["bias"] != "none"


RECIPES = (
    Recipe(
        name="lora",
        learning_rate=3e-3,
        config=_config,
        options=OPTIONS,
        training=Training(parameter_groups=lora_plus),
        changes_base=_changes_base,
    ),
)
