"""AcceleratedLoRA: the forward that ``lr.accelerate`` gives to PEFT's LoRA layers.

The layer stays PEFT's in everything else: parameters, names, adapters, merging, files. Whatever
the ops do not cover goes to PEFT's own forward, with a warning that says why.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.nn.linear import is_hooked, is_plain
from lowrank_ext.ops._branch import HALF_DTYPES

_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
# What PEFT hands to variants of LoRA; ordinary LoRA and the base ignore it.
_VARIANT_ARGUMENTS = ("alora_offsets",)
_CLASSES: dict[type[nn.Module], type["AcceleratedLoRA"]] = {}


class AcceleratedLoRA(nn.Module):
    """Mix-in before a PEFT LoRA layer: the branches of the active adapters on the fused ops.

        y = base(x) + Σ scaling · (drop(x) lora_Aᵀ) lora_Bᵀ      over the active adapters

    A plain nn.Linear or Conv1D base and the first adapter are one ``lowrank_linear``; on other
    bases, and for further adapters, the branch is added with ``lowrank_add``. With
    ``adapter_names``, an adapter per sequence, it is one ``multi_lowrank_add``. Disabled and merged
    adapters are PEFT's business, as is all that :func:`adapter_not_covered` and ``_not_covered``
    name.
    """

    peft_class: ClassVar[type[nn.Module]]

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    _check_forward_args: Callable[..., None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., N] in the dtype of the base's output."""
        rows: list[str] | None = kwargs.get("adapter_names")
        names = self.active_adapters if rows is None else list(dict.fromkeys(rows))
        names = [name for name in names if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return self._peft_forward(x, *args, **kwargs)
        because = self._not_covered(x, names, mixed=rows is not None)
        if because:
            _say(because)
            return self._peft_forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        for name in ("adapter_names", *_VARIANT_ARGUMENTS):
            kwargs.pop(name, None)
        if rows is not None:
            return self._mixed(self.base_layer(x, *args, **kwargs), x, names, rows)
        weight = None if args or kwargs else self._weight_for(x)
        if weight is None:
            return self._add(self.base_layer(x, *args, **kwargs), x, names)
        first, *others = names
        bias = self.base_layer._parameters["bias"]
        y = ops.lowrank_linear(x, weight, bias, *self._factors(first), **self._numbers(first))
        return self._add(y, x, others)

    def _peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.peft_class.forward(self, x, *args, **kwargs)
        return y

    def _not_covered(self, x: Tensor, names: Sequence[str], mixed: bool) -> str:
        """Why this call is PEFT's, or ""."""
        for name in names:
            because = adapter_not_covered(self, name) or self._dtype_not_covered(x, name)
            if because:
                return because
            if mixed and self._dropout_p(name) > 0:
                return "adapter_names together with dropout in training mode"
        return ""

    def _dtype_not_covered(self, x: Tensor, name: str) -> str:
        autocast = _autocast_dtype(x)
        dtype = x.dtype if autocast is None else autocast
        for factor in self._factors(name):
            fits = factor.dtype == dtype or (factor.dtype == torch.float32 and dtype in HALF_DTYPES)
            fits = fits or (autocast is not None and factor.dtype in HALF_DTYPES)
            if dtype not in _DTYPES or not fits:
                return f"{_name(factor.dtype)} adapters beside inputs of {_name(dtype)}"
            cast_by_peft = getattr(self, "cast_input_dtype_enabled", True) or autocast is not None
            if factor.dtype != x.dtype and not cast_by_peft:
                return "the casting of inputs is switched off"
        return ""

    def _weight_for(self, x: Tensor) -> Tensor | None:
        """The base's weight [N, K] where ``lowrank_linear`` computes what the base does."""
        if not is_plain(self.base_layer):
            return None
        weight = self.base_layer._parameters["weight"]
        assert weight is not None
        cast = _autocast_dtype(x) is not None and weight.dtype != torch.float64
        if weight.dtype != x.dtype and not cast:
            return None  # the base itself says that the dtypes do not fit
        return weight if type(self.base_layer) is nn.Linear else weight.t()

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """lora_A [r, K] and lora_B [N, r] of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def _numbers(self, name: str) -> dict[str, Any]:
        return {"scaling": self.scaling[name], "dropout_p": self._dropout_p(name)}

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _add(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        dtype = y.dtype
        for name in names:
            branch = _in_one_dtype(x, y, *self._factors(name))
            y = ops.lowrank_add(*branch, **self._numbers(name))
        return y.to(dtype)

    def _mixed(self, y: Tensor, x: Tensor, names: Sequence[str], rows: Sequence[str]) -> Tensor:
        """``rows``: the adapter of each sequence; a name that has none here means the base."""
        factors = [self._factors(name) for name in names]
        ranks = [lora_a.shape[0] for lora_a, _ in factors]
        lora_a = _stack([F.pad(a, (0, 0, 0, max(ranks) - a.shape[0])) for a, _ in factors])
        lora_b = _stack([F.pad(b, (0, max(ranks) - b.shape[1])) for _, b in factors])
        ids = torch.tensor([names.index(n) if n in names else -1 for n in rows], device=x.device)
        scaling = [self.scaling[name] for name in names]
        base_out, x, lora_a, lora_b = _in_one_dtype(x, y, lora_a, lora_b)
        added = ops.multi_lowrank_add(
            base_out,
            x,
            lora_a,
            lora_b,
            ids.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1]),
            torch.tensor(scaling, dtype=torch.float64, device=x.device),
            ranks=torch.tensor(ranks, device=x.device),
        )
        return added.to(y.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that a pickle cannot name it.
        return _new_layer, (self.peft_class,), self.__getstate__()


def accelerated_class(peft_class: type[nn.Module]) -> type[AcceleratedLoRA]:
    """``peft_class`` with the forward above; one class for each."""
    if peft_class not in _CLASSES:
        _CLASSES[peft_class] = _make_class(peft_class)
    return _CLASSES[peft_class]


def _make_class(peft_class: type[nn.Module]) -> type[AcceleratedLoRA]:
    members = {"peft_class": peft_class, "__module__": __name__, "__doc__": AcceleratedLoRA.__doc__}
    return type(f"Accelerated{peft_class.__name__}", (AcceleratedLoRA, peft_class), members)


def _new_layer(peft_class: type[nn.Module]) -> AcceleratedLoRA:
    layer_class = accelerated_class(peft_class)
    return layer_class.__new__(layer_class)


def adapter_not_covered(layer: Any, name: str) -> str:
    """Why the adapter ``name`` of a PEFT layer runs through PEFT's forward whatever its input is;
    "" where the ops cover it."""
    variant = layer.lora_variant.get(name)
    if variant is not None:
        return f"a variant of LoRA, {type(variant).__name__}"
    lora_a, lora_b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if getattr(lora_b, "bias", None) is not None:
        return "lora_bias=True"
    if not (_is_bare(lora_a, nn.Linear) and _is_bare(lora_b, nn.Linear)):
        return "lora_A or lora_B is wrapped, hooked or no nn.Linear"
    if not all(type(m.weight) in (nn.Parameter, Tensor) for m in (lora_a, lora_b)):
        return f"lora_A or lora_B holds a {type(lora_a.weight).__name__}"
    if not _is_bare(dropout, nn.Dropout, nn.Identity):
        return f"dropout by a {type(dropout).__name__}, or with hooks"
    if not isinstance(layer.scaling[name], float | int):
        return f"scaling is a {type(layer.scaling[name]).__name__}"
    return ""


def _is_bare(module: nn.Module, *classes: type[nn.Module]) -> bool:
    return type(module) in classes and not is_hooked(module)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, or None where it leaves it alone."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else None


def _in_one_dtype(x: Tensor, y: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """y, x and the adapter as the ops take them: a quantised base may answer in another dtype."""
    if x.dtype == y.dtype or _autocast_dtype(x) is not None:
        return (y, x, *factors)
    wide = torch.promote_types(x.dtype, y.dtype)
    return (y.to(wide), x.to(wide), *(factor.to(wide) for factor in factors))


def _stack(factors: Sequence[Tensor]) -> Tensor:
    widest = functools.reduce(torch.promote_types, [factor.dtype for factor in factors])
    return torch.stack([factor.to(widest) for factor in factors])


def _say(because: str) -> None:
    # Python shows a warning of the same text once. While compiling nobody would read it.
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"accelerate: a layer runs through PEFT's own forward: {because}", stacklevel=3
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
