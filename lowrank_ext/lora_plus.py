"""LoRA+: a larger learning rate for lora_b than for lora_a."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lowrank_ext.checks import check_number
from lowrank_ext.nn.base_layer import EMBEDDING
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.wrappers import named_modules

_CALLER = "lora_plus_groups"


def lora_plus_groups(
    model: nn.Module,
    *,
    lr: float,
    ratio: float,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ for any optimizer of torch: lora_b learns ``ratio`` times as fast.

        lr           lora_a, matrices between the factors, whole modules (modules_to_save)
        lr · ratio   lora_b, and all vectors: biases, magnitudes, norms
        embedding_lr adapters of embeddings

    The groups of PEFT's ``create_loraplus_optimizer``. Every parameter that requires a gradient is
    in exactly one of them; empty ones are left out.

    Args:
        model: adapted by ``adapt`` or ``load_adapter``, or a PEFT model of LoRA or of any method of
            this library.
        lr: the learning rate of lora_a.
        ratio: that of lora_b is ``lr * ratio``; the paper's experiments use 2 to 16.
        weight_decay: of all but biases and LayerNorms; an RMSNorm decays, as in PEFT.
        embedding_lr: the learning rate of adapters of embeddings.

    Returns:
        Dicts with ``params``, ``lr`` and ``weight_decay``. A scheduler scales all of them alike.

    Raises:
        TypeError: model is no nn.Module, or a number is none.
        ValueError: a number is out of range, or no lora_b of the model trains.

    Examples:
        >>> groups = lr.lora_plus_groups(model, lr=1e-4, ratio=16)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> trainer = Trainer(model, arguments, optimizers=(optimizer, None), ...)
        >>> options = {"params": groups, "lr": 1e-4}
        >>> trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=(AdamW, options), ...)

    Source: LoRA+, Hayou et al. 2024 (arXiv 2402.12354).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_number(lr, _CALLER, "lr", positive=True)
    check_number(ratio, _CALLER, "ratio", positive=True)
    check_number(weight_decay, _CALLER, "weight_decay")
    check_number(embedding_lr, _CALLER, "embedding_lr")
    kinds: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "undecayed": []}
    trains_lora_b = False
    for path, name, module, parameter in _trained(model):
        kind = _kind(path, name, module, parameter)
        kinds[kind].append(parameter)
        trains_lora_b |= _is_lora_b(path, name)
    if not trains_lora_b:
        raise ValueError(
            f"{_CALLER}: model must have a lora_b that trains, got a {type(model).__name__} with "
            "none; adapt it first, and call this before DDP or FSDP wrap it"
        )
    rates = {"a": lr, "embedding": embedding_lr, "b": lr * ratio, "undecayed": lr * ratio}
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": 0.0 if kind == "undecayed" else weight_decay,
        }
        for kind, parameters in kinds.items()
        if parameters
    ]


def _trained(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Path and name, module and value of each parameter that trains, once."""
    seen: set[int] = set()
    for path, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, name, module, parameter


def _kind(path: str, name: str, module: nn.Module, parameter: torch.Tensor) -> str:
    if _is_of_embedding(path, module):
        return "embedding"
    if not _is_lora_b(path, name) and parameter.dim() > 1:
        return "a"
    # PEFT's test, by which other norms, such as RMSNorm, decay.
    undecayed = isinstance(module, nn.LayerNorm) or "bias" in f"{path}.{name}"
    return "undecayed" if undecayed else "b"


def _is_of_embedding(path: str, module: nn.Module) -> bool:
    """Whether the module is an adapter of an embedding, or holds one of PEFT's."""
    if isinstance(module, LowRankLinear):
        return module.family == EMBEDDING
    return path.rpartition(".")[2] in ("lora_embedding_A", "lora_embedding_B")


def _is_lora_b(path: str, name: str) -> bool:
    if name == "lora_b":
        return True
    *_, holder, last = ("", *path.split("."))
    # PEFT's lora_B.<adapter>.weight, and lora_embedding_B.<adapter>
    return (holder == "lora_B" and name == "weight") or last == "lora_embedding_B"
