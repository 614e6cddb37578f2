"""Versions and processor, for report.json and `doctor`."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

import lowrank_ext as lr
from lowrank_ext import _build_info

_PACKAGES = ("transformers", "peft", "safetensors", "gguf", "numpy")


def environment() -> dict[str, Any]:
    """Facts about the software and the machine, JSON-serializable."""
    return {
        "lowrank_ext": lr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_features": torch.ops.lowrank_ext.cpu_features(),
        "threads": torch.get_num_threads(),
        "cuda_available": torch.cuda.is_available(),
        "built_with_torch": _build_info.TORCH_VERSION,
        "built_with_compiler": _build_info.COMPILER,
        "built_with_cuda": _build_info.CUDA_VERSION,
        "cuda_architectures": list(_build_info.CUDA_ARCHS),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The model name that the system gives, else the machine type."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
