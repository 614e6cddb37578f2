"""multi_lowrank_add: an adapter per row."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import SIMT, DtypePair
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
    assert_errors_within_rule,
    assert_raises_alike,
    assert_same_bits,
    assert_same_values,
    odd_integers,
    on_device,
    opcheck,
    padded_rows,
    poison_freed_memory,
    seed_tensor,
    transposed,
)
from torch import Tensor

from lowrank_ext import ops, reference

OP = "multi_lowrank_add"
FLOATS = ("base_out", "x", "lora_a", "lora_b")
# What the rows ask for, of n adapters; "one" is lowrank_add, "runs" is a batch of sequences.
PATTERNS = ("random", "runs", "one", "none", "one and none")


def make_ids(pattern: str, lead: tuple[int, ...], n: int, device: str = "cpu") -> Tensor:
    ids = torch.randint(-1, n, lead) if n else torch.full(lead, -1)
    if pattern == "runs":
        ids = ids.flatten().sort().values.view(lead)
    elif pattern in ("one", "none"):
        ids = torch.full(lead, -1 if pattern == "none" else n - 1)
    elif pattern == "one and none":
        ids = torch.where(ids % 2 == 0, n - 1, -1)
    return ids.to(device)


def make_tensors(
    ids: Tensor,
    num_in: int,
    num_out: int,
    n: int,
    rank: int,
    dtypes: DtypePair = FP64,
    *,
    ranks: list[int] | None = None,
    integers: bool = False,
) -> Tensors:
    """All tensor arguments; every scaling is a power of two, so that integers stay exact."""

    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, dtype=torch.float64)
        return torch.randn(shape, dtype=torch.float64) * spread

    lead, device = tuple(ids.shape), ids.device
    scaling = torch.tensor([1.0, -0.5, 2.0, 0.25]).repeat(n // 4 + 1)[:n]
    return {
        "base_out": draw(*lead, num_out).to(device, dtypes.base),
        "x": draw(*lead, num_in).to(device, dtypes.base),
        "lora_a": draw(n, rank, num_in, spread=max(1, num_in) ** -0.5).to(device, dtypes.adapter),
        "lora_b": draw(n, num_out, rank, spread=rank**-0.5).to(device, dtypes.adapter),
        "adapter_ids": ids,
        "scaling": scaling.to(device),
        "ranks": None if ranks is None else torch.tensor(ranks, device=device, dtype=torch.int64),
    }


def make_dout(tensors: Tensors, integers: bool = False) -> Tensor:
    base_out = tensors["base_out"]
    if integers:
        return torch.randint_like(base_out, -1, 2)
    return torch.randn_like(base_out)


def evaluate(
    namespace: ModuleType,
    tensors: Tensors,
    dout: Tensor | None,
    needs: tuple[str, ...] = FLOATS,
    **options: Any,
) -> Values:
    """y and the gradients of `needs`; no input may come out changed."""
    leaves = {k: t.detach().requires_grad_(k in needs) for k, t in tensors.items() if t is not None}
    inputs = leaves | ({} if dout is None else {"dout": dout})
    copies = {name: t.detach().clone() for name, t in inputs.items()}
    y = getattr(namespace, OP)(**leaves, **options)
    output, upstream = (y.sum(), None) if dout is None else (y, dout)
    # allow_unused: where no row has an adapter the reference does not touch them.
    grads = torch.autograd.grad(
        output, [leaves[k] for k in needs], upstream, allow_unused=True, materialize_grads=True
    )
    for name, tensor in inputs.items():
        assert_same_bits(tensor.detach(), copies[name], f"{name} was modified")
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(needs, grads, strict=True)}


def true_values(tensors: Tensors, dout: Tensor | None, **options: Any) -> Values:
    wide = {k: t.double() if k in FLOATS and t is not None else t for k, t in tensors.items()}
    return evaluate(reference, wide, None if dout is None else dout.double(), **options)


def assert_dtypes_and_shapes(values: Values, tensors: Tensors) -> None:
    for name, value in values.items():
        like = tensors["base_out" if name == "y" else name[1:]]
        assert value.dtype == like.dtype and value.shape == like.shape, name
        assert name != "y" or value.is_contiguous()


def assert_within_rule(tensors: Tensors, dout: Tensor, **options: Any) -> Values:
    got = evaluate(ops, tensors, dout, **options)
    assert_dtypes_and_shapes(got, tensors)
    plain = evaluate(reference, tensors, dout, **options)
    truth = true_values(tensors, dout, **options)
    assert_errors_within_rule(got, plain, truth, tensors["x"].dtype)
    return got


def assert_exact(tensors: Tensors, dout: Tensor | None, **options: Any) -> Values:
    got = evaluate(ops, tensors, dout, **options)
    assert_dtypes_and_shapes(got, tensors)
    truth = true_values(tensors, dout, **options)
    limit = 2 / torch.finfo(tensors["x"].dtype).eps
    for name in ("y", "dx"):
        assert truth[name].numel() == 0 or truth[name].abs().max() <= limit, "badly chosen case"
    assert_same_values(got, {name: true.to(got[name].dtype) for name, true in truth.items()})
    return got


def raw_args(tensors: Tensors, dropout_p: float = 0.0, seed: Tensor | None = None) -> tuple:
    return (*tensors.values(), dropout_p, seed)


def bits(tensor: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole)


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients(
    device: str, dtypes: DtypePair, pattern: str, dropout_p: float
) -> None:
    ids = make_ids(pattern, (3, 11), 4, device)
    tensors = make_tensors(ids, 65, 43, 4, 5, dtypes, ranks=[5, 2, 0, 4])
    dout = make_dout(tensors)
    got = assert_within_rule(tensors, dout, dropout_p=dropout_p, seed=seed_tensor(7, device))
    assert_same_bits(got["dbase_out"], dout, "the gradient of base_out is dout")


@pytest.mark.simt(every=19)
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("pattern", ["random", "runs", "one"])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out", "rank"),
    [(700, 257, 129, 16), (64, 1024, 512, 8), (600, 96, 160, 64), (2, 4099, 31, 3)],
)
def test_sizes_that_need_several_blocks(
    device: str,
    dtypes: DtypePair,
    num_rows: int,
    num_in: int,
    num_out: int,
    rank: int,
    pattern: str,
    dropout_p: float,
) -> None:
    ids = make_ids(pattern, (num_rows,), 3, device)
    tensors = make_tensors(ids, num_in, num_out, 3, rank, dtypes, ranks=[rank, rank // 2, rank])
    dout = make_dout(tensors)
    assert_within_rule(tensors, dout, dropout_p=dropout_p, seed=seed_tensor(3, device))


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("pattern", ["random", "none", "one and none"])
def test_rows_without_an_adapter_have_the_bits_of_base_out(
    device: str, dtypes: DtypePair, pattern: str
) -> None:
    """-0.0, infinities and any NaN included; what x holds there does not matter."""
    ids = make_ids(pattern, (40,), 3, device)
    tensors = make_tensors(ids, 24, 70, 3, 4, dtypes, ranks=[4, 0, 3])
    base_out = tensors["base_out"]
    base_out[:, ::3] = -0.0
    base_out[:, 1::7] = torch.inf
    bits(base_out)[:, 2::7] = bits(torch.full((), torch.nan, dtype=dtypes.base)) + 1
    without = (ids == -1) | (ids == 1)
    tensors["x"][without] = torch.nan
    y, h = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors))
    assert torch.equal(bits(y)[without], bits(base_out)[without])
    assert (h[without] == 0).all()
    y.fill_(0)
    assert torch.equal(base_out[:, 3], torch.full_like(base_out[:, 3], -0.0)), "y shares memory"


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("num_rows", [200, 40])
def test_one_adapter_is_lowrank_add(device: str, dtypes: DtypePair, num_rows: int) -> None:
    ids = torch.full((num_rows,), 1, device=device)
    tensors = make_tensors(ids, 65, 43, 3, 5, dtypes, ranks=[5, 4, 5], integers=True)
    dout = make_dout(tensors, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(2, device)}
    got = evaluate(ops, tensors, dout, **options)
    lora_a, lora_b = tensors["lora_a"][1, :4], tensors["lora_b"][1, :, :4]
    leaves = [tensors["base_out"], tensors["x"], lora_a, lora_b]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = ops.lowrank_add(*leaves, scaling=float(tensors["scaling"][1]), **options)
    grads = torch.autograd.grad(y, leaves, dout)
    ours = [got["y"], got["dx"], got["dlora_a"][1, :4], got["dlora_b"][1, :, :4]]
    for name, mine, other in zip(("y", "dx", "da", "db"), ours, (y, *grads[1:]), strict=True):
        assert_same_bits(mine, other.detach(), name)


@pytest.mark.simt
@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    data=st.data(),
    lead=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    num_in=st.integers(0, 70),
    num_out=st.integers(0, 70),
    n=st.integers(0, 5),
    rank=st.integers(1, 20),
    dtypes=st.sampled_from([FP64, FP32, BF16, MIXED]),
    layouts=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=4, max_size=4),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_ids_shape_and_layout(
    device: str,
    data: st.DataObject,
    lead: tuple[int, ...],
    num_in: int,
    num_out: int,
    n: int,
    rank: int,
    dtypes: DtypePair,
    layouts: list[Layout | None],
    dropout_p: float,
) -> None:
    torch.manual_seed(0)
    count = torch.Size(lead).numel()
    flat = data.draw(st.lists(st.integers(-1, n - 1), min_size=count, max_size=count))
    ids = torch.tensor(flat, dtype=torch.int64, device=device).reshape(lead)
    ranks = data.draw(
        st.none() | st.lists(st.integers(0, rank), min_size=n, max_size=n), label="ranks"
    )
    tensors = make_tensors(ids, num_in, num_out, n, rank, dtypes, ranks=ranks, integers=True)
    tensors["dout"] = make_dout(tensors, integers=True)
    for name, layout in zip(("x", "base_out", "dout", "lora_a"), layouts, strict=True):
        if layout is not None:
            tensors[name] = layout(tensors[name])
    dout = tensors.pop("dout")
    assert_exact(tensors, dout, dropout_p=dropout_p, seed=seed_tensor(9, device))


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 128, 129, 300])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (31, 15), (32, 16), (33, 17), (95, 97)])
def test_every_rank_and_ragged_sizes(
    device: str, dtypes: DtypePair, rank: int, num_in: int, num_out: int
) -> None:
    """RF-04. Sparse factors keep the sums of large ranks representable in bfloat16."""
    ids = make_ids("random", (11,), 2, device)
    tensors = make_tensors(ids, num_in, num_out, 2, rank, dtypes, integers=True)
    if rank > 17:
        tensors["lora_a"] *= torch.rand_like(tensors["lora_a"]) < 0.2
        tensors["lora_b"] *= torch.rand_like(tensors["lora_b"]) < 0.2
    poison_freed_memory(11 * num_in, 11 * num_out, 11 * rank, rank * num_in, device=device)
    assert_exact(tensors, make_dout(tensors, integers=True))


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 64, 65, 127, 128, 129, 130])
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_number_of_rows(
    device: str, dtypes: DtypePair, num_rows: int, dropout_p: float
) -> None:
    """Two segments of num_rows, their rows taking turns, around the limit of the row kernels."""
    ids = torch.arange(2 * num_rows, device=device) % 2
    tensors = make_tensors(ids, 40, 24, 2, 4, dtypes, integers=True)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(5, device)}
    assert_exact(tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [127, 128, 129, 300])
@pytest.mark.parametrize("num_rows", [4, 9, 21])
def test_large_ranks_of_several_rows(
    device: str, dtypes: DtypePair, rank: int, num_rows: int
) -> None:
    """num_rows of each of two adapters: more ranks and more rows than one go of a kernel takes."""
    ids = torch.arange(2 * num_rows, device=device) % 2
    tensors = make_tensors(ids, 33, 40, 2, rank, dtypes, integers=True)
    tensors["lora_a"] *= torch.rand_like(tensors["lora_a"]) < 0.2
    tensors["lora_b"] *= torch.rand_like(tensors["lora_b"]) < 0.2
    assert_exact(tensors, make_dout(tensors, integers=True))


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 31, 33, 64, 100])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 65, 150])
def test_edges_of_tiles(device: str, rank: int, num_rows: int) -> None:
    """num_rows of each of two adapters; a tile has 16 rows and 32 columns. Padding is NaN."""
    ids = torch.arange(2 * num_rows, device=device) % 2
    num_in, num_out = 32 * (rank % 3) + 21, 16 * (rank % 5) + 11
    tensors = make_tensors(ids, num_in, num_out, 2, rank + 1, BF16, ranks=[rank, rank])
    padded = {"lora_a": tensors["lora_a"].clone(), "lora_b": tensors["lora_b"].clone()}
    padded["lora_a"][:, rank:], padded["lora_b"][:, :, rank:] = torch.nan, torch.nan
    poison_freed_memory(num_rows * num_in, num_rows * num_out, num_rows * rank, device=device)
    got = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors | padded))
    plain, true = reference.multi_lowrank_add(**tensors), true_values(tensors, None)["y"]
    assert_errors_within_rule({"y": got[0]}, {"y": plain}, {"y": true}, torch.bfloat16)
    assert (got[1][:, rank:] == 0).all()


@pytest.mark.parametrize("rank", [16, 31, 100])
def test_an_infinite_row_is_what_plain_torch_makes_of_it(device: str, rank: int) -> None:
    """Columns that a kernel adds to fill a tile would make NaN of it."""
    ids = torch.arange(40, device=device) % 2
    tensors = make_tensors(ids, 35, 21, 2, rank, BF16)
    tensors["lora_a"].abs_()
    tensors["lora_b"].abs_()
    tensors["x"][::3, 5] = torch.inf
    y, h = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors))
    expected = reference.multi_lowrank_add(**tensors)
    assert expected[::3].isinf().all()
    assert torch.equal(y[::3], expected[::3]) and h[::3].isinf().all()
    assert y[1::3].isfinite().all()


@pytest.mark.parametrize("rank", [16, 33])
def test_bits_of_a_row_do_not_depend_on_the_others(device: str, rank: int) -> None:
    ids = torch.arange(62, device=device) % 2
    tensors = make_tensors(ids, 75, 43, 2, rank, BF16)
    y, h = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors))
    some = torch.randperm(62, device=device)[:40]
    part = tensors | {name: tensors[name][some] for name in ("base_out", "x", "adapter_ids")}
    y_part, h_part = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(part))
    assert_same_bits(y_part, y[some], "y")
    assert_same_bits(h_part, h[some], "h")


four_dtypes = pytest.mark.parametrize(
    "dtypes",
    [FP32, BF16, MIXED, DtypePair(torch.float16, torch.float16)],
    ids=["float32", "bfloat16", "mixed", "float16"],
)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("run_length", [1, 3])
@four_dtypes
def test_scattered_segments_of_several_blocks(
    device: str, dtypes: DtypePair, run_length: int, dropout_p: float
) -> None:
    """Two segments of 700 rows; a block of gathered rows has at most 512."""
    ids = (torch.arange(700, device=device) % 2).repeat_interleave(run_length)[:1400]
    ids = torch.cat([ids, ids])[:1400]
    tensors = make_tensors(ids, 64, 24, 2, 3, dtypes, integers=True)
    options = {"dropout_p": dropout_p, "seed": seed_tensor(5, device)}
    assert_exact(tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", ["random", "one"])
def test_layouts_of_several_blocks(
    device: str, dtypes: DtypePair, pattern: str, layout: Layout
) -> None:
    tensors = make_tensors(make_ids(pattern, (600,), 2), 24, 17, 2, 3, dtypes, integers=True)
    dout = layout(make_dout(tensors, integers=True))
    for name in ("x", "base_out"):
        tensors[name] = layout(tensors[name])
    assert_exact(tensors, dout)


@pytest.mark.simt
@pytest.mark.parametrize("num_rows", [2, 18, 400])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("odd", "result"), [("lora_b", "y"), ("lora_a", "dx")])
def test_sums_are_rounded_once(
    device: str, odd: str, result: str, half: torch.dtype, num_rows: int
) -> None:
    """A branch that the dtype cannot hold, added to a base: fp64's value, rounded once."""
    ids = torch.arange(num_rows, device=device) % 2
    tensors = make_tensors(ids, 24, 20, 2, 8, DtypePair(half, half), integers=True)
    for name in (odd, "base_out"):
        tensors[name] = odd_integers(tensors[name])
    dout = make_dout(tensors, integers=True)
    true = true_values(tensors, dout)[result]
    assert not torch.equal(true.to(half).double(), true), "badly chosen case"
    assert_same_bits(evaluate(ops, tensors, dout)[result], true.to(half), result)


@pytest.mark.simt(every=5)
def test_padding_and_idle_adapters_are_not_read(device: str, dtypes: DtypePair) -> None:
    """NaN there changes nothing, and their gradients are zeros in memory that held NaN."""
    for num_rows in (9, 300):
        ids = make_ids("random", (num_rows,), 2, device) * 2  # -2 … 2: adapters 0 and 2
        ids = ids.clamp_min(-1)
        tensors = make_tensors(ids, 33, 21, 4, 6, dtypes, ranks=[6, 6, 3, 2])
        clean = evaluate(ops, tensors, make_dout(tensors))
        a, b = tensors["lora_a"], tensors["lora_b"]
        a[1] = a[3] = b[1] = b[3] = torch.nan
        a[2, 3:] = b[2, :, 3:] = torch.nan
        tensors["scaling"][1] = torch.nan
        poison_freed_memory(a.numel(), b.numel(), num_rows * 33, num_rows * 21, device=device)
        torch.manual_seed(0)
        dout = make_dout(tensors)
        got = evaluate(ops, tensors, dout)
        assert all(value.isfinite().all() for value in got.values())
        assert_same_bits(got["y"], clean["y"], "y")
        for idle in (
            got["dlora_a"][1],
            got["dlora_a"][3],
            got["dlora_b"][1],
            got["dlora_b"][3],
            got["dlora_a"][2, 3:],
            got["dlora_b"][2, :, 3:],
            got["dx"][ids == -1],
        ):
            assert torch.equal(bits(idle), torch.zeros_like(bits(idle)))


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3), (2, 0, 3)])
def test_leading_dimensions_and_gradient_of_a_sum(
    device: str, dtypes: DtypePair, lead: tuple[int, ...]
) -> None:
    tensors = make_tensors(make_ids("random", lead, 2, device), 9, 7, 2, 3, dtypes, integers=True)
    assert_exact(tensors, None)


@pytest.mark.simt
def test_ids_of_sequences_may_be_expanded(device: str) -> None:
    ids = torch.tensor([1, -1, 0], device=device)[:, None].expand(3, 5)
    tensors = make_tensors(ids, 12, 10, 2, 3, FP32, integers=True)
    assert_exact(tensors, make_dout(tensors, integers=True))


@pytest.mark.simt
def test_each_adapter_as_if_alone(device: str) -> None:
    """Gradients of an adapter are those of its rows in a call of their own."""
    ids = make_ids("random", (50,), 3, device)
    tensors = make_tensors(ids, 20, 12, 3, 4, FP64)
    dout = make_dout(tensors)
    got = evaluate(ops, tensors, dout)
    for i in range(3):
        rows = ids == i
        a, b = tensors["lora_a"][i].clone(), tensors["lora_b"][i].clone()
        leaves = [tensors["x"][rows].clone(), a, b]
        leaves = [t.requires_grad_() for t in leaves]
        scaling = float(tensors["scaling"][i])
        y = ops.lowrank_add(tensors["base_out"][rows], *leaves, scaling=scaling)
        dx, da, db = torch.autograd.grad(y, leaves, dout[rows])
        for ours, alone in (
            (got["y"][rows], y),
            (got["dx"][rows], dx),
            (got["dlora_a"][i], da),
            (got["dlora_b"][i], db),
        ):
            torch.testing.assert_close(ours, alone)


@pytest.mark.simt(every=5)
def test_two_runs_and_any_thread_count_give_the_same_bits(device: str, dtypes: DtypePair) -> None:
    ids = make_ids("random", (300,), 3, device)
    tensors = make_tensors(ids, 129, 65, 3, 8, dtypes)
    dout, options = make_dout(tensors), {"dropout_p": 0.3, "seed": seed_tensor(6, device)}
    first = evaluate(ops, tensors, dout, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            assert_same_values(evaluate(ops, tensors, dout, **options), first)
    finally:
        torch.set_num_threads(threads)


def test_gradcheck() -> None:
    ids = torch.tensor([[0, -1, 1], [1, 2, 0]])
    tensors = make_tensors(ids, 5, 4, 3, 2, ranks=[2, 1, 0])
    leaves = [tensors[name].requires_grad_() for name in FLOATS]
    others = {k: t for k, t in tensors.items() if k not in FLOATS}

    def op(*values: Tensor) -> Tensor:
        named = dict(zip(FLOATS, values, strict=True))
        return ops.multi_lowrank_add(**named, **others, dropout_p=0.4, seed=seed_tensor(11))

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("needs", [("x",), ("base_out",), ("lora_a",), ("lora_b",)], ids="+".join)
@pytest.mark.parametrize("pattern", ["random", "one"])
def test_some_gradients_equal_those_of_all(
    device: str, dtypes: DtypePair, needs: tuple[str, ...], pattern: str
) -> None:
    tensors = make_tensors(make_ids(pattern, (7,), 2, device), 24, 18, 2, 4, dtypes, integers=True)
    dout, options = make_dout(tensors), {"dropout_p": 0.5, "seed": seed_tensor(4, device)}
    every = evaluate(ops, tensors, dout, **options)
    some = evaluate(ops, tensors, dout, needs=needs, **options)
    assert_same_values(some, {name: every[name] for name in some})


@pytest.mark.simt
@pytest.mark.parametrize("needed", [0, 1, 2], ids=["dx", "dlora_a", "dlora_b"])
@pytest.mark.parametrize("pattern", ["random", "one"])
def test_backward_op_computes_only_what_is_asked(device: str, needed: int, pattern: str) -> None:
    tensors = make_tensors(make_ids(pattern, (7,), 2, device), 24, 18, 2, 4, FP32)
    _, h = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors))
    dout, rest = make_dout(tensors), (*list(tensors.values())[2:], 0.0, None)
    backward = torch.ops.lowrank_ext.multi_lowrank_add_backward
    every = backward(dout, tensors["x"], h, *rest, True, True, True)
    x, saved_h = tensors["x"] if needed == 1 else None, h if needed == 2 else None
    some = backward(dout, x, saved_h, *rest, *(i == needed for i in range(3)))
    for i, (alone, together) in enumerate(zip(some, every, strict=True)):
        if i == needed:
            assert_same_bits(alone, together, str(i))
        else:
            assert alone.shape == (0,)
    if needed:
        with pytest.raises(RuntimeError, match=r"_backward: [xh] must be given"):
            backward(dout, None, None, *rest, *(i == needed for i in range(3)))


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("layout", [torch.clone, transposed, padded_rows])
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("ranks", [None, [3, 0, 2]], ids=["whole", "ranks"])
def test_opcheck(
    device: str, kernels: str, dtypes: DtypePair, ranks: list[int] | None, layout: Layout
) -> None:
    """Compiled without ranks in one dtype, and with ranks in two."""
    compiled = kernels != SIMT and layout is padded_rows and (ranks is None) == (dtypes == FP32)
    tensors = make_tensors(make_ids("random", (2, 5), 3, device), 9, 6, 3, 3, dtypes, ranks=ranks)
    tensors |= {"x": layout(tensors["x"]), "base_out": layout(tensors["base_out"])}
    options = (0.5, seed_tensor(1, device))
    _, h = torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors, *options))
    args = (layout(make_dout(tensors)), tensors["x"], h, *list(tensors.values())[2:], *options)
    backward = torch.ops.lowrank_ext.multi_lowrank_add_backward.default
    opcheck(backward, (*args, True, True, True), compiled)
    for name in FLOATS:
        tensors[name].requires_grad_()
    op = torch.ops.lowrank_ext.multi_lowrank_add.default
    opcheck(op, raw_args(tensors, *options), compiled)


@pytest.mark.simt
def test_second_derivatives(device: str) -> None:
    tensors = make_tensors(make_ids("random", (4,), 2, device), 5, 4, 2, 2)
    x, lora_a = tensors["x"].requires_grad_(), tensors["lora_a"].requires_grad_()

    def penalty(space: ModuleType) -> tuple[Tensor, ...]:
        y = space.multi_lowrank_add(**tensors)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, lora_a))

    torch.testing.assert_close(penalty(ops), penalty(reference))


@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
def test_compile_with_any_number_of_rows(device: str, dtypes: DtypePair) -> None:
    def op(**tensors: Tensor) -> Tensor:
        return ops.multi_lowrank_add(**tensors)

    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for num_rows in (10, 11, 1, 300):
        ids = make_ids("random", (num_rows,), 3, device)
        tensors = make_tensors(ids, 33, 17, 3, 3, dtypes, ranks=[3, 2, 1], integers=True)
        dout = make_dout(tensors, integers=True)
        leaves = {k: t.detach().requires_grad_(k in FLOATS) for k, t in tensors.items()}
        y = compiled(**leaves)
        grads = torch.autograd.grad(y, [leaves[name] for name in FLOATS], dout)
        got = {"y": y.detach()} | {f"d{k}": g for k, g in zip(FLOATS, grads, strict=True)}
        assert_same_values(got, evaluate(ops, tensors, dout))


@pytest.mark.simt
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device: str, low: torch.dtype) -> None:
    """RF-14: y in autocast's dtype, adapters and their gradients stay in fp32."""
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    a, b = (torch.ones(1, 1, 1, device=device, requires_grad=True) for _ in range(2))
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    for base_out in (x.detach(), x.detach().to(low)):
        with torch.autocast(device, low):
            y = ops.multi_lowrank_add(base_out, x, a, b, ids, torch.ones(1, device=device))
        assert y.dtype == low and y.item() == expected
        grads = torch.autograd.grad(y.sum(), (x, a, b))
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert grads[1].item() == grads[2].item() == expected / 2


def right_tensors(device: str) -> Tensors:
    ids = torch.tensor([0, -1, 1], device=device)
    return make_tensors(ids, 8, 6, 2, 4, FP32, ranks=[4, 2])


# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "base_out of other rows": ({"base_out": torch.ones(4, 6)}, r"base_out must .*got \[4, 6\]"),
    "base_out too wide": ({"base_out": torch.ones(3, 7)}, r"lora_b must .*7.*got \[2, 6, 4\]"),
    "base_out dtype": ({"base_out": torch.ones(3, 6).bfloat16()}, "base_out must .*bfloat16"),
    "x without columns": ({"x": torch.ones(())}, r"x must .*got \[\]"),
    "x of integers": ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must .*"),
    "lora_a 2-D": ({"lora_a": torch.ones(4, 8)}, r"lora_a must be \[n, r, .*8.*got \[4, 8\]"),
    "lora_a too narrow": ({"lora_a": torch.ones(2, 4, 9)}, r"lora_a must .*8.*got \[2, 4, 9\]"),
    "lora_a without ranks": ({"lora_a": torch.ones(2, 0, 8)}, r"lora_a must .*got \[2, 0, 8\]"),
    "lora_a dtype": ({"lora_a": torch.ones(2, 4, 8).bfloat16()}, "lora_a must .*bfloat16"),
    "lora_b of other rank": ({"lora_b": torch.ones(2, 6, 3)}, r"lora_b must .*4.*got \[2, 6, 3\]"),
    "lora_b of other n": ({"lora_b": torch.ones(3, 6, 4)}, r"lora_b must .*n=2.*got \[3, 6, 4\]"),
    "too few ids": ({"adapter_ids": torch.zeros(2).long()}, r"adapter_ids must .*got \[2\]"),
    "ids per column": ({"adapter_ids": torch.zeros(3, 8).long()}, r"adapter_ids must .*\[3, 8\]"),
    "ids dtype": ({"adapter_ids": torch.zeros(3)}, "adapter_ids must be int64, got float32"),
    "too few scalings": ({"scaling": torch.ones(1)}, r"scaling must be \[n=2\], got \[1\]"),
    "scaling dtype": ({"scaling": torch.ones(2).bfloat16()}, "scaling must .*float32.*bfloat16"),
    "too many ranks": ({"ranks": torch.ones(3).long()}, r"ranks must be \[n=2\], got \[3\]"),
    "ranks dtype": ({"ranks": torch.ones(2)}, "ranks must be int64, got float32"),
    "dropout_p above one": ({"dropout_p": 1.5}, r"dropout_p must .*1\.5"),
    "seed dtype": ({"dropout_p": 0.5, "seed": torch.zeros(1)}, "seed must .*float32"),
}


# On a GPU these values are not looked at: their rows become NaN.
WRONG_VALUES: dict[str, tuple[dict[str, object], str]] = {
    "id too large": (
        {"adapter_ids": torch.tensor([0, 1, 2])},
        "adapter_ids must be between -1 and n - 1 = 1, got 2 for row 2",
    ),
    "id too small": ({"adapter_ids": torch.tensor([0, -2, 0])}, "adapter_ids must .*-2 for row 1"),
    "rank too large": (
        {"ranks": torch.tensor([4, 5])},
        "ranks must be between 0 and r=4, got 5 for adapter 1",
    ),
    "rank negative": ({"ranks": torch.tensor([-1, 4])}, "ranks must .*got -1 for adapter 0"),
}


@pytest.mark.simt
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(device: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(OP, right_tensors(device), on_device(changes, device), message)


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_value_on_the_cpu(case: str) -> None:
    changes, message = WRONG_VALUES[case]
    assert_raises_alike(OP, right_tensors("cpu"), changes, message)


@pytest.mark.simt
def test_scaling_that_requires_a_gradient_raises(device: str) -> None:
    tensors = right_tensors(device)
    tensors["scaling"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{OP}: scaling must not require a gradient"):
        ops.multi_lowrank_add(**tensors)
    with torch.no_grad():
        ops.multi_lowrank_add(**tensors)


@pytest.mark.simt
def test_dropout_draws_from_torchs_generator(device: str) -> None:
    tensors = right_tensors(device)
    torch.manual_seed(3)
    first = ops.multi_lowrank_add(**tensors, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, ops.multi_lowrank_add(**tensors, dropout_p=0.5))
    with pytest.raises(RuntimeError, match=f"{OP}: seed must"):
        torch.ops.lowrank_ext.multi_lowrank_add(*raw_args(tensors, 0.5))


# What the CUDA kernels do beside the values


def kernel_reports(simt: ModuleType, run: Callable[[], object]) -> list[dict[str, Any]]:
    simt.clear_reports()
    run()
    return simt.reports()


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("num_rows", [9, 70])
def test_values_out_of_range_give_nan_rows(device: str, dtypes: DtypePair, num_rows: int) -> None:
    """Of ids and of ranks; the other rows, and the other adapters' gradients, are as without."""
    ids = make_ids("random", (num_rows,), 4, device)
    tensors = make_tensors(ids, 33, 21, 4, 5, dtypes, ranks=[5, 2, 3, 4])
    dout = make_dout(tensors)
    wrong = ids.clone()
    wrong[::3] = torch.tensor([-2, 4, 2**40, -(2**63)]).repeat(num_rows)[: len(wrong[::3])]
    right = torch.where(wrong == ids, ids, -1)
    assert (right >= 0).any()
    expected = evaluate(ops, tensors | {"adapter_ids": right}, dout)
    got = evaluate(ops, tensors | {"adapter_ids": wrong}, dout)
    bad = wrong != right
    for name in ("y", "dx"):
        assert got[name][bad].isnan().all()
        assert_same_bits(got[name][~bad], expected[name][~bad], name)
    for name in ("dlora_a", "dlora_b"):
        assert_same_bits(got[name], expected[name], name)

    ranks = torch.tensor([5, 6, 3, -1])
    got = evaluate(ops, tensors | {"ranks": ranks}, dout)
    expected = evaluate(ops, tensors, dout)
    bad = (ids == 1) | (ids == 3)
    for name in ("y", "dx"):
        assert got[name][bad].isnan().all()
        assert_same_bits(got[name][~bad], expected[name][~bad], name)
    for name in ("dlora_a", "dlora_b"):
        for i in range(4):
            used = bool((ids == i).any())
            assert got[name][i].isnan().all() == (used and i in (1, 3)), (name, i)


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_rows", [64, 130])
def test_one_launch_for_all_adapters(
    device: str, simt: ModuleType, pattern: str, num_rows: int
) -> None:
    tensors = make_tensors(make_ids(pattern, (num_rows,), 5, device), 64, 48, 5, 8, BF16)
    forward = torch.ops.lowrank_ext.multi_lowrank_add
    _, h = forward(*raw_args(tensors))
    reports = kernel_reports(simt, lambda: forward(*raw_args(tensors)))
    assert [r["kernel"] for r in reports] == ["order_slots", "segment_down", "segment_up"]
    args = (make_dout(tensors), tensors["x"], h, *list(tensors.values())[2:], 0.0, None)
    backward = torch.ops.lowrank_ext.multi_lowrank_add_backward
    reports = kernel_reports(simt, lambda: backward(*args, True, True, True))
    assert [r["kernel"] for r in reports] == [
        "order_slots",
        "segment_outer",  # dlora_b
        "segment_up_backward",
        "segment_outer",  # dlora_a
        "segment_down_backward_x",
    ]


@pytest.mark.simt(only=True)
def test_only_stacks_of_another_dtype_or_layout_are_copied(device: str, simt: ModuleType) -> None:
    ids = make_ids("random", (20,), 3, device)
    forward = torch.ops.lowrank_ext.multi_lowrank_add

    def rounded_bytes(tensors: Tensors) -> int:
        reports = kernel_reports(simt, lambda: forward(*raw_args(tensors)))
        copies = [r for r in reports if r["kernel"] == "round_adapters"]
        return sum(t["bytes_written"] for r in copies for t in r["tensors"])

    mixed = make_tensors(ids, 24, 18, 3, 4, MIXED)
    assert rounded_bytes(mixed) == 2 * 3 * 4 * (24 + 18)
    same = make_tensors(ids, 24, 18, 3, 4, BF16)
    assert rounded_bytes(same) == 0
    wide = torch.zeros(3, 6, 40, dtype=torch.bfloat16)
    wide[:, :4, :24] = same["lora_a"]
    assert rounded_bytes(same | {"lora_a": wide[:, :4, :24]}) == 0
    columns_first = same["lora_b"].mT.contiguous().mT
    y, _ = forward(*raw_args(same | {"lora_b": columns_first}))
    assert_same_bits(y, forward(*raw_args(same))[0], "y")
    ragged = same["lora_b"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    y, _ = forward(*raw_args(same | {"lora_b": ragged}))
    assert_same_bits(y, forward(*raw_args(same))[0], "y")


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("num_rows", [8, 128])
def test_traffic_of_a_call(device: str, simt: ModuleType, num_rows: int) -> None:
    """Forward: of the adapters only what is in use, x, base_out and y once. Idle: 30 of 34."""
    n, rank, num_in, num_out = 34, 8, 512, 256
    ids = torch.tensor([3, -1, 17, 33, 3, 20, -1, 17], device=device).repeat(num_rows // 8)
    ranks = [8, 4] * (n // 2)
    tensors = make_tensors(ids, num_in, num_out, n, rank, BF16, ranks=ranks)
    forward = torch.ops.lowrank_ext.multi_lowrank_add
    reports = kernel_reports(simt, lambda: forward(*raw_args(tensors)))
    (down,) = (r for r in reports if r["kernel"] == "segment_down")
    (up,) = (r for r in reports if r["kernel"] == "segment_up")

    def traffic(report: dict[str, Any], name: str, what: str = "unique_bytes_read") -> int:
        return next(t[what] for t in report["tensors"] if t["name"] == name)

    used_ranks = sum(ranks[i] for i in (3, 17, 20, 33))
    assert traffic(down, "lora_a") == 2 * used_ranks * num_in
    assert traffic(up, "right") == 2 * used_ranks * num_out
    adapted = num_rows * 6 // 8
    assert traffic(down, "x", "bytes_read") == 2 * adapted * num_in
    assert traffic(up, "base", "bytes_read") == 2 * num_rows * num_out
    assert traffic(up, "out", "bytes_written") == 2 * num_rows * num_out
