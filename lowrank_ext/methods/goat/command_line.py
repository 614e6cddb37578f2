"""GOAT and plain mixtures of LoRA experts on the command line."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_ext.methods.goat.balance import balance_loss, expert_load
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.goat.trainer import BalanceLossMixin
from lowrank_ext.recipe import Option, Recipe, Run, Training, at_least


def _check_top_k(top_k: int, options: Mapping[str, Any]) -> str | None:
    if top_k > options["experts"]:
        return f"must be at most --experts {options['experts']}"
    return at_least(1)(top_k, options)


def _check_balance(balance: float, options: Mapping[str, Any]) -> str | None:
    return None if balance >= 0 and math.isfinite(balance) else "must be at least 0"


OPTIONS = (
    Option(
        name="experts",
        type=int,
        default=8,
        help="goat, moe-lora: experts per module, which share the rank.",
        check=at_least(1),
    ),
    Option(
        name="top_k",
        type=int,
        default=2,
        help="goat, moe-lora: experts per token.",
        check=_check_top_k,
    ),
    Option(
        name="balance",
        type=float,
        default=1e-3,
        help="goat, moe-lora: factor of the load balance loss; 0: none.",
        check=_check_balance,
    ),
)


def _config(init: str) -> Callable[[dict[str, Any], Run], GOATConfig]:
    def config(shared: dict[str, Any], run: Run) -> GOATConfig:
        return GOATConfig(
            **shared,
            init=init,
            num_experts=run.options["experts"],
            top_k=run.options["top_k"],
            balance_coefficient=run.options["balance"],
        )

    return config


def _changes_base(init: str) -> Callable[[Run], bool]:
    return lambda run: init != "zero"


def _check(run: Run) -> str | None:
    experts = run.options["experts"]
    if run.rank % experts:
        return f"--rank must be a multiple of --experts {experts}, got {run.rank}"
    return None


def _describe(run: Run) -> str:
    experts, top_k, balance = (run.options[name] for name in ("experts", "top_k", "balance"))
    return f"{experts} experts, {top_k} per token, balance {balance:g}"


RECIPES = tuple(
    Recipe(
        name=name,
        learning_rate=3e-3,
        config=_config(init),
        options=OPTIONS,
        check=_check,
        training=Training(
            extra_loss=balance_loss, trainer_mixin=BalanceLossMixin, expert_load=expert_load
        ),
        describe=_describe,
        changes_base=_changes_base(init),
    )
    for name, init in (("moe-lora", "zero"), ("goat", "goat"))
)
