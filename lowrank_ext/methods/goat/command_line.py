"""GOAT and plain mixtures of LoRA experts on the command line."""

import math
from collections.abc import Mapping
from typing import Any

from lowrank_ext.methods.goat.balance import balance_loss, expert_load
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.goat.trainer import BalanceLossMixin
from lowrank_ext.recipe import (
    SHARED_DROPOUT,
    Option,
    Recipe,
    Run,
    Training,
    above_zero,
    always,
    at_least,
    given,
    init_option,
    never,
)


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
    Option(
        name="scale",
        type=str,
        default="alpha_over_re",
        help="goat, moe-lora: alpha_over_re, by the rank of an expert, or theory, by --eta.",
    ),
    Option(
        name="eta",
        type=float,
        default=1.0,
        help="goat, moe-lora: learning rate of full fine-tuning over the adapter's, for --scale "
        "theory.",
        check=above_zero,
    ),
    SHARED_DROPOUT,
)

# Of the spectral start, which moe-lora lacks.
GOAT_OPTIONS = (
    init_option("goat: goat or goat_mini."),
    Option(
        name="rho",
        type=float,
        default=10.0,
        help="goat: divisor of the singular values that experts start from.",
        check=above_zero,
    ),
    Option(
        name="residual_factor",
        type=float,
        default=None,
        help="goat: share of the experts that the base loses.",
        check=at_least(0),
        shown_default="1 / --experts",
    ),
)
_FIELDS = ("top_k", "scale", "eta", "shared_dropout")


def _config(shared: dict[str, Any], run: Run) -> GOATConfig:
    renamed = {"num_experts": "experts", "balance_coefficient": "balance"}
    spectral = given(run, *(option.name for option in GOAT_OPTIONS))
    return GOATConfig(**shared, **given(run, *_FIELDS, **renamed), **spectral)


def _mixture_config(shared: dict[str, Any], run: Run) -> GOATConfig:
    renamed = {"num_experts": "experts", "balance_coefficient": "balance"}
    return GOATConfig(**shared, **given(run, *_FIELDS, **renamed), init="zero")


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
        config=config,
        options=options,
        check=_check,
        training=Training(
            extra_loss=balance_loss, trainer_mixin=BalanceLossMixin, expert_load=expert_load
        ),
        describe=_describe,
        changes_base=changes_base,
    )
    for name, config, options, changes_base in (
        ("moe-lora", _mixture_config, OPTIONS, never),
        ("goat", _config, (*OPTIONS, *GOAT_OPTIONS), always),
    )
)
