"""The timer, the table printer and the file writer of all benchmarks."""

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
from torch.utils.benchmark.utils.timer import timer as clock  # waits for the GPU, if any


class Candidate(NamedTuple):
    """Functions to time: forward, and backward of forward's result."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object]


class Seconds(NamedTuple):
    """Times of one call: forward alone, and forward with backward."""

    forward: float
    both: float


@dataclass
class Rounds:
    """Times by candidate; entry i of every candidate is from the same round."""

    seconds: dict[str, list[Seconds]]

    def median(self, name: str, part: str) -> float:
        return statistics.median(getattr(call, part) for call in self.seconds[name])

    def ratio(self, name: str, base: str, part: str) -> float:
        """Median over the rounds of name / base in the same round, so that drift cancels."""
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

    Warm-up (page faults, packing of weights, compilation) is not counted.
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
    """Times the GPU's work alone: L2 is flushed, and the GPU waits until the host has queued it."""
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


# More than the host needs to queue one candidate's forward and backward.
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
    """Wall time per call over many calls, with the host's: the eager cost of small sizes."""
    candidate.backward(candidate.forward())
    start = clock()
    for _ in range(calls):
        candidate.backward(candidate.forward())
    return (clock() - start) / calls


def machine(device: str) -> str:
    """The machine's hardware and software, in one line."""
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
    """nvidia-smi's answer to `query` for torch's current device."""
    # By id, because nvidia-smi's indices ignore CUDA_VISIBLE_DEVICES.
    card = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", card, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Table:
    """Prints rows of fixed width on stdout, each as soon as it is measured."""

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self.widths = [width for _, width in columns]
        self.row(*(title for title, _ in columns))

    def row(self, *cells: object) -> None:
        padded = [f"{cell!s:>{width}}" for cell, width in zip(cells, self.widths, strict=True)]
        print(" ".join(padded).rstrip(), flush=True)


def progress(text: str) -> None:
    """Shows on stderr what is running, if it is a terminal; the next text replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
