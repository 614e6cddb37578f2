"""Gradients of tied weights that are not float32 themselves, or not in the forward: summed in
float32 over the loops, rounded once.

Autograd adds the gradients of several uses of one tensor in that tensor's dtype, and autocast lets
all uses share one bfloat16 copy. Here each loop gets an alias of its own, and one node adds what
they bring.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.nn.autocast import autocast_dtype


class TiedSlot(NamedTuple):
    """The modules that hold one tied parameter, a module for each loop, and its name there."""

    modules: tuple[nn.Module, ...]
    name: str


class _Aliases(torch.autograd.Function):
    """``count`` aliases of a tensor, or of its copy in ``dtype``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        value = tensor.to(dtype)
        return tuple(value.view_as(value) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, torch.dtype], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.own_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return None, None, None
        total = given[0].to(torch.float32, copy=True)
        for gradient in given[1:]:
            total += gradient
        return total.to(ctx.own_dtype), None, None


@contextmanager
def aliases_of(slots: Sequence[TiedSlot]) -> Iterator[None]:
    """A block in which each module of a slot finds its own alias of the tied parameter, where the
    sum over loops would not be in float32 otherwise."""
    swapped: list[tuple[nn.Module, str, Any]] = []
    try:
        for modules, name in slots if torch.is_grad_enabled() else ():
            parameter: Any = modules[0]._parameters[name]
            dtype = _alias_dtype(modules[0], parameter)
            if dtype is None or not parameter.requires_grad:
                continue
            tied = [module for module in modules if module._parameters[name] is parameter]
            for module, alias in zip(
                tied, _Aliases.apply(parameter, len(tied), dtype), strict=True
            ):
                swapped.append((module, name, parameter))
                module._parameters[name] = alias
        yield
    finally:
        for module, name, own in swapped:
            module._parameters[name] = own


def _alias_dtype(module: nn.Module, parameter: Tensor) -> torch.dtype | None:
    """dtype of the aliases; None where autograd's own sum is as good."""
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    cast = autocast_dtype(parameter.device)
    if cast is not None:
        # A linear's copy is made here, once for all loops. What other modules do with a parameter
        # is not known: autocast casts each of its aliases where it casts the parameter.
        is_linear = isinstance(module, nn.Linear)
        return cast if is_linear else parameter.dtype
    return None if parameter.dtype == torch.float32 else parameter.dtype
