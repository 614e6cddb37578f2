"""Turns a decoder-only model into a recursive one: tied weights, an adapter per loop and linear."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_ext.adapt_warnings import has_optimizer
from lowrank_ext.checks import matches_names, matching_pattern
from lowrank_ext.config import ALL_LINEAR
from lowrank_ext.left_out import readers
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.model import is_recursive, make_recursive
from lowrank_ext.methods.recursive.norm_gains import gain_of, norms_before_linears
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear, svd_factors, zero_factors
from lowrank_ext.methods.recursive.source_checks import check_bare, check_linears, check_tensors
from lowrank_ext.methods.recursive.structure import (
    Decoder,
    check_like_layers,
    chosen_layer,
    find_decoder,
    parameters_of,
    slots_of,
)

Model = TypeVar("Model", bound=nn.Module)
# Called with the number of layers that are done, and of all.
OnLayer = Callable[[int, int], object]
# Adapters by path in a layer: lora_a, lora_b.
Factors = dict[str, tuple[Tensor, Tensor]]


@torch.inference_mode(False)  # whose tensors could not train
@torch.no_grad()
def convert(model: Model, config: RecursiveConfig, *, on_layer: OnLayer | None = None) -> Model:
    """Fold the L layers of ``model`` into a block of K = L / num_loops layers that runs num_loops
    times.

        layer l = loop l // K, position l mod K;     W_l -> W'_k + lora_b_l lora_a_l

    All parameters of a layer are tied over the loops, norm gains and biases too; embedding, final
    norm and head stay. lora_b lora_a diag(g'_k) is the best approximation of
    W_l diag(g_l) - W'_k diag(g'_k), where g is the gain of the norm that the linear reads, 1 if it
    reads none. Full rank is therefore the source model where those norms have no bias or equal
    gains, and all other gains and biases are equal in tied layers. Where that difference is exactly
    zero, and with lora_init="zero", lora_a is Gaussian (torch's default generator) and lora_b zero.

    The model is changed in place. It keeps its class (a subclass of it is set), so that
    ``generate``, Trainer and ``save_pretrained`` work; ``lowrank_ext.recursive.load`` reads what
    was saved. The cache has an entry for each loop and position, at index loop · K + position.

    Args:
        model: a decoder-only transformers model with a head: a list of like layers, found by
            structure.
        config: see ``RecursiveConfig``.
        on_layer: called after each layer with the numbers of layers done and of all; the singular
            value decompositions of a large model take a while.

    Returns:
        The model.

    Raises:
        TypeError: the model is none of these.
        ValueError: num_loops does not divide its layers; layers that are to be tied differ in
            shape, dtype or device, are quantized, or share parameters already; adapters are asked
            for that no linear can have, or over a linear with hooks; a weight is not finite; or the
            model is wrapped, adapted, or recursive already. It has not been changed.

    Warns of an optimizer made before, and of linears whose weight their owner may read without a
    call, where adapters do not act.

    Examples:
        >>> lr.recursive.convert(model, lr.recursive.RecursiveConfig(num_loops=2, rank=64))

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), section 2; there
    the difference is W_l - W'_k.
    """
    caller = "convert"
    if not isinstance(config, RecursiveConfig):
        raise TypeError(f"{caller}: config must be a RecursiveConfig, got {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    if is_recursive(model):
        raise ValueError(f"{caller}: model must not be recursive already; unshare it first")
    check_bare(model, caller)
    decoder = find_decoder(model, caller)
    check_tensors(decoder, caller)
    check_like_layers(decoder, config.num_loops, config.init, caller)
    check_targets(decoder, config, caller)
    for text in _warnings(model, check_linears(decoder, config, caller)):
        warnings.warn(f"{caller}: {text}", stacklevel=2)
    length = decoder.num_layers // config.num_loops
    tied = [_tied_start(decoder, config, position) for position in range(length)]
    norms = norms_before_linears(decoder) if config.starts_from_svd else {}
    factors: list[Factors] = []
    for index, layer in enumerate(decoder.layers):
        factors.append(_start(layer, tied[index % length], config, norms))
        if on_layer is not None:
            on_layer(index + 1, decoder.num_layers)
    fold(decoder, config, tied, factors)
    return model


def _warnings(model: nn.Module, targets: dict[str, nn.Module]) -> Iterator[str]:
    read = readers(model) if targets else {}
    for path, module in targets.items():
        if module in read:
            yield (
                f"the adapter of {path} does not act where {read[module].function} reads the "
                "weight without a call, and so on for its like; leave such linears out of targets"
            )
            break
    if has_optimizer(model):
        yield (
            "an optimizer holds parameters of the model, whose layers get new ones; make it after "
            "convert"
        )


def check_targets(decoder: Decoder, config: RecursiveConfig, caller: str) -> None:
    """Raise ValueError where the config asks for adapters that no linear of any layer gets."""
    if not config.is_relaxed:
        return
    linears = {path: m for layer in decoder.layers for path, m in linears_of(layer).items()}
    if not linears:
        raise ValueError(
            f"{caller}: rank must be 0 for a model whose layers have no nn.Linear (transformers' "
            f"Conv1D gets no adapters of loops), got {config.rank!r}"
        )
    shown = f"linears of a layer: {', '.join(linears)}"
    targets = () if isinstance(config.targets, str) else config.targets
    ranks = config.rank if isinstance(config.rank, Mapping) else ()
    unused = {
        "targets": [n for n in targets if not any(matches_names(path, [n]) for path in linears)],
        "rank": [n for n in ranks if not any(matching_pattern([n], path) for path in linears)],
    }
    for option, names in unused.items():
        if names:
            raise ValueError(f"{caller}: {option} must name linears, got {names[0]!r}; {shown}")
    if not any(config.rank_for(path, m.in_features, m.out_features) for path, m in linears.items()):
        raise ValueError(
            f"{caller}: targets and rank must select a linear, got targets={config.targets!r} and "
            f"rank={config.rank!r}; a string is {ALL_LINEAR!r} or one regular expression for the "
            f"whole path, names go into a list; {shown}"
        )


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The nn.Linears of a layer, by path."""
    return {path: m for path, m in layer.named_modules() if type(m) is nn.Linear}


@torch.no_grad()
def _tied_start(
    decoder: Decoder, config: RecursiveConfig, position: int
) -> dict[str, nn.Parameter]:
    """The tied parameters of a position, by name in the layer."""
    length = decoder.num_layers // config.num_loops
    own = parameters_of(decoder.layers[position])
    if config.init == "average":
        sharing = [parameters_of(layer) for layer in decoder.layers[position::length]]
        values = {name: _mean([each[name] for each in sharing]) for name in own}
    else:
        index = chosen_layer(config.init, position, length, decoder.num_layers)
        values = {
            name: parameter.detach().clone()
            for name, parameter in parameters_of(decoder.layers[index]).items()
        }
    return {name: nn.Parameter(values[name], own[name].requires_grad) for name in own}


def _mean(tensors: list[Tensor]) -> Tensor:
    """In fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(wide)
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)


@torch.no_grad()
def _start(
    layer: nn.Module,
    tied: dict[str, nn.Parameter],
    config: RecursiveConfig,
    norms: dict[str, str],
) -> Factors:
    """The adapters of a layer at first. ``norms``: see ``norms_before_linears``."""
    factors = {}
    for path, linear in linears_of(layer).items():
        r = config.rank_for(path, linear.in_features, linear.out_features)
        if r == 0:
            continue
        weight = tied[f"{path}.weight"]
        found = _svd_start(layer, path, tied, norms, r) if config.starts_from_svd else None
        factors[path] = zero_factors(weight, r) if found is None else found
    return factors


def _svd_start(
    layer: nn.Module, path: str, tied: dict[str, nn.Parameter], norms: dict[str, str], r: int
) -> tuple[Tensor, Tensor] | None:
    """lora_a and lora_b whose product, times diag(g'), is the best approximation of
    W_l diag(g_l) - W' diag(g'): of what the linear makes of a norm's normalized input. The gains
    are 1 where no norm is read. None where the difference is exactly zero."""
    own, shared = linears_of(layer)[path].weight, tied[f"{path}.weight"]
    wide = torch.promote_types(own.dtype, torch.float32)
    gain = shared_gain = torch.ones(own.shape[1], dtype=wide, device=own.device)
    if path in norms:
        norm = layer.get_submodule(norms[path])
        parameters = dict(norm.named_parameters())
        gain = gain_of(norm, parameters)
        shared_gain = gain_of(norm, {name: tied[f"{norms[path]}.{name}"] for name in parameters})
        # The adapter makes up for a gain that is too small, but not for none: lora_a is over it.
        largest = torch.finfo(own.dtype).max
        least = (1e-6 * shared_gain.abs().max()).clamp_min(2 / largest)
        is_none = shared_gain.abs() <= least
        gain, shared_gain = gain.where(~is_none, least), shared_gain.where(~is_none, least)
    residual = own.to(wide) * gain - shared.to(wide) * shared_gain
    if not residual.any():
        return None
    lora_a, lora_b = svd_factors(residual, r, wide)
    return (lora_a / shared_gain).to(own.dtype), lora_b.to(own.dtype)


def fold(
    decoder: Decoder,
    config: RecursiveConfig,
    tied: list[dict[str, nn.Parameter]],
    factors: list[Factors],
) -> None:
    """Give every layer the tied parameters of its position and its own adapters."""
    length = decoder.num_layers // config.num_loops
    for index, layer in enumerate(decoder.layers):
        for name, (module, attribute) in slots_of(layer).items():
            module._parameters[attribute] = tied[index % length][name]
        linears = linears_of(layer)
        for path, (lora_a, lora_b) in factors[index].items():
            linear = linears[path]
            bias: nn.Parameter | None = linear.bias
            weight: Any = linear.weight
            relaxed = RelaxedLinear(weight, bias, lora_a, lora_b, index // length)
            relaxed.train(linear.training)
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, relaxed)
    make_recursive(decoder, config, tied)
