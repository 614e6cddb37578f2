"""Weights of quantized linears as dense tensors: bitsandbytes' 4 and 8 bit, torchao's."""

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.nn.base_layer import is_hooked


def is_4bit(base: nn.Module) -> bool:
    """Whether bitsandbytes holds the base in 4 bits."""
    return type(base._parameters.get("weight")).__name__ == "Params4bit"


def is_quantized(base: nn.Module) -> bool:
    """Whether ``dequantized_weight`` knows the base's kind, and nothing changes its output."""
    weight = base._parameters.get("weight")
    known = type(weight).__name__ in ("Params4bit", "Int8Params")
    of_torchao = type(weight).__module__.startswith("torchao.")
    linear = not isinstance(base, nn.Embedding)
    return linear and (known or of_torchao) and not is_hooked(base)


def way_out(base: nn.Module) -> str:
    """What to do instead of a merge in place, for messages."""
    if not is_quantized(base):
        return ""
    return "; lr.unload(model, merge=True), or merge_and_unload of PEFT, gives dense modules"


@torch.no_grad()
def dequantized_weight(base: nn.Module) -> Tensor | None:
    """The weight [N, K] that a quantized linear multiplies with, a new dense tensor; None for a
    base that is none, of another library, or hooked."""
    if not is_quantized(base):
        return None
    weight: Any = base._parameters["weight"]
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _of_4bit(weight)
    if kind == "Int8Params":
        return _of_8bit(weight, getattr(base, "state", None))
    dense: Tensor = weight.dequantize()
    return dense


def _of_4bit(weight: Any) -> Tensor | None:
    if weight.quant_state is None:  # not on a device yet: it is still dense
        return None
    functional = importlib.import_module("bitsandbytes.functional")
    dense: Tensor = functional.dequantize_4bit(*_unpacked(weight))
    return dense


def keep_unpacked(model: nn.Module, owner: str) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for its kernel for CPUs, as a forward in
    evaluation mode does, and undo it where it has been done: the kernel computes no gradients, and
    says nothing where one is asked for.

    Raises:
        ValueError: bitsandbytes computes wrong values of a weight, see ``check_4bit_rows``; nothing
            has changed then.
    """
    check_4bit_rows(model, owner)
    for module in model.modules():
        if is_4bit(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            weight: Any = module._parameters["weight"]
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                with torch.no_grad():
                    weight.data, weight.quant_state = _unpacked(weight)


def check_4bit_rows(model: nn.Module, owner: str) -> None:
    """Raise ValueError, which begins with ``owner``, for a 4-bit weight on a CPU of which
    bitsandbytes computes wrong values.

    It gives each block of 64 elements a scale, over the ends of rows. Its kernel for AVX-512, which
    reads 16 columns at a time, takes them for blocks of a row, and is silently wrong where rows are
    no whole blocks (0.50); rows of other widths go another, right way.
    """
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None) if is_4bit(module) else None
        if state is None or weight.device.type != "cpu":
            continue
        width = state.shape[-1]
        if width % state.blocksize and width % 16 == 0:
            name = "embedding_dim" if isinstance(module, nn.Embedding) else "in_features"
            raise ValueError(
                f"{owner}: {path or type(module).__name__}: {name} must be a multiple of "
                f"{state.blocksize}, or none of 16, for 4 bits by bitsandbytes on a CPU, got "
                f"{width}; use 8 bits or a GPU"
            )


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Data and state of a 4-bit weight in the usual layout; its scales have been rounded to
    bfloat16 by the packing."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    functional = importlib.import_module("bitsandbytes.functional")
    state = copy.copy(weight.quant_state)  # it is changed in place
    nested = state.original_nested
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not nested and state.absmax.dim() == 2:  # bitsandbytes leaves them transposed
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def _of_8bit(weight: Any, state: Any) -> Tensor | None:
    # The first forward moves the scales from the weight to the module's state.
    scales = next((s for s in (getattr(state, "SCB", None), weight.SCB) if s is not None), None)
    if scales is None:
        return None
    functional = importlib.import_module("bitsandbytes.functional")
    dense: Tensor = functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return dense
