"""adapter_config.json: PEFT's fields, from a model and its config and back.

PEFT's names select the same modules in both libraries; what this one cannot compute is refused.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lowrank_ext import registry
from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import Adapters, StoredConfig
from lowrank_ext.checkpoint.field_types import check_field_types, check_own_fields
from lowrank_ext.checkpoint.layout import whole
from lowrank_ext.checkpoint.peft_kinds import (
    FIELDS,
    OF_TRAINING,
    WITH_PEFT,
    check_kind,
    is_used,
    training_options,
)
from lowrank_ext.checks import matching_pattern
from lowrank_ext.config import AdapterConfig
from lowrank_ext.files import printable, quoted
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.registry import Method
from lowrank_ext.target_parameters import parameter_names
from lowrank_ext.wrappers import named_modules, unwrapped

# Methods of PEFT, up to 0.21, that are not here.
_OTHER_PEFT_TYPES = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"),
    *("CARTRIDGE", "CPT", "ADALORA", "ADAMSS", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA"),
    *("FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA"),
    *(
        "LOKR",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHADOW",
    ),
    *(
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ),
)
# Fields that are read elsewhere, or have no effect on a finished adapter.
_KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
    *("megatron_core", "runtime_config", "qalora_group_size"),
}


class ModuleNumbers(NamedTuple):
    """Numbers in the config file for one module that is no LowRankLinear."""

    r: int
    alpha: float
    fan_in_fan_out: bool
    stack: tuple[int, ...] = ()


def config_fields(
    model: nn.Module,
    config: AdapterConfig,
    modules: Mapping[str, LowRankLinear | ModuleNumbers],
    saved: Mapping[str, nn.Module],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of adapter_config.json, and metadata for the tensor file."""
    # fully_shard replaces the model's class by a subclass of it.
    model = unwrapped(model)
    own_class = next(
        cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed.")
    )
    method = registry.METHODS[config.peft_type]
    linear = [name for name, module in modules.items() if not module.stack]
    alpha = config.default_alpha
    ranks = {name: module.r for name, module in modules.items()}
    alphas = {name: module.alpha for name, module in modules.items()}
    numbers: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": whole(alpha),
        "rank_pattern": pattern_of(config.rank_pattern, config.r, ranks),
        "alpha_pattern": pattern_of(config.alpha_pattern, alpha, alphas),
    }
    fields = {
        "peft_type": config.peft_type,
        "auto_mapping": {
            "base_model_class": own_class.__name__,
            "parent_library": own_class.__module__,
        },
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        **numbers,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": target_names(model, linear) if linear else [],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _saved_names(model, config.modules_to_save, saved),
        "fan_in_fan_out": any(modules[name].fan_in_fan_out for name in linear),
        "bias": "none",
    }
    if len(linear) < len(modules):
        stacked = modules.keys() - linear
        fields["target_parameters"] = parameter_names(model, stacked, config.target_parameters)
    own, metadata = method.file_format.fields(config, numbers)
    return {**fields, **own}, metadata


def pattern_of(
    own: Mapping[str, float], default: float, values: Mapping[str, float]
) -> dict[str, int | float]:
    """A pattern that gives every path its value by PEFT's rule: the user's, if it does so."""

    def resolved(path: str) -> float:
        key = matching_pattern(own, path)
        return default if key is None else own[key]

    if all(resolved(path) == value for path, value in values.items()):
        return {key: whole(value) for key, value in own.items()}
    return {
        f"^{re.escape(path)}": whole(value) for path, value in values.items() if value != default
    }


def target_names(model: nn.Module, targets: Collection[str]) -> list[str] | str:
    """The shortest target_modules that select exactly ``targets``, here and in PEFT."""
    inside = tuple(f"{path}." for path in targets)
    paths = {
        path: module
        for path, module in named_modules(model, remove_duplicate=False)
        if not (path.startswith(inside) or (isinstance(module, LowRankLinear) and module.stack))
    }
    wanted = {paths[path] for path in targets}
    for names in ({path.rpartition(".")[2] for path in targets}, set(targets)):
        endings = tuple(f".{name}" for name in names)
        if {m for path, m in paths.items() if path in names or path.endswith(endings)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in targets)


def _saved_names(
    model: nn.Module, names: Collection[str], saved: Mapping[str, nn.Module]
) -> list[str] | None:
    """The user's names if they select ``saved`` in PEFT too, which compares endings of paths; else
    whole paths."""
    if not names:
        return None
    in_peft = {path for path, _ in named_modules(model) if path.endswith(tuple(names))}
    return sorted(names if in_peft == set(saved) else saved)


def method_in(files: AdapterFiles) -> Method:
    """The method that the config file names; all that the file says is computed here.

    Called before the tensors are looked at: a message names the file's method, not its tensors.

    Raises:
        ValueError: there is no such method here, or a field has another type or an option that is
            not supported.
    """
    where = f"{files.caller}: {files.config_path}"
    peft_type = files.config.get("peft_type")
    method = registry.METHODS.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        known = ", ".join(map(repr, registry.METHODS))
        way_out = f"; {WITH_PEFT}" if peft_type in _OTHER_PEFT_TYPES else ""
        raise ValueError(
            f"{where}: peft_type must be one of {known}, got {quoted(peft_type)}{way_out}"
        )
    check_field_types(files.config, method.config_class.selectors, where)
    _check_supported(files.config, method, where)
    if method is not registry.METHODS["LORA"]:  # whose files PEFT writes, in versions to come too
        own = method.config_class.own_fields
        of_lora = registry.METHODS["LORA"].file_format.peft_fields
        check_own_fields(files.config, {*_KNOWN, *FIELDS, *of_lora, *own}, where)
    _say_plain(files.config, where)
    return method


def parsed_config(files: AdapterFiles, method: Method, adapters: Adapters) -> AdapterConfig:
    """The config in the file, for the modules in the file, which are modules of the model: only its
    names are matched with patterns of the file."""
    fields = files.config
    where = f"{files.caller}: {files.config_path}"
    shared: dict[str, Any] = {
        "r": fields.get("r", 8),  # PEFT's defaults
        "alpha": fields.get("lora_alpha", 8),
        "rslora": bool(fields.get("use_rslora")),
        "dropout": fields.get("lora_dropout") or 0.0,
        "alpha_pattern": _used_pattern(fields.get("alpha_pattern") or {}, adapters),
        "rank_pattern": _used_pattern(fields.get("rank_pattern") or {}, adapters),
    }
    try:
        stored = StoredConfig(method.config_class, fields, shared, list(adapters), where)
        return method.config_class(**method.file_format.options(stored))
    except (TypeError, ValueError) as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _check_supported(fields: Mapping[str, Any], method: Method, where: str) -> None:
    check_kind(fields, where)
    own = {key for each in registry.METHODS.values() for key in each.config_class.own_fields}
    of_lora = {*registry.METHODS["LORA"].file_format.peft_fields, *OF_TRAINING}
    for key, value in fields.items():
        if not is_used(value) or key in method.file_format.peft_fields:
            continue
        if key in of_lora and method is not registry.METHODS["LORA"]:
            raise ValueError(
                f"{where}: {key}={quoted(value)} is not supported for {method.peft_type}, it is an "
                "option of LoRA"
            )
        # An unknown field that is switched on may change the output. A number or a name is taken
        # for an option of a feature that is off.
        known = key in FIELDS or key in _KNOWN or key in own
        if not known and (value is True or isinstance(value, list | dict)):
            raise ValueError(
                f"{where}: {quoted(key)[1:-1]}={quoted(value)} is not known to this version; "
                "remove the field from the file if the output does not depend on it, else "
                f"{WITH_PEFT}"
            )


def _say_plain(fields: Mapping[str, Any], where: str) -> None:
    if options := training_options(fields):
        warnings.warn(
            printable(
                f"{where}: the file is read as the plain LoRA that it is at inference; it trains "
                f"on without {', '.join(options)}"
            ),
            stacklevel=5,  # the caller of load_adapter or AdapterBank.load
        )


def _used_pattern(pattern: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """The entries of a pattern that apply to a module in the file, in their order."""
    used = {matching_pattern(pattern, path) for path in paths}
    return {key: value for key, value in pattern.items() if key in used}
