"""Writes the adapter of a model as an ordinary LoRA, which other libraries read."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_ext import registry
from lowrank_ext.adapt import lowrank_modules
from lowrank_ext.adapter_files import check_can_hold_adapter, write_tensor_file
from lowrank_ext.adapter_format import rounded
from lowrank_ext.checkpoint.lora_files import LoRATensors
from lowrank_ext.checkpoint.peft_config import ModuleNumbers
from lowrank_ext.checkpoint.save import check_valued, config_of, write_adapter
from lowrank_ext.checkpoint.save_warnings import NOT_FINITE, lost_parameters, some
from lowrank_ext.checks import check_choice, check_rank, check_scaling
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.sharding import is_sharded
from lowrank_ext.targets import outermost_modules
from lowrank_ext.wrappers import whole_parameters

# The name that diffusers looks for in a directory.
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "peft",
    component: str = "transformer",
    rank: int | None = None,
) -> None:
    """Write the adapter of ``model`` into ``path`` as an ordinary LoRA over the original base.

    Exactly what the model computes in evaluation mode, up to rounding, for LoRA and PiSSA, LaMDA,
    AFLoRA, Set-and-Sequence (at the present scales) and ResLoRA with shortcut="block"; for its
    other shortcuts, with a warning, the estimate that ``merge`` makes. A residual start (PiSSA,
    LaMDA) is part of the LoRA, so that it fits the base that was adapted. A scaling that was set
    after ``adapt`` counts. The model is not changed, and may be merged. Warns as ``save_adapter``
    of parameters that train and that the files do not hold.

    The rank is the adapter's; twice that for PiSSA, and the sum over the chain for ResLoRA's block.
    Factors keep their dtype where no product is taken, else they are float32.

    Args:
        path: a directory, created if missing.
        format: ``"peft"``: adapter_config.json and adapter_model.safetensors, for
            ``PeftModel.from_pretrained``, ``lr.load_adapter``, AdapterBank and servers that read
            PEFT's files. ``"diffusers"``: pytorch_lora_weights.safetensors, for
            ``load_lora_weights`` of a pipeline and ``load_lora_adapter`` of a model; the scaling is
            multiplied into lora_B, because not every version of diffusers reads it from that file.
        component: name of the model in its pipeline, the prefix of the keys for diffusers.
        rank: the largest rank, as servers have one: a branch of a higher rank is replaced by its
            best approximation of this rank (singular value decomposition), with a warning that says
            how much of it is lost.

    Raises:
        ValueError: rank is below 1, the model carries no adapter of ``adapt`` or ``load_adapter``,
            the adapter is more than a product of two factors (lora_bias, trained biases), format is
            neither of the two, a parameter is sharded, or the file cannot hold the adapter
            (modules_to_save and target_parameters in diffusers' format); or as ``merge`` for an
            estimate of ResLoRA.
        TypeError: an adapter is no single matrix (GOAT: its experts depend on the input).
        OSError: the files cannot be written. The directory holds what it held before.

    Examples:
        >>> lr.export_lora(model, "out/lora")
        >>> peft.PeftModel.from_pretrained(base, "out/lora")
    """
    caller = "export_lora"
    check_choice(format, ("peft", "diffusers"), caller, "format")
    if rank is not None:
        check_rank(rank, caller, "rank")
    check_can_hold_adapter(Path(path), caller)
    with whole_parameters(model):
        modules = lowrank_modules(model, caller)
        config = config_of(model, caller)
        if format == "diffusers" and config.modules_to_save:
            raise ValueError(
                f"{caller}: modules_to_save must be empty for format='diffusers', got "
                f"{list(config.modules_to_save)}"
            )
        if config.beyond_lora:
            raise ValueError(
                f"{caller}: the adapter must be an ordinary LoRA at inference, got one with "
                f"{config.beyond_lora}; use save_adapter"
            )
        if format == "diffusers" and config.target_parameters:
            raise ValueError(
                f"{caller}: target_parameters must be empty for format='diffusers', got "
                f"{list(config.target_parameters)}"
            )
        _check_exportable(modules, caller)
        for text in _estimates(modules):
            warnings.warn(f"{caller}: {text}", stacklevel=2)
        check_valued(model, modules, config, caller)
        saved = outermost_modules(model, config.modules_to_save).values()
        for text in lost_parameters(model, modules, config, saved):
            warnings.warn(f"{caller}: {text}", stacklevel=2)
        loras = _loras(modules, config, caller)
        if rank is not None:
            loras, lost = truncated(loras, rank)
            if lost:
                most = max(lost, key=lost.__getitem__)
                text = (
                    f"{len(lost)} of {len(loras)} branches lose by rank={rank}, most of all {most}"
                )
                warnings.warn(f"{caller}: {text}: {lost[most]:.2g} of its norm", stacklevel=2)
        if format == "peft":
            _write_for_peft(model, path, config, modules, loras)
        else:
            tensors = _for_diffusers(modules, loras, component)
            if bad := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
                warnings.warn(f"{caller}: {some(bad)} {NOT_FINITE}", stacklevel=2)
            write_tensor_file(Path(path) / DIFFUSERS_NAME, tensors)


def _check_exportable(modules: Mapping[str, LowRankLinear], caller: str) -> None:
    for path, module in modules.items():
        if module.unmergeable_because:
            raise TypeError(
                f"{caller}: {path or 'the model'} must have a branch that is one matrix, got a "
                f"{type(module).__name__}: {module.unmergeable_because}"
            )
        if any(is_sharded(tensor) for tensor in module.adapter_tensors().values()):
            raise ValueError(f"{caller}: {path or 'the model'} must not be sharded")
        check_scaling(module.scaling, f"{caller}: {path or 'the model'}")


def _estimates(modules: Mapping[str, LowRankLinear]) -> list[str]:
    """That the LoRA is not what the model computes, where it is not."""
    found = [(path, why) for path, m in modules.items() if (why := m.merge_is_estimate)]
    return [f"{some([p for p, _ in found])} can only be estimated: {found[0][1]}"] if found else []


@torch.no_grad()
def _loras(
    modules: Mapping[str, LowRankLinear], config: AdapterConfig, caller: str
) -> dict[str, LoRATensors]:
    file_format = registry.method_for(config, caller).file_format
    found = {}
    for path, module in modules.items():
        try:
            found[path] = LoRATensors(*file_format.lora_factors(module), module.scaling)
        except ValueError as error:
            raise ValueError(f"{caller}: {path or 'the model'}: {error}") from None
    return found


@torch.no_grad()
def truncated(
    loras: Mapping[str, LoRATensors], rank: int
) -> tuple[dict[str, LoRATensors], dict[str, float]]:
    """The branches with at most this rank, in float32 where they are cut; and of those that lose
    more than rounding the part of their norm that is lost, ‖W - W_rank‖ / ‖W‖."""
    found, lost = dict(loras), {}
    for path, (lora_a, lora_b, scaling) in loras.items():
        if lora_a.shape[-2] <= rank:
            continue
        # lora_b lora_a = q_b (r_b r_aᵀ) q_aᵀ: the singular values are those of the small matrix.
        q_b, r_b = torch.linalg.qr(lora_b.double())
        q_a, r_a = torch.linalg.qr(lora_a.double().mT)
        u, values, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        root = values[..., :rank].sqrt()
        cut_b = q_b @ u[..., :rank] * root[..., None, :]
        cut_a = (q_a @ v[..., :rank, :].mT * root[..., None, :]).mT
        found[path] = LoRATensors(cut_a.float().contiguous(), cut_b.float().contiguous(), scaling)
        norm = float(values.norm())
        share = float(values[..., rank:].norm()) / norm if norm else 0.0
        if share > torch.finfo(torch.float32).eps:
            lost[path] = share
    return found, lost


def _write_for_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    config: AdapterConfig,
    modules: Mapping[str, LowRankLinear],
    loras: Mapping[str, LoRATensors],
) -> None:
    numbers = {
        name: ModuleNumbers(
            lora.lora_a.shape[-2],
            _alpha(module, lora, config.rslora),
            module.fan_in_fan_out,
            module.stack,
        )
        for (name, module), lora in zip(modules.items(), loras.values(), strict=True)
    }
    # The commonest rank and alpha are those of the file; patterns name the other modules.
    (r, alpha), _ = Counter((each.r, each.alpha) for each in numbers.values()).most_common(1)[0]
    lora_config = registry.METHODS["LORA"].config_class(
        r=r,
        alpha=alpha,
        rslora=config.rslora,
        dropout=config.dropout,
        modules_to_save=config.modules_to_save,
        init="kaiming",
    )
    file_format = registry.METHODS["LORA"].file_format
    stored = {
        name: file_format.stored(module, {"lora_a": lora.lora_a, "lora_b": lora.lora_b})
        for (name, module), lora in zip(modules.items(), loras.values(), strict=True)
    }
    write_adapter(model, path, lora_config, numbers, stored, "export_lora")


def _alpha(module: LowRankLinear, lora: LoRATensors, rslora: bool) -> float:
    """lora_alpha with which a LoRA of these factors has the module's scaling."""
    r = lora.lora_a.shape[-2]
    divisor = math.sqrt(r) if rslora else r
    return module.alpha if module.alpha / divisor == lora.scaling else lora.scaling * divisor


def _for_diffusers(
    modules: Mapping[str, LowRankLinear], loras: Mapping[str, LoRATensors], component: str
) -> dict[str, Tensor]:
    file_format = registry.METHODS["LORA"].file_format
    tensors = {}
    for path, (lora_a, lora_b, scaling) in loras.items():
        scaled = lora_b if scaling == 1 else rounded(scaling * lora_b.double(), lora_b)
        factors = {"lora_a": lora_a, "lora_b": scaled}
        for kind, tensor in file_format.stored(modules[path], factors).items():
            tensors[f"{component}.{path}.{kind}"] = tensor.detach().cpu().clone().contiguous()
    return tensors
