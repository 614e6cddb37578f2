"""The measurements of gpu_check.py, after the library is built for the card.

All GPU times are taken with CUDA events, with L2 flushed before each call and the host's work
hidden (timing.py); candidates take turns, figures are medians.
"""

import itertools
import re
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import torch
from layers import (
    SCALING,
    Case,
    Compiled,
    Data,
    allow_many_graphs,
    as_candidate,
    check,
    make_data,
    make_ours,
    make_peft,
)
from timing import Rounds, seconds_back_to_back, time_interleaved
from torch import nn

from lowrank_ext import ops
from lowrank_ext.nn import LaMDALinear

Row = dict[str, object]

DEVICE = "cuda"
TARGET = Case(8192, 4096, 4096, 16, 0.05, "bfloat16")
GRID_ROWS = (8192, 2048, 512, 16, 1)
GRID_FEATURES = (4096, 8192, 2048)
GRID_RANKS = (16, 64, 8, 256)
GRID_DROPOUTS = (0.05, 0.0)
HOST_BOUND_ROWS = 16  # up to here the host's time per call is reported too


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, reads and writes counted."""
    free, _ = torch.cuda.mem_get_info()
    source = torch.empty(min(2**30, free // 4), dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(23):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(seconds[3:])


def branch_bytes(case: Case, part: str, lora_a_trains: bool = True) -> int:
    """Bytes that the branch must move in addition to the base's two products.

    Forward: reads x, and reads or writes y once more. Backward: reads dout, and x if lora_a trains;
    dx as y. The branch's weights, their gradients and h count once per pass.
    """
    m, k, n, r = case[:4]
    forward = m * k + m * n + m * r + r * (k + n)
    backward = m * n + (1 + lora_a_trains) * m * k + 2 * m * r + 2 * r * (k + n)
    return 2 * (forward if part == "forward" else forward + backward)


# One case, every candidate


def make_modules(case: Case, data: Data) -> dict[str, nn.Module]:
    """The modules by column, adapters in the base's dtype."""
    return {
        "frozen": data.linear,
        "ours": make_ours(case, data, torch.bfloat16),
        "peft": make_peft(case, data, torch.bfloat16),
    }


def make_compiled(case: Case, data: Data, dynamic: bool) -> tuple[dict[str, nn.Module], str | None]:
    """The compiled formula, or the reason why it cannot be compiled (no Triton, no C compiler)."""
    module = Compiled(case, data, dynamic)
    try:
        module(data.x)
    except Exception as error:
        return {}, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {"compile": module}, None


def row_of(case: Case, rounds: Rounds, copy_speed: float, lora_a_trains: bool = True) -> Row:
    row: Row = {**case._asdict(), "rounds": len(rounds)}
    for part in ("forward", "both"):
        frozen = rounds.median("frozen", part)
        extra = rounds.median("ours", part) - frozen
        needed = branch_bytes(case, part, lora_a_trains)
        row[part] = {
            "milliseconds": {name: rounds.median(name, part) * 1e3 for name in rounds.seconds},
            "ratios": {name: rounds.ratio(name, "frozen", part) for name in rounds.seconds},
            # The branch's bytes over the time it added, relative to the copy speed.
            "copy_share": needed / extra / copy_speed if extra > 0 else None,
        }
    return row


def run_case(case: Case, budget: float, copy_speed: float, target: bool = False) -> Row:
    """Checks the candidates of a case, then times them for about `budget` seconds.

    The target's case has a compiled graph of static sizes, and also our layer with fp32 adapters.
    """
    allow_many_graphs()
    data = make_data(case, DEVICE)
    compiled, compile_error = make_compiled(case, data, dynamic=not target)
    modules = {**make_modules(case, data), **compiled}
    if target:
        modules["ours, fp32 adapters"] = make_ours(case, data, torch.float32)
    check(case, data, modules)
    candidates = {name: as_candidate(module, data) for name, module in modules.items()}
    row = row_of(case, time_interleaved(candidates, DEVICE, budget), copy_speed)
    if compile_error:
        row["compile_error"] = compile_error
    if case.num_rows <= HOST_BOUND_ROWS:
        row["call_microseconds"] = {
            name: seconds_back_to_back(candidate, calls=30) * 1e6
            for name, candidate in candidates.items()
        }
    return row


def grid() -> Iterator[Case]:
    """The cases, most important first, since the time may not suffice for all."""
    for rank, features, dropout in itertools.product(GRID_RANKS, GRID_FEATURES, GRID_DROPOUTS):
        for num_rows in GRID_ROWS:
            yield Case(num_rows, features, features, rank, dropout, "bfloat16")


# The case of the targets


def run_target(copy_speed: float) -> Row:
    return run_case(TARGET, 4.0, copy_speed, target=True)


def run_lamda(copy_speed: float) -> Row:
    """LaMDA after its freezing: only the core trains, backward neither reads nor keeps x."""
    data = make_data(TARGET, DEVICE)
    module = LaMDALinear.from_linear(
        data.linear,
        r=TARGET.rank,
        alpha=SCALING * TARGET.rank,
        dropout=TARGET.dropout,
        init="lora",
        adapter_dtype=torch.bfloat16,
    ).train()
    module.lora_b.requires_grad_(False)
    nn.init.normal_(module.lora_b, std=TARGET.rank**-0.5)
    nn.init.normal_(module.core)
    candidates = {
        "frozen": as_candidate(data.linear, data),
        "ours": as_candidate(module, data),
    }
    rounds = time_interleaved(candidates, DEVICE, 3.0)
    return row_of(TARGET, rounds, copy_speed, lora_a_trains=False)


# Kernel by kernel


class KernelTime(NamedTuple):
    name: str  # as the profiler demangles it
    calls: int  # in one forward and backward
    seconds: float  # of one call, median


# The passes over [M, K] and [M, N] tensors, and patterns of their kernels' names. Where K = N the
# sum over rows for dlora_b, if it is a separate pass, needs as many bytes as that for dlora_a.
PASSES = {
    "lowrank_down": r"\blowrank_down_kernel\b",
    "lowrank_up": r"\blowrank_up_kernel\b",
    "lowrank_up_backward": r"\blowrank_up_backward(_g)?_kernel\b",
    "lowrank_down_backward_lora_a": r"\bouter_sum_kernel\b",
    "lowrank_down_backward_x": r"\blowrank_down_backward_x_kernel\b",
}


def pass_bytes(case: Case) -> dict[str, int]:
    """Bytes that each pass of lowrank_add's forward and backward must move.

    The forward reads the base's output; dx is only written, as there is no base product.
    """
    m, k, n, r = case[:4]
    return {
        "lowrank_down": 2 * (m * k + r * k + m * r),
        "lowrank_up": 2 * (2 * m * n + n * r + m * r),
        "lowrank_up_backward": 2 * (m * n + 2 * n * r + 2 * m * r),
        "lowrank_down_backward_lora_a": 2 * (m * k + m * r + r * k),
        "lowrank_down_backward_x": 2 * (m * k + m * r + r * k),
    }


def pass_of(kernel_name: str) -> str | None:
    return next((name for name, sign in PASSES.items() if re.search(sign, kernel_name)), None)


def profile_kernels(case: Case, steps: int = 20) -> list[KernelTime]:
    """The kernels of lowrank_add's forward and backward, timed by the profiler."""
    data = make_data(case, DEVICE)
    base = torch.randn(case.num_rows, case.out_features, device=DEVICE).to(data.x.dtype)
    adapter = [t.to(data.x.dtype).requires_grad_() for t in (data.lora_a, data.lora_b)]
    cache_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=DEVICE)

    def step() -> None:
        y = ops.lowrank_add(base, data.x, *adapter, scaling=SCALING, dropout_p=case.dropout)
        flush.zero_()
        torch.autograd.grad(y, [data.x, *adapter], data.dout)
        flush.zero_()

    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "lowrank_ext" in event.name:
            seconds.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return [
        KernelTime(name, round(len(times) / steps), statistics.median(times))
        for name, times in seconds.items()
    ]


def run_kernels(copy_speed: float) -> list[Row]:
    """One row per kernel; the passes with their share of a copy's speed."""
    needed = pass_bytes(TARGET)
    rows: list[Row] = []
    for kernel in profile_kernels(TARGET):
        name = pass_of(kernel.name)
        rows.append(
            {
                "kernel": kernel.name,
                "pass": name,
                "calls": kernel.calls,
                "microseconds": kernel.seconds * 1e6,
                "copy_share": needed[name] / kernel.seconds / copy_speed if name else None,
            }
        )
    missing = PASSES.keys() - {row["pass"] for row in rows}
    if missing:
        raise RuntimeError(f"the profiler saw no kernel of {', '.join(sorted(missing))}")
    return rows
