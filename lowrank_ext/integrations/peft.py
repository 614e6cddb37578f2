"""``lr.accelerate``: PEFT's LoRA layers on the fused ops, in place, and the way back."""

import dataclasses
import importlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank_ext.integrations.peft_experts import AcceleratedExperts, experts_not_covered
from lowrank_ext.integrations.peft_layer import (
    AcceleratedLoRA,
    accelerated_class,
    adapter_not_covered,
)
from lowrank_ext.nn.quantized import keep_unpacked

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AccelerationReport", "accelerate", "decelerate"]

Model = TypeVar("Model", bound=nn.Module)

_OLDEST_PEFT = (0, 18)
_WIDTH = 160  # columns of the table as text: every reason and most paths fit

# Classes of PEFT whose forward repeats that of lora.Linear.
_COVERED_CLASSES = ("peft.tuners.lora.bnb.Linear8bitLt", "peft.tuners.lora.bnb.Linear4bit")
# Reasons why classes are left alone, by class name.
_OTHER_CLASSES = {
    "Embedding": "an embedding is no linear module",
    "Conv1d": "a convolution is no linear module",
    "Conv2d": "a convolution is no linear module",
    "Conv3d": "a convolution is no linear module",
    "MultiheadAttention": "nn.MultiheadAttention is no linear module",
    "LoraParallelLinear": "Megatron's parallel linear",
    "SVDLinear": "AdaLoRA",
}


@dataclasses.dataclass(frozen=True)
class AccelerationReport:
    """What ``accelerate`` did: ``print(report)`` and rich's ``print`` show it as a table.

    Attributes:
        model: the model.
        accelerated: paths of the layers that run on the fused ops.
        left_alone: path and reason of the LoRA layers that keep PEFT's forward.
        partly: path and reason of accelerated layers in which some adapters still run PEFT's
            forward.
    """

    model: nn.Module = dataclasses.field(repr=False)
    accelerated: Sequence[str]
    left_alone: Mapping[str, str]
    partly: Mapping[str, str]

    def undo(self) -> None:
        """``decelerate`` for the model."""
        decelerate(self.model)

    def __rich__(self) -> "Table":
        from rich.table import Table

        total = len(self.accelerated) + len(self.left_alone)
        table = Table(title=f"{len(self.accelerated)} of {total} LoRA layers accelerated")
        table.add_column("layers", justify="right")
        table.add_column("PEFT's class")
        table.add_column("runs on")
        table.add_column("first of them", overflow="fold")
        for (kind, runs_on), paths in self._groups().items():
            table.add_row(str(len(paths)), kind, runs_on, paths[0])
        return table

    def _groups(self) -> dict[tuple[str, str], list[str]]:
        runs_on = {path: "the fused ops" for path in self.accelerated}
        runs_on |= {path: f"the fused ops; PEFT: {why}" for path, why in self.partly.items()}
        runs_on |= {path: f"PEFT: {why}" for path, why in self.left_alone.items()}
        groups: dict[tuple[str, str], list[str]] = {}
        for path, where in runs_on.items():
            kind = _peft_class(self.model.get_submodule(path)).__name__
            groups.setdefault((kind, where), []).append(path)
        return groups

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=_WIDTH)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")


def accelerate(model: nn.Module) -> AccelerationReport:
    """Run the LoRA layers of a PEFT model on the fused ops, in place, for training and inference.

        y = x Wᵀ + bias + Σ scaling · (drop(x) lora_Aᵀ) lora_Bᵀ     over the active adapters

    Each layer's class becomes a subclass with another forward; modules, parameters, names and files
    stay PEFT's. So ``save_pretrained``, ``load_adapter``, ``merge_adapter``, ``merge_and_unload``,
    ``set_adapter``, ``add_adapter``, ``delete_adapter``, ``disable_adapter``,
    ``add_weighted_adapter``, ``adapter_names`` and the rest of PEFT work as before, and may be used
    before and after. For layers that PEFT adds later call it again; calling it twice is harmless.
    Works on every model that carries PEFT's LoRA layers, a PeftModel or not (transformers'
    ``add_adapter``, diffusers' ``load_lora_adapter``).

    Results: without dropout those of PEFT up to rounding. Beside a bfloat16 or float16 base float32
    adapters are rounded to the base's dtype once per call, where PEFT multiplies in float32.
    Dropout has nn.Dropout's distribution, with p rounded to a multiple of 1/65536, but is drawn in
    the kernel, so the same seed gives another mask.

    Kept for backward: x and h [M, r] for each layer; no cast or dropped copy of x, no mask.

    Wrappers of stacked expert weights (``target_parameters``) run the experts with a branch on each
    product, where PEFT adds the branches of all experts to the weight.

    Left alone, with the reason in the report: layers that are no linear map, quantized layers with
    their own forward, layers with a forward set on the instance (accelerate's device hooks), and
    layers none of whose adapters is covered (DoRA and other variants, ``lora_bias``). Cases that
    only a call reveals (an uncovered adapter made active, dtypes that do not fit) run PEFT's own
    forward, with a warning.

    Args:
        model: a model with PEFT's LoRA layers.

    Returns:
        The report; ``report.undo()`` restores PEFT's forward.

    Raises:
        ImportError: PEFT is not installed, or older than 0.18.
        TypeError: model is no nn.Module.
        ValueError: model carries no LoRA layer of PEFT, or a 4-bit weight of which bitsandbytes
            computes wrong values, see ``adapt``; nothing has changed then.

    Examples:
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_dropout=0.05))
        >>> print(lr.accelerate(model))

    Source: LoRA, Hu et al. 2021 (arXiv 2106.09685).
    """
    layers = _lora_layers(model)
    left_alone = {path: why for path, layer in layers.items() if (why := _not_covered(layer))}
    covered = {path: layer for path, layer in layers.items() if path not in left_alone}
    partly = {path: why for path, layer in covered.items() if (why := _partly_covered(layer))}
    keep_unpacked(model, "accelerate")
    for path, layer in layers.items():
        if path in left_alone:
            _give_back(layer)
        elif not isinstance(layer, AcceleratedLoRA):
            layer.__class__ = accelerated_class_for(type(layer))
    return AccelerationReport(model, tuple(covered), left_alone, partly)


def decelerate(model: Model) -> Model:
    """Restore PEFT's own forward in the layers of an accelerated model, in place; returns the
    model.

    Harmless where nothing was accelerated.

    Raises:
        RuntimeError: a layer's class was changed again since (as FSDP2's ``fully_shard`` does);
            nothing has changed then.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AcceleratedLoRA)}
    for path, layer in layers.items():
        if type(layer) is not accelerated_class(layer.peft_class, layer.mixin):
            raise RuntimeError(
                f"decelerate: {path} must be as accelerate left it, got a {type(layer).__name__}"
            )
    for layer in layers.values():
        _give_back(layer)
    return model


def _give_back(layer: nn.Module) -> None:
    if isinstance(layer, AcceleratedLoRA):
        layer.__class__ = layer.peft_class  # type: ignore[assignment]


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    lora_layer = _import_lora().LoraLayer
    layers = {path: m for path, m in model.named_modules() if isinstance(m, lora_layer)}
    if not layers:
        raise ValueError(
            f"accelerate: model must carry LoRA layers of PEFT, got a {type(model).__name__} with "
            "none; lr.adapt puts this library's own into a plain model"
        )
    return layers


def _import_lora() -> Any:
    try:
        peft, lora = map(importlib.import_module, ("peft", "peft.tuners.lora"))
    except ImportError as error:
        raise ImportError("accelerate: needs PEFT, `pip install 'lowrank-ext[peft]'`") from error
    if tuple(map(int, re.findall(r"\d+", peft.__version__)[:2])) < _OLDEST_PEFT:
        oldest = ".".join(map(str, _OLDEST_PEFT))
        raise ImportError(f"accelerate: needs PEFT {oldest} or newer, got {peft.__version__}")
    return lora


def _peft_class(layer: nn.Module) -> type[nn.Module]:
    return layer.peft_class if isinstance(layer, AcceleratedLoRA) else type(layer)


def _not_covered(layer: Any) -> str:
    """Why the layer keeps PEFT's forward, or ""."""
    peft_class = _peft_class(layer)
    if _wraps_parameter(peft_class):
        return experts_not_covered(layer) or _no_adapter_covered(layer)
    if not _has_covered_forward(peft_class):
        own = f"{peft_class.__module__.rpartition('.')[2]}.{peft_class.__name__}"
        return _OTHER_CLASSES.get(peft_class.__name__, f"{own} has a forward of its own")
    if "forward" in vars(layer):
        return "a forward was put on the layer itself"
    if isinstance(layer.get_base_layer(), NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it"
    return _no_adapter_covered(layer)


def _no_adapter_covered(layer: Any) -> str:
    reasons = [adapter_not_covered(layer, name) for name in layer.lora_A]
    return _most_common(reasons) if reasons and all(reasons) else ""


def _partly_covered(layer: Any) -> str:
    return _most_common([why for name in layer.lora_A if (why := adapter_not_covered(layer, name))])


def _most_common(reasons: Sequence[str]) -> str:
    return Counter(reasons).most_common(1)[0][0] if reasons else ""


def accelerated_class_for(peft_class: type[nn.Module]) -> type[AcceleratedLoRA]:
    """The class that a layer of ``peft_class``, which is covered, gets."""
    mixin = AcceleratedExperts if _wraps_parameter(peft_class) else AcceleratedLoRA
    return accelerated_class(peft_class, mixin)


def _wraps_parameter(peft_class: type[nn.Module]) -> bool:
    wrapper: Any = getattr(_import_lora(), "ParamWrapper", None)
    known = wrapper is not None and issubclass(peft_class, wrapper)
    return known and peft_class.forward is wrapper.forward


def _has_covered_forward(peft_class: type[nn.Module]) -> bool:
    linear = _import_lora().Linear
    if issubclass(peft_class, linear):
        names = ("forward", "_mixed_batch_forward")
        return all(getattr(peft_class, name) is getattr(linear, name) for name in names)
    return f"{peft_class.__module__}.{peft_class.__qualname__}" in _COVERED_CLASSES
