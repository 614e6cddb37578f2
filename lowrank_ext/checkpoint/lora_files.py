"""Plain LoRA files for AdapterBank and GuardModel, whose modules are no LowRankLinear."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext import registry
from lowrank_ext.adapter_files import (
    AdapterFiles,
    Companion,
    check_can_hold_adapter,
    write_adapter_files,
)
from lowrank_ext.checkpoint.embeddings import changed_embeddings, held_embeddings
from lowrank_ext.checkpoint.layout import (
    LORA_A,
    LORA_B,
    PREFIX,
    split_keys,
)
from lowrank_ext.checkpoint.load import (
    check_loadable,
    check_tensors,
    modules_for,
    saved_modules_for,
)
from lowrank_ext.checkpoint.peft_config import (
    ModuleNumbers,
    config_fields,
    method_in,
    parsed_config,
    pattern_of,
    target_names,
)
from lowrank_ext.checkpoint.selection import selected_adapters
from lowrank_ext.checks import check_scaling, did_you_mean
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import is_conv1d, linear_features
from lowrank_ext.registry import Method
from lowrank_ext.sharding import gathered, is_sharded
from lowrank_ext.targets import check_adaptable
from lowrank_ext.wrappers import named_modules, submodule


class LoRATensors(NamedTuple):
    """One module's adapter: lora_a [r, K], lora_b [N, r], or stacks of them."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class LoRAFile(NamedTuple):
    """Content of a LoRA's two files, by module path."""

    config: AdapterConfig
    adapters: dict[str, LoRATensors]


def read_lora(model: nn.Module, files: AdapterFiles) -> LoRAFile:
    """The LoRA in ``files`` by module path of ``model``, which is not changed.

    Adapters of other methods that are a LoRA at inference are read as that one. Refused, beside
    what ``load_adapter`` refuses: everything that is more than a branch on the output of linear
    modules. A pissa file that ``save_adapter`` wrote is read as the LoRA of rank 2r that it holds.

    Raises:
        ValueError: a file is damaged, does not fit the model or uses an unsupported option; the
            message names file and key.
    """
    caller = files.caller
    method = method_in(files)
    if files.config.get("target_parameters"):
        raise ValueError(
            f"{caller}: {files.config_path} must be a LoRA of linear modules, got target_parameters"
        )
    adapters, others = split_keys(files, model)
    modules_for(model, files, adapters)
    adapters = selected_adapters(model, files, adapters)
    modules = modules_for(model, files, adapters)
    config = parsed_config(files, method, adapters)
    _check_is_lora(method, config, f"{caller}: {files.config_path}")
    for name, module in modules.items():
        check_adaptable(name, module, caller)
    check_loadable(model, modules, caller)
    check_tensors(files, method, config, modules, adapters)
    if saved := saved_modules_for(model, files, others):
        raise ValueError(
            f"{caller}: {files.config_path}: modules_to_save must match no module, one of them "
            f"would change for all rows, got {', '.join(saved)}"
        )
    held = held_embeddings(model, files, others)
    values, others = split_keys(files.with_values(), model)
    adapters = {path: values[path] for path in adapters}
    if changed := changed_embeddings(files, held, others):
        raise ValueError(
            f"{caller}: {files.weights_path} must hold the model's own embeddings, which would "
            f"change for all rows, got others in {', '.join(changed)}"
        )
    return LoRAFile(
        dataclasses.replace(config, target_modules=target_names(model, adapters)),
        {
            name: _as_lora(method, config.for_module(name), modules[name], tensors)
            for name, tensors in adapters.items()
        },
    )


def _check_is_lora(method: Method, config: AdapterConfig, where: str) -> None:
    """Raise ValueError where the file alone does not tell a LoRA over the original base."""
    module_class, what = method.module_class, ""
    if method is registry.METHODS["LORA"] and config.init in module_class.residual_inits:
        what = "a residual base weight (PiSSA)"
    elif module_class.unmergeable_because:
        what = f"{config.peft_type}: {module_class.unmergeable_because}"
    elif method.file_format.needs_other_modules:
        what = f"{config.peft_type}, whose branches see other modules; write it by lr.export_lora"
    elif config.beyond_lora:
        what = f"one with {config.beyond_lora}"
    if what:
        raise ValueError(f"{where} must be a LoRA at inference, got {what}")


@torch.no_grad()
def _as_lora(
    method: Method, config: AdapterConfig, base: nn.Module, tensors: Mapping[str, Tensor]
) -> LoRATensors:
    """The LoRA that an adapter of ``method`` with the file's ``tensors`` is in evaluation mode."""
    if method is registry.METHODS["LORA"]:
        lora_a, lora_b = tensors[LORA_A], tensors[LORA_B]
        return LoRATensors(lora_a, lora_b, config.scaling_for("", lora_a.shape[1]))
    sizes: tuple[Any, Any] = linear_features(base) or (base.in_features, base.out_features)
    module = method.module_class(sizes[0], sizes[1], config, bias=False, device="meta").eval()
    for name in module.adapter_tensors():
        tensor = tensors[method.file_format.kind_of(name)]
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor
    module.residual_taken = config.init in module.residual_inits
    return LoRATensors(*method.file_format.lora_factors(module), module.scaling)


def as_lora_file(model: nn.Module, adapters: Mapping[str, LoRATensors]) -> LoRAFile:
    """``adapters`` with the config of a LoRA that has their ranks and scalings."""
    ranks = {path: len(each.lora_a) for path, each in adapters.items()}
    alphas = {path: each.scaling * ranks[path] for path, each in adapters.items()}
    first = next(iter(adapters))
    config = registry.METHODS["LORA"].config_class(
        r=ranks[first],
        alpha=alphas[first],
        rank_pattern={key: int(r) for key, r in pattern_of({}, ranks[first], ranks).items()},
        alpha_pattern=pattern_of({}, alphas[first], alphas),
        target_modules=target_names(model, adapters),
    )
    return LoRAFile(config, dict(adapters))


def write_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    file: LoRAFile,
    caller: str,
    companions: Mapping[str, Companion],
) -> None:
    """Write the LoRA ``file`` of ``model`` as ``save_adapter`` does, for adapters whose modules
    are no LowRankLinear.

    Args:
        companions: more files of the same save, see ``write_adapter_files``.

    Raises:
        ValueError: a tensor is on the meta device or sharded. Nothing is written.
        OSError: the files cannot be written. The directory holds what it held before.
    """
    check_can_hold_adapter(Path(path), caller)
    tensors = {}
    for name, (lora_a, lora_b, _) in file.adapters.items():
        for kind, tensor in ((LORA_A, lora_a), (LORA_B, lora_b)):
            if tensor.is_meta or is_sharded(tensor):
                raise ValueError(
                    f"{caller}: {name} must hold whole values, got a meta or sharded tensor"
                )
            tensors[f"{PREFIX}{name}.{kind}"] = gathered(tensor).clone()
    modules = {name: _numbers_of(model, name, file.config) for name in file.adapters}
    fields, metadata = config_fields(model, file.config, modules, saved={})
    write_adapter_files(Path(path), fields, tensors, metadata, companions)


def _numbers_of(model: nn.Module, path: str, config: AdapterConfig) -> ModuleNumbers:
    module = submodule(model, path)
    transposed = any(is_conv1d(part) for part in (module, *module.children()))
    return ModuleNumbers(config.rank_for(path), config.alpha_for(path), transposed)


def check_adapters(model: nn.Module, adapters: Mapping[str, LoRATensors], caller: str) -> None:
    """Raise ValueError where a path names no linear module of ``model``, or a shape does not
    fit."""
    present = dict(named_modules(model))
    if not adapters:
        raise ValueError(f"{caller}: adapters must hold at least one module, got none")
    for path, (lora_a, lora_b, scaling) in adapters.items():
        if path not in present:
            raise ValueError(
                f"{caller}: adapters must name modules of the model, got {path!r}"
                f"{did_you_mean(path, present)}"
            )
        check_adaptable(path, present[path], caller)
        features = linear_features(present[path])
        assert features is not None  # check_adaptable
        num_in, num_out = features
        r = lora_a.shape[0] if lora_a.dim() == 2 else 0
        expected = [max(r, 1), num_in], [num_out, max(r, 1)]
        if (list(lora_a.shape), list(lora_b.shape)) != expected:
            raise ValueError(
                f"{caller}: {path}: lora_a and lora_b must be [r, {num_in}] and [{num_out}, r], "
                f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
        check_scaling(scaling, f"{caller}: {path}")
