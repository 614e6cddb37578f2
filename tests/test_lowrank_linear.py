"""lowrank_linear: values, gradients, shapes, strides, dtypes, autocast and errors."""

from itertools import combinations

import pytest
import torch
from conftest import DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    FP64,
    GRADIENTS,
    LAYOUTS,
    MIXED,
    OPTIONAL,
    Layout,
    Tensors,
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

from lowrank_ext import ops, reference

OP = "lowrank_linear"
SUBSETS = [names for size in range(4) for names in combinations(OPTIONAL, size)]


def subset_id(names: tuple[str, ...]) -> str:
    return "+".join(names) or "plain"


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("optional", SUBSETS, ids=subset_id)
def test_values_and_gradients(
    device: str, dtypes: DtypePair, optional: tuple[str, ...], dropout_p: float
) -> None:
    bias = len(optional) % 2 == 0
    tensors = make_tensors(OP, (3, 11), 65, 43, 5, dtypes, device, bias=bias, optional=optional)
    scaling = 0.75 if dropout_p < 0.5 else -2.0
    assert_within_rule(
        OP,
        tensors,
        make_dout(tensors),
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed_tensor(7, device),
    )


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out", "rank"),
    [(300, 257, 129, 16), (16, 1024, 512, 64), (1030, 192, 320, 8), (2, 4099, 31, 3)],
)
def test_sizes_that_need_several_blocks(
    device: str,
    dtypes: DtypePair,
    num_rows: int,
    num_in: int,
    num_out: int,
    rank: int,
    dropout_p: float,
) -> None:
    tensors = make_tensors(
        OP, (num_rows,), num_in, num_out, rank, dtypes, device, optional=OPTIONAL
    )
    options = {"scaling": 2.0, "dropout_p": dropout_p, "seed": seed_tensor(3, device)}
    assert_within_rule(OP, tensors, make_dout(tensors), **options)


@pytest.mark.executor
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_zero_branch_is_exactly_the_linear(device: str, dtypes: DtypePair, p: float) -> None:
    tensors = make_tensors(OP, (9,), 33, 17, 4, dtypes, device, bias=False)
    if p < 1:
        tensors["lora_b"].zero_()
    y = call(ops, OP, tensors, dropout_p=p, seed=seed_tensor(0, device))
    linear = torch.nn.functional.linear(tensors["x"], tensors["weight"])
    assert_same_bits(y, linear, "y of a zero branch")


# Shapes


@pytest.mark.executor(every=5)
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
    got = assert_exact(OP, tensors, make_dout(tensors, integers=True), **options)
    flat = tensors | {"x": tensors["x"].reshape(-1, 4)}
    assert_same_bits(got["y"].reshape(-1, 5), call(ops, OP, flat, **options), "y of flat rows")


@pytest.mark.executor
def test_no_rows_give_zero_gradients(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (0,), 6, 5, 3, dtypes, device, optional=OPTIONAL)
    poison_freed_memory(9, 15, 18, 30, device=device)
    got = evaluate(ops, OP, tensors, None, dropout_p=0.1, seed=seed_tensor(0, device))
    assert got["y"].shape == (0, 5)
    for name in set(present(tensors)) - {"x"}:
        assert torch.equal(got[f"d{name}"], torch.zeros_like(tensors[name])), name


RANKS = [1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 128]


@pytest.mark.executor
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
def test_every_rank(device: str, dtypes: DtypePair, rank: int) -> None:
    """RF-04; for half-size dtypes with ranks whose sums stay representable."""
    if dtypes.base == torch.bfloat16 and rank > 17:
        pytest.skip("integers above 256 are not exact in bfloat16")
    tensors = make_tensors(OP, (6,), 40, 24, rank, dtypes, device, integers=True)
    dout = make_dout(tensors, integers=True)
    sizes = (6 * 40, 6 * 24, 6 * rank, 40 * rank, 24 * rank, 6 * (rank + 16), 40 * (rank + 16))
    poison_freed_memory(*sizes, device=device)
    assert_exact(OP, tensors, dout)
    assert tensors["lora_a"].shape == (rank, 40)


@pytest.mark.executor
def test_rank_above_both_sizes(device: str) -> None:
    tensors = make_tensors(OP, (5,), 8, 12, 20, FP32, device, optional=OPTIONAL, integers=True)
    assert_exact(OP, tensors, make_dout(tensors, integers=True))


# Strides


def assert_layout_changes_nothing(tensors: Tensors, dout: Tensor, **options: object) -> None:
    """Exact values, and the bits that contiguous copies give."""
    got = assert_exact(OP, tensors, dout, **options)
    dense = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    assert_same_values(got, evaluate(ops, OP, dense, dout.contiguous(), **options))


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize(
    "names", ["x", "dout", "x dout", "weight", "bias out_scale rank_scale", "lora_a lora_b core"]
)
def test_layouts(device: str, dtypes: DtypePair, layout: Layout, names: str) -> None:
    tensors = make_tensors(OP, (2, 5), 33, 17, 3, dtypes, device, optional=OPTIONAL, integers=True)
    tensors["dout"] = make_dout(tensors, integers=True)
    for name in names.split():
        tensors[name] = layout(tensors[name])
    dout = tensors.pop("dout")
    assert_layout_changes_nothing(tensors, dout, dropout_p=0.5, seed=seed_tensor(5, device))


@pytest.mark.executor
def test_transposed_leading_dimensions(device: str) -> None:
    """RF-03: x of strides (12, 1, 3) and a gradient of strides (15, 1, 3)."""
    tensors = make_tensors(OP, (2, 3), 4, 5, 2, FP32, device, integers=True)
    tensors["x"] = torch.arange(24.0, device=device).reshape(2, 4, 3).transpose(1, 2)
    dout = torch.randint(-1, 2, (2, 5, 3), device=device).float().transpose(1, 2)
    assert tensors["x"].stride() == (12, 1, 3)
    assert_layout_changes_nothing(tensors, dout)
    permuted = make_tensors(OP, (4, 2, 3), 6, 5, 2, FP32, device, integers=True)
    permuted["x"] = permuted["x"].permute(1, 0, 2, 3)
    assert_layout_changes_nothing(permuted, make_dout(permuted, integers=True))


@pytest.mark.executor
def test_gradient_of_a_sum_has_stride_zero(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (2, 5), 9, 7, 3, dtypes, device, optional=OPTIONAL, integers=True)
    got = assert_exact(OP, tensors, None)
    assert_same_values(got, evaluate(ops, OP, tensors, torch.ones_like(got["y"])))


# Gradients that are needed, and those that are not


def test_gradcheck() -> None:
    tensors = make_tensors(OP, (2, 3), 5, 4, 2, optional=OPTIONAL)
    names = present(tensors)

    def op(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return call(ops, OP, named, scaling=1.5, dropout_p=0.4, seed=seed_tensor(11))

    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("optional", SUBSETS, ids=subset_id)
def test_gradcheck_of_every_middle(optional: tuple[str, ...]) -> None:
    tensors = make_tensors(OP, (3,), 4, 3, 2, bias=False, optional=optional)
    names = present(tensors)

    def op(*values: Tensor) -> Tensor:
        named = {name: None for name in OPTIONAL} | {"bias": None}
        return call(ops, OP, named | dict(zip(names, values, strict=True)), scaling=-0.5)

    assert torch.autograd.gradcheck(op, [tensors[name].requires_grad_() for name in names])


NEEDED = [
    ["x"],
    ["lora_a"],
    ["lora_b"],
    ["core"],
    ["x", "core"],
    ["x", "lora_b", "core"],
    ["lora_a", "lora_b"],
    ["rank_scale", "out_scale"],
    ["x", "lora_a", "lora_b"],
    ["weight"],
    ["bias"],
    ["x", "bias", "lora_b"],
]


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("needs", NEEDED, ids="+".join)
def test_some_gradients_equal_those_of_all(
    device: str, dtypes: DtypePair, needs: list[str]
) -> None:
    tensors = make_tensors(OP, (7,), 24, 18, 4, dtypes, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    assert_exact(OP, tensors, make_dout(tensors, integers=True), needs, **options)


@pytest.mark.executor
def test_no_gradient_needed(device: str) -> None:
    tensors = make_tensors(OP, (7,), 24, 18, 4, FP32, device)
    assert not call(ops, OP, tensors).requires_grad
    tensors["x"].requires_grad_()
    with torch.no_grad():
        assert not call(ops, OP, tensors).requires_grad
    with torch.inference_mode():
        inferred = call(ops, OP, tensors)
    assert_same_bits(inferred, call(ops, OP, tensors).detach(), "y under inference_mode")


@pytest.mark.executor
@pytest.mark.parametrize("needed", GRADIENTS)
def test_backward_op_computes_only_what_is_asked(device: str, needed: str) -> None:
    tensors = make_tensors(OP, (7,), 24, 18, 4, FP32, device, optional=OPTIONAL)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    _, h = torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors, **options))
    dout = make_dout(tensors)
    backward = torch.ops.lowrank_ext.lowrank_linear_backward
    every = backward(*raw_backward_args(OP, tensors, dout, h, GRADIENTS, **options))
    some = backward(*raw_backward_args(OP, tensors, dout, h, (needed,), **options))
    for name, alone, together in zip(GRADIENTS, some, every, strict=True):
        if name == needed:
            torch.testing.assert_close(alone, together)
        else:
            assert alone.shape == (0,), name


@pytest.mark.executor
def test_backward_op_returns_each_dtype(device: str, dtypes: DtypePair) -> None:
    """The op itself, since autograd would cast what it is given."""
    tensors = make_tensors(OP, (7,), 24, 18, 4, dtypes, device, optional=OPTIONAL)
    y, h = torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors))
    dout = make_dout(tensors)
    grads = torch.ops.lowrank_ext.lowrank_linear_backward(
        *raw_backward_args(OP, tensors, dout, h, GRADIENTS)
    )
    assert {y.dtype, h.dtype, grads[0].dtype} == {dtypes.base}
    assert {grad.dtype for grad in grads[1:]} == {dtypes.adapter}


@pytest.mark.executor
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sums_over_rows_run_in_fp32(device: str, half: torch.dtype) -> None:
    """Every gradient is 2051 ones: neither half-size dtype holds that, nor one of its halves."""
    num_rows = 2051
    ones = torch.ones(num_rows, 1, dtype=half, device=device)
    weight = torch.ones(1, 1, dtype=half, device=device)
    lora_a, lora_b, core = (torch.ones(1, 1, device=device, requires_grad=True) for _ in range(3))
    rank_scale, out_scale = (torch.ones(1, device=device, requires_grad=True) for _ in range(2))
    vectors = {"core": core, "rank_scale": rank_scale, "out_scale": out_scale}
    y = ops.lowrank_linear(ones, weight, None, lora_a, lora_b, **vectors)
    grads = torch.autograd.grad(y, [lora_a, lora_b, *vectors.values()], torch.ones_like(y))
    assert [grad.item() for grad in grads] == [num_rows] * 5


@pytest.mark.executor
def test_second_derivative_is_refused(device: str) -> None:
    """Rather than being silently zero."""
    tensors = make_tensors(OP, (3,), 5, 4, 2, FP64, device)
    x = tensors["x"].requires_grad_()
    y = call(ops, OP, tensors)
    with pytest.raises(RuntimeError, match=r"lowrank_linear|twice"):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.executor
def test_backward_op_works_without_what_is_not_needed(device: str) -> None:
    """x is needed for dlora_a only, h for the other adapter gradients only."""
    tensors = make_tensors(OP, (7,), 24, 18, 4, FP32, device, optional=OPTIONAL)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    _, h = torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors, **options))
    dout = make_dout(tensors)
    backward = torch.ops.lowrank_ext.lowrank_linear_backward
    every = backward(*raw_backward_args(OP, tensors, dout, h, GRADIENTS, **options))
    without_x = tensors | {"x": None}
    needs = ("dx", *GRADIENTS[2:])
    some = backward(*raw_backward_args(OP, without_x, dout, h, needs, **options))
    for name, got, expected in zip(GRADIENTS, some, every, strict=True):
        if name in needs:
            torch.testing.assert_close(got, expected)
    only_dx = backward(*raw_backward_args(OP, without_x, dout, None, ("dx",), **options))
    torch.testing.assert_close(only_dx[0], every[0])


# The op itself: h, aliasing, repeatability, rows on their own


@pytest.mark.executor
def test_h_is_the_down_projection(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (2, 5), 40, 12, 3, dtypes, device, optional=OPTIONAL, integers=True)
    seed = seed_tensor(8, device)
    y, h = torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors, dropout_p=0.5, seed=seed))
    dropped = reference.dropout(tensors["x"].double(), 0.5, seed)
    assert_same_bits(h, (dropped @ tensors["lora_a"].double().mT).to(dtypes.base), "h")
    assert y.is_contiguous() and h.is_contiguous()


@pytest.mark.executor
def test_two_runs_give_the_same_bits(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (70,), 129, 65, 8, dtypes, device, optional=OPTIONAL)
    options = {"dropout_p": 0.3, "seed": seed_tensor(6, device)}
    dout = make_dout(tensors)
    first = evaluate(ops, OP, tensors, dout, **options)
    for _ in range(3):
        assert_same_values(evaluate(ops, OP, tensors, dout, **options), first)


def test_threads_change_nothing() -> None:
    tensors = make_tensors(OP, (200,), 96, 80, 8, FP32, integers=True, optional=OPTIONAL)
    dout = make_dout(tensors, integers=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_exact(OP, tensors, dout, dropout_p=0.5, seed=seed_tensor(6))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.executor
def test_a_row_of_nan_stays_in_its_row(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (35,), 20, 12, 4, dtypes, device)
    dout = make_dout(tensors)
    clean = evaluate(ops, OP, tensors, dout, ["x"])
    tensors["x"][17] = torch.nan
    dirty = evaluate(ops, OP, tensors, dout, ["x"])
    others = torch.arange(35, device=device) != 17
    assert dirty["y"][17].isnan().all()
    assert_same_bits(dirty["y"][others], clean["y"][others], "other rows of y")
    assert_same_bits(dirty["dx"], clean["dx"], "dx, which does not depend on x")


OPCHECK = {
    "plain": {},
    "no bias, core": {"bias": False, "optional": ("core",)},
    "everything": {"optional": OPTIONAL},
    "mixed": {"optional": OPTIONAL, "dtypes": MIXED},
}


@pytest.mark.executor(every=5)
@pytest.mark.parametrize("layout", [torch.clone, transposed, padded_rows])
@pytest.mark.parametrize("sample", OPCHECK)
def test_opcheck(device: str, sample: str, layout: Layout) -> None:
    kind = {"dtypes": FP32, **OPCHECK[sample]}
    tensors = make_tensors(OP, (2, 5), 9, 6, 3, device=device, **kind)
    tensors["x"] = layout(tensors["x"])
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    _, h = torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors, **options))
    dout = layout(make_dout(tensors))
    given = tuple(f"d{name}" for name in present(tensors))
    backward_args = raw_backward_args(OP, tensors, dout, h, given, **options)
    torch.library.opcheck(torch.ops.lowrank_ext.lowrank_linear_backward.default, backward_args)
    for name in present(tensors):
        tensors[name].requires_grad_()
    args = raw_args(OP, tensors, **options)
    torch.library.opcheck(torch.ops.lowrank_ext.lowrank_linear.default, args)


# Autocast: RF-14


@pytest.mark.executor
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device: str, low: torch.dtype) -> None:
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    weight, lora_a, lora_b = (torch.ones(1, 1, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, low):
        y = ops.lowrank_linear(x, weight, None, lora_a, lora_b)
    assert y.dtype == low
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    assert y.item() == expected
    y.sum().backward()
    for tensor in (x, weight, lora_a, lora_b):
        assert tensor.grad.dtype == torch.float32
    assert lora_a.grad.item() == lora_b.grad.item() == expected / 2
    outside = ops.lowrank_linear(x, weight, None, lora_a, lora_b)
    assert outside.dtype == torch.float32 and outside.item() == 2.0078125


@pytest.mark.executor
def test_autocast_follows_linear(device: str) -> None:
    """Everything that F.linear accepts under autocast: mixed inputs, fp64, a disabled region."""
    tensors = make_tensors(OP, (5,), 8, 6, 2, FP32, device, optional=OPTIONAL)
    half = {name: None if t is None else t.bfloat16() for name, t in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        for name in present(tensors):
            assert call(ops, OP, tensors | {name: half[name]}).dtype == torch.bfloat16
        with torch.autocast(device, enabled=False):
            assert call(ops, OP, tensors).dtype == torch.float32
    wide = make_tensors(OP, (5,), 8, 6, 2, FP64, device)
    with torch.autocast(device, torch.bfloat16):
        assert call(ops, OP, wide).dtype == torch.float64


@pytest.mark.executor
def test_half_base_with_fp32_adapters_needs_no_autocast(device: str) -> None:
    one = torch.ones(1, 1, device=device)
    x = torch.tensor([[1.00390625]], device=device)
    lora_a, lora_b = one.clone().requires_grad_(), one.clone().requires_grad_()
    y = ops.lowrank_linear(x.bfloat16(), one.bfloat16(), None, lora_a, lora_b)
    assert y.dtype == torch.bfloat16 and y.item() == 2.0
    y.sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32
    assert lora_a.grad.item() == lora_b.grad.item() == 1.0


# Wrong arguments

F32, F64, BF = torch.float32, torch.float64, torch.bfloat16

# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "x without columns": ({"x": torch.ones(())}, r"x must .*got \[\]"),
    "x of integers": ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must .*"),
    "x too narrow": ({"x": torch.ones(3, 7)}, r"x must .*8.*got \[3, 7\]"),
    "weight 1-D": ({"weight": torch.ones(6)}, r"weight must .*got \[6\]"),
    "weight too narrow": ({"weight": torch.ones(6, 7)}, r"x must .*7.*got \[3, 8\]"),
    "weight dtype": ({"weight": torch.ones(6, 8, dtype=BF)}, "weight must .*"),
    "bias too long": ({"bias": torch.ones(7)}, r"bias must .*6.*got \[7\]"),
    "bias 2-D": ({"bias": torch.ones(1, 6)}, r"bias must .*6.*got \[1, 6\]"),
    "bias dtype": ({"bias": torch.ones(6, dtype=F64)}, "bias must .*"),
    "lora_a too narrow": ({"lora_a": torch.ones(2, 9)}, r"lora_a must .*8.*got \[2, 9\]"),
    "lora_a 1-D": ({"lora_a": torch.ones(8)}, r"lora_a must .*got \[8\]"),
    "lora_a without rows": ({"lora_a": torch.ones(0, 8)}, r"lora_a must .*8.*got \[0, 8\]"),
    "lora_a dtype": ({"lora_a": torch.ones(2, 8, dtype=BF)}, "lora_a must .*"),
    "lora_b too long": ({"lora_b": torch.ones(5, 2)}, r"lora_b must .*6.*got \[5, 2\]"),
    "lora_b of other rank": ({"lora_b": torch.ones(6, 3)}, r"lora_b must .*2.*got \[6, 3\]"),
    "lora_b dtype": ({"lora_b": torch.ones(6, 2, dtype=F64)}, "lora_b must .*"),
    "core not square": ({"core": torch.ones(2, 3)}, r"core must .*2.*got \[2, 3\]"),
    "core of other rank": ({"core": torch.ones(3, 3)}, r"core must .*2.*got \[3, 3\]"),
    "rank_scale too long": ({"rank_scale": torch.ones(3)}, r"rank_scale must .*2.*got \[3\]"),
    "out_scale too short": ({"out_scale": torch.ones(5)}, r"out_scale must .*6.*got \[5\]"),
    "out_scale dtype": ({"out_scale": torch.ones(6, dtype=F64)}, "out_scale must .*"),
    "dropout_p negative": ({"dropout_p": -0.1}, r"dropout_p must .*-0\.1"),
    "dropout_p above one": ({"dropout_p": 1.5}, r"dropout_p must .*1\.5"),
    "dropout_p nan": ({"dropout_p": float("nan")}, "dropout_p must .*nan"),
    "seed dtype": ({"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int32)}, "seed must .*"),
    "seed of two": ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must .*2"),
}


@pytest.mark.executor
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(device: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(OP, make_tensors(OP, (3,), 8, 6, 2, FP32, device), changes, message)


@pytest.mark.executor
def test_raw_op_needs_a_seed_for_dropout(device: str) -> None:
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32, device)
    with pytest.raises(RuntimeError, match="lowrank_linear: seed must"):
        torch.ops.lowrank_ext.lowrank_linear(*raw_args(OP, tensors, dropout_p=0.5))


@pytest.mark.executor
def test_backward_op_says_what_is_missing(device: str) -> None:
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32, device)
    dout = make_dout(tensors)
    backward = torch.ops.lowrank_ext.lowrank_linear_backward
    h = torch.zeros(3, 2, device=device)
    with pytest.raises(RuntimeError, match="lowrank_linear_backward: x must"):
        backward(*raw_backward_args(OP, tensors | {"x": None}, dout, h, ("dlora_a",)))
    with pytest.raises(RuntimeError, match="lowrank_linear_backward: h must"):
        backward(*raw_backward_args(OP, tensors, dout, None, ("dlora_b",)))
    with pytest.raises(RuntimeError, match="lowrank_linear_backward: dout must"):
        backward(*raw_backward_args(OP, tensors, dout[:, :5], h, ("dx",)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
def test_tensors_on_two_devices(name: str) -> None:
    """RF-11 on one GPU: the message names both devices."""
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32, "cuda")
    tensors[name] = tensors[name].cpu()
    with pytest.raises(RuntimeError, match=r"(?s)(cpu.*cuda|cuda.*cpu)"):
        call(ops, OP, tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_seed_on_another_device_without_dropout() -> None:
    """It is not read, but chooses the backend: a kernel must not see the CPU tensors."""
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32)
    with pytest.raises(RuntimeError, match=r"seed must be on the device of x \(cpu\), got cuda:0"):
        call(ops, OP, tensors, seed=seed_tensor(0, "cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current() -> None:
    """RF-11."""
    tensors = make_tensors(OP, (4,), 8, 6, 2, FP32, integers=True)
    moved = {name: None if t is None else t.to("cuda:1") for name, t in tensors.items()}
    got = assert_exact(OP, moved, make_dout(tensors, integers=True).to("cuda:1"))
    assert {value.device.index for value in got.values()} == {1}
    assert torch.cuda.current_device() == 0
