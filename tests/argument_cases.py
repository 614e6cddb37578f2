"""One valid call of every op and backward op, by the names of its schema's arguments.

Entries are small integers, so that sums are exact in any order and bits can be compared.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import moe_cases
import torch
from devices import OP_NAMES, DtypePair
from lowrank_cases import (
    FP32,
    LAYOUTS,
    OPTIONAL,
    POSITIONAL,
    Layout,
    expanded_columns,
    expanded_rows,
    make_tensors,
    poisoned,
    seed_tensor,
)
from torch import Tensor

Arguments = dict[str, Any]

OPS = [name for op in OP_NAMES for name in (op, f"{op}_backward")]
NUM_EXPERTS, TOP_K, NUM_ADAPTERS = 4, 2, 3
OPTIONS: Arguments = {"scaling": 0.5, "dropout_p": 0.5, "allow_tf32": False, "top_k": TOP_K}
OPTIONS |= {"shared_dropout": False}


class Sizes(NamedTuple):
    lead: tuple[int, ...]
    num_in: int
    num_out: int
    rank: int


SMALL = Sizes((5,), 13, 11, 3)
SIZES = {
    "small": SMALL,
    "leading dimensions": Sizes((2, 3), 7, 16, 5),
    "ones": Sizes((1,), 1, 1, 1),
    "one row": Sizes((1,), 9, 8, 2),
    "one column": Sizes((6,), 1, 1, 4),
    "no rows": Sizes((0,), 6, 5, 2),
    "no columns": Sizes((3,), 0, 0, 2),
}
LARGE_SIZES = {
    "300 rows": Sizes((300,), 70, 66, 17),
    "several blocks and tiles": Sizes((600,), 264, 140, 24),
}


def schema(op: str) -> list[Any]:
    return list(getattr(torch.ops.lowrank_ext, op).default._schema.arguments)


def is_optional(argument: Any) -> bool:
    return str(argument.type).startswith("Optional")


def tensor_names(op: str) -> list[str]:
    return [argument.name for argument in schema(op) if "Tensor" in str(argument.type)]


TENSORS = [(op, name) for op in OPS for name in tensor_names(op)]


def reference_of(op: str) -> str:
    """The argument that the others must agree with."""
    return next(name for name in ("dout", "x", "router_logits") if name in tensor_names(op))


# ---- valid calls


def valid_call(
    op: str, sizes: Sizes = SMALL, dtypes: DtypePair = FP32, device: str = "cpu"
) -> Arguments:
    """Every argument of the op, none of them None; a backward op computes every gradient."""
    torch.manual_seed(0)
    forward = op.removesuffix("_backward")
    values = OPTIONS | {"seed": seed_tensor(9, device)}
    values |= _DRAW[forward](forward, sizes, dtypes, device)
    if op != forward:
        values |= _saved(forward, run(forward, _of_schema(forward, values)), values)
    return _of_schema(op, values)


def run(op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """What the op returns, always as a tuple."""
    outputs = getattr(torch.ops.lowrank_ext, op)(*arguments.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _of_schema(op: str, values: Arguments) -> Arguments:
    needs = {argument.name: True for argument in schema(op) if argument.name.startswith("need_")}
    return {argument.name: (values | needs)[argument.name] for argument in schema(op)}


def _branch(op: str, sizes: Sizes, dtypes: DtypePair, device: str) -> Arguments:
    return make_tensors(op, *sizes, dtypes, device, optional=OPTIONAL, integers=True)


def _integers(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.float64).to(device, dtype)


def _mask(lead: tuple[int, ...], device: str) -> Tensor:
    return (torch.arange(torch.Size(lead).numel()) % 3 > 0).view(lead).to(device)


def _route(op: str, sizes: Sizes, dtypes: DtypePair, device: str) -> Arguments:
    logits = _integers(device, dtypes.base, *sizes.lead, NUM_EXPERTS)
    return {"router_logits": logits, "token_mask": _mask(sizes.lead, device)}


def _experts(op: str, sizes: Sizes, dtypes: DtypePair, device: str) -> Arguments:
    lead, num_in, num_out, rank = sizes
    tensors = moe_cases.integer_tensors(
        lead, num_in, num_out, NUM_EXPERTS, rank, dtypes=dtypes, device=device
    )
    return tensors | {"token_mask": _mask(lead, device)}


def _adapters(op: str, sizes: Sizes, dtypes: DtypePair, device: str) -> Arguments:
    lead, num_in, num_out, rank = sizes
    ids = torch.arange(torch.Size(lead).numel()).view(lead) * 7 % (NUM_ADAPTERS + 1) - 1
    return {
        "base_out": _integers(device, dtypes.base, *lead, num_out),
        "x": _integers(device, dtypes.base, *lead, num_in),
        "lora_a": _integers(device, dtypes.adapter, NUM_ADAPTERS, rank, num_in),
        "lora_b": _integers(device, dtypes.adapter, NUM_ADAPTERS, num_out, rank),
        "adapter_ids": ids.to(device),
        "scaling": torch.tensor([0.5, -1.0, 2.0], device=device),
        "ranks": torch.tensor([rank, max(1, rank - 1), rank], device=device),
    }


_DRAW: dict[str, Callable[..., Arguments]] = {
    **dict.fromkeys(POSITIONAL, _branch),
    "multi_lowrank_add": _adapters,
    "moe_route": _route,
    "moe_lowrank_add": _experts,
}


def _saved(op: str, outputs: tuple[Tensor, ...], values: Arguments) -> Arguments:
    """What the backward op takes beside the forward op's arguments."""
    if op == "moe_route":
        weights, ids, counts, loss, *_ = outputs
        upstream = {"dtopk_weights": torch.ones_like(weights), "dbalance_loss": 2 * loss + 1}
        return upstream | {"topk_ids": ids, "expert_counts": counts}
    y, h, *routing = outputs
    saved = {"dout": _integers(y.device.type, y.dtype, *y.shape), "h": h}
    if op == "moe_lowrank_add":
        probs, ids, weights, loss, counts = routing
        saved |= {"router_probs": probs, "topk_ids": ids, "topk_weights": weights}
        saved |= {"expert_counts": counts, "dbalance_loss": 2 * loss + 1}
    return saved


# ---- layouts: the same values, or some of them repeated, elsewhere in memory


def offset_storage(values: Tensor) -> Tensor:
    """Contiguous, three elements behind the start of its storage: not aligned."""
    storage = poisoned(values, values.numel() + 3)
    storage[3:] = values.flatten()
    return storage[3:].view(values.shape)


def negated_view(values: Tensor) -> Tensor:
    """Memory holds -values; torch's negative bit says so."""
    return torch._neg_view(-values) if values.is_floating_point() else values


def odd_strides_of_ones(values: Tensor) -> Tensor:
    """Dimensions of size one have a stride that means nothing."""
    strides = [
        977 if size == 1 else stride
        for size, stride in zip(values.shape, values.stride(), strict=True)
    ]
    return values.as_strided(values.shape, strides)


def flipped_twice(values: Tensor) -> Tensor:
    """torch has no negative strides: a flip copies."""
    return values.flip(-1).flip(-1)


def flipped_rows_of_columns(values: Tensor) -> Tensor:
    return values.mT.flip(0).mT


def layouts_of(values: Tensor, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensor in every layout that its dimensions allow, or in those named."""
    layouts: list[Layout] = [offset_storage, negated_view, odd_strides_of_ones]
    if values.dim() > 0:
        layouts += [*LAYOUTS, flipped_twice]
    if values.dim() > 1:
        layouts += [flipped_rows_of_columns]
    for layout in layouts:
        has_values = values.numel() > 0 or layout not in (expanded_rows, expanded_columns)
        if has_values and (not names or layout.__name__ in names):
            yield layout.__name__, layout(values)
