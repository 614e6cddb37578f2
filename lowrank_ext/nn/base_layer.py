"""Properties of the module that an adapter wraps: family, features, dense weight, hooks."""

import copy
import importlib
import math
import sys
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.checks import normalized_adapter_dtype
from lowrank_ext.nn.autocast import without_autocast
from lowrank_ext.nn.base_keys import BaseKeys
from lowrank_ext.nn.experts import StackedLinear
from lowrank_ext.nn.fixed_size import FixedSize

# Families of modules, each a linear map of its input: of vectors, of one-hot rows, of patches, of
# vectors by one of the experts whose weights are stacked.
LINEAR, EMBEDDING, CONVOLUTION, STACKED = "linear", "embedding", "convolution", "stacked"
_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapter(FixedSize, BaseKeys):
    """A module that wraps one of a family; it is not wrapped again."""

    in_features: int


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
    """(in_features, out_features) of a linear module, else None."""
    if is_conv1d(module):
        weight: Any = module.weight  # a plain Tensor under FSDP1 and functional_call
        return weight.shape[0], weight.shape[1]
    num_in, num_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, Adapter | StackedLinear) or not isinstance(num_in, int):
        return None
    return (num_in, num_out) if isinstance(num_out, int) else None


def family_of(module: nn.Module) -> str | None:
    """The family of a module that can be adapted, else None."""
    if linear_features(module) is not None:
        return LINEAR
    if isinstance(module, Adapter):
        return None
    if isinstance(module, StackedLinear):
        return STACKED
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return CONVOLUTION if isinstance(module, _CONVOLUTIONS) else None


def features_of(module: Any) -> tuple[int, int] | None:
    """(K, N) of the linear map of a module that can be adapted, or of an adapter's, else None: of
    an embedding (num_embeddings, embedding_dim), of a convolution (elements of a patch,
    out_channels)."""
    if isinstance(module, Adapter | StackedLinear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, _CONVOLUTIONS):
        return math.prod(kernel_shape(module)), module.out_channels
    return linear_features(module)


def kernel_shape(module: nn.Module) -> tuple[int, ...]:
    """(channels, kernel sizes) of the patches that a convolution, or an adapter over one,
    multiplies; () of any other module."""
    settings: Any = module
    sizes: tuple[int, ...] = getattr(module, "kernel_size", ())
    known = isinstance(module, (*_CONVOLUTIONS, Adapter)) and sizes
    return (settings.in_channels // settings.groups, *sizes) if known else ()


def stack_of(module: Any) -> tuple[int, ...]:
    """(E,) of a linear map for each of E experts, or of an adapter of one; () of any other."""
    stack: tuple[int, ...] = getattr(module, "stack", ())
    return stack if isinstance(module, Adapter | StackedLinear) else ()


def has_transposed_weight(base: nn.Module) -> bool:
    """Whether the weight of a linear base is [..., in_features, out_features]."""
    return base.transposed if isinstance(base, StackedLinear) else is_conv1d(base)


def dense_weight(base: nn.Module) -> nn.Parameter | None:
    """The base's weight if it is an ordinary floating Parameter of the right shape, or None."""
    stacked = isinstance(base, StackedLinear)
    weight = base.weight if stacked else base._parameters.get("weight")
    features = None if isinstance(base, Adapter) else features_of(base)
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOAT_DTYPES or features is None:
        return None
    num_in, num_out = features
    if kernel := kernel_shape(base):
        shape = (num_out, *kernel)
    else:
        rows_first = has_transposed_weight(base) or isinstance(base, nn.Embedding)
        shape = (*stack_of(base), *((num_in, num_out) if rows_first else (num_out, num_in)))
    return weight if weight.shape == shape else None


@torch.no_grad()
def computes_its_weight(base: nn.Module) -> bool:
    """Whether the base's output is x weightᵀ + bias; of an embedding with an ``embed_scale``, that
    times x weightᵀ.

    A base with hooks or an overridden forward is tested with one call on a small random input. On
    the meta device the answer is True without a test.
    """
    weight = dense_weight(base)
    stacked = isinstance(base, StackedLinear)
    if weight is None or weight.is_meta or stacked or is_plain(base):
        return weight is not None
    tolerance = torch.finfo(weight.dtype).eps ** 0.5
    with without_autocast(weight.device):
        x, expected = _small_call(base, weight)
        atol = tolerance * expected.abs().max().item()
        return torch.allclose(base(x), expected, rtol=tolerance, atol=atol)


@torch.no_grad()
def looks_up_its_ids(base: Any) -> bool:
    """Whether an embedding returns the rows of its weight at the ids of the call, times an
    ``embed_scale``; its forward hooks, which may change what comes out, left aside.

    Tested with one call on other values, a number for each row: those of the weight may be equal,
    or on the meta device. A weight that is not dense cannot be replaced: the class decides.
    """
    if dense_weight(base) is None:
        quantized = type(base._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")
        return quantized or type(base).forward is nn.Embedding.forward
    if is_plain(base):
        return True
    bare = copy.copy(base)
    vars(bare)["_forward_hooks"] = OrderedDict()
    if "_hf_hook" in vars(bare):  # accelerate's forward, which fetches weights
        vars(bare).pop("forward", None)
    device = torch.device("cpu") if base.weight.is_meta else base.weight.device
    own_draws = torch.Generator().manual_seed(0)
    rows = torch.randn(base.num_embeddings, 1, generator=own_draws, device="cpu").to(device)
    ids = torch.randint(base.num_embeddings, (8,), generator=own_draws, device="cpu").to(device)
    empty = {n: torch.ones_like(b, device=device) for n, b in base._buffers.items() if b.is_meta}
    scale = empty.get("embed_scale", getattr(base, "embed_scale", 1.0))
    tensors = {**empty, "weight": rows.expand(base.weight.shape)}
    try:
        y = torch.func.functional_call(bare, tensors, (ids,))
        return torch.allclose(y.float(), (tensors["weight"][ids] * scale).float(), rtol=1e-2)
    except Exception:  # of a call with other arguments than ids, such as a mask
        return False


def _small_call(base: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An input of ``base``, and the output that its weight and bias give."""
    own_draws = torch.Generator().manual_seed(0)
    bias = base._parameters.get("bias")
    if isinstance(base, nn.Embedding):
        ids = torch.randint(base.num_embeddings, (8,), generator=own_draws).to(weight.device)
        return ids, weight[ids] * getattr(base, "embed_scale", 1.0)
    if kernel_shape(base):
        padding = (0,) * (weight.dim() - 2) if isinstance(base.padding, str) else base.padding
        sizes = zip(base.dilation, base.kernel_size, padding, strict=True)
        sides = [d * (k - 1) + 1 + p for d, k, p in sizes]
        x = torch.randn(1, base.in_channels, *sides, generator=own_draws).to(weight)
        return x, convolved(base, x, weight, bias)
    wide = weight.t() if is_conv1d(base) else weight
    x = torch.randn(2, wide.shape[1], generator=own_draws).to(weight)
    return x, F.linear(x, wide, bias)


def convolved(settings: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x, as torch's own module with the ``settings`` (stride, padding,
    padding_mode, dilation, groups) of one computes it."""
    y: Tensor = _CONVOLUTIONS[weight.dim() - 3]._conv_forward(settings, x, weight, bias)
    return y


def is_plain(base: nn.Module) -> bool:
    """Whether the base is one of torch's own classes, or Conv1D, with a dense weight and no
    hooks."""
    known = type(base) in (nn.Linear, nn.Embedding, *_CONVOLUTIONS, _conv1d_class())
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
    if isinstance(base, StackedLinear):
        base = base.experts
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
