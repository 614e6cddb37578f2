"""Which stacked weights of experts a config selects (``target_parameters``), by PEFT's rules."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from lowrank_ext.checks import did_you_mean, matches_names
from lowrank_ext.nn.adapted_experts import AdaptedExperts
from lowrank_ext.nn.experts import StackedLinear, no_branches_because
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.wrappers import named_modules


def find_parameters(
    model: nn.Module, names: Sequence[str], caller: str
) -> dict[str, StackedLinear]:
    """Path and weight of every parameter that one of ``names`` is, or is the end of after a dot; in
    the order of the model. In an adapted model paths are as before.

    Raises:
        ValueError: a name matches nothing (near matches are named), or a parameter is no stacked
            weight of an experts module with transformers' interface.
    """
    found = {}
    seen = set()
    for path, owner, name in _parameters(model):
        seen.add(path)
        if matches_names(path, names):
            if because := no_branches_because(owner, name):
                raise ValueError(
                    f"{caller}: target_parameters must name stacked weights of experts, got "
                    f"{path}, {because}"
                )
            found[path] = StackedLinear(owner, name)
    for name in names:
        if not any(matches_names(path, [name]) for path in found):
            ends = [".".join(path.split(".")[-2:]) for path in seen]
            raise ValueError(
                f"{caller}: target_parameters must match a parameter of the model, got {name!r}, "
                f"which matches none{did_you_mean(name, ends)}"
            )
    return found


def stacked_weights(model: nn.Module) -> dict[str, StackedLinear]:
    """Path and weight of every stacked weight of the model that has an adapter."""
    return {
        path: module.base_layer
        for path, module in named_modules(model)
        if isinstance(module, LowRankLinear) and isinstance(module.base_layer, StackedLinear)
    }


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, owner and name of each parameter; of adapted experts those of the experts module."""
    inside = {m.base_layer for m in model.modules() if isinstance(m, AdaptedExperts)}
    for path, module in named_modules(model):
        if module not in inside:
            owner = module.base_layer if isinstance(module, AdaptedExperts) else module
            for name in owner._parameters:
                yield f"{path}.{name}".lstrip("."), owner, name


def parameter_names(
    model: nn.Module, chosen: Collection[str], preferred: Sequence[str] = ()
) -> list[str]:
    """target_parameters that select the stacked weights at the paths ``chosen`` alone, here and in
    PEFT: ``preferred`` if they do, else names as short as possible."""
    every = {path for path, _, _ in _parameters(model)}
    short = sorted({".".join(path.split(".")[-2:]) for path in chosen})
    for names in (list(preferred), short):
        if {path for path in every if matches_names(path, names)} == set(chosen):
            return names
    return sorted(chosen)


def adaptable_names(model: nn.Module, weights: Sequence[Tensor]) -> list[str]:
    """Names, as short as possible, of those of the stacked ``weights`` that can be adapted."""
    left = {id(weight) for weight in weights}
    names = {
        ".".join(path.split(".")[-2:])
        for path, owner, name in _parameters(model)
        if id(owner._parameters[name]) in left and not no_branches_because(owner, name)
    }
    return sorted(names)
