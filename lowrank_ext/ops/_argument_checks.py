"""Refusal of tensors that no kernel may see: on two devices, or not strided.

The kernels compare devices by themselves (csrc/checks.h). With a tensor on meta among the arguments
torch calls the fake in place of a kernel, and with one that is not strided it finds no kernel.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

# Of these arguments, the first that an op has is the one that the others must agree with.
_REFERENCES = ("dout", "x", "router_logits")
_LAYOUT_KEYS = (
    *("SparseCPU", "SparseCUDA", "SparseMeta", "SparseCsrCPU", "SparseCsrCUDA", "SparseCsrMeta"),
    *("NestedTensorCPU", "NestedTensorCUDA", "NestedTensorMeta"),
    *("QuantizedCPU", "QuantizedCUDA", "MkldnnCPU"),
)


def on_one_device(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake of ``op``, which first checks that all tensors are there and on one device."""
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    required = [i for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]
    reference = next(name for name in _REFERENCES if name in names)
    position = names.index(reference)

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        for i in required:
            if args[i] is None:
                raise RuntimeError(f"{op._opname}: {names[i]} must be a tensor, got None")
        expected = args[position].device
        for name, tensor in _tensors(names, args):
            if tensor.device != expected:
                raise RuntimeError(
                    f"{op._opname}: {name} must be on the device of {reference} ({expected}), "
                    f"got {tensor.device}"
                )
        return fake(*args)

    return checked


def refuse_other_layouts(library: torch.library.Library, op: Any) -> None:
    """Register for ``op`` an error that names the argument which is not strided."""
    names = [argument.name for argument in op._schema.arguments]

    def refuse(*args: Any) -> Any:
        for name, tensor in _tensors(names, args):
            if (kind := _kind(tensor)) != "strided":
                raise RuntimeError(
                    f"{op._opname}: {name} must be a strided tensor, got a {kind} one; pass a "
                    "dense copy of it"
                )
        raise RuntimeError(f"{op._opname}: all tensors must be strided")

    for key in _LAYOUT_KEYS:
        library.impl(op._opname, refuse, key)
    # Jagged tensors: a Python subclass, without a dispatch key of its own.
    torch.library.register_torch_dispatch(
        op,
        NestedTensor,
        lambda mode, func, types, args, kwargs: refuse(*args),
        lib=library,
    )


def _tensors(names: Sequence[str], args: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, arg in zip(names, args, strict=True):
        if isinstance(arg, Tensor):
            yield name, arg


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    return str(tensor.layout).removeprefix("torch.").removeprefix("_")
