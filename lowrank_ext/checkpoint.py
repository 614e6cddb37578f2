"""Adapter checkpoints: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

LoRA is written as PEFT writes it, and PEFT's LoRA files load here. The other methods use the same
two files with ``peft_type`` "LAMDA", "AFLORA", "GOAT", "RESLORA" or "SET_AND_SEQUENCE", most with
more tensors per module. With P for ``base_model.model.<path>``:

    P.lora_A.weight [r, K]    P.lora_B.weight [N, r]         LoRA, LaMDA, AFLoRA, ResLoRA
    P.lora_core.weight [r, r]                                LaMDA
    P.lora_B_init.weight [N, r]    P.lora_core_init.weight [r]
                                                             LaMDA svd_residual: start of lora_b and
                                                             of core's diagonal, which with lora_a
                                                             rebuild the residual base weight
    P.lora_rank_scale.weight [r]    P.lora_out_scale.weight [N]
                                                             AFLoRA
    P.lora_A.weight [E, r/E, K]    P.lora_B.weight [E, N, r/E]    P.lora_router.weight [E, K]
                                                             GOAT
    P.lora_A_init.weight    P.lora_B_init.weight             GOAT but init="zero": starts of lora_A
                                                             and lora_B, likewise
    P.lora_A.weight [r, K]    P.lora_B.weight [N, r]         Set-and-Sequence, and for each residual
    P.lora_residual_<name>.weight                            [N, r], with basis="up" [r, K]
    P.<name in the module's state dict>                      every module of modules_to_save

LoRA with init="pissa" is written as a plain LoRA of rank 2r over the original base, A = [A; A_init]
and B = [B, -B_init], which any PEFT reads. The file's metadata lets :func:`load_adapter` take it
apart again.

Saving is atomic, see :mod:`lowrank_ext.adapter_files`.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank_ext.adapt import adapt, lowrank_modules
from lowrank_ext.adapter_files import (
    AdapterFiles,
    Companion,
    read_adapter_files,
    write_adapter_files,
)
from lowrank_ext.config import METHOD_CONFIGS, AdapterConfig, GOATConfig, LoRAConfig
from lowrank_ext.config.checks import check_alpha, did_you_mean, matching_pattern
from lowrank_ext.nn import LowRankLinear
from lowrank_ext.nn.linear import dense_weight, is_conv1d, linear_features
from lowrank_ext.targets import check_adaptable, outermost_modules, shared_tensors

__all__ = ["load_adapter", "save_adapter", "save_as_lora"]

_PREFIX = "base_model.model."
_PISSA_KEY = "lowrank_ext_pissa"  # metadata: r, lora_alpha and the patterns before doubling

# What a module's tensors are called in a file, after the module's path.
_FILE_NAMES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "core": "lora_core.weight",
    "rank_scale": "lora_rank_scale.weight",
    "out_scale": "lora_out_scale.weight",
    "router_weight": "lora_router.weight",
    "lora_a_init": "lora_A_init.weight",  # of pissa only in memory: in a file half of lora_A
    "lora_b_init": "lora_B_init.weight",
    "core_init": "lora_core_init.weight",
}
_ATTRIBUTES = {name: attribute for attribute, name in _FILE_NAMES.items()}
_NAMED_RESIDUAL = re.compile(r"(?:.*\.)?(lora_residual_[^.]+)\.weight")
LORA_A, LORA_B, LORA_A_INIT, LORA_B_INIT, CORE_INIT = (
    _FILE_NAMES[attribute]
    for attribute in ("lora_a", "lora_b", "lora_a_init", "lora_b_init", "core_init")
)

# Fields that change the numbers in a way that no module here computes: a file that uses one is
# refused. {field: values that mean "not used"}; None, False and empty ones mean that for all.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (),
    "use_qalora": (),
    "use_bdlora": (),
    "lora_bias": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "ensure_weight_tying": (),
}
# Fields without effect on a finished adapter, or read elsewhere in this file.
_KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
    *("megatron_core", "runtime_config", "qalora_group_size"),
    *(key for config in METHOD_CONFIGS for key in config.own_fields),
}
# Inits of PEFT that leave the base weights alone, and what continues them here.
_PEFT_INITS = {
    True: "kaiming",
    False: "kaiming",
    None: "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
    "pissa": "pissa",
}

Model = TypeVar("Model", bound=nn.Module)
Adapters = dict[str, dict[str, Tensor]]  # module path -> {LORA_A: tensor, …}


# --------------------------------------------------------------------------------------- saving


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of ``model`` into the directory ``path`` as the module's docstring says.

    Tensors keep the dtype of their parameters. An earlier adapter in the directory is replaced as a
    pair; other files there stay. Merged adapters are saved like others. Parameters sharded as
    DTensors are gathered, so every rank must call this, and rank 0 writes.

    Raises:
        ValueError: the model carries no adapter that ``adapt`` or ``load_adapter`` made, or a
            parameter of modules_to_save is tied to one that would not be saved. Nothing is written.
        OSError: the files cannot be written. The directory holds what it held before.

    Example:
        >>> lr.save_adapter(model, "out/adapter")
    """
    model = _unwrapped(model)
    modules = lowrank_modules(model, "save_adapter")
    config = _config_of(model, "save_adapter")
    for name, module in modules.items():
        try:
            module.check_saveable(config)
        except ValueError as error:
            raise ValueError(f"save_adapter: {name} {error}") from None
    _check_valued(model, modules, config, "save_adapter")
    stored = {name: _stored_tensors(module, config) for name, module in modules.items()}
    _write(model, path, config, modules, stored)


def save_as_lora(model: nn.Module, path: str | os.PathLike[str], caller: str) -> None:
    """Write the branches of ``model`` as they are in evaluation mode, as an ordinary LoRA.

    For methods whose branch is a LoRA of another making; otherwise as :func:`save_adapter`.
    """
    model = _unwrapped(model)
    modules = lowrank_modules(model, caller)
    config = _config_of(model, caller)
    _check_valued(model, modules, config, caller)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(AdapterConfig)}
    stored = {
        name: dict(zip((LORA_A, LORA_B), module.branch_factors(training=False), strict=True))
        for name, module in modules.items()
    }
    _write(model, path, LoRAConfig(**{**shared, "init": "kaiming"}), modules, stored)


def _config_of(model: nn.Module, caller: str) -> AdapterConfig:
    config = getattr(model, "lowrank_config", None)
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"{caller}: model must have been adapted with adapt or load_adapter")
    return config


def _check_valued(
    model: nn.Module, modules: Mapping[str, LowRankLinear], config: AdapterConfig, caller: str
) -> None:
    """What would be saved holds values, and all of what trains is among it."""
    saved = outermost_modules(model, config.modules_to_save)
    for name, owner in (*modules.items(), *saved.items()):
        if any(tensor.is_meta for tensor in owner.parameters()):
            raise ValueError(f"{caller}: {name} must hold values, got a meta tensor")
    _check_ties(model, saved, caller)


def _write(
    model: nn.Module,
    path: str | os.PathLike[str],
    config: AdapterConfig,
    modules: Mapping[str, LowRankLinear],
    stored: Adapters,
) -> None:
    """Both files, of the adapters' ``stored`` tensors and the modules of modules_to_save."""
    saved = outermost_modules(model, config.modules_to_save)
    sharded = any(_is_sharded(p) for p in model.parameters())
    tensors = {
        f"{_PREFIX}{name}.{kind}": tensor
        for name, kinds in stored.items()
        for kind, tensor in kinds.items()
    }
    for name, whole in saved.items():
        for key, tensor in whole.state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    # Copies: two keys may name one tensor (tied modules), which the format does not allow.
    tensors = {key: _gathered(tensor).clone() for key, tensor in tensors.items()}
    if sharded and torch.distributed.get_rank() != 0:
        return
    fields, metadata = _config_fields(model, config, modules, saved)
    write_adapter_files(Path(path), fields, tensors, metadata)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _gathered(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous()


def _check_ties(model: nn.Module, saved: Mapping[str, nn.Module], caller: str) -> None:
    prefixes = tuple(f"{name}." for name in saved)
    for key, others in _ties(model, saved).items():
        outside = [other for other in others if not other.startswith(prefixes)]
        if outside:
            raise ValueError(
                f"{caller}: modules_to_save must name all owners of a tied weight, "
                f"got {key} without {outside[0]}, which has trained with it"
            )


def _ties(model: nn.Module, saved: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each parameter of the saved modules that is tied: names of the tensors it is tied to."""
    ties: dict[str, list[str]] = {}
    for name, whole in saved.items():
        for inner, module in whole.named_modules(prefix=name):
            for key, parameter in module.named_parameters(recurse=False):
                if shared := shared_tensors(model, {module: parameter})[module]:
                    ties[f"{inner}.{key}"] = shared
    return ties


def _stored_tensors(module: LowRankLinear, config: AdapterConfig) -> dict[str, Tensor]:
    if config.init == "pissa":
        a, a_init = _gathered(module.lora_a), _gathered(module.get_buffer("lora_a_init"))
        b, b_init = _gathered(module.lora_b), _gathered(module.get_buffer("lora_b_init"))
        return {LORA_A: torch.cat([a, a_init]), LORA_B: torch.cat([b, -b_init], dim=1)}
    shapes = _shapes(config, module.r, module.in_features, module.out_features)
    return {kind: getattr(module, _attribute(kind)) for kind in shapes}


def _file_name(attribute: str) -> str:
    """What a module's tensor is called in a file; a kind of tensor."""
    return _FILE_NAMES.get(attribute, f"{attribute}.weight")


def _attribute(kind: str) -> str:
    return _ATTRIBUTES.get(kind, kind.removesuffix(".weight"))


def _kind_of(key: str) -> str | None:
    """The kind of tensor that a key in a file ends with, or None for no adapter's."""
    named = _NAMED_RESIDUAL.fullmatch(key)
    if named is not None:
        return _file_name(named[1])
    return next((kind for kind in _ATTRIBUTES if key.endswith(f".{kind}")), None)


def _config_fields(
    model: nn.Module,
    config: AdapterConfig,
    modules: Mapping[str, "LowRankLinear | _Numbers"],
    saved: Mapping[str, nn.Module],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Content of adapter_config.json, and metadata for the tensor file."""
    # fully_shard gives the model a class of its own, derived from the model's.
    own_class = next(
        cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed.")
    )
    alpha = float(config.r if config.alpha is None else config.alpha)
    ranks = {name: module.r for name, module in modules.items()}
    alphas = {name: module.alpha for name, module in modules.items()}
    numbers: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": _pattern(config.rank_pattern, config.r, ranks),
        "alpha_pattern": _pattern(config.alpha_pattern, alpha, alphas),
    }
    metadata = {}
    if config.init == "pissa":
        metadata[_PISSA_KEY] = json.dumps(numbers, sort_keys=True)
        numbers = _doubled(numbers, config.rslora)
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
        "target_modules": _target_names(model, modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _saved_names(model, config.modules_to_save, saved),
        "fan_in_fan_out": any(m.fan_in_fan_out for m in modules.values()),
        "bias": "none",
    }
    fields |= {key: getattr(config, key) for key in config.own_fields}
    if isinstance(config, LoRAConfig):
        fields["init_lora_weights"] = "gaussian" if config.init == "gaussian" else True
        fields["use_dora"] = False
    return fields, metadata


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _pattern(
    own: Mapping[str, float], default: float, values: Mapping[str, float]
) -> dict[str, int | float]:
    """A pattern that gives every path its value by PEFT's rule: the user's own if it does."""

    def resolved(path: str) -> float:
        key = matching_pattern(own, path)
        return default if key is None else own[key]

    if all(resolved(path) == value for path, value in values.items()):
        return {key: _whole(value) for key, value in own.items()}
    return {
        f"^{re.escape(path)}": _whole(value) for path, value in values.items() if value != default
    }


def _doubled(numbers: Mapping[str, Any], rslora: bool) -> dict[str, Any]:
    """r, lora_alpha and patterns of a LoRA of twice the rank with the same scaling."""
    factor = math.sqrt(2) if rslora else 2
    return {
        "r": 2 * numbers["r"],
        "lora_alpha": _whole(factor * numbers["lora_alpha"]),
        "rank_pattern": {key: 2 * rank for key, rank in numbers["rank_pattern"].items()},
        "alpha_pattern": {
            key: _whole(factor * alpha) for key, alpha in numbers["alpha_pattern"].items()
        },
    }


def _target_names(model: nn.Module, targets: Collection[str]) -> list[str] | str:
    """The shortest target_modules that mean exactly ``targets``, here and in PEFT."""
    inside = tuple(f"{path}." for path in targets)
    paths = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if not path.startswith(inside)
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
    """The user's names if PEFT, which compares endings of whole paths, takes them the same way."""
    if not names:
        return None
    in_peft = {path for path, _ in model.named_modules() if path.endswith(tuple(names))}
    return sorted(names if in_peft == set(saved) else saved)


# -------------------------------------------------------------------------------------- loading


def load_adapter(model: Model, path: str | os.PathLike[str], trainable: bool = True) -> Model:
    """Put the adapter in the directory ``path`` on ``model``; returns the model.

    A plain model is adapted in place to what the file says. A model that carries the same kind of
    adapter on the same modules, with the same ranks and scalings, gets the file's values. A
    residual init rebuilds its base weight: bit for bit on the original base and in a model with the
    same initial factors, to one rounding where another residual has to be undone first.

    LoRA files may come from PEFT, with use_rslora, rank_pattern, alpha_pattern, modules_to_save and
    init_lora_weights="pissa" (whose SVD is then done again, as PEFT does). What cannot be computed
    exactly here (DoRA, trained biases, …) is refused. Adapters keep the file's dtype if it is the
    base's or float32, else they become float32 (float64 over a float64 base). A saved module whose
    weight is tied in the model gets a weight of its own where the file's values ask for it.

    Args:
        model: on its final device, not merged, not sharded.
        path: directory with adapter_config.json and adapter_model.safetensors.
        trainable: False leaves nothing in the model that requires a gradient.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, does not fit the model or uses what is not supported; the
            message names file and key. Raised before the model is touched.

    Example:
        >>> model = lr.load_adapter(AutoModelForCausalLM.from_pretrained("base"), "out/adapter")
    """
    if _unwrapped(model) is not model:
        raise ValueError("load_adapter: model must not be wrapped, load before wrapping it")
    files = read_adapter_files(Path(path), "load_adapter")
    own: AdapterConfig | None = getattr(model, "lowrank_config", None)
    files, adapters, others = _split_keys(files, split_pissa=own is None or own.init == "pissa")
    config = _parsed_config(files, adapters)
    modules = _modules_for(model, files, adapters)
    _check_loadable(model, modules, "load_adapter")
    _check_tensors(files, config, modules, adapters)
    saved = _saved_modules_for(model, files, others)
    config = dataclasses.replace(
        config,
        target_modules=_target_names(model, adapters),
        modules_to_save=tuple(saved),
        adapter_dtype=_adapter_dtype(modules, adapters),
    )
    if own is not None:
        _check_same(model, files, adapters, config, own)
    else:
        # PEFT's own pissa files lack the initial factors: the SVD has to be done again.
        initialise = config.init == "pissa" and not _has_pissa_factors(adapters)
        try:
            adapt(model, config, initialise=initialise)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{files.caller}: {files.config_path}: {error}") from None
    for name, tensors in adapters.items():
        module = model.get_submodule(name)
        assert isinstance(module, LowRankLinear)
        _fill(module, tensors)
    _fill_saved(model, saved, others)
    if not trainable:
        model.requires_grad_(False)
    return model


class LoRATensors(NamedTuple):
    """One module's adapter: lora_a [r, K], lora_b [N, r]."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class LoRAFile(NamedTuple):
    """What a LoRA's two files say, by module path."""

    config: LoRAConfig
    adapters: dict[str, LoRATensors]


def read_lora(model: nn.Module, path: str | os.PathLike[str], caller: str) -> LoRAFile:
    """The LoRA in the directory ``path`` by module path of ``model``, which is left alone.

    Refused, beside what :func:`load_adapter` refuses: everything that is more than a branch on the
    output of linear modules. A pissa file that :func:`save_adapter` wrote is the LoRA of rank 2r
    that it says.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, does not fit the model or uses what is not supported; the
            message names file and key.
    """
    files = read_adapter_files(Path(path), caller)
    files, adapters, others = _split_keys(files, split_pissa=False)
    config = _parsed_config(files, adapters)
    if not isinstance(config, LoRAConfig) or config.init == "pissa":
        what = "a residual base weight (PiSSA)" if config.peft_type == "LORA" else config.peft_type
        raise ValueError(f"{caller}: {files.config_path} must be a plain LoRA, got {what}")
    modules = _modules_for(model, files, adapters)
    for name, module in modules.items():
        check_adaptable(name, module, caller)
    _check_loadable(model, modules, caller)
    _check_tensors(files, config, modules, adapters)
    if saved := _saved_modules_for(model, files, others):
        raise ValueError(
            f"{caller}: {files.config_path}: modules_to_save must match no module, one of them "
            f"would change for all rows, got {', '.join(saved)}"
        )
    return LoRAFile(
        dataclasses.replace(config, target_modules=_target_names(model, adapters)),
        {
            name: LoRATensors(
                tensors[LORA_A],
                tensors[LORA_B],
                config.scaling_for(name, in_features=tensors[LORA_A].shape[1]),
            )
            for name, tensors in adapters.items()
        },
    )


def write_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    file: LoRAFile,
    caller: str,
    companions: Mapping[str, Companion],
) -> None:
    """Write the LoRA ``file`` of ``model`` as :func:`save_adapter` does, for adapters whose modules
    are no LowRankLinear.

    Args:
        companions: more files of the same save, see :func:`write_adapter_files`.

    Raises:
        ValueError: a tensor is on the meta device or sharded. Nothing is written.
        OSError: the files cannot be written. The directory holds what it held before.
    """
    tensors = {}
    for name, (lora_a, lora_b, _) in file.adapters.items():
        for kind, tensor in ((LORA_A, lora_a), (LORA_B, lora_b)):
            if tensor.is_meta or _is_sharded(tensor):
                raise ValueError(
                    f"{caller}: {name} must hold whole values, got a meta or sharded tensor"
                )
            tensors[f"{_PREFIX}{name}.{kind}"] = _gathered(tensor).clone()
    modules = {name: _numbers_of(model, name, file.config) for name in file.adapters}
    fields, metadata = _config_fields(model, file.config, modules, saved={})
    write_adapter_files(Path(path), fields, tensors, metadata, companions)


class _Numbers(NamedTuple):
    r: int
    alpha: float
    fan_in_fan_out: bool


def _numbers_of(model: nn.Module, path: str, config: LoRAConfig) -> _Numbers:
    r, alpha = config.rank_for(path), config.alpha_for(path)
    module = model.get_submodule(path)
    transposed = any(is_conv1d(part) for part in (module, *module.children()))
    return _Numbers(r, float(r if alpha is None else alpha), transposed)


def check_adapters(model: nn.Module, adapters: Mapping[str, LoRATensors], caller: str) -> None:
    """Raise ValueError where a path is no linear module of ``model``, or a shape does not fit."""
    present = dict(model.named_modules())
    if not adapters:
        raise ValueError(f"{caller}: adapters must hold at least one module, got none")
    for path, (lora_a, lora_b, scaling) in adapters.items():
        if path not in present:
            raise ValueError(
                f"{caller}: adapters must name modules of the model, got {path!r}"
                f"{did_you_mean(path, present)}"
            )
        check_adaptable(path, present[path], caller)
        features = linear_features(present[path])
        assert features is not None  # check_adaptable
        num_in, num_out = features
        r = lora_a.shape[0] if lora_a.dim() == 2 else 0
        expected = [max(r, 1), num_in], [num_out, max(r, 1)]
        if (list(lora_a.shape), list(lora_b.shape)) != expected:
            raise ValueError(
                f"{caller}: {path}: lora_a and lora_b must be [r, {num_in}] and [{num_out}, r], "
                f"got {list(lora_a.shape)} and {list(lora_b.shape)}"
            )
        check_alpha(scaling, f"{caller}: {path}", "scaling")


def _split_keys(
    files: AdapterFiles, *, split_pissa: bool
) -> tuple[AdapterFiles, Adapters, dict[str, Tensor]]:
    """Tensors by module path and kind, the remaining ones by name; a pissa file taken apart."""
    adapters: Adapters = {}
    others: dict[str, Tensor] = {}
    for key, tensor in files.tensors.items():
        if not key.startswith(_PREFIX):
            raise _bad_key(files, key, f"must start with {_PREFIX}")
        name = key.removeprefix(_PREFIX)
        kind = _kind_of(name)
        if kind is None:
            others[name] = tensor
        else:
            adapters.setdefault(name.removesuffix(f".{kind}"), {})[kind] = tensor
    if not adapters:
        raise ValueError(
            f"{files.caller}: {files.weights_path} must hold adapter tensors, got none"
        )
    numbers = _numbers_before_doubling(files) if split_pissa else None
    if numbers is None:
        return files, adapters, others
    config = {**files.config, **numbers, "init_lora_weights": "pissa"}
    halves = {name: _split_pissa(files, name, tensors) for name, tensors in adapters.items()}
    return files._replace(config=config), halves, others


def _numbers_before_doubling(files: AdapterFiles) -> dict[str, Any] | None:
    """r, lora_alpha and patterns of a pissa file that :func:`save_adapter` wrote, else None.

    None also for one whose config has been edited since: it is then the plain LoRA that it says.
    """
    text = files.metadata.get(_PISSA_KEY)
    if text is None:
        return None
    numbers: dict[str, Any] = json.loads(text)
    doubled = _doubled(numbers, bool(files.config.get("use_rslora")))
    return numbers if all(files.config.get(key) == v for key, v in doubled.items()) else None


def _split_pissa(
    files: AdapterFiles, name: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    for kind in (LORA_A, LORA_B):
        if kind not in tensors:
            raise _bad_key(files, f"{_PREFIX}{name}.{kind}", "is missing")
    a, b = tensors[LORA_A], tensors[LORA_B]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] % 2 or a.shape[0] != b.shape[1]:
        raise _bad_key(
            files,
            f"{_PREFIX}{name}.{LORA_A}",
            f"must be [2r, K] beside lora_B [N, 2r], got {list(a.shape)} and {list(b.shape)}",
        )
    (a, a_init), (b, minus_b_init) = a.chunk(2), b.chunk(2, dim=1)
    rest = {kind: tensor for kind, tensor in tensors.items() if kind not in (LORA_A, LORA_B)}
    return {LORA_A: a, LORA_B: b, LORA_A_INIT: a_init, LORA_B_INIT: -minus_b_init, **rest}


def _bad_key(files: AdapterFiles, key: str, problem: str) -> ValueError:
    return ValueError(f"{files.caller}: {files.weights_path}: {key} {problem}")


def _parsed_config(files: AdapterFiles, adapters: Adapters) -> AdapterConfig:
    """The config in the file, for the modules in the file."""
    fields = files.config
    where = f"{files.caller}: {files.config_path}"
    config_class = next((c for c in METHOD_CONFIGS if c.peft_type == fields.get("peft_type")), None)
    if config_class is None:
        known = ", ".join(repr(config.peft_type) for config in METHOD_CONFIGS)
        raise ValueError(
            f"{where}: peft_type must be one of {known}, got {fields.get('peft_type')!r}"
        )
    _check_supported(fields, where)
    r = fields.get("r", 8)  # PEFT's defaults
    options: dict[str, Any] = {
        "r": r,
        "alpha": fields.get("lora_alpha", 8),
        "rslora": bool(fields.get("use_rslora")),
        "dropout": fields.get("lora_dropout") or 0.0,
        "alpha_pattern": _used_pattern(fields, "alpha_pattern", adapters, where),
        "rank_pattern": _used_pattern(fields, "rank_pattern", adapters, where),
    }
    try:
        if config_class is LoRAConfig:
            return LoRAConfig(init=_init_of(fields, where), **options)
        options |= {key: fields[key] for key in config_class.own_fields if key in fields}
        if config_class is GOATConfig and options.get("scale") == "theory":
            options |= {"alpha": None, "alpha_pattern": {}}  # lora_alpha is there for other readers
        if options.get("rank_budget") is not None and not options["rank_pattern"]:
            # The ranks are known; an empty pattern would have them allocated once more.
            options["rank_pattern"] = {f"^{re.escape(name)}": r for name in adapters}
        return config_class(**options)
    except (TypeError, ValueError) as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from None


def _check_supported(fields: Mapping[str, Any], where: str) -> None:
    for key, value in fields.items():
        unused = value is None or value is False or value == [] or value == {}
        if key in _UNSUPPORTED and not unused and value not in _UNSUPPORTED[key]:
            allowed = " or ".join(map(repr, _UNSUPPORTED[key] or (None, False)))
            raise ValueError(f"{where}: {key}={value!r} is not supported, it must be {allowed}")
        # A field of a later version that is switched on may change the numbers; a number or a name
        # is the default of something that is not.
        known = key in _UNSUPPORTED or key in _KNOWN
        if not known and not unused and (value is True or isinstance(value, list | dict)):
            raise ValueError(f"{where}: {key}={value!r} is not known to this version")


def _init_of(fields: Mapping[str, Any], where: str) -> str:
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _PEFT_INITS:
        raise ValueError(
            f"{where}: init_lora_weights={init!r} is not supported, it may change base weights in "
            "a way that the file does not hold; save from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    return _PEFT_INITS[init]


def _used_pattern(
    fields: Mapping[str, Any], name: str, paths: Iterable[str], where: str
) -> dict[str, Any]:
    """The entries of a pattern that apply to a module in the file, in their order."""
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{where}: {name} must be an object, got {pattern!r}")
    try:
        used = {matching_pattern(pattern, path) for path in paths}
    except re.error as error:
        raise ValueError(f"{where}: {name} must hold regular expressions: {error}") from None
    return {key: value for key, value in pattern.items() if key in used}


def _modules_for(
    model: nn.Module, files: AdapterFiles, adapters: Collection[str]
) -> dict[str, nn.Module]:
    """The model's module for each path in the file."""
    present = dict(model.named_modules())
    possible = [
        path
        for path, module in present.items()
        if isinstance(module, LowRankLinear) or linear_features(module) is not None
    ]
    for name in adapters:
        if name not in possible:
            what = type(present[name]).__name__ if name in present else "no such module"
            raise _bad_key(
                files,
                f"{_PREFIX}{name}.{LORA_A}",
                f"must belong to a linear module, the model has {what} at {name}"
                f"{did_you_mean(name, possible)}",
            )
    return {name: present[name] for name in adapters}


def _check_tensors(
    files: AdapterFiles, config: AdapterConfig, modules: Mapping[str, nn.Module], adapters: Adapters
) -> None:
    """All kinds of tensors of the method are there, no others, and their shapes fit."""
    for name, tensors in adapters.items():
        module = modules[name]
        features = (
            (module.in_features, module.out_features)
            if isinstance(module, LowRankLinear)
            else linear_features(module)
        )
        assert features is not None
        shapes = _shapes(config, config.rank_for(name), *features)
        if isinstance(config, LoRAConfig) and _has_pissa_factors(adapters):
            shapes |= {LORA_A_INIT: shapes[LORA_A], LORA_B_INIT: shapes[LORA_B]}
        for kind in shapes:
            if kind not in tensors:
                raise _bad_key(files, f"{_PREFIX}{name}.{kind}", "is missing")
        for kind, tensor in tensors.items():
            key = f"{_PREFIX}{name}.{kind}"
            if kind not in shapes:
                raise _bad_key(files, key, f"is no tensor of {config.peft_type}")
            if list(tensor.shape) != shapes[kind]:
                raise _bad_key(files, key, f"must be {shapes[kind]}, got {list(tensor.shape)}")
            if not tensor.is_floating_point():
                raise _bad_key(files, key, f"must be floating-point, got {tensor.dtype}")


def _shapes(config: AdapterConfig, r: int, num_in: int, num_out: int) -> dict[str, list[int]]:
    """Shapes of a module's tensors in a file, by their names there."""
    shapes = config.adapter_shapes(r, num_in, num_out)
    return {_file_name(attribute): shape for attribute, shape in shapes.items()}


def _has_pissa_factors(adapters: Adapters) -> bool:
    return any(LORA_A_INIT in tensors for tensors in adapters.values())


def _saved_modules_for(
    model: nn.Module, files: AdapterFiles, others: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The model's modules that the file's modules_to_save mean, by PEFT's rule: whole-path endings.

    Names that match nothing are dropped: PEFT writes both "classifier" and "score" for any head.
    """
    names = files.config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{files.caller}: {files.config_path}: modules_to_save must be a list of names, "
            f"got {names!r}"
        )
    paths = [path for path, _ in model.named_modules() if path and path.endswith(tuple(names))]
    saved = outermost_modules(model, paths)
    wanted = {f"{path}.{key}": t for path, m in saved.items() for key, t in m.state_dict().items()}
    for key, tensor in wanted.items():
        if key not in others:
            raise _bad_key(files, _PREFIX + key, "is missing")
        if others[key].shape != tensor.shape:
            got = list(others[key].shape)
            raise _bad_key(files, _PREFIX + key, f"must be {list(tensor.shape)}, got {got}")
    for key in others:
        if key not in wanted:
            raise _bad_key(
                files, _PREFIX + key, "belongs to no adapter and to no module of modules_to_save"
            )
    return saved


def _check_loadable(model: nn.Module, modules: Mapping[str, nn.Module], caller: str) -> None:
    for name, module in modules.items():
        if isinstance(module, LowRankLinear) and module.merged:
            raise ValueError(f"{caller}: {name} must not be merged; call unmerge first")
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{caller}: {key} must hold values, got a meta tensor")
        if _is_sharded(parameter):
            raise ValueError(f"{caller}: {key} must not be sharded; load before fully_shard")


def _adapter_dtype(modules: Mapping[str, nn.Module], adapters: Adapters) -> str:
    """The file's dtype where it is every base's, else float32 (which a float64 base overrides)."""
    in_file = {tensor.dtype for tensors in adapters.values() for tensor in tensors.values()}
    weights = [dense_weight(module) for module in modules.values()]
    in_model = {weight.dtype for weight in weights if weight is not None}
    if len(in_file) == 1 and in_model <= in_file and in_file & {torch.bfloat16, torch.float16}:
        return str(in_file.pop()).removeprefix("torch.")
    return "float32"


def _check_same(
    model: nn.Module,
    files: AdapterFiles,
    adapters: Adapters,
    config: AdapterConfig,
    own: AdapterConfig,
) -> None:
    """The model carries what ``config`` describes, so values can be copied into it."""

    def differs(what: str, expected: object, got: object) -> ValueError:
        return ValueError(
            f"{files.caller}: {files.config_path}: {what} must be {expected!r} as in the model, "
            f"got {got!r}"
        )

    def start(of: AdapterConfig) -> str:
        return "kaiming" if of.init == "gaussian" else of.init  # the same once it is trained

    if type(config) is not type(own):
        raise differs("peft_type", own.peft_type, config.peft_type)
    if start(config) != start(own):
        raise differs("init", own.init, config.init)
    theirs = config.must_agree()
    for name, value in own.must_agree().items():
        if value != theirs[name]:
            raise differs(name, value, theirs[name])
    modules = lowrank_modules(model, "load_adapter")
    if modules.keys() != adapters.keys():
        raise differs("adapted modules", sorted(modules), sorted(adapters))
    for name, module in modules.items():
        r, scaling = config.rank_for(name), config.scaling_for(name, module.in_features)
        if module.r != r:
            raise differs(f"rank of {name}", module.r, r)
        if not math.isclose(module.scaling, scaling, rel_tol=1e-12):
            raise differs(f"scaling of {name}", module.scaling, scaling)
    saved = list(outermost_modules(model, own.modules_to_save))
    if saved != list(config.modules_to_save):
        raise differs("modules_to_save", saved, list(config.modules_to_save))


@torch.no_grad()
def _fill(module: LowRankLinear, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into an adapter, and take the residual that they define."""
    own = {kind: getattr(module, _attribute(kind)) for kind in tensors}
    given = {kind: tensor.to(own[kind]) for kind, tensor in tensors.items()}
    # What defines the residual never changes in training, so equal factors mean an equal base.
    factors = given.keys() & {LORA_A_INIT, LORA_B_INIT, CORE_INIT}
    if CORE_INIT in factors:
        factors.add(LORA_A)
    same = module.residual_taken and all(torch.equal(own[k], given[k]) for k in factors)
    if factors and not same:
        module.restore_base()
    for kind, tensor in given.items():
        own[kind].copy_(tensor)
    if factors:
        module.take_residual()


@torch.no_grad()
def _fill_saved(
    model: nn.Module, saved: Mapping[str, nn.Module], values: Mapping[str, Tensor]
) -> None:
    """Copy a file's values into the modules of modules_to_save, first undoing ties they forbid."""
    for key, others in _ties(model, saved).items():
        if not all(o in values and torch.equal(values[o], values[key]) for o in others):
            _untie(model, key, keeps_training=any(other in values for other in others))
    for name, module in saved.items():
        for key, tensor in module.state_dict().items():
            tensor.copy_(values[f"{name}.{key}"])


def _untie(model: nn.Module, key: str, keeps_training: bool) -> None:
    """Give the parameter named ``key`` memory of its own; its former partners keep the old one."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    tied = module.get_parameter(name)
    module.register_parameter(name, nn.Parameter(tied.detach().clone(), tied.requires_grad))
    tied.requires_grad_(tied.requires_grad and keeps_training)
