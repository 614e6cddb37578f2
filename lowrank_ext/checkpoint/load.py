"""Reads an adapter from its files and puts it on a model."""

import dataclasses
import math
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank_ext.adapt import adapt, lowrank_modules
from lowrank_ext.adapter_files import AdapterFiles, open_adapter_files
from lowrank_ext.adapter_format import Adapters
from lowrank_ext.base_biases import base_biases, without_peft_copies
from lowrank_ext.checkpoint.embeddings import (
    changed_embeddings,
    held_embeddings,
    replace_embeddings,
    say_replaced,
)
from lowrank_ext.checkpoint.layout import (
    LORA_A,
    PREFIX,
    bad_key,
    path_in_file,
    split_keys,
)
from lowrank_ext.checkpoint.peft_config import (
    method_in,
    parsed_config,
    target_names,
)
from lowrank_ext.checkpoint.peft_kinds import WITH_PEFT
from lowrank_ext.checkpoint.save_warnings import differing_in_peft
from lowrank_ext.checkpoint.selection import selected_adapters
from lowrank_ext.checkpoint.token_rows import check_row_values, fill_rows, rows_in_file
from lowrank_ext.checks import check_scaling, did_you_mean, either, with_article
from lowrank_ext.config import AdapterConfig
from lowrank_ext.files import quoted
from lowrank_ext.files.tensor_file import is_finite
from lowrank_ext.nn.base_layer import LINEAR, dense_weight, family_of, features_of, offload_device
from lowrank_ext.nn.experts import StackedLinear
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.quantized import check_4bit_rows
from lowrank_ext.registry import Method, method_for
from lowrank_ext.sharding import is_sharded
from lowrank_ext.target_parameters import find_parameters, parameter_names
from lowrank_ext.targets import outermost_modules
from lowrank_ext.ties import ties, untie
from lowrank_ext.wrappers import (
    canonical_name,
    check_may_change,
    check_whole,
    named_modules,
    state_of,
    submodule,
    unwrapped,
)

Model = TypeVar("Model", bound=nn.Module)


def load_adapter(model: Model, path: str | os.PathLike[str], trainable: bool = True) -> Model:
    """Put the adapter in the directory ``path`` on ``model``; returns the model.

    A plain model is adapted in place as the file describes. A model that carries the same kind of
    adapter on the same modules, with the same ranks and scalings, gets the file's values. With a
    residual init the base weight is rebuilt: bit for bit over the original base or in a model with
    the same initial factors, to one rounding where another residual is undone first.

    LoRA files may come from PEFT, with use_rslora, rank_pattern, alpha_pattern, modules_to_save and
    init_lora_weights="pissa" (whose SVD is then repeated, as PEFT does). What cannot be computed
    exactly here is refused (``checkpoint/peft_kinds.py``). As in PEFT the config decides: adapters
    of modules that it does not select are left out, and embeddings in the file (of an extended
    vocabulary, or beside an adapted head) replace the model's where they differ. Both are said by a
    UserWarning, as is a module that the config selects without an adapter in the file. Adapters
    keep the file's dtype if it is the base's or float32, else they become float32 (float64 over a
    float64 base). A saved module whose weight is tied in the model is untied if the file's values
    of the two differ.

    Args:
        model: on its final device, not merged, not sharded. Parts that ``torch.compile``,
            activation checkpointing or DataParallel wrap are as without wrapper.
        path: directory with adapter_config.json and adapter_model.safetensors.
        trainable: False is for inference: nothing in the model requires a gradient, and it is in
            evaluation mode, without dropout. True leaves the mode as it is.

    Raises:
        FileNotFoundError: one of the two files is missing.
        NotADirectoryError: path is a file.
        ValueError: a file is damaged, does not fit the model or uses an unsupported option; the
            message names file and key. Raised before the model is changed.

    Examples:
        >>> model = lr.load_adapter(AutoModelForCausalLM.from_pretrained("base"), "out/adapter")
    """
    with open_adapter_files(Path(path), "load_adapter") as files:
        _load(model, files)
    if not trainable:
        model.requires_grad_(False).eval()
    return model


def _load(model: nn.Module, files: AdapterFiles) -> None:
    """Check all that the files say, read the values, then change the model."""
    own: AdapterConfig | None = getattr(unwrapped(model), "lowrank_config", None)
    method = method_in(files)
    # Over a base without a residual a packed file is read as the plain adapter it also is.
    packed = own is None or own.init in method_for(own, files.caller).module_class.residual_inits
    contents = _contents(model, files, method, packed)
    modules = modules_for(model, files, contents.adapters, method.classes)
    adapters = selected_adapters(model, files, contents.adapters)
    modules = {path: modules[path] for path in adapters}
    config = parsed_config(contents.files, method, adapters)
    check_loadable(model, modules, files.caller)
    residual = config.init in method.module_class.residual_inits
    # PEFT's own PiSSA files lack the initial factors: the SVD is repeated, in fp32.
    restart = residual and not _has_starts(method, adapters)
    if restart:
        _check_restarts(files, modules)
    saved = saved_modules_for(model, files, contents.others)
    config = dataclasses.replace(
        config,
        **_targets(model, config, modules),
        modules_to_save=tuple(saved),
        adapter_dtype="float32" if restart else _adapter_dtype(modules, adapters),
    )
    beside = unsaved(contents.others, saved)
    taken = {*modules.values(), *(inner for each in saved.values() for inner in each.modules())}
    rows = rows_in_file(model, files, config, beside, taken)
    with_rows = {*rows.targets.tokens, *rows.targets.owners}
    biases = held_biases(model, files, config, adapters, with_rows, contents.others)
    placed = {*biases, *rows.keys.values()}
    beside = {key: tensor for key, tensor in beside.items() if key not in placed}
    held = held_embeddings(model, files, beside, modules if residual else (), with_rows)
    check_tensors(files, method, config, modules, adapters)
    if own is not None:
        _check_same(model, files, adapters, config, own)
    _, values, others = _contents(model, files.with_values(), method, packed)
    adapters = {path: values[path] for path in adapters}
    changed = changed_embeddings(files, held, others)
    beside = {**{key: held[key].tensor for key in changed}, **biases}
    check_fit_dtypes(files, modules, saved, beside, adapters, others)
    check_row_values(model, files, rows, others)
    say_replaced(files, changed)
    if own is None:
        check_may_change(model, files.caller)
        check_4bit_rows(model, files.caller)  # PEFT, the way out below, would be as wrong
        try:
            adapt(model, config, initialize=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{files.caller}: {files.config_path}: {error}; {WITH_PEFT}") from None
    for name, tensors in adapters.items():
        module = submodule(model, name)
        assert isinstance(module, LowRankLinear)
        if restart:
            method.file_format.start(module)
        attribute_of = method.file_format.attribute_of
        module.fill({attribute_of(kind): tensor for kind, tensor in tensors.items()})
    fill_rows(model, rows, others)
    _fill_saved(model, saved, others)
    with torch.no_grad():
        for key, bias in biases.items():
            bias.copy_(others[key])
    replace_embeddings(model, held, changed)
    _say_differs(model, files)


def _targets(
    model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The fields of ``config`` that select these modules and no others."""
    stacked = _stacked_among(modules)
    linear = [path for path in modules if path not in stacked]
    fields: dict[str, Any] = {"target_modules": target_names(model, linear) if linear else ()}
    if stacked:
        fields["target_parameters"] = parameter_names(model, stacked, config.target_parameters)
    return fields


class _Contents(NamedTuple):
    """What the files hold of adapters, by module path and kind, and of modules_to_save."""

    files: AdapterFiles
    adapters: Adapters
    others: dict[str, Tensor]


def _contents(model: nn.Module, files: AdapterFiles, method: Method, packed: bool) -> _Contents:
    adapters, others = split_keys(files, model)
    if packed:
        files, adapters = method.file_format.unpack(files, adapters)
    return _Contents(files, _by_parameter(model, files, adapters), others)


def _by_parameter(model: nn.Module, files: AdapterFiles, adapters: Adapters) -> Adapters:
    """The adapters with those of target_parameters under the paths of the parameters."""
    stacked = _stacked(model, files)
    own = {path_in_file(path, stacked): path for path in stacked}
    for path in own:
        if path not in adapters:
            raise bad_key(files, f"{PREFIX}{path}.{LORA_A}", "is missing")
    return {own.get(path, path): tensors for path, tensors in adapters.items()}


def _stacked(model: nn.Module, files: AdapterFiles) -> dict[str, StackedLinear]:
    """Path and weight of the file's target_parameters."""
    names = files.config.get("target_parameters") or ()
    try:
        return find_parameters(model, names, f"{files.caller}: {files.config_path}")
    except ValueError as error:
        raise ValueError(f"{error}; {WITH_PEFT}") from None


def modules_for(
    model: nn.Module,
    files: AdapterFiles,
    adapters: Adapters,
    families: Collection[str] = (LINEAR,),
) -> dict[str, nn.Module]:
    """The model's module for each path in the file; adapters of ``families`` are read. Of a stacked
    weight without an adapter it is a StackedLinear."""
    present = {**_stacked(model, files), **dict(named_modules(model))}
    possible = [
        path
        for path, module in present.items()
        if isinstance(module, LowRankLinear) or family_of(module) in families
    ]
    for name, tensors in adapters.items():
        if name not in possible:
            what = type(present[name]).__name__ if name in present else "no such module"
            raise bad_key(
                files,
                f"{PREFIX}{name}.{min(tensors)}",
                f"must belong to a {either(families)} module, the model has {what} at {name}"
                f"{did_you_mean(name, possible)}{_way_out(name, present)}",
            )
    return {name: present[name] for name in adapters}


def _way_out(name: str, present: Collection[str]) -> str:
    """What to do with a file for ``name``, a module that is none of the model's linear ones."""
    if name in present:
        return f"; {WITH_PEFT}"
    return (
        "; a file from before modules were renamed: give PeftModel.from_pretrained a key_mapping "
        "of old to new names, and save it again"
    )


def check_tensors(
    files: AdapterFiles,
    method: Method,
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
    adapters: Adapters,
) -> None:
    """Raise ValueError unless the file has exactly the method's tensors, with shapes that fit."""
    stacked = _stacked_among(modules)
    for name, tensors in adapters.items():
        module = modules[name]
        in_file = PREFIX + path_in_file(name, stacked)
        if not isinstance(module, LowRankLinear):
            try:
                method.class_for(module).check_base(module, config.for_module(name))
            except ValueError as error:
                raise ValueError(f"{files.caller}: {name}: {error}") from None
        shapes = method.file_format.shapes(config, config.rank_for(name), module)
        optional = method.file_format.optional(config, shapes)
        if any(not optional.keys().isdisjoint(tensors) for tensors in adapters.values()):
            shapes |= optional
        for kind in shapes:
            if kind not in tensors:
                raise bad_key(files, f"{in_file}.{kind}", "is missing")
        for kind, tensor in tensors.items():
            key = f"{in_file}.{kind}"
            if kind not in shapes:
                raise bad_key(files, key, f"is no tensor of {config.peft_type}")
            if list(tensor.shape) != shapes[kind]:
                raise bad_key(files, key, f"must be {shapes[kind]}, got {list(tensor.shape)}")
            if not tensor.is_floating_point():
                raise bad_key(files, key, f"must be floating-point, got {tensor.dtype}")
        features = features_of(module)
        assert features is not None  # modules_for
        scaling = config.scaling_for(name, features[0])
        check_scaling(scaling, f"{files.caller}: {files.config_path}: {name}")


def _stacked_among(modules: Mapping[str, nn.Module]) -> dict[str, StackedLinear]:
    bases = {n: m.base_layer if isinstance(m, LowRankLinear) else m for n, m in modules.items()}
    return {name: base for name, base in bases.items() if isinstance(base, StackedLinear)}


def saved_modules_for(
    model: nn.Module, files: AdapterFiles, others: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The model's modules that ``modules_to_save`` in the file selects: by PEFT's rule, all whose
    path ends with one of the names.

    Names that match nothing are dropped: PEFT writes both "classifier" and "score" for any head.
    """
    names = files.config.get("modules_to_save") or []
    paths = [path for path, _ in named_modules(model) if path and path.endswith(tuple(names))]
    saved = outermost_modules(model, paths)
    wanted = {f"{path}.{key}": t for path, m in saved.items() for key, t in state_of(m).items()}
    for key, tensor in wanted.items():
        if key not in others:
            raise bad_key(files, PREFIX + key, "is missing")
        if others[key].shape != tensor.shape:
            got = list(others[key].shape)
            raise bad_key(files, PREFIX + key, f"must be {list(tensor.shape)}, got {got}")
        both_float = tensor.is_floating_point() and others[key].is_floating_point()
        if not both_float and others[key].dtype != tensor.dtype:
            wanted_dtype = "floating-point" if tensor.is_floating_point() else tensor.dtype
            raise bad_key(files, PREFIX + key, f"must be {wanted_dtype}, got {others[key].dtype}")
    return saved


def unsaved(others: Mapping[str, Tensor], saved: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a file that belong to no adapter and to no module of modules_to_save."""
    own = {f"{path}.{key}" for path, module in saved.items() for key in state_of(module)}
    others = without_peft_copies(others, saved)
    return {key: tensor for key, tensor in others.items() if key not in own}


def held_biases(
    model: nn.Module,
    files: AdapterFiles,
    config: AdapterConfig,
    adapted: Collection[str],
    with_rows: Collection[str],
    others: Mapping[str, Tensor],
) -> dict[str, nn.Parameter]:
    """The model's biases that the config trains, by key in the file.

    Raises:
        ValueError: the file lacks one, or holds one of another shape.
    """
    biases = base_biases(model, config, adapted, with_rows)
    for key, bias in biases.items():
        if key not in others:
            raise bad_key(
                files,
                PREFIX + key,
                f"is missing, a bias that {files.config_path} says has been trained; set bias to "
                "'none' in that file to load the adapter without them",
            )
        if others[key].shape != bias.shape or not others[key].is_floating_point():
            got = f"{list(others[key].shape)} of {others[key].dtype}"
            raise bad_key(
                files, PREFIX + key, f"must be floating-point {list(bias.shape)}, got {got}"
            )
    return biases


def check_fit_dtypes(
    files: AdapterFiles,
    modules: Mapping[str, nn.Module],
    saved: Mapping[str, nn.Module],
    beside: Mapping[str, Tensor],
    adapters: Adapters,
    others: Mapping[str, Tensor],
) -> None:
    """Raise ValueError where a value overflows in the dtype of the tensor that it is copied to."""
    stacked = _stacked_among(modules)
    targets = [
        (f"{path_in_file(name, stacked)}.{kind}", tensor, module.lora_a.dtype)
        for name, module in modules.items()
        if isinstance(module, LowRankLinear)
        for kind, tensor in adapters[name].items()
    ]
    targets += [
        (f"{name}.{key}", others[f"{name}.{key}"], tensor.dtype)
        for name, module in saved.items()
        for key, tensor in state_of(module).items()
    ]
    targets += [(key, others[key], tensor.dtype) for key, tensor in beside.items()]
    for key, tensor, dtype in targets:
        if not is_finite(tensor.to(dtype)):
            raise bad_key(files, PREFIX + key, f"must be finite in {dtype}, as in the model")


def check_loadable(model: nn.Module, modules: Mapping[str, nn.Module], caller: str) -> None:
    for name, module in modules.items():
        if isinstance(module, LowRankLinear) and module.merged:
            raise ValueError(f"{caller}: {name} must not be merged; call unmerge first")
    check_whole(model, caller)
    offloaded = any(offload_device(module) is not None for module in model.modules())
    for name, parameter in model.named_parameters():
        key = canonical_name(model, name)
        if parameter.is_meta and not offloaded:
            raise ValueError(f"{caller}: {key} must hold values, got a meta tensor")
        if is_sharded(parameter):
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
    """Raise ValueError unless the model carries the adapters that ``config`` describes."""

    def differs(what: str, expected: object, got: object) -> ValueError:
        return ValueError(
            f"{files.caller}: {files.config_path}: {what} must be {expected!r} as in the model, "
            f"got {got!r}"
        )

    def start(of: AdapterConfig) -> str:
        return "kaiming" if of.init == "gaussian" else of.init  # they differ only before training

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


def _has_starts(method: Method, adapters: Adapters) -> bool:
    """Whether the file has the initial factors, which rebuild a residual base."""
    starts = {method.file_format.kind_of(name) for name in method.module_class.residual_starts}
    return any(not starts.isdisjoint(tensors) for tensors in adapters.values())


def _check_restarts(files: AdapterFiles, modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a file that PEFT did not convert has an adapter of a module from which
    PEFT took no initial branch."""
    for name, module in modules.items():
        family = module.family if isinstance(module, LowRankLinear) else family_of(module)
        if family != LINEAR:
            raise ValueError(
                f"{files.caller}: {files.config_path}: init_lora_weights="
                f"{quoted(files.config.get('init_lora_weights'))} is not supported over {name}, "
                f"{with_article(type(module).__name__)}, which PEFT starts otherwise; {WITH_PEFT}"
            )


def _say_differs(model: nn.Module, files: AdapterFiles) -> None:
    """Warn of modules whose branch is another one in PEFT, if the file is from there."""
    if differing := differing_in_peft(model):
        path, what = next(iter(differing.items()))
        warnings.warn(
            f"{files.caller}: PEFT {what}, here {path}: an adapter that PEFT has trained computes "
            "something else there",
            stacklevel=4,  # the caller of load_adapter
        )


@torch.no_grad()
def _fill_saved(
    model: nn.Module, saved: Mapping[str, nn.Module], values: Mapping[str, Tensor]
) -> None:
    """Copy a file's values into the modules of modules_to_save; weights whose tied partner has
    other values are untied first."""
    for key, others in ties(model, saved).items():
        if not all(o in values and torch.equal(values[o], values[key]) for o in others):
            untie(model, key, keeps_training=any(other in values for other in others))
    for name, module in saved.items():
        for key, tensor in state_of(module).items():
            tensor.copy_(values[f"{name}.{key}"])
