"""Merge the adapters of a model into its weights, take them out again, or remove them."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_ext.adapt import adapted_modules, replace_modules, set_fused_encoders
from lowrank_ext.adapter_protocol import leave_protocol
from lowrank_ext.nn.adapted_experts import places_of_adapters
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.quantized import is_quantized, way_out
from lowrank_ext.nn.token_rows import TiedTokenRows, TokenRows
from lowrank_ext.targets import shared_tensors
from lowrank_ext.wrappers import named_modules, unwrapped

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """W ← round(fp32(W) + scaling · lora_b core lora_a) in every adapted module; returns the model.

    Modules that are merged already stay as they are.

    Raises:
        ValueError: the model carries no adapters, a weight shares memory with a tensor of another
            module, which would change with it, or no longer shares it with one that computes with
            its trained rows, has no values (on the meta device, or offloaded by
            accelerate), a merged weight would hold inf or nan (a branch too large for float16), or
            the model is inside of a block of ``disable_adapter``.
        TypeError: a base does not compute x weightᵀ + bias with a floating-point weight, or a
            module's branch is no single matrix (GOAT: its experts are chosen by the input).

    Where one module raises, all weights have the bits that they had before.
    """
    merge_all(model, adapted_modules(model, "merge"), "merge")
    return model


def unmerge(model: Model) -> Model:
    """Give every merged module its weight back, bit for bit; returns the model.

    Raises:
        ValueError: the model carries no adapters.
    """
    for module in adapted_modules(model, "unmerge").values():
        module.unmerge()
    return model


def unload(model: Model, merge: bool | None = None) -> Model:
    """Put plain modules back in place of the adapted ones; returns the model.

    Args:
        merge: True keeps the adapters' effect, merging what is not merged yet. False drops it, of
            merged modules too: ties and weights are as before ``adapt``, with a residual init to
            one rounding of their dtype. None, the default, keeps the model's outputs where it is
            merged (``merge(model); unload(model)``) and drops adapters that are not merged.

    With ``merge=True`` a base that bitsandbytes or torchao has quantized becomes a dense nn.Linear,
    of the dtype of the model's embeddings: its weight is taken dense, and the branch added.

    Modules of modules_to_save, and biases that trained, keep what they have learned. Parameters
    stay frozen as ``adapt`` left them. A single adapted module yields its plain module.

    Raises:
        ValueError: ``merge`` is None and only some of the modules are merged, or the model is
            inside of a block of ``disable_adapter``.
        ValueError, TypeError: as ``merge``.
    """
    modules = adapted_modules(model, "unload")
    if any(module.blocks for module in modules.values()):
        raise ValueError(
            "unload: model must have its adapters switched on, got one inside of a block of "
            "lr.disable_adapter; unload after it"
        )
    keep = _all_merged(modules) if merge is None else merge
    quantized = {p: m for p, m in modules.items() if keep and _is_quantized(m)}
    plain: dict[nn.Module, nn.Module] = {
        m: m.to_linear(True, dense_dtype(model)) for m in quantized.values()
    }
    if keep:
        merge_all(model, {p: m for p, m in modules.items() if p not in quantized}, "merge")
    places = places_of_adapters(model)
    plain |= {places.get(m, m): m.to_linear(keep) for p, m in modules.items() if p not in quantized}
    if model in plain:
        return plain[model]  # type: ignore[return-value]  # the caller passed a LowRankLinear
    for module_class in {type(module) for module in modules.values()}:
        module_class.disconnect(model)
    replace_modules(model, plain)
    set_fused_encoders(model, on=True)
    if quantized or _was_read_dense(model):
        forget_quantization(model)
    for name in ("lowrank_config", "lowrank_embeddings"):
        vars(unwrapped(model)).pop(name, None)
    leave_protocol(model)
    return model


def _is_quantized(module: LowRankLinear | TokenRows) -> bool:
    return module.base_layer is not None and is_quantized(module.base_layer)


def dense_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which the model's quantized linears get their inputs: that of its embeddings, or
    of its first parameter that is a plain floating-point one."""
    inner: Any = unwrapped(model)
    found = [p for p in inner.parameters() if type(p) is nn.Parameter and p.is_floating_point()]
    get = getattr(inner, "get_input_embeddings", None)
    embeddings = get() if callable(get) else None
    weight = getattr(embeddings, "weight", None)
    if weight is not None and weight.is_floating_point():
        found = [weight, *found]
    return found[0].dtype if found else torch.get_default_dtype()


def forget_quantization(model: nn.Module) -> None:
    """Have transformers take for dense a model in which nothing is quantized any more."""
    inner: Any = unwrapped(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None and not any(is_quantized(module) for module in inner.modules()):
        quantizer.remove_quantization_config(inner)


def _was_read_dense(model: nn.Module) -> bool:
    """Whether transformers has made dense weights of a GGUF file; it would still refuse to save
    them. Packed ones are bytes."""
    quantizer = getattr(unwrapped(model), "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    tensors = (*model.parameters(), *model.buffers())
    return method == "gguf" and not any(tensor.dtype == torch.uint8 for tensor in tensors)


def _all_merged(modules: Mapping[str, LowRankLinear | TokenRows]) -> bool:
    """Whether all are merged, or none; ValueError where only some are."""
    merged = [path for path, module in modules.items() if module.merged]
    if 0 < len(merged) < len(modules):
        raise ValueError(
            f"unload: model must be merged as a whole or not at all, got {len(merged)} of "
            f"{len(modules)} modules merged, {merged[0]} among them; give merge=True, which keeps "
            "all adapters, or merge=False, which drops all"
        )
    return bool(merged)


def merge_all(
    model: nn.Module, modules: Mapping[str, LowRankLinear | TokenRows], caller: str
) -> None:
    """Merge what is not merged yet: all of it, or on any error nothing."""
    check_mergeable(model, modules, caller)
    new = {path: module for path, module in modules.items() if not module.merged}
    try:
        for path, module in new.items():
            _merge_one(path, module, caller)
    except BaseException:
        for module in reversed(new.values()):
            module.unmerge()
        raise


def _merge_one(path: str, module: LowRankLinear | TokenRows, caller: str) -> None:
    try:
        module.merge()
    except ValueError as error:
        raise ValueError(f"{caller}: {path or 'the model'}: {error}") from None


def check_mergeable(
    model: nn.Module, modules: Mapping[str, LowRankLinear | TokenRows], caller: str
) -> None:
    """Raise where a module that is not merged yet cannot be."""
    modules = {path: module for path, module in modules.items() if not module.merged}
    for path, module in modules.items():
        if module.unmergeable_because:
            raise TypeError(
                f"{caller}: {path or 'the model'} must have a branch that is one matrix, got a "
                f"{type(module).__name__}: {module.unmergeable_because}"
            )
        try:
            module.check_mergeable()
        except ValueError as error:
            raise ValueError(f"{caller}: {path or 'the model'}: {error}") from None
    owners = {m if m.base_layer is None else m.base_layer: p for p, m in modules.items()}
    weights: dict[nn.Module, Tensor] = {}
    biases: dict[nn.Module, Tensor] = {}
    for owner, path in owners.items():
        module = modules[path]
        weight, bias = module.mergeable_parameter, module.base_bias
        if weight is None:
            raise TypeError(
                f"{caller}: the base of {path} must compute x weightᵀ + bias with a floating-point "
                f"weight, got {type(owner).__name__}{way_out(owner)}"
            )
        weights[owner] = weight
        if module.branch_bias() is not None and bias is not None:
            biases[owner] = bias
    together = _tied_rows(model)
    for what, changed in (("weight", weights), ("bias", biases)):
        for owner, names in shared_tensors(model, changed).items():
            own = modules[owners[owner]]
            if what == "weight":
                apart = [name for name, rows in together.items() if rows is own]
                _check_still_tied(owners[owner], set(apart) - set(names), caller)
            others = [name for name in names if together.get(name) is not own]
            if others:
                raise ValueError(
                    f"{caller}: the {what} of {owners[owner] or 'the model'} must be its own, got "
                    f"one tied to {', '.join(others)}, which would change with it; clone one of "
                    "them"
                )


def _check_still_tied(path: str, apart: Collection[str], caller: str) -> None:
    """Raise ValueError where modules that compute with the rows of ``path`` have other weights,
    into which its merge would not write."""
    if apart:
        raise ValueError(
            f"{caller}: {', '.join(sorted(apart))} must be the weight of {path}, whose rows that "
            "module computes with, got another one, as load_state_dict with assign=True leaves it; "
            "tie them again, with tie_weights() of the model"
        )


def _tied_rows(model: nn.Module) -> dict[str, TokenRows]:
    """By the names of weights that a TokenRows changes for modules tied to its own: that one."""
    tied = ((path, m) for path, m in named_modules(model) if isinstance(m, TiedTokenRows))
    return {f"{path}.base_layer.weight": module.owner for path, module in tied}
