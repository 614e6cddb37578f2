"""What every op with a low-rank branch shares: seed, fake checks, autograd and autocast."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Keeps the autocast and the fake registrations alive for as long as the module is.
LIBRARY = torch.library.Library("lowrank_ext", "IMPL")


class Branch(NamedTuple):
    """The branch arguments of an op, in schema order."""

    lora_a: Tensor
    lora_b: Tensor
    core: Tensor | None
    rank_scale: Tensor | None
    out_scale: Tensor | None
    scaling: float
    dropout_p: float
    seed: Tensor | None


def draw_seed(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed to pass on: the caller's, else one from torch's generator where it is needed."""
    if seed is not None or dropout_p == 0.0:
        return seed
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_branch(op: str, branch: Branch, x: Tensor, in_features: int, out_features: int) -> None:
    """The shape checks of csrc/checks.h in the same words, for fake tensors."""
    a, b = branch.lora_a, branch.lora_b
    check_shape(
        op,
        "lora_a",
        a,
        a.dim() == 2 and a.shape[0] >= 1 and a.shape[1] == in_features,
        f"[r, in_features={in_features}]",
    )
    rank = a.shape[0]
    check_shape(
        op,
        "lora_b",
        b,
        b.dim() == 2 and b.shape[0] == out_features and b.shape[1] == rank,
        f"[out_features={out_features}, r={rank}]",
    )
    vectors = (
        ("rank_scale", branch.rank_scale, rank, "r"),
        ("out_scale", branch.out_scale, out_features, "out_features"),
    )
    if branch.core is not None:
        core = branch.core
        square = core.dim() == 2 and core.shape[0] == rank and core.shape[1] == rank
        check_shape(op, "core", core, square, f"[r={rank}, r={rank}]")
    for name, vector, size, label in vectors:
        if vector is not None:
            check_shape(
                op, name, vector, vector.dim() == 1 and vector.shape[0] == size, f"[{label}={size}]"
            )


def check_shape(op: str, name: str, tensor: Tensor, matches: bool, expected: str) -> None:
    torch._check(
        matches,
        lambda: f"{op}: {name} must be {expected}, got [{', '.join(map(str, tensor.shape))}]",
    )


def gradient_outputs(
    dout: Tensor, branch: Branch, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fake outputs of a backward op: dx and five adapter gradients, [0] where not needed."""
    dx = dout.new_empty((*dout.shape[:-1], branch.lora_a.shape[1]) if needs[0] else (0,))
    dlora_a, dlora_b, dcore, drank_scale, dout_scale = (
        tensor.new_empty(tensor.shape) if needed and tensor is not None else dout.new_empty((0,))
        for tensor, needed in zip(branch[:5], needs[1:], strict=True)
    )
    return dx, dlora_a, dlora_b, dcore, drank_scale, dout_scale


def not_needed_as_none(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def save_branch(ctx: Any, branch: Branch, *others: Tensor | None) -> None:
    """Saves the branch's tensors first, then `others`; :func:`saved_branch` gives both back."""
    ctx.save_for_backward(*branch[:5], branch.seed, *others)
    ctx.scaling, ctx.dropout_p = branch.scaling, branch.dropout_p


def saved_branch(ctx: Any) -> tuple[Branch, tuple[Any, ...]]:
    lora_a, lora_b, core, rank_scale, out_scale, seed, *others = ctx.saved_tensors
    branch = Branch(lora_a, lora_b, core, rank_scale, out_scale, ctx.scaling, ctx.dropout_p, seed)
    return branch, tuple(others)


def register_autograd(
    op_name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """torch.library.register_autograd without its look-up of default arguments.

    That look-up walks the schema at every call: 90 us for an op of eleven arguments, more than the
    whole rest of the call at decode sizes. Our schemas have no defaults, so nothing is lost.
    `backward` and `setup_context` are what torch.library.register_autograd documents.
    """
    op = getattr(torch.ops.lowrank_ext, op_name).default
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

    LIBRARY.impl(op_name, kernel, "Autograd", with_keyset=True)


def refuse_second_derivative(op_name: str) -> None:
    """Gradients of gradients raise, where torch would take the backward op for a constant."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{op_name}: second derivatives are not available")

    register_autograd(f"{op_name}_backward", backward, lambda ctx, inputs, output: None)


def needs_input_grad(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad for the op's own arguments, in schema order."""
    return tuple(ctx.needs_input_grad[1:])


def register_autocast(op_name: str, num_base_args: int) -> None:
    """Autocast rule: the first `num_base_args` (x, weight, bias, base_out) go to autocast's dtype.

    Adapter tensors in fp32 stay as they are: the kernels round them, and their gradients come back
    in fp32 without a cast node. Adapter tensors in another half-size dtype are cast. fp64 is left
    alone, as by torch.
    """
    packet = getattr(torch.ops.lowrank_ext, op_name)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(
            op_name, _autocast_kernel(packet.default, device_type, key, num_base_args), key
        )


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
