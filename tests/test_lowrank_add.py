"""lowrank_add: the branch of lowrank_linear on the output of any base module."""

from itertools import combinations

import pytest
import torch
from conftest import DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    GRADIENTS,
    LAYOUTS,
    MIXED,
    OPTIONAL,
    Layout,
    assert_exact,
    assert_raises_alike,
    assert_same_bits,
    assert_same_values,
    assert_within_rule,
    call,
    evaluate,
    make_dout,
    make_tensors,
    padded_rows,
    poison_freed_memory,
    present,
    raw_args,
    raw_backward_args,
    seed_tensor,
    transposed,
)
from torch import Tensor

from lowrank_ext import ops

OP = "lowrank_add"
SUBSETS = [names for size in range(4) for names in combinations(OPTIONAL, size)]


@pytest.mark.executor(every=7)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("optional", SUBSETS, ids=lambda names: "+".join(names) or "plain")
def test_values_and_gradients(
    device: str, dtypes: DtypePair, optional: tuple[str, ...], dropout_p: float
) -> None:
    tensors = make_tensors(OP, (3, 11), 65, 43, 5, dtypes, device, optional=optional)
    options = {"scaling": -0.75, "dropout_p": dropout_p, "seed": seed_tensor(7, device)}
    dout = make_dout(tensors)
    got = assert_within_rule(OP, tensors, dout, **options)
    assert_same_bits(got["dbase_out"], dout, "the gradient of base_out is dout")


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out", "rank"),
    [(300, 257, 129, 16), (16, 1024, 512, 64), (1030, 192, 320, 8), (2, 4099, 31, 3)],
)
def test_sizes_that_need_several_blocks(
    device: str, dtypes: DtypePair, num_rows: int, num_in: int, num_out: int, rank: int
) -> None:
    tensors = make_tensors(
        OP, (num_rows,), num_in, num_out, rank, dtypes, device, optional=OPTIONAL
    )
    options = {"scaling": 2.0, "dropout_p": 0.05, "seed": seed_tensor(3, device)}
    assert_within_rule(OP, tensors, make_dout(tensors), **options)


@pytest.mark.executor
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_equals_lowrank_linear(device: str, dtypes: DtypePair, dropout_p: float) -> None:
    """With base_out = x weightᵀ + bias, on integers, both ops are the same function."""
    shape = ((9,), 24, 18, 4, dtypes, device)
    linear = make_tensors("lowrank_linear", *shape, optional=OPTIONAL, integers=True)
    dout = make_dout(linear, integers=True)
    options = {"scaling": 0.5, "dropout_p": dropout_p, "seed": seed_tensor(4, device)}
    expected = evaluate(ops, "lowrank_linear", linear, dout, **options)
    base_out = torch.nn.functional.linear(linear["x"], linear["weight"], linear["bias"])
    got = evaluate(ops, OP, linear | {"base_out": base_out}, dout, present_of_add(), **options)
    got["dx"] = got["dx"] + dout @ linear["weight"]
    del got["dbase_out"], expected["dweight"], expected["dbias"]
    assert_same_values(got, {name: expected[name] for name in got})


def present_of_add() -> list[str]:
    return ["base_out", "x", "lora_a", "lora_b", *OPTIONAL]


@pytest.mark.executor
@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
@pytest.mark.parametrize("lead", [(0,), (4,)])
def test_zero_branch_is_a_copy_of_base_out(
    device: str, dtypes: DtypePair, lead: tuple[int, ...], dropout_p: float
) -> None:
    """Bit for bit, and in memory of its own."""
    tensors = make_tensors(OP, lead, 33, 17, 4, dtypes, device)
    if dropout_p == 0:
        tensors["lora_b"].zero_()
    before = tensors["base_out"].clone()
    y = call(ops, OP, tensors, dropout_p=dropout_p, seed=seed_tensor(0, device))
    assert_same_bits(y, before, "y of a zero branch")
    y.fill_(torch.nan)
    assert_same_bits(tensors["base_out"], before, "base_out shares memory with y")


@pytest.mark.executor(every=7)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(1, 1), (7, 13), (31, 33), (33, 32), (128, 127), (127, 129)]
)
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
def test_shapes(device: str, dtypes: DtypePair, num_rows: int, num_in: int, num_out: int) -> None:
    tensors = make_tensors(OP, (num_rows,), num_in, num_out, 4, dtypes, device, integers=True)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_exact(OP, tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.executor
@pytest.mark.parametrize(("num_in", "num_out"), [(0, 5), (5, 0), (0, 0)])
def test_no_columns(device: str, dtypes: DtypePair, num_in: int, num_out: int) -> None:
    tensors = make_tensors(OP, (3,), num_in, num_out, 2, dtypes, device, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_exact(OP, tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.executor
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3), (2, 0, 3), (1, 2, 1, 2)])
def test_leading_dimensions_are_kept(device: str, lead: tuple[int, ...]) -> None:
    tensors = make_tensors(OP, lead, 4, 5, 2, FP32, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(2, device)}
    assert_exact(OP, tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.executor(every=5)
@pytest.mark.parametrize(
    "rank", [1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 128]
)
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
def test_every_rank(device: str, dtypes: DtypePair, rank: int) -> None:
    """RF-04; for half-size dtypes with ranks whose sums stay representable."""
    if dtypes == MIXED and rank > 17:
        pytest.skip("integers above 256 are not exact in bfloat16")
    tensors = make_tensors(OP, (6,), 40, 24, rank, dtypes, device, integers=True)
    sizes = (6 * 40, 6 * 24, 6 * rank, 40 * rank, 24 * rank, 6 * (rank + 16), 40 * (rank + 16))
    poison_freed_memory(*sizes, device=device)
    assert_exact(OP, tensors, make_dout(tensors, integers=True))


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("names", ["x", "dout", "base_out", "x dout base_out"])
def test_layouts(device: str, dtypes: DtypePair, layout: Layout, names: str) -> None:
    tensors = make_tensors(OP, (2, 5), 33, 17, 3, dtypes, device, optional=OPTIONAL, integers=True)
    tensors["dout"] = make_dout(tensors, integers=True)
    for name in names.split():
        tensors[name] = layout(tensors[name])
    dout = tensors.pop("dout")
    assert_exact(OP, tensors, dout, dropout_p=0.5, seed=seed_tensor(5, device))


@pytest.mark.executor
def test_gradient_of_a_sum_has_stride_zero(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (2, 5), 9, 7, 3, dtypes, device, optional=OPTIONAL, integers=True)
    assert_exact(OP, tensors, None)


def test_gradcheck() -> None:
    tensors = make_tensors(OP, (2, 3), 5, 4, 2, optional=OPTIONAL)
    names = present(tensors)

    def op(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return call(ops, OP, named, scaling=1.5, dropout_p=0.4, seed=seed_tensor(11))

    assert torch.autograd.gradcheck(op, [tensors[name].requires_grad_() for name in names])


@pytest.mark.executor(every=5)
@pytest.mark.parametrize(
    "needs",
    [["x"], ["base_out"], ["lora_a"], ["lora_b"], ["core"], ["base_out", "x", "core"]],
    ids="+".join,
)
def test_some_gradients_equal_those_of_all(
    device: str, dtypes: DtypePair, needs: list[str]
) -> None:
    tensors = make_tensors(OP, (7,), 24, 18, 4, dtypes, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    assert_exact(OP, tensors, make_dout(tensors, integers=True), needs, **options)


@pytest.mark.executor
@pytest.mark.parametrize("needed", GRADIENTS)
def test_backward_op_computes_only_what_is_asked(device: str, needed: str) -> None:
    tensors = make_tensors(OP, (7,), 24, 18, 4, FP32, device, optional=OPTIONAL)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    _, h = torch.ops.lowrank_ext.lowrank_add(*raw_args(OP, tensors, **options))
    dout = make_dout(tensors)
    backward = torch.ops.lowrank_ext.lowrank_add_backward
    every = backward(*raw_backward_args(OP, tensors, dout, h, GRADIENTS, **options))
    unused = tensors | ({} if needed == "dlora_a" else {"x": None})
    some = backward(*raw_backward_args(OP, unused, dout, h, (needed,), **options))
    for name, alone, together in zip(GRADIENTS, some, every, strict=True):
        if name == needed:
            torch.testing.assert_close(alone, together)
        else:
            assert alone.shape == (0,), name


@pytest.mark.executor
def test_two_runs_give_the_same_bits(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (70,), 129, 65, 8, dtypes, device, optional=OPTIONAL)
    options = {"dropout_p": 0.3, "seed": seed_tensor(6, device)}
    dout = make_dout(tensors)
    first = evaluate(ops, OP, tensors, dout, **options)
    for _ in range(3):
        assert_same_values(evaluate(ops, OP, tensors, dout, **options), first)


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("layout", [torch.clone, transposed, padded_rows])
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("optional", [(), OPTIONAL], ids=["plain", "everything"])
def test_opcheck(device: str, dtypes: DtypePair, optional: tuple[str, ...], layout: Layout) -> None:
    tensors = make_tensors(OP, (2, 5), 9, 6, 3, dtypes, device, optional=optional)
    tensors |= {"x": layout(tensors["x"]), "base_out": layout(tensors["base_out"])}
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    _, h = torch.ops.lowrank_ext.lowrank_add(*raw_args(OP, tensors, **options))
    dout = layout(make_dout(tensors))
    needs = tuple(f"d{name}" for name in present(tensors))
    backward_args = raw_backward_args(OP, tensors, dout, h, needs, **options)
    torch.library.opcheck(torch.ops.lowrank_ext.lowrank_add_backward.default, backward_args)
    for name in present(tensors):
        tensors[name].requires_grad_()
    args = raw_args(OP, tensors, **options)
    torch.library.opcheck(torch.ops.lowrank_ext.lowrank_add.default, args)


@pytest.mark.executor
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device: str, low: torch.dtype) -> None:
    """RF-14, for base_out still in fp32 and for one that the base module already made half."""
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    lora_a, lora_b = (torch.ones(1, 1, device=device, requires_grad=True) for _ in range(2))
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    for base_out in (x.detach(), x.detach().to(low)):
        with torch.autocast(device, low):
            y = ops.lowrank_add(base_out, x, lora_a, lora_b)
        assert y.dtype == low and y.item() == expected
        grads = torch.autograd.grad(y.sum(), (x, lora_a, lora_b))
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert grads[1].item() == grads[2].item() == expected / 2


# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "base_out too wide": ({"base_out": torch.ones(3, 7)}, r"lora_b must .*7.*got \[6, 2\]"),
    "base_out of other rows": ({"base_out": torch.ones(4, 6)}, r"base_out must .*got \[4, 6\]"),
    "base_out flattened": ({"base_out": torch.ones(18)}, r"base_out must .*got \[18\]"),
    "base_out dtype": ({"base_out": torch.ones(3, 6).bfloat16()}, "base_out must .*bfloat16"),
    "x without columns": ({"x": torch.ones(())}, r"x must .*got \[\]"),
    "x of integers": ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must .*"),
    "lora_a too narrow": ({"lora_a": torch.ones(2, 9)}, r"lora_a must .*8.*got \[2, 9\]"),
    "lora_a without rows": ({"lora_a": torch.ones(0, 8)}, r"lora_a must .*8.*got \[0, 8\]"),
    "lora_a dtype": ({"lora_a": torch.ones(2, 8).bfloat16()}, "lora_a must .*bfloat16"),
    "lora_b of other rank": ({"lora_b": torch.ones(6, 3)}, r"lora_b must .*2.*got \[6, 3\]"),
    "core of other rank": ({"core": torch.ones(3, 3)}, r"core must .*2.*got \[3, 3\]"),
    "rank_scale 2-D": ({"rank_scale": torch.ones(1, 2)}, r"rank_scale must .*got \[1, 2\]"),
    "out_scale too short": ({"out_scale": torch.ones(5)}, r"out_scale must .*6.*got \[5\]"),
    "dropout_p above one": ({"dropout_p": 1.5}, r"dropout_p must .*1\.5"),
    "seed dtype": ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must .*float32"),
}


@pytest.mark.executor
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(device: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(OP, make_tensors(OP, (3,), 8, 6, 2, FP32, device), changes, message)


@pytest.mark.executor
def test_raw_op_needs_a_seed_for_dropout(device: str) -> None:
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32, device)
    with pytest.raises(RuntimeError, match="lowrank_add: seed must"):
        torch.ops.lowrank_ext.lowrank_add(*raw_args(OP, tensors, dropout_p=0.5))
