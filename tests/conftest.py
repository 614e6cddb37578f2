"""Fixtures shared by all tests: devices, dtypes, the seed and the thread count."""

import os
from typing import NamedTuple

import pytest
import torch

pytest.register_assert_rewrite("lowrank_cases")

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


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session", params=DTYPE_PAIRS, ids=dtype_id)
def dtypes(request: pytest.FixtureRequest) -> DtypePair:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def shared_cores() -> None:
    """Parallel workers divide the cores between them instead of each taking all."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
