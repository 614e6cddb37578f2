"""Counts for torch.utils.flop_counter: 2 M N K for each product in the op's definition."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _rows(shape: Shape) -> int:
    return prod(shape[:-1])


def _branch(rows: int, lora_a: Shape, lora_b: Shape, core: Shape | None) -> int:
    rank, in_features = lora_a
    middle = rank if core is not None else 0
    return 2 * rows * rank * (in_features + lora_b[0] + middle)


def _branch_gradients(rows: int, args: Sequence[Any]) -> int:
    """Of the branch's last arguments in a backward op: lora_a … and the six flags."""
    (rank, in_features), (out_features, _), core = args[-15:-12]
    need_dx, need_dlora_a, need_dlora_b, need_dcore, need_drank_scale, need_dout_scale = args[-6:]
    middle = 0 if core is None else rank
    needs_mid_gradient = need_dx or need_dlora_a or need_dcore or need_drank_scale
    columns = out_features if needs_mid_gradient else 0  # G
    columns += middle if need_dx or need_dlora_a or need_drank_scale else 0
    columns += in_features * (need_dx + need_dlora_a)
    columns += middle * need_dcore
    columns += out_features if need_dlora_b or need_dout_scale else 0  # P
    return 2 * rows * rank * columns


def lowrank_linear(x: Shape, weight: Shape, bias: Any, *args: Any, **_: Any) -> int:
    return 2 * _rows(x) * prod(weight) + _branch(_rows(x), *args[:3])


def lowrank_linear_backward(dout: Shape, x: Any, weight: Shape, *args: Any, **_: Any) -> int:
    base = 2 * _rows(dout) * prod(weight) if args[-6] else 0
    return base + _branch_gradients(_rows(dout), args)


def lowrank_add(base_out: Shape, x: Shape, *args: Any, **_: Any) -> int:
    return _branch(_rows(x), *args[:3])


def lowrank_add_backward(dout: Shape, *args: Any, **_: Any) -> int:
    return _branch_gradients(_rows(dout), args)


def multi_lowrank_add(
    base_out: Shape, x: Shape, lora_a: Shape, lora_b: Shape, *_: Any, **__: Any
) -> int:
    """As if every row had an adapter of the full rank: shapes do not tell which have none."""
    return _branch(_rows(x), lora_a[1:], lora_b[1:], None)


def multi_lowrank_add_backward(dout: Shape, *args: Any, **_: Any) -> int:
    (_, rank, in_features), (_, out_features, _) = args[2:4]
    return _expert_gradients(_rows(dout) * rank, in_features, out_features, *args[-3:])


def _expert_gradients(
    slots: int, in_features: int, out_features: int, dx: bool, dlora_a: bool, dlora_b: bool
) -> int:
    upward = out_features * ((dx or dlora_a) + dlora_b)
    return 2 * slots * (upward + in_features * (dx + dlora_a))


def moe_lowrank_add(
    base_out: Shape,
    x: Shape,
    router: Shape,
    lora_a: Shape,
    lora_b: Shape,
    top_k: int,
    *_: Any,
    **__: Any,
) -> int:
    """The router, and for each token the experts that it chooses."""
    experts = _branch(_rows(x) * top_k, lora_a[1:], lora_b[1:], None)
    return 2 * _rows(x) * prod(router) + experts


def moe_lowrank_add_backward(dout: Shape, *args: Any, **_: Any) -> int:
    router, (_, rank, in_features), (_, out_features, _) = args[2:5]
    top_k = args[7][-1]
    need_dx, need_drouter, need_dlora_a, need_dlora_b = args[-4:]
    # The gates' gradient needs G too.
    needs_g = need_dx or need_dlora_a or need_drouter
    slots = _rows(dout) * top_k * rank
    upward = out_features * (needs_g + need_dlora_b)
    experts = 2 * slots * (upward + in_features * (need_dx + need_dlora_a))
    return experts + 2 * _rows(dout) * prod(router) * (need_dx + need_drouter)


def moe_route(*_: Any, **__: Any) -> int:
    return 0  # no product


_FORMULAS: tuple[Callable[..., int], ...] = (
    lowrank_linear,
    lowrank_linear_backward,
    lowrank_add,
    lowrank_add_backward,
    multi_lowrank_add,
    multi_lowrank_add_backward,
    moe_lowrank_add,
    moe_lowrank_add_backward,
)


def register_flops(library_name: str) -> None:
    """For the ops of torch.ops.<library_name>, once all their overloads are defined."""
    ops = getattr(torch.ops, library_name)
    for formula in _FORMULAS:
        register_flop_formula(getattr(ops, formula.__name__))(formula)
    register_flop_formula([ops.moe_route, ops.moe_route_backward])(moe_route)
