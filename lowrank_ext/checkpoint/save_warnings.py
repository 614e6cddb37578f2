"""Warnings of ``save_adapter``: what a model loaded from its files would lack, or refuse."""

import math
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lowrank_ext.checkpoint.embeddings import embeddings_to_save
from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.wrappers import named_modules

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
    if lost := _trained_without_a_place(model, modules, saved):
        yield (
            f"{some(lost)} require a gradient and belong to no adapter and no module of "
            "modules_to_save: the files do not hold them; name their modules in modules_to_save "
            "of adapt, or freeze them"
        )
    own = {path: config.scaling_for(path, m.in_features) for path, m in modules.items()}
    changed = [p for p, m in modules.items() if not math.isclose(m.scaling, own[p], rel_tol=1e-9)]
    if changed:
        path = changed[0]
        yield (
            f"the scaling of {some(changed)} was changed, from {own[path]:g} to "
            f"{modules[path].scaling:g}: the files hold the former, that of the config"
        )


def _trained_without_a_place(
    model: nn.Module, modules: Mapping[str, LowRankLinear], saved: Collection[nn.Module]
) -> list[str]:
    """Names of the parameters that train and are not saved."""
    held = {id(t) for module in modules.values() for t in module.adapter_tensors().values()}
    held |= {id(parameter) for module in saved for parameter in module.parameters()}
    held |= {id(tensor) for tensor in embeddings_to_save(model).values()}
    return [
        f"{path}.{name}" if path else name
        for path, module in named_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in held
    ]


def some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
