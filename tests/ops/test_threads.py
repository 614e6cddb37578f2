"""Work split over threads: every op of the CPU gives the bits of one thread.

`make test` gives a worker one thread, so each test sets its own numbers of them, and its sizes are
enough work to give seven threads a part of every loop. Values are integers whose sums are exact: a
vendor's product may sum in another order where it has more threads.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    BF16,
    FP32,
    MIXED,
    OPTIONAL,
    Tensors,
    assert_same_bits,
    call,
    make_tensors,
    seed_tensor,
)
from moe_cases import GROUPED_RANK, PER_TOKEN_RANK, integer_tensors
from torch import Tensor

from lowrank_ext import ops

NUM_ROWS, NUM_IN, NUM_OUT = 520, 460, 450
COUNTS = (2, 3, 7)
TRAINED = ("x", "lora_a", "lora_b")
OPTIONS = {"dropout_p": 0.5, "seed": seed_tensor(6)}

two_dtypes = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def assert_same_on_any_number_of_threads(
    op: Callable[[Tensors], Tensor], tensors: Tensors, trained: tuple[str, ...]
) -> None:
    """y and all gradients. Only the op and its backward run on several threads."""
    leaves = {name: tensors[name].requires_grad_() for name in trained}
    dout = torch.randint(-1, 2, (NUM_ROWS, NUM_OUT)).to(tensors["x"].dtype)

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        y = op(tensors)
        values = [y.detach(), *torch.autograd.grad(y, leaves.values(), dout)]
        torch.set_num_threads(1)
        return values

    alone = run(1)
    for count in COUNTS:
        for name, value, expected in zip(("y", *leaves), run(count), alone, strict=True):
            assert_same_bits(value, expected, f"{name} on {count} threads")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_an_op_starts_as_many_threads_as_torch_allows() -> None:
    x = torch.ones(NUM_ROWS, NUM_IN)
    torch.set_num_threads(7)
    ops.lowrank_add(x[:, :9], x, x[:2], torch.ones(9, 2), **OPTIONS)
    assert len(os.listdir("/proc/self/task")) >= 7


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("op", ["lowrank_linear", "lowrank_add"])
def test_branch(op: str, dtypes: DtypePair, dropout_p: float) -> None:
    tensors = make_tensors(
        op, (NUM_ROWS,), NUM_IN, NUM_OUT, 9, dtypes, integers=True, optional=OPTIONAL
    )
    options = OPTIONS | {"dropout_p": dropout_p}
    trained = ("x", "lora_a", "lora_b", *OPTIONAL)
    assert_same_on_any_number_of_threads(
        lambda tensors: call(ops, op, tensors, **options), tensors, trained
    )


@two_dtypes
@pytest.mark.parametrize("num_adapters", [2, 6], ids=["large segments", "small segments"])
def test_adapters(dtypes: DtypePair, num_adapters: int) -> None:
    """Neighbors have different adapters."""
    tensors = make_tensors(
        "lowrank_add", (NUM_ROWS,), NUM_IN, NUM_OUT, num_adapters * 16, dtypes, integers=True
    )
    stacks = {
        "lora_a": tensors["lora_a"].reshape(num_adapters, 16, NUM_IN),
        "lora_b": tensors["lora_b"].reshape(num_adapters, NUM_OUT, 16),
        "adapter_ids": torch.arange(NUM_ROWS) % num_adapters,
        "scaling": torch.ones(num_adapters),
    }
    tensors = {name: tensors[name] for name in ("base_out", "x")} | stacks
    assert_same_on_any_number_of_threads(
        lambda tensors: ops.multi_lowrank_add(**tensors, **OPTIONS),
        tensors,
        TRAINED,
    )


@two_dtypes
@pytest.mark.parametrize("rank", [PER_TOKEN_RANK, GROUPED_RANK], ids=["per token", "grouped"])
def test_experts(dtypes: DtypePair, rank: int) -> None:
    tensors = integer_tensors((NUM_ROWS,), NUM_IN, NUM_OUT, 4, rank, dtypes=dtypes)
    assert_same_on_any_number_of_threads(
        lambda tensors: ops.moe_lowrank_add(**tensors, top_k=2, **OPTIONS).y,
        tensors,
        ("x", "router_weight", "lora_a", "lora_b"),
    )


def test_scratch_is_each_threads_own() -> None:
    """Long calls, again and again: threads that share what they write must meet."""
    x = torch.randint(-1, 2, (4096, 1024)).bfloat16()
    adapter = x.new_ones(1, 1024), x.new_ones(1, 1)
    base_out = x.new_zeros(4096, 1)

    def run(count: int) -> Tensor:
        torch.set_num_threads(count)
        y = ops.lowrank_add(base_out, x, *adapter, **OPTIONS)
        torch.set_num_threads(1)
        return y

    alone = run(1)
    for _ in range(8):
        for count in COUNTS:
            assert_same_bits(run(count), alone, f"y on {count} threads")


@two_dtypes
@pytest.mark.parametrize("rank", [9, 700], ids=["in the kept scratch", "beyond it"])
def test_calls_at_once_have_scratch_of_their_own(dtypes: DtypePair, rank: int) -> None:
    """Of several Python threads, forward and backward; ops leave the interpreter while they run."""
    tensors = make_tensors(
        "lowrank_linear", (NUM_ROWS,), NUM_IN, NUM_OUT, rank, dtypes, integers=True
    )
    torch.set_num_threads(1)

    def run(scaling: float) -> list[Tensor]:
        leaves = {name: tensors[name].detach().requires_grad_() for name in TRAINED}
        y = call(ops, "lowrank_linear", tensors | leaves, scaling=scaling, **OPTIONS)
        return [y.detach(), *torch.autograd.grad(y, leaves.values(), torch.ones_like(y))]

    scalings = (1.0, 2.0, 4.0)
    alone = [run(scaling) for scaling in scalings]
    for _ in range(4):
        with ThreadPoolExecutor(len(scalings)) as pool:
            together = list(pool.map(run, scalings))
        for values, expected in zip(together, alone, strict=True):
            for value, one in zip(values, expected, strict=True):
                assert_same_bits(value, one, "a call beside others")
