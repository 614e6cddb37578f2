"""AcceleratedLoRA: the forward that ``lr.accelerate`` gives to PEFT's LoRA layers.

Everything else stays PEFT's: parameters, names, adapters, merging, files. Cases that the ops do not
cover run PEFT's own forward, with a warning that says why.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.nn.autocast import autocast_dtype
from lowrank_ext.nn.base_layer import is_hooked, is_plain
from lowrank_ext.nn.biases import sum_of_biases
from lowrank_ext.nn.dora import column_factor, dora_output
from lowrank_ext.nn.quantized import dequantized_weight, is_quantized
from lowrank_ext.nn.rows import ids_of_names, ids_per_row
from lowrank_ext.ops._registration import HALF_DTYPES

_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
# Arguments of PEFT's layers that are not passed to the base.
_PEFT_ARGUMENTS = ("adapter_names", "alora_offsets")
_DORA = "peft.tuners.lora.variants.DoraLinearVariant"
_CLASSES: dict[type[nn.Module], type["AcceleratedLoRA"]] = {}


class Adapter(NamedTuple):
    """One adapter of a layer, as used by a call."""

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    lora_bias: Tensor | None  # [N]
    magnitude: Tensor | None  # [N], DoRA's
    scaling: float
    dropout_p: float


class AcceleratedLoRA(nn.Module):
    """Mix-in before a PEFT LoRA layer: the branches of the active adapters on the fused ops.

        y = base(x) + Σ scaling · ((drop(x) lora_Aᵀ) lora_Bᵀ + lora_bias)   over the active adapters

    A plain nn.Linear or Conv1D base and the first adapter are one ``lowrank_linear``; on other
    bases, and for further adapters, ``lowrank_add`` adds the branch. With ``adapter_names``, an
    adapter per sequence, one ``multi_lowrank_add`` does. PEFT's own forward runs for disabled and
    merged adapters, and where ``adapter_not_covered`` or ``_not_covered`` gives a reason.

    Each call repeats these checks, since PEFT and its users may change adapters, modules and hooks
    at any time. The checks read submodules from the dicts that hold them: nn.Module's attribute
    look-up would take longer than the ops at one row.
    """

    peft_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type["AcceleratedLoRA"]]
    # Put before the name of PEFT's class.
    prefix: ClassVar[str] = "Accelerated"

    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    _check_forward_args: Callable[..., None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., N] in the dtype of the base's output."""
        rows: list[str] | None = kwargs.get("adapter_names")
        names = self.active_adapters if rows is None else list(dict.fromkeys(rows))
        present = _children(self, "lora_A")
        names = [name for name in names if name in present]
        if self.disable_adapters or self.merged or not names:
            return self._peft_forward(x, *args, **kwargs)
        adapters, because = self._adapters(x, names, mixed=rows is not None)
        if because:
            say(because)
            return self._peft_forward(x, *args, **kwargs)
        if kwargs:
            self._check_forward_args(x, *args, **kwargs)
            kwargs = {k: value for k, value in kwargs.items() if k not in _PEFT_ARGUMENTS}
        if rows is not None:
            ids = ids_per_row(ids_of_names(rows, names, x.device), x)
            return self._mixed(self._base(x, *args, **kwargs), x, adapters, ids)
        weight = None if args or kwargs else self._weight_for(x)
        if adapters[0].magnitude is not None:
            return self._dora(x, weight, adapters[0], args, kwargs)
        if weight is None:
            return _add(self._base(x, *args, **kwargs), x, adapters)
        bias = self._modules["base_layer"]._parameters["bias"]  # type: ignore[union-attr]
        y = _linear(x, weight, bias, adapters[0])
        return y if len(adapters) == 1 else _add(y, x, adapters[1:])

    def _peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.peft_class.forward(self, x, *args, **kwargs)
        return y

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        return y

    def _adapters(self, x: Tensor, names: Sequence[str], mixed: bool) -> tuple[list[Adapter], str]:
        """The adapters, and why PEFT's forward must run, or ""."""
        for name in names:
            because = adapter_not_covered(self, name)
            if because:
                return [], because
        adapters = [self._adapter(name) for name in names]
        return adapters, self._not_covered(x, adapters, mixed)

    def _adapter(self, name: str) -> Adapter:
        lora_a, lora_b = (_children(self, side)[name] for side in ("lora_A", "lora_B"))
        dropout = _children(self, "lora_dropout")[name]
        drops = type(dropout) is nn.Dropout and dropout.training
        bias = lora_b._parameters["bias"]
        p = dropout.p if drops else 0.0
        magnitude = _children(self, "lora_magnitude_vector").get(name)
        magnitude = None if magnitude is None else magnitude.weight
        return Adapter(lora_a.weight, lora_b.weight, bias, magnitude, self.scaling[name], p)

    def _not_covered(self, x: Tensor, adapters: Sequence[Adapter], mixed: bool) -> str:
        """Why PEFT's forward must run for these adapters and this x, or ""."""
        if x.layout is not torch.strided or x.is_nested or x.is_meta:
            return "inputs that are nested, sparse or on the meta device"
        autocast = _autocast_dtype(x)
        dtype = x.dtype if autocast is None else autocast
        for adapter in adapters:
            for factor in adapter[:2]:
                if factor.dtype == x.dtype == dtype and dtype in _DTYPES:
                    continue
                half = factor.dtype in HALF_DTYPES and autocast is not None
                if dtype not in HALF_DTYPES or not (half or factor.dtype == torch.float32):
                    return f"{_name(factor.dtype)} adapters beside inputs of {_name(dtype)}"
                if autocast is None and not getattr(self, "cast_input_dtype_enabled", True):
                    return "the casting of inputs is switched off"
            if mixed and adapter.dropout_p > 0:
                return "adapter_names together with dropout in training mode"
            if mixed and adapter.lora_bias is not None:
                return "adapter_names together with lora_bias=True"
            if adapter.magnitude is not None and (mixed or len(adapters) > 1):
                return "DoRA beside other adapters"
        return ""

    def _weight_for(self, x: Tensor) -> Tensor | None:
        """The base's weight [N, K] if ``lowrank_linear`` can replace the base, else None."""
        base = self._modules["base_layer"]
        assert base is not None
        weight: Tensor | None = base._parameters.get("weight")
        if type(base) is nn.Linear:
            plain = type(weight) is nn.Parameter and not is_hooked(base)
        else:
            plain = is_plain(base)
        if weight is None or not plain:
            return None
        weight = weight if type(base) is nn.Linear else weight.t()
        if weight.dtype == x.dtype:
            return weight
        # Autocast casts another dtype; without it the base raises its own error.
        cast = _autocast_dtype(x) is not None and weight.dtype != torch.float64
        return weight if cast else None

    def _dora(
        self,
        x: Tensor,
        weight: Tensor | None,
        adapter: Adapter,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """DoRA's output; weight: the base's, where the op can replace the base."""
        assert adapter.magnitude is not None
        base: Any = self._modules["base_layer"]
        base_out = self._base(x, *args, **kwargs) if weight is None else None
        whole = _dense_weight(base).to(x.dtype) if weight is None else weight
        factors = adapter.lora_a, adapter.lora_b
        factor = column_factor(adapter.magnitude, whole, *factors, adapter.scaling)
        return dora_output(
            x,
            whole,
            base._parameters.get("bias"),
            *factors,
            factor,
            scaling=adapter.scaling,
            dropout_p=adapter.dropout_p,
            base_out=base_out,
        )

    def _mixed(self, y: Tensor, x: Tensor, adapters: Sequence[Adapter], ids: Tensor) -> Tensor:
        """y with the adapter of each row of x added; ids [...], -1 for the base alone."""
        ranks = [adapter.lora_a.shape[0] for adapter in adapters]
        widest = max(ranks)
        lora_a = _stack([F.pad(a.lora_a, (0, 0, 0, widest - a.lora_a.shape[0])) for a in adapters])
        lora_b = _stack([F.pad(a.lora_b, (0, widest - a.lora_b.shape[1])) for a in adapters])
        base_out, x, lora_a, lora_b = _in_one_dtype(x, y, lora_a, lora_b)
        scaling = [adapter.scaling for adapter in adapters]
        added = ops.multi_lowrank_add(
            base_out,
            x,
            lora_a,
            lora_b,
            ids,
            torch.tensor(scaling, dtype=torch.float64, device=x.device),
            ranks=torch.tensor(ranks, device=x.device),
        )
        return added.to(y.dtype)

    def _get_name(self) -> str:
        return self.peft_class.__name__  # in repr, and in PEFT's get_layer_status

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name.
        return _new_layer, (self.peft_class, self.mixin), self.__getstate__()


def accelerated_class(
    peft_class: type[nn.Module], mixin: type[AcceleratedLoRA] = AcceleratedLoRA
) -> type[AcceleratedLoRA]:
    """The subclass of ``peft_class`` with the forward of ``mixin``, made once."""
    if peft_class not in _CLASSES:
        _CLASSES[peft_class] = _make_class(peft_class, mixin)
    return _CLASSES[peft_class]


def _make_class(peft_class: type[nn.Module], mixin: type[AcceleratedLoRA]) -> type[AcceleratedLoRA]:
    members: dict[str, Any] = {"peft_class": peft_class, "mixin": mixin}
    members |= {"__module__": __name__, "__doc__": mixin.__doc__}
    return type(f"{mixin.prefix}{peft_class.__name__}", (mixin, peft_class), members)


def _new_layer(peft_class: type[nn.Module], mixin: type[AcceleratedLoRA]) -> AcceleratedLoRA:
    layer_class = accelerated_class(peft_class, mixin)
    return layer_class.__new__(layer_class)


def adapter_not_covered(layer: Any, name: str) -> str:
    """Why the adapter ``name`` of a PEFT layer needs PEFT's forward for every input; "" where the
    ops cover it."""
    if name in layer.lora_variant and (because := _variant_not_covered(layer, name)):
        return because
    lora_a, lora_b = _children(layer, "lora_A")[name], _children(layer, "lora_B")[name]
    for factor in (lora_a, lora_b):
        if type(factor) is not nn.Linear or is_hooked(factor):
            return "lora_A or lora_B is wrapped, hooked or no nn.Linear"
        if type(factor.weight) not in (nn.Parameter, Tensor):
            return f"lora_A or lora_B holds a {type(factor.weight).__name__}"
    dropout = _children(layer, "lora_dropout")[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or is_hooked(dropout):
        return f"dropout by a {type(dropout).__name__}, or with hooks"
    if not isinstance(layer.scaling[name], float | int):
        return f"scaling is a {type(layer.scaling[name]).__name__}"
    return ""


def _variant_not_covered(layer: Any, name: str) -> str:
    """Why a variant of LoRA needs PEFT's forward; "" for DoRA over a base whose weight is known."""
    variant = type(layer.lora_variant[name])
    if f"{variant.__module__}.{variant.__name__}" != _DORA:
        return f"a variant of LoRA, {variant.__name__}"
    magnitude, base = _children(layer, "lora_magnitude_vector")[name], layer.get_base_layer()
    if is_hooked(magnitude) or not isinstance(magnitude.weight, Tensor):
        return "DoRA with hooks on its magnitude"
    if not (is_plain(base) or is_quantized(base)):
        return f"DoRA over a {type(base).__name__} that is no plain linear, or with hooks"
    return ""


def _dense_weight(base: nn.Module) -> Tensor:
    """The weight [N, K] of a base that ``_variant_not_covered`` lets pass."""
    if is_quantized(base):
        dense = dequantized_weight(base)
        assert dense is not None
        return dense
    weight: Any = base._parameters["weight"]
    return weight if type(base) is nn.Linear else weight.t()


def _children(layer: nn.Module, name: str) -> dict[str, Any]:
    """The modules in the ModuleDict ``name`` of a layer."""
    holder: Any = layer._modules[name]
    return holder._modules


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    return ops.lowrank_linear(
        x,
        weight,
        sum_of_biases(bias, _scaled_bias(adapter), weight.dtype),
        adapter.lora_a,
        adapter.lora_b,
        scaling=adapter.scaling,
        dropout_p=adapter.dropout_p,
    )


def _add(y: Tensor, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    dtype = y.dtype
    for adapter in adapters:
        y = ops.lowrank_add(
            *_in_one_dtype(x, y, adapter.lora_a, adapter.lora_b),
            scaling=adapter.scaling,
            dropout_p=adapter.dropout_p,
        )
        if (bias := _scaled_bias(adapter)) is not None:
            y = y + bias.to(y.dtype)
    return y.to(dtype)


def _scaled_bias(adapter: Adapter) -> Tensor | None:
    if adapter.lora_bias is None:
        return None
    wide = torch.promote_types(adapter.lora_bias.dtype, torch.float32)
    return adapter.scaling * adapter.lora_bias.to(wide)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x, or None where it does not."""
    return None if x.dtype == torch.float64 else autocast_dtype(x.device)


def _in_one_dtype(x: Tensor, y: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """y, x and the adapter in the dtypes of the ops: a quantized base may have another output
    dtype."""
    if x.dtype == y.dtype or _autocast_dtype(x) is not None:
        return (y, x, *factors)
    wide = torch.promote_types(x.dtype, y.dtype)
    return (y.to(wide), x.to(wide), *(factor.to(wide) for factor in factors))


def _stack(factors: Sequence[Tensor]) -> Tensor:
    widest = functools.reduce(torch.promote_types, [factor.dtype for factor in factors])
    return torch.stack([factor.to(widest) for factor in factors])


def say(because: str) -> None:
    """Warn that a layer runs through PEFT's own forward."""
    # Python shows equal warnings once. Compiled code gives none.
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"accelerate: a layer runs through PEFT's own forward: {because}", stacklevel=3
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
