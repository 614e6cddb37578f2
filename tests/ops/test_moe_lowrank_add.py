"""moe_lowrank_add: a mixture of low-rank experts, in the forms that it has on the CPU and on a GPU.

On the CPU the rank decides which one is taken; on the executor, whose sizes are small, the test:
with both_forms the one that the rank stands for.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from devices import SIMT, DtypePair, has_simt, simt_module, simt_ops
from distributed_cases import end_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import (
    BF16,
    FP32,
    FP64,
    HALVES,
    LAYOUTS,
    MIXED,
    Layout,
    Tensors,
    Values,
    assert_raises_alike,
    assert_same_bits,
    assert_same_values,
    odd_integers,
    opcheck,
    padded_rows,
    poison_freed_memory,
    seed_tensor,
    transposed,
)
from lowrank_cases import (
    evaluate as evaluate_branch,
)
from moe_cases import (
    GRADIENTS,
    GROUPED_RANK,
    NAMES,
    OP,
    PER_TOKEN_RANK,
    assert_exact,
    assert_within_rule,
    evaluate,
    integer_tensors,
    make_dout,
    make_tensors,
    raw_args,
    raw_backward_args,
    routed_tensors,
    true_values,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_ext import ops, reference

# ExpertPlan of csrc/cuda/experts/plan_experts.h: (grouped, dense_up_backward).
DENSE, GROUPED, GROUPED_DENSE_UP = FORMS = (False, False), (True, False), (True, True)
FORM_NAMES = ("dense", "grouped", "grouped, dense up backward")
grouped_forms = pytest.mark.parametrize("form", FORMS[1:], ids=FORM_NAMES[1:])

both_forms = pytest.mark.parametrize(
    "rank", [PER_TOKEN_RANK, GROUPED_RANK], ids=["per token", "grouped"]
)
two_dtypes = pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])


def take_form(form: tuple[bool, bool]) -> None:
    """From here to the test's end, on the executor; elsewhere nothing."""
    if has_simt() and torch.ops.lowrank_ext.moe_lowrank_add is simt_ops().moe_lowrank_add:
        simt_module().host.fix_expert_plan(*form)


@pytest.fixture(autouse=True)
def form_of_rank(request: pytest.FixtureRequest, ops_on_simt: None) -> None:
    """both_forms on the executor."""
    callspec = getattr(request.node, "callspec", None)
    rank = callspec.params.get("rank") if callspec else None
    if rank in (PER_TOKEN_RANK, GROUPED_RANK):
        take_form(DENSE if rank == PER_TOKEN_RANK else GROUPED)


masks = pytest.mark.parametrize(
    ("dropout_p", "shared"),
    [(0.0, True), (0.3, False), (0.3, True), (1.0, False)],
    ids=["0.0-shared mask", "0.3-own masks", "0.3-shared mask", "1.0-own masks"],
)


@pytest.mark.simt(every=11)
@both_forms
@masks
def test_values_and_gradients(
    device: str, dtypes: DtypePair, rank: int, dropout_p: float, shared: bool
) -> None:
    tensors = make_tensors((3, 11), 65, 43, 6, rank, dtypes, device)
    dout = make_dout(tensors)
    got = assert_within_rule(
        tensors,
        dout,
        top_k=2,
        scaling=-0.75,
        dropout_p=dropout_p,
        seed=seed_tensor(7, device),
        shared_dropout=shared,
        token_mask=torch.rand(3, 11, device=device) < 0.8,
    )
    assert_same_bits(got["dbase_out"], dout, "the gradient of base_out is dout")


class Sizes(NamedTuple):
    num_tokens: int
    num_in: int
    num_out: int
    num_experts: int
    top_k: int
    rank: int


def check_sizes(sizes: Sizes, dtypes: DtypePair, device: str) -> None:
    num_tokens, num_in, num_out, num_experts, top_k, rank = sizes
    tensors = make_tensors((num_tokens,), num_in, num_out, num_experts, rank, dtypes, device)
    options = {"scaling": 2.0, "dropout_p": 0.05, "seed": seed_tensor(3, device)}
    assert_within_rule(tensors, make_dout(tensors), top_k=top_k, **options)


three_dtypes = pytest.mark.parametrize(
    "dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"]
)


@pytest.mark.simt(every=11)
@three_dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(300, 257, 129, 8, 2, 4),
        Sizes(7, 1030, 1100, 4, 3, 17),
        Sizes(140, 1030, 1100, 3, 1, 33),
        Sizes(65, 33, 31, 40, 5, 2),
        Sizes(600, 64, 64, 2, 2, 20),
        Sizes(2, 4099, 31, 3, 3, 1),
    ],
    ids=str,
)
def test_sizes_that_need_several_blocks(device: str, dtypes: DtypePair, sizes: Sizes) -> None:
    check_sizes(sizes, dtypes, device)


@pytest.mark.simt(only=True)
@grouped_forms
@three_dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(140, 130, 67, 4, 2, 2),
        Sizes(7, 130, 140, 4, 3, 17),
        Sizes(140, 66, 70, 2, 1, 33),
        Sizes(20, 33, 31, 40, 5, 2),
        Sizes(2, 1030, 31, 3, 3, 1),
    ],
    ids=str,
)
def test_grouped_sizes(
    device: str, dtypes: DtypePair, sizes: Sizes, form: tuple[bool, bool]
) -> None:
    """Few slots and many, one choice and several, ranks that do not start on 16 bytes."""
    take_form(form)
    check_sizes(sizes, dtypes, device)


@pytest.mark.simt(only=True, every=5)
@grouped_forms
@masks
def test_grouped_values_and_gradients(
    device: str, dtypes: DtypePair, dropout_p: float, shared: bool, form: tuple[bool, bool]
) -> None:
    """At a rank at which the CPU takes its per-token form."""
    take_form(form)
    tensors = make_tensors((3, 11), 65, 43, 6, PER_TOKEN_RANK, dtypes, device)
    assert_within_rule(
        tensors,
        make_dout(tensors),
        top_k=2,
        scaling=-0.75,
        dropout_p=dropout_p,
        seed=seed_tensor(7, device),
        shared_dropout=shared,
        token_mask=torch.rand(3, 11, device=device) < 0.8,
    )


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("needs", [(name,) for name in NAMES] + [NAMES[2:], NAMES[:2]], ids=str)
def test_some_gradients_alone(device: str, needs: tuple[str, ...], form: tuple[bool, bool]) -> None:
    """The same bits as among all."""
    take_form(form)
    tensors = make_tensors((70,), 33, 43, 6, 5, MIXED, device)
    options = {"top_k": 2, "dropout_p": 0.3, "seed": seed_tensor(7, device)}
    dout = make_dout(tensors)
    every = evaluate(ops, tensors, dout, **options)
    for name, value in evaluate(ops, tensors, dout, needs, **options).items():
        assert_same_bits(value, every[name], name)


@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_experts", [160])
def test_more_experts_than_one_go_of_a_sum(
    device: str, dtypes: DtypePair, num_experts: int
) -> None:
    """dx is a sum over all of them, of which a kernel takes 128 at a time."""
    tensors = make_tensors((20,), 40, 24, num_experts, 2, dtypes, device)
    assert_within_rule(tensors, make_dout(tensors), top_k=2)


@both_forms
@pytest.mark.parametrize(
    "dtypes",
    [FP32, BF16, DtypePair(torch.float16, torch.float16)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_several_blocks(
    device: str, dtypes: DtypePair, rank: int, layout: Layout
) -> None:
    """Two groups of 600 rows, more than a block or a tile of them has."""
    tensors = integer_tensors((600,), 12, 9, 4, rank, dtypes=dtypes, device=device)
    if rank == GROUPED_RANK:  # sums of 40 integers leave bfloat16's exact range
        tensors["lora_a"][:, 4:] = 0
    dout = layout(make_dout(tensors, integers=True))
    for name in ("x", "base_out"):
        tensors[name] = layout(tensors[name])
    options = {"top_k": 2, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    got = assert_exact(tensors, dout, **options)
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert_same_values(got, evaluate(ops, dense, dout.contiguous(), **options))


@both_forms
def test_several_blocks_of_converted_rows(device: str, rank: int) -> None:
    """x is converted 64 rows at a time where the CPU has no products of its dtype."""
    dtypes = DtypePair(torch.float16, torch.float16)
    tensors = make_tensors((200,), 12, 9, 4, rank, dtypes, device)
    assert_within_rule(tensors, make_dout(tensors), top_k=2)


@pytest.mark.simt
@pytest.mark.parametrize("num_rows", [1, 9, 70])
@pytest.mark.parametrize("half", HALVES)
def test_y_is_rounded_once(device: str, half: torch.dtype, num_rows: int) -> None:
    """Two experts of weight 1/2 and a base, together more than the dtype can hold."""
    dtypes = DtypePair(half, half)
    tensors = integer_tensors((num_rows,), 24, 20, 4, 8, dtypes=dtypes, device=device)
    for name in ("lora_b", "base_out"):
        tensors[name] = odd_integers(tensors[name])
    dout = make_dout(tensors)
    true = true_values(tensors, dout, top_k=2, scaling=2.0)["y"]
    assert not torch.equal(true.to(half).double(), true), "badly chosen case"
    got = evaluate(ops, tensors, dout, top_k=2, scaling=2.0)
    assert_same_bits(got["y"], true.to(half), "y")


@pytest.mark.simt(every=5)
@both_forms
@pytest.mark.parametrize("num_experts", [1, 2, 5])
@two_dtypes
def test_every_expert_chosen(device: str, dtypes: DtypePair, num_experts: int, rank: int) -> None:
    tensors = make_tensors((9,), 20, 14, num_experts, rank, dtypes, device)
    assert_within_rule(tensors, make_dout(tensors), top_k=num_experts)


@pytest.mark.simt(every=5)
@both_forms
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_one_expert_is_lowrank_add(
    device: str, dtypes: DtypePair, rank: int, dropout_p: float
) -> None:
    """On integers bit for bit; the router's gradient is zero."""
    tensors = integer_tensors((9,), 24, 18, 1, rank, dtypes=dtypes, device=device)
    if rank == GROUPED_RANK:  # sums of 40 integers leave bfloat16's exact range
        tensors["lora_a"][:, 4:] = 0
    options = {"scaling": 0.5, "dropout_p": dropout_p, "seed": seed_tensor(4, device)}
    dout = make_dout(tensors, integers=True)
    got = evaluate(ops, tensors, dout, dloss=None, top_k=1, **options)
    branch = {n: tensors[n] for n in ("base_out", "x")}
    branch |= {n: tensors[n][0] for n in ("lora_a", "lora_b")}
    branch |= dict.fromkeys(("core", "rank_scale", "out_scale"))
    expected = evaluate_branch(ops, "lowrank_add", branch, dout, **options)
    for name in ("y", "dbase_out", "dx"):
        assert_same_bits(got[name], expected[name], name)
    for name in ("dlora_a", "dlora_b"):
        assert_same_bits(got[name][0], expected[name], name)
    assert not got["drouter_weight"].any()


@pytest.mark.simt
@both_forms
def test_shared_dropout_is_the_mask_of_expert_zero(device: str, rank: int) -> None:
    """Equal experts then make one branch, of lowrank_add's mask; own masks make another."""
    tensors = integer_tensors((6,), 40, 9, 2, rank, dtypes=FP64, device=device)
    for name in ("lora_a", "lora_b"):
        tensors[name][1] = tensors[name][0]
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    y = ops.moe_lowrank_add(**tensors, top_k=2, shared_dropout=True, **options).y
    arguments = (tensors["base_out"], tensors["x"], tensors["lora_a"][0], tensors["lora_b"][0])
    assert_same_bits(y, ops.lowrank_add(*arguments, **options), "one mask")
    own = ops.moe_lowrank_add(**tensors, top_k=2, shared_dropout=False, **options).y
    assert not torch.equal(y, own)


@pytest.mark.simt(every=5)
@both_forms
def test_router_sees_x_without_dropout(device: str, dtypes: DtypePair, rank: int) -> None:
    tensors = make_tensors((20,), 30, 9, 5, rank, dtypes, device)
    plain = ops.moe_lowrank_add(**tensors, top_k=2)
    dropped = ops.moe_lowrank_add(**tensors, top_k=2, dropout_p=0.9, seed=seed_tensor(1, device))
    for name in ("topk_ids", "router_probs", "balance_loss"):
        assert_same_bits(getattr(dropped, name), getattr(plain, name), name)
    assert not torch.equal(dropped.y, plain.y)


@pytest.mark.simt(every=5)
@both_forms
def test_routes_as_moe_route_does(device: str, kernels: str, dtypes: DtypePair, rank: int) -> None:
    """Integer logits, so that any order of summation gives them exactly, with many ties."""
    tensors = make_tensors((40,), 12, 9, 7, rank, dtypes, device, integers=True)
    mask = torch.rand(40, device=device) < 0.5
    raw = raw_args(tensors, top_k=3, token_mask=mask)
    _, _, probs, ids, weights, loss, counts = torch.ops.lowrank_ext.moe_lowrank_add(*raw)
    logits = tensors["x"].double() @ tensors["router_weight"].double().mT
    expected = ops.moe_route(logits.to(probs.dtype), top_k=3, token_mask=mask)
    assert_same_bits(ids, expected.topk_ids, "topk_ids")
    assert_same_bits(weights, expected.topk_weights, "topk_weights")
    assert_same_bits(counts, expected.expert_counts, "expert_counts")
    if kernels == "cpu":
        assert_same_bits(loss, expected.balance_loss, "balance_loss")
    else:  # sums over tokens in another order
        rounding = 4 * torch.finfo(loss.dtype).eps
        torch.testing.assert_close(loss, expected.balance_loss, rtol=rounding, atol=0)


@pytest.mark.simt(every=5)
@both_forms
def test_h_holds_the_chosen_experts_and_zeros(device: str, dtypes: DtypePair, rank: int) -> None:
    tensors = make_tensors((30,), 33, 9, 5, rank, dtypes, device)
    sizes = (30 * 5 * rank, 30 * 9, 30 * 5, 60)
    poison_freed_memory(*sizes, device=device)
    raw = raw_args(tensors, top_k=2, dropout_p=0.3, seed=seed_tensor(2, device))
    _, h, _, ids, *_ = torch.ops.lowrank_ext.moe_lowrank_add(*raw)
    chosen = torch.zeros(30, 5, dtype=torch.bool, device=device).scatter(1, ids, True)
    by_expert = h.reshape(30, 5, rank)
    assert not by_expert[~chosen].any()
    assert by_expert[chosen].ne(0).any(-1).all()


@pytest.mark.simt(every=7)
@both_forms
@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
@pytest.mark.parametrize("lead", [(0,), (4,)])
def test_zero_branch_is_a_copy_of_base_out(
    device: str, dtypes: DtypePair, rank: int, lead: tuple[int, ...], dropout_p: float
) -> None:
    """Bit for bit, and in memory of its own."""
    tensors = make_tensors(lead, 33, 17, 4, rank, dtypes, device)
    if dropout_p == 0:
        tensors["lora_b"].zero_()
    before = tensors["base_out"].clone()
    options = {"dropout_p": dropout_p, "seed": seed_tensor(0, device)}
    y = ops.moe_lowrank_add(**tensors, top_k=2, **options).y
    assert_same_bits(y, before, "y of a zero branch")
    y.fill_(torch.nan)
    assert_same_bits(tensors["base_out"], before, "base_out shares memory with y")


@pytest.mark.simt(every=13)
@both_forms
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (31, 65), (64, 63), (129, 33)])
@two_dtypes
def test_shapes(
    device: str, dtypes: DtypePair, num_tokens: int, num_in: int, num_out: int, rank: int
) -> None:
    tensors = make_tensors((num_tokens,), num_in, num_out, 3, rank, dtypes, device)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_within_rule(tensors, make_dout(tensors), top_k=2, **options)


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 130])
@two_dtypes
def test_every_rank(device: str, dtypes: DtypePair, rank: int) -> None:
    tensors = make_tensors((12,), 40, 24, 3, rank, dtypes, device)
    poison_freed_memory(12 * 40, 12 * 24, 36 * rank, 120 * rank, 72 * rank, device=device)
    assert_within_rule(tensors, make_dout(tensors), top_k=2)


@pytest.mark.simt(every=5)
@both_forms
@pytest.mark.parametrize(("num_in", "num_out"), [(0, 5), (5, 0), (0, 0)])
def test_no_columns(device: str, dtypes: DtypePair, num_in: int, num_out: int, rank: int) -> None:
    tensors = make_tensors((3,), num_in, num_out, 2, rank, dtypes, device)
    options = {"dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_within_rule(tensors, make_dout(tensors), top_k=1, **options)


@pytest.mark.simt(every=3)
@both_forms
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3), (2, 0, 3)])
def test_leading_dimensions_are_kept(device: str, rank: int, lead: tuple[int, ...]) -> None:
    tensors = make_tensors(lead, 4, 5, 3, rank, FP32, device)
    mask = torch.rand(lead, device=device) < 0.7
    options = {"dropout_p": 0.5, "seed": seed_tensor(2, device), "token_mask": mask}
    assert_within_rule(tensors, make_dout(tensors), top_k=2, **options)


@pytest.mark.simt(every=7)
@both_forms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["x", "dout", "base_out", "lora_a lora_b router_weight"])
@two_dtypes
def test_layouts(device: str, dtypes: DtypePair, rank: int, layout: Layout, names: str) -> None:
    """The same bits as from dense tensors of the same values."""
    tensors = make_tensors((2, 5), 33, 17, 3, rank, dtypes, device)
    tensors["dout"] = make_dout(tensors)
    strided = {k: layout(v) if k in names.split() else v for k, v in tensors.items()}
    options = {"top_k": 2, "dropout_p": 0.5, "seed": seed_tensor(5, device)}
    results = []
    for case in (strided, {k: v.contiguous() for k, v in strided.items()}):
        dout = case.pop("dout")
        results.append(evaluate(ops, case, dout, **options))
    assert_same_values(*results)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_tokens=st.sampled_from([0, 1, 2, 5, 16, 37]),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    num_experts=st.integers(1, 12),
    choice=st.integers(0, 10**6),
    rank=st.sampled_from([1, 2, 4, 5, 16, 17, 40]),
    dtypes=st.sampled_from([FP64, FP32, MIXED]),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
    shared=st.booleans(),
    one_expert=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_any_sizes(
    device: str,
    num_tokens: int,
    num_in: int,
    num_out: int,
    num_experts: int,
    choice: int,
    rank: int,
    dtypes: DtypePair,
    dropout_p: float,
    shared: bool,
    one_expert: bool,
    form: tuple[bool, bool],
) -> None:
    """Also with all tokens to the same experts: those whose router rows are not zero."""
    torch.manual_seed(choice)
    take_form(form)
    tensors = make_tensors((num_tokens,), num_in, num_out, num_experts, rank, dtypes, device)
    if one_expert:
        tensors["x"][:, 0] = 1
        tensors["router_weight"] *= 0
        tensors["router_weight"][choice % num_experts, 0] = 5
    mask = torch.rand(num_tokens, device=device) < 0.8 if choice % 2 else None
    options = {"dropout_p": dropout_p, "seed": seed_tensor(9, device), "shared_dropout": shared}
    top_k = choice % num_experts + 1
    dout = make_dout(tensors)
    assert_within_rule(tensors, dout, top_k=top_k, scaling=0.5, token_mask=mask, **options)


@pytest.mark.parametrize("shared", [False, True])
@both_forms
def test_gradcheck(rank: int, shared: bool) -> None:
    """In fp64 and away from ties, where the choice of experts does not change."""
    tensors = make_tensors((2, 3), 5, 3, 4, rank)
    if rank == GROUPED_RANK:
        tensors = {k: v / 4 if k == "lora_b" else v for k, v in tensors.items()}

    def op(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, values, strict=True))
        options = {"scaling": 1.5, "dropout_p": 0.4, "seed": seed_tensor(11)}
        got = ops.moe_lowrank_add(**named, top_k=2, shared_dropout=shared, **options)
        return got.y, got.balance_loss

    values = [tensors[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(op, values, fast_mode=rank == GROUPED_RANK)


def test_second_derivatives() -> None:
    tensors = make_tensors((3,), 5, 4, 3, 2)
    x, router = tensors["x"].requires_grad_(), tensors["router_weight"].requires_grad_()

    def penalty(space: ModuleType) -> tuple[Tensor, ...]:
        y = space.moe_lowrank_add(**tensors, top_k=2)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, router))

    torch.testing.assert_close(penalty(ops), penalty(reference))


SOME = [n for size in (1, 2) for n in itertools.combinations(NAMES, size)]


@pytest.mark.simt(every=7)
@both_forms
@pytest.mark.parametrize("needs", SOME, ids="+".join)
def test_some_gradients_equal_those_of_all(device: str, rank: int, needs: tuple[str, ...]) -> None:
    tensors = make_tensors((17,), 24, 18, 4, rank, MIXED, device)
    options = {"top_k": 2, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    dout = make_dout(tensors)
    every = evaluate(ops, tensors, dout, **options)
    some = evaluate(ops, tensors, dout, needs, dloss=3.0 if "x" in needs else None, **options)
    if "x" not in needs and "router_weight" not in needs:
        assert_same_values(some, {name: every[name] for name in some})


@pytest.mark.simt(every=5)
@both_forms
@pytest.mark.parametrize("used", ["y", "balance_loss"])
def test_one_output_used(device: str, dtypes: DtypePair, rank: int, used: str) -> None:
    """The other's gradient is then None."""
    tensors = make_tensors((17,), 24, 18, 4, rank, dtypes, device)
    dout, dloss = (make_dout(tensors), None) if used == "y" else (None, 2.0)
    got = assert_within_rule(tensors, dout, dloss=dloss, top_k=2)
    if used == "balance_loss":
        assert not got["dlora_a"].any() and not got["dlora_b"].any()
        assert got["dx"].any() and got["drouter_weight"].any()


@pytest.mark.simt(every=3)
@both_forms
@pytest.mark.parametrize("needed", GRADIENTS)
def test_backward_op_computes_only_what_is_asked(device: str, rank: int, needed: str) -> None:
    tensors = make_tensors((17,), 24, 18, 4, rank, FP32, device)
    options = {"top_k": 2, "scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    saved = torch.ops.lowrank_ext.moe_lowrank_add(*raw_args(tensors, **options))
    dout = make_dout(tensors)
    backward = torch.ops.lowrank_ext.moe_lowrank_add_backward
    every = backward(*raw_backward_args(tensors, dout, saved, GRADIENTS, **options))
    unused = tensors | ({} if needed in ("drouter_weight", "dlora_a") else {"x": None})
    if needed == "dlora_a":
        saved = (saved[0], None, *saved[2:])
    some = backward(*raw_backward_args(unused, dout, saved, (needed,), **options))
    for name, alone, together in zip(GRADIENTS, some, every, strict=True):
        if name == needed:
            assert_same_bits(alone, together, name)
        else:
            assert alone.shape == (0,), name


@pytest.mark.parametrize("missing", ["x", "h"])
def test_backward_op_names_what_is_missing(missing: str) -> None:
    tensors = make_tensors((3,), 6, 5, 4, 2, FP32)
    saved = torch.ops.lowrank_ext.moe_lowrank_add(*raw_args(tensors, top_k=2))
    if missing == "h":
        saved = (saved[0], None, *saved[2:])
    else:
        tensors["x"] = None
    args = raw_backward_args(tensors, saved[0], saved, GRADIENTS, top_k=2)
    with pytest.raises(RuntimeError, match=f"moe_lowrank_add_backward: {missing} must be given"):
        torch.ops.lowrank_ext.moe_lowrank_add_backward(*args)


@pytest.mark.simt(every=7)
@both_forms
def test_two_runs_and_thread_counts_give_the_same_bits(
    device: str, kernels: str, dtypes: DtypePair, rank: int
) -> None:
    num_in, num_out = (65, 33) if kernels == SIMT else (129, 65)
    tensors = make_tensors((150,), num_in, num_out, 6, rank, dtypes, device)
    options = {"top_k": 3, "dropout_p": 0.3, "seed": seed_tensor(6, device)}
    dout = make_dout(tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = evaluate(ops, tensors, dout, **options)
        assert_same_values(evaluate(ops, tensors, dout, **options), first)
        torch.set_num_threads(3)
        several = evaluate(ops, tensors, dout, **options)
    finally:
        torch.set_num_threads(threads)
    # The vendor's products may cut their sums by threads: groups have them, and all sums over rows
    # but ours in bf16.
    ours = "avx512_bf16" in torch.ops.lowrank_ext.cpu_features()
    if rank == PER_TOKEN_RANK and dtypes.base == torch.bfloat16 and (ours or device == "cuda"):
        assert_same_values(several, first)


@both_forms
@pytest.mark.parametrize("layout", [torch.clone, transposed, padded_rows])
@two_dtypes
def test_opcheck(device: str, dtypes: DtypePair, rank: int, layout: Layout) -> None:
    """Compiled in one dtype and in two, in a form each: the fake is the same for both forms."""
    compiled = layout is padded_rows and (rank == GROUPED_RANK) == (dtypes == FP32)
    tensors = make_tensors((2, 5), 9, 6, 3, rank, dtypes, device)
    tensors |= {"x": layout(tensors["x"]), "base_out": layout(tensors["base_out"])}
    mask = torch.rand(2, 5, device=device) < 0.8
    options = {"top_k": 2, "scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    options["token_mask"] = mask
    saved = torch.ops.lowrank_ext.moe_lowrank_add(*raw_args(tensors, **options))
    backward_args = raw_backward_args(tensors, layout(saved[0]), saved, GRADIENTS, **options)
    opcheck(torch.ops.lowrank_ext.moe_lowrank_add_backward.default, backward_args, compiled)
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    forward = torch.ops.lowrank_ext.moe_lowrank_add.default
    opcheck(forward, raw_args(tensors, **options), compiled)


# Rows that must not touch each other, experts without rows


@pytest.mark.simt(every=5)
@both_forms
def test_a_bad_row_changes_no_other(device: str, dtypes: DtypePair, rank: int) -> None:
    """RF-12: NaN in one token; also not through an expert's gradient that it did not choose."""
    tensors = make_tensors((6,), 20, 9, 5, rank, dtypes, device)
    good = ops.moe_lowrank_add(**tensors, top_k=2)
    tensors["x"][2, 3] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    bad = ops.moe_lowrank_add(**leaves, top_k=2)
    others = [0, 1, 3, 4, 5]
    assert bad.topk_ids[2].tolist() == [0, 1] and bad.y[2].isnan().all()
    if rank == PER_TOKEN_RANK:
        assert_same_bits(bad.y[others], good.y[others], "y of the other rows")
    else:  # the groups, and so the vendor's products, have other sizes
        torch.testing.assert_close(bad.y[others], good.y[others])
    assert_same_bits(bad.topk_ids[others], good.topk_ids[others], "ids of the other rows")
    again = ops.moe_lowrank_add(**leaves, top_k=2)
    assert_same_bits(again.topk_ids, bad.topk_ids, "ids of a second call")
    dout = make_dout(tensors)
    grads = torch.autograd.grad(bad.y, [leaves[n] for n in ("x", "lora_a", "lora_b")], dout)
    assert not grads[0][others].isnan().any()
    for grad in grads[1:]:
        assert not grad[2:].isnan().any(), "experts 2 to 4 did not see the bad token"


@pytest.mark.simt(every=5)
@both_forms
def test_bad_logits_give_valid_ids(device: str, dtypes: DtypePair, rank: int) -> None:
    """RF-12 in the router itself: ties, infinities and NaN."""
    rows = [[0.0] * 4, [-torch.inf] * 4, [torch.nan, 1, 2, 0], [torch.inf, 0, torch.inf, 1]]
    tensors = make_tensors((4,), 4, 5, 4, rank, dtypes, device)
    tensors["x"] = torch.tensor(rows, device=device).to(dtypes.base)
    tensors["router_weight"] = torch.eye(4, device=device).to(dtypes.adapter)
    ids = ops.moe_lowrank_add(**tensors, top_k=2).topk_ids
    assert ((ids >= 0) & (ids < 4)).all() and (ids[:, 0] != ids[:, 1]).all()
    assert ids[0].tolist() == [0, 1]


@pytest.mark.simt(every=7)
@both_forms
@pytest.mark.parametrize("choices", [[0, 2, 0], [3], [3, 3, 3, 3], []], ids=str)
def test_experts_without_tokens(
    device: str, dtypes: DtypePair, rank: int, choices: list[int]
) -> None:
    """RF-13: exact zeros, whatever was in the memory before."""
    tensors = routed_tensors(choices, 4, rank, dtypes)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    if rank == GROUPED_RANK:  # sums of 40 integers leave bfloat16's exact range
        tensors["lora_b"][:, :, 4:] = 0
    poison_freed_memory(*(tensor.numel() for tensor in tensors.values()), device=device)
    got = assert_exact(tensors, make_dout(tensors, integers=True), top_k=1)
    assert got["topk_ids"].flatten().tolist() == choices
    for expert in range(4):
        for name in ("dlora_a", "dlora_b"):
            assert not got[name][expert].isnan().any()
            if expert not in choices:
                assert not got[name][expert].any(), f"{name} of expert {expert}"
    if not choices:
        assert got["y"].shape == (0, 5) and not got["drouter_weight"].any()
        assert got["balance_loss"] == 0


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@two_dtypes
def test_bad_weights_of_an_idle_expert_do_not_spread(
    device: str, dtypes: DtypePair, bad: float
) -> None:
    """RF-13, in the grouped form: nothing of an expert without tokens is read."""
    take_form(GROUPED)
    tensors = routed_tensors([0, 2, 0, 1, 1, 2, 0], 5, 4, dtypes)
    options = {"top_k": 1, "dropout_p": 0.5, "seed": seed_tensor(3, device)}
    dout = make_dout(tensors, integers=True)
    good = evaluate(ops, tensors, dout, **options)
    for name in ("lora_a", "lora_b"):
        tensors[name][3:] = bad
    got = evaluate(ops, tensors, dout, **options)
    assert_same_values(got, good)
    for name in ("dlora_a", "dlora_b"):
        assert not got[name][3:].any()


@pytest.mark.simt(every=5)
@both_forms
@pytest.mark.parametrize("shared", [False, True])
def test_integers_are_exact(device: str, dtypes: DtypePair, rank: int, shared: bool) -> None:
    """Masks, gathers and orders, with no tolerance: weights are 1/2."""
    tensors = integer_tensors((19,), 21, 35, 3, rank, dtypes=dtypes, device=device)
    if rank == GROUPED_RANK:
        tensors["lora_b"][:, :, 3:] = 0
    options = {"dropout_p": 0.5, "seed": seed_tensor(1, device), "shared_dropout": shared}
    dout = make_dout(tensors, integers=True)
    assert_exact(tensors, dout, top_k=2, scaling=2.0, **options)


# Autocast, checkpointing, compile, processes


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@both_forms
def test_autocast(device: str, rank: int, low: torch.dtype) -> None:
    """RF-14: as with base_out and x cast by hand; gradients and statistics in fp32."""
    tensors = make_tensors((9,), 20, 14, 4, rank, FP32, device)
    by_hand = tensors | {name: tensors[name].to(low) for name in ("base_out", "x")}
    expected = evaluate(ops, by_hand, make_dout(by_hand), top_k=2)
    dout = make_dout(by_hand)
    torch.manual_seed(0)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(device, low):
        got = ops.moe_lowrank_add(**leaves, top_k=2)
    assert got.y.dtype == low and got.router_probs.dtype == torch.float32
    assert_same_bits(got.y, expected["y"], "y")
    grads = torch.autograd.grad(got.y, list(leaves.values()), dout)
    assert {grad.dtype for grad in grads} == {torch.float32}


@both_forms
def test_checkpointing_draws_the_same_masks(device: str, rank: int) -> None:
    """The seed comes from torch's generator, whose state checkpointing restores."""
    tensors = make_tensors((9,), 20, 14, 4, rank, FP32, device)
    dout = make_dout(tensors)

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, values, strict=True))
        got = ops.moe_lowrank_add(**named, top_k=2, dropout_p=0.5)
        return got.y, got.balance_loss

    results = []
    for call in (run, lambda *values: checkpoint(run, *values, use_reentrant=False)):
        torch.manual_seed(3)
        leaves = [tensors[name].clone().requires_grad_() for name in NAMES]
        y, loss = call(*leaves)
        grads = torch.autograd.grad((y, loss), leaves, (dout, torch.ones_like(loss)))
        results.append([y.detach(), loss.detach(), *grads])
    for once, twice in zip(*results, strict=True):
        assert_same_bits(twice, once, "with checkpointing")


@pytest.mark.parametrize(
    ("backend", "rank"), [("aot_eager", PER_TOKEN_RANK), ("inductor", GROUPED_RANK)]
)
def test_compiled_with_a_dynamic_number_of_tokens(device: str, rank: int, backend: str) -> None:
    def run(tensors: Tensors, seed: Tensor) -> tuple[Tensor, Tensor]:
        got = ops.moe_lowrank_add(**tensors, top_k=2, dropout_p=0.3, seed=seed)
        return got.y.square().sum() + got.balance_loss, got.topk_ids

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for num_tokens in (5, 8, 17):
        tensors = make_tensors((num_tokens,), 12, 9, 4, rank, MIXED, device)
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        seed = seed_tensor(num_tokens, device)
        results = []
        for call in (compiled, run):
            value, ids = call(leaves, seed)
            grads = torch.autograd.grad(value, list(leaves.values()))
            results.append([ids, value.detach(), *grads])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)
        assert_same_bits(results[0][0], results[1][0], "ids, compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


WORLD = 2


class Mixture(nn.Module):
    """Experts on a frozen linear, routed by a one-hot part of x."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        tensors = routed_tensors([0], 3, rank, FP32)
        experts = {k: v for k, v in tensors.items() if k not in ("base_out", "x")}
        self.experts = nn.ParameterDict({k: nn.Parameter(v) for k, v in experts.items()})

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        got = ops.moe_lowrank_add(base_out, x, **self.experts, top_k=1)
        return got.y.square().mean() + 0.01 * got.balance_loss


def tokens_of(process: int) -> tuple[Tensor, Tensor]:
    """Expert 2 has tokens in process 1 only, and expert 1 in process 0 only."""
    torch.manual_seed(10 + process)
    tensors = routed_tensors([[0, 1, 0, 1], [0, 2, 2, 0]][process], 3, PER_TOKEN_RANK, FP32)
    return tensors["x"], tensors["base_out"]


RANKS = (PER_TOKEN_RANK, GROUPED_RANK)


def worker(process: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=process, world_size=WORLD)
    grads = {}
    for rank in RANKS:
        model = nn.parallel.DistributedDataParallel(Mixture(rank))
        model(*tokens_of(process)).backward()
        grads[rank] = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save(grads, os.path.join(directory, f"{process}.pt"))
    end_worker()


def test_an_idle_expert_on_one_of_two_processes(tmp_path: Path) -> None:
    """No hang, as every parameter has a gradient everywhere, and those of one process."""
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    grads = [torch.load(tmp_path / f"{process}.pt") for process in range(WORLD)]
    for rank in RANKS:
        model = Mixture(rank)
        for process in range(WORLD):
            (model(*tokens_of(process)) / WORLD).backward()
        for of_process in grads:
            for name, parameter in model.named_parameters():
                got = of_process[rank][name]
                torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-6)
        assert model.experts["lora_a"].grad[1].any() and model.experts["lora_a"].grad[2].any()


Call = Callable[..., Values]

RIGHT = make_tensors((3,), 8, 6, 4, 2, FP32) | {"top_k": 2}
# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "base_out too wide": ({"base_out": torch.ones(3, 7)}, r"lora_b must .*7.*got \[4, 6, 2\]"),
    "base_out of other rows": ({"base_out": torch.ones(4, 6)}, r"base_out must .*got \[4, 6\]"),
    "base_out dtype": ({"base_out": torch.ones(3, 6).bfloat16()}, "base_out must .*bfloat16"),
    "x without columns": ({"x": torch.ones(())}, r"x must .*got \[\]"),
    "x of integers": ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must .*int64"),
    "lora_a too narrow": ({"lora_a": torch.ones(4, 2, 9)}, r"lora_a must .*8.*got \[4, 2, 9\]"),
    "lora_a 2-D": ({"lora_a": torch.ones(8, 8)}, r"lora_a must .*got \[8, 8\]"),
    "no experts": ({"lora_a": torch.ones(0, 2, 8)}, r"lora_a must .*got \[0, 2, 8\]"),
    "no ranks": ({"lora_a": torch.ones(4, 0, 8)}, r"lora_a must .*got \[4, 0, 8\]"),
    "lora_a dtype": ({"lora_a": torch.ones(4, 2, 8).bfloat16()}, "lora_a must .*bfloat16"),
    "lora_b of other rank": ({"lora_b": torch.ones(4, 6, 3)}, r"lora_b must .*got \[4, 6, 3\]"),
    "lora_b of other experts": ({"lora_b": torch.ones(5, 6, 2)}, r"lora_b must .*got \[5, 6, 2\]"),
    "router too short": ({"router_weight": torch.ones(3, 8)}, r"router_weight .*4.*got \[3, 8\]"),
    "router dtype": ({"router_weight": torch.ones(4, 8).double()}, "router_weight .*float64"),
    "top_k zero": ({"top_k": 0}, "top_k must be between 1 and the number of experts 4, got 0"),
    "top_k large": ({"top_k": 5}, "top_k must be between 1 and the number of experts 4, got 5"),
    "dropout_p above one": ({"dropout_p": 1.5}, r"dropout_p must .*1\.5"),
    "seed dtype": ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must .*float32"),
    "mask too long": ({"token_mask": torch.ones(4).bool()}, r"token_mask must .*got \[4\]"),
    "mask of integers": ({"token_mask": torch.ones(3).long()}, "token_mask must be bool.*int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str) -> None:
    assert_raises_alike(OP, RIGHT, *WRONG[case])


def test_raw_op_needs_a_seed_for_dropout() -> None:
    tensors = make_tensors((3,), 8, 6, 4, 2, FP32)
    with pytest.raises(RuntimeError, match="moe_lowrank_add: seed must"):
        torch.ops.lowrank_ext.moe_lowrank_add(*raw_args(tensors, top_k=2, dropout_p=0.5))


@pytest.mark.simt
def test_saved_for_backward(device: str) -> None:
    """x only where lora_a or the router trains; no mask, no dropped copy, no fp32 copy of x."""
    tensors = make_tensors((50,), 96, 40, 4, 2, MIXED, device)
    sizes = {"x": 50 * 96 * 2, "h": 50 * 8 * 2, "probs": 50 * 4 * 4, "topk": 2 * 50 * (8 + 4)}
    sizes |= {"experts": (4 * 96 + 8 * 96 + 8 * 40) * 4, "counts": 4 * 8, "seed": 8}
    for needs, without in ((NAMES, ()), (("lora_b",), ("x",)), (("lora_a",), ("h",))):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaves = {k: v.detach().requires_grad_(k in needs) for k, v in tensors.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ops.moe_lowrank_add(**leaves, top_k=2, dropout_p=0.5)
        assert sum(saved.values()) == sum(v for k, v in sizes.items() if k not in without), needs
