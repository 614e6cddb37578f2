"""What convert asks of a model before it touches it: tensors that can be averaged and tied, and
linears that lose nothing when they are replaced."""

from typing import Any

from torch import nn

from lowrank_ext.left_out import readers
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.structure import Decoder
from lowrank_ext.nn.base_layer import Adapter, dense_weight, is_hooked, linear_features
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.targets import is_from_peft
from lowrank_ext.wrappers import unwrapped

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def check_bare(model: nn.Module, caller: str) -> None:
    """Raise ValueError where ``model`` is wrapped or adapted, or a module in it is."""
    for path, module in model.named_modules():
        if unwrapped(module) is not module:
            raise ValueError(
                f"{caller}: model must not be wrapped, got a {type(module).__name__} at "
                f"{path or 'the model itself'}; call {caller} before torch.compile, DDP or any "
                "other wrapper"
            )
    check_no_adapters(model, caller)


def check_no_adapters(model: nn.Module, caller: str) -> None:
    """Raise ValueError where a module of ``model`` is adapted by ``lowrank_ext.adapt``, an
    AdapterBank or PEFT."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter | MultiLoRALinear) or is_from_peft(module):
            raise ValueError(
                f"{caller}: model must carry no adapters, got a {type(module).__name__} at "
                f"{path or 'the model itself'}; merge or unload them first"
            )


def check_tensors(decoder: Decoder, caller: str) -> None:
    """Raise ValueError unless each parameter of the layers is a dense floating-point one with
    values, and belongs to one module, and all parameters of the model are finite."""
    names: dict[int, list[str]] = {}
    for name, parameter in decoder.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in decoder.model.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ValueError(f"{caller}: {name} must be finite, got inf or nan")
    for path, module in decoder.layers.named_modules(prefix=decoder.path):
        if linear_features(module) is not None and dense_weight(module) is None:
            raise ValueError(
                f"{caller}: {path} must have a dense floating-point weight, got a "
                f"{type(module).__name__}; convert the model before it is quantized or sharded"
            )
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                kind = str(parameter.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{caller}: {name} must be an ordinary floating-point parameter, got a "
                    f"{type(parameter).__name__} of {kind}"
                )
            if parameter.is_meta:
                raise ValueError(
                    f"{caller}: {name} must hold values, got a meta tensor; load the whole model"
                )
            if len(names[id(parameter)]) > 1:
                shared = ", ".join(names[id(parameter)][:2])
                raise ValueError(
                    f"{caller}: layers must share no parameters before they are converted, got one "
                    f"that is {shared}"
                )
        if hasattr(module, "parametrizations"):
            raise ValueError(
                f"{caller}: {path} must not be parametrized, got "
                f"{', '.join(module.parametrizations)}; remove the parametrizations first"
            )


def check_linears(decoder: Decoder, config: RecursiveConfig, caller: str) -> dict[str, nn.Module]:
    """The linears that get adapters, by path in the model.

    Raises:
        ValueError: one is more than its class says, or is never called.
    """
    read = readers(decoder.layers) if config.is_relaxed else {}
    found: dict[str, nn.Module] = {}
    for path, module in decoder.layers.named_modules():
        inner = path.partition(".")[2]
        if not isinstance(module, nn.Linear):
            continue
        if not config.rank_for(inner, module.in_features, module.out_features):
            continue
        full = f"{decoder.path}.{path}"
        if type(module) is not nn.Linear:
            raise ValueError(
                f"{caller}: {full} must be an nn.Linear to get adapters, got its subclass "
                f"{type(module).__name__}; leave it out of targets"
            )
        if _has_hooks(module):
            raise ValueError(
                f"{caller}: {full} must have no hooks, which its replacement would lose; remove "
                "them first"
            )
        if module in read and not read[module].calls_too:
            raise ValueError(
                f"{caller}: targets must leave out {inner}, whose weight {read[module].function} "
                "reads without a call, so that adapters would not act"
            )
        found[full] = module
    return found


def _has_hooks(module: nn.Module) -> bool:
    own: dict[str, Any] = vars(module)
    return is_hooked(module) or any(own.get(name) for name in _STATE_HOOKS)
