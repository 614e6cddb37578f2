"""What lowrank_linear and lowrank_add have in common: values, gradients, strides, errors."""

import pytest
import torch
from devices import SIMT, DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    FP64,
    GRADIENTS,
    HALVES,
    LAYOUTS,
    MIXED,
    OPS,
    OPTIONAL,
    SUBSETS,
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
    odd_integers,
    on_device,
    opcheck,
    padded_rows,
    poison_freed_memory,
    present,
    raw_args,
    raw_backward_args,
    seed_tensor,
    transposed,
    true_values,
)
from torch import Tensor

from lowrank_ext import ops, reference

both_ops = pytest.mark.parametrize("op", OPS)
several_dtypes = pytest.mark.parametrize(
    "dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"]
)
two_dtypes = pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])


def subset_id(names: tuple[str, ...]) -> str:
    return "+".join(names) or "plain"


def each_of(cases: dict[str, list]) -> list[tuple]:
    """(op, case) for every case that is listed under the op."""
    return [(op, case) for op in OPS for case in cases[op]]


def raw(op: str, tensors: Tensors, **options: object) -> tuple[Tensor, Tensor]:
    """y and h of the op itself."""
    return getattr(torch.ops.lowrank_ext, op)(*raw_args(op, tensors, **options))


def raw_backward(
    op: str,
    tensors: Tensors,
    dout: Tensor,
    h: Tensor | None,
    needs: tuple[str, ...],
    **options: object,
) -> tuple[Tensor, ...]:
    backward = getattr(torch.ops.lowrank_ext, f"{op}_backward")
    return backward(*raw_backward_args(op, tensors, dout, h, needs, **options))


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("optional", SUBSETS, ids=subset_id)
@both_ops
def test_values_and_gradients(
    device: str, op: str, dtypes: DtypePair, optional: tuple[str, ...], dropout_p: float
) -> None:
    bias = len(optional) % 2 == 0
    tensors = make_tensors(op, (3, 11), 65, 43, 5, dtypes, device, bias=bias, optional=optional)
    scaling = 0.75 if dropout_p == 0.0 else -2.0
    options = {"scaling": scaling, "dropout_p": dropout_p, "seed": seed_tensor(7, device)}
    assert_within_rule(op, tensors, make_dout(tensors), **options)


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@several_dtypes
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out", "rank"),
    [
        (300, 257, 129, 16),
        (16, 1024, 512, 64),
        (1030, 192, 320, 8),
        (2, 4099, 31, 3),
        (130, 200, 150, 41),
    ],
)
@both_ops
def test_sizes_that_need_several_blocks(
    device: str,
    op: str,
    dtypes: DtypePair,
    num_rows: int,
    num_in: int,
    num_out: int,
    rank: int,
    dropout_p: float,
) -> None:
    tensors = make_tensors(
        op, (num_rows,), num_in, num_out, rank, dtypes, device, optional=OPTIONAL
    )
    options = {"scaling": 2.0, "dropout_p": dropout_p, "seed": seed_tensor(3, device)}
    assert_within_rule(op, tensors, make_dout(tensors), **options)


# Shapes


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(1, 1), (7, 13), (31, 33), (33, 32), (128, 127), (127, 129)]
)
@two_dtypes
@both_ops
def test_shapes(
    device: str, op: str, dtypes: DtypePair, num_rows: int, num_in: int, num_out: int
) -> None:
    tensors = make_tensors(op, (num_rows,), num_in, num_out, 4, dtypes, device, integers=True)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_exact(op, tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.simt
@pytest.mark.parametrize(("num_in", "num_out"), [(0, 5), (5, 0), (0, 0)])
@both_ops
def test_no_columns(device: str, op: str, dtypes: DtypePair, num_in: int, num_out: int) -> None:
    tensors = make_tensors(op, (3,), num_in, num_out, 2, dtypes, device, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(1, device)}
    assert_exact(op, tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.simt
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3), (2, 0, 3), (1, 2, 1, 2)])
@both_ops
def test_leading_dimensions_are_kept(device: str, op: str, lead: tuple[int, ...]) -> None:
    tensors = make_tensors(op, lead, 4, 5, 2, FP32, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(2, device)}
    got = assert_exact(op, tensors, make_dout(tensors, integers=True), **options)
    by_row = {"x", "base_out"} & tensors.keys()
    flat = {name: tensors[name].reshape(-1, tensors[name].shape[-1]) for name in by_row}
    y = call(ops, op, tensors | flat, **options)
    assert_same_bits(got["y"].reshape(-1, 5), y, "y of flat rows")


@pytest.mark.simt
@both_ops
def test_no_rows_give_zero_gradients(device: str, op: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(op, (0,), 6, 5, 3, dtypes, device, optional=OPTIONAL)
    poison_freed_memory(9, 15, 18, 30, device=device)
    got = evaluate(ops, op, tensors, None, dropout_p=0.1, seed=seed_tensor(0, device))
    assert got["y"].shape == (0, 5)
    for name in present(tensors):
        assert torch.equal(got[f"d{name}"], torch.zeros_like(tensors[name])), name


RANKS = [1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 128]


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("rank", RANKS)
@several_dtypes
@both_ops
def test_every_rank(device: str, op: str, dtypes: DtypePair, rank: int) -> None:
    """RF-04; for half-size dtypes with ranks whose sums stay representable."""
    if dtypes.base == torch.bfloat16 and rank > 17:
        pytest.skip("integers above 256 are not exact in bfloat16")
    tensors = make_tensors(op, (6,), 40, 24, rank, dtypes, device, integers=True)
    dout = make_dout(tensors, integers=True)
    sizes = (6 * 40, 6 * 24, 6 * rank, 40 * rank, 24 * rank, 6 * (rank + 16), 40 * (rank + 16))
    poison_freed_memory(*sizes, device=device)
    assert_exact(op, tensors, dout)
    assert tensors["lora_a"].shape == (rank, 40)


@pytest.mark.simt
@both_ops
def test_rank_above_both_sizes(device: str, op: str) -> None:
    tensors = make_tensors(op, (5,), 8, 12, 20, FP32, device, optional=OPTIONAL, integers=True)
    assert_exact(op, tensors, make_dout(tensors, integers=True))


# Strides


def assert_layout_changes_nothing(
    op: str, tensors: Tensors, dout: Tensor, **options: object
) -> None:
    """Exact values, and the bits that contiguous copies give."""
    got = assert_exact(op, tensors, dout, **options)
    dense = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    assert_same_values(got, evaluate(ops, op, dense, dout.contiguous(), **options))


LAID_OUT = {
    "lowrank_linear": [
        "x",
        "dout",
        "x dout",
        "weight",
        "bias out_scale rank_scale",
        "lora_a lora_b core",
    ],
    "lowrank_add": ["x", "dout", "base_out", "x dout base_out", "lora_a lora_b core"],
}


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("layout", LAYOUTS)
@two_dtypes
@pytest.mark.parametrize(("op", "names"), each_of(LAID_OUT))
def test_layouts(device: str, op: str, dtypes: DtypePair, layout: Layout, names: str) -> None:
    tensors = make_tensors(op, (2, 5), 33, 17, 3, dtypes, device, optional=OPTIONAL, integers=True)
    tensors["dout"] = make_dout(tensors, integers=True)
    for name in names.split():
        tensors[name] = layout(tensors[name])
    dout = tensors.pop("dout")
    assert_layout_changes_nothing(op, tensors, dout, dropout_p=0.5, seed=seed_tensor(5, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtypes", "num_rows"),
    [(BF16, 300), (FP32, 600), (DtypePair(torch.float16, torch.float32), 600)],
    ids=["bfloat16", "float32", "float16+float32"],
)
@both_ops
def test_layouts_of_several_blocks(
    device: str, op: str, dtypes: DtypePair, num_rows: int, layout: Layout
) -> None:
    """A stride that holds within a tile (128 rows) or a block (512 rows) holds between them too."""
    tensors = make_tensors(op, (num_rows,), 24, 70, 3, dtypes, device, integers=True)
    dout = layout(make_dout(tensors, integers=True))
    for name in {"x", "base_out"} & tensors.keys():
        tensors[name] = layout(tensors[name])
    options = {"dropout_p": 0.5, "seed": seed_tensor(5, device)}
    assert_layout_changes_nothing(op, tensors, dout, **options)


@pytest.mark.simt
@both_ops
def test_transposed_leading_dimensions(device: str, op: str) -> None:
    """RF-03: x of strides (12, 1, 3) and a gradient of strides (15, 1, 3)."""
    tensors = make_tensors(op, (2, 3), 4, 5, 2, FP32, device, integers=True)
    tensors["x"] = torch.arange(24.0, device=device).reshape(2, 4, 3).transpose(1, 2)
    dout = torch.randint(-1, 2, (2, 5, 3), device=device).float().transpose(1, 2)
    assert tensors["x"].stride() == (12, 1, 3)
    assert_layout_changes_nothing(op, tensors, dout)
    permuted = make_tensors(op, (4, 2, 3), 6, 5, 2, FP32, device, integers=True)
    for name in {"x", "base_out"} & permuted.keys():
        permuted[name] = permuted[name].permute(1, 0, 2, 3)
    assert_layout_changes_nothing(op, permuted, make_dout(permuted, integers=True))


@pytest.mark.simt
@both_ops
def test_gradient_of_a_sum_has_stride_zero(device: str, op: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(op, (2, 5), 9, 7, 3, dtypes, device, optional=OPTIONAL, integers=True)
    got = assert_exact(op, tensors, None)
    assert_same_values(got, evaluate(ops, op, tensors, torch.ones_like(got["y"])))


# Rounding


@pytest.mark.simt
@pytest.mark.parametrize("num_rows", [9, 300])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("odd", "result"), [("lora_b", "y"), ("lora_a", "dx")])
@both_ops
def test_sums_are_rounded_once(
    device: str, kernels: str, op: str, odd: str, result: str, half: torch.dtype, num_rows: int
) -> None:
    """A branch that the dtype cannot hold, added to a base: fp64's value, rounded once."""
    if op == "lowrank_linear" and kernels != "cpu" and num_rows > 9:
        pytest.skip("a GPU writes the branch of a large output before the base product")
    dtypes = DtypePair(half, half)
    tensors = make_tensors(op, (num_rows,), 24, 20, 8, dtypes, device, integers=True)
    for name in {odd, "base_out"} & tensors.keys():
        tensors[name] = odd_integers(tensors[name])
    dout = make_dout(tensors, integers=True)
    got = evaluate(ops, op, tensors, dout, ["x"])[result]
    true = true_values(op, tensors, dout, ["x"])[result]
    assert not torch.equal(true.to(half).double(), true), "badly chosen case"
    assert_same_bits(got, true.to(half), result)


# Gradients that are needed, and those that are not


@pytest.mark.parametrize("optional", SUBSETS, ids=subset_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@both_ops
def test_gradcheck(op: str, optional: tuple[str, ...], dropout_p: float) -> None:
    tensors = make_tensors(op, (2, 3), 5, 4, 2, bias=dropout_p > 0, optional=optional)
    names = present(tensors)

    def run(*values: Tensor) -> Tensor:
        named = tensors | dict(zip(names, values, strict=True))
        return call(ops, op, named, scaling=-1.5, dropout_p=dropout_p, seed=seed_tensor(11))

    assert torch.autograd.gradcheck(run, [tensors[name].requires_grad_() for name in names])


NEEDED_BY_BOTH = [
    ["x"],
    ["lora_a"],
    ["lora_b"],
    ["core"],
    ["x", "core"],
    ["x", "lora_b", "core"],
    ["lora_a", "lora_b"],
    ["rank_scale", "out_scale"],
    ["x", "lora_a", "lora_b"],
]
NEEDED = {
    "lowrank_linear": [*NEEDED_BY_BOTH, ["weight"], ["bias"], ["x", "bias", "lora_b"]],
    "lowrank_add": [*NEEDED_BY_BOTH, ["base_out"], ["base_out", "x", "core"]],
}


@pytest.mark.simt(every=5)
@pytest.mark.parametrize(("op", "needs"), each_of(NEEDED))
def test_some_gradients_equal_those_of_all(
    device: str, op: str, dtypes: DtypePair, needs: list[str]
) -> None:
    tensors = make_tensors(op, (7,), 24, 18, 4, dtypes, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    assert_exact(op, tensors, make_dout(tensors, integers=True), needs, **options)


@pytest.mark.simt
@both_ops
def test_no_gradient_needed(device: str, op: str) -> None:
    tensors = make_tensors(op, (7,), 24, 18, 4, FP32, device)
    assert not call(ops, op, tensors).requires_grad
    tensors["x"].requires_grad_()
    with torch.no_grad():
        assert not call(ops, op, tensors).requires_grad
    with torch.inference_mode():
        inferred = call(ops, op, tensors)
    assert_same_bits(inferred, call(ops, op, tensors).detach(), "y under inference_mode")


@pytest.mark.simt
@pytest.mark.parametrize("needed", GRADIENTS)
@both_ops
def test_backward_op_computes_only_what_is_asked(device: str, op: str, needed: str) -> None:
    tensors = make_tensors(op, (7,), 24, 18, 4, FP32, device, optional=OPTIONAL)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(4, device)}
    _, h = raw(op, tensors, **options)
    dout = make_dout(tensors)
    every = raw_backward(op, tensors, dout, h, GRADIENTS, **options)
    some = raw_backward(op, tensors, dout, h, (needed,), **options)
    for name, alone, together in zip(GRADIENTS, some, every, strict=True):
        if name == needed:
            torch.testing.assert_close(alone, together)
        else:
            assert alone.shape == (0,), name


@pytest.mark.simt
@both_ops
def test_backward_op_works_without_what_is_not_needed(device: str, op: str) -> None:
    """x is needed for dlora_a only, h for the other adapter gradients only."""
    tensors = make_tensors(op, (7,), 24, 18, 4, FP32, device, optional=OPTIONAL)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    _, h = raw(op, tensors, **options)
    dout = make_dout(tensors)
    every = raw_backward(op, tensors, dout, h, GRADIENTS, **options)
    without_x = tensors | {"x": None}
    needs = ("dx", *GRADIENTS[2:])
    some = raw_backward(op, without_x, dout, h, needs, **options)
    for name, got, expected in zip(GRADIENTS, some, every, strict=True):
        if name in needs:
            torch.testing.assert_close(got, expected)
    only_dx = raw_backward(op, without_x, dout, None, ("dx",), **options)
    torch.testing.assert_close(only_dx[0], every[0])


@pytest.mark.simt
@both_ops
def test_backward_op_returns_each_dtype(device: str, op: str, dtypes: DtypePair) -> None:
    """The op itself, since autograd would cast what it is given."""
    tensors = make_tensors(op, (7,), 24, 18, 4, dtypes, device, optional=OPTIONAL)
    y, h = raw(op, tensors)
    grads = raw_backward(op, tensors, make_dout(tensors), h, GRADIENTS)
    assert {y.dtype, h.dtype, grads[0].dtype} == {dtypes.base}
    assert {grad.dtype for grad in grads[1:]} == {dtypes.adapter}


@pytest.mark.simt
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@both_ops
def test_sums_over_rows_run_in_fp32(device: str, op: str, half: torch.dtype) -> None:
    """Every gradient is 2051 ones: neither half-size dtype holds that, nor one of its halves."""
    dtypes = DtypePair(half, torch.float32)
    tensors = make_tensors(op, (2051,), 1, 1, 1, dtypes, device, bias=False, optional=OPTIONAL)
    ones = {name: None if t is None else torch.ones_like(t) for name, t in tensors.items()}
    needs = ["lora_a", "lora_b", *OPTIONAL]
    got = evaluate(ops, op, ones, torch.ones_like(make_dout(tensors)), needs)
    assert [got[f"d{name}"].item() for name in needs] == [2051] * 5


@pytest.mark.simt
@both_ops
def test_second_derivatives(device: str, op: str) -> None:
    """They are those of the reference, and not silently zero."""
    tensors = make_tensors(op, (3,), 5, 4, 2, FP64, device)
    x = tensors["x"].requires_grad_()
    seconds = []
    for module in (ops, reference):
        y = call(module, op, tensors)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        seconds += torch.autograd.grad(dx.sum(), x)
    assert seconds[0].any()
    torch.testing.assert_close(*seconds)


# The op itself: h, aliasing, repeatability, rows on their own


@pytest.mark.simt
@both_ops
def test_h_is_the_down_projection(device: str, op: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(op, (2, 5), 40, 12, 3, dtypes, device, optional=OPTIONAL, integers=True)
    seed = seed_tensor(8, device)
    y, h = raw(op, tensors, dropout_p=0.5, seed=seed)
    dropped = reference.dropout(tensors["x"].double(), 0.5, seed)
    assert_same_bits(h, (dropped @ tensors["lora_a"].double().mT).to(dtypes.base), "h")
    assert y.is_contiguous() and h.is_contiguous()


@pytest.mark.simt
@both_ops
def test_two_runs_give_the_same_bits(device: str, op: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(op, (70,), 129, 65, 8, dtypes, device, optional=OPTIONAL)
    options = {"dropout_p": 0.3, "seed": seed_tensor(6, device)}
    dout = make_dout(tensors)
    first = evaluate(ops, op, tensors, dout, **options)
    for _ in range(3):
        assert_same_values(evaluate(ops, op, tensors, dout, **options), first)


@both_ops
def test_threads_change_nothing(op: str) -> None:
    tensors = make_tensors(op, (200,), 96, 80, 8, FP32, integers=True, optional=OPTIONAL)
    dout = make_dout(tensors, integers=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_exact(op, tensors, dout, dropout_p=0.5, seed=seed_tensor(6))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.simt
@both_ops
def test_a_row_of_nan_stays_in_its_row(device: str, op: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(op, (35,), 20, 12, 4, dtypes, device)
    dout = make_dout(tensors)
    clean = evaluate(ops, op, tensors, dout, ["x"])
    tensors["x"][17] = torch.nan
    dirty = evaluate(ops, op, tensors, dout, ["x"])
    others = torch.arange(35, device=device) != 17
    assert dirty["y"][17].isnan().all()
    assert_same_bits(dirty["y"][others], clean["y"][others], "other rows of y")
    assert_same_bits(dirty["dx"], clean["dx"], "dx, which does not depend on x")


OPCHECK = {
    "plain": {"bias": False},
    "bias, core": {"optional": ("core",)},
    "everything": {"optional": OPTIONAL},
    "mixed": {"optional": OPTIONAL, "dtypes": MIXED},
}


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("layout", [torch.clone, transposed, padded_rows])
@pytest.mark.parametrize("sample", OPCHECK)
@both_ops
def test_opcheck(device: str, kernels: str, op: str, sample: str, layout: Layout) -> None:
    """Compiled without any optional tensor, and with all of them."""
    compiled = kernels != SIMT and layout is padded_rows and sample in ("plain", "mixed")
    kind = {"dtypes": FP32, **OPCHECK[sample]}
    tensors = make_tensors(op, (2, 5), 9, 6, 3, device=device, **kind)
    for name in {"x", "base_out"} & tensors.keys():
        tensors[name] = layout(tensors[name])
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(1, device)}
    _, h = raw(op, tensors, **options)
    dout = layout(make_dout(tensors))
    given = tuple(f"d{name}" for name in present(tensors))
    backward_args = raw_backward_args(op, tensors, dout, h, given, **options)
    backward = getattr(torch.ops.lowrank_ext, f"{op}_backward")
    opcheck(backward.default, backward_args, compiled)
    for name in present(tensors):
        tensors[name].requires_grad_()
    forward = getattr(torch.ops.lowrank_ext, op)
    opcheck(forward.default, raw_args(op, tensors, **options), compiled)


# Wrong arguments

F64, BF = torch.float64, torch.bfloat16

# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "x without columns": ({"x": torch.ones(())}, r"x must .*got \[\]"),
    "x of integers": ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must .*"),
    "lora_a too narrow": ({"lora_a": torch.ones(2, 9)}, r"lora_a must .*8.*got \[2, 9\]"),
    "lora_a 1-D": ({"lora_a": torch.ones(8)}, r"lora_a must .*got \[8\]"),
    "lora_a without rows": ({"lora_a": torch.ones(0, 8)}, r"lora_a must .*8.*got \[0, 8\]"),
    "lora_a dtype": ({"lora_a": torch.ones(2, 8, dtype=BF)}, "lora_a must .*bfloat16"),
    "lora_b of other rank": ({"lora_b": torch.ones(6, 3)}, r"lora_b must .*2.*got \[6, 3\]"),
    "lora_b too long": ({"lora_b": torch.ones(5, 2)}, r"lora_b must .*6.*got \[5, 2\]"),
    "lora_b dtype": ({"lora_b": torch.ones(6, 2, dtype=F64)}, "lora_b must .*"),
    "core not square": ({"core": torch.ones(2, 3)}, r"core must .*2.*got \[2, 3\]"),
    "core of other rank": ({"core": torch.ones(3, 3)}, r"core must .*2.*got \[3, 3\]"),
    "rank_scale too long": ({"rank_scale": torch.ones(3)}, r"rank_scale must .*2.*got \[3\]"),
    "rank_scale 2-D": ({"rank_scale": torch.ones(1, 2)}, r"rank_scale must .*got \[1, 2\]"),
    "out_scale too short": ({"out_scale": torch.ones(5)}, r"out_scale must .*6.*got \[5\]"),
    "out_scale dtype": ({"out_scale": torch.ones(6, dtype=F64)}, "out_scale must .*"),
    "dropout_p negative": ({"dropout_p": -0.1}, r"dropout_p must .*-0\.1"),
    "dropout_p above one": ({"dropout_p": 1.5}, r"dropout_p must .*1\.5"),
    "dropout_p nan": ({"dropout_p": float("nan")}, "dropout_p must .*nan"),
    "seed dtype": ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must .*float32"),
    "seed of two": ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must .*2"),
}


@pytest.mark.simt
@pytest.mark.parametrize("case", WRONG)
@both_ops
def test_wrong_argument(device: str, op: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(
        op, make_tensors(op, (3,), 8, 6, 2, FP32, device), on_device(changes, device), message
    )


@pytest.mark.simt
@both_ops
def test_raw_op_needs_a_seed_for_dropout(device: str, op: str) -> None:
    tensors = make_tensors(op, (3,), 8, 6, 2, FP32, device)
    with pytest.raises(RuntimeError, match=f"{op}: seed must"):
        raw(op, tensors, dropout_p=0.5)


@pytest.mark.simt
@both_ops
def test_backward_op_says_what_is_missing(device: str, op: str) -> None:
    tensors = make_tensors(op, (3,), 8, 6, 2, FP32, device)
    dout = make_dout(tensors)
    h = torch.zeros(3, 2, device=device)
    with pytest.raises(RuntimeError, match=f"{op}_backward: x must"):
        raw_backward(op, tensors | {"x": None}, dout, h, ("dlora_a",))
    with pytest.raises(RuntimeError, match=f"{op}_backward: h must"):
        raw_backward(op, tensors, dout, None, ("dlora_b",))
    with pytest.raises(RuntimeError, match=f"{op}_backward: dout must"):
        raw_backward(op, tensors, dout[:, :5], h, ("dx",))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b"])
@both_ops
def test_tensors_on_two_devices(op: str, name: str) -> None:
    """RF-11 on one GPU: the message names both devices."""
    tensors = make_tensors(op, (3,), 8, 6, 2, FP32, "cuda")
    tensors[name] = tensors[name].cpu()
    with pytest.raises(RuntimeError, match=r"(?s)(cpu.*cuda|cuda.*cpu)"):
        call(ops, op, tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_ops
def test_seed_on_another_device_without_dropout(op: str) -> None:
    """It is not read, but chooses the backend: a kernel must not see the CPU tensors."""
    tensors = make_tensors(op, (3,), 8, 6, 2, FP32)
    with pytest.raises(RuntimeError, match=r"seed must be on the device of x \(cpu\), got cuda:0"):
        call(ops, op, tensors, seed=seed_tensor(0, "cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_ops
def test_second_gpu_while_the_first_is_current(op: str) -> None:
    """RF-11."""
    tensors = make_tensors(op, (4,), 8, 6, 2, FP32, integers=True)
    moved = {name: None if t is None else t.to("cuda:1") for name, t in tensors.items()}
    got = assert_exact(op, moved, make_dout(tensors, integers=True).to("cuda:1"))
    assert {value.device.index for value in got.values()} == {1}
    assert torch.cuda.current_device() == 0
