"""Inputs, evaluation and comparison shared by the tests of lowrank_linear and lowrank_add.

Two ways to judge a result, both against reference.py in fp64:

- ``assert_within_rule``: random values; the op's error is at most twice plain torch's error at
  the same dtype.
- ``assert_exact``: entries in {-1, 0, 1}, so that every sum is a small integer and any order of
  summation gives the same bits. This is what shape, stride, rank and thread tests use.
"""

from collections.abc import Callable
from itertools import combinations
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import DtypePair
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lowrank_ext import ops, reference

Tensors = dict[str, Tensor | None]
Values = dict[str, Tensor]

POSITIONAL = {
    "lowrank_linear": ("x", "weight", "bias", "lora_a", "lora_b"),
    "lowrank_add": ("base_out", "x", "lora_a", "lora_b"),
}
OPS = list(POSITIONAL)
OPTIONAL = ("core", "rank_scale", "out_scale")
SUBSETS = [names for size in range(4) for names in combinations(OPTIONAL, size)]
ADAPTER = ("lora_a", "lora_b", *OPTIONAL)

FP64 = DtypePair(torch.float64, torch.float64)
FP32 = DtypePair(torch.float32, torch.float32)
BF16 = DtypePair(torch.bfloat16, torch.bfloat16)
MIXED = DtypePair(torch.bfloat16, torch.float32)


def seed_tensor(seed: int, device: str = "cpu") -> Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=device)


def make_tensors(
    op: str,
    lead: tuple[int, ...],
    num_in: int,
    num_out: int,
    rank: int,
    dtypes: DtypePair = FP64,
    device: str = "cpu",
    *,
    bias: bool = True,
    optional: tuple[str, ...] = (),
    integers: bool = False,
) -> Tensors:
    """Every argument of `op`; None for a bias or an optional tensor that is not asked for.

    Random values have the size that keeps y of order one; integers are drawn from {-1, 0, 1}.
    """
    shapes = {
        "x": (*lead, num_in),
        "lora_a": (rank, num_in),
        "lora_b": (num_out, rank),
        "core": (rank, rank),
        "rank_scale": (rank,),
        "out_scale": (num_out,),
    }
    if op == "lowrank_linear":
        shapes |= {"weight": (num_out, num_in), "bias": (num_out,)}
    else:
        shapes |= {"base_out": (*lead, num_out)}
    tensors: Tensors = {}
    for name, shape in shapes.items():
        absent = (name == "bias" and not bias) or (name in OPTIONAL and name not in optional)
        tensors[name] = None if absent else _draw(name, shape, integers, dtypes, device)
    return tensors


def _draw(
    name: str, shape: tuple[int, ...], integers: bool, dtypes: DtypePair, device: str
) -> Tensor:
    if integers:
        values = torch.randint(-1, 2, shape, dtype=torch.float64)
    else:
        values = torch.randn(shape, dtype=torch.float64)
        if name in ("weight", "lora_a", "lora_b", "core"):
            values /= max(1, shape[-1]) ** 0.5
    return values.to(device, dtypes.adapter if name in ADAPTER else dtypes.base)


def make_dout(tensors: Tensors, integers: bool = False) -> Tensor:
    x, lora_b = tensors["x"], tensors["lora_b"]
    shape = (*x.shape[:-1], lora_b.shape[0])
    return _draw("dout", shape, integers, DtypePair(x.dtype, x.dtype), x.device.type)


def call(namespace: ModuleType, op: str, tensors: Tensors, **options: object) -> Tensor:
    """`namespace.op(...)`, the namespace being ops or reference."""
    positional = [tensors[name] for name in POSITIONAL[op]]
    named = {name: tensors[name] for name in OPTIONAL}
    return getattr(namespace, op)(*positional, **named, **options)


def present(tensors: Tensors) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None]


def evaluate(
    namespace: ModuleType,
    op: str,
    tensors: Tensors,
    dout: Tensor | None,
    needs: list[str] | None = None,
    **options: object,
) -> Values:
    """y and the gradient of every tensor in `needs` (all of them by default), as y, dx, dlora_a, …

    `dout=None` stands for y.sum(), whose gradient is a zero-stride tensor. Inputs must come out
    unchanged.
    """
    needs = present(tensors) if needs is None else needs
    leaves = {name: None if t is None else t.detach() for name, t in tensors.items()}
    for name in needs:
        leaves[name].requires_grad_()
    inputs = {name: t for name, t in leaves.items() if t is not None}
    if dout is not None:
        inputs["dout"] = dout
    copies = {name: t.detach().clone() for name, t in inputs.items()}
    versions = {name: t._version for name, t in inputs.items()}

    y = call(namespace, op, leaves, **options)
    output, upstream = (y.sum(), None) if dout is None else (y, dout)
    grads = torch.autograd.grad(output, [leaves[name] for name in needs], upstream)

    for name, tensor in inputs.items():
        assert tensor._version == versions[name], f"{name} was written to"
        assert_same_bits(tensor.detach(), copies[name], f"{name} was modified")
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}


def in_fp64(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.detach().double() for name, t in tensors.items()}


def true_values(
    op: str, tensors: Tensors, dout: Tensor | None, needs: list[str] | None, **options: object
) -> Values:
    upstream = None if dout is None else dout.double()
    return evaluate(reference, op, in_fp64(tensors), upstream, needs, **options)


def assert_same_bits(actual: Tensor, expected: Tensor, message: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{message}: {text}"
    )


def assert_same_values(actual: Values, expected: Values) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_same_bits(value, expected[name], name)


def assert_dtypes_and_shapes(values: Values, tensors: Tensors) -> None:
    """y has x's dtype, each gradient the dtype and shape of its tensor."""
    x, lora_b = tensors["x"], tensors["lora_b"]
    assert values["y"].dtype == x.dtype
    assert values["y"].shape == (*x.shape[:-1], lora_b.shape[0])
    for name, value in values.items():
        if name != "y":
            assert value.dtype == tensors[name[1:]].dtype, name
            assert value.shape == tensors[name[1:]].shape, name


# Plain torch is the truth itself in fp64, and in fp32 it may sum pairwise where a product sums in
# order: there the floor is what another order of summation does. Elsewhere it is one rounding.
ORDER_OF_SUMMATION = {torch.float64: 1e-13, torch.float32: 2e-6}


def assert_within_rule(
    op: str,
    tensors: Tensors,
    dout: Tensor | None,
    needs: list[str] | None = None,
    **options: object,
) -> Values:
    """The op's error is at most twice plain torch's, in the maximum and in the mean."""
    got = evaluate(ops, op, tensors, dout, needs, **options)
    plain = evaluate(reference, op, tensors, dout, needs, **options)
    truth = true_values(op, tensors, dout, needs, **options)
    assert_dtypes_and_shapes(got, tensors)
    assert_errors_within_rule(got, plain, truth, tensors["x"].dtype)
    return got


def assert_errors_within_rule(
    got: Values, plain: Values, truth: Values, dtype: torch.dtype
) -> None:
    tiny = ORDER_OF_SUMMATION.get(dtype, torch.finfo(dtype).eps)
    for name, true in truth.items():
        if true.numel() == 0:
            continue
        assert_error_within_rule(name, got[name], plain[name], true, tiny * true.abs().max())


def assert_error_within_rule(
    name: str, got: Tensor, plain: Tensor, true: Tensor, floor: Tensor
) -> None:
    error, allowed = (got.double() - true).abs(), (plain.double() - true).abs()
    for statistic in (torch.max, torch.mean):
        assert statistic(error) <= 2 * statistic(allowed) + floor, (
            f"{name}: {statistic.__name__} error {statistic(error):.3g}, plain torch "
            f"{statistic(allowed):.3g}, floor {floor:.3g}"
        )


def assert_exact(
    op: str,
    tensors: Tensors,
    dout: Tensor | None,
    needs: list[str] | None = None,
    **options: object,
) -> Values:
    """On small integers, values and gradients equal the truth, rounded once, bit for bit."""
    got = evaluate(ops, op, tensors, dout, needs, **options)
    truth = true_values(op, tensors, dout, needs, **options)
    assert_dtypes_and_shapes(got, tensors)
    # Integers above this are not all representable, and y and dx are also summed in x's dtype.
    limit = 2 / torch.finfo(tensors["x"].dtype).eps
    for name in {"y", "dx"} & truth.keys():
        assert truth[name].numel() == 0 or truth[name].abs().max() <= limit, "badly chosen case"
    assert_same_values(got, {name: true.to(got[name].dtype) for name, true in truth.items()})
    return got


HALVES = [torch.bfloat16, torch.float16]


def odd_integers(like: Tensor) -> Tensor:
    """As large as the half-size dtype holds them: sums of a few it cannot hold."""
    limit = round(1 / torch.finfo(like.dtype).eps) // 2
    return (2 * torch.randint_like(like, -limit, limit, dtype=torch.float64) + 1).to(like.dtype)


def raw_args(
    op: str,
    tensors: Tensors,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    allow_tf32: bool = False,
) -> tuple:
    """Arguments of torch.ops.lowrank_ext.<op>."""
    names = (*POSITIONAL[op], *OPTIONAL)
    return (*(tensors[name] for name in names), scaling, dropout_p, seed, allow_tf32)


GRADIENTS = ("dx", "dlora_a", "dlora_b", "dcore", "drank_scale", "dout_scale")


def raw_backward_args(
    op: str,
    tensors: Tensors,
    dout: Tensor,
    h: Tensor | None,
    needs: tuple[str, ...],
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    allow_tf32: bool = False,
) -> tuple:
    """Arguments of <op>_backward that computes the gradients named in `needs`."""
    weight = (tensors["weight"],) if op == "lowrank_linear" else ()
    adapter = (tensors[name] for name in ADAPTER)
    flags = (name in needs for name in GRADIENTS)
    options = (scaling, dropout_p, seed, allow_tf32)
    return (dout, tensors["x"], *weight, h, *adapter, *options, *flags)


def poison_freed_memory(*sizes: int, device: str = "cpu") -> None:
    """Leaves NaN in freed blocks of about these sizes, so that a read of unwritten memory shows."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        blocks = [
            torch.full((size + extra,), torch.nan, dtype=dtype, device=device)
            for size in sizes
            for extra in (0, 0, 16, 64)
        ]
        del blocks


# Layouts: the same values (or some of them, repeated) at other strides


def transposed(values: Tensor) -> Tensor:
    """The same values, the last two dimensions swapped in memory."""
    return values.mT.contiguous().mT if values.dim() > 1 else values


def poisoned(values: Tensor, *shape: int) -> Tensor:
    """What no kernel may read: NaN, or a number that is no id, no rank and no count."""
    return values.new_full(shape, torch.nan if values.is_floating_point() else 99)


def sliced_rows(values: Tensor) -> Tensor:
    wide = poisoned(values, *values.shape[:-1], 2, values.shape[-1])
    wide[..., 0, :] = values
    return wide[..., 0, :]


def padded_rows(values: Tensor) -> Tensor:
    """Row stride larger than the width, odd, and a storage offset: RF-09."""
    wide = poisoned(values, *values.shape[:-1], values.shape[-1] + 7)
    wide[..., 3:-4] = values
    return wide[..., 3:-4]


def sliced_columns(values: Tensor) -> Tensor:
    wide = poisoned(values, *values.shape, 2)
    wide[..., 0] = values
    return wide[..., 0]


def expanded_rows(values: Tensor) -> Tensor:
    """Every row is the first one, with stride zero."""
    return values[..., :1, :].expand(values.shape) if values.dim() > 1 else values


def expanded_columns(values: Tensor) -> Tensor:
    return values[..., :1].expand(values.shape)


LAYOUTS = [
    transposed,
    sliced_rows,
    padded_rows,
    sliced_columns,
    expanded_rows,
    expanded_columns,
]
Layout = Callable[[Tensor], Tensor]


def opcheck(op: Any, arguments: tuple[Any, ...], compiled: bool) -> None:
    """torch's opcheck. Its compiled run, 99% of its time, traces the op's fake and its autograd.

    They are the same Python functions on every device, and know of a layout what the check of
    the fake compares: tests ask for that run once for each set of arguments and dtypes.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if compiled else []
    torch.library.opcheck(op, arguments, test_utils=checks)


# Wrong arguments


def on_device(changes: dict[str, object], device: str) -> dict[str, object]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}


def assert_raises_alike(
    op: str, right: dict[str, object], changes: dict[str, object], message: str
) -> None:
    """The changed call raises and touches nothing; wrong shapes in the same words for fakes."""
    arguments = right | changes
    copies = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(RuntimeError, match=f"^{op}: {message}") as real:
        getattr(ops, op)(**arguments)
    for name, copy in copies.items():
        assert_same_bits(arguments[name], copy, name)
    if r"got \[" not in message and "top_k" not in message:
        return
    mode = FakeTensorMode()
    fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with mode, pytest.raises(RuntimeError) as fake:
        getattr(ops, op)(**fakes)
    assert first_line(fake.value) == first_line(real.value)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
