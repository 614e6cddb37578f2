"""Parameters of modules_to_save that are tied to others of the model."""

from collections.abc import Mapping

from torch import nn

from lowrank_ext.targets import shared_tensors
from lowrank_ext.wrappers import named_modules, submodule


def ties(model: nn.Module, saved: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each parameter of the saved modules that is tied: names of the tensors it is tied to."""
    ties: dict[str, list[str]] = {}
    for name, whole in saved.items():
        for inner, module in named_modules(whole, prefix=name):
            for key, parameter in module.named_parameters(recurse=False):
                if shared := shared_tensors(model, {module: parameter})[module]:
                    ties[f"{inner}.{key}"] = shared
    return ties


def check_ties(model: nn.Module, saved: Mapping[str, nn.Module], caller: str) -> None:
    """Raise ValueError where a parameter of the saved modules is tied to one that is not saved."""
    prefixes = tuple(f"{name}." for name in saved)
    for key, others in ties(model, saved).items():
        outside = [other for other in others if not other.startswith(prefixes)]
        if outside:
            raise ValueError(
                f"{caller}: modules_to_save must name all owners of a tied weight, "
                f"got {key} without {outside[0]}, which trains with it"
            )


def untie(model: nn.Module, key: str, keeps_training: bool) -> None:
    """Replace the parameter named ``key`` by a copy that is tied to no other."""
    path, _, name = key.rpartition(".")
    module = submodule(model, path)
    tied = module.get_parameter(name)
    module.register_parameter(name, nn.Parameter(tied.detach().clone(), tied.requires_grad))
    tied.requires_grad_(tied.requires_grad and keeps_training)
