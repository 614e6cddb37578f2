"""Model surgery: replaces modules of a model by low-rank modules."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lowrank_ext.adapt_warnings import adapt_warnings
from lowrank_ext.adapter_protocol import follow_protocol
from lowrank_ext.base_biases import base_biases
from lowrank_ext.config import ALL_LINEAR, AdapterConfig, config_names
from lowrank_ext.left_out import LeftOut, left_out
from lowrank_ext.nn.adapted_experts import adapted_experts
from lowrank_ext.nn.base_layer import (
    adapter_dtype_for,
    computes_its_weight,
    dense_weight,
    features_of,
    offload_device,
)
from lowrank_ext.nn.experts import StackedLinear
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.multi import MultiLoRALinear
from lowrank_ext.nn.quantized import keep_unpacked
from lowrank_ext.nn.token_rows import TokenRows
from lowrank_ext.registry import Method, method_of
from lowrank_ext.targets import (
    find_targets,
    is_from_peft,
    modules_named,
    new_heads,
    outermost_modules,
    shared_tensors,
)
from lowrank_ext.ties import check_ties
from lowrank_ext.token_targets import token_modules, token_targets
from lowrank_ext.wrappers import check_may_change, named_modules, replace_wrapped, unwrapped

_ADAPTED = (LowRankLinear, MultiLoRALinear)
# A rank that is allowed over a module of any size; larger ones must not exceed its features.
_ANY_RANK = 512
# Switches of torch's fused eval path of transformers, which reads weights without calling linears.
_FUSED_FLAGS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}

Model = TypeVar("Model", bound=nn.Module)


def adapt(model: Model, config: AdapterConfig, *, initialize: bool = True) -> Model:
    """Replace the modules ``config`` names by adapted ones, in place, and freeze everything else.

    Afterwards only the trainable tensors of the adapters, ``modules_to_save`` and the biases that
    the config trains require gradients.
    The heads of transformers' models for classification, question answering and multiple choice are
    added to ``modules_to_save`` unless the config names them: they are new for each task.
    The output is the base model's, bit for bit where the branch starts at zero (with GOAT's SVD
    inits on average only, see GOATConfig). A module registered at several paths is adapted once and
    stays shared; tied weights stay tied. The config, with the ranks that LaMDA++ found, is kept as
    ``model.lowrank_config``. torch's fused eval path of nn.TransformerEncoderLayer, which would
    bypass the adapters, is switched off in adapted layers. Over weights that accelerate offloads
    the adapters lie on the device that computes; a model on the meta device is adapted there.

    Args:
        model: any torch or transformers model; returned.
        config: the method's, such as ``LoRAConfig``.
        initialize: False leaves the adapters at zero and the base untouched, for a loader that
            fills them.

    Raises:
        TypeError: model or config has the wrong type, or the model is itself a module to adapt.
        ValueError: a name matches nothing, a module cannot be adapted with these options,
            bitsandbytes computes wrong values of a 4-bit weight (on a CPU, in_features a multiple
            of 16 and no whole blocks), a token of trainable_token_indices has no row of its own, a
            weight that an init would change is tied to another module, a weight that an init or
            modules_to_save needs is offloaded, a weight of modules_to_save is tied to one that is
            not saved, or the model carries adapters already. All of this is checked before the
            first change.

    Warns of what would be missed otherwise: weights that "all-linear" leaves out (experts stacked
    in one parameter, nn.MultiheadAttention, recurrent layers, modules whose owner reads the weight
    and never calls them), adapters that do
    not act in some path, ranks above min(in_features, out_features), an optimizer made before.

    Examples:
        >>> model = adapt(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    """
    method = _checked_method(model, config)
    if initialize:
        saved = (*config.modules_to_save, *new_heads(model, config))
        config = replace(config, modules_to_save=saved)
    targets = find_targets(model, config, families=method.classes)
    missing = _missing(model, targets) if initialize and config.target_modules == ALL_LINEAR else []
    if initialize:
        targets = _called(targets, missing)
        check_ranks(config, targets)
    config = method.complete_config(model, config, targets)
    check_options(model, config, method, targets)
    check_values(model, config, method, targets)
    taken = {*targets.values(), *modules_named(model, config.modules_to_save)}
    tokens = token_targets(model, config, taken, "adapt")
    if tokens.tokens:
        exact: dict[str, Any] = {"trainable_token_indices": tokens.indices}
        config = replace(config, **exact)
    if initialize:
        check_ties(model, outermost_modules(model, config.modules_to_save), "adapt")
        for text in list(adapt_warnings(model, config, targets, missing)):
            warnings.warn(f"adapt: {text}", stacklevel=2)
    keep_unpacked(model, "adapt")
    model.requires_grad_(False)
    new = _replacements(method, config, targets, initialize)
    replace_modules(model, new | token_modules(model, tokens, config))
    method.module_class.connect(model)
    _unfreeze(model, config, targets)
    set_fused_encoders(model, on=False)
    unwrapped(model).lowrank_config = config  # type: ignore[assignment]
    follow_protocol(model)
    return model


def _missing(model: nn.Module, targets: Mapping[str, nn.Module]) -> list[LeftOut]:
    """What "all-linear" leaves out and target_parameters do not name."""
    chosen = {id(t.weight) for t in targets.values() if isinstance(t, StackedLinear)}
    rest = [
        each._replace(weights=[weight for weight in each.weights if id(weight) not in chosen])
        for each in left_out(model)
    ]
    return [each for each in rest if each.weights]


def _replacements(
    method: Method, config: AdapterConfig, targets: Mapping[str, nn.Module], initialize: bool
) -> dict[nn.Module, nn.Module]:
    """The adapted module in place of each target, whose random numbers are drawn in this order."""
    adapters = {
        target: method.class_for(target).from_linear(
            target, config.for_module(path), initialize=initialize
        )
        for path, target in targets.items()
    }
    stacked = {target: a for target, a in adapters.items() if isinstance(target, StackedLinear)}
    linear = {target: a for target, a in adapters.items() if target not in stacked}
    return {**linear, **adapted_experts(stacked)}


def lowrank_modules(model: nn.Module, caller: str) -> dict[str, LowRankLinear]:
    """Path and module of every adapter of the model.

    Raises:
        ValueError: the model has no adapter.
    """
    if any(is_from_peft(module) for _, module in named_modules(model)):
        raise ValueError(
            f"{caller}: model must carry adapters of lr.adapt, got a {type(model).__name__} with "
            "some of PEFT; use PEFT's own functions (merge_adapter, unmerge_adapter, "
            "merge_and_unload, unload, `with model.disable_adapter():`, save_pretrained)"
        )
    modules = {path: m for path, m in named_modules(model) if isinstance(m, LowRankLinear)}
    if not modules:
        for path, module in named_modules(model):
            if isinstance(module, MultiLoRALinear):
                raise ValueError(
                    f"{caller}: model must carry adapters of adapt, got a MultiLoRALinear at "
                    f"{path or 'the model itself'}, whose adapters are chosen for each row and "
                    "never become a part of the weight; use what made it, an AdapterBank or a "
                    "GuardModel"
                )
        raise ValueError(
            f"{caller}: model must carry adapters, got a {type(model).__name__} with none"
        )
    return modules


def adapted_modules(model: nn.Module, caller: str) -> dict[str, LowRankLinear | TokenRows]:
    """Path and module of every adapter of the model, and of embeddings of which rows train.

    Raises:
        ValueError: the model has no adapter.
    """
    return {**lowrank_modules(model, caller), **token_rows_of(model)}


def token_rows_of(model: nn.Module) -> dict[str, TokenRows]:
    """Path and module of every TokenRows of the model."""
    return {path: m for path, m in named_modules(model) if isinstance(m, TokenRows)}


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one is registered in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                replace_wrapped(parent, name, replacements[child])


def set_fused_encoders(model: nn.Module, on: bool) -> None:
    """Switch torch's fused encoder path off where it contains adapters, or on again everywhere."""
    for module in model.modules():
        flag = next((f for cls, f in _FUSED_FLAGS.items() if isinstance(module, cls)), None)
        kept: dict[str, Any] = vars(module)
        if flag is None or (not on and not any(isinstance(m, _ADAPTED) for m in module.modules())):
            continue
        if on and "fused_path_before_adapt" in kept:
            kept[flag] = kept.pop("fused_path_before_adapt")
        elif not on:
            kept["fused_path_before_adapt"], kept[flag] = kept[flag], 0


def _checked_method(model: nn.Module, config: AdapterConfig) -> Method:
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model must be a torch.nn.Module, got {type(model).__name__}")
    method = method_of(config) if isinstance(config, AdapterConfig) else None
    if method is None:
        peft = any(cls.__module__.startswith("peft.") for cls in type(config).__mro__)
        way_out = " of PEFT; its fields are in docs/coming_from_peft.md" if peft else ""
        raise TypeError(
            f"adapt: config must be a {config_names()}, got {type(config).__name__}{way_out}"
        )
    check_may_change(model, "adapt")
    for path, module in named_modules(model):
        where = path or "the model itself"
        if isinstance(module, _ADAPTED):
            raise ValueError(
                f"adapt: model must not be adapted yet, got a {type(module).__name__} at {where}; "
                "use unload first"
            )
        if is_from_peft(module):
            raise ValueError(
                f"adapt: model must carry no PEFT adapter, got peft's "
                f"{type(module).__qualname__} at {where}; pass the base model"
            )
    return method


def _called(targets: Mapping[str, nn.Module], missing: Sequence[LeftOut]) -> dict[str, nn.Module]:
    """The targets without those that "all-linear" finds but whose owners never call them."""
    never = {each.module for each in missing}
    called = {path: module for path, module in targets.items() if module not in never}
    if not called:
        raise ValueError(
            f"adapt: target_modules must leave a linear module that is called, got {ALL_LINEAR!r} "
            f"with {', '.join(targets)}, of which only weights are read"
        )
    return called


def check_ranks(config: AdapterConfig, targets: Mapping[str, nn.Module]) -> None:
    """Raise where an adapter would be larger than any use of it."""
    for path, module in targets.items():
        limit = max(*(features_of(module) or ()), _ANY_RANK)
        if config.rank_for(path) > limit:
            raise ValueError(
                f"adapt: {path}: r must be at most max(in_features, out_features, {_ANY_RANK}) = "
                f"{limit}, got {config.rank_for(path)}"
            )


def check_options(
    model: nn.Module,
    config: AdapterConfig,
    method: Method,
    targets: Mapping[str, nn.Module],
) -> None:
    """Raise where a module could not be built, or where its init would change a tied weight."""
    by_svd = config.init in method.module_class.svd_inits
    residual = config.init in method.module_class.residual_inits
    weights = {m: w for m in targets.values() if (w := dense_weight(m)) is not None}
    shared = shared_tensors(model, weights) if residual else {}
    for path, module in targets.items():
        features = features_of(module)
        assert features is not None  # find_targets returns only modules with features
        weight = weights.get(module)
        module_class = method.class_for(module)
        try:
            module_class.check_base(module, config)
            module_class.check_fits(*features, config.for_module(path))
            adapter_dtype_for(
                None if weight is None else weight.dtype,
                config.adapter_dtype,
                module_class.__name__,
            )
        except ValueError as error:
            raise ValueError(f"adapt: {path}: {error}") from None
        if by_svd and not computes_its_weight(module):
            raise ValueError(
                f"adapt: {path}: init must be one without an SVD of the base weight for a "
                f"{type(module).__name__} that is not x weightᵀ + bias, got {config.init!r}"
            )
        if by_svd and weight is not None and not (weight.is_meta or torch.isfinite(weight).all()):
            raise ValueError(
                f"adapt: {path}: weight must be finite for init={config.init!r}, got inf or nan"
            )
        if shared.get(module):
            raise ValueError(
                f"adapt: {path}: init={config.init!r} would change the weight, which is tied to "
                f"{', '.join(shared[module])}; exclude the module or use an init that leaves the "
                "base alone"
            )


def check_values(
    model: nn.Module,
    config: AdapterConfig,
    method: Method,
    targets: Mapping[str, nn.Module],
) -> None:
    """Raise where a weight without values, offloaded by accelerate, would be read or trained.

    A model that is on the meta device as a whole is adapted there.
    """
    offloads = any(offload_device(module) is not None for module in model.modules())
    if not offloads and all(parameter.is_meta for parameter in model.parameters()):
        return
    for path, target in targets.items():
        module = target.experts if isinstance(target, StackedLinear) else target
        if not any(parameter.is_meta for parameter in module.parameters()):
            continue
        if offload_device(module) is None:
            raise ValueError(
                f"adapt: {path}: the weight must hold values or have a hook of its own that loads "
                "them, got a meta tensor; load the whole model, or offload it with "
                "accelerate.cpu_offload(model)"
            )
        if config.init in method.module_class.svd_inits:
            raise ValueError(
                f"adapt: {path}: init must be one without an SVD of the base weight where that is "
                f"offloaded, got {config.init!r}; adapt the model before it is offloaded"
            )
    for path, module in outermost_modules(model, config.modules_to_save).items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"adapt: modules_to_save must hold their values, got {path}, which is offloaded "
                "and would not train; leave it on a device"
            )


def _unfreeze(model: nn.Module, config: AdapterConfig, adapted: Collection[str]) -> None:
    for bias in base_biases(model, config, adapted).values():
        bias.requires_grad_()
    if not config.whole_modules_train:
        return
    for module in modules_named(model, config.modules_to_save):
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_()
