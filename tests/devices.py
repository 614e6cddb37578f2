"""What tests run on: dtypes, and devices.

A device is the CPU, a GPU, or the CUDA kernels on the CPU, by the SIMT executor (tests/simt).
"""

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class DtypePair(NamedTuple):
    """dtype of x, weight, bias and base_out, and dtype of the adapter tensors."""

    base: torch.dtype
    adapter: torch.dtype


DTYPE_PAIRS = [DtypePair(dtype, dtype) for dtype in DTYPES] + [
    DtypePair(torch.bfloat16, torch.float32),
    DtypePair(torch.float16, torch.float32),
]


def dtype_id(dtypes: torch.dtype | DtypePair) -> str:
    names = dtypes if isinstance(dtypes, DtypePair) else (dtypes,)
    return "+".join(dict.fromkeys(str(name).removeprefix("torch.") for name in names))


SIMT = "simt"
SIMT_BUILD = Path(__file__).parents[1] / "build" / "simt"
OP_NAMES = (
    "lowrank_linear",
    "lowrank_add",
    "multi_lowrank_add",
    "moe_route",
    "moe_lowrank_add",
)


def has_simt() -> bool:
    return any(SIMT_BUILD.glob("_simt*.so"))


@cache
def simt_ops() -> Any:
    """torch.ops.lowrank_ext_simt, with the Python side that the library's ops have."""
    simt_module()
    for name in OP_NAMES:
        importlib.import_module(f"lowrank_ext.ops.{name}").register("lowrank_ext_simt")
    return torch.ops.lowrank_ext_simt


def simt_module() -> ModuleType:
    """The module _simt: csrc/cuda compiled for the CPU."""
    if str(SIMT_BUILD) not in sys.path:
        sys.path.append(str(SIMT_BUILD))
    return importlib.import_module("_simt")
