"""benchmarks/traffic.py: what it counts, and that `make traffic` prints every kernel."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("traffic")


def tensor(name: str, size: int, read: int = 0, unique: int = 0, written: int = 0) -> dict:
    return {
        "name": name,
        "bytes": size,
        "bytes_read": read,
        "unique_bytes_read": unique,
        "bytes_written": written,
    }


def test_what_counts_once_and_what_each_time(traffic: ModuleType) -> None:
    tensors = [
        tensor("large", 1000, read=2000, unique=1000),  # a stream, read twice
        tensor("thin", 50, read=400, unique=50),  # read by every block
        tensor("partials", 80, written=80),
        tensor("out", 20, read=20, unique=20, written=20),  # added to in place
    ]
    sums = {key: sum(t[key] for t in tensors) for key in ("bytes_read", "bytes_written")}
    report: dict[str, Any] = {"tensors": tensors, **sums, "sectors_read": 80, "sectors_written": 4}
    assert traffic.moved(report) == 2000 + 50 + 80 + 20 + 20
    assert traffic.needed(report) == 1000 + 50 + 20 + 20
    assert traffic.requested(report) == 2000 + 400 + 80 + 20 + 20
    assert math.isclose(traffic.sector_share(report), 84 * 32 / 2520)


def test_the_passes_that_are_needed(traffic: ModuleType) -> None:
    forward, backward = traffic.needed_by_pass(traffic.Sizes(1000, 600, 800, 2, 0.0), 2)
    assert forward == 2 * (1000 * (600 + 2 + 800 + 800) + 2 * 1400)
    assert backward == 2 * (1000 * (800 + 600 + 600 + 2 + 2) + 2 * 2 * 1400)


def test_a_step_moves_the_passes_of_the_design(traffic: ModuleType, simt: ModuleType) -> None:
    """M = 8192 on 132 multiprocessors, a quarter of both: each of them does the same work.

    K and N are half of 4096, so partial sums and h are twice as large a part: 1.12 and 1.07 for
    1.10 and 1.05. Another pass over a stream adds a fifth.
    """
    sizes = traffic.Sizes(2048, 2048, 2048, 16, 0.05)
    simt.host.set_num_sms(33)
    forward, backward = traffic.run_step(simt, sizes, "bf16")
    forward_bytes, backward_bytes = traffic.needed_by_pass(sizes, element_bytes=2)
    assert sum(map(traffic.moved, forward)) <= 1.05 * forward_bytes
    moved = sum(map(traffic.moved, backward))
    assert moved <= 1.12 * backward_bytes
    # Partial sums are read right after they are written. Whether L2 keeps them a GPU must show.
    assert moved - sum(map(traffic.partial_sums_read, backward)) <= 1.07 * backward_bytes


def test_experts_move_what_one_branch_of_their_rank_does(
    traffic: ModuleType, simt: ModuleType
) -> None:
    """The dense form of moe_lowrank_add, without its copies of the adapters, which have no rows."""
    sizes = traffic.Sizes(256, 1024, 1024, 32, 0.0)
    forward, backward = traffic.run_moe_step(simt, sizes, "bf16")
    launches = ["dense_stack", "lowrank_down", "moe_gate", "balance", "lowrank_up"]
    assert [report["kernel"] for report in forward] == launches
    branch, branch_backward = traffic.run_step(simt, sizes._replace(rank=32 + 8), "bf16")
    assert sum(map(traffic.moved, forward[1:])) <= 1.05 * sum(map(traffic.moved, branch))
    copies = {"dense_stack", "dense_unstack"}
    passes = [report for report in backward if report["kernel"] not in copies]
    reread = sum(map(traffic.partial_sums_read, passes))
    branch_reread = sum(map(traffic.partial_sums_read, branch_backward))
    moved = sum(map(traffic.moved, passes)) - reread
    assert moved <= 1.10 * (sum(map(traffic.moved, branch_backward)) - branch_reread)


def asked(reports: list[dict[str, Any]], *names: str) -> int:
    """Bytes of the tensors of these names, each time that they are asked for."""
    return sum(
        tensor["bytes_read"]
        for report in reports
        for tensor in report["tensors"]
        if tensor["name"] in names
    )


def written(reports: list[dict[str, Any]], kernel: str, name: str) -> int:
    [report] = [report for report in reports if report["kernel"] == kernel]
    [tensor] = [tensor for tensor in report["tensors"] if tensor["name"] == name]
    return tensor["bytes_written"]


def total(traffic: ModuleType, reports: list[dict[str, Any]]) -> int:
    return sum(map(traffic.moved, reports))


def test_grouped_experts_of_few_ranks_move_less_than_dense_ones(
    traffic: ModuleType, simt: ModuleType
) -> None:
    """8 experts of rank 2 each with its own mask, top 2.

    In the forward x is read once by the router and once for each choice, which is as little as
    gathered rows can come to: (3 + 2) / 3 = 1.67 of what one pass needs. In the backward dout is
    read once, x three times, dx written once: also 5 / 3.
    """
    sizes = traffic.Sizes(512, 1024, 1024, 16, 0.05)
    options = {"drops": True, "shared_dropout": False}
    assert simt.host.plan_experts(8, 2, 2, **options) == traffic.GROUPED_DENSE_UP
    forward, backward = traffic.run_moe_step(simt, sizes, "bf16")
    stream = 2 * 512 * 1024
    assert asked(forward, "x") == 3 * stream and asked(forward, "base") == stream
    assert written(forward, "grouped_up", "out") == stream
    assert asked(backward, "dout") == stream and asked(backward, "source") == 3 * stream
    assert written(backward, "grouped_down_backward_x", "out") == stream
    forward_bytes, backward_bytes = traffic.needed_by_experts(sizes, element_bytes=2)
    assert total(traffic, forward) <= 1.72 * forward_bytes
    assert total(traffic, backward) <= 1.82 * backward_bytes
    dense_forward, dense_backward = traffic.run_moe_step(simt, sizes, "bf16", traffic.DENSE)
    assert total(traffic, forward) <= 0.88 * total(traffic, dense_forward)
    assert total(traffic, backward) <= 0.80 * total(traffic, dense_backward)


def test_grouped_experts_of_many_ranks(traffic: ModuleType, simt: ModuleType) -> None:
    """16 experts of rank 32, top 2: dout is gathered twice for each choice too."""
    sizes = traffic.Sizes(512, 512, 512, 16 * 32, 0.05, num_experts=16)
    assert simt.host.plan_experts(16, 32, 2, drops=True, shared_dropout=False) == traffic.GROUPED
    forward, backward = traffic.run_moe_step(simt, sizes, "bf16")
    stream = 2 * 512 * 512
    assert asked(forward, "x") == 3 * stream
    assert asked(backward, "dout") == 2 * stream and asked(backward, "source") == 5 * stream
    forward_bytes, backward_bytes = traffic.needed_by_experts(sizes, element_bytes=2)
    assert total(traffic, forward) <= 1.53 * forward_bytes
    assert total(traffic, backward) <= 1.58 * backward_bytes
    # Tensor-core work: of the 16 experts' 528 columns, in six products, about a third is done.
    dense = 6 * 512 // 16 * 512 // 8 * 528 // 16
    assert sum(report["mma"] for report in forward + backward) <= 0.4 * dense


def test_an_expert_without_tokens_costs_nothing(traffic: ModuleType, simt: ModuleType) -> None:
    """Half of the experts are idle: their weights are not read, their gradients only written."""
    torch.manual_seed(0)
    m, k, experts, rank = 256, 512, 8, 32
    x, dout = torch.randn(m, k).bfloat16(), torch.randn(m, k).bfloat16()
    router = torch.randn(experts, k).bfloat16()
    router[experts // 2 :] = 0
    x[:, 0], router[: experts // 2, 0] = 4, 40  # logits of the others are 0
    lora_a, lora_b = torch.randn(experts, rank, k), torch.randn(experts, k, rank)
    weights = router, lora_a.bfloat16(), lora_b.bfloat16()
    options = (2.0, 0.05, torch.tensor([1]), False, None)
    ops = torch.ops.lowrank_ext_simt
    simt.host.fix_expert_plan(grouped=True)
    (_, h, probs, ids, gates, loss, counts), forward = traffic.launches_of(
        simt, lambda: ops.moe_lowrank_add(dout, x, *weights, 2, *options)
    )
    assert int(ids.max()) < experts // 2
    saved = (h, probs, ids, gates, counts)
    grads, backward = traffic.launches_of(
        simt,
        lambda: ops.moe_lowrank_add_backward(
            dout, loss, x, *weights, *saved, *options, *[True] * 4
        ),
    )
    read = [
        tensor["unique_bytes_read"]
        for report in forward + backward
        for tensor in report["tensors"]
        if tensor["name"] in ("lora_a", "lora_b", "right") and report["kernel"] != "lowrank_down"
    ]
    assert read == [lora_a[: experts // 2].numel() * 2] * 4
    for gradient in grads[2:]:
        assert gradient[: experts // 2].any() and not gradient[experts // 2 :].any()


def test_the_table_has_every_kernel(simt: ModuleType) -> None:
    command = [sys.executable, "benchmarks/traffic.py", "--kinds", "bf16", "fp64"]
    sizes = ["--rows", "96", "--in-features", "128", "--out-features", "160", "--rank", "4"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lowrank_add, M=96 K=128 N=160 r=4 dropout=0.05, 4 SMs\n")
    rows = re.findall(r"^(\w+) +(bf16|fp64) +\d+ +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)
    # G and P come from one pass over dout or, in fp64, from one for each.
    up_backward = {"bf16": "lowrank_up_backward", "fp64": "lowrank_up_backward_g"}
    for kind in ("bf16", "fp64"):
        kernels = {kernel for kernel, its_kind in rows if its_kind == kind}
        assert kernels >= {
            "lowrank_down",
            "lowrank_up",
            up_backward[kind],
            "outer_sum",
            "lowrank_down_backward_x",
            "dense_stack",
            "dense_down",
            "moe_gate",
            "balance",
            "dense_apply_gates",
            "moe_gate_backward",
            "dense_outer",
            "dense_expand",
            "dense_unstack",
            "grouped_gate",
            "grouped_apply_gates",
            "grouped_up",
            "grouped_down_backward_x",
            "moe_route",
            "moe_route_backward",
            "order_slots",
            "segment_down",
            "segment_up",
            "segment_up_backward",
            "segment_outer",
            "segment_down_backward_x",
        }
        assert len(re.findall(rf"^all of [a-z ]+ward +{kind} ", done.stdout, re.M)) == 8
