"""Weighted sums of adapters, exact: what ``add_weighted_adapter`` makes."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.checkpoint.layout import whole
from lowrank_ext.checkpoint.peft_config import pattern_of
from lowrank_ext.checks import check_finite, did_you_mean
from lowrank_ext.integrations.peft_tuner.config import LowRankPeftConfig
from lowrank_ext.integrations.peft_tuner.layer import LowRankTunerLayer, share_start
from lowrank_ext.nn.low_rank_linear import LowRankLinear

if TYPE_CHECKING:
    from lowrank_ext.integrations.peft_tuner.tuner import LowRankTuner

_CALLER = "add_weighted_adapter"


def checked_weights(
    tuner: "LowRankTuner", adapters: Sequence[str], weights: Sequence[float], name: str
) -> dict[str, float]:
    """The weight of each adapter by name; raises where the sum cannot be an adapter."""
    method, configs = tuner.method, tuner.peft_config
    if method.module_class.unmergeable_because or method.file_format.needs_other_modules:
        why = method.module_class.unmergeable_because or "its branches see other modules"
        raise ValueError(f"{_CALLER}: adapters of {method.peft_type} have no sum: {why}")
    for adapter in adapters:
        if adapter not in configs:
            raise ValueError(
                f"{_CALLER}: adapters must be some of {list(configs)}, got {adapter!r}"
                f"{did_you_mean(adapter, configs)}"
            )
        if configs[adapter].modules_to_save:
            raise ValueError(f"{_CALLER}: {adapter!r} has modules_to_save, which have no sum")
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(
            f"{_CALLER}: adapters must be different names with a weight each, got "
            f"{list(adapters)} and {list(weights)}"
        )
    if name in configs:
        raise ValueError(f"{_CALLER}: adapter_name must be new, got {name!r}")
    inits = {configs[adapter].adapter_config(()).init for adapter in adapters}
    if len(inits) > 1 and method.module_class.residual_inits:
        raise ValueError(f"{_CALLER}: adapters must have one init, got {sorted(inits)}")
    for weight in weights:
        check_finite(weight, _CALLER, "weights")
    return dict(zip(adapters, map(float, weights), strict=True))


def summed_config(
    config: LowRankPeftConfig, layers: Mapping[str, LowRankTunerLayer], weights: Mapping[str, float]
) -> LowRankPeftConfig:
    """The config of the sum over ``layers``: ranks add up, unless they share a residual base."""
    ranks, alphas = {}, {}
    for path, layer in layers.items():
        summands = _summands(layer, weights)
        shares = _shares_residual(layer, weights)
        ranks[path] = summands[0].r if shares else sum(each.r for each in summands)
        alphas[path] = ranks[path] * (summands[0].start_scaling if shares else 1.0)
    first = next(iter(layers))
    summed = copy.deepcopy(config)
    summed.awaits_values = True
    summed.r, summed.lora_alpha, summed.use_rslora = ranks[first], whole(alphas[first]), False
    summed.rank_pattern = pattern_of({}, ranks[first], ranks)
    summed.alpha_pattern = pattern_of({}, alphas[first], alphas)
    summed.target_modules = list(layers)
    if "residuals" in vars(summed):
        summed.residuals = []
    return summed


def _summands(layer: LowRankTunerLayer, weights: Mapping[str, float]) -> list[LowRankLinear]:
    return [adapter for name, adapter in layer.named_adapters().items() if name in weights]


def _shares_residual(layer: LowRankTunerLayer, weights: Mapping[str, float]) -> bool:
    return any(adapter.residual_taken for adapter in _summands(layer, weights))


@torch.no_grad()
def fill_with_sum(
    layer: LowRankTunerLayer, name: str, weights: Mapping[str, float], file_format: AdapterFormat
) -> None:
    """Make the adapter ``name`` of the layer Σ weight · scaling · lora_b lora_a of the others."""
    summands = {key: layer.adapter(key) for key in weights if key in layer.adapters}
    adapter = layer.adapter(name)
    adapter.to(next(iter(summands.values())).lora_a.dtype)
    lora_a, lora_b = [], []
    for key, other in summands.items():
        a, b = file_format.lora_factors(other)
        lora_a.append(a)
        lora_b.append(b.double() * (weights[key] * other.scaling / adapter.scaling))
    if not _shares_residual(layer, weights):
        _become(adapter, torch.cat(lora_a), torch.cat(lora_b, dim=1))
    else:
        # All start from the same lora_a, which never trains; the weight lacks the start once.
        share_start(adapter, next(iter(summands.values())))
        start = adapter.with_scales(adapter.lora_b)
        _become(adapter, lora_a[0], start + torch.stack(lora_b).sum(dim=0))
    layer.has_values(name)


def _become(adapter: LowRankLinear, lora_a: Tensor, lora_b: Tensor) -> None:
    """The branch lora_b lora_a: what the method has beside it does nothing."""
    adapter.lora_a.copy_(lora_a)
    adapter.lora_b.copy_(lora_b)
    if adapter.core is not None:
        adapter.core.copy_(torch.eye(adapter.r))
    for scale in (adapter.rank_scale, adapter.out_scale):
        if scale is not None:
            scale.fill_(1.0)
