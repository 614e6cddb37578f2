"""Warnings of ``save_adapter``: what a model loaded from its files would lack, or refuse."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_ext.base_biases import base_biases
from lowrank_ext.checkpoint.embeddings import embeddings_to_save
from lowrank_ext.config import AdapterConfig
from lowrank_ext.files.json_object import read_json_object
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.token_rows import TokenRows
from lowrank_ext.wrappers import named_modules, unwrapped

NOT_FINITE = "hold inf or nan, which load_adapter refuses: the training has diverged"


def save_warnings(
    model: nn.Module,
    modules: Mapping[str, LowRankLinear],
    config: AdapterConfig,
    saved: Collection[nn.Module],
) -> Iterator[str]:
    """What a model loaded from the files of ``model`` would lack.

    Args:
        saved: the modules of modules_to_save.
    """
    yield from lost_parameters(model, modules, config, saved)
    own = {path: config.scaling_for(path, m.in_features) for path, m in modules.items()}
    changed = [p for p, m in modules.items() if not math.isclose(m.scaling, own[p], rel_tol=1e-9)]
    if changed:
        path = changed[0]
        yield (
            f"the scaling of {some(changed)} was changed, from {own[path]:g} to "
            f"{modules[path].scaling:g}: the files hold the former, that of the config"
        )
    if differing := differing_in_peft(model):
        what = next(iter(differing.values()))
        yield (
            f"PEFT {what}, here {some(list(differing))}: it computes something else from the files "
            "than this library"
        )


def differing_in_peft(model: nn.Module) -> dict[str, str]:
    """By path of a module that PEFT computes otherwise from the same tensors: what it does."""
    every = named_modules(model)
    return {path: what for path, m in every if (what := getattr(m, "differs_in_peft", ""))}


def lost_parameters(
    model: nn.Module,
    modules: Mapping[str, LowRankLinear],
    config: AdapterConfig,
    saved: Collection[nn.Module],
) -> Iterator[str]:
    """Of these, what concerns parameters that are in no file."""
    biases = base_biases(model, config, modules).values()
    if lost := _trained_without_a_place(model, modules, saved, biases):
        yield (
            f"{some(lost)} require a gradient and belong to no adapter and no module of "
            "modules_to_save: the files do not hold them; name their modules in modules_to_save "
            "of adapt, or freeze them"
        )
    if new := _resized_vocabulary(model, saved):
        yield (
            f"the vocabulary has been resized, from {new[0]} to {new[1]}: the files do not hold "
            "the embeddings, whose new rows every resize draws anew; name them in modules_to_save "
            "of adapt, or save the resized base by save_pretrained before adapt and load that"
        )


def _trained_without_a_place(
    model: nn.Module,
    modules: Mapping[str, LowRankLinear],
    saved: Collection[nn.Module],
    biases: Collection[nn.Parameter],
) -> list[str]:
    """Names of the parameters that train and are not saved."""
    held = {id(t) for module in modules.values() for t in module.adapter_tensors().values()}
    held |= {id(parameter) for module in saved for parameter in module.parameters()}
    held |= {id(tensor) for tensor in embeddings_to_save(model).values()}
    held |= {id(bias) for bias in biases}
    held |= {id(module.rows) for module in model.modules() if isinstance(module, TokenRows)}
    return [
        f"{path}.{name}" if path else name
        for path, module in named_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in held
    ]


def _resized_vocabulary(model: nn.Module, saved: Collection[nn.Module]) -> tuple[int, int] | None:
    """The sizes in the directory that a transformers model came from, and now, if they differ and
    the input embedding is not saved."""
    inner: Any = unwrapped(model)
    size = getattr(getattr(inner, "config", None), "vocab_size", None)
    path = getattr(inner, "name_or_path", None)
    if not (isinstance(size, int) and isinstance(path, str) and path) or embeddings_to_save(model):
        return None
    try:
        old = read_json_object(Path(path) / "config.json", "save_adapter").get("vocab_size")
        embedding = inner.get_input_embeddings()
    except (OSError, ValueError, NotImplementedError):  # from a hub, or moved; it has none
        return None
    whole = {inside for module in saved for inside in module.modules()}
    if not isinstance(old, int) or old == size or embedding in whole:
        return None
    return old, size


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
