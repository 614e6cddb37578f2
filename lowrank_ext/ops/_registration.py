"""Registration of an op's fakes, autograd and autocast in the torch.library of a given name.

The package's ops are in lowrank_ext. The tests have a second library with the same schemas, which
runs the CUDA kernels on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowrank_ext.ops._argument_checks import on_one_device, refuse_other_layouts

HALF_DTYPES = (torch.bfloat16, torch.float16)
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
)
# Kept, because a registration ends when its Library object is freed.
_LIBRARIES: dict[str, torch.library.Library] = {}
_FRAGMENTS: list[torch.library.Library] = []


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
    """Fakes of the op and of its backward op, and what both refuse."""
    for name, function in ((op_name, fake), (f"{op_name}_backward", backward_fake)):
        op = getattr(getattr(torch.ops, library_name), name).default
        torch.library.register_fake(f"{library_name}::{name}", on_one_device(op, function))
        refuse_other_layouts(library(library_name), op)


def register_autograd(
    library_name: str,
    op_name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    plain: Callable[..., Any],
    plain_backward: Callable[..., Any],
) -> None:
    """torch.library.register_autograd without its look-up of default arguments.

    That look-up walks the schema at every call: 90 us for an op of eleven arguments, more than the
    whole rest of the call at decode sizes. Our schemas have no defaults, so nothing is lost.
    `setup_context` is as in torch.library.register_autograd. `backward` takes ctx, the backward op
    and the upstream gradients, at least one of which is not None; it may omit trailing Nones.

    `plain` and `plain_backward` are the op and its backward op as compositions of torch's own ops,
    which torch can transform: they run under torch.func and forward-mode AD, and `plain_backward`
    where a gradient is to be differentiated (create_graph=True).
    """
    backward_name = f"{op_name}_backward"
    backward_op = getattr(getattr(torch.ops, library_name), backward_name).default

    def op_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def compute_backward(*args: Any) -> Any:
        if _is_differentiated():
            return backward_op(*args)
        # Past the Python kernel. Around nothing else: activation checkpointing runs the forward
        # again, which autograd must see, when saved tensors are asked for.
        with torch._C._AutoDispatchBelowAutograd():
            return backward_op(*args)

    def op_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        used = gradients[0] is not None or any(gradient is not None for gradient in gradients)
        results = backward(ctx, compute_backward, *gradients) if used else ()
        return (*results, *(None,) * (len(needs_input_grad(ctx)) - len(results)))

    formula = _make_formula(library_name, op_name, op_backward, op_setup_context)
    _register_kernels(library_name, op_name, formula, _without_autocast(plain))
    plain_backward = _without_autocast(plain_backward)
    _register_kernels(library_name, backward_name, _ignoring_keyset(plain_backward), plain_backward)


def _is_differentiated() -> bool:
    """Whether what is computed now may be differentiated again, or is transformed."""
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() or transformed


def _make_formula(
    library_name: str,
    op_name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Callable[..., Any]:
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
    # Past Function.apply, whose checks for torch.func the caller has made.
    apply: Callable[..., Any] = super(torch.autograd.Function, Formula).apply
    return apply


def _register_kernels(
    library_name: str,
    name: str,
    differentiable: Callable[..., Any],
    plain: Callable[..., Any],
) -> None:
    """Kernels of the op above the device's: `differentiable` where an argument requires a gradient,
    `plain` under a transform."""
    op = getattr(getattr(torch.ops, library_name), name).default
    after_autograd = torch._C._after_autograd_keyset
    functorch_is_active = torch._C._are_functorch_transforms_active

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or functorch_is_active():
            return plain(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after_autograd, *args)

    library(library_name).impl(name, kernel, "Autograd", with_keyset=True)
    library(library_name).impl(name, plain, "FuncTorchBatched")


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the kernels run it: where autocast has done its part, or has none."""

    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return function(*args)

    return run


def _ignoring_keyset(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda keyset, *args: function(*args)


def register_any_scaling(library_name: str, op_name: str) -> None:
    """The overload `op_name.any_scaling`, which torch.compile traces into.

    It takes scaling as a Scalar, which dynamo passes on as a symbol where it has made the number an
    input of the graph; lora_b is then multiplied by it. In the op's own float argument a number is
    a constant of the graph, and each new one would compile again.
    """
    op = getattr(getattr(torch.ops, library_name), op_name).default
    names = [argument.name for argument in op._schema.arguments]
    lora_b, scaling = names.index("lora_b"), names.index("scaling")
    arguments = str(op._schema).partition("(")[2].replace("float scaling", "Scalar scaling")

    def kernel(*args: Any) -> Any:
        if isinstance(args[scaling], torch.SymFloat):
            changed = list(args)
            changed[lora_b], changed[scaling] = args[lora_b] * args[scaling], 1.0
            return op(*changed)
        return op(*args)

    fragment = torch.library.Library(library_name, "FRAGMENT")
    fragment.define(f"{op_name}.any_scaling({arguments}")
    fragment.impl(f"{op_name}.any_scaling", kernel, "CompositeImplicitAutograd")
    _FRAGMENTS.append(fragment)


def overload(op: Any) -> Any:
    """The overload of ``op`` to call: ``any_scaling`` in code that torch.compile traces."""
    return op.any_scaling if torch.compiler.is_dynamo_compiling() else op.default


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
