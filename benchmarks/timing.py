"""One timer, one row printer and one file writer for all benchmarks."""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the GPU where there is one


class Candidate(NamedTuple):
    """Something to time: forward, and backward of what forward returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object]


class Seconds(NamedTuple):
    """One call: forward alone, and forward with backward."""

    forward: float
    both: float


@dataclass
class Rounds:
    """Seconds per candidate; entry i of every candidate is from the same round."""

    seconds: dict[str, list[Seconds]]

    def median(self, name: str, part: str) -> float:
        return statistics.median(getattr(call, part) for call in self.seconds[name])

    def ratio(self, name: str, base: str, part: str) -> float:
        """Median over the rounds of name / base within the round: drift of the machine cancels."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(getattr(a, part) / getattr(b, part) for a, b in pairs)

    def __len__(self) -> int:
        return len(next(iter(self.seconds.values())))


def time_interleaved(
    candidates: Mapping[str, Candidate],
    device: str,
    budget: float,
    min_rounds: int = 3,
    max_rounds: int = 300,
) -> Rounds:
    """Rounds of one call each, in a new random order every time, for about `budget` seconds.

    Warm-up is not counted: it holds page faults, the packing of weights and compilation.
    """
    call = _call_on_gpu(device) if device == "cuda" else _call_on_cpu
    for candidate in candidates.values():
        for _ in range(2):
            call(candidate)
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    rounds = Rounds({name: [] for name in candidates})
    start = time.perf_counter()
    while len(rounds) < min_rounds or (
        len(rounds) < max_rounds and time.perf_counter() - start < budget
    ):
        shuffle(order)
        for name in order:
            rounds.seconds[name].append(call(candidates[name]))
    return rounds


def _call_on_cpu(candidate: Candidate) -> Seconds:
    start = clock()
    y = candidate.forward()
    middle = clock()
    candidate.backward(y)
    end = clock()
    return Seconds(middle - start, end - start)


def _call_on_gpu(device: str) -> Callable[[Candidate], Seconds]:
    """Times the GPU's work alone: L2 is emptied and the GPU held until the host has queued it."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)
    hold = int(HOST_SECONDS * _spins_per_second())
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def call(candidate: Candidate) -> Seconds:
        flush.zero_()
        torch.cuda._sleep(hold)
        start.record()
        y = candidate.forward()
        middle.record()
        candidate.backward(y)
        end.record()
        end.synchronize()
        return Seconds(start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3)

    return call


# Longer than the host takes to queue one candidate's forward and backward.
HOST_SECONDS = 2e-3


@cache
def _spins_per_second() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spins = 1_000_000
    for _ in range(2):  # the first one warms up
        start.record()
        torch.cuda._sleep(spins)
        end.record()
        end.synchronize()
    return spins / (start.elapsed_time(end) / 1e3)


def seconds_back_to_back(candidate: Candidate, calls: int) -> float:
    """Wall time of one of many calls, the host included: what small sizes cost in eager mode."""
    candidate.backward(candidate.forward())
    start = clock()
    for _ in range(calls):
        candidate.backward(candidate.forward())
    return (clock() - start) / calls


def machine(device: str) -> str:
    """One line that says where the numbers come from."""
    parts = [cpu_name(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if device == "cuda":
        parts = [
            torch.cuda.get_device_name(),
            f"driver {nvidia_smi('driver_version')}",
            f"SM clock {nvidia_smi('clocks.current.sm,clocks.max.sm')}",
            f"CUDA {torch.version.cuda}",
            *parts,
        ]
    return ", ".join([*parts, datetime.date.today().isoformat()])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says of torch's current device."""
    # nvidia-smi numbers the cards without regard to CUDA_VISIBLE_DEVICES; the id holds for both.
    card = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", card, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, value: object) -> None:
    """Whole or not at all: written under another name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Table:
    """Rows of fixed width on stdout, each printed as soon as it is known."""

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self.widths = [width for _, width in columns]
        self.row(*(title for title, _ in columns))

    def row(self, *cells: object) -> None:
        padded = [f"{cell!s:>{width}}" for cell, width in zip(cells, self.widths, strict=True)]
        print(" ".join(padded).rstrip(), flush=True)


def progress(text: str) -> None:
    """What is running now, on stderr, replaced by the next; only where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
