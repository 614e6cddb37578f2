"""Which of a model's modules the fields of adapter_config.json select, by PEFT's rules.

PEFT puts adapters where the config says and drops tensors for other modules; so does this library,
with a warning where file and config differ.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import Adapters
from lowrank_ext.checks import in_layers, matches_names
from lowrank_ext.config import ALL_LINEAR
from lowrank_ext.files import check_pattern, printable, quoted
from lowrank_ext.nn.base_layer import family_of
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.wrappers import named_modules


def selected_adapters(model: nn.Module, files: AdapterFiles, adapters: Adapters) -> Adapters:
    """The adapters of modules that the config selects; warns of others, and of selected modules
    without an adapter in the file.

    Raises:
        ValueError: the config selects none of the adapters.
    """
    fields = files.config
    names = fields.get("target_modules")
    parameters = fields.get("target_parameters") or ()
    if names in (None, ALL_LINEAR) or not (names or parameters):  # all that the file holds
        return adapters
    layers = fields.get("layers_pattern") or ()
    check_pattern(layers, f"{files.caller}: {files.config_path}: layers_pattern")
    chosen = {path for path in adapters if matches_names(path, parameters)}
    chosen |= {path for path in adapters if path not in chosen and selects(fields, path)}
    kept = {path: tensors for path, tensors in adapters.items() if path in chosen}
    dropped = [path for path in adapters if path not in kept]
    if not kept:
        raise ValueError(
            f"{files.caller}: {files.config_path}: target_modules must select a module with an "
            f"adapter in the file, got {quoted(names)}, which selects none of {_some(adapters)}"
        )
    if dropped:
        _warn(
            f"{files.caller}: {files.config_path} does not select {_some(dropped)}, whose adapters "
            "in the file are left out, as by PEFT"
        )
    inside = tuple(f"{path}." for path in adapters)
    possible = [path for path, module in named_modules(model) if path and _is_possible(module)]
    free = [path for path in possible if path not in adapters and not path.startswith(inside)]
    lacking = [path for path in free if selects(fields, path)]
    if lacking:
        _warn(
            f"{files.caller}: {files.config_path} selects {_some(lacking)}, for which the file "
            "holds no adapter; they stay as in the base model. Was it trained on another model?"
        )
    return kept


def selects(fields: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT adapts the module at ``path``."""
    excluded = fields.get("exclude_modules")
    if excluded and matches_names(path, excluded):
        return False
    saved = fields.get("modules_to_save") or ()
    parts = path.split(".")
    if any(_is_inside(parts, name.split(".")) for name in saved):
        return False
    names = fields["target_modules"] or ()
    if not matches_names(path, names):
        return False
    layers = fields.get("layers_to_transform")
    return in_layers(path, names, layers, fields.get("layers_pattern"))


def _is_inside(parts: list[str], name: list[str]) -> bool:
    """Whether the module ``name`` of modules_to_save is at or above the path of ``parts``."""
    return any(parts[i : i + len(name)] == name for i in range(len(parts)))


def _is_possible(module: nn.Module) -> bool:
    return isinstance(module, LowRankLinear) or family_of(module) is not None


def _some(paths: Iterable[str]) -> str:
    """Up to three of the paths, and how many more there are."""
    paths = list(paths)
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def _warn(text: str) -> None:
    warnings.warn(printable(text), stacklevel=5)  # the caller of load_adapter or AdapterBank.load
