"""Merge the adapters of a model into its weights, take them out again, or remove them."""

from typing import TypeVar

from torch import nn

from lowrank_ext.adapt import lowrank_modules, replace_modules, set_fused_encoders
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.targets import shared_tensors

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """W ← round(fp32(W) + scaling · lora_b core lora_a) in every adapted module; returns the model.

    Modules that are merged already stay as they are.

    Raises:
        ValueError: the model carries no adapters, or a weight shares memory with a tensor of
            another module, which would change with it.
        TypeError: a base does not compute x weightᵀ + bias with a floating-point weight, or a
            module's branch is no single matrix (GOAT: its experts are chosen by the input). In
            both cases no weight has been touched.
    """
    modules = lowrank_modules(model, "merge")
    _check_mergeable(model, modules)
    for module in modules.values():
        module.merge()
    return model


def unmerge(model: Model) -> Model:
    """Give every merged module its weight back, bit for bit; returns the model.

    Raises:
        ValueError: the model carries no adapters.
    """
    for module in lowrank_modules(model, "unmerge").values():
        module.unmerge()
    return model


def unload(model: Model, merge: bool = False) -> Model:
    """Put plain modules back in place of the adapted ones; returns the model.

    ``merge=True`` keeps the adapters' effect (merging what is not merged yet), ``merge=False``
    drops it: ties and weights are as before ``adapt``, with a residual init to one rounding of
    their dtype.
    Parameters stay frozen as ``adapt`` left them. A single adapted module yields its plain module.

    Raises:
        ValueError, TypeError: as ``merge``.
    """
    modules = lowrank_modules(model, "unload")
    if merge:
        _check_mergeable(model, modules)
    plain: dict[nn.Module, nn.Module] = {
        module: module.to_linear(merge) for module in modules.values()
    }
    if model in plain:
        return plain[model]  # type: ignore[return-value]  # the caller passed a LowRankLinear
    for module_class in {type(module) for module in modules.values()}:
        module_class.disconnect(model)
    replace_modules(model, plain)
    set_fused_encoders(model, on=True)
    vars(model).pop("lowrank_config", None)
    return model


def _check_mergeable(model: nn.Module, modules: dict[str, LowRankLinear]) -> None:
    for path, module in modules.items():
        if module.unmergeable_because:
            raise TypeError(
                f"merge: {path or 'the model'} must have a branch that is one matrix, got a "
                f"{type(module).__name__}: {module.unmergeable_because}"
            )
        try:
            module.check_mergeable()
        except ValueError as error:
            raise ValueError(f"merge: {path or 'the model'}: {error}") from None
    owners = {
        m if m.base_layer is None else m.base_layer: p for p, m in modules.items() if not m.merged
    }
    weights = {}
    for owner, path in owners.items():
        weight = modules[path].mergeable_parameter
        if weight is None:
            raise TypeError(
                f"merge: the base of {path} must compute x weightᵀ + bias with a floating-point "
                f"weight, got {type(owner).__name__}"
            )
        weights[owner] = weight
    for owner, names in shared_tensors(model, weights).items():
        if names:
            raise ValueError(
                f"merge: the weight of {owners[owner] or 'the model'} must be its own, got one "
                f"tied to {', '.join(names)}, which would change with it; clone one of them"
            )
