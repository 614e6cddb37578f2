"""Inputs, evaluation and comparison shared by the tests of moe_lowrank_add.

As in lowrank_cases.py there are two ways to judge a result against reference.py in fp64: the
low-precision rule for random values, and bit equality for small integers. For integers the router's
rows are all equal (integer_tensors), so that with one or two experts per token the weights are
exact, or one logit is so large that its weight is one (routed_tensors).
"""

from types import ModuleType

import torch
from devices import DtypePair
from lowrank_cases import (
    FP64,
    ORDER_OF_SUMMATION,
    Tensors,
    Values,
    assert_error_within_rule,
    assert_same_bits,
    in_fp64,
)
from torch import Tensor

from lowrank_ext import ops, reference

OP = "moe_lowrank_add"
NAMES = ("base_out", "x", "router_weight", "lora_a", "lora_b")
GRADIENTS = ("dx", "drouter_weight", "dlora_a", "dlora_b")
BASE = ("base_out", "x")

# Ranks of an expert at which the CPU takes its per-token form, and its grouped one.
PER_TOKEN_RANK, GROUPED_RANK = 3, 40


def make_tensors(
    lead: tuple[int, ...],
    num_in: int,
    num_out: int,
    num_experts: int,
    rank: int,
    dtypes: DtypePair = FP64,
    device: str = "cpu",
    *,
    integers: bool = False,
) -> Tensors:
    """Every tensor argument; random values of a size that keeps y of order one, or {-1, 0, 1}."""
    shapes = {
        "base_out": (*lead, num_out),
        "x": (*lead, num_in),
        "router_weight": (num_experts, num_in),
        "lora_a": (num_experts, rank, num_in),
        "lora_b": (num_experts, num_out, rank),
    }
    return {
        name: draw(shape, integers, name not in BASE).to(
            device, dtypes.base if name in BASE else dtypes.adapter
        )
        for name, shape in shapes.items()
    }


def draw(shape: tuple[int, ...], integers: bool = False, scaled: bool = False) -> Tensor:
    if integers:
        return torch.randint(-1, 2, shape, dtype=torch.float64)
    values = torch.randn(shape, dtype=torch.float64)
    return values / max(1, shape[-1]) ** 0.5 if scaled else values


def make_dout(tensors: Tensors, integers: bool = False) -> Tensor:
    base_out = tensors["base_out"]
    return draw(tuple(base_out.shape), integers).to(base_out)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def evaluate(
    namespace: ModuleType,
    tensors: Tensors,
    dout: Tensor | None,
    needs: tuple[str, ...] = NAMES,
    dloss: float | None = 3.0,
    **options: object,
) -> Values:
    """Everything that the op returns, and the gradients of `needs` from dout and dloss.

    None leaves that output out of the backward. Inputs must come out unchanged.
    """
    leaves = {name: tensor.detach() for name, tensor in tensors.items()}
    copies = {name: tensor.clone() for name, tensor in leaves.items()}
    for name in needs:
        leaves[name].requires_grad_()
    y, loss, topk_ids, probs = getattr(namespace, OP)(**leaves, **options)
    outputs = [(y, dout), (loss, None if dloss is None else loss.new_tensor(dloss))]
    used = [(output, upstream) for output, upstream in outputs if upstream is not None]
    grads = torch.autograd.grad(
        [output for output, _ in used],
        [leaves[name] for name in needs],
        [upstream for _, upstream in used],
        materialize_grads=True,
    )
    for name, copy in copies.items():
        assert_same_bits(leaves[name].detach(), copy, f"{name} was modified")
    values = {"y": y, "balance_loss": loss, "topk_ids": topk_ids, "router_probs": probs}
    values |= {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}
    return {name: value.detach() for name, value in values.items()}


def true_values(tensors: Tensors, dout: Tensor | None, *args: object, **options: object) -> Values:
    """Of the reference in fp64; the router is rounded as by the op, or it would route otherwise."""
    upstream = None if dout is None else dout.double()
    rounded = tensors | {"router_weight": tensors["router_weight"].to(tensors["x"].dtype)}
    return evaluate(reference, in_fp64(rounded), upstream, *args, **options)


def assert_dtypes_and_shapes(values: Values, tensors: Tensors, top_k: int) -> None:
    """Statistics are fp32 (fp64), y has x's dtype, each gradient that of its tensor."""
    x, base_out, router = (tensors[name] for name in ("x", "base_out", "router_weight"))
    lead, statistics = x.shape[:-1], statistics_dtype(x.dtype)
    expected = {
        "y": (base_out.shape, x.dtype),
        "balance_loss": ((), statistics),
        "topk_ids": ((*lead, top_k), torch.int64),
        "router_probs": ((*lead, router.shape[0]), statistics),
    }
    expected |= {f"d{name}": (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, value in values.items():
        assert (tuple(value.shape), value.dtype) == (tuple(expected[name][0]), expected[name][1]), (
            name
        )


def assert_within_rule(
    tensors: Tensors,
    dout: Tensor | None,
    needs: tuple[str, ...] = NAMES,
    dloss: float | None = 3.0,
    **options: object,
) -> Values:
    """The op's error is at most twice plain torch's, in maximum and in mean; ids are equal."""
    got = evaluate(ops, tensors, dout, needs, dloss, **options)
    plain = evaluate(reference, tensors, dout, needs, dloss, **options)
    truth = true_values(tensors, dout, needs, dloss, **options)
    assert_dtypes_and_shapes(got, tensors, options["top_k"])
    assert_same_bits(got["topk_ids"], truth.pop("topk_ids"), "topk_ids")
    for name, true in truth.items():
        if true.numel() == 0:
            continue
        dtype = tensors["x"].dtype if name == "y" or name[0] == "d" else got[name].dtype
        floor = ORDER_OF_SUMMATION.get(dtype, torch.finfo(dtype).eps) * true.abs().max()
        if name in ("dx", "drouter_weight"):
            # Sums over the experts of fp32 (fp64) statistics, which may cancel to nothing.
            floor += ORDER_OF_SUMMATION[statistics_dtype(dtype)] * tensors["router_weight"].shape[0]
        assert_error_within_rule(name, got[name], plain[name], true, floor)
    return got


def assert_exact(tensors: Tensors, dout: Tensor, **options: object) -> Values:
    """On integers and a router of zeros: y and the gradients of the experts bit for bit."""
    got = evaluate(ops, tensors, dout, **options)
    truth = true_values(tensors, dout, **options)
    assert_dtypes_and_shapes(got, tensors, options["top_k"])
    for name in ("y", "topk_ids", "dlora_a", "dlora_b", "dbase_out"):
        assert_same_bits(got[name], truth[name].to(got[name].dtype), name)
    return got


def integer_tensors(*sizes: object, **options: object) -> Tensors:
    """Integers, but router rows that are all equal: every token goes to experts 0 … top_k - 1."""
    tensors = make_tensors(*sizes, integers=True, **options)
    tensors["router_weight"] = tensors["router_weight"][:1].repeat(
        tensors["router_weight"].shape[0], 1
    )
    return tensors


def routed_tensors(choices: list[int], num_experts: int, rank: int, dtypes: DtypePair) -> Tensors:
    """Integers whose token t goes to expert choices[t] first, by a one-hot part of x.

    Only the chosen expert has a logit of 64, so that its weight is 1 to the last bit.
    """
    num_tokens, num_in = len(choices), num_experts + 3
    tensors = make_tensors((num_tokens,), num_in, 5, num_experts, rank, dtypes, integers=True)
    for token, expert in enumerate(choices):
        tensors["x"][token, :num_experts] = 0
        tensors["x"][token, expert] = 1
    tensors["router_weight"].zero_()
    tensors["router_weight"][:, :num_experts] = 64 * torch.eye(num_experts)
    return tensors


def option_values(
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    shared_dropout: bool = False,
    token_mask: Tensor | None = None,
) -> tuple:
    """The options behind top_k, in the order of the schemas."""
    return scaling, dropout_p, seed, shared_dropout, token_mask


def raw_args(tensors: Tensors, *, top_k: int, **options: object) -> tuple:
    """Arguments of torch.ops.lowrank_ext.moe_lowrank_add."""
    return (*(tensors[name] for name in NAMES), top_k, *option_values(**options))


def raw_backward_args(
    tensors: Tensors,
    dout: Tensor,
    saved: tuple[Tensor, ...],
    needs: tuple[str, ...],
    *,
    dloss: float | None = 3.0,
    top_k: int,
    **options: object,
) -> tuple:
    """Arguments of moe_lowrank_add_backward; `saved` is what the forward op returned."""
    _, h, probs, ids, weights, loss, counts = saved
    upstream = None if dloss is None else loss.new_tensor(dloss)
    experts = (tensors[name] for name in ("router_weight", "lora_a", "lora_b"))
    return (
        *(dout, upstream, tensors["x"], *experts, h, probs, ids, weights, counts),
        *option_values(**options),
        *(name in needs for name in GRADIENTS),
    )
