"""Costs of a method: bytes kept for backward, peak memory, time beside the frozen model's."""

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from lowrank_ext.cli.models import CPU, CausalLM
from lowrank_ext.cli.quantization import stored_tensors
from lowrank_ext.cli.training.evaluation import Batch, on_device_of

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.02


def frozen_loss(model: CausalLM, batch: Batch) -> Tensor:
    """Loss whose backward runs through every layer of a model without trainable weights: the
    embeddings' output requires a gradient."""
    inputs = on_device_of(model, batch)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    loss: Tensor = model(
        inputs_embeds=embeddings.detach().requires_grad_(), **inputs, use_cache=False
    ).loss
    return loss


def saved_bytes(model: CausalLM, loss_of: Callable[[], Tensor]) -> int:
    """Bytes that one forward keeps for its backward: distinct storages of saved tensors, without
    the model's parameters and buffers. A storage counts whole, since a view keeps all of it.
    Random generator and gradients are unchanged."""
    own = {
        stored.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers())
        for stored in stored_tensors(tensor)
    }
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for stored in stored_tensors(tensor):
            storage = stored.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # same storage; the tensor itself would refer to its own graph

    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
    ):
        loss = loss_of()  # keeps the graph alive, so no address is reused
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in own)


class Timing(NamedTuple):
    """Median milliseconds of forward + backward of method and frozen model in the same rounds, and
    their quotient."""

    milliseconds: float
    frozen_milliseconds: float
    ratio: float


def interleaved_timing(
    method: Callable[[], Tensor],
    frozen: Callable[[], Tensor],
    rounds: int,
    stop: Callable[[], bool],
) -> Timing:
    """Times forward + backward of both in turns, so that a busy machine slows both; after one
    warm-up round each."""
    pairs: list[tuple[float, float]] = []
    milliseconds(method), milliseconds(frozen)
    while len(pairs) < rounds and not (pairs and stop()):
        pairs.append((milliseconds(method), milliseconds(frozen)))
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(ours, theirs, ours / theirs)


def milliseconds(loss_of: Callable[[], Tensor]) -> float:
    """Milliseconds of one forward + backward."""
    started = time.perf_counter()
    loss = loss_of()
    torch.autograd.backward(loss)
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return 1e3 * (time.perf_counter() - started)


def release_memory() -> None:
    """Returns freed memory to the system, so that it does not count in the next method's peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Peak memory inside a `with` block. On a GPU that of torch's tensors there; else the resident
    memory of the process: on Linux the kernel's high-water mark, reset on entry, elsewhere samples
    every 20 ms. `source` names which."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.num_bytes = 0
        self.device = device
        self.source = "VmHWM" if device.type == "cpu" else "max_memory_allocated"

    def __enter__(self) -> "PeakMemory":
        release_memory()
        if self.device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            _CLEAR_REFS.write_text("5")
            _high_water_mark()
        except (OSError, StopIteration):
            self._start_sampling()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type != "cpu":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.source == "VmHWM":
            self.num_bytes = _high_water_mark()
        else:
            self._done.set()
            self._thread.join()

    def _start_sampling(self) -> None:
        self.source = f"sampled every {_SAMPLE_SECONDS * 1e3:.0f} ms"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.num_bytes = max(self.num_bytes, process.memory_info().rss)
            if self._done.wait(_SAMPLE_SECONDS):
                return


def _high_water_mark() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
