"""What the ops and modules keep for backward, counted in bytes with saved_tensors_hooks, and what
the ops allocate on the CPU while they run, as the profiler counts it."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    MIXED,
    OPS,
    OPTIONAL,
    POSITIONAL,
    Tensors,
    call,
    make_tensors,
    seed_tensor,
)
from saved_bytes import address, bytes_kept_by, kept_beside, storages_kept
from torch import nn

from lowrank_ext import ops
from lowrank_ext.nn import LaMDALinear, LoRALinear

ROWS, NUM_IN, NUM_OUT, RANK = 50, 96, 80, 4


def frozen(tensors: Tensors, trained: tuple[str, ...]) -> Tensors:
    for name in trained:
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_only_h_is_new(device: str, dtypes: DtypePair, op: str, dropout_p: float) -> None:
    """Beside inputs and the seed: h in x's dtype. No mask, no dropped x, no fp32 copy."""
    tensors = make_tensors(op, (5, 10), NUM_IN, NUM_OUT, RANK, dtypes, device, optional=OPTIONAL)
    frozen(tensors, ("x", "lora_a", "lora_b", *OPTIONAL))
    seed = seed_tensor(1, device) if dropout_p else None
    kept = kept_beside(
        lambda: call(ops, op, tensors, dropout_p=dropout_p, seed=seed), [*tensors.values(), seed]
    )
    assert kept == [(ROWS * RANK * dtypes.base.itemsize, dtypes.base)]


@pytest.mark.parametrize("op", OPS)
def test_a_drawn_seed_is_eight_bytes(device: str, op: str) -> None:
    tensors = frozen(
        make_tensors(op, (ROWS,), NUM_IN, NUM_OUT, RANK, MIXED, device), ("x", "lora_b")
    )
    kept = kept_beside(lambda: call(ops, op, tensors, dropout_p=0.5), list(tensors.values()))
    assert kept == [(8, torch.int64), (ROWS * RANK * 2, torch.bfloat16)]


TRAINED = {
    "everything": ("x", "lora_a", "lora_b", "core"),
    "lora_a": ("lora_a",),
    "LaMDA": ("x", "lora_b", "core"),
    "LaMDA, lora_b frozen": ("x", "core"),
    "vectors": ("x", "rank_scale", "out_scale"),
    "x alone": ("x",),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("trained", TRAINED)
def test_x_and_h_are_kept_only_where_needed(
    device: str, dtypes: DtypePair, op: str, dropout_p: float, trained: str
) -> None:
    names = TRAINED[trained]
    tensors = make_tensors(op, (ROWS,), NUM_IN, NUM_OUT, RANK, dtypes, device, optional=OPTIONAL)
    # x is a middle result, as in a network; a leaf with a gradient would be alive anyway.
    seed = seed_tensor(1, device)
    frozen(tensors, tuple(name for name in names if name != "x"))
    if "x" in names:
        leaf = torch.zeros_like(tensors["x"], requires_grad=True)
        tensors["x"] = tensors["x"] + leaf
    options = {"dropout_p": dropout_p, "seed": seed}
    kept = storages_kept(lambda: call(ops, op, tensors, **options))
    assert (address(tensors["x"]) in kept) == ("lora_a" in names)
    if op == "lowrank_add":
        assert address(tensors["base_out"]) not in kept
    beside = kept_beside(lambda: call(ops, op, tensors, **options), [*tensors.values(), seed])
    h_needed = bool(set(names) - {"x", "lora_a"})
    h = (ROWS * RANK * dtypes.base.itemsize, dtypes.base)
    assert beside == ([h] if h_needed else [])


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_weight_keeps_x_and_a_trained_bias_does_not(device: str, trained: str) -> None:
    tensors = make_tensors("lowrank_linear", (ROWS,), NUM_IN, NUM_OUT, RANK, FP32, device)
    frozen(tensors, (trained,))
    kept = storages_kept(lambda: call(ops, "lowrank_linear", tensors))
    assert (address(tensors["x"]) in kept) == (trained == "weight")


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_kept_without_a_gradient(device: str, op: str) -> None:
    tensors = make_tensors(op, (ROWS,), NUM_IN, NUM_OUT, RANK, FP32, device, optional=OPTIONAL)
    assert not storages_kept(lambda: call(ops, op, tensors, dropout_p=0.5))
    frozen(tensors, POSITIONAL[op][:1])
    with torch.no_grad():
        assert not storages_kept(lambda: call(ops, op, tensors, dropout_p=0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_modules(device: str, dropout: float) -> None:
    """LoRA keeps x and h, LaMDA h alone: on top of the frozen linear, which keeps nothing."""
    dtype = torch.bfloat16
    linear = nn.Linear(NUM_IN, NUM_OUT, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(ROWS, NUM_IN, device=device, dtype=dtype)
    x_bytes, h_bytes = ROWS * NUM_IN * 2, ROWS * RANK * 2
    seed_bytes = 8 if dropout else 0
    assert bytes_kept_by(linear, x) == 0
    lora = LoRALinear.from_linear(linear, r=RANK, dropout=dropout)
    assert bytes_kept_by(lora, x) == x_bytes + h_bytes + seed_bytes
    linear = nn.Linear(NUM_IN, NUM_OUT, device=device, dtype=dtype).requires_grad_(False)
    lamda = LaMDALinear.from_linear(linear, r=RANK, dropout=dropout)
    assert bytes_kept_by(lamda, x) == h_bytes + seed_bytes
    lamda.lora_b.requires_grad_(False)
    assert bytes_kept_by(lamda, x) == h_bytes + seed_bytes


# ---- while an op runs


def most_bytes_allocated(run: Callable[[], object]) -> int:
    """On the CPU, at any one time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
def test_dropout_makes_no_second_x(op: str, dtypes: DtypePair) -> None:
    """Neither a dropped copy of x nor a product of its size, forward and backward: beside what they
    return the ops hold less than half of x."""
    tensors = make_tensors(op, (8192,), 256, 64, 8, dtypes)
    trained = ["x", "lora_a", "lora_b"]
    leaves = frozen(tensors, tuple(trained))
    run = lambda: call(ops, op, leaves, dropout_p=0.1, seed=seed_tensor(0))  # noqa: E731
    y = run()
    dout = torch.ones_like(y)
    gradient = lambda: torch.autograd.grad(y, [leaves[name] for name in trained], dout)  # noqa: E731
    returned = [y.nbytes, sum(tensors[name].nbytes for name in trained)]
    for step, output_bytes in zip((run, gradient), returned, strict=True):
        allocated = most_bytes_allocated(step)
        assert output_bytes <= allocated < output_bytes + tensors["x"].nbytes / 2
