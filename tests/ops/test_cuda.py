"""What only a GPU can show: streams, CUDA graphs, sizes past 2³¹, the same bits as on the CPU.

That CUDA computes the right values at all is one more parametrization of the other test files. The
tests marked `sanitize` are small enough to run under compute-sanitizer (`make gpu-check`).
"""

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    MIXED,
    OPS,
    OPTIONAL,
    Tensors,
    assert_exact,
    assert_same_bits,
    assert_same_values,
    call,
    evaluate,
    make_dout,
    make_tensors,
    present,
    seed_tensor,
)
from torch import Tensor

from lowrank_ext import ops, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
by_op = pytest.mark.parametrize("op", OPS)

# Long enough for the host to queue everything that follows while the GPU is still waiting.
SPINS = 50_000_000


def on_gpu(tensors: Tensors) -> Tensors:
    return {name: None if t is None else t.cuda() for name, t in tensors.items()}


def on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}


# The same bits


def assert_equals_the_cpu(
    op: str, dtypes: DtypePair, shape: tuple[int, int, int, int], optional: tuple[str, ...]
) -> None:
    """Small integers, dropout 1/2: no order of summation changes anything, only a mask would."""
    num_rows, num_in, num_out, rank = shape
    tensors = make_tensors(
        op, (num_rows,), num_in, num_out, rank, dtypes, optional=optional, integers=True
    )
    dout = make_dout(tensors, integers=True)
    if dtypes.base.itemsize == 2:  # only integers up to 256 are exact in bfloat16
        for values in (dout, tensors["lora_b"]):
            values[torch.rand(values.shape) < 0.9] = 0
    options = {"scaling": 0.5, "dropout_p": 0.5}
    expected = evaluate(ops, op, tensors, dout, seed=seed_tensor(3), **options)
    got = evaluate(ops, op, on_gpu(tensors), dout.cuda(), seed=seed_tensor(3, "cuda"), **options)
    assert_same_values(on_cpu(got), expected)


@pytest.mark.parametrize("optional", [(), OPTIONAL], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [(1, 40, 24, 8), (70, 64, 72, 130), (300, 264, 136, 48)], ids=str)
@by_op
def test_equals_the_cpu_bit_for_bit(
    op: str, dtypes: DtypePair, shape: tuple[int, int, int, int], optional: tuple[str, ...]
) -> None:
    assert_equals_the_cpu(op, dtypes, shape, optional)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(17, 65, 43, 5), (130, 136, 200, 16)], ids=str)
@by_op
def test_every_kernel_on_few_rows(
    op: str, dtypes: DtypePair, shape: tuple[int, int, int, int]
) -> None:
    """Rows that are not aligned, and rows that are; every optional tensor."""
    assert_equals_the_cpu(op, dtypes, shape, OPTIONAL)


@pytest.mark.parametrize("rank", [8, 64, 200])
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
@by_op
def test_two_runs_give_the_same_bits(op: str, dtypes: DtypePair, rank: int) -> None:
    """At a size whose sums are split over many blocks, with other work on the GPU in between."""
    tensors = make_tensors(op, (3000,), 1100, 900, rank, dtypes, "cuda", optional=OPTIONAL)
    dout = make_dout(tensors)
    options = {"dropout_p": 0.1, "seed": seed_tensor(5, "cuda")}
    first = evaluate(ops, op, tensors, dout, **options)
    torch.randn(2000, 2000, device="cuda").mm(torch.randn(2000, 2000, device="cuda"))
    assert_same_values(evaluate(ops, op, tensors, dout, **options), first)


def test_the_seed_draws_the_same_mask_on_both_devices() -> None:
    """As reference.py defines it, at a size of many blocks."""
    num_rows, num_cols, p = 513, 1031, 0.05
    x = torch.ones(num_rows, num_cols)
    identity = torch.eye(num_cols)
    expected = reference.dropout_mask(77, num_rows, num_cols, p)
    for device in ("cpu", "cuda"):
        moved, eye = x.to(device), identity.to(device)
        zero = torch.zeros_like(moved)
        y = ops.lowrank_add(zero, moved, eye, eye, dropout_p=p, seed=seed_tensor(77, device))
        assert torch.equal((y != 0).cpu(), expected)


# Streams


def late(values: Tensor) -> Tensor:
    """A tensor that gets these values only after a while, on the current stream."""
    tensor = torch.zeros_like(values)
    torch.cuda._sleep(SPINS)
    return tensor.copy_(values)


@by_op
def test_runs_on_the_current_stream(op: str) -> None:
    """Forward and backward wait for inputs that a side stream is still to write."""
    tensors = make_tensors(op, (65,), 72, 40, 8, MIXED, "cuda", optional=OPTIONAL, integers=True)
    dout = make_dout(tensors, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(2, "cuda")}
    needs = [name for name in present(tensors) if name not in ("weight", "bias", "base_out")]
    expected = evaluate(ops, op, tensors, dout, needs, **options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        leaves = dict(tensors)
        for name in needs:
            leaves[name] = late(tensors[name]).requires_grad_()
        y = call(ops, op, leaves, **options)
        grads = torch.autograd.grad(y, [leaves[name] for name in needs], late(dout))
    torch.cuda.current_stream().wait_stream(stream)
    got = {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}
    assert_same_values({"y": y.detach()} | got, expected)


@by_op
def test_side_streams_do_not_disturb_each_other(op: str) -> None:
    """Workspaces come from torch's allocator: two streams at once must not share one."""
    tensors = [make_tensors(op, (700,), 520, 264, 16, MIXED, "cuda") for _ in range(2)]
    douts = [make_dout(t) for t in tensors]
    expected = [evaluate(ops, op, t, d) for t, d in zip(tensors, douts, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i] = evaluate_quietly(op, tensors[i], douts[i])
    torch.cuda.synchronize()
    for values, truth in zip(got, expected, strict=True):
        assert_same_values(values, truth)


def evaluate_quietly(op: str, tensors: Tensors, dout: Tensor, **options: object):
    """As lowrank_cases.evaluate, without its comparisons, which would wait for the GPU."""
    names = present(tensors)
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    y = call(ops, op, leaves, **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in names], dout)
    return {"y": y.detach()} | {f"d{n}": grad for n, grad in zip(names, grads, strict=True)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@by_op
def test_second_gpu_while_the_first_is_current(op: str) -> None:
    """RF-11, on a stream of the second GPU."""
    tensors = make_tensors(op, (33,), 40, 24, 4, FP32, integers=True)
    moved = {name: None if t is None else t.to("cuda:1") for name, t in tensors.items()}
    dout = make_dout(tensors, integers=True).to("cuda:1")
    with torch.cuda.device(0):
        got = assert_exact(op, moved, dout)
        assert torch.cuda.current_device() == 0
    assert {value.device.index for value in got.values()} == {1}


# CUDA graphs


class Captured:
    """Forward and backward of one call in a CUDA graph; replay() gives fresh copies of the values.

    Capturing fails if the op waits for the GPU, or allocates without torch's allocator.
    """

    def __init__(self, op: str, tensors: Tensors, dout: Tensor, **options: object) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the vendor's library sets itself up at the first call
            for _ in range(2):
                evaluate_quietly(op, tensors, dout, **options)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = evaluate_quietly(op, tensors, dout, **options)

    def replay(self) -> dict[str, Tensor]:
        self.graph.replay()
        return {name: value.clone() for name, value in self.values.items()}


@pytest.mark.parametrize("num_rows", [1, 16, 2048])
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@by_op
def test_graph_replays_with_new_inputs_and_seeds(op: str, dtypes: DtypePair, num_rows: int) -> None:
    tensors = make_tensors(op, (num_rows,), 320, 264, 16, dtypes, "cuda", optional=OPTIONAL)
    dout = make_dout(tensors)
    seed = seed_tensor(1, "cuda")
    graph = Captured(op, tensors, dout, dropout_p=0.3, seed=seed)
    for new_seed in (1, 2, 3):
        seed.fill_(new_seed)
        tensors["x"].normal_()
        dout.normal_()
        expected = evaluate_quietly(op, tensors, dout, dropout_p=0.3, seed=seed)
        assert_same_values(graph.replay(), expected)


@by_op
def test_graph_draws_a_new_mask_at_every_replay(op: str) -> None:
    """Without a seed torch's generator advances by replay, as for torch's own dropout."""
    tensors = make_tensors(op, (64,), 320, 264, 16, MIXED, "cuda")
    graph = Captured(op, tensors, make_dout(tensors), dropout_p=0.5)
    torch.cuda.manual_seed(9)
    first, second = graph.replay(), graph.replay()
    assert not torch.equal(first["y"], second["y"])
    torch.cuda.manual_seed(9)
    assert_same_values(graph.replay(), first)
    assert_same_values(graph.replay(), second)


def test_adapter_ids_may_change_between_replays() -> None:
    """multi_lowrank_add: only the GPU looks at them, at those out of range too."""
    n, num_rows, num_in, num_out, rank = 3, 70, 72, 40, 8
    base_out, x = integers(num_rows, num_out), integers(num_rows, num_in)
    lora_a, lora_b = integers(n, rank, num_in), integers(n, num_out, rank)
    ids = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
    arguments = (base_out, x, lora_a, lora_b, ids, torch.ones(n, device="cuda"))
    ops.multi_lowrank_add(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.multi_lowrank_add(*arguments)
    for offset in (-1, 0):
        ids.copy_(torch.arange(num_rows) % 5 + offset)
        graph.replay()
        assert_same_bits(y.clone(), ops.multi_lowrank_add(*arguments), "y")
        assert torch.equal(y.isnan().any(1), ids >= n)
        assert_same_bits(y[ids == -1], base_out[ids == -1], "rows without an adapter")


# TF32 is used where torch allows it


@by_op
def test_float32_is_exact_unless_tf32_is_allowed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(op, (300,), 512, 256, 32, FP32, "cuda")
    truth = call(reference, op, {n: None if t is None else t.double() for n, t in tensors.items()})

    def error() -> float:
        difference = call(ops, op, tensors).double() - truth
        return (difference.norm() / truth.norm()).item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert error() < 2e-6
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 2e-6 < error() < 2e-3


# Sizes past 2³¹ elements


def need_memory(num_bytes: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are")


def integers(*shape: int) -> Tensor:
    """Entries in {-1, 0, 1} without an intermediate of a wider type."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").random_(-1, 2)


def far_rows(num_rows: int, num_cols: int) -> Tensor:
    """The first rows, those at 2³¹ elements, the last ones."""
    middle = 2**31 // num_cols
    rows = [*range(3), *range(middle - 2, middle + 3), *range(num_rows - 3, num_rows)]
    return torch.tensor(rows, device="cuda")


@pytest.mark.parametrize("wide", ["out_features", "in_features"])
def test_more_than_2_to_the_31_elements(wide: str) -> None:
    """y and dout, or x and dx, of 2³¹ elements and a few; the rest is small."""
    need_memory(5 * 2 * 2**31)
    try:
        check_large_sizes(wide)
    except torch.OutOfMemoryError:  # others use the GPU too
        pytest.skip("the GPU's memory did not suffice")


def check_large_sizes(wide: str) -> None:
    many, few, rank = 65536, 16, 4
    num_rows = 2**31 // many + 40
    num_in, num_out = (few, many) if wide == "out_features" else (many, few)
    x, base_out = integers(num_rows, num_in), integers(num_rows, num_out)
    lora_a, lora_b = integers(rank, num_in), integers(num_out, rank)
    seed = seed_tensor(6, "cuda")
    leaves = [x.requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]
    y = ops.lowrank_add(base_out, *leaves, scaling=1.0, dropout_p=0.5, seed=seed)
    # A gradient in few rows: the adapter's gradients are then theirs alone.
    rows = far_rows(num_rows, many)
    dout = torch.zeros(num_rows, num_out, dtype=torch.bfloat16, device="cuda")
    dout[rows] = integers(len(rows), num_out)
    dx, dlora_a, dlora_b = torch.autograd.grad(y, leaves, dout)

    mask = mask_of_rows(rows, num_in, 0.5, 6)
    x_rows = x.detach()[rows].double() * mask * 2
    h = (x_rows @ lora_a.detach().double().T).bfloat16().double()
    dout_rows = dout[rows].double()
    dh = (dout_rows @ lora_b.detach().double()).bfloat16().double()
    within(y.detach()[rows], base_out[rows].double() + h @ lora_b.detach().double().T)
    within(dx[rows], dh @ lora_a.detach().double() * mask * 2)
    within(dlora_a, dh.T @ x_rows)
    within(dlora_b, dout_rows.T @ h)
    others = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    others[rows] = False
    assert not dx[others.nonzero()[::997, 0]].any()


def mask_of_rows(rows: Tensor, num_cols: int, p: float, seed: int) -> Tensor:
    """reference.dropout_mask of these rows only: the whole mask would not fit."""
    calls = torch.arange(-(-num_cols // 8), device=rows.device).expand(len(rows), -1)
    row = rows.unsqueeze(1).expand_as(calls)
    zero = torch.zeros_like(calls)
    words = reference._philox4x32([calls, row, zero, zero], (seed, 0))
    draws = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack(draws, dim=-1) >= reference.dropout_threshold(p)
    return kept.reshape(len(rows), -1)[:, :num_cols].double()


def within(got: Tensor, truth: Tensor) -> None:
    """Equal but for the rounding of h, dh and the result to bfloat16."""
    torch.testing.assert_close(got.double(), truth, rtol=2**-7, atol=2**-7 * truth.abs().max())
