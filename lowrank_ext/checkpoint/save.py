"""Writes the adapter of a model."""

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_ext import registry
from lowrank_ext.adapt import lowrank_modules
from lowrank_ext.adapter_files import check_can_hold_adapter, write_adapter_files
from lowrank_ext.adapter_format import Adapters
from lowrank_ext.base_biases import base_biases
from lowrank_ext.checkpoint.embeddings import embeddings_to_save
from lowrank_ext.checkpoint.layout import PREFIX, path_in_file
from lowrank_ext.checkpoint.peft_config import ModuleNumbers, config_fields
from lowrank_ext.checkpoint.save_warnings import NOT_FINITE, save_warnings, some
from lowrank_ext.checkpoint.token_rows import rows_to_save
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.sharding import gathered, is_sharded
from lowrank_ext.target_parameters import stacked_weights
from lowrank_ext.targets import outermost_modules
from lowrank_ext.ties import check_ties
from lowrank_ext.wrappers import is_whole, state_of, unwrapped, whole_parameters


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of ``model`` into the directory ``path``, see ``lowrank_ext.checkpoint``.

    Tensors keep the dtype of their parameters. An earlier adapter in the directory is replaced as a
    pair; other files there stay. Merged adapters are saved like others. A wrapped model
    (``torch.compile``, DDP, activation checkpointing, …) gives the files of the plain one.
    Parameters sharded by FSDP are gathered, so every rank must call this, and rank 0 writes.

    Warns of what the files do not hold: parameters that train beside the adapters and are not in
    modules_to_save, rows that resizing the vocabulary has added, and a ``scaling`` that was set
    after ``adapt``; and of inf and nan, which the files hold and ``load_adapter`` refuses.

    Raises:
        ValueError: the model carries no adapter that ``adapt`` or ``load_adapter`` made, or a
            parameter of modules_to_save is tied to one that would not be saved. Nothing is written.
        OSError: the files cannot be written. The directory holds what it held before.

    Examples:
        >>> lr.save_adapter(model, "out/adapter")
    """
    check_can_hold_adapter(Path(path), "save_adapter")
    with whole_parameters(model):
        _save(model, path)


def _save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    modules = lowrank_modules(model, "save_adapter")
    config = config_of(model, "save_adapter")
    for name, module in modules.items():
        try:
            module.check_saveable(config, list(modules.values()))
        except ValueError as error:
            raise ValueError(f"save_adapter: {name} {error}") from None
    check_valued(model, modules, config, "save_adapter")
    saved = outermost_modules(model, config.modules_to_save).values()
    for text in save_warnings(model, modules, config, saved):
        warnings.warn(f"save_adapter: {text}", stacklevel=3)
    file_format = registry.method_for(config, "save_adapter").file_format
    stored = {name: file_format.tensors(module, config) for name, module in modules.items()}
    write_adapter(model, path, config, modules, stored | rows_to_save(model), "save_adapter")


def config_of(model: nn.Module, caller: str) -> AdapterConfig:
    config = getattr(unwrapped(model), "lowrank_config", None)
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"{caller}: model must have been adapted with adapt or load_adapter")
    return config


def check_valued(
    model: nn.Module, modules: Mapping[str, LowRankLinear], config: AdapterConfig, caller: str
) -> None:
    """Raise ValueError where a tensor to be saved is on the meta device or tied to an unsaved one,
    or where a base weight no longer has the shape that its adapter was made for."""
    for name, module in modules.items():
        weight = module.weight
        shape = [module.out_features, module.in_features]
        if weight is not None and list(module.as_matrix(weight).shape) != shape:
            raise ValueError(
                f"{caller}: the weight of {name} must be {shape}, for which its adapter was made, "
                f"got {list(weight.shape)}; call resize_token_embeddings before adapt"
            )
    saved = outermost_modules(model, config.modules_to_save)
    written: dict[str, Collection[Tensor]] = {
        name: module.adapter_tensors().values() for name, module in modules.items()
    }
    written |= {name: whole.state_dict().values() for name, whole in saved.items()}
    written |= {name: rows.values() for name, rows in rows_to_save(model).items()}
    for name, tensors in written.items():
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"{caller}: {name} must hold values, got a meta tensor")
    check_ties(model, saved, caller)


def write_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    config: AdapterConfig,
    modules: Mapping[str, LowRankLinear | ModuleNumbers],
    stored: Adapters,
    caller: str,
) -> None:
    """Write both files, from the adapters' ``stored`` tensors and the modules of
    modules_to_save."""
    saved = outermost_modules(model, config.modules_to_save)
    sharded = not is_whole(model) or any(is_sharded(p) for p in model.parameters())
    stacked = stacked_weights(model)
    tensors = {
        f"{PREFIX}{path_in_file(name, stacked)}.{kind}": tensor
        for name, kinds in stored.items()
        for kind, tensor in kinds.items()
    }
    for name, whole in saved.items():
        for key, tensor in state_of(whole).items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    beside = {**base_biases(model, config, modules), **embeddings_to_save(model)}
    unmerged = _before_merging(modules)
    for key, tensor in beside.items():
        tensors[PREFIX + key] = unmerged.get(id(tensor), tensor)
    # Copies: two keys may name one tensor (tied modules), which the format does not allow.
    tensors = {key: gathered(tensor).clone() for key, tensor in tensors.items()}
    if sharded and torch.distributed.get_rank() != 0:
        return
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        warnings.warn(f"{caller}: {some(bad)} {NOT_FINITE}", stacklevel=4)
    fields, metadata = config_fields(model, config, modules, saved)
    write_adapter_files(Path(path), fields, tensors, metadata)


def _before_merging(modules: Mapping[str, LowRankLinear | ModuleNumbers]) -> dict[int, Tensor]:
    """Of merged modules the base's weight and bias without the branch, by the parameter's id."""
    found: dict[int, Tensor] = {}
    for module in modules.values():
        if isinstance(module, LowRankLinear) and module.merged:
            kept = {module.base_parameter: module.unmerged_weight}
            kept[module.base_bias] = module.unmerged_bias
            found |= {id(p): tensor for p, tensor in kept.items() if tensor is not None}
    return found
