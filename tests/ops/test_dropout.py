"""Dropout drawn in the kernels: the mask, its statistics, the same mask wherever it is drawn."""

import math

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    FP32,
    MIXED,
    OPS,
    OPTIONAL,
    assert_exact,
    assert_same_bits,
    assert_same_values,
    call,
    evaluate,
    make_dout,
    make_tensors,
    seed_tensor,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_ext import ops, reference

# Below one draw in 65536, the smallest, usual values, one that is not exact, nearly all, all.
PROBABILITIES = [2.0**-18, 2.0**-16, 0.05, 0.1, 0.5, 0.9, 1 - 2.0**-16, 1.0]
SEEDS = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -1, 0x0123456789ABCDEF]


def branch(op: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, **options: object) -> Tensor:
    """The low-rank branch alone, through either op."""
    zeros = x.new_zeros(lora_b.shape[0], x.shape[-1])
    if op == "lowrank_linear":
        return ops.lowrank_linear(x, zeros, None, lora_a, lora_b, **options)
    return ops.lowrank_add(
        x.new_zeros(*x.shape[:-1], lora_b.shape[0]), x, lora_a, lora_b, **options
    )


def forward_mask(op: str, num_rows: int, num_cols: int, p: float, seed: Tensor, dtype) -> Tensor:
    """With identities for lora_a and lora_b the branch of a matrix of ones is mask / (1 - p)."""
    identity = torch.eye(num_cols, device=seed.device, dtype=dtype)
    ones = torch.ones(num_rows, num_cols, device=seed.device, dtype=dtype)
    return branch(op, ones, identity, identity, dropout_p=p, seed=seed) != 0


def backward_masks(
    op: str, num_rows: int, num_cols: int, p: float, seed: Tensor, dtype
) -> tuple[Tensor, Tensor]:
    """The masks of dx and of dlora_a, at rank num_rows.

    dh is the identity, so dlora_a is drop(x) itself; lora_a is all ones, so dx is mask / (1 - p).
    """
    x = torch.ones(num_rows, num_cols, device=seed.device, dtype=dtype, requires_grad=True)
    lora_a = torch.ones(num_rows, num_cols, device=seed.device, dtype=dtype, requires_grad=True)
    identity = torch.eye(num_rows, device=seed.device, dtype=dtype)
    y = branch(op, x, lora_a, identity, dropout_p=p, seed=seed)
    dx, dlora_a = torch.autograd.grad(y, (x, lora_a), identity)
    return dx != 0, dlora_a != 0


def expected_mask(seed: int, num_rows: int, num_cols: int, p: float, device: str) -> Tensor:
    return reference.dropout_mask(seed, num_rows, num_cols, p).to(device)


# The mask


def test_philox_known_answers() -> None:
    """The first three vectors that Random123 publishes for philox4x32-7, for the reference."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    known = [
        ([0] * 4, (0, 0), [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (pi, (0xA4093822, 0x299F31D0), [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    ]
    for counter, key, words in known:
        got = reference._philox4x32([torch.tensor(word) for word in counter], key)
        assert [int(word) for word in got] == words


@pytest.mark.parametrize("op", OPS)
def test_op_draws_the_known_words(device: str, op: str) -> None:
    """Seed 0, row 0: the draws are the halves of the first known answer, low half first.

    A draw is dropped when it is below p · 65536, so p just above it drops it and p at it keeps it.
    """
    draws = [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]
    seed = seed_tensor(0, device)
    for column, draw in enumerate(draws):
        kept = forward_mask(op, 1, 8, draw / 65536, seed, torch.float32)
        dropped = forward_mask(op, 1, 8, (draw + 1) / 65536, seed, torch.float32)
        assert kept[0, column] and not dropped[0, column]


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_mask_equals_reference(device: str, dtype: torch.dtype, op: str, p: float) -> None:
    seed = 1234567
    expected = expected_mask(seed, 21, 41, p, device)
    assert torch.equal(forward_mask(op, 21, 41, p, seed_tensor(seed, device), dtype), expected)
    for mask in backward_masks(op, 21, 41, p, seed_tensor(seed, device), dtype):
        assert torch.equal(mask, expected)


@pytest.mark.simt(every=3)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_depends_on_all_bits_of_the_seed(device: str, op: str, seed: int) -> None:
    expected = expected_mask(seed, 9, 70, 0.5, device)
    got = forward_mask(op, 9, 70, 0.5, seed_tensor(seed, device), torch.float32)
    assert torch.equal(got, expected)
    others = [expected_mask(other, 9, 70, 0.5, device) for other in SEEDS if other != seed]
    assert not any(torch.equal(expected, other) for other in others)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 1), (1, 300), (600, 7), (530, 129)])
def test_mask_of_several_blocks(device: str, op: str, num_rows: int, num_cols: int) -> None:
    seed = 99
    expected = expected_mask(seed, num_rows, num_cols, 0.3, device)
    for dtype in (torch.float32, torch.bfloat16):
        got = forward_mask(op, num_rows, num_cols, 0.3, seed_tensor(seed, device), dtype)
        assert torch.equal(got, expected)
    for mask in backward_masks(
        op, num_rows, num_cols, 0.3, seed_tensor(seed, device), torch.float32
    ):
        assert torch.equal(mask, expected)


@pytest.mark.simt
@pytest.mark.parametrize("op", OPS)
def test_mask_at_rank_one(device: str, op: str) -> None:
    """h = Σ_k mask[m, k] 2^k is the row of the mask, read as a binary number."""
    num_rows, num_cols, seed = 40, 50, 77
    powers = 2.0 ** torch.arange(num_cols, dtype=torch.float64, device=device)
    x = powers.expand(num_rows, num_cols)
    ones = torch.ones(1, num_cols, dtype=torch.float64, device=device)
    y = branch(op, x, ones, ones[:, :1], dropout_p=0.5, seed=seed_tensor(seed, device))
    expected = expected_mask(seed, num_rows, num_cols, 0.5, device).double() @ powers * 2
    assert torch.equal(y[:, 0], expected)


@pytest.mark.simt
@pytest.mark.parametrize("op", OPS)
def test_rows_are_counted_over_all_leading_dimensions(device: str, op: str) -> None:
    """Also where x is a view: the mask belongs to positions, not to addresses."""
    flat = torch.randn(12, 10, device=device)
    lora_a, lora_b = torch.randn(3, 10, device=device), torch.randn(5, 3, device=device)
    options = {"dropout_p": 0.5, "seed": seed_tensor(3, device)}
    expected = branch(op, flat, lora_a, lora_b, **options)
    views = [flat.reshape(3, 4, 10), flat.reshape(2, 2, 3, 10), flat.mT.contiguous().mT]
    for view in views:
        got = branch(op, view, lora_a, lora_b, **options).reshape(12, 5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_the_mask() -> None:
    threads = torch.get_num_threads()
    expected = reference.dropout_mask(5, 300, 129, 0.3)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for op in OPS:
                got = forward_mask(op, 300, 129, 0.3, seed_tensor(5), torch.float32)
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.simt
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_seed_may_have_any_shape_of_one_element(device: str, op: str, shape: tuple) -> None:
    tensors = make_tensors(op, (3,), 8, 6, 2, FP32, device)
    seed = seed_tensor(4, device)
    got = call(ops, op, tensors, dropout_p=0.5, seed=seed.reshape(shape))
    assert_same_bits(got, call(ops, op, tensors, dropout_p=0.5, seed=seed), "y")


# Statistics, of the definition that the ops were shown to equal


def correlation(left: Tensor, right: Tensor) -> float:
    """In standard deviations of that of independent draws."""
    left, right = left.double().flatten(), right.double().flatten()
    product = ((left - left.mean()) * (right - right.mean())).mean()
    spread = left.std(correction=0) * right.std(correction=0)
    return float(product / spread * math.sqrt(left.numel()))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_fraction_dropped(p: float) -> None:
    """Total, each row and each column: within 5 (6 for the many) standard deviations of p."""
    mask = reference.dropout_mask(42, 1024, 1024, p)
    deviation = math.sqrt(p * (1 - p))
    probability = 1 - reference.dropout_threshold(p) / 65536
    kept = mask.double()
    assert abs(kept.mean() - probability) < 5 * deviation / 1024
    for dim in (0, 1):
        means = kept.mean(dim)
        assert (means - probability).abs().max() < 6 * deviation / 32
        # The means themselves scatter as independent draws do: neither too little nor too much.
        assert 0.85 < means.std() / (deviation / 32) < 1.15


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_neighbors_are_independent(p: float) -> None:
    mask = reference.dropout_mask(7, 512, 1024, p)
    for shift in (1, 2, 7, 8, 16, 128):
        assert abs(correlation(mask[:, shift:], mask[:, :-shift])) < 5, f"columns, {shift} apart"
        assert abs(correlation(mask[shift:], mask[:-shift])) < 5, f"rows, {shift} apart"
    assert abs(correlation(mask[:, :512], mask[:, :512].mT)) < 5, "rows against columns"


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_seeds_are_independent(p: float) -> None:
    base = reference.dropout_mask(1000, 256, 1024, p)
    for other in (1001, 1002, 1024, 1000 + 2**32, 1000 + 2**33, -1000):
        mask = reference.dropout_mask(other, 256, 1024, p)
        assert abs(correlation(base, mask)) < 5, other


# One mask in forward and backward: RF-05


@pytest.mark.parametrize("op", OPS)
def test_gradient_sees_the_mask_of_the_forward(device: str, op: str) -> None:
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.ones(1, 8, device=device, requires_grad=True)
        lora_a = torch.ones(1, 8, device=device, requires_grad=True)
        lora_b = torch.ones(1, 1, device=device)
        y = branch(op, x, lora_a, lora_b, dropout_p=0.5)
        y.sum().backward()
        assert set(x.grad.flatten().tolist()) <= {0.0, 2.0}
        assert x.grad.sum() == y.sum()
        assert torch.equal(lora_a.grad, x.grad)
        seen.add(tuple(x.grad.flatten().tolist()))
    assert len(seen) > 15


def test_base_path_is_not_dropped(device: str) -> None:
    """RF-05 with a weight: only the branch is masked, in y and in dx."""
    x = torch.ones(1, 8, device=device, requires_grad=True)
    one = torch.ones(1, 8, device=device)
    y = ops.lowrank_linear(x, one, None, one, one[:, :1], dropout_p=0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(dx.flatten().tolist()) <= {1.0, 3.0}
    assert y.item() == dx.sum().item()


@pytest.mark.simt(every=3)
@pytest.mark.parametrize("op", OPS)
def test_everything_dropped(device: str, dtype: torch.dtype, op: str) -> None:
    """RF-05: p = 1 gives exact zeros in the branch, also of values that are not finite."""
    x = torch.tensor([[1.0, -2.0, 3.0]], device=device, dtype=dtype, requires_grad=True)
    lora_a = torch.ones(2, 3, device=device, dtype=dtype, requires_grad=True)
    lora_b = torch.ones(4, 2, device=device, dtype=dtype, requires_grad=True)
    y = branch(op, x, lora_a, lora_b, dropout_p=1.0)
    y.sum().backward()
    for value in (y, x.grad, lora_a.grad, lora_b.grad):
        assert torch.equal(value, torch.zeros_like(value))


def test_masks_go_on_from_one_block_of_rows_to_the_next(device: str, dtypes: DtypePair) -> None:
    """More rows than a block of keep bits (8192) or of scratch (512) has; one code of both ops."""
    tensors = make_tensors("lowrank_add", (8200,), 16, 8, 2, dtypes, device, integers=True)
    dout = make_dout(tensors, integers=True)
    assert_exact("lowrank_add", tensors, dout, dropout_p=0.5, seed=seed_tensor(6, device))


# The generator


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_drawn_without_dropout(device: str, op: str) -> None:
    """p = 0 also equals the call without a dropout argument, bit for bit, whatever the seed."""
    tensors = make_tensors(op, (5,), 12, 9, 3, FP32, device)
    dout = make_dout(tensors)
    state = generator_state(device)
    plain = evaluate(ops, op, tensors, dout)
    assert_same_values(evaluate(ops, op, tensors, dout, dropout_p=0.0), plain)
    seed = seed_tensor(5, device)
    assert_same_values(evaluate(ops, op, tensors, dout, dropout_p=0.0, seed=seed), plain)
    call(ops, op, tensors, dropout_p=0.5, seed=seed)
    assert torch.equal(generator_state(device), state)


def generator_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("op", OPS)
def test_manual_seed_repeats_the_masks(device: str, op: str) -> None:
    tensors = make_tensors(op, (5,), 40, 9, 3, FP32, device)

    def three_calls() -> list[Tensor]:
        torch.manual_seed(11)
        return [call(ops, op, tensors, dropout_p=0.5) for _ in range(3)]

    first, second = three_calls(), three_calls()
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right, "y after the same manual_seed")
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_drawn_seeds_use_both_words() -> None:
    """Seeds that torch's generator draws differ in the high and in the low 32 bits."""
    with torch.autograd.graph.saved_tensors_hooks(collect := Collector(), lambda kept: kept):
        for _ in range(20):
            x = torch.ones(1, 4, requires_grad=True)
            ops.lowrank_add(x.detach(), x, torch.ones(2, 4), torch.ones(4, 2), dropout_p=0.5)
    assert len(collect.seeds) == len({seed >> 32 for seed in collect.seeds}) == 20
    assert len({seed & 0xFFFFFFFF for seed in collect.seeds}) == 20


class Collector:
    """A pack hook that notes every int64 tensor of one element."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int64 and tensor.numel() == 1:
            self.seeds.append(tensor.item())
        return tensor


# Recomputation


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
def test_recomputation_draws_the_same_mask(
    device: str, op: str, use_reentrant: bool, dtypes
) -> None:
    """Two dropped layers under activation checkpointing give the gradients of the plain run."""
    tensors = make_tensors(op, (6,), 10, 10, 3, dtypes, device, optional=OPTIONAL)
    trained = [name for name in tensors if name.startswith(("x", "lora")) or name in OPTIONAL]

    def two_layers(x: Tensor, *values: Tensor) -> Tensor:
        named = tensors | dict(zip(trained[1:], values, strict=True))
        for _ in range(2):
            x = call(ops, op, named | {"x": x}, dropout_p=0.4)
        return x

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(21)
        leaves = [tensors[name].detach().clone().requires_grad_() for name in trained]
        run(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    trained.sort(key=lambda name: name != "x")
    plain = gradients(two_layers)
    again = gradients(lambda *leaves: checkpoint(two_layers, *leaves, use_reentrant=use_reentrant))
    for name, left, right in zip(trained, plain, again, strict=True):
        assert_same_bits(right, left, f"d{name} with checkpointing")
