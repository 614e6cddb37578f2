"""Warnings of ``adapt``: what it leaves out, and what would not do what it seems to."""

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from lowrank_ext.base_biases import base_biases
from lowrank_ext.config import AdapterConfig
from lowrank_ext.left_out import LeftOut, readers
from lowrank_ext.nn.base_layer import features_of
from lowrank_ext.target_parameters import adaptable_names
from lowrank_ext.targets import modules_named


def adapt_warnings(
    model: nn.Module,
    config: AdapterConfig,
    targets: Mapping[str, nn.Module],
    missing: Sequence[LeftOut],
) -> Iterator[str]:
    """What a user of ``adapt`` should know about these targets, before the first change.

    Args:
        missing: what "all-linear" leaves out; empty with other target_modules.
    """
    chosen = modules_named(model, config.modules_to_save)
    chosen |= modules_named(model, config.exclude_modules or ())
    if unchosen := [each for each in missing if each.module not in chosen]:
        yield _not_adapted(model, config, unchosen)
    yield from _read_by_their_owners(model, targets)
    yield from _large_ranks(config, targets)
    if config.base_biases != "none" and not base_biases(model, config, targets):
        yield "no bias trains, as bias asks for: none of these modules has one"
    if has_optimizer(model):
        yield (
            "an optimizer holds parameters of the model, which are frozen now, and lacks the "
            "adapters; make it from the parameters that require a gradient after adapt"
        )


def _not_adapted(model: nn.Module, config: AdapterConfig, missing: list[LeftOut]) -> str:
    number = sum(weight.numel() for each in missing for weight in each.weights)
    total = sum(parameter.numel() for parameter in model.parameters())
    first = missing[0]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"{number:,} parameters ({100 * number / total:.3g} % of the model) are not adapted: those "
        f"of {first.path or 'the model itself'} ({first.because}){more}; lr.summary lists them, "
        f"exclude_modules makes it a choice{_way_out(model, config, missing)}"
    )


def _way_out(model: nn.Module, config: AdapterConfig, missing: list[LeftOut]) -> str:
    """target_parameters with which the method would adapt stacked weights among these."""
    if "target_parameters" not in vars(config):  # of methods that have it
        return ""
    names = adaptable_names(model, [weight for each in missing for weight in each.weights])
    return f"; target_parameters={names} adapts them" if names else ""


def _read_by_their_owners(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[str]:
    found = readers(model)
    read = {path: found[module] for path, module in targets.items() if module in found}
    if read:
        path, reader = next(iter(read.items()))
        more = f", and so on for {len(read) - 1} more" if len(read) > 1 else ""
        yield (
            f"the adapter of {path} does not act where {reader.function} reads the weight without "
            f"calling the module{more}; put such modules into exclude_modules"
        )


def _large_ranks(config: AdapterConfig, targets: Mapping[str, nn.Module]) -> Iterator[str]:
    large = [
        f"{path} (r={config.rank_for(path)}, {features[0]} to {features[1]} features)"
        for path, module in targets.items()
        if (features := features_of(module)) and config.rank_for(path) > min(features)
    ]
    if large:
        more = f" and {len(large) - 1} more" if len(large) > 1 else ""
        yield (
            f"r is above min(in_features, out_features), the largest rank of any change, in "
            f"{large[0]}{more}; rank_pattern gives such modules a smaller one"
        )


def has_optimizer(model: nn.Module) -> bool:
    """Whether an optimizer holds parameters that train so far.

    Looks at references: only parameters with more than a module's own are searched for.
    """
    alone = nn.Module()
    alone.register_parameter("weight", nn.Parameter(torch.empty(0)))  # draws no random numbers
    usual = max(count for _, count in _references(alone))
    held = [owner for owner, count in _references(model) if count > usual]
    return any(
        isinstance(group, dict) and group.get("params") is parameters and "lr" in group
        for module, name in {*held[:1], *held[-1:]}
        for parameters in gc.get_referrers(module._parameters[name])
        if isinstance(parameters, list)
        for group in gc.get_referrers(parameters)
    )


def _references(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], int]]:
    """Module and name of each parameter that trains, and how many references it has."""
    for module in model.modules():
        for name in module._parameters:
            parameter = module._parameters[name]
            if parameter is not None and parameter.requires_grad:
                yield (module, name), sys.getrefcount(parameter)
