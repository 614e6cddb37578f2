"""torch's transforms as functions from a function of tensors to its results, for the tests of ops,
modules and accelerated layers.

Each takes `function`, which maps fp64 tensors to a tensor or a tuple of them, and the tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

Function = Callable[..., Any]
Tensors = Sequence[Tensor]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def scalar(function: Function) -> Function:
    """A number that depends on every output and has second derivatives."""
    return lambda *tensors: sum((y.sin() * y).sum() for y in outputs(function(*tensors)))


def tangents(tensors: Tensors) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def every(tensors: Tensors) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def run_jvp(function: Function, tensors: Tensors) -> Any:
    return jvp(function, tuple(tensors), tangents(tensors))


def run_jvp_of_x(function: Function, tensors: Tensors) -> Any:
    return jvp(lambda x: function(x, *tensors[1:]), (tensors[0],), tangents(tensors[:1]))


def run_vjp(function: Function, tensors: Tensors) -> Any:
    y, pull = vjp(function, *tensors)
    return pull(tangents([y])[0] if isinstance(y, Tensor) else tangents(y))


def run_grad(function: Function, tensors: Tensors) -> Any:
    return grad(scalar(function), every(tensors))(*tensors)


def run_jacrev(function: Function, tensors: Tensors) -> Any:
    return jacrev(function, every(tensors))(*tensors)


def run_jacfwd(function: Function, tensors: Tensors) -> Any:
    return jacfwd(function, every(tensors))(*tensors)


def run_hessian(function: Function, tensors: Tensors) -> Any:
    return hessian(scalar(function), every(tensors))(*tensors)


def run_reverse_hessian(function: Function, tensors: Tensors) -> Any:
    return jacrev(jacrev(scalar(function), every(tensors)), every(tensors))(*tensors)


def batches(tensors: Tensors) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, 2 * t, t + 1]) for t in tensors)


def run_vmap(function: Function, tensors: Tensors) -> Any:
    """Over the first tensor, then over all."""
    x, *others = tensors
    (xs,) = batches([x])
    dims = (0, *(None,) * len(others))
    return vmap(function, dims)(xs, *others), vmap(function)(*batches(tensors))


def run_vmap_grad(function: Function, tensors: Tensors) -> Any:
    """Gradients per sample, with the same weights for all and with weights of their own."""
    dims = (0, *(None,) * (len(tensors) - 1))
    per_sample = grad(scalar(function), every(tensors))
    shared = vmap(per_sample, dims)(*batches(tensors[:1]), *tensors[1:])
    return shared, vmap(per_sample)(*batches(tensors))


def run_forward_ad(function: Function, tensors: Tensors) -> Any:
    """With and without a tangent, where nothing requires a gradient."""
    with forward_ad.dual_level():
        duals = list(map(forward_ad.make_dual, tensors, tangents(tensors)))
        of_all = [forward_ad.unpack_dual(y) for y in outputs(function(*duals))]
        of_x = [forward_ad.unpack_dual(y) for y in outputs(function(duals[0], *tensors[1:]))]
        return [(dual.primal, dual.tangent) for dual in (*of_all, *of_x)]


def leaves(tensors: Tensors) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def run_double_backward(function: Function, tensors: Tensors) -> Any:
    """First, second and third derivatives."""
    inputs = leaves(tensors)
    found, value = [], scalar(function)(*inputs)
    for _ in range(3):
        gradients = torch.autograd.grad(
            value, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        found += gradients
        value = sum((g.cos() * g).sum() for g in gradients)
    return [g.detach() for g in found]


def run_double_backward_of_x(function: Function, tensors: Tensors) -> Any:
    """A penalty on the gradient of x, for each choice of one other tensor that trains."""
    found = []
    for trained in range(1, len(tensors)):
        inputs = list(tensors)
        inputs[0], inputs[trained] = leaves([tensors[0], tensors[trained]])
        value = scalar(function)(*inputs)
        both = (inputs[0], inputs[trained])
        firsts = torch.autograd.grad(value, both, create_graph=True)
        found += torch.autograd.grad(sum((g.cos() * g).sum() for g in firsts), both)
    return found


def run_batched_gradients(function: Function, tensors: Tensors) -> Any:
    """Several upstream gradients in one backward, as torch.autograd.functional does."""
    inputs = leaves(tensors)
    y = outputs(function(*inputs))
    upstream = [torch.stack([s, -2 * s]) for s in tangents(y)]
    return torch.autograd.grad(y, inputs, upstream, is_grads_batched=True)


def run_forward_over_reverse(function: Function, tensors: Tensors) -> Any:
    """A forward-mode derivative of a backward whose forward saw no dual tensor."""
    inputs = leaves(tensors)
    y = outputs(function(*inputs))
    with forward_ad.dual_level():
        upstream = list(map(forward_ad.make_dual, map(torch.ones_like, y), tangents(y)))
        gradients = torch.autograd.grad(y, inputs, upstream)
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


TRANSFORMS: dict[str, Callable[[Function, Tensors], Any]] = {
    name.removeprefix("run_"): run for name, run in globals().items() if name.startswith("run_")
}


def assert_same(got: Any, expected: Any) -> None:
    """Equal in fp64, to its rounding; no None, and not all of it zero."""
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected) > 0
    for actual, truth in zip(got, expected, strict=True):
        atol = 1e-9 * max(1.0, float(truth.detach().abs().max()))
        torch.testing.assert_close(actual, truth, rtol=1e-7, atol=atol)
    assert any(bool(truth.any()) for truth in expected)


def flat(results: Any) -> list[Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(results)
    assert all(isinstance(t, Tensor) for t in found)
    return found
