"""Which modules of a model a config selects, which heads train whole, and which tensors share
memory."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank_ext.checks import (
    did_you_mean,
    either,
    in_layers,
    layer_index,
    matches_names,
    matching_pattern,
    with_article,
)
from lowrank_ext.config import ALL_LINEAR, AdapterConfig
from lowrank_ext.nn.base_layer import LINEAR, STACKED, family_of, is_conv1d
from lowrank_ext.nn.experts import StackedLinear
from lowrank_ext.target_parameters import find_parameters
from lowrank_ext.wrappers import named_modules, unwrapped

Kind = TypeVar("Kind", bound=nn.Module)
_OUTPUT_HEADS = frozenset({"lm_head", "score", "classifier"})
# Models with a head that is new for each task, by the name of their class in transformers.
_TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")
_NEW_HEADS = ("classifier", "score", "qa_outputs")


def find_targets(
    model: nn.Module,
    config: AdapterConfig,
    caller: str = "adapt",
    families: Collection[str] = (LINEAR,),
) -> dict[str, nn.Module]:
    """Path and module of everything ``config`` selects, in the order of the model; then path and
    StackedLinear of its target_parameters.

    A module that is registered at several paths appears once, under its first path, and is selected
    when any of its paths matches. ``"all-linear"`` stands for every nn.Linear and Conv1D but the
    output head. A regular expression selects among the modules of ``families``; a name in a list
    must match such modules only. Excluding a module or naming it in modules_to_save covers all
    modules inside it.

    Raises:
        TypeError: the model itself is a module that adapters replace.
        ValueError: a name or pattern matches nothing (near matches are named), a named module
            cannot be adapted, or nothing is left to adapt. As ``find_parameters``.
    """
    if family_of(model) is not None:
        raise TypeError(
            f"{caller}: model must contain modules to replace, got a {type(model).__name__}; "
            "use from_linear of a module, such as lowrank_ext.nn.LoRALinear.from_linear"
        )
    families = [family for family in families if family != STACKED]  # of parameters
    paths = _module_paths(model)
    _check_names(paths, config, caller, families)
    left_alone = modules_named(model, config.modules_to_save)
    if config.exclude_modules is not None:
        left_alone |= modules_named(model, config.exclude_modules)
    if config.target_modules == ALL_LINEAR:
        left_alone |= _output_head(model, paths)
        wanted = {m for m in paths if _is_linear(m)}
    else:
        wanted = {m for m, own in paths.items() if any(_selects(config, path) for path in own)}
    targets = {own[0]: m for m, own in paths.items() if m in wanted and m not in left_alone}
    if isinstance(config.target_modules, str):
        targets = {path: m for path, m in targets.items() if family_of(m) in families}
    for path, module in targets.items():
        check_adaptable(path, module, caller, families)
    parameters = find_parameters(model, config.target_parameters, caller)
    _check_not_saved(model, parameters, config, caller)
    if not targets and not parameters:
        raise ValueError(
            f"{caller}: target_modules must leave a linear module of {type(model).__name__}, "
            f"got {config.target_modules!r} without exclude_modules={config.exclude_modules!r} and "
            f"modules_to_save={list(config.modules_to_save)!r}{_of_layers(config)}"
        )
    _check_layers([path for m in targets.values() for path in paths[m]], config, caller)
    targets |= parameters
    for argument in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, argument):
            if not any(matching_pattern([key], path) for path in targets):
                raise _no_match(caller, argument, key, "an adapted module", targets)
    for argument in config.selectors:
        names = getattr(config, argument) or ()
        for name in [names] if isinstance(names, str) else names:
            pattern = name if isinstance(names, str) else [name]
            if not any(matches_names(path, pattern) for path in targets):
                raise _no_match(caller, argument, name, "an adapted module", targets)
    return targets


def _check_not_saved(
    model: nn.Module, parameters: Mapping[str, StackedLinear], config: AdapterConfig, caller: str
) -> None:
    saved = modules_named(model, config.modules_to_save)
    for path, weight in parameters.items():
        if weight.experts in saved:
            raise ValueError(
                f"{caller}: modules_to_save must not hold target_parameters, got "
                f"{list(config.modules_to_save)}, inside of which {path} is"
            )


def new_heads(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Names of the heads that must train with the adapters, as they are new for the task.

    Of transformers' models for classification, question answering and multiple choice: all beside
    the backbone that has parameters, and that the config does not name.
    """
    model = unwrapped(model)
    if not any(_TASKS.search(cls.__name__) for cls in type(model).__mro__):
        return ()
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    named = config.target_modules
    mentioned = () if named == ALL_LINEAR else [named] if isinstance(named, str) else named

    def is_new(name: str, child: nn.Module) -> bool:
        beside = child is not backbone if isinstance(backbone, nn.Module) else name in _NEW_HEADS
        targeted = any(re.search(rf"\b{re.escape(name)}\b", target) for target in mentioned)
        excluded = config.exclude_modules is not None and matches_names(
            name, config.exclude_modules
        )
        saved = matches_names(name, config.modules_to_save)
        has_weights = next(child.parameters(), None) is not None
        return beside and has_weights and not (targeted or excluded or saved)

    return tuple(name for name, child in model.named_children() if is_new(name, child))


def modules_of_kind(model: nn.Module, kind: type[Kind], caller: str) -> dict[str, Kind]:
    """Path and module of every ``kind`` in the model.

    Raises:
        ValueError: the model has none.
    """
    modules = {path: m for path, m in named_modules(model) if isinstance(m, kind)}
    if not modules:
        raise ValueError(
            f"{caller}: model must contain {with_article(kind.__name__)}, "
            f"got a {type(model).__name__} with none"
        )
    return modules


def modules_named(model: nn.Module, names: str | Sequence[str]) -> set[nn.Module]:
    """The modules that ``names`` match, with all modules inside them."""
    every = named_modules(model, remove_duplicate=False)
    named = [module for path, module in every if path and matches_names(path, names)]
    return {inner for module in named for inner in module.modules()}


def outermost_modules(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The modules that ``names`` match and that are not inside another such module, by path."""
    inside = modules_named(model, tuple(names))
    outer: dict[str, nn.Module] = {}
    for path, module in named_modules(model):
        if module in inside and not any(path.startswith(f"{other}.") for other in outer):
            outer[path] = module
    return outer


def shared_tensors(
    model: nn.Module, weights: Mapping[nn.Module, Tensor]
) -> dict[nn.Module, list[str]]:
    """For each module's weight, the names of other modules' tensors that overlap it in memory."""
    by_storage: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for path, module in named_modules(model):
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                entry = (f"{path}.{name}".lstrip("."), module, tensor)
                by_storage.setdefault(_storage_key(tensor), []).append(entry)
    return {
        owner: [
            name
            for name, module, tensor in by_storage.get(_storage_key(weight), [])
            if module is not _registers(owner) and _overlap(tensor, weight)
        ]
        for owner, weight in weights.items()
    }


def _registers(owner: nn.Module) -> nn.Module:
    """The module that has the weight of ``owner`` among its parameters."""
    return owner.experts if isinstance(owner, StackedLinear) else owner


def _module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All paths of each module inside the model, in the order of named_modules."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in named_modules(model, remove_duplicate=False):
        if path:
            paths.setdefault(module, []).append(path)
    return paths


def _check_names(
    paths: Mapping[nn.Module, list[str]],
    config: AdapterConfig,
    caller: str,
    families: Collection[str],
) -> None:
    every = [path for own in paths.values() for path in own]
    possible = [own[0] for module, own in paths.items() if family_of(module) in families]
    for argument in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, argument)
        if names is None or (argument == "target_modules" and names == ALL_LINEAR):
            continue
        for name in [names] if isinstance(names, str) else names:
            pattern = name if isinstance(names, str) else [name]
            if not any(matches_names(path, pattern) for path in every):
                known = every if argument == "modules_to_save" else possible
                whole = isinstance(names, str) and any(matches_names(p, [name]) for p in every)
                raise _no_match(caller, argument, name, "a module", known, whole)


def _of_layers(config: AdapterConfig) -> str:
    if config.layers_to_transform is None:
        return ""
    return (
        f", in layers_to_transform={config.layers_to_transform!r} with "
        f"layers_pattern={config.layers_pattern!r}"
    )


def _selects(config: AdapterConfig, path: str) -> bool:
    names = config.target_modules
    return matches_names(path, names) and in_layers(
        path, names, config.layers_to_transform, config.layers_pattern
    )


def _check_layers(paths: Sequence[str], config: AdapterConfig, caller: str) -> None:
    """Raise where a layer, or what holds the layers, has none of the selected ``paths``."""
    if config.layers_to_transform is None:
        return
    patterns, layers = config.layers_pattern, config.layers_to_transform
    assert not isinstance(layers, int)  # normalized
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if all(layer_index(path, pattern) is None for path in paths):
            raise _no_match(caller, "layers_pattern", pattern, "an adapted module", paths)
    adapted = {layer_index(path, patterns) for path in paths if path not in config.target_modules}
    for layer in layers:
        if layer not in adapted:
            raise ValueError(
                f"{caller}: layers_to_transform must name layers with modules of target_modules="
                f"{list(config.target_modules)!r}, got {layer}, which has none"
            )


def _no_match(
    caller: str,
    argument: str,
    name: str,
    what: str,
    paths: Iterable[str],
    as_list: bool = False,
) -> ValueError:
    """``as_list``: the string, a regular expression for whole paths, would match as a name."""
    known = [part for path in paths for part in (path.rpartition(".")[2], path)]
    if argument == "target_modules":
        known.append(ALL_LINEAR)
    advice = (
        f": a string is a regular expression for whole paths, give a list of names, [{name!r}]"
        if as_list
        else did_you_mean(name, known)
    )
    return ValueError(
        f"{caller}: {argument} must match {what} of the model, got {name!r}, which matches none"
        f"{advice}"
    )


def _is_linear(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) or is_conv1d(module)
    return linear and not isinstance(module, NonDynamicallyQuantizableLinear)


def _output_head(model: nn.Module, paths: Mapping[nn.Module, list[str]]) -> set[nn.Module]:
    """The model's output embeddings, else the last linear whose path has a head's usual name."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if isinstance(head, nn.Module):
        return set(head.modules())
    named = [
        module
        for module, own in paths.items()
        if _is_linear(module) and any(_OUTPUT_HEADS.intersection(path.split(".")) for path in own)
    ]
    return set(named[-1:])


def is_from_peft(module: nn.Module) -> bool:
    """Whether the module's class is PEFT's or derived from one (by ``lr.accelerate``); PEFT is not
    imported to find out."""
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def check_adaptable(
    path: str, module: nn.Module, caller: str, families: Collection[str] = (LINEAR,)
) -> None:
    """Raise ValueError where the module at ``path`` cannot carry an adapter, which modules of
    ``families`` can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{caller}: target_modules must name modules that are called, got {path}, whose weight "
            "nn.MultiheadAttention reads without calling it; put it into exclude_modules"
        )
    if family_of(module) not in families:
        raise ValueError(
            f"{caller}: target_modules must name {either(families)} modules, got {path}, "
            f"{with_article(type(module).__name__)}; name such modules inside it, or exclude it"
        )


def _storage_key(tensor: Tensor) -> int:
    # Meta tensors have no address, tensor subclasses may have none: they are compared by identity.
    return id(tensor) if _has_no_address(tensor) else tensor.untyped_storage().data_ptr()


def _has_no_address(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.numel() == 0


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors with the same storage key overlap."""
    if a is b or _has_no_address(a):
        return True
    return a.data_ptr() < _end(b) and b.data_ptr() < _end(a)


def _end(tensor: Tensor) -> int:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()
