"""What a model must be for an engine, which runs the rows of all loops through one block."""

from typing import Any

import torch
from torch import nn

from lowrank_ext.methods.recursive.model import Loops
from lowrank_ext.nn.autocast import autocast_dtype

# Fields of a generation_config by which generate changes logits, and the values that leave them.
_PROCESSORS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "watermarking_config": (None,),
    "num_beams": (None, 1),
}
# Settings that layers of one position have each of their own, or that change nothing for an engine.
_FREE = ("layer_idx", "training", "loop", "gradient_checkpointing", "_is_full_backward_hook")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unused_settings(model: Any) -> list[str]:
    """What ``generate`` would apply and an engine does not: one text, or none."""
    config = getattr(model, "generation_config", None)
    used = {
        name: value
        for name, neutral in _PROCESSORS.items()
        if (value := getattr(config, name, None)) not in neutral
    }
    if not used:
        return []
    shown = ", ".join(f"{name}={value!r}" for name, value in used.items())
    return [f"generate would apply {shown} of the model's generation_config, the engine does not"]


def check_no_autocast(device: torch.device, caller: str) -> None:
    """Raise RuntimeError under autocast: the cache has the dtype of the model."""
    if autocast_dtype(device) is not None:
        raise RuntimeError(f"{caller}: autocast must be off; cast the model to the dtype instead")


def check_config(config: Any, loops: Loops, caller: str) -> None:
    """Raise ValueError for what the engine cannot do with any rows side by side."""
    for name, value in (("is_causal", True), ("use_bidirectional_attention", False)):
        if getattr(config, name, value) not in (value, None):
            raise ValueError(
                f"{caller}: attention must look back only, got {name}={getattr(config, name)!r}"
            )
    types = getattr(config, "layer_types", None)
    if types is not None:
        first = list(types[: loops.length])
        for loop in range(loops.num_loops):
            own = list(types[loop * loops.length : (loop + 1) * loops.length])
            if own != first:
                raise ValueError(
                    f"{caller}: layers of one position must have one kind of attention, got "
                    f"{first} in loop 0 and {own} in loop {loop}; choose a num_loops whose block "
                    "holds whole periods"
                )
        for kind in set(types):
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"{caller}: layers must have attention over a cache, got {kind!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"{caller}: rotary angles must not depend on the length of other rows, got "
                f"rope_type={each['rope_type']!r}"
            )


def check_no_hooks(modules: list[Any]) -> None:
    """Raise ValueError for hooks inside of layers: a module runs the rows of all loops there."""
    for module in modules:
        if _hooks(module):
            raise ValueError(
                "DepthwiseEngine: modules inside of layers must have no hooks, got some on a "
                f"{type(module).__name__}"
            )


def check_like(modules: list[Any]) -> None:
    """Raise ValueError where modules of one position have settings of their own: one of them runs
    the rows of all loops."""
    first = modules[0]
    for module in modules:
        if vars(module).get("is_causal") is False:
            raise ValueError(
                f"DepthwiseEngine: attention must look back only, got {type(module).__name__} with "
                "is_causal=False"
            )
    for other in modules[1:]:
        for name, value in _settings(first).items():
            if vars(other).get(name) != value:
                raise ValueError(
                    f"DepthwiseEngine: {type(first).__name__}.{name} must be the same in all "
                    f"loops, got {value!r} and {vars(other).get(name)!r}"
                )


def parts_of(model: nn.Module, layers: str) -> dict[str, tuple[object, ...]]:
    """Each module with the addresses of its own parameters, by path; below ``layers``, the path of
    the list of layers, also with its settings and hooks, of which the engine has made copies."""
    found: dict[str, tuple[object, ...]] = {}
    for path, module in model.named_modules():
        own = {k: p.data_ptr() for k, p in module._parameters.items() if p is not None}
        inside = path.startswith(f"{layers}.")
        found[path] = (module, own, *((_settings(module), _hooks(module)) if inside else ()))
    return found


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name not in _FREE
    }


def _hooks(module: nn.Module) -> int:
    return sum(len(vars(module)[name]) for name in _HOOKS)
