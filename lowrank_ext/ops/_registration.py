"""Registration of an op's fakes, autograd and autocast in the torch.library of a given name.

The package's ops are in lowrank_ext. The tests have a second library with the same schemas, which
runs the CUDA kernels on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Kept, because a registration ends when its Library object is freed.
_LIBRARIES: dict[str, torch.library.Library] = {}


def library(name: str) -> torch.library.Library:
    """The Library that holds the Python kernels of torch.ops.<name>."""
    if name not in _LIBRARIES:
        _LIBRARIES[name] = torch.library.Library(name, "IMPL")
    return _LIBRARIES[name]


def register_fakes(
    library_name: str,
    op_name: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Fakes of the op and of its backward op."""
    for name, function in ((op_name, fake), (f"{op_name}_backward", backward_fake)):
        torch.library.register_fake(f"{library_name}::{name}", function)


def register_autograd(
    library_name: str,
    op_name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """torch.library.register_autograd without its look-up of default arguments.

    That look-up walks the schema at every call: 90 us for an op of eleven arguments, more than the
    whole rest of the call at decode sizes. Our schemas have no defaults, so nothing is lost.
    `setup_context` is as in torch.library.register_autograd. `backward` takes ctx, the backward op
    and the upstream gradients, at least one of which is not None; it may omit trailing Nones.
    Second derivatives raise; torch alone would treat the backward op as a constant.
    """
    backward_op = getattr(getattr(torch.ops, library_name), f"{op_name}_backward").default

    def op_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def op_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        used = any(gradient is not None for gradient in gradients)
        results = backward(ctx, backward_op, *gradients) if used else ()
        return (*results, *(None,) * (len(needs_input_grad(ctx)) - len(results)))

    def second_backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{op_name}: second derivatives are not available")

    _register_formula(library_name, op_name, op_backward, op_setup_context)
    _register_formula(
        library_name, f"{op_name}_backward", second_backward, lambda ctx, inputs, output: None
    )


def _register_formula(
    library_name: str,
    op_name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    op = getattr(getattr(torch.ops, library_name), op_name).default
    after_autograd = torch._C._after_autograd_keyset

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset & after_autograd, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return (None, *backward(ctx, *gradients))

    Formula.__name__ = f"{op_name}_formula"

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Formula.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after_autograd, *args)

    library(library_name).impl(op_name, kernel, "Autograd", with_keyset=True)


def needs_input_grad(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad for the op's own arguments, in schema order."""
    return tuple(ctx.needs_input_grad[1:])


def needed_gradients(
    backward_op: Callable[..., Sequence[Tensor]], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that `backward_op` returns for `args` and `needs`; None where not needed."""
    gradients = backward_op(*args, *needs)
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def register_autocast(library_name: str, op_name: str, num_base_args: int) -> None:
    """Autocast rule: the first `num_base_args` (x, weight, bias, base_out) go to autocast's dtype.

    Adapter tensors in fp32 stay as they are: the kernels round them, and their gradients come back
    in fp32 without a cast node. Adapter tensors in another half-size dtype are cast. fp64 is left
    alone, as by torch.
    """
    op = getattr(getattr(torch.ops, library_name), op_name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        kernel = _autocast_kernel(op, device_type, key, num_base_args)
        library(library_name).impl(op_name, kernel, key)


def _autocast_kernel(
    op: Callable[..., Any], device_type: str, key: str, num_base_args: int
) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast_base(arg, dtype) for arg in args[:num_base_args]]
        cast += [_cast_adapter(arg, dtype) for arg in args[num_base_args:]]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return kernel


def _cast_base(arg: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
    return arg.to(dtype) if castable else arg


def _cast_adapter(arg: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(arg, Tensor) and arg.dtype in HALF_DTYPES
    return arg.to(dtype) if castable else arg
