"""Properties of the linear module that an adapter wraps: features, dense weight, hooks."""

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowrank_ext.checks import normalized_adapter_dtype
from lowrank_ext.nn.base_keys import BaseKeys
from lowrank_ext.nn.fixed_size import FixedSize

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Adapter(FixedSize, BaseKeys):
    """A module that wraps a linear one; it is not wrapped again."""


def adapter_dtype_for(
    base_dtype: torch.dtype | None, adapter_dtype: torch.dtype | str, owner: str
) -> torch.dtype:
    """dtype of adapter tensors over a base of ``base_dtype`` (None: no dense weight).

    Raises:
        ValueError: the ops do not support the pair: adapters must have the base's dtype, or be
            float32 over a bfloat16 or float16 base.
    """
    name = normalized_adapter_dtype(adapter_dtype, owner)
    if base_dtype is None:
        return torch.float32 if name == "base" else getattr(torch, name)
    if name == "base" or base_dtype == torch.float64:
        return base_dtype
    dtype: torch.dtype = getattr(torch, name)
    if dtype not in (base_dtype, torch.float32):
        raise ValueError(
            f"{owner}: adapter_dtype must be 'base', 'float32' or the base's dtype "
            f"{str(base_dtype).removeprefix('torch.')}, got {name!r}"
        )
    return dtype


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D; transformers is not imported to find out."""
    conv1d = _conv1d_class()
    return conv1d is not None and isinstance(module, conv1d)


def _conv1d_class() -> type[nn.Module] | None:
    # If transformers has not been imported, no module is a Conv1D.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that can be adapted, else None."""
    if is_conv1d(module):
        weight: Any = module.weight  # a plain Tensor under FSDP1 and functional_call
        return weight.shape[0], weight.shape[1]
    num_in, num_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, Adapter) or not isinstance(num_in, int):
        return None
    return (num_in, num_out) if isinstance(num_out, int) else None


def dense_weight(base: nn.Module) -> nn.Parameter | None:
    """The base's weight if it is an ordinary floating Parameter of the right shape, or None."""
    weight = base._parameters.get("weight")
    features = linear_features(base)
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOAT_DTYPES or features is None:
        return None
    shape = features if is_conv1d(base) else features[::-1]
    return weight if weight.shape == shape else None


@torch.no_grad()
def computes_its_weight(base: nn.Module) -> bool:
    """Whether the base's output is x weightᵀ + bias.

    A base with hooks or an overridden forward is tested with one call on two random rows. On the
    meta device the answer is True without a test.
    """
    weight = dense_weight(base)
    if weight is None or weight.is_meta or is_plain(base):
        return weight is not None
    wide = weight.t() if is_conv1d(base) else weight
    own_draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, wide.shape[1], generator=own_draws).to(weight)
    tolerance = torch.finfo(weight.dtype).eps ** 0.5
    with torch.autocast(weight.device.type, enabled=False):
        expected = F.linear(x, wide, base._parameters.get("bias"))
        return torch.allclose(base(x), expected, rtol=tolerance, atol=tolerance)


def is_plain(base: nn.Module) -> bool:
    """Whether the base is an nn.Linear or Conv1D with a dense weight and no hooks."""
    known = type(base) in (nn.Linear, _conv1d_class())
    return known and not is_hooked(base) and dense_weight(base) is not None


def offload_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook of ``module`` puts its weights for a call, if it keeps them elsewhere
    between calls (``cpu_offload``, a ``device_map`` with disk), else None."""
    hook = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if getattr(each, "offload", False) and device is not None:
            return torch.device(device)
    return None


def execution_device(base: nn.Module) -> torch.device:
    """The device on which ``base`` computes: where its adapters belong."""
    offloaded = offload_device(base)
    if offloaded is not None:
        return offloaded
    tensor = next(iter([*base.parameters(), *base.buffers()]), torch.empty(0, device="cpu"))
    return tensor.device


def plain_module(
    features: tuple[int, int],
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    conv1d: bool,
) -> nn.Module:
    """An nn.Linear, or transformers' Conv1D, of (in, out) features with these Parameters."""
    in_features, out_features = features
    with torch.device("meta"):  # no memory, and no draw from any generator
        if conv1d:
            conv1d_class = importlib.import_module("transformers.pytorch_utils").Conv1D
            plain: nn.Module = conv1d_class(out_features, in_features)
        else:
            plain = nn.Linear(in_features, out_features, bias is not None)
    plain.register_parameter("weight", weight)
    plain.register_parameter("bias", bias)
    return plain


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than the forward of its class: it has hooks, or a
    forward set on the instance."""
    own = vars(module)  # fast: layers of lr.accelerate check this at every call
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
