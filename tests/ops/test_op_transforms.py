"""The five ops under torch's transforms against the reference under the same ones, in fp64."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from lowrank_cases import OPTIONAL
from lowrank_cases import make_tensors as lowrank_tensors
from moe_cases import make_tensors as moe_tensors
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import TRANSFORMS, assert_same, scalar

from lowrank_ext import ops, reference

SEED = torch.tensor([7])
IDS = torch.tensor([0, 2, -1, 1])
RANKS = torch.tensor([2, 0, 1])
Function = Callable[..., Any]


def seeded(p: float) -> dict[str, Any]:
    return {"dropout_p": p, "seed": SEED if p else None}


def lowrank_linear(space: ModuleType, p: float) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, *scales: Tensor) -> Any:
        named = dict(zip(OPTIONAL, scales, strict=True))
        return space.lowrank_linear(x, weight, bias, a, b, scaling=1.5, **named, **seeded(p))

    return run


def lowrank_add(space: ModuleType, p: float) -> Function:
    def run(x: Tensor, base_out: Tensor, a: Tensor, b: Tensor, *scales: Tensor) -> Any:
        named = dict(zip(OPTIONAL, scales, strict=True))
        return space.lowrank_add(base_out, x, a, b, scaling=1.5, **named, **seeded(p))

    return run


def multi_lowrank_add(space: ModuleType, p: float) -> Function:
    scaling = torch.tensor([1.5, 1.0, -2.0], dtype=torch.float64)

    def run(x: Tensor, base_out: Tensor, a: Tensor, b: Tensor) -> Any:
        return space.multi_lowrank_add(base_out, x, a, b, IDS, scaling, ranks=RANKS, **seeded(p))

    return run


def moe_lowrank_add(space: ModuleType, p: float) -> Function:
    def run(x: Tensor, base_out: Tensor, router: Tensor, a: Tensor, b: Tensor) -> Any:
        mask = torch.tensor([True, True, False, True])
        options = {"top_k": 2, "scaling": 1.5, "token_mask": mask}
        return space.moe_lowrank_add(base_out, x, router, a, b, **options, **seeded(p))[:2]

    return run


def moe_route(space: ModuleType, p: float) -> Function:
    def run(logits: Tensor, factor: Tensor) -> Any:
        routing = space.moe_route(logits * factor, top_k=2)
        return routing[0], routing[3]

    return run


def tensors_of(op: str) -> list[Tensor]:
    if op == "moe_route":
        return [torch.randn(4, 3).double(), torch.randn(3).double()]
    if op == "moe_lowrank_add":
        named = moe_tensors((4,), 3, 2, 3, 2)
        return [named.pop("x"), *named.values()]
    if op == "multi_lowrank_add":
        shapes = (4, 3), (4, 2), (3, 2, 3), (3, 2, 2)
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    named = lowrank_tensors(op, (4,), 3, 2, 2, optional=OPTIONAL)
    order = ("x", "weight", "bias") if op == "lowrank_linear" else ("x", "base_out")
    return [named[name] for name in (*order, "lora_a", "lora_b", *OPTIONAL)]


CASES: dict[str, Callable[[ModuleType, float], Function]] = {
    function.__name__: function
    for function in (lowrank_linear, lowrank_add, multi_lowrank_add, moe_lowrank_add, moe_route)
}
every_op = pytest.mark.parametrize("op", CASES)


@pytest.mark.simt(every=5)
@every_op
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_op_as_the_reference(device: str, op: str, transform: str, p: float) -> None:
    if op == "moe_route" and p:
        pytest.skip("has no dropout")
    tensors = tensors_of(op)
    run = TRANSFORMS[transform]
    assert_same(run(CASES[op](ops, p), tensors), run(CASES[op](reference, p), tensors))


@every_op
def test_gradcheck_of_every_order(op: str) -> None:
    inputs = [t.requires_grad_() for t in tensors_of(op)]
    function = CASES[op](ops, 0.0 if op == "moe_route" else 0.5)
    check = {"check_batched_grad": True, "fast_mode": True}
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, inputs, **check, **forward)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, **check)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_keeps_dtypes(op: str, dtype: torch.dtype) -> None:
    """Tangents have y's dtype, gradients that of their tensor, both plain torch's to rounding."""
    tensors = [(t / 4).to(dtype) for t in tensors_of(op)]
    for transform in ("jvp", "grad", "double_backward_of_x"):
        got = TRANSFORMS[transform](CASES[op](ops, 0.0), tensors)
        expected = TRANSFORMS[transform](CASES[op](reference, 0.0), tensors)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=32 * eps, atol=64 * eps)


@pytest.mark.parametrize(
    ("op", "transform"),
    [("lowrank_linear", "jvp"), ("multi_lowrank_add", "vmap"), ("moe_route", "grad")],
)
def test_compiled(op: str, transform: str) -> None:
    tensors = tensors_of(op)

    def run(space: ModuleType, *tensors: Tensor) -> Any:
        return TRANSFORMS[transform](CASES[op](space, 0.0), tensors)

    compiled = torch.compile(run, backend="aot_eager")
    assert_same(compiled(ops, *tensors), run(reference, *tensors))


# Dropout that draws its seed


def dropped(x: Tensor) -> Tensor:
    """drop(x), p = 0.5, of ones: zeros and twos."""
    one = torch.eye(x.shape[-1], dtype=x.dtype)
    return ops.lowrank_add(torch.zeros_like(x), x, one, one, dropout_p=0.5)


def test_vmap_draws_as_it_is_told() -> None:
    x = torch.ones(3, 8, 16)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(x)
    same = vmap(dropped, randomness="same")(x)
    assert torch.equal(same[0], same[1]) and set(same.unique().tolist()) == {0.0, 2.0}
    different = vmap(dropped, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    assert set(different.unique().tolist()) == {0.0, 2.0}


def test_the_tangent_has_the_mask_of_the_value() -> None:
    x = torch.ones(8, 16)
    y, tangent = jvp(dropped, (x,), (x,))
    assert torch.equal(y, tangent) and set(y.unique().tolist()) == {0.0, 2.0}


# What is refused


def wrong_calls(op: str) -> dict[str, tuple[list[Tensor], str]]:
    """Tensors that the op refuses, with the message."""
    tensors = tensors_of(op)
    if op == "moe_route":
        return {"dtype": ([tensors[0].long(), torch.tensor(1)], "router_logits must be float64")}
    narrow = [*tensors[:-1], tensors[-1][..., :1]] if "multi" in op else [tensors[0][:, :2]]
    wrong_shape = narrow if "multi" in op else [*narrow, *tensors[1:]]
    wrong_dtype = [tensors[0].float(), *tensors[1:]]
    return {"shape": (wrong_shape, f"{op}: .* must be"), "dtype": (wrong_dtype, f"{op}: .* dtype")}


@every_op
@pytest.mark.parametrize("active", ["grad", "vmap"])
def test_wrong_arguments_raise_the_ops_error(op: str, active: str) -> None:
    factor = torch.ones((), dtype=torch.float64)
    for tensors, message in wrong_calls(op).values():

        def run(factor: Tensor, tensors: list[Tensor] = tensors) -> Tensor:
            scaled = [t * factor.to(t.dtype) for t in tensors]
            return scalar(CASES[op](ops, 0.0))(*scaled)

        with pytest.raises(RuntimeError, match=message):
            grad(run)(factor) if active == "grad" else vmap(run)(factor.expand(2))


def test_rows_with_a_wrong_id_are_nan() -> None:
    x, base_out, a, b = tensors_of("multi_lowrank_add")
    scaling = torch.ones(3, dtype=torch.float64)
    ids = torch.tensor([0, 3, -2, 1])

    def run(x: Tensor) -> Tensor:
        return ops.multi_lowrank_add(base_out, x, a, b, ids, scaling)

    y, _ = jvp(run, (x,), (x,))
    assert y.isnan().all(1).tolist() == [False, True, True, False]


# Counted products


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


FLOP_CASES: dict[str, tuple[list[tuple[int, ...]], Callable[[ModuleType], Function]]] = {
    "lowrank_linear": (
        [(4, 7), (5, 7), (3, 7), (5, 3), (3, 3)],
        lambda space: lambda x, w, a, b, core: space.lowrank_linear(x, w, None, a, b, core=core),
    ),
    "lowrank_add": (
        [(4, 7), (4, 5), (3, 7), (5, 3), (3,)],
        lambda space: lambda x, y, a, b, r: space.lowrank_add(y, x, a, b, rank_scale=r),
    ),
    "multi_lowrank_add": (  # one adapter: plain torch multiplies every row with every adapter
        [(4, 7), (4, 5), (1, 3, 7), (1, 5, 3)],
        lambda space: (
            lambda x, y, a, b: space.multi_lowrank_add(
                y, x, a, b, torch.zeros(4, dtype=torch.int64), torch.ones(1)
            )
        ),
    ),
    "moe_lowrank_add": (  # all experts chosen, for the same reason
        [(4, 7), (4, 5), (2, 7), (2, 3, 7), (2, 5, 3)],
        lambda space: lambda x, y, r, a, b: space.moe_lowrank_add(y, x, r, a, b, top_k=2)[0],
    ),
    "moe_route": (
        [(4, 7)],
        lambda space: lambda logits: space.moe_route(logits, top_k=2)[0],
    ),
}


@every_op
def test_flops_are_those_of_plain_torch(op: str) -> None:
    """Forward, and backward for every choice of one or all tensors that need a gradient."""
    shapes, make = FLOP_CASES[op]
    tensors = [torch.randn(shape) for shape in shapes]
    for needed in [*((i,) for i in range(len(tensors))), tuple(range(len(tensors)))]:

        def run(space: ModuleType, needed: tuple[int, ...] = needed) -> None:
            inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
            make(space)(*inputs).square().sum().backward()

        assert counted(lambda: run(ops)) == counted(lambda: run(reference)), needed
    assert op == "moe_route" or counted(lambda: run(ops)) > 0
