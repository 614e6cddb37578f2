"""What every op with a low-rank branch shares: seed, fake checks, autograd and autocast.

The registrations take the name of the library of ops: the library's own is lowrank_ext; the tests
have a second one with the same schemas, the CUDA backend run on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Keeps the registrations of each library of ops alive for as long as the module is.
_LIBRARIES: dict[str, torch.library.Library] = {}


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
    allow_tf32: bool


def tf32_allowed(x: Tensor) -> bool:
    """Whether torch is set to round the factors of fp32 products on x's device to TF32.

    The kernels cannot read torch's setting: the stable ABI has no call for it.
    """
    return x.is_cuda and x.dtype == torch.float32 and _tf32_is_set()


# Dynamo cannot trace the getter. It guards torch's setting by itself, so a change recompiles.
@torch.compiler.assume_constant_result
def _tf32_is_set() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
    ctx.scaling, ctx.dropout_p, ctx.allow_tf32 = (
        branch.scaling,
        branch.dropout_p,
        branch.allow_tf32,
    )


def saved_branch(ctx: Any) -> tuple[Branch, tuple[Any, ...]]:
    lora_a, lora_b, core, rank_scale, out_scale, seed, *others = ctx.saved_tensors
    adapter = (lora_a, lora_b, core, rank_scale, out_scale)
    branch = Branch(*adapter, ctx.scaling, ctx.dropout_p, seed, ctx.allow_tf32)
    return branch, tuple(others)


def library(name: str) -> torch.library.Library:
    if name not in _LIBRARIES:
        _LIBRARIES[name] = torch.library.Library(name, "IMPL")
    return _LIBRARIES[name]


def register_fakes(
    library_name: str,
    op_name: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
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
    `setup_context` is what torch.library.register_autograd documents; `backward` also gets the op
    that computes the gradients, before the upstream gradients. Gradients of gradients raise, where
    torch would take that op for a constant.
    """
    backward_op = getattr(getattr(torch.ops, library_name), f"{op_name}_backward").default

    def op_backward(ctx: Any, *gradients: Any) -> Any:
        return backward(ctx, backward_op, *gradients)

    def second_backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{op_name}: second derivatives are not available")

    _register_formula(library_name, op_name, op_backward, setup_context)
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
