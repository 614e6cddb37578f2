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
    """M = 8192 on 132 multiprocessors, a quarter of both: each of them does the same work."""
    sizes = traffic.Sizes(2048, 4096, 4096, 16, 0.05)
    simt.host.set_num_sms(33)
    forward, backward = traffic.run_step(simt, sizes, "bf16")
    forward_bytes, backward_bytes = traffic.needed_by_pass(sizes, element_bytes=2)
    assert sum(map(traffic.moved, forward)) <= 1.05 * forward_bytes
    moved = sum(map(traffic.moved, backward))
    assert moved <= 1.10 * backward_bytes
    # Partial sums are read right after they are written. Whether L2 keeps them a GPU must show.
    assert moved - sum(map(traffic.partial_sums_read, backward)) <= 1.05 * backward_bytes


def test_experts_move_what_one_branch_of_their_rank_does(
    traffic: ModuleType, simt: ModuleType
) -> None:
    """The dense form of moe_lowrank_add, without its copies of the adapters, which have no rows."""
    sizes = traffic.Sizes(256, 2048, 2048, 32, 0.0)
    forward, backward = traffic.run_moe_step(simt, sizes, "bf16")
    launches = ["stack_experts", "lowrank_down", "moe_gate", "moe_balance", "lowrank_up"]
    assert [report["kernel"] for report in forward] == launches
    branch, branch_backward = traffic.run_step(simt, sizes._replace(rank=32 + 8), "bf16")
    assert sum(map(traffic.moved, forward[1:])) <= 1.05 * sum(map(traffic.moved, branch))
    copies = {"stack_experts", "unstack_experts"}
    passes = [report for report in backward if report["kernel"] not in copies]
    reread = sum(map(traffic.partial_sums_read, passes))
    branch_reread = sum(map(traffic.partial_sums_read, branch_backward))
    moved = sum(map(traffic.moved, passes)) - reread
    assert moved <= 1.10 * (sum(map(traffic.moved, branch_backward)) - branch_reread)


def test_the_table_has_every_kernel(simt: ModuleType) -> None:
    command = [sys.executable, "benchmarks/traffic.py", "--kinds", "bf16", "fp64"]
    sizes = ["--rows", "96", "--in-features", "128", "--out-features", "160", "--rank", "4"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lowrank_add, M=96 K=128 N=160 r=4 dropout=0.05, 4 SMs\n")
    rows = re.findall(r"^(\w+) +(bf16|fp64) +\d+ +\d+ +\d\.\d{3} ", done.stdout, re.MULTILINE)
    for kind in ("bf16", "fp64"):
        kernels = {kernel for kernel, its_kind in rows if its_kind == kind}
        assert kernels >= {
            "lowrank_down",
            "lowrank_up",
            "lowrank_up_backward",
            "lowrank_down_backward_lora_a",
            "lowrank_down_backward_x",
            "stack_experts",
            "moe_down",
            "moe_gate",
            "moe_balance",
            "moe_gate_h",
            "moe_gate_backward",
            "moe_outer",
            "moe_expand",
            "unstack_experts",
            "moe_route",
            "moe_route_backward",
            "order_slots",
            "segment_down",
            "segment_up",
            "segment_up_backward",
            "segment_up_backward_lora_b",
            "segment_down_backward_lora_a",
            "segment_down_backward_x",
        }
        assert len(re.findall(rf"^all of [a-z ]+ward +{kind} ", done.stdout, re.M)) == 4
